"""Rows of several examples and of several passes: their sums and their union."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import pad

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.chosen import Shared, rebuilt
from riemannian_modules.factors.convolution import ConvolutionFactor
from riemannian_modules.factors.cotangents import CotangentFactor
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.linear import BiasFactor, LinearFactor
from riemannian_modules.factors.viewed import ViewedFactor, through

__all__ = ["concatenated", "scaled", "summed"]


def summed(factor: MetricFactor, groups: int) -> DenseFactor:
    """Return the factor whose rows are the sums of groups of rows in succession.

    Args:
        factor: the rows of n examples for each of several cotangents.
        groups: number of cotangents, which divides the rank.

    Returns:
        A factor of rank ``groups`` that stores its rows. Cost: that of a backward
        product for each; for a linear layer with n examples ``2 n p`` operations.

    Raises:
        ShapeError: the rank is no multiple of ``groups``.

    >>> summed(DenseFactor(torch.tensor([[1.0], [2.0], [3.0], [4.0]])), 2).to_dense()
    tensor([[3.],
            [7.]])
    """
    if groups < 1 or factor.rank % groups:
        raise ShapeError(
            f"{factor.rank} rows cannot be put into {groups} groups of one size"
        )
    n = factor.rank // groups
    sums = [factor.narrow(j * n, (j + 1) * n).row_sum() for j in range(groups)]
    return DenseFactor(torch.stack(sums))


def scaled(
    factor: MetricFactor, by: float, shared: Shared | None = None
) -> MetricFactor:
    """Return the factor ``by K``; a structured one keeps its structure.

    Args:
        factor: any factor.
        by: a number.
        shared: see :class:`Shared`.

    Returns:
        A factor; the arguments are left alone.
    """
    if by == 1.0:
        return factor
    if isinstance(factor, CotangentFactor):
        shared = Shared() if shared is None else shared
        l = factor.cotangents
        found = rebuilt(factor, None, shared.of(("scaled", by), [l], lambda: by * l))
        if found is not None:
            return found
    if isinstance(factor, ViewedFactor):
        return through(factor, lambda inner: scaled(inner, by, shared))
    return DenseFactor(by * factor.rows(0, factor.rank))


def concatenated(
    factors: Sequence[MetricFactor], groups: int, shared: Shared | None = None
) -> MetricFactor:
    """Return the rows of several passes, as if their examples were of one batch.

    Row ``(j, i)`` is that of cotangent j and example i, the examples of the first
    pass before those of the second. Factors of linear layers and of convolutions
    keep their structure: ``rank (inputs / groups + outputs)`` numbers in the place of
    ``rank parameters``.

    Args:
        factors: of one parameter, each with ``groups`` cotangents.
        groups: number of cotangents, which divides every rank.
        shared: see :class:`Shared`.

    Returns:
        The factor of all rows.

    Raises:
        ShapeError: different parameters, or ranks that are no multiples of ``groups``.

    >>> one, two = DenseFactor(torch.ones(2, 1)), DenseFactor(torch.zeros(4, 1))
    >>> concatenated([one, two], 2).to_dense().view(2, 3)
    tensor([[1., 0., 0.],
            [1., 0., 0.]])
    """
    ranks = [factor.rank for factor in factors]
    shapes = {tuple(factor.shape) for factor in factors}
    if len(shapes) != 1 or groups < 1 or any(rank % groups for rank in ranks):
        raise ShapeError(
            f"factors of shapes {sorted(shapes)} and ranks {ranks} do not have "
            f"{groups} cotangents of one parameter each"
        )
    if len(factors) == 1:
        return factors[0]
    if _alike(factors, groups):
        shared = Shared() if shared is None else shared
        cotangents = [f.cotangents for f in factors]  # type: ignore[attr-defined]
        l = shared.of("cotangents", cotangents, lambda: _joined(cotangents, 1))
        first, inputs = factors[0], None
        if isinstance(first, LinearFactor | ConvolutionFactor):
            inputs = _joined([f.inputs for f in factors], 0)  # type: ignore[attr-defined]
        found = rebuilt(first, inputs, l)
        if found is not None:
            return found
    views = [f for f in factors if isinstance(f, ViewedFactor)]
    if len(views) == len(factors):
        inner = [view.inner for view in views]
        return through(views[0], lambda _: concatenated(inner, groups, shared))
    rows = [f.rows(0, f.rank).reshape(groups, -1, *f.shape) for f in factors]
    return DenseFactor(torch.cat(rows, 1).flatten(0, 1))


def _alike(factors: Sequence[MetricFactor], groups: int) -> bool:
    """Whether the factors can be put together as one of their kind."""
    first = factors[0]
    if not isinstance(first, LinearFactor | BiasFactor | ConvolutionFactor):
        return False
    if any(type(f) is not type(first) for f in factors):
        return False
    if any(len(f.cotangents) != groups for f in factors):  # type: ignore[attr-defined]
        return False
    if isinstance(first, ConvolutionFactor):
        sizes = {f.inputs.shape[1:] for f in factors}  # type: ignore[attr-defined]
        return len(sizes) == 1
    return True


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Concatenate along the examples; missing positions are zero."""
    places = dim + 1
    most = max(t.shape[places] for t in tensors)
    if any(t.shape[places] != most for t in tensors):
        tensors = [pad(t, (0, 0, 0, most - t.shape[places])) for t in tensors]
    return torch.cat(list(tensors), dim)
