r"""Factors of ``y = W x + b`` that are never formed: rows are ``l x^T`` and ``l``.

Row ``(j, i)`` of K, for output row j of example i, is the sum over positions t
(several places of the layer's input, or several uses of the layer) of
``l_jit x_it^T`` for the weight and ``l_jit`` for the bias, where ``l`` is the row
L at the layer's output and ``x`` the layer's input.
"""

import operator
from collections.abc import Sequence
from functools import reduce
from typing import cast

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.linear_gram import linear_gram
from riemannian_modules.tangent import TangentSpace

__all__ = ["BiasFactor", "LinearFactor", "joined"]


def _check(inputs: Tensor | None, cotangents: Tensor) -> None:
    if cotangents.ndim != 4 or (
        inputs is not None
        and (inputs.ndim != 3 or inputs.shape[:2] != cotangents.shape[1:3])
    ):
        shape = None if inputs is None else tuple(inputs.shape)
        raise ShapeError(
            f"inputs {shape} and cotangents {tuple(cotangents.shape)} do not fit; "
            "expected (n, positions, in) and (rows, n, positions, out)"
        )


def _same(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape


class _CotangentFactor(MetricFactor):
    cotangents: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the cotangents."""
        return self.cotangents.dtype

    @property
    def device(self) -> torch.device:
        """Device of the cotangents."""
        return self.cotangents.device

    def combine(self, a: Tensor) -> Tensor:
        """Return ``sum_j a_ji l_jit``, ``(n, positions, out)``, for ``a`` (rank,)."""
        r, n = self.cotangents.shape[:2]
        if r == 1:
            return self.cotangents[0] * a.to(self.dtype).view(n, 1, 1)
        weights = a.to(self.dtype).view(r, n, 1, 1)
        return (self.cotangents * weights).sum(0)

    def total(self) -> Tensor:
        """Return :meth:`combine` of ones."""
        return (
            self.cotangents[0] if len(self.cotangents) == 1 else self.cotangents.sum(0)
        )

    def _groups(self, start: int, stop: int) -> Tensor:
        n = self.cotangents.shape[1]
        if start % n or stop % n:
            raise ShapeError(f"rows {start}:{stop} are not whole groups of {n} rows")
        return self.cotangents[start // n : stop // n]


class LinearFactor(_CotangentFactor):
    """K of the weight ``(out, in)`` of a linear layer, structured.

    Args:
        inputs: layer inputs, ``(n, positions, in)``.
        cotangents: rows of L at the layer's output, ``(r, n, positions, out)``.

    The rank is ``r n``, with the example as the fast index. Memory is that of the
    two tensors; products cost O(n positions (in out + r out)).

    Raises:
        ShapeError: the two tensors do not fit.

    >>> x, l = torch.ones(2, 1, 3), torch.ones(1, 2, 1, 4)
    >>> factor = LinearFactor(x, l)
    >>> factor.rank, factor.shape, factor.matvec(torch.ones(4, 3))
    (2, (4, 3), tensor([12., 12.]))
    """

    def __init__(self, inputs: Tensor, cotangents: Tensor) -> None:
        _check(inputs, cotangents)
        self.inputs = inputs
        self.cotangents = cotangents
        self.rank = cotangents.shape[0] * cotangents.shape[1]
        self.shape = (cotangents.shape[-1], inputs.shape[-1])
        self._kernels: dict[tuple[torch.dtype, float, float], Tensor] = {}

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``: each row's cotangent against ``u x``."""
        z = self.inputs @ u.to(self.dtype).mT
        return (self.cotangents * z).sum((-1, -2)).reshape(-1)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``: one backward product with the combined cotangent."""
        return self.pull(self.combine(a))

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self.pull(self.total())

    def magnitude(self) -> Tensor:
        """Return ``|l| |x|``, which bounds the sum of the rows' norms."""
        return self.cotangents.norm() * self.inputs.norm()

    def pull(self, cotangent: Tensor) -> Tensor:
        """Return the weight's gradient for a cotangent ``(n, positions, out)``."""
        return cotangent.flatten(0, 1).mT @ self.inputs.flatten(0, 1)

    def image(
        self, space: TangentSpace, e: Tensor, source: MetricFactor, bias: float = 0.0
    ) -> Tensor:
        """Return ``K sharp e``, through ``X X^T`` where that is cheaper than ``e``.

        Args:
            space: tangent space of the weight.
            e: the covector.
            source: a factor whose rows add up to it.
            bias: weight of the bias' image, which is added on the way; only where
                :meth:`maps_by_kernel`.

        Returns:
            ``(rank,)``.
        """
        if not self.maps_by_kernel(space, source):
            return super().image(space, e, source)
        assert isinstance(source, LinearFactor)
        kernel = self._kernel(self.dtype, 1.0 / space.mass.scalar, bias)
        z = kernel @ source.total().flatten(0, 1)
        return (self.cotangents.squeeze(2) * z).sum(-1).view(-1)

    def maps_by_kernel(self, space: TangentSpace, source: MetricFactor) -> bool:
        """Whether :meth:`image` needs no product with the weight's covector."""
        n, positions, width = self.inputs.shape
        return (
            positions == 1
            and n < width
            and isinstance(space.manifold, geoopt.Euclidean)
            and space.mass.is_scalar
            and isinstance(source, LinearFactor)
            and _same(source.inputs, self.inputs)
        )

    def _kernel(self, dtype: torch.dtype, scale: float, shift: float) -> Tensor:
        # scale X X^T + shift, wanted by the Gram matrix and by `image`.
        key = (dtype, scale, shift)
        if key not in self._kernels:
            x = self.inputs.flatten(0, 1).to(dtype)
            constant = torch.full((1,), shift, dtype=dtype, device=x.device)
            self._kernels[key] = torch.addmm(constant, x, x.mT, alpha=scale)
        return self._kernels[key]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K; their memory is what this class avoids."""
        n = self.inputs.shape[0]
        which = torch.arange(start, stop, device=self.device)
        left = self.cotangents.flatten(0, 1)[start:stop]
        return left.mT @ self.inputs[which % n]

    def narrow(self, start: int, stop: int) -> "LinearFactor":
        """Return the factor of whole groups of n rows."""
        return LinearFactor(self.inputs, self._groups(start, stop))

    def gram(
        self, space: TangentSpace, dtype: torch.dtype, *, bias: float = 0.0
    ) -> Tensor:
        """Return ``K sharp K^T`` as Hadamard products of small Gram matrices.

        Args:
            space: tangent space of the weight.
            dtype: data type in which the matrix is formed.
            bias: weight of ``l l^T``, the Gram matrix of the layer's bias, that is
                added on the way (see :func:`riemannian_modules.factors.block_gram`).

        Returns:
            ``(rank, rank)``, lower triangle valid. Cost O(rank^2 out) for one
            position, and for P positions P^2 times that.
        """
        if space.mass.diagonal is not None:
            return super().gram(space, dtype)
        return linear_gram(
            space.manifold,
            space.point.to(dtype),
            self.inputs.to(dtype),
            self.cotangents.to(dtype),
            space.mass,
            bias,
            lambda scale, shift: self._kernel(dtype, scale, shift),
        )

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of a weight that two layers share."""
        if not isinstance(other, LinearFactor):
            return DenseFactor(self.rows(0, self.rank) + other.rows(0, self.rank))
        return LinearFactor(
            torch.cat([self.inputs, other.inputs], 1),
            torch.cat([self.cotangents, other.cotangents], 2),
        )

    def double(self) -> "LinearFactor":
        """Return the same factor in float64."""
        return LinearFactor(self.inputs.double(), self.cotangents.double())


class BiasFactor(_CotangentFactor):
    """K of a bias ``(out,)``: the cotangents themselves, summed over positions.

    Args:
        cotangents: rows of L at the layer's output, ``(r, n, positions, out)``.

    Raises:
        ShapeError: the tensor has another number of dimensions.

    >>> BiasFactor(torch.ones(1, 2, 1, 4)).matvec(torch.ones(4))
    tensor([4., 4.])
    """

    def __init__(self, cotangents: Tensor) -> None:
        _check(None, cotangents)
        self.cotangents = cotangents
        self.rank = cotangents.shape[0] * cotangents.shape[1]
        self.shape = (cotangents.shape[-1],)

    def belongs_to(self, weight: MetricFactor) -> bool:
        """Whether ``weight`` is the factor of this bias' own layer."""
        return isinstance(weight, LinearFactor) and _same(
            weight.cotangents, self.cotangents
        )

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``."""
        return (self.cotangents @ u.to(self.dtype)).sum(-1).reshape(-1)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``."""
        return self.combine(a).sum((0, 1))

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self.total().sum((0, 1))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K."""
        return self.cotangents.flatten(0, 1)[start:stop].sum(1)

    def narrow(self, start: int, stop: int) -> "BiasFactor":
        """Return the factor of whole groups of n rows."""
        return BiasFactor(self._groups(start, stop))

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of a bias that two layers share."""
        if not isinstance(other, BiasFactor):
            return DenseFactor(self.rows(0, self.rank) + other.rows(0, self.rank))
        return BiasFactor(torch.cat([self.cotangents, other.cotangents], 2))

    def double(self) -> "BiasFactor":
        """Return the same factor in float64."""
        return BiasFactor(self.cotangents.double())


def joined(factors: Sequence[MetricFactor]) -> MetricFactor:
    """Return the factor of a parameter that is used in several places.

    Args:
        factors: the factor of each use, at least one, all of the same rank.

    Returns:
        Their sum. Uses of linear layers are further positions.
    """
    if len(factors) == 1:
        return factors[0]
    if all(type(factor) is LinearFactor for factor in factors):
        linear = cast("list[LinearFactor]", factors)
        inputs = torch.cat([factor.inputs for factor in linear], 1)
        return LinearFactor(inputs, torch.cat([f.cotangents for f in linear], 2))
    if all(type(factor) is BiasFactor for factor in factors):
        biases = cast("list[BiasFactor]", factors)
        return BiasFactor(torch.cat([f.cotangents for f in biases], 2))
    return reduce(operator.add, factors)
