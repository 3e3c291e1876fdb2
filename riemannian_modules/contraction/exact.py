"""Rounding to the safe side: bounds from exact rational arithmetic."""

import math
from collections.abc import Sequence
from fractions import Fraction

__all__ = ["root_up", "round_down", "round_up", "verified_factor", "verified_rate"]

Matrix = Sequence[Sequence[float]]


def round_down(value: Fraction) -> float:
    """Return the largest double that is not above ``value``."""
    if abs(value) > Fraction(1.7e308):
        return 1.7e308 if value > 0 else -math.inf
    nearest = float(value)
    return nearest if Fraction(nearest) <= value else math.nextafter(nearest, -math.inf)


def round_up(value: Fraction) -> float:
    """Return the smallest double that is not below ``value``."""
    return 0.0 - round_down(-value)  # never -0.0


def root_up(value: Fraction) -> float:
    """Return a double that is not below the square root of ``value >= 0``."""
    if value > Fraction(1.7e308):
        return math.inf
    if value <= 0:
        return 0.0
    # A power of four keeps the double next to the value in its range.
    half = (value.denominator.bit_length() - value.numerator.bit_length()) // 2
    root = math.ldexp(math.sqrt(float(value * Fraction(4) ** half)), -half)
    while Fraction(root) ** 2 < value:
        root = math.nextafter(root, math.inf)
    return root


def verified_rate(
    rates: Sequence[float],
    gains: Matrix,
    weights: Sequence[float],
    witness: Sequence[float],
) -> float:
    """Return a proved rate of coupled modules in the metric of the given weights.

    Implements :eq:`verified-rate`. The bound holds for every positive witness; it is
    sharp for the one that the eigenvalue solver means. All operations are exact, on
    the numbers as they are stored, and the result is rounded down: nothing that an
    eigenvalue solver says is trusted.

    Args:
        rates: ``lambda_i``, finite.
        gains: ``k_ij``, finite and not negative; the diagonal is not read.
        weights: ``d_i > 0``.
        witness: ``x_i > 0``.

    Returns:
        The rate. Cost: a few rational operations for each gain.

    >>> verified_rate([3.0, 4.0], [[0, 1], [2, 0]], [4 / 3, 2 / 3], [1.0, 1.0])
    2.0
    """
    d = [Fraction(float(each)) for each in weights]
    x = [Fraction(float(each)) for each in witness]
    k = [[Fraction(float(each)) for each in row] for row in gains]
    bounds = []
    for i, rate in enumerate(rates):
        pull = sum(
            (d[i] * k[i][j] + d[j] * k[j][i]) * x[j] for j in range(len(d)) if j != i
        )
        bounds.append(Fraction(float(rate)) - pull / (2 * d[i] * x[i]))
    return round_down(min(bounds))


def verified_factor(
    gains: Matrix, weights: Sequence[float], witness: Sequence[float]
) -> float:
    """Return a proved bound on the norm of a non-negative matrix in given weights.

    Implements :eq:`verified-factor`, Schur's test, in exact arithmetic and rounded up.

    Args:
        gains: the matrix ``N >= 0`` with the factors of the modules on its diagonal.
        weights: ``d_i > 0``.
        witness: ``x_i > 0``.

    Returns:
        An upper bound on ``|D^(1/2) N D^(-1/2)|_2``.

    >>> verified_factor([[0.5, 0.25], [0.25, 0.5]], [1.0, 1.0], [1.0, 1.0])
    0.75
    """
    d = [Fraction(float(each)) for each in weights]
    x = [Fraction(float(each)) for each in witness]
    n = [[Fraction(float(each)) for each in row] for row in gains]
    each = range(len(d))
    out = max(sum((n[i][j] * x[j] for j in each), Fraction()) / x[i] for i in each)
    back = max(
        sum((n[j][i] * d[j] * x[j] for j in each), Fraction()) / (d[i] * x[i])
        for i in each
    )
    return root_up(out * back)
