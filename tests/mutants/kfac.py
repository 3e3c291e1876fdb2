"""Averaged Kronecker products with one mistake each."""

from dataclasses import replace

import torch

from riemannian_modules.optim.averaged import Averaged, AveragedInverse
from riemannian_modules.optim.sides import Side


class Doubled(Averaged):
    """Counts the mass twice."""

    def inverse(self, mass):
        return super().inverse(2.0 * mass)


class Lopsided(Averaged):
    """Gives the whole identity to the left side."""

    def inverse(self, mass):
        share = (mass * self.left.trace).sqrt()
        left, right = self.left.inverse(share, 1.0), self.right.inverse(share, 1e-6)
        return AveragedInverse(mass, left, right)


class LastOnly(Averaged):
    """Forgets the passes before."""

    @classmethod
    def of(cls, sides, before, keep, rank):
        return super().of(sides, before, 0.0, rank)


AVERAGES = {"doubled": Doubled, "lopsided": Lopsided, "last-only": LastOnly}


class Restless(Side):
    """Takes what the eigenvectors leave for zero."""

    def inverse(self, divisor, shift):
        found = super().inverse(divisor, shift)
        if found.less is None:
            return found
        outer = torch.as_tensor(1.0 / shift, dtype=self.average.dtype)
        return replace(found, outer=outer, less=found.less + outer - found.outer)


class Stale(Side):
    """Keeps the eigenvectors of the first pass."""

    def after(self, gram, keep, rank):
        found = super().after(gram, keep, rank)
        return found if keep == 1.0 else replace(found, vectors=self.vectors)


SIDES = {"restless": Restless, "stale": Stale}
