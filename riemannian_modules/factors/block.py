"""Products with the factors of a block, in which a bias travels with its weight.

A Euclidean bias whose cotangents are those of a weight in the block costs next to
nothing: its Gram matrix ``L L^T`` is the weight's with ``X X^T`` replaced by ones.
"""

import functools
import operator
from collections.abc import Iterator, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.chunks import is_bounded
from riemannian_modules.factors.cotangents import memory
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.linear import BiasFactor, LinearFactor
from riemannian_modules.factors.linear_gram import absorbs_bias
from riemannian_modules.factors.products import (
    gram_columns,
    gram_diagonal,
    gram_product,
    has_kernel,
)
from riemannian_modules.factors.slabs import add_lower, gram_of_whole_rows
from riemannian_modules.tangent import TangentSpace

__all__ = ["BlockFactor"]

Pair = tuple[MetricFactor, TangentSpace]
Combining = LinearFactor | BiasFactor


class BlockFactor:
    """K of a block: the factors of its tensors, side by side.

    Args:
        pairs: factor and tangent space of each tensor.

    >>> import geoopt
    >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(4))
    >>> pair = BiasFactor(torch.ones(1, 2, 1, 4)), space
    >>> BlockFactor([pair]).gram(torch.float32)
    tensor([[4., 4.],
            [4., 4.]])
    """

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.pairs = pairs
        # {index of a weight: index of the bias that it takes along}
        self._biases: dict[int, int] = {}
        for index, (factor, space) in enumerate(pairs):
            # Only where its Riesz map is a division by one number is its Gram matrix a
            # multiple of L L^T.
            if isinstance(factor, BiasFactor) and space.divisor is not None:
                weight = self._weight_of(factor)
                if weight is not None:
                    self._biases[weight] = index
        self._absorbed = set(self._biases.values())

    def _weight_of(self, bias: BiasFactor) -> int | None:
        for index, (weight, space) in enumerate(self.pairs):
            if (
                index not in self._biases
                and isinstance(weight, LinearFactor)
                and bias.belongs_to(weight)
                and absorbs_bias(space.manifold, space.mass)
            ):
                weight.beside = bias
                return index
        return None

    def _bias_weight(self, index: int) -> float:
        """Return what the bias of a weight adds to ``X X^T``; 0 without one."""
        if index not in self._biases:
            return 0.0
        return 1.0 / self.pairs[self._biases[index]][1].mass.scalar

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Return ``sum_b K_b sharp_b K_b^T``, ``(rank, rank)``, lower triangle valid.

        Args:
            dtype: data type in which the matrix is formed and summed.

        Returns:
            A fresh matrix. Cost: that of the factors' own Gram matrices.

        Raises:
            ValueError: no factors.
        """
        if not self.pairs:
            raise ValueError("a block needs at least one factor")
        total: Tensor | None = None
        stored: list[tuple[Tensor, Tensor]] = []
        for index, (factor, space) in enumerate(self.pairs):
            if index in self._absorbed:
                continue
            if isinstance(factor, LinearFactor):
                bias = self._bias_weight(index)
                total = factor.gram(space, dtype, bias=bias, onto=total)
            elif type(factor) is DenseFactor and not is_bounded():
                rows = factor.rows(0, factor.rank).to(dtype)
                images = space.to(dtype).sharp(rows)
                stored.append(
                    (rows.reshape(len(rows), -1), images.reshape(len(rows), -1))
                )
            else:
                gram = _in_chunks(factor, space, dtype)
                total = gram if total is None else total.add_(gram)
        if stored:
            # One product for all of them, and only its lower triangle.
            left, right = (torch.cat(each, 1) for each in zip(*stored, strict=True))
            first = total is None
            if total is None:
                total = left.new_empty(len(left), len(left))
            add_lower(total, left, right, first=first)
        assert total is not None
        return total

    def _kernels(self) -> Iterator[tuple[MetricFactor, TangentSpace, float]]:
        """Yield what K sharp K^T sums over, with the biases that weights take along."""
        taken = {w: b for w, b in self._biases.items() if has_kernel(*self.pairs[w])}
        absorbed = set(taken.values())
        for index, (factor, space) in enumerate(self.pairs):
            if index not in absorbed:
                bias = self._bias_weight(index) if index in taken else 0.0
                yield factor, space, bias

    def gram_product(self, a: Tensor) -> Tensor:
        """Return ``sum_b K_b sharp_b K_b^T a``, ``(rank,)``, without the matrix."""
        return _total(gram_product(f, s, a, bias) for f, s, bias in self._kernels())

    def gram_columns(self, index: Tensor) -> Tensor:
        """Return some columns of ``sum_b K_b sharp_b K_b^T``, ``(rank, k)``."""
        return _total(gram_columns(f, s, index, bias) for f, s, bias in self._kernels())

    def gram_diagonal(self) -> Tensor:
        """Return the diagonal of ``sum_b K_b sharp_b K_b^T``, ``(rank,)``."""
        return _total(gram_diagonal(f, s, bias) for f, s, bias in self._kernels())

    def image(self, e: Sequence[Tensor], source: Sequence[MetricFactor]) -> Tensor:
        """Return ``sum_b K_b sharp_b e_b``, ``(rank,)``.

        Args:
            e: a covector for each tensor; read where it is needed.
            source: factors whose rows add up to these covectors.

        Returns:
            The image.
        """
        shared = {w: b for w, b in self._biases.items() if self._shares(w, b, source)}
        absorbed = set(shared.values())
        total: Tensor | None = None
        for index, (factor, space) in enumerate(self.pairs):
            if index in absorbed:
                continue
            own = source[index]
            bias = self._bias_weight(index) if index in shared else 0.0
            if isinstance(factor, LinearFactor) and factor.maps_by_kernel(
                space, own, bias
            ):
                image = factor.kernel_image(space, own, bias)
            else:
                image = factor.image(space, e[index], own)
            total = image if total is None else total + image
        assert total is not None
        return total

    def _shares(self, weight: int, bias: int, source: Sequence[MetricFactor]) -> bool:
        """Whether the images of a weight and its bias are found at once."""
        (factor, space), own = self.pairs[weight], source[bias]
        return (
            isinstance(factor, LinearFactor)
            and isinstance(own, BiasFactor)
            and own.belongs_to(source[weight])
            and factor.maps_by_kernel(space, source[weight], self._bias_weight(weight))
        )

    def rmatvec(self, a: Tensor) -> list[Tensor]:
        """Return ``K_b^T a`` for each tensor, ``a`` of shape ``(rank,)``."""
        combined = _Combined(a)
        return [combined.covector(factor) for factor, _ in self.pairs]

    def direction(
        self,
        a: Tensor,
        e: Sequence[Tensor] | None = None,
        source: Sequence[MetricFactor] | None = None,
    ) -> list[Tensor]:
        """Return ``sharp_b (e_b - K_b^T a)`` for each tensor.

        Args:
            a: ``(rank,)``.
            e: a covector for each tensor, read where it is needed; None: the result
                is ``sharp_b K_b^T a``.
            source: factors whose rows add up to these covectors. With them the
                difference is taken at the outputs of linear layers, where it is small.

        Returns:
            Tangent vectors, fresh tensors.
        """
        combined = _Combined(a)
        found = []
        for index, (factor, space) in enumerate(self.pairs):
            own = None if source is None else source[index]
            if (e is None or own is not None) and _combines(factor, own):
                cotangent = combined.at_outputs(factor, own)
                found.append(factor.lift(space, cotangent))
                continue
            covector = combined.covector(factor)
            if e is not None:
                torch.sub(e[index], covector, out=covector)
            found.append(space.sharp_(covector))
        return found


def _in_chunks(factor: MetricFactor, space: TangentSpace, dtype: torch.dtype) -> Tensor:
    if type(factor) is DenseFactor and is_bounded() and factor.shape:
        rows = DenseFactor(factor.rows(0, factor.rank).to(dtype))
        return gram_of_whole_rows(rows, space.to(dtype))
    return factor.gram(space, dtype)


def _total(summands: Iterator[Tensor]) -> Tensor:
    return functools.reduce(operator.add, summands)


class _Combined:
    """``K^T a`` at the outputs of layers, made once for a weight and its bias."""

    def __init__(self, a: Tensor) -> None:
        self._a = a
        self._known: dict[object, Tensor] = {}

    def at_outputs(
        self, factor: Combining, source: MetricFactor | None = None
    ) -> Tensor:
        """Return the combined cotangent, or what it leaves of the sum of a source's."""
        if isinstance(factor, BiasFactor):
            factor = factor.single
        if isinstance(source, BiasFactor):
            source = source.single
        key: object = memory(factor.cotangents)
        if isinstance(source, Combining):
            key = key, memory(source.cotangents)
        if key not in self._known:
            self._known[key] = (
                factor.remainder(self._a, source.total())
                if isinstance(source, Combining)
                else factor.combine(self._a)
            )
        return self._known[key]

    def covector(self, factor: MetricFactor) -> Tensor:
        """Return ``K^T a``."""
        if _combines(factor, None):
            return factor.pull(self.at_outputs(factor))
        return factor.rmatvec(self._a)


def _combines(
    factor: MetricFactor, source: MetricFactor | None
) -> TypeGuard[Combining]:
    """Whether ``K^T a``, and a source's sum, are found at the layer's outputs first."""
    if isinstance(factor, BiasFactor):
        # The rows of K may be those of other examples, of past batches for one.
        examples = factor.cotangents.shape[1]
        alike = (
            isinstance(source, BiasFactor) and source.cotangents.shape[1] == examples
        )
        return source is None or alike
    if not isinstance(factor, LinearFactor) or factor.whole is not None:
        return False
    return source is None or factor.shares_inputs(source)
