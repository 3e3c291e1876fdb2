r"""The factor of a convolution's weight, kept as inputs and cotangents.

A convolution is a linear layer whose inputs are the patches that its kernel sees. Row
``(j, i)`` of K is the sum over positions t of ``l_jit`` times the patch of example i at
t. Products with K are convolutions; patches exist only while rows or Gram matrices are
formed, for some of the examples at a time. A transposed convolution is the adjoint of a
convolution, so its patches are taken from the cotangents, and the inputs are what they
are multiplied with.
"""

import math
from collections.abc import Iterator, Sequence

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.convolving import Convolution
from riemannian_modules.factors.cotangents import CotangentFactor, Known
from riemannian_modules.factors.linear import LinearFactor
from riemannian_modules.factors.linear_gram import forms_rows
from riemannian_modules.factors.slabs import (
    Slab,
    SlabFactor,
    pieces,
    row_blocks,
    slab_gram,
)
from riemannian_modules.factors.sums import SumFactor, added
from riemannian_modules.tangent import TangentSpace

__all__ = ["ConvolutionFactor"]

# A processor's cache holds this part of what may be held in memory.
_CACHED = 8
# With up to so many channels a processor multiplies patches in half or a third of the
# time that torch's gradient of a weight takes, in float32.
_FEW_CHANNELS = 2


class ConvolutionFactor(CotangentFactor, SlabFactor):
    """K of the weight of a convolution, structured.

    Args:
        convolution: what the layer does.
        inputs: its inputs, ``(n, uses, channels, *size)``.
        cotangents: rows of L at its output, ``(r, n, uses, channels, *size)``; or
            several of these, one after the other.
        shape: shape of the weight.

    The rank is ``r n``, with the example as the fast index. Memory is that of the two
    tensors, products cost what the layer and its backward pass cost.

    Raises:
        ShapeError: the tensors do not fit.

    >>> convolution = Convolution((3,), (1,), (1,), (1,))
    >>> x, l = torch.ones(2, 1, 1, 4), torch.ones(1, 2, 1, 1, 4)
    >>> ConvolutionFactor(convolution, x, l, (1, 1, 3)).rows(0, 1)
    tensor([[[[3., 4., 3.]]]])
    """

    keeps_wider = True

    def __init__(
        self,
        convolution: Convolution,
        inputs: Tensor,
        cotangents: Tensor | Sequence[Tensor],
        shape: Sequence[int],
    ) -> None:
        pieces = (cotangents,) if isinstance(cotangents, Tensor) else tuple(cotangents)
        dims = 3 + len(convolution.kernel)
        for piece in pieces:
            if (
                inputs.ndim != dims
                or piece.ndim != dims + 1
                or inputs.shape[:2] != piece.shape[1:3]
            ):
                raise ShapeError(
                    f"inputs {tuple(inputs.shape)} and cotangents "
                    f"{tuple(piece.shape)} do not fit; expected (n, uses, channels, "
                    "*size) and (rows, n, uses, channels, *size)"
                )
        self.convolution = convolution
        self.inputs = inputs
        # Too large to be put together without need.
        self.pieces = pieces
        self.rank = sum(len(piece) for piece in pieces) * len(inputs)
        self.shape = tuple(shape)
        self.unit = 1 if convolution.groups == 1 else shape[0] // convolution.groups

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``: each row's cotangent against the layer with weight ``u``."""
        if self.whole is not None:
            return self.times_whole(u)
        n = self.inputs.shape[0]
        z = self.convolution.apply(self.inputs.flatten(0, 1), u.to(self.dtype))
        z = z.reshape(n, -1)
        images = [(own.reshape(n, -1) * z).sum(-1) for own in self._each()]
        return images[0] if len(images) == 1 else torch.cat(images)

    def combine(self, a: Tensor) -> Tensor:
        """Return ``sum_j a_ji l_ji``, ``(n, uses, channels, *size)``."""
        own = self._each()
        weights = a.to(self.dtype).view(len(own), -1, *[1] * (own[0].ndim - 1))
        total = own[0] * weights[0]
        for each, weight in zip(own[1:], weights[1:], strict=True):
            total.addcmul_(each, weight)
        return total

    def _each(self) -> list[Tensor]:
        """Return the cotangents one by one, ``(n, uses, channels, *size)``."""
        return [own for piece in self.pieces for own in piece.unbind()]

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``: one backward pass with the combined cotangent."""
        if self.whole is not None:
            return self.whole_times(a)
        return self._pull(self.combine(a))

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self._pull(self.total())

    def _pull(self, cotangent: Tensor) -> Tensor:
        """Return ``K^T`` of a cotangent at the output, shaped like one of its rows."""
        x, convolution = self.inputs, self.convolution
        plain = convolution.groups == 1 and not convolution.transposed
        few = plain and self.shape[1] <= _FEW_CHANNELS
        if few and x.device.type == "cpu" and cotangent.dtype == torch.float32:
            return self._pull_patches(cotangent)
        return convolution.pull(cotangent.flatten(0, 1), x.flatten(0, 1), self.shape)

    def _pull_patches(self, cotangent: Tensor) -> Tensor:
        total = cotangent.new_zeros(self.shape[0], math.prod(self.shape[1:]))
        for some, x in self._patches(self.inputs, cotangent.shape[3:]):
            l = cotangent[some].transpose(1, 2).flatten(2)
            total += torch.bmm(l, x.mT).sum(0)
        return total.view(self.shape)

    def magnitude(self) -> Tensor:
        """Return a bound of the sum of the rows' norms: no entry is in more patches.

        The bound is ``sqrt(r * kernel) |l| |x|``.
        """
        most = self.rank // len(self.inputs) * math.prod(self.convolution.kernel)
        return self.cotangents.norm() * self.inputs.norm() * most**0.5

    def narrow(self, start: int, stop: int) -> "ConvolutionFactor":
        """Return the factor of whole groups of n rows."""
        return self._with(self.inputs, self._groups(start, stop))

    def with_cotangents(
        self, cotangents: Sequence[Tensor], known: Known
    ) -> "ConvolutionFactor":
        """Return the factor of other rows of the same call."""
        return self._with(self.inputs, cotangents)

    def to(self, dtype: torch.dtype) -> "ConvolutionFactor":
        """Return the same factor in another data type."""
        pieces = [piece.to(dtype) for piece in self.pieces]
        return self._with(self.inputs.to(dtype), pieces)

    def _with(
        self, inputs: Tensor, cotangents: Tensor | Sequence[Tensor]
    ) -> "ConvolutionFactor":
        return ConvolutionFactor(self.convolution, inputs, cotangents, self.shape)

    # --- rows

    def slab(self, index: Slab) -> Tensor:
        """Return the rows of K at some rows of the weight, ``(rank, k, *rest)``."""
        if isinstance(index, Tensor):
            return self.slab(slice(0, self.shape[0]))[:, index]
        start, stop, _ = index.indices(self.shape[0])
        return self._formed(0, self.rank, start, stop)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K."""
        return self._formed(start, stop, 0, self.shape[0])

    def _formed(self, start: int, stop: int, first: int, last: int) -> Tensor:
        # Whole groups are formed at once.
        low, high = first // self.unit, -(-last // self.unit)
        size = (high - low) * self.unit
        out = self.inputs.new_empty(stop - start, size, *self.shape[1:])
        each = self._each()
        for cotangents, examples, where in row_blocks(start, stop, len(self.inputs)):
            count = cotangents.stop - cotangents.start
            block = out[where].unflatten(0, (count, -1)).flatten(3)
            l = [own[examples] for own in each[cotangents]]
            x = self.inputs[examples]
            if self.convolution.transposed:
                for own, rows in zip(l, block, strict=True):
                    self._fill(rows.unsqueeze(0), [x], own, low, high)
            else:
                self._fill(block, l, x, low, high)
        return out.narrow(1, first - low * self.unit, last - first)

    def _fill(
        self, out: Tensor, left: Sequence[Tensor], right: Tensor, low: int, high: int
    ) -> None:
        """Write ``left patches(right)^T`` to ``out``, for parts ``low:high`` of it.

        The parts are the groups of the convolution, or the outputs if there is one.

        Args:
            out: ``(count, n, parts * unit, columns)``.
            left: as many as count, ``(n, uses, channels, *positions)`` each.
            right: ``(n, uses, channels, *size)``.
            low: first part.
            high: end of the parts.
        """
        groups, unit = self.convolution.groups, self.unit
        for some, seen in self._patches(right, left[0].shape[3:]):
            x = seen
            if groups > 1:
                x = seen.unflatten(1, (groups, -1))[:, low:high].flatten(0, 1)
            for own, rows in zip(left, out[:, some], strict=True):
                l = own[some].transpose(1, 2).flatten(2)
                if groups == 1:
                    _multiply(l[:, low:high], x, rows)
                else:
                    l = l.unflatten(1, (groups, -1))[:, low:high].flatten(0, 1)
                    apart = rows.unflatten(1, (-1, unit)).flatten(0, 1)
                    torch.bmm(l, x.mT, out=apart)

    def _patches(
        self, x: Tensor, positions: Sequence[int]
    ) -> Iterator[tuple[slice, Tensor]]:
        """Yield patches of some examples, few enough to stay in a processor's cache."""
        each = math.prod((*x.shape[1:3], *self.convolution.kernel, *positions))
        each *= _CACHED if x.device.type == "cpu" else 1
        for some in pieces(len(x), each):
            yield some, self.convolution.patches(x[some], positions)

    # --- Gram matrices

    def gram(self, space: TangentSpace, dtype: torch.dtype) -> Tensor:
        """Return ``K sharp K^T`` from slabs of rows, or as that of a linear layer.

        The latter multiplies patches for each pair of positions, which pays off only
        where there are few of them (:func:`forms_rows`).
        """
        flat = isinstance(space.manifold, geoopt.Euclidean) and space.mass.is_scalar
        if flat and self.convolution.groups == 1:
            transposed = self.convolution.transposed
            n, uses = self.inputs.shape[:2]
            r, side = self.rank // n, self.inputs if transposed else self.pieces[0][0]
            positions = uses * math.prod(side.shape[3:])
            kind = (1, r * n) if transposed else (r, n)
            out, width = self.shape[0], math.prod(self.shape[1:])
            if not forms_rows(*kind, positions, out, width):
                point = space.point.flatten(1)
                flattened = TangentSpace(space.manifold, point, space.mass, space.name)
                return self.to(dtype).unfolded().gram(flattened, dtype)
        return slab_gram(self, space, dtype)

    def unfolded(self) -> LinearFactor:
        """Return the factor of the linear layer on patches that this layer is.

        Only without groups; the weight is flattened to a matrix.
        """
        r = self.rank // len(self.inputs)
        if self.convolution.transposed:
            right = self.cotangents.flatten(0, 1)
            left = self.inputs.repeat(r, *[1] * (self.inputs.ndim - 1)).unsqueeze(0)
        else:
            left, right = self.cotangents, self.inputs
        x = self.convolution.patches(right, left.shape[4:])
        return LinearFactor(x.mT, left.transpose(2, 3).flatten(3).mT)

    # --- sums

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of a weight that two layers share."""
        return added(self, other)

    @classmethod
    def merge(cls, factors: Sequence["ConvolutionFactor"]) -> MetricFactor:
        """Return the sum of factors: alike in everything, they are further uses."""
        alike: dict[object, list[ConvolutionFactor]] = {}
        for factor in factors:
            sizes = factor.inputs.shape[3:], factor.pieces[0].shape[4:]
            alike.setdefault((factor.convolution, *sizes), []).append(factor)
        merged = [
            same[0]._with(
                torch.cat([f.inputs for f in same], 1),
                torch.cat([f.cotangents for f in same], 2),
            )
            if len(same) > 1
            else same[0]
            for same in alike.values()
        ]
        return merged[0] if len(merged) == 1 else SumFactor(merged)


def _multiply(left: Tensor, right: Tensor, out: Tensor) -> None:
    """Write ``left right^T`` for each example, the longer side first."""
    if left.shape[1] < right.shape[1]:
        torch.bmm(left, right.mT, out=out)
    else:
        out.copy_(torch.bmm(right, left.mT).mT)
