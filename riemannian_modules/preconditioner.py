r"""An approximate inverse of ``S = 1 + M`` from a few columns of M.

With ``C = M[:, P]`` and ``W = M[P, P]`` the matrix ``C W^-1 C^T`` is the part of M that
the rows P see (column Nystroem, a partial Cholesky factorisation in blocks). P is
chosen in rounds that double it, in proportion to what is left of the diagonal, as in
randomly pivoted Cholesky (arXiv 2207.06503), with a fixed sequence in place of random
numbers: the same metric gives the same step.
"""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from riemannian_modules.reading import number

__all__ = ["PivotedPreconditioner", "Worth"]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_TINY = 1e-300
_FIRST = 32

Columns = Callable[[Tensor], Tensor]
Worth = Callable[[int, float], bool]


class PivotedPreconditioner:
    """``(1 + C W^-1 C^T)^-1`` as a map of vectors, symmetric and positive definite.

    Args:
        diagonal: diagonal of M, ``(rank,)``.
        columns: returns columns of M, ``(rank, k)``, for ``k`` indices.
        pivots: at most this many columns; 0 for the identity.
        worth: whether to double the number of columns, asked with their number and
            what remains of the trace; on the CPU only, where the answer is free.

    Attributes:
        remaining: trace of ``M - C W^-1 C^T``, a scalar.
        pivots: the indices P.

    Cost: the columns, and O(rank pivots^2) in float64.

    >>> M = torch.diag(torch.tensor([3.0, 0.0, 8.0], dtype=torch.float64))
    >>> found = PivotedPreconditioner(M.diagonal(), lambda index: M[:, index], 2)
    >>> found(torch.ones(3, dtype=torch.float64)).round(decimals=6)
    tensor([0.2500, 1.0000, 0.1111], dtype=torch.float64)
    """

    def __init__(
        self,
        diagonal: Tensor,
        columns: Columns,
        pivots: int,
        worth: Worth | None = None,
    ) -> None:
        diagonal = diagonal.double()
        rank = len(diagonal)
        on_host = diagonal.device.type == "cpu"
        spread = torch.arange(1, rank + 1, dtype=torch.float64, device=diagonal.device)
        # Exponential variables whose rates are the weights: the largest are a sample.
        waiting = (spread * _GOLDEN).frac().log()
        left = diagonal
        self.pivots = torch.zeros(0, dtype=torch.long, device=diagonal.device)
        basis = diagonal.new_zeros(rank, 0)
        known, pivots = 0, min(pivots, rank)
        while known < pivots:
            if worth is not None and on_host:
                asked = partial(worth, known)
                if not asked(number(left.sum(), asked)):
                    break
            size = min(pivots - known, max(known, _FIRST))
            keys = waiting / left.clamp_min(_TINY)
            keys = keys.index_fill(0, self.pivots, -math.inf)
            new = keys.topk(size).indices
            self.pivots = torch.cat([self.pivots, new])
            some = columns(new)
            known += size
            lost = torch.finfo(some.dtype).eps * diagonal[self.pivots].sum()
            b = _more_of_root(basis, some.double(), new, lost)
            left = (left - b.square().sum(1)).clamp_min(0.0)
            basis = torch.cat([basis, b], 1)
        self.remaining = left.sum()
        self._basis: Tensor | None = None
        self._inner: Tensor | None = None
        if known:
            inner = basis.mT @ basis
            inner.diagonal().add_(1.0)
            root = _inverse_root(inner)
            self._basis, self._inner = basis, root.mT @ root

    def __call__(self, residual: Tensor) -> Tensor:
        """Return the preconditioned residual, ``(rank,)``. Cost O(rank pivots)."""
        b, inner = self._basis, self._inner
        if b is None or inner is None:
            return residual
        r = residual.double()
        return (r - b @ (inner @ (b.mT @ r))).to(residual.dtype)


def _more_of_root(basis: Tensor, c: Tensor, index: Tensor, lost: Tensor) -> Tensor:
    """Return the columns that join a basis when columns of M join the known ones.

    A step of block Cholesky: ``b b^T = c w^-1 c^T`` for what the basis leaves of the
    columns c, with w shifted by the rounding of all pivots.
    """
    rest = torch.addmm(c, basis, basis[index].mT, alpha=-1.0)
    w = rest[index]
    w = 0.5 * (w + w.mT)
    w.diagonal().add_(4.0 * lost.clamp_min(_TINY))
    # A product is faster than a tall triangular solve.
    return rest @ _inverse_root(w).mT


def _inverse_root(matrix: Tensor) -> Tensor:
    """Return the inverse of the lower Cholesky factor."""
    lower, _ = torch.linalg.cholesky_ex(matrix)
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return torch.linalg.solve_triangular(lower, eye, upper=False)
