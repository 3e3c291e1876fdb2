r"""The factor of an embedding: rows that are zero but at the tokens of an example.

Row ``(j, i)`` of K is the sum over the tokens of example i of ``e_token l^T``, where l
is the cotangent at the token's place in the output. Neither rows of the vocabulary's
length nor a product with the whole table is ever formed where the Riesz map acts on
each row alone.
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
    side_by_side,
)
from riemannian_modules.factors.slabs import (
    Slab,
    SparseFactor,
    acts_by_row,
    add_lower,
    pieces,
    restricted,
    row_blocks,
    slab_gram,
)
from riemannian_modules.factors.sums import added
from riemannian_modules.factors.tokens import equal_pairs, occurring, slots_at_most
from riemannian_modules.reading import number
from riemannian_modules.tangent import TangentSpace

__all__ = ["EmbeddingFactor"]

# What takes as long as so many multiplications in a matrix product, as measured on
# processors: a pair of tokens, each entry that it adds, each number that is gathered
# for it; and a token of the table.
_PAIR, _ENTRY, _GATHERED = 5_000, 800, 150
_TOKEN = 100_000


class EmbeddingFactor(CotangentFactor, SparseFactor):
    """K of the weight ``(vocabulary, width)`` of an embedding, structured.

    Args:
        tokens: rows of the weight that occur, ``(N,)``.
        cotangents: rows of L at the output, ``(r, n, places, width)``.
        vocabulary: number of rows of the weight.
        places: where each token ends up in the output, an index into the ``n places``
            of all examples, ``(N,)``; None: one token at each place, in order.
        weights: what each token is multiplied with, ``(N,)``; None: 1.

    The rank is ``r n``, with the example as the fast index. Memory is that of the
    arguments; products cost O(r N width), and the result has the size of the weight.

    Raises:
        ShapeError: the tensors do not fit.

    >>> tokens, l = torch.tensor([2, 0]), torch.ones(1, 1, 2, 1)
    >>> EmbeddingFactor(tokens, l, 3).to_dense()
    tensor([[1., 0., 1.]])
    """

    def __init__(
        self,
        tokens: Tensor,
        cotangents: Tensor,
        vocabulary: int,
        places: Tensor | None = None,
        weights: Tensor | None = None,
    ) -> None:
        sizes = [t.shape for t in (places, weights) if t is not None]
        fits = cotangents.ndim == 4 and tokens.ndim == 1
        if places is None and fits:
            fits = len(tokens) == cotangents.shape[1] * cotangents.shape[2]
        if not fits or any(size != tokens.shape for size in sizes):
            raise ShapeError(
                f"tokens {tuple(tokens.shape)} and cotangents "
                f"{tuple(cotangents.shape)} do not fit; expected (tokens,), and "
                "(rows, n, places, width) with a place for each token"
            )
        self.tokens = tokens
        self.pieces, self.cotangents = (cotangents,), cotangents
        self.places = places
        self.weights = weights
        self.rank = cotangents.shape[0] * cotangents.shape[1]
        self.shape = (vocabulary, cotangents.shape[-1])

    @cached_property
    def _examples(self) -> Tensor:
        # The example that each token belongs to.
        _, n, each, _ = self.cotangents.shape
        if self.places is None:
            return torch.arange(n, device=self.device).repeat_interleave(each)
        return self.places.div(each, rounding_mode="floor")

    def _by_token(self, cotangents: Tensor) -> Tensor:
        """Return ``(*leading, N, width)`` for ``(*leading, n, places, width)``."""
        flat = cotangents.flatten(-3, -2)
        if self.places is not None:
            flat = flat.index_select(-2, self.places)
        return flat if self.weights is None else flat * self.weights.unsqueeze(-1)

    # --- products

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``: each row's cotangents against the embedding by ``u``."""
        return self._against(u.to(self.dtype).index_select(0, self.tokens))

    def _against(self, z: Tensor) -> Tensor:
        """Return the products with vectors at the tokens, ``(N, width)``."""
        if self.weights is not None:
            z = z * self.weights.unsqueeze(-1)
        _, *size = self.cotangents.shape
        if self.places is not None:
            there = z.new_zeros(size[0] * size[1], size[2])
            z = there.index_add_(0, self.places, z)
        return (self.cotangents * z.view(size)).sum((-1, -2)).view(-1)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``, of the size of the weight."""
        return self._pull(self.combine(a))

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``."""
        return self._pull(self.total())

    def _pull(self, cotangent: Tensor) -> Tensor:
        out = cotangent.new_zeros(self.shape)
        return out.index_add_(0, self.tokens, self._by_token(cotangent))

    def image(self, space: TangentSpace, e: Tensor, source: MetricFactor) -> Tensor:
        """Return ``K sharp e``, with the Riesz map of the rows that occur."""
        if not acts_by_row(space) or len(self.tokens) > self.shape[0]:
            return super().image(space, e, source)
        there = restricted(space, self.tokens)
        return self._against(there.sharp(e.index_select(0, self.tokens)))

    def magnitude(self) -> Tensor:
        """Return a bound of the sum of the rows' norms: that of the tokens' norms."""
        return self._by_token(self.cotangents).norm(dim=-1).sum()

    def narrow(self, start: int, stop: int) -> "EmbeddingFactor":
        """Return the factor of whole groups of n rows."""
        return self._with(self._groups(start, stop))

    def to(self, dtype: torch.dtype) -> "EmbeddingFactor":
        """Return the same factor in another data type."""
        weights = None if self.weights is None else self.weights.to(dtype)
        return self._with(self.cotangents.to(dtype), weights)

    def with_cotangents(
        self, cotangents: Sequence[Tensor], known: Known
    ) -> "EmbeddingFactor":
        """Return the factor of other rows of the same call."""
        return self._with(side_by_side(cotangents, known), self.weights)

    def _with(
        self, cotangents: Tensor, weights: Tensor | None = None
    ) -> "EmbeddingFactor":
        weights = self.weights if weights is None else weights
        return EmbeddingFactor(
            self.tokens, cotangents, self.shape[0], self.places, weights
        )

    # --- rows

    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K; their memory is what this class avoids."""
        vocabulary, width = self.shape
        out = self.cotangents.new_zeros(stop - start, vocabulary * width)
        n = self.cotangents.shape[1]
        for cotangents, examples, where in row_blocks(start, stop, n):
            l = self._by_token(self.cotangents[cotangents])
            here = (self._examples >= examples.start) & (self._examples < examples.stop)
            index = (self._examples - examples.start).clamp(0, len(out[where]) - 1)
            index = index * vocabulary + self.tokens
            block = out[where].view(len(l), -1, width)
            block.index_add_(1, index, l * here.unsqueeze(-1))
        return out.view(-1, vocabulary, width)

    def slab(self, index: Slab) -> Tensor:
        """Return the rows of K at some rows of the weight, ``(rank, k, width)``."""
        if isinstance(index, Tensor):
            return self.slab(slice(None))[:, index]
        start, stop, _ = index.indices(self.shape[0])
        return self._scattered(self.tokens, start, stop)

    def slot_slab(self, slots: slice) -> Tensor:
        """Return the rows of K at ``table[slots]``, ``(rank, k, width)``."""
        return self._scattered(self._slots[1], slots.start, slots.stop)

    def _scattered(self, where: Tensor, start: int, stop: int) -> Tensor:
        """Return the tokens' cotangents added up at ``where``, from start to stop."""
        r, n, _, width = self.cotangents.shape
        size = stop - start
        here = (where >= start) & (where < stop)
        index = self._examples * size + (where - start).clamp(0, size - 1)
        out = self.cotangents.new_zeros(r, n * size, width)
        l = self._by_token(self.cotangents)
        out.index_add_(1, index, l * here.unsqueeze(-1))
        return out.view(r * n, size, width)

    @property
    def table(self) -> Tensor:
        """The tokens that occur, ``(m,)``; the slots of the rest hold zero."""
        return self._slots[0]

    @cached_property
    def _slots(self) -> tuple[Tensor, Tensor]:
        """The tokens that occur, and the number among them of each, ``(N,)``."""
        if self.device.type == "cpu":
            return occurring(self.tokens)
        return slots_at_most(self.tokens, self.shape[0])

    # --- Gram matrices

    def gram(self, space: TangentSpace, dtype: torch.dtype) -> Tensor:
        r"""Return ``K sharp K^T`` with the Riesz map of the rows that occur.

        A token costs ``rank^2 width`` multiplications in a matrix product over the
        table of tokens, or, if it occurs c times, the handling of ``c^2`` pairs of
        occurrences. Each token goes the cheaper way; off the CPU, where how often it
        occurs is not known, all go the first.
        """
        own, space = self.to(dtype), space.to(dtype)
        if not acts_by_row(space):
            return slab_gram(own, space, dtype)
        total = torch.zeros(own.rank, own.rank, dtype=dtype, device=own.device)
        if self.device.type != "cpu":
            return own._add_table(total, space)
        pairs, product = self._ways
        often = (pairs > product)[own._slots[1]]
        own._part(often)._add_table(total, space)
        own._part(~often)._add_pairs(total, space)
        return total

    @cached_property
    def _ways(self) -> tuple[Tensor, float]:
        """What each token of the table costs in pairs, and what in a matrix product."""
        r, _, _, width = self.cotangents.shape
        pair = _PAIR + _ENTRY * r**2 + _GATHERED * r * width
        counts = torch.bincount(self._slots[1])
        return pair * counts.double() ** 2, self.rank**2 * width + _TOKEN

    def gram_work(self) -> float:
        """Return what :meth:`gram` costs, in multiplications of a matrix product."""
        if self.device.type != "cpu":
            tokens = min(len(self.tokens), self.shape[0])
            return 0.5 * self.rank**2 * tokens * self.shape[1]
        pairs, product = self._ways
        # Which way a block is solved follows from it, with much else.
        return number(pairs.clamp_max(product).sum(), float)

    def gram_diagonal(self, space: TangentSpace) -> Tensor:
        """Return the diagonal of ``K sharp K^T``, ``(rank,)``. Cost O(r N width).

        Args:
            space: tangent space, where the Riesz map acts on each row; on the CPU.
        """
        r, n, _, width = self.cotangents.shape
        vocabulary = self.shape[0]
        keys = self._examples * vocabulary + self.tokens
        keys, index = keys.unique(return_inverse=True)
        l = self._by_token(self.cotangents)
        rows = l.new_zeros(r, len(keys), width).index_add_(1, index, l)
        images = restricted(space, keys % vocabulary).sharp(rows)
        found, products = l.new_zeros(r, n), (rows * images).sum(-1)
        return found.index_add_(1, keys // vocabulary, products).view(-1)

    def _part(self, chosen: Tensor) -> "EmbeddingFactor":
        """Return the factor of some of the tokens, chosen by a mask; CPU only."""
        index = chosen.nonzero().squeeze(-1)
        places = index if self.places is None else self.places[index]
        weights = None if self.weights is None else self.weights[index]
        tokens, vocabulary = self.tokens[index], self.shape[0]
        return EmbeddingFactor(tokens, self.cotangents, vocabulary, places, weights)

    def _add_table(self, total: Tensor, space: TangentSpace) -> Tensor:
        for slots in pieces(len(self.table), self.rank * self.shape[1]):
            rows = self.slot_slab(slots)
            images = restricted(space, self.table[slots]).sharp(rows)
            add_lower(total, rows.flatten(1), images.flatten(1), first=False)
        return total

    def _add_pairs(self, total: Tensor, space: TangentSpace) -> None:
        l = self._by_token(self.cotangents)
        images = restricted(space, self.tokens).sharp(l)
        r, n = self.cotangents.shape[:2]
        groups = torch.arange(r) * n
        flat = total.view(-1)
        for one, other in equal_pairs(self.tokens, r * max(r, self.shape[1])):
            left, right = l.index_select(1, one), images.index_select(1, other)
            if r == 1:
                products = left.mul_(right).sum(-1)
            else:
                products = torch.bmm(left.transpose(0, 1), right.permute(1, 2, 0))
            row = self._examples[one].unsqueeze(-1) + groups
            column = self._examples[other].unsqueeze(-1) + groups
            index = row.unsqueeze(-1) * self.rank + column.unsqueeze(-2)
            flat.index_add_(0, index.view(-1), products.view(-1))

    # --- sums

    def __add__(self, other: MetricFactor) -> MetricFactor:
        """Return the factor of an embedding that is used twice."""
        return added(self, other)

    @classmethod
    def merge(cls, factors: Sequence["EmbeddingFactor"]) -> "EmbeddingFactor":
        """Return the sum of factors: uses of an embedding are further places."""
        cotangents = torch.cat([f.cotangents for f in factors], 2)
        total, before = cotangents.shape[2], 0
        places, weights = [], []
        for factor in factors:
            own = factor.cotangents.shape[2]
            place = factor.places
            if place is None:
                place = torch.arange(len(factor.tokens), device=factor.device)
            example = place.div(own, rounding_mode="floor")
            places.append(example * total + before + place % own)
            ones = torch.ones_like(factor.tokens, dtype=factor.dtype)
            weights.append(ones if factor.weights is None else factor.weights)
            before += own
        plain = all(factor.weights is None for factor in factors)
        return EmbeddingFactor(
            torch.cat([factor.tokens for factor in factors]),
            cotangents,
            factors[0].shape[0],
            torch.cat(places),
            None if plain else torch.cat(weights),
        )
