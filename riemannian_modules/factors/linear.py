r"""Factors of ``y = W x + b`` that are never formed: rows are ``l x^T`` and ``l``.

Row ``(j, i)`` of K, for output row j of example i, is the sum over positions t
(several places of the layer's input, or several uses of the layer) of
``l_jit x_it^T`` for the weight and ``l_jit`` for the bias, where ``l`` is the row
L at the layer's output and ``x`` the layer's input.
"""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.cotangents import (
    CotangentFactor,
    Known,
    memory,
    side_by_side,
)
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.linear_gram import forms_rows, has_terms, linear_gram
from riemannian_modules.factors.slabs import Slab, SlabFactor, slab_gram
from riemannian_modules.factors.sums import added
from riemannian_modules.tangent import TangentSpace

__all__ = ["BiasFactor", "LinearFactor"]


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
    return a is b or memory(a) == memory(b)


class LinearFactor(CotangentFactor, SlabFactor):
    """K of the weight ``(out, in)`` of a linear layer, structured.

    Args:
        inputs: layer inputs, ``(n, positions, in)``.
        cotangents: rows of L at the layer's output, ``(r, n, positions, out)``.

    The rank is ``r n``, with the example as the fast index. Memory is that of the
    two tensors; products cost O(n positions (in out + r out)).

    Attributes:
        beside: the factor of the layer's bias in the same block, whose sums over
            positions are then made once; or None.

    Raises:
        ShapeError: the two tensors do not fit.

    >>> x, l = torch.ones(2, 1, 3), torch.ones(1, 2, 1, 4)
    >>> factor = LinearFactor(x, l)
    >>> factor.rank, factor.shape, factor.matvec(torch.ones(4, 3))
    (2, (4, 3), tensor([12., 12.]))
    """

    beside: "BiasFactor | None" = None

    def __init__(self, inputs: Tensor, cotangents: Tensor) -> None:
        _check(inputs, cotangents)
        self.inputs = inputs
        self.pieces, self.cotangents = (cotangents,), cotangents
        self.rank = cotangents.shape[0] * cotangents.shape[1]
        self.shape = (cotangents.shape[-1], inputs.shape[-1])
        self._kernels: dict[tuple[torch.dtype, float, float], Tensor] = {}

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``: each row's cotangent against ``u x``."""
        if self.whole is not None:
            return self.times_whole(u)
        z = self.inputs @ u.to(self.dtype).mT
        return (self.cotangents * z).sum((-1, -2)).reshape(-1)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``: one backward product with the combined cotangent."""
        if self.whole is not None:
            return self.whole_times(a)
        return self.pull(self.combine(a))

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self.pull(self.total())

    def magnitude(self) -> Tensor:
        """Return ``sqrt(r) |l| |x|``, which bounds the sum of the rows' norms."""
        return self.cotangents.norm() * self.inputs.norm() * len(self.cotangents) ** 0.5

    def pull(self, cotangent: Tensor) -> Tensor:
        """Return the weight's gradient for a cotangent ``(n, positions, out)``."""
        return cotangent.flatten(0, 1).mT @ self.inputs.flatten(0, 1)

    def lift(self, space: TangentSpace, cotangent: Tensor) -> Tensor:
        """Return ``sharp`` of :meth:`pull`, a fresh tensor."""
        mass = space.divisor
        if mass is None:
            return space.sharp_(self.pull(cotangent))
        # The cotangent has fewer entries than the weight where that matters.
        return self.pull(cotangent if mass == 1.0 else cotangent / mass)

    def shares_inputs(self, other: MetricFactor) -> bool:
        """Whether the rows of another factor are of the same inputs."""
        return isinstance(other, LinearFactor) and _same(other.inputs, self.inputs)

    def image(self, space: TangentSpace, e: Tensor, source: MetricFactor) -> Tensor:
        """Return ``K sharp e``, through ``X X^T`` where that is cheaper than ``e``."""
        if self.maps_by_kernel(space, source):
            return self.kernel_image(space, source)
        return super().image(space, e, source)

    def kernel_image(
        self, space: TangentSpace, source: MetricFactor, bias: float = 0.0
    ) -> Tensor:
        """Return ``K sharp e`` without e, where :meth:`maps_by_kernel`.

        Args:
            space: tangent space of the weight.
            source: a factor whose rows add up to the covector e.
            bias: weight of the bias' image, which is added on the way.

        Returns:
            ``(rank,)``.
        """
        assert isinstance(source, LinearFactor)
        assert space.divisor is not None
        kernel = self.kernel(self.dtype, 1.0 / space.divisor, bias)
        z = kernel @ source.total().flatten(0, 1)
        return (self.cotangents.squeeze(2) * z).sum(-1).view(-1)

    def maps_by_kernel(
        self, space: TangentSpace, source: MetricFactor, bias: float = 0.0
    ) -> bool:
        """Whether :meth:`image` needs no product with the weight's covector."""
        n, positions, width = self.inputs.shape
        if positions != 1 or space.divisor is None or not self.shares_inputs(source):
            return False
        return n < width or (self.dtype, 1.0 / space.divisor, bias) in self._kernels

    def kernel(self, dtype: torch.dtype, scale: float, shift: float) -> Tensor:
        """Return ``scale X X^T + shift``, kept for whoever asks next."""
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

    def slab(self, index: Slab) -> Tensor:
        """Return the rows of K for some outputs, ``(rank, k, in)``."""
        l = self.cotangents[..., index]
        out = l.new_empty(*l.shape[:2], l.shape[-1], self.shape[1])
        for own, rows in zip(l, out, strict=True):
            torch.bmm(own.mT, self.inputs, out=rows)
        return out.flatten(0, 1)

    def narrow(self, start: int, stop: int) -> "LinearFactor":
        """Return the factor of whole groups of n rows."""
        return LinearFactor(self.inputs, self._groups(start, stop))

    def with_cotangents(
        self, cotangents: Sequence[Tensor], known: Known
    ) -> "LinearFactor":
        """Return the factor of other rows of the same call."""
        return LinearFactor(self.inputs, side_by_side(cotangents, known))

    def gram(
        self,
        space: TangentSpace,
        dtype: torch.dtype,
        *,
        bias: float = 0.0,
        onto: Tensor | None = None,
    ) -> Tensor:
        """Return ``K sharp K^T``, from pairs of positions or from slabs of rows.

        The pairs are Hadamard products of small Gram matrices, see
        :func:`riemannian_modules.factors.linear_gram.linear_gram`. Which way is taken
        is decided by their cost (:func:`forms_rows`).

        Args:
            space: tangent space of the weight.
            dtype: data type in which the matrix is formed.
            bias: weight of ``l l^T``, the Gram matrix of the layer's bias, that is
                added on the way (see :class:`riemannian_modules.factors.BlockFactor`).
            onto: a matrix of this data type to add to, in place; None: a fresh one.

        Returns:
            ``(rank, rank)``, lower triangle valid. Cost O(rank^2 out) for one
            position; for P of them the smaller of P^2 times that and
            O(rank out in (P + rank)).
        """
        paired = space.mass.diagonal is None and has_terms(space.manifold)
        r, n, positions, out = self.cotangents.shape
        if not paired or forms_rows(r, n, positions, out, self.shape[1]):
            gram = slab_gram(self, space, dtype)
            if bias:
                known = self.beside if dtype == self.dtype else None
                beside = known or BiasFactor(self.cotangents.to(dtype))
                l = beside.rows(0, self.rank)
                gram.addmm_(l, l.mT, alpha=bias)
            return gram if onto is None else onto.add_(gram)
        return linear_gram(
            space.manifold,
            space.point.to(dtype),
            self.inputs.to(dtype),
            self.cotangents.to(dtype),
            space.mass,
            bias,
            lambda scale, shift: self.kernel(dtype, scale, shift),
            onto,
        )

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of a weight that two layers share."""
        if not isinstance(other, LinearFactor):
            return added(self, other)
        return LinearFactor.merge([self, other])

    @classmethod
    def merge(cls, factors: Sequence["LinearFactor"]) -> "LinearFactor":
        """Return the sum of factors: uses of a weight are further positions."""
        inputs = torch.cat([factor.inputs for factor in factors], 1)
        return LinearFactor(inputs, torch.cat([f.cotangents for f in factors], 2))

    def to(self, dtype: torch.dtype) -> "LinearFactor":
        """Return the same factor in another data type."""
        return LinearFactor(self.inputs.to(dtype), self.cotangents.to(dtype))

    def double(self) -> "LinearFactor":
        """Return the same factor in float64."""
        return self.to(torch.float64)


class BiasFactor(CotangentFactor):
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
        self.pieces, self.cotangents = (cotangents,), cotangents
        self.rank = cotangents.shape[0] * cotangents.shape[1]
        self.shape = (cotangents.shape[-1],)

    @cached_property
    def single(self) -> "BiasFactor":
        """The same factor with one position: all positions add the same bias."""
        if self.cotangents.shape[2] == 1:
            return self
        return BiasFactor(self.cotangents.sum(2, keepdim=True))

    def belongs_to(self, weight: MetricFactor) -> bool:
        """Whether ``weight`` is the factor of this bias' own layer."""
        return isinstance(weight, LinearFactor) and _same(
            weight.cotangents, self.cotangents
        )

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``."""
        return (self.single.cotangents @ u.to(self.dtype)).reshape(-1)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``."""
        return self.pull(self.single.combine(a))

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self.pull(self.single.total())

    def pull(self, cotangent: Tensor) -> Tensor:
        """Return the bias' gradient for a cotangent ``(n, positions, out)``."""
        return cotangent.sum((0, 1))

    def lift(self, space: TangentSpace, cotangent: Tensor) -> Tensor:
        """Return ``sharp`` of :meth:`pull`, a fresh tensor."""
        return space.sharp_(self.pull(cotangent))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K."""
        return self.single.cotangents.flatten(0, 2)[start:stop]

    def narrow(self, start: int, stop: int) -> "BiasFactor":
        """Return the factor of whole groups of n rows."""
        return BiasFactor(self._groups(start, stop))

    def with_cotangents(
        self, cotangents: Sequence[Tensor], known: Known
    ) -> "BiasFactor":
        """Return the factor of other rows of the same call."""
        return BiasFactor(side_by_side(cotangents, known))

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of a bias that two layers share."""
        if not isinstance(other, BiasFactor):
            return DenseFactor(self.rows(0, self.rank) + other.rows(0, self.rank))
        return BiasFactor.merge([self, other])

    @classmethod
    def merge(cls, factors: Sequence["BiasFactor"]) -> "BiasFactor":
        """Return the sum of factors: uses of a bias are further positions."""
        return BiasFactor(torch.cat([f.cotangents for f in factors], 2))

    def double(self) -> "BiasFactor":
        """Return the same factor in float64."""
        return BiasFactor(self.cotangents.double())
