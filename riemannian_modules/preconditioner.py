r"""An approximate inverse of ``S = 1 + M`` from a few columns of M.

With ``C = M[:, P]`` and ``W = M[P, P]`` the matrix ``C W^-1 C^T`` is the part of M that
the rows P see (column Nystroem, a partial Cholesky factorisation in blocks). P is
chosen in rounds, each in proportion to what is left of the diagonal, as in randomly
pivoted Cholesky (arXiv 2207.06503), with a fixed sequence in place of random numbers:
the same metric gives the same step.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["PivotedPreconditioner"]

_GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0
_TINY = 1e-300

Columns = Callable[[Tensor], Tensor]


class PivotedPreconditioner:
    """``(1 + C W^-1 C^T)^-1`` as a map of vectors, symmetric and positive definite.

    Args:
        diagonal: diagonal of M, ``(rank,)``.
        columns: returns columns of M, ``(rank, k)``, for ``k`` indices.
        pivots: number of columns; 0 for the identity.
        rounds: number of rounds in which they are chosen.

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
        self, diagonal: Tensor, columns: Columns, pivots: int, rounds: int = 4
    ) -> None:
        diagonal = diagonal.double()
        rank = len(diagonal)
        pivots = min(pivots, rank)
        spread = torch.arange(1, rank + 1, dtype=torch.float64, device=diagonal.device)
        # Exponential variables whose rates are the weights: the largest are a sample.
        waiting = (spread * _GOLDEN).frac().log()
        left = diagonal
        self.pivots = torch.zeros(0, dtype=torch.long, device=diagonal.device)
        self._basis: Tensor | None = None
        found: list[Tensor] = []
        for size in _shares(pivots, rounds):
            keys = waiting / left.clamp_min(_TINY)
            keys = keys.index_fill(0, self.pivots, -math.inf)
            new = keys.topk(size).indices
            self.pivots = torch.cat([self.pivots, new])
            some = columns(new)
            eps = torch.finfo(some.dtype).eps
            found.append(some.double())
            C = torch.cat(found, 1)
            B = _nystroem(C, C[self.pivots], eps)
            left = (diagonal - B.square().sum(1)).clamp_min(0.0)
            self._basis = B
        self.remaining = left.sum()
        if self._basis is not None:
            inner = self._basis.mT @ self._basis
            inner.diagonal().add_(1.0)
            lower, _ = torch.linalg.cholesky_ex(inner)
            # B (1 + B^T B)^-1 B^T = V V^T
            self._basis = _right_divided(self._basis, lower)

    def __call__(self, residual: Tensor) -> Tensor:
        """Return the preconditioned residual, ``(rank,)``. Cost O(rank pivots)."""
        V = self._basis
        if V is None:
            return residual
        r = residual.double()
        return (r - V @ (V.mT @ r)).to(residual.dtype)


def _shares(total: int, rounds: int) -> list[int]:
    shares = [total * (i + 1) // rounds - total * i // rounds for i in range(rounds)]
    return [share for share in shares if share]


def _nystroem(C: Tensor, W: Tensor, eps: float) -> Tensor:
    """Return B with ``B B^T = C W^-1 C^T``, W shifted by its own rounding."""
    W = 0.5 * (W + W.mT)
    W.diagonal().add_(4.0 * eps * W.diagonal().sum().clamp_min(_TINY))
    lower, _ = torch.linalg.cholesky_ex(W)
    return _right_divided(C, lower)


def _right_divided(C: Tensor, lower: Tensor) -> Tensor:
    """Return ``C lower^-T``; products are faster than a tall triangular solve."""
    eye = torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    return C @ torch.linalg.solve_triangular(lower, eye, upper=False).mT
