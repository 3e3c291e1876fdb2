"""Benchmark problems with one mistake each, made in place."""

import riemannian_modules as rm


def sum_for_mean(problem):
    """Takes the mean over the entries of an output for a sum."""
    problem.output = lambda: rm.output.Euclidean(2.0)


def half_square(problem):
    """Forgets the factor 2 of a square."""
    problem.output = rm.output.Euclidean


def equal_sets(problem):
    """Weights all sets of points alike."""

    class Mutant(type(problem)):
        weights = dict.fromkeys(problem.points, 1.0)

    problem.__class__ = Mutant


# Problem, mistake.
MUTANTS = {
    "sum-for-mean": ("autoencoder", sum_for_mean),
    "half-square": ("factorisation", half_square),
    "equal-sets": ("poisson", equal_sets),
}
