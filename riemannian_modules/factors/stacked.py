"""The factor of a weight whose blocks of rows have inputs of their own."""

from collections.abc import Sequence
from functools import cached_property
from itertools import accumulate, pairwise

import torch
from torch import Tensor
from torch.nn.functional import pad

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.linear import LinearFactor
from riemannian_modules.factors.slabs import Slab, SlabFactor, acts_by_row, restricted
from riemannian_modules.factors.sums import added
from riemannian_modules.tangent import TangentSpace

__all__ = ["StackedFactor"]


class StackedFactor(SlabFactor):
    """K of a weight ``[W_1; W_2; ...]`` with outputs ``W_b x_b``, structured.

    One linear factor of the whole weight would need cotangents that are zero outside
    of each block. Where the Riesz map acts on each row of the weight alone, the Gram
    matrix is the sum of those of the blocks.

    Args:
        blocks: the factor of each block, of the same rank and input width.

    Raises:
        ShapeError: they differ in rank or width, or there are none.

    >>> x, l = torch.ones(2, 1, 3), torch.ones(1, 2, 1, 4)
    >>> factor = StackedFactor([LinearFactor(x, l), LinearFactor(2 * x, l)])
    >>> factor.shape, factor.matvec(torch.ones(8, 3))
    ((8, 3), tensor([36., 36.]))
    """

    def __init__(self, blocks: Sequence[LinearFactor]) -> None:
        kinds = {(block.rank, block.shape[1]) for block in blocks}
        if len(kinds) != 1:
            raise ShapeError(
                f"blocks of a stacked factor have the (rank, width) {sorted(kinds)}; "
                "expected one"
            )
        self.blocks = list(blocks)
        self.heights = [block.shape[0] for block in blocks]
        self.rank = blocks[0].rank
        self.shape = (sum(self.heights), blocks[0].shape[1])

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the cotangents."""
        return self.blocks[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the cotangents."""
        return self.blocks[0].device

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``, a sum over the blocks."""
        pieces = zip(self.blocks, u.split(self.heights), strict=True)
        return torch.stack([block.matvec(piece) for block, piece in pieces]).sum(0)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``."""
        return torch.cat([block.rmatvec(a) for block in self.blocks])

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return torch.cat([block.row_sum() for block in self.blocks])

    def magnitude(self) -> Tensor:
        """Return the sum of the blocks' bounds."""
        return torch.stack([block.magnitude() for block in self.blocks]).sum()

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K."""
        return torch.cat([block.rows(start, stop) for block in self.blocks], 1)

    def narrow(self, start: int, stop: int) -> "StackedFactor":
        """Return the factor of whole groups of n rows."""
        return StackedFactor([block.narrow(start, stop) for block in self.blocks])

    def to(self, dtype: torch.dtype) -> "StackedFactor":
        """Return the same factor in another data type."""
        return StackedFactor([block.to(dtype) for block in self.blocks])

    @cached_property
    def padded(self) -> LinearFactor:
        """One factor of the whole weight, with zeros in its cotangents."""
        ends = pairwise(accumulate(self.heights, initial=0))
        cotangents = [
            pad(block.cotangents, (start, self.shape[0] - stop))
            for block, (start, stop) in zip(self.blocks, ends, strict=True)
        ]
        inputs = torch.cat([block.inputs for block in self.blocks], 1)
        return LinearFactor(inputs, torch.cat(cotangents, 2))

    def slab(self, index: Slab) -> Tensor:
        """Return the rows of K at some rows of the weight, ``(rank, k, in)``."""
        return self.padded.slab(index)

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of a weight that is used in two places."""
        return added(self, other)

    @classmethod
    def merge(cls, factors: Sequence["StackedFactor"]) -> MetricFactor:
        """Return the sum of factors: uses of a weight are further positions."""
        if any(factor.heights != factors[0].heights for factor in factors):
            return LinearFactor.merge([factor.padded for factor in factors])
        columns = zip(*(factor.blocks for factor in factors), strict=True)
        return cls([LinearFactor.merge(column) for column in columns])

    def gram(self, space: TangentSpace, dtype: torch.dtype) -> Tensor:
        """Return ``K sharp K^T``, shape ``(rank, rank)``, lower triangle valid.

        Cost: that of the blocks, unless the Riesz map mixes rows of the weight.
        """
        if not acts_by_row(space):
            return self.padded.gram(space, dtype)
        ends = pairwise(accumulate(self.heights, initial=0))
        first, *others = (
            block.gram(restricted(space, slice(*end)), dtype)
            for block, end in zip(self.blocks, ends, strict=True)
        )
        for gram in others:
            first += gram
        return first
