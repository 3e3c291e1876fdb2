r"""Products with ``M = K sharp K^T`` that do not form it: with a vector, and columns.

For a linear layer on a Euclidean weight both go through the small matrix
``X X^T / mass``, so that a product costs ``O(n^2 out + rank out)`` where that
is less than ``O(n in out)``; all other factors multiply by K^T, ``sharp`` and K in
turn.
"""

from functools import singledispatch

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.chunks import most_entries
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.embedding import EmbeddingFactor
from riemannian_modules.factors.linear import BiasFactor, LinearFactor
from riemannian_modules.factors.slabs import acts_by_row
from riemannian_modules.factors.viewed import ViewedFactor
from riemannian_modules.tangent import TangentSpace

__all__ = ["gram_columns", "gram_diagonal", "gram_product", "has_kernel"]

_ENTRIES = 1 << 20


def _most() -> int:
    return min(_ENTRIES, most_entries())


def has_kernel(factor: MetricFactor, space: TangentSpace) -> bool:
    """Whether ``M = (L L^T) o (X X^T / mass)``, with one position for each example."""
    return (
        isinstance(factor, LinearFactor)
        and factor.inputs.shape[1] == 1
        and space.divisor is not None
    )


def gram_product(
    factor: MetricFactor, space: TangentSpace, a: Tensor, bias: float = 0.0
) -> Tensor:
    """Return ``K sharp K^T a``, ``(rank,)``, in the data type of the factor.

    Args:
        factor: K.
        space: tangent space with the Riesz map and the mass.
        a: ``(rank,)``.
        bias: weight of ``L L^T`` that is added; only where :func:`has_kernel`.

    >>> import geoopt
    >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(2))
    >>> gram_product(DenseFactor(torch.eye(2)), space, torch.tensor([3.0, 4.0]))
    tensor([3., 4.])
    """
    if isinstance(factor, ViewedFactor):
        view = factor.inner_space(space)
        if view is not None:
            return gram_product(factor.inner, view, a, bias)
    if not has_kernel(factor, space):
        return factor.matvec(space.sharp_(factor.rmatvec(a)))
    assert isinstance(factor, LinearFactor)
    assert space.divisor is not None
    x, combined = factor.inputs.squeeze(1), factor.combine(a).squeeze(1)
    if len(x) <= 2 * x.shape[1]:
        z = factor.kernel(factor.dtype, 1.0 / space.divisor, bias) @ combined
    else:
        z = x @ (x.mT @ combined).div_(space.divisor)
        if bias:
            z.add_(combined.sum(0), alpha=bias)
    return (factor.cotangents.squeeze(2) * z).sum(-1).view(-1)


@singledispatch
def gram_columns(
    factor: MetricFactor, space: TangentSpace, index: Tensor, bias: float = 0.0
) -> Tensor:
    """Return the columns ``index`` of ``K sharp K^T``, ``(rank, k)``.

    Register a factor's class here if it has a cheaper way than one product each.

    Args:
        factor: K.
        space: tangent space with the Riesz map and the mass.
        index: ``(k,)``; never read on the host.
        bias: as in :func:`gram_product`.
    """
    units = one_hot(index, factor.rank).to(factor.dtype)
    columns = [factor.matvec(space.sharp(factor.rmatvec(unit))) for unit in units]
    return torch.stack(columns, 1)


@gram_columns.register(DenseFactor)
def _(
    factor: DenseFactor, space: TangentSpace, index: Tensor, bias: float = 0.0
) -> Tensor:
    rows = factor.rows(0, factor.rank)
    images = space.sharp(rows[index])
    return rows.reshape(factor.rank, -1) @ images.reshape(len(index), -1).mT


@gram_columns.register(BiasFactor)
def _(
    factor: BiasFactor, space: TangentSpace, index: Tensor, bias: float = 0.0
) -> Tensor:
    rows = factor.rows(0, factor.rank)
    return rows @ space.sharp(rows[index]).mT


@gram_columns.register(LinearFactor)
def _(
    factor: LinearFactor, space: TangentSpace, index: Tensor, bias: float = 0.0
) -> Tensor:
    r, n, positions, out = factor.cotangents.shape
    l, x = factor.cotangents.flatten(0, 1), factor.inputs
    left, right = l[index], x[index % n]
    if not has_kernel(factor, space):
        images = space.sharp(left.mT @ right)
        step = max(1, _most() // max(1, n * positions * out))
        return torch.cat([_times(factor, u) for u in images.split(step)], 1)
    assert space.divisor is not None
    kernel = torch.addmm(
        torch.full((1,), bias, dtype=x.dtype, device=x.device),
        x.squeeze(1),
        right.squeeze(1).mT,
        alpha=1.0 / space.divisor,
    )
    columns = l.squeeze(1) @ left.squeeze(1).mT
    columns.view(r, n, -1).mul_(kernel)
    return columns


@gram_columns.register(ViewedFactor)
def _(
    factor: ViewedFactor, space: TangentSpace, index: Tensor, bias: float = 0.0
) -> Tensor:
    view = factor.inner_space(space)
    if view is not None:
        return gram_columns(factor.inner, view, index, bias)
    units = one_hot(index, factor.rank).to(factor.dtype)
    columns = [factor.matvec(space.sharp(factor.rmatvec(unit))) for unit in units]
    return torch.stack(columns, 1)


def _times(factor: LinearFactor, u: Tensor) -> Tensor:
    """Return ``K u_k`` for several vectors, ``(rank, k)``."""
    _, n, positions, out = factor.cotangents.shape
    z = factor.inputs.flatten(0, 1) @ u.flatten(0, 1).mT
    z = z.view(n, positions, len(u), out).transpose(1, 2).reshape(n, len(u), -1)
    l = factor.cotangents.flatten(2).transpose(0, 1)
    return torch.bmm(l, z.mT).transpose(0, 1).reshape(factor.rank, len(u))


def gram_diagonal(
    factor: MetricFactor, space: TangentSpace, bias: float = 0.0
) -> Tensor:
    """Return the diagonal of ``K sharp K^T``, ``(rank,)``.

    Cost O(rank p), or O(rank out) where :func:`has_kernel`; what occurs of embeddings.

    Args:
        factor: K.
        space: tangent space with the Riesz map and the mass.
        bias: as in :func:`gram_product`.
    """
    if isinstance(factor, ViewedFactor):
        view = factor.inner_space(space)
        if view is not None:
            return gram_diagonal(factor.inner, view, bias)
    if has_kernel(factor, space):
        assert isinstance(factor, LinearFactor)
        assert space.divisor is not None
        l, x = factor.cotangents.squeeze(2), factor.inputs.squeeze(1)
        lengths = x.square().sum(-1) / space.divisor + bias
        return (l.square().sum(-1) * lengths).view(-1)
    on_host = factor.device.type == "cpu"
    if isinstance(factor, EmbeddingFactor) and acts_by_row(space) and on_host:
        return factor.gram_diagonal(space)
    step = max(1, _most() // max(1, space.point.numel()))
    found = []
    for start in range(0, factor.rank, step):
        rows = factor.rows(start, min(start + step, factor.rank))
        found.append((rows * space.sharp(rows)).reshape(len(rows), -1).sum(1))
    return torch.cat(found)
