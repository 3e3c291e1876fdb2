r"""Factors of ``y = W x + b`` that are never formed: rows are ``l x^T`` and ``l``.

Row ``(j, i)`` of K, for output row j of example i, is the sum over positions t
(several places of the layer's input, or several uses of the layer) of
``l_jit x_it^T`` for the weight and ``l_jit`` for the bias, where ``l`` is the row
L at the layer's output and ``x`` the layer's input.
"""

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.linear_gram import linear_gram
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

    def _combine(self, a: Tensor) -> Tensor:
        r, n = self.cotangents.shape[:2]
        if r == 1:
            return self.cotangents[0] * a.to(self.dtype).view(n, 1, 1)
        weights = a.to(self.dtype).view(r, n, 1, 1)
        return (self.cotangents * weights).sum(0)

    def _total(self) -> Tensor:
        return (
            self.cotangents[0] if len(self.cotangents) == 1 else self.cotangents.sum(0)
        )


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
        self._kernels: dict[torch.dtype, Tensor] = {}

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``: each row's cotangent against ``u x``."""
        z = self.inputs @ u.to(self.dtype).mT
        return (self.cotangents * z).sum((-1, -2)).reshape(-1)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``: one backward product with the combined cotangent."""
        return self._pull(self._combine(a))

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self._pull(self._total())

    def magnitude(self) -> Tensor:
        """Return ``|l| |x|``, which bounds the sum of the rows' norms."""
        return self.cotangents.norm() * self.inputs.norm()

    def _pull(self, cotangent: Tensor) -> Tensor:
        return cotangent.flatten(0, 1).mT @ self.inputs.flatten(0, 1)

    def image(self, space: TangentSpace, e: Tensor, source: MetricFactor) -> Tensor:
        """Return ``K sharp e``, through ``X X^T`` where that is cheaper than ``e``."""
        n, positions, width = self.inputs.shape
        small = positions == 1 and n < width
        plain = isinstance(space.manifold, geoopt.Euclidean) and space.mass.is_scalar
        if not (small and plain and isinstance(source, LinearFactor)):
            return super().image(space, e, source)
        if not _same(source.inputs, self.inputs):
            return super().image(space, e, source)
        z = self._kernel(self.dtype) @ source._total().flatten(0, 1)
        image = (self.cotangents * z.unsqueeze(1)).sum((-1, -2)).reshape(-1)
        return image / space.mass.scalar

    def _kernel(self, dtype: torch.dtype) -> Tensor:
        # X X^T of a layer with one position, wanted by the Gram matrix and `image`.
        if dtype not in self._kernels:
            x = self.inputs.flatten(0, 1).to(dtype)
            self._kernels[dtype] = x @ x.mT
        return self._kernels[dtype]

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K; their memory is what this class avoids."""
        n = self.inputs.shape[0]
        which = torch.arange(start, stop, device=self.device)
        left = self.cotangents.flatten(0, 1)[start:stop]
        return left.mT @ self.inputs[which % n]

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
            self._kernel(dtype) if self.inputs.shape[1] == 1 else None,
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

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``."""
        return (self.cotangents @ u.to(self.dtype)).sum(-1).reshape(-1)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``."""
        return self._combine(a).sum((0, 1))

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self._total().sum((0, 1))

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K."""
        return self.cotangents.flatten(0, 1)[start:stop].sum(1)

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of a bias that two layers share."""
        if not isinstance(other, BiasFactor):
            return DenseFactor(self.rows(0, self.rank) + other.rows(0, self.rank))
        return BiasFactor(torch.cat([self.cotangents, other.cotangents], 2))

    def double(self) -> "BiasFactor":
        """Return the same factor in float64."""
        return BiasFactor(self.cotangents.double())
