"""Combinations of rows from a pivoted Cholesky factorisation of the Gram matrix."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from riemannian_modules.factors import column
from riemannian_modules.linearization import Linearization
from riemannian_modules.rows.base import (
    Counted,
    Neglected,
    Spaces,
    combinations,
)

__all__ = ["Pivoted"]


@final
class Pivoted(Counted):
    """Keeps combinations ``Q^T K`` in which the whole Gram matrix is nearly contained.

    The pivoted Cholesky factorisation of ``K sharp K^T`` (Harbrecht, Peters and
    Schneider 2012) takes the row that the rows before explain least, again and again;
    its columns span what Q spans, together with the whitened residual, so that the
    gradient stays a combination of rows. What the rows kept explain of the others
    counts, unlike in :class:`Largest`; in exchange rows are stored, one number for
    each parameter. The trace of what the factorisation leaves bounds the difference
    of the metrics. It costs a column of the Gram matrix for each pivot, O(rank
    count^2), and a backward product for each row. Implements :eq:`rows-pivoted`.

    Args:
        count: number of pivots, at most; one more row is kept for the gradient.

    Raises:
        ShapeError: fewer than one row.

    >>> Pivoted(32)
    Pivoted(32)
    """

    def _reduce(
        self, found: Linearization, spaces: Spaces, energy: Tensor
    ) -> tuple[Linearization, Neglected]:
        y = found.residual

        def gram_column(j: Tensor) -> Tensor:
            columns = [column(f, spaces[name], j) for name, f in found.factors.items()]
            return torch.stack(columns).sum(0)

        span, left = pivoted_cholesky(energy, gram_column, self.count)
        if y is not None:
            span = torch.cat([span, y.to(span).unsqueeze(1)], 1)
        basis = torch.linalg.qr(span).Q
        new = None if y is None else (basis.mT @ y.to(basis)).to(y.dtype)
        reduced = combinations(found, basis.mT, new)
        return reduced, Neglected(left, energy.sum(), basis.shape[1], len(energy))


def pivoted_cholesky(
    diagonal: Tensor, gram_column: Callable[[Tensor], Tensor], count: int
) -> tuple[Tensor, Tensor]:
    """Return L with ``M ~ L L^T`` and the trace of what is left.

    Args:
        diagonal: of M, ``(rank,)``.
        gram_column: a column of M, as a function of its index.
        count: number of pivots.

    Returns:
        L of shape ``(rank, count)``, zero where nothing was left; the trace of the
        positive semidefinite ``M - L L^T``.
    """
    left = diagonal.clone()
    # What is below this is rounding, and no pivot.
    floor = torch.finfo(left.dtype).eps * len(left) * diagonal.amax()
    lower = left.new_zeros(len(left), count)
    for step in range(count):
        pivot = left.argmax()
        height = left.index_select(0, pivot.view(1))
        row = lower.index_select(0, pivot.view(1))[0]
        rest = gram_column(pivot) - lower @ row
        usable = height > floor
        scale = torch.where(usable, height, 1.0).sqrt()
        lower[:, step] = torch.where(usable, rest / scale, 0.0)
        left = (left - lower[:, step].square()).clamp_min(0.0)
        left = left.index_fill(0, pivot.view(1), 0.0)
    return lower, left.sum()
