"""Averages of Gram matrices over passes, with their largest eigenpairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Side", "SideInverse"]


@dataclass(frozen=True)
class SideInverse:
    """The inverse of a shifted side, as a linear map.

    Attributes:
        outer: what it does to all that the eigenvectors leave, a scalar; or all of it,
            ``(n,)`` for a diagonal and ``(n, n)`` where all eigenvectors are known.
        vectors: eigenvectors, ``(n, k)``, or None.
        less: by how much less it does along each of them, ``(k,)``, or None.
    """

    outer: Tensor
    vectors: Tensor | None = None
    less: Tensor | None = None

    def divided(self, number: float) -> "SideInverse":
        """Return it divided by a number."""
        less = None if self.less is None else self.less / number
        return SideInverse(self.outer / number, self.vectors, less)

    def times(self, matrix: Tensor) -> Tensor:
        """Return its product with ``(n, columns)``. Cost: 2 n k a column."""
        if self.outer.ndim == 2:
            return self.outer @ matrix
        if self.vectors is None or self.less is None:
            return self.outer.unsqueeze(-1) * matrix
        seen = self.less[:, None] * (self.vectors.mT @ matrix)
        return torch.addmm(self.outer * matrix, self.vectors, seen, alpha=-1.0)

    def after(self, matrix: Tensor) -> Tensor:
        """Return the product of ``(rows, n)`` with it. Cost: 2 n k a row."""
        if self.outer.ndim == 2:
            return matrix @ self.outer
        if self.vectors is None or self.less is None:
            return matrix * self.outer
        seen = (matrix @ self.vectors) * self.less
        return torch.addmm(matrix * self.outer, seen, self.vectors.mT, alpha=-1.0)


@dataclass(frozen=True)
class Side:
    """One side of a Kronecker product, averaged over passes.

    Attributes:
        average: Gram matrix ``(n, n)``, or its diagonal ``(n,)``.
        vectors: its first eigenvectors, ``(n, k)``; none of a diagonal.
        values: their eigenvalues, ``(k,)``, not negative.

    >>> rows = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
    >>> side = Side.first(rows @ rows.mT, rank=4)
    >>> side.inverse(1.0, 1.0).times(torch.eye(2))
    tensor([[0.1000, 0.0000],
            [0.0000, 0.5000]])
    """

    average: Tensor
    vectors: Tensor
    values: Tensor

    @classmethod
    def first(cls, gram: Tensor, rank: int) -> "Side":
        """Return the average of one pass.

        Args:
            gram: ``(n, n)``, or its diagonal.
            rank: how many eigenpairs of a long side are kept; one that is no longer
                than twice that keeps all.
        """
        n = len(gram)
        if gram.ndim == 1 or n <= 2 * rank:
            return cls._of(gram, gram.new_zeros(n, 0), rank)
        # The same directions in every run; what is random of them does not matter.
        drawn = torch.randn(n, rank, generator=torch.Generator().manual_seed(0))
        start, _ = torch.linalg.qr(gram @ drawn.to(gram))
        return cls._of(gram, start, rank)

    def after(self, gram: Tensor, keep: float, rank: int) -> "Side":
        """Return the average with one more pass.

        The eigenvectors of a long side follow by one step of subspace iteration.

        Args:
            gram: that of the pass.
            keep: weight of the average so far, in [0, 1].
            rank: as before.
        """
        average = torch.lerp(gram, self.average.to(gram), keep)
        return self._of(average, self.vectors.to(gram), rank)

    @classmethod
    def _of(cls, average: Tensor, start: Tensor, rank: int) -> "Side":
        n = len(average)
        if average.ndim == 1:
            return cls(average, start, average.new_zeros(0))
        if n <= 2 * rank:
            values, vectors = torch.linalg.eigh(average)
            return cls(average, vectors, values.clamp_min(0.0))
        basis, _ = torch.linalg.qr(average @ start)
        values, turn = torch.linalg.eigh(basis.mT @ (average @ basis))
        return cls(average, basis @ turn, values.clamp_min(0.0))

    @property
    def trace(self) -> Tensor:
        """The trace of the average, a scalar."""
        average = self.average
        return (average if average.ndim == 1 else average.diagonal()).sum()

    @property
    def rest(self) -> Tensor:
        """The mean eigenvalue of what the eigenvectors leave, a scalar."""
        left = len(self.average) - len(self.values)
        return ((self.trace - self.values.sum()) / max(left, 1)).clamp_min(0.0)

    def inverse(self, divisor: Tensor | float, shift: float) -> SideInverse:
        """Return the inverse of ``average / divisor + shift``.

        What the eigenvectors leave counts as a multiple of the identity with the same
        trace, so that the inverse is positive definite in any case.

        Args:
            divisor: a positive number.
            shift: a positive number.
        """
        if self.average.ndim == 1:
            return SideInverse((self.average / divisor + shift).reciprocal())
        along = (self.values / divisor + shift).reciprocal()
        if len(along) == len(self.average):
            return SideInverse((self.vectors * along) @ self.vectors.mT)
        outer = (self.rest / divisor + shift).reciprocal()
        return SideInverse(outer, self.vectors, outer - along)
