"""Factors of parameters that are stored in another shape than their products know.

A weight ``(in, out)`` of ``x @ W`` has the rows of a linear layer, transposed; a table
of numbers ``(vocabulary,)`` those of an embedding of width one. Either view keeps the
Euclidean metric, so that the Gram matrix is that of the factor which is viewed.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import geoopt
import torch
from torch import Tensor

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.embedding import EmbeddingFactor
from riemannian_modules.factors.linear import LinearFactor
from riemannian_modules.factors.slabs import Slab, SlabFactor, slab_gram
from riemannian_modules.factors.sums import added, joined
from riemannian_modules.tangent import TangentSpace

__all__ = ["ViewedFactor", "through"]


class ViewedFactor(SlabFactor):
    """K of a parameter that is a view of what another factor is of.

    Args:
        inner: of a linear layer: this is the factor of the transposed weight. Of an
            embedding of width one: that of its only column.

    >>> x, l = torch.ones(2, 1, 3), torch.ones(1, 2, 1, 4)
    >>> factor = ViewedFactor(LinearFactor(x, l))
    >>> factor.rank, factor.shape, factor.matvec(torch.ones(3, 4))
    (2, (3, 4), tensor([12., 12.]))
    """

    def __init__(self, inner: LinearFactor | EmbeddingFactor) -> None:
        self.inner = inner
        self.rank = inner.rank
        rows, columns = inner.shape
        self.shape = (columns, rows) if self._transposes else (rows,)

    @property
    def _transposes(self) -> bool:
        return isinstance(self.inner, LinearFactor)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the products."""
        return self.inner.dtype

    @property
    def device(self) -> torch.device:
        """Device of the products."""
        return self.inner.device

    def _view(self, u: Tensor) -> Tensor:
        """Return something of this parameter's shape as the inner factor knows it."""
        return u.mT if self._transposes else u.unsqueeze(-1)

    def _back(self, u: Tensor) -> Tensor:
        return u.mT if self._transposes else u.squeeze(-1)

    def inner_space(self, space: TangentSpace) -> TangentSpace | None:
        """Return the tangent space of the view where it is as Euclidean, else None.

        Args:
            space: tangent space of the parameter.
        """
        if not isinstance(space.manifold, geoopt.Euclidean):
            return None
        mass = space.mass
        if mass.diagonal is not None:
            mass = replace(mass, diagonal=self._view(mass.diagonal))
        else:
            mass = replace(mass, row=mass.column, column=mass.row)
        return TangentSpace(space.manifold, self._view(space.point), mass, space.name)

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``."""
        return self.inner.matvec(self._view(u))

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``."""
        return self._back(self.inner.rmatvec(a)).contiguous()

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self._back(self.inner.row_sum()).contiguous()

    def image(self, space: TangentSpace, e: Tensor, source: MetricFactor) -> Tensor:
        """Return ``K sharp e``, as the inner factor does."""
        own = self.inner_space(space)
        if own is None or not isinstance(source, ViewedFactor):
            return super().image(space, e, source)
        return self.inner.image(own, self._view(e), source.inner)

    def magnitude(self) -> Tensor:
        """Return the inner factor's bound."""
        return self.inner.magnitude()

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K."""
        return self._back(self.inner.rows(start, stop))

    def slab(self, index: Slab) -> Tensor:
        """Return the rows of K at some rows of the parameter, ``(rank, k, *rest)``."""
        if isinstance(self.inner, EmbeddingFactor):
            return self.inner.slab(index).squeeze(-1)
        x = self.inner.inputs[..., index].mT
        return torch.cat([x @ own for own in self.inner.cotangents])

    def narrow(self, start: int, stop: int) -> "ViewedFactor":
        """Return the factor of whole groups of n rows."""
        return ViewedFactor(self.inner.narrow(start, stop))

    def to(self, dtype: torch.dtype) -> "ViewedFactor":
        """Return the same factor in another data type."""
        return ViewedFactor(self.inner.to(dtype))

    def gram(self, space: TangentSpace, dtype: torch.dtype) -> Tensor:
        """Return ``K sharp K^T``, ``(rank, rank)``, lower triangle valid.

        Cost: that of the inner factor, unless the manifold tells the views apart.
        """
        own = self.inner_space(space)
        return (
            slab_gram(self, space, dtype)
            if own is None
            else self.inner.gram(own, dtype)
        )

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of a parameter that is used in two places."""
        return added(self, other)

    @classmethod
    def merge(cls, factors: Sequence["ViewedFactor"]) -> MetricFactor:
        """Return the sum of factors of one parameter."""
        found = joined([factor.inner for factor in factors])
        assert isinstance(found, LinearFactor | EmbeddingFactor)
        return cls(found)


def through(
    factor: ViewedFactor, change: Callable[[MetricFactor], MetricFactor]
) -> MetricFactor:
    """Return what a function makes of a factor's view, in the factor's own shape.

    Args:
        factor: the factor.
        change: returns a factor of the same parameter.
    """
    found = change(factor.inner)
    if isinstance(found, LinearFactor | EmbeddingFactor):
        return ViewedFactor(found)
    return DenseFactor(factor._back(found.rows(0, found.rank)))
