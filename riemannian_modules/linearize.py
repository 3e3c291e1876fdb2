r"""The recursion: from rows of the output metric to the factor of every parameter.

    L    = output.factor(outputs)                    rows of the output metric
    L, v = backward(L), backward(d loss/d outputs)   one batched reverse pass
    K    = rule(call, L)                             each parameter's factor

Implements :eq:`factor-recursion` and :eq:`parameter-factor`. The ordinary gradient is
assembled in the same way from the costate v, which is a factor with one row for each
example.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.carry import Carried
from riemannian_modules.deferred import Deferred
from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import MetricFactor, joined, summed, under_each_other
from riemannian_modules.heads import Rows
from riemannian_modules.layout import Layout
from riemannian_modules.linearization import Linearization
from riemannian_modules.place import Place
from riemannian_modules.reverse import FEW, joint
from riemannian_modules.rules import GENERIC, SHARED, Call, Entry, Inside
from riemannian_modules.rules.job import Job, UnexplainedError, explained
from riemannian_modules.tape import Use
from riemannian_modules.watch import Watch

__all__ = [
    "Assembled",
    "Graph",
    "Rounds",
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


Question = tuple[Use, Entry, tuple[str, ...], tuple[int, ...]]
Answers = tuple[dict[str, Any], list[dict[str, MetricFactor]]]


def asked(use: Use, job: Job) -> Question:
    """Return what tells one question to a rule from another, in one first pass."""
    return use, job.entry, job.names, use.sought


@dataclass
class Rounds:
    """What is kept while parameters are handed up, round after round.

    Attributes:
        made: for each question the memo and the factors of an earlier round.
        failed: what the last round could not explain, the first reason first.
    """

    made: dict[Question, Answers] = field(default_factory=dict)
    failed: list[UnexplainedError] = field(default_factory=list)

    def begin(self, watch: Watch, uses: Sequence[Use]) -> None:
        """Forget what failed, and what is no longer asked.

        Args:
            watch: what explains which parameter now.
            uses: the calls that do.
        """
        self.failed = []
        now = {asked(use, job) for use in uses for job in watch.jobs[use.name]}
        self.made = {key: made for key, made in self.made.items() if key in now}


def assemble(
    watch: Watch,
    uses: Sequence[Use],
    passes: Sequence[Sequence[Carried]],
    graph: Graph,
    n: int,
    rounds: Rounds | None = None,
) -> Assembled:
    """Return the factor of every parameter, one row for each cotangent and example.

    Args:
        watch: what explains which parameter.
        uses: recorded calls.
        passes: what each reverse pass carried down to their outputs.
        graph: layouts and memos of the uses.
        n: number of examples.
        rounds: what earlier rounds made, which is not made again, and where to put
            what fails in this one; without it the first that fails is raised.

    Returns:
        The factors; where something failed, not all of them.

    Raises:
        UnexplainedError: a rule refuses a call, and there is nowhere to put that.
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
            skipped = uses[len(graph.memos)].name
            graph.memos.append([{} for _ in watch.jobs[skipped]])
        memos = graph.memos[index]
        for number, whole in enumerate(jobs):
            # A rule, or a replay, may not know what this pass left out.
            job = whole.without(graph.unreached)
            if not job.wanted:
                continue
            before = None if rounds is None else rounds.made.get(asked(use, job))
            if before is not None:
                memos[number], answers = before
            else:
                pieces = own
                few = len(own) <= FEW or _large(own[0])
                if len(own) > 1 and not (job.entry.apart and few):
                    together = together or [tuple(joint(own))]
                    pieces = together
                try:
                    _require_explicable(use, job)
                    answers = [
                        explained(
                            job, _call(watch, use, job, piece, graph, index, number, n)
                        )
                        for piece in pieces
                    ]
                except UnexplainedError as error:
                    if rounds is None:
                        raise
                    rounds.failed.append(error)
                    continue
                except LinearizationError:
                    # What failed before it comes first.
                    if rounds is None or not rounds.failed:
                        raise
                    return Assembled(n, found)
                if rounds is not None:
                    rounds.made[asked(use, job)] = memos[number], answers
            for name in answers[0]:
                factors = [answer[name] for answer in answers]
                found.setdefault(name, []).append(factors)
    return Assembled(n, found)


def _call(
    watch: Watch,
    use: Use,
    job: Job,
    cotangents: Carried,
    graph: Graph,
    index: int,
    number: int,
    n: int,
) -> Call:
    """Return what a rule is asked about a use, the ``index``-th of all."""
    count, layouts = len(use.places), graph.layouts[index]
    return Call(
        use.module,
        use.args,
        use.kwargs,
        use.places,
        cotangents[:count],
        layouts[:count],
        n,
        job.wanted,
        use.label,
        use.values,
        graph.memos[index][number],
        watch.name_of,
        tuple(map(_inside, use.inside, cotangents[count:], layouts[count:])),
    )


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
