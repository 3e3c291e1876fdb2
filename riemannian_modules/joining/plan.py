"""Factors of several members of a batch, joined: of processes, or of passes.

What is taken of a linear layer is its inputs and cotangents, ``n (in + r out)`` numbers
for n examples with r rows each, and not the ``r n in out`` of its rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from riemannian_modules.factors import (
    BiasFactor,
    ConvolutionFactor,
    DenseFactor,
    EmbeddingFactor,
    LinearFactor,
    MetricFactor,
    SumFactor,
    ViewedFactor,
)
from riemannian_modules.factors.slabs import SlabFactor
from riemannian_modules.factors.stacked import StackedFactor
from riemannian_modules.joining.forms import DENSE, Form, Pieces, Spec

__all__ = ["Offer", "Plan", "cat_padded"]

Forms = Mapping[str, Form]
# The form on every member, None where a member has no such factor.
Row = Sequence[Form | None]


@dataclass(frozen=True)
class Offer:
    """What a member has to send.

    Attributes:
        forms: its factors by name.
        specs: the tensors that they are made of.
        examples: number n of its examples.
        rows: number r of rows of its factors for each example; 0 without factors.
        share: its part of the batch, from 0 to 1.
    """

    forms: Forms
    specs: list[Spec]
    examples: int
    rows: int
    share: float


@final
class Plan:
    """What is sent in the end: the same on every member, without asking again.

    Factors that are not of one form on all members send their rows.

    Args:
        offers: what every member has.

    Attributes:
        sizes: number of bytes that every member sends.
    """

    def __init__(self, offers: Sequence[Offer]) -> None:
        self._examples = [offer.examples for offer in offers]
        self._shares = [offer.share for offer in offers]
        self._rows: dict[str, list[Form | None]] = {}
        self._dense_names: list[str] = []
        specs = [list(offer.specs) for offer in offers]
        for name in dict.fromkeys(name for offer in offers for name in offer.forms):
            row = [offer.forms.get(name) for offer in offers]
            known = [form for form in row if form is not None]
            alike = len({form.key() for form in known}) == 1
            if not alike or known[0].kind == DENSE:
                self._dense_names.append(name)
                row = [_dense(form, own) for form, own in zip(row, specs, strict=True)]
            self._rows[name] = row
        self._used = [self._needs(p) for p in range(len(offers))]
        self._sent = [
            [own[i] for i in used] for own, used in zip(specs, self._used, strict=True)
        ]
        self.sizes = [sum(spec.nbytes for spec in sent) for sent in self._sent]

    def _needs(self, p: int) -> list[int]:
        forms = [row[p] for row in self._rows.values()]
        return sorted({i for form in forms if form is not None for i in form.needs()})

    def packed(
        self,
        rank: int,
        factors: Mapping[str, MetricFactor],
        pieces: Pieces,
        device: torch.device,
    ) -> Tensor:
        """Return what a member sends, ``(sizes[rank],)`` bytes.

        Args:
            rank: the member.
            factors: its factors by name.
            pieces: the tensors that they are made of.
            device: where they are.
        """
        tensors = list(pieces.tensors)
        tensors += [
            factors[name].rows(0, factors[name].rank)
            for name in self._dense_names
            if self._rows[name][rank] is not None
        ]
        out = torch.zeros(self.sizes[rank], dtype=torch.uint8, device=device)
        places = self._unpacked(rank, out)
        for i, spec in zip(self._used[rank], self._sent[rank], strict=True):
            places[i].copy_(tensors[i].reshape(spec.shape))
            if spec.power and self._shares[rank] != 1.0:
                places[i].mul_(self._shares[rank] ** spec.power)
        return out

    def _unpacked(self, rank: int, some: Tensor) -> dict[int, Tensor]:
        found, start = {}, 0
        for i, spec in zip(self._used[rank], self._sent[rank], strict=True):
            size = torch.Size(spec.shape).numel() * spec.dtype.itemsize
            part = some[start : start + size].view(spec.dtype)
            found[i] = part.view(spec.shape)
            start += spec.nbytes
        return found

    def joined(self, received: Sequence[Tensor]) -> dict[str, MetricFactor]:
        """Return the factors of all examples, by name.

        Args:
            received: what every member sent.
        """
        tensors = [self._unpacked(p, some) for p, some in enumerate(received)]
        specs = [
            dict(zip(used, sent, strict=True))
            for used, sent in zip(self._used, self._sent, strict=True)
        ]
        gathered = _Gathered(tensors, specs, self._examples)
        return {name: gathered.factor(row) for name, row in self._rows.items()}


def _dense(form: Form | None, specs: list[Spec]) -> Form | None:
    """Return the form of a factor that sends its rows, the last of the tensors."""
    if form is None:
        return None
    spec = Spec((form.rows, form.examples, *form.shape), form.dtype, 1, form.power)
    specs.append(spec)
    return replace(form, kind=DENSE, detail=None, pieces=(len(specs) - 1,), parts=())


@final
class _Gathered:
    """The tensors of all members.

    Args:
        tensors: those of each, by number.
        specs: what they are.
        examples: number of examples of each.
    """

    def __init__(
        self,
        tensors: Sequence[Mapping[int, Tensor]],
        specs: Sequence[Mapping[int, Spec]],
        examples: Sequence[int],
    ) -> None:
        self._tensors = tensors
        self._specs = specs
        self._examples = examples
        self._joined: dict[tuple[int | None, ...], Tensor] = {}

    def factor(self, row: Row) -> MetricFactor:
        """Return the factor of all examples.

        Args:
            row: its form on every member.
        """
        first = next(form for form in row if form is not None)
        if first.parts:
            parts = [
                self.factor([None if form is None else form.parts[i] for form in row])
                for i in range(len(first.parts))
            ]
            if first.kind == StackedFactor.__name__:
                return StackedFactor([p for p in parts if isinstance(p, LinearFactor)])
            if first.kind == ViewedFactor.__name__:
                (inner,) = parts
                assert isinstance(inner, LinearFactor | EmbeddingFactor)
                return ViewedFactor(inner)
            return SumFactor([p for p in parts if isinstance(p, SlabFactor)])
        columns = [
            tuple(None if form is None else form.pieces[i] for form in row)
            for i in range(len(first.pieces))
        ]
        if first.kind == EmbeddingFactor.__name__:
            return self._embedding(first, columns)
        tensors = [self._join(column) for column in columns]
        if first.kind == DENSE:
            return DenseFactor(tensors[0].flatten(0, 1))
        if first.kind == BiasFactor.__name__:
            return BiasFactor(tensors[0])
        cotangents, inputs = tensors
        if first.kind == LinearFactor.__name__:
            return LinearFactor(inputs, cotangents)
        assert isinstance(first.detail, tuple)
        return ConvolutionFactor(first.detail[0], inputs, cotangents, first.shape)

    def _embedding(
        self, form: Form, columns: Sequence[tuple[int | None, ...]]
    ) -> EmbeddingFactor:
        own = self._each(columns[0])
        tokens = [self._each(column) for column in columns[1:]]
        assert isinstance(form.detail, tuple)
        has_places, has_weights = form.detail
        cotangents = self._join(columns[0])
        weights = torch.cat(tokens[-1]) if has_weights else None
        most = cotangents.shape[2]
        places = None
        if has_places or any(each.shape[2] != most for each in own):
            found, before = [], 0
            for p, each in enumerate(own):
                _, n, count, _ = each.shape
                place = (
                    tokens[1][p]
                    if has_places
                    else torch.arange(n * count, device=each.device)
                )
                example = place.div(count, rounding_mode="floor") + before
                found.append(example * most + place % count)
                before += n
            places = torch.cat(found)
        return EmbeddingFactor(
            torch.cat(tokens[0]), cotangents, form.shape[0], places, weights
        )

    def _join(self, column: tuple[int | None, ...]) -> Tensor:
        """Return a tensor of all examples, zero where something is shorter."""
        if column not in self._joined:
            parts = self._each(column)
            axis = self._spec(column)[0].axis
            self._joined[column] = cat_padded(parts, axis)
        return self._joined[column]

    def _spec(self, column: Sequence[int | None]) -> tuple[Spec, int]:
        """Return the spec of the first member that has this tensor, and its number."""
        return next(
            (self._specs[p][i], p) for p, i in enumerate(column) if i is not None
        )

    def _each(self, column: Sequence[int | None]) -> list[Tensor]:
        """Return the tensor of every member; zeros for one that has none."""
        spec, known = self._spec(column)
        like = next(self._tensors[p][i] for p, i in enumerate(column) if i is not None)
        found = []
        for p, i in enumerate(column):
            if i is not None:
                found.append(self._tensors[p][i])
                continue
            shape = list(spec.shape)
            each, left = divmod(shape[spec.axis], self._examples[known])
            shape[spec.axis] = 0 if left else each * self._examples[p]
            found.append(like.new_zeros(shape))
        return found


def cat_padded(tensors: Sequence[Tensor], axis: int) -> Tensor:
    """Return tensors behind each other, with zeros where one is shorter.

    Args:
        tensors: of the same number of dimensions.
        axis: along which they are put behind each other.
    """
    most = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    padded = []
    for tensor in tensors:
        missing = [0 if d == axis else m for d, m in enumerate(most)]
        missing = [max(0, m - s) for m, s in zip(missing, tensor.shape, strict=True)]
        margins = [p for m in reversed(missing) for p in (0, m)]
        padded.append(pad(tensor, margins) if any(margins) else tensor)
    return torch.cat(padded, axis)
