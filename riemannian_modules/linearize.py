r"""The recursion: from rows of the output metric to the factor of every parameter.

    L    = output.factor(outputs)                    rows of the output metric
    L, v = backward(L), backward(d loss/d outputs)   one batched reverse pass
    K    = rule(call, L)                             each parameter's factor

Implements :eq:`factor-recursion` and :eq:`parameter-factor`. The ordinary gradient is
assembled in the same way from the costate v, which is a factor with one row for each
example.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.carry import Carried
from riemannian_modules.deferred import Deferred
from riemannian_modules.factors import MetricFactor, joined, summed, under_each_other
from riemannian_modules.heads import Rows
from riemannian_modules.layout import Layout
from riemannian_modules.linearization import Linearization
from riemannian_modules.place import Place
from riemannian_modules.reverse import FEW, joint
from riemannian_modules.rules import GENERIC, SHARED, Call, Inside
from riemannian_modules.rules.job import Job, UnexplainedError, explained
from riemannian_modules.tape import Use
from riemannian_modules.watch import Watch

__all__ = [
    "Assembled",
    "Graph",
    "assemble",
    "taken_apart",
]

_SMALL = 1 << 16


@dataclass
class Graph:
    """What the first pass through a graph found out about it.

    Attributes:
        batched: whether the reverse pass can and should carry all cotangents at once.
        alone: whether the costate travels alone, from the loss on.
        verified: how many later passes have found the same.
        foreign: the parameters in it that are not the model's.
        due: whether to look in the next pass where its examples are.
        unreached: parameters of the layers in it that it does not lead to.
        layouts: for each use, where the examples are in its outputs.
        memos: for each use and job, what the rule found out.
    """

    batched: bool
    layouts: list[tuple[Layout, ...]]
    memos: list[list[dict[str, Any]]]
    alone: bool = False
    verified: int = 0
    foreign: Sequence[Tensor] = ()
    unreached: Collection[str] = ()
    due: bool = True


@dataclass(frozen=True)
class Assembled:
    """The factors of all cotangents that were carried down.

    Attributes:
        examples: number n of examples.
        uses: for each parameter and each use of it the factor of all cotangents, or
            those of one pass after the other.
    """

    examples: int
    uses: dict[str, list[list[MetricFactor]]]

    def part(self, start: int, stop: int) -> dict[str, MetricFactor]:
        """Return each parameter's factor of the cotangents ``start:stop``."""
        rows = start * self.examples, stop * self.examples
        known: dict[tuple[int, ...], Tensor] = {}
        return {
            name: joined([_rows(factors, *rows, known) for factors in uses])
            for name, uses in self.uses.items()
        }


def _rows(
    factors: Sequence[MetricFactor],
    start: int,
    stop: int,
    known: dict[tuple[int, ...], Tensor],
) -> MetricFactor:
    """Return rows ``start:stop`` of factors one after the other."""
    chosen, before = [], 0
    for factor in factors:
        low, high = max(start - before, 0), min(stop - before, factor.rank)
        if low < high:
            whole = (low, high) == (0, factor.rank)
            chosen.append(factor if whole else factor.narrow(low, high))
        before += factor.rank
    return chosen[0] if len(chosen) == 1 else under_each_other(chosen, known)


def assemble(
    watch: Watch,
    uses: Sequence[Use],
    passes: Sequence[Sequence[Carried]],
    graph: Graph,
    examples: int,
) -> Assembled:
    """Return the factor of every parameter, one row for each cotangent and example.

    Args:
        watch: what explains which parameter.
        uses: recorded calls.
        passes: what each reverse pass carried down to their outputs.
        graph: layouts and memos of the uses.
        examples: number of examples.

    Returns:
        The factors.

    Raises:
        UnexplainedError: a rule refuses a call.
        LinearizationError: a rule fails or returns what does not fit.
    """
    found: dict[str, list[list[MetricFactor]]] = {}
    for index, use in enumerate(uses):
        own = [carried[index] for carried in passes]
        if all(each is None for cotangents in own for each in cotangents):
            continue
        if len(own) > 1:
            own = _filled(own)
        together: list[Carried] | None = None
        jobs: list[Job] = watch.jobs[use.name]
        while len(graph.memos) <= index:
            graph.memos.append([{} for _ in jobs])
        for whole, memo in zip(jobs, graph.memos[index], strict=True):
            # A rule, or a replay, may not know what this pass left out.
            job = whole.without(graph.unreached)
            if not job.wanted:
                continue
            _require_explicable(use, job)
            pieces = own
            few = len(own) <= FEW or _large(own[0])
            if len(own) > 1 and not (job.entry.apart and few):
                together = together or [tuple(joint(own))]
                pieces = together
            count, layouts = len(use.places), graph.layouts[index]
            for cotangents in pieces:
                call = Call(
                    use.module,
                    use.args,
                    use.kwargs,
                    use.places,
                    cotangents[:count],
                    layouts[:count],
                    examples,
                    job.wanted,
                    use.label,
                    use.values,
                    memo,
                    watch.name_of,
                    tuple(
                        map(_inside, use.inside, cotangents[count:], layouts[count:])
                    ),
                )
                for name, factor in explained(job, call).items():
                    known = found.setdefault(name, [])
                    if cotangents is pieces[0]:
                        known.append([factor])
                    else:
                        known[-1].append(factor)
    return Assembled(examples, found)


def _inside(place: Place, cotangent: Tensor | None, layout: Layout) -> Inside:
    return Inside(place.input, cotangent, layout, place.shape, place.note)


def _large(cotangents: Carried) -> bool:
    """Whether putting cotangents together takes longer than asking a rule again."""
    return any(each is not None and each.numel() > _SMALL for each in cotangents)


def _filled(passes: Sequence[Carried]) -> list[Carried]:
    """Put zeros where one pass comes to an output and another does not."""
    like = [
        next((each for each in own if each is not None), None)
        for own in zip(*passes, strict=True)
    ]
    return [
        tuple(
            torch.zeros_like(some[:1]) if each is None and some is not None else each
            for each, some in zip(cotangents, like, strict=True)
        )
        for cotangents in passes
    ]


def _require_explicable(use: Use, job: Job) -> None:
    """Check that a call ran as the rule knows it.

    Raises:
        UnexplainedError: it did not.
    """
    if not (use.plain or job.entry in (GENERIC, SHARED)):
        reason = f"{use.label} ran another forward than that of its class"
        raise UnexplainedError(job.names, reason)
    if not use.own:
        reason = (
            f"{use.label} was called with other tensors in the place of its "
            "parameters (torch.func.functional_call)"
        )
        raise UnexplainedError(job.names, reason)
    if not use.keeps_settings():
        reason = (
            f"{use.label} has other attributes now than when it was called; "
            "call metric.backward before they change"
        )
        raise UnexplainedError(job.names, reason)


def taken_apart(whole: Assembled, rows: Rows) -> Linearization:
    """Take rows, costate and rest apart.

    Args:
        whole: factors of all cotangents that were carried down; of the rows at least
            where these are led.
        rows: what they were.

    Returns:
        The linearisation.
    """
    r = rows.rank
    factors = whole.part(0, r) if r else {}
    if rows.joint:
        factors = {name: summed(each, r) for name, each in factors.items()}
    gradient: Mapping[str, Tensor] = {}
    own: dict[str, MetricFactor] = {}
    source: dict[str, MetricFactor] | None = None
    covectors: Mapping[str, Tensor] | None = None
    if rows.led:
        assert rows.residual is not None
        first = whole.part(0, 1) if r > 1 else factors
        y = rows.residual[: whole.examples]
        gradient = Deferred(first, lambda factor: factor.rmatvec(y))
    elif rows.has_costate:
        own = whole.part(r, r + 1)
        gradient = Deferred(own, lambda factor: factor.row_sum())
        if rows.residual is None:
            source, covectors = own, gradient
        elif rows.has_rest:
            source = whole.part(r + 1, r + 2)
            covectors = Deferred(source, lambda factor: factor.row_sum())
    names, count = list(whole.uses), 1 if rows.joint else whole.examples
    return Linearization(
        names, factors, gradient, rows.residual, covectors, source, own, count
    )
