"""Factors of parameters that are used in several places."""

import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.slabs import (
    Slab,
    SlabFactor,
    SparseFactor,
    acts_by_row,
    add_lower,
    pieces,
    restricted,
    slab_gram,
)
from riemannian_modules.tangent import TangentSpace

__all__ = ["SumFactor", "added", "joined"]


@runtime_checkable
class _Merging(Protocol):
    merge: Callable[[Sequence[MetricFactor]], MetricFactor]


class SumFactor(SlabFactor):
    """The sum of structured factors of different kinds.

    Such as an embedding that is also the last layer's weight: the sum of rows over the
    vocabulary, which is never formed, and rows at the tokens that occur.

    Args:
        parts: factors of one shape and rank, at least one.

    Raises:
        ShapeError: the factors do not fit together.
    """

    def __init__(self, parts: Sequence[SlabFactor]) -> None:
        kinds = {(part.rank, part.shape) for part in parts}
        if len(kinds) != 1:
            raise ShapeError(
                "the factors of a parameter's uses have (rank, shape) "
                f"{sorted(kinds)}; they must all be alike"
            )
        self.parts = tuple(parts)
        self.rank, self.shape = kinds.pop()
        self.unit = max(part.unit for part in parts)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the products."""
        return self.parts[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the products."""
        return self.parts[0].device

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``."""
        return _total([part.matvec(u) for part in self.parts])

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``."""
        return _total([part.rmatvec(a) for part in self.parts])

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return _total([part.row_sum() for part in self.parts])

    def magnitude(self) -> Tensor:
        """Return the sum of the parts' bounds."""
        return _total([part.magnitude() for part in self.parts])

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K."""
        return _total([part.rows(start, stop) for part in self.parts])

    def slab(self, index: Slab) -> Tensor:
        """Return the rows of K at some rows of the parameter."""
        return _total([part.slab(index) for part in self.parts])

    def narrow(self, start: int, stop: int) -> "SumFactor":
        """Return the factor of whole groups of n rows."""
        return self._map(lambda part: part.narrow(start, stop))

    def to(self, dtype: torch.dtype) -> "SumFactor":
        """Return the same factor in another data type."""
        return self._map(lambda part: part.to(dtype))

    def _map(self, change: Callable[[SlabFactor], MetricFactor]) -> "SumFactor":
        parts = [change(part) for part in self.parts]
        return SumFactor([part for part in parts if isinstance(part, SlabFactor)])

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor with one more use."""
        return added(self, other)

    def gram(self, space: TangentSpace, dtype: torch.dtype) -> Tensor:
        """Return ``K sharp K^T``: with a sparse part, the others keep their form."""
        sparse = [part for part in self.parts if isinstance(part, SparseFactor)]
        rest = [part for part in self.parts if not isinstance(part, SparseFactor)]
        if len(sparse) != 1 or not rest or not acts_by_row(space):
            return slab_gram(self, space, dtype)
        own = sparse[0].to(dtype)
        assert isinstance(own, SparseFactor)
        others = rest[0] if len(rest) == 1 else SumFactor(rest)
        total = others.gram(space, dtype).add_(own.gram(space, dtype))
        return _add_crossed(total, own, others.to(dtype), space.to(dtype))


def _add_crossed(
    total: Tensor, sparse: SparseFactor, rest: SlabFactor, space: TangentSpace
) -> Tensor:
    """Add ``A sharp B^T + B sharp A^T``, at the rows where A is not zero."""
    table = sparse.table
    each = 4 * sparse.rank * space.point[0].numel()
    for slots in pieces(len(table), each):
        index = table[slots]
        there = restricted(space, index)
        a, b = sparse.slot_slab(slots), rest.slab(index)
        left = torch.cat([a.flatten(1), b.flatten(1)], 1)
        images = [there.sharp(b).flatten(1), there.sharp(a).flatten(1)]
        add_lower(total, left, torch.cat(images, 1), first=False)
    return total


def _total(values: Sequence[Tensor]) -> Tensor:
    return reduce(operator.add, values)


def added(one: MetricFactor, other: MetricFactor) -> MetricFactor:
    """Return the sum of two factors, structured if both are.

    Args:
        one: a factor.
        other: a factor of the same rank and shape.

    Returns:
        Their sum; parts of one kind are merged.
    """
    if not (isinstance(one, SlabFactor) and isinstance(other, SlabFactor)):
        return DenseFactor(one.rows(0, one.rank) + other.rows(0, one.rank))
    parts = [*_parts(one), *_parts(other)]
    merged: list[SlabFactor] = []
    for kind in dict.fromkeys(map(type, parts)):
        own = [part for part in parts if type(part) is kind]
        merged += _parts(_merged(own)) if len(own) > 1 else own
    return merged[0] if len(merged) == 1 else SumFactor(merged)


def _parts(factor: MetricFactor) -> tuple[SlabFactor, ...]:
    if isinstance(factor, SumFactor):
        return factor.parts
    return (factor,) if isinstance(factor, SlabFactor) else ()


def _merged(factors: Sequence[SlabFactor]) -> MetricFactor:
    first = factors[0]
    return first.merge(factors) if isinstance(first, _Merging) else SumFactor(factors)


def joined(factors: Sequence[MetricFactor]) -> MetricFactor:
    """Return the factor of a parameter that is used in several places.

    Args:
        factors: the factor of each use, at least one, all of the same rank.

    Returns:
        Their sum. Uses of layers of one kind are further positions.
    """
    first = factors[0]
    if len(factors) == 1:
        return first
    if isinstance(first, _Merging) and all(type(f) is type(first) for f in factors):
        return first.merge(factors)
    return reduce(operator.add, factors)
