"""The passes of one process that make up one batch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError, NotRecordedError, ShapeError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.heads import Reduction
from riemannian_modules.joining.forms import Pieces
from riemannian_modules.joining.headers import Header, Size, header_of, shares
from riemannian_modules.joining.members import (
    Members,
    join,
    own_residual,
    own_sums,
)
from riemannian_modules.joining.plan import Offer, Plan, cat_padded
from riemannian_modules.linearization import Linearization
from riemannian_modules.tape import Tape

__all__ = ["Passed", "Waiting", "join_passes"]


@dataclass(frozen=True)
class Passed:
    """A pass that waits for others of its batch.

    Attributes:
        found: its linearisation.
        loss: its loss, or None.
        size: how much of the batch it is.
        held: whether it kept the factors of before, so that it has no rows.
    """

    found: Linearization
    loss: Tensor | None
    size: Size
    held: bool = False


@final
class Waiting:
    """Passes that wait for the last one of their batch.

    Args:
        parameters: the model's parameters.
    """

    def __init__(self, parameters: DeclaredParameters) -> None:
        self._parameters = parameters
        self._passes: list[Passed] = []
        self._tapes: list[Tape] = []
        self._versions: list[int] = []

    def __len__(self) -> int:
        return len(self._passes)

    def add(self, passed: Passed, tape: Tape) -> None:
        """Keep a pass until the batch is complete.

        Args:
            passed: the pass.
            tape: what it recorded.

        Raises:
            LinearizationError: parameters have moved since the first one.
        """
        self._require_same_point()
        self._versions = self._now()
        loss = None if passed.loss is None else passed.loss.detach()
        self._passes.append(replace(passed, loss=loss))
        self._tapes.append(tape)

    def clear(self) -> None:
        """Drop the passes: the next one begins a batch."""
        self._passes, self._tapes, self._versions = [], [], []

    def pop(self) -> tuple[Passed, Tape]:
        """Return the last pass, which no longer waits.

        Raises:
            NotRecordedError: none waits.
            LinearizationError: parameters have moved since; all are dropped.
        """
        self._require_same_point()
        if not self._passes:
            raise NotRecordedError(
                "no pass waits for others of its batch: metric.backward(..., "
                "accumulate=True) makes one wait"
            )
        return self._passes.pop(), self._tapes.pop()

    def joined(self, last: Passed, reduction: Reduction) -> Passed:
        """Return the pass of all examples; those that wait are left waiting.

        Args:
            last: the last pass.
            reduction: how the loss sums over examples.

        Raises:
            LinearizationError: parameters have moved between the passes, a layer's
                input was overwritten, or only some passes are frozen.
            ShapeError: the outputs are divided among the passes in different
                proportions, or some passes have a loss and others none.
            EmptyBatchError: all weights of the batch are zero.
        """
        self._require_same_point()
        passes = [*self._passes, last]
        if len({each.loss is None for each in passes}) > 1:
            raise ShapeError(
                "some passes of a batch have a loss and others none; call "
                "metric.backward for all of them, or metric.pull_back"
            )
        if len({each.held for each in passes}) > 1:
            raise LinearizationError(
                "some passes of a batch were made inside metric.frozen() and others "
                "outside; put all of them inside or none"
            )
        for tape in self._tapes:
            tape.require_intact()
        like = self._parameters.tensors()
        with torch.no_grad():
            return join_passes(passes, reduction, like)

    def _now(self) -> list[int]:
        return [declared.tensor._version for declared in self._parameters]

    def _require_same_point(self) -> None:
        pairs = zip(self._parameters, self._versions, strict=False)
        moved = [d.name for d, before in pairs if d.tensor._version != before]
        if moved:
            count = len(self._passes)
            self.clear()
            raise LinearizationError(
                f"{count} passes wait for others of their batch (accumulate=True), but "
                f"'{moved[0]}' has moved since; they are dropped. Leave accumulate out "
                "in the last backward of a batch, before optimizer.step()"
            )


def join_passes(
    passes: Sequence[Passed], reduction: Reduction, like: Mapping[str, Tensor]
) -> Passed:
    """Return the pass of all examples.

    Args:
        passes: in the order of their examples.
        reduction: how the loss sums over examples.
        like: the model's parameters by name, in their order.

    Returns:
        One pass, of its own memory. Cost: copies of the factors.

    Raises:
        ShapeError: the outputs are divided among the passes in different proportions.
    """
    weights = shares([each.size.terms for each in passes], reduction)
    told = [header_of(each.found, each.size) for each in passes]
    parts = _Here(passes, weights, told, like)
    found = join([header for header, _, _ in told], weights, parts, list(like))
    losses = [
        weight * each.loss.double()
        for each, weight in zip(passes, weights, strict=True)
        if each.loss is not None
    ]
    foreign: dict[Tensor, Tensor] = {}
    for each, weight in zip(passes, weights, strict=True):
        for tensor, gradient in each.found.foreign:
            before = foreign.get(tensor)
            own = weight * gradient
            foreign[tensor] = own if before is None else before + own
    found = replace(found, foreign=tuple(foreign.items()))
    first = passes[0].loss
    loss = None if first is None else torch.stack(losses).sum().to(first.dtype)
    terms = zip(*(each.size.terms for each in passes), strict=True)
    examples = sum(each.size.examples for each in passes)
    return Passed(found, loss, Size(examples, tuple(map(sum, terms))))


@final
class _Here(Members):
    """Passes of one process.

    Args:
        passes: the passes.
        weights: the share of each.
        told: their headers, factors and pieces.
        like: the model's parameters by name.
    """

    def __init__(
        self,
        passes: Sequence[Passed],
        weights: Sequence[float],
        told: Sequence[tuple[Header, Mapping[str, MetricFactor], Pieces]],
        like: Mapping[str, Tensor],
    ) -> None:
        self._found = [each.found for each in passes]
        self._weights = weights
        self._told = told
        self._like = like

    def factors(self, offers: Sequence[Offer]) -> dict[str, MetricFactor]:
        """Return the factors of all examples, weighted, by name."""
        plan, device = Plan(offers), next(iter(self._like.values())).device
        return plan.joined(
            [
                plan.packed(p, factors, pieces, device)
                for p, (_, factors, pieces) in enumerate(self._told)
            ]
        )

    def sums(self, names: Sequence[str], *, rest: bool) -> list[dict[str, Tensor]]:
        """Return the weighted sums of gradients, and of rests."""
        wanted = [own_sums(found, rest=rest) for found in self._found]
        return [
            {name: self._sum(name, which, wanted) for name in names}
            for which in range(len(wanted[0]))
        ]

    def _sum(
        self, name: str, which: int, wanted: Sequence[Sequence[Mapping[str, Tensor]]]
    ) -> Tensor:
        like = self._like[name]
        # Sums of numbers in half precision would lose what the shares are about.
        wide = torch.promote_types(like.dtype, torch.float32)
        total = torch.zeros_like(like, dtype=wide)
        for own, weight in zip(wanted, self._weights, strict=True):
            if name in own[which]:
                total.add_(own[which][name], alpha=weight)
        return total.to(like.dtype)

    def residual(self, offers: Sequence[Offer]) -> Tensor:
        """Return the residual of all examples, ``(total rank,)``, weighted."""
        like = next(iter(self._like.values()))
        parts = [
            own_residual(found, weight, like).view(offer.rows, offer.examples)
            for found, weight, offer in zip(
                self._found, self._weights, offers, strict=True
            )
        ]
        return cat_padded(parts, 1).reshape(-1)
