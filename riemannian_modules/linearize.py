r"""The recursion: from rows of the output metric to the factor of every parameter.

    L    = output.factor(outputs)                    rows of the output metric
    L, v = backward(L), backward(d loss/d outputs)   one batched reverse pass
    K    = rule(call, L)                             each parameter's factor

Implements :eq:`factor-recursion` and :eq:`parameter-factor`. The ordinary gradient is
assembled in the same way from the costate v, which is a factor with one row for each
example.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.errors import (
    LinearizationError,
    NotRecordedError,
    ShapeError,
)
from riemannian_modules.factors import MetricFactor, joined, summed
from riemannian_modules.heads import Rows
from riemannian_modules.layout import Layout
from riemannian_modules.reverse import rescaled, reverse_pass, unit_scaled
from riemannian_modules.rules import GENERIC, Call
from riemannian_modules.tape import Use, settings_of
from riemannian_modules.watch import Job, Watch

__all__ = [
    "Carried",
    "Graph",
    "Linearization",
    "UnexplainedError",
    "assemble",
    "carry",
    "linearize",
    "narrowed",
]

Carried = tuple[Tensor | None, ...]


class UnexplainedError(LinearizationError):
    """A module cannot explain some of its parameters; one above it may.

    Attributes:
        names: the parameters.
        reason: what is wrong.
    """

    def __init__(self, names: Sequence[str], reason: str) -> None:
        super().__init__(reason)
        self.names = list(names)
        self.reason = reason


@dataclass
class Graph:
    """What the first pass through a graph found out about it.

    Attributes:
        batched: whether the reverse pass can and should carry all cotangents at once.
        layouts: for each use, where the examples are in its outputs.
        memos: for each use and job, what the rule found out.
    """

    batched: bool
    layouts: list[tuple[Layout, ...]]
    memos: list[list[dict[str, Any]]]


@dataclass(frozen=True)
class Linearization:
    """A recorded pass, differentiated.

    Attributes:
        names: parameters that the outputs depend on.
        factors: ``{name: K}``; empty without an output metric.
        gradient: ``{name: d loss}``; empty without a loss.
        residual: y with ``d loss = K^T y + rest``, ``(rank,)``; None: no exact one.
        rest: ``{name: covector}``; None: zero.
        source: ``{name: factor}`` whose row sums are the rest; None with the rest.
        costates: ``{name: factor}`` whose row sums are the gradient; empty where the
            residual says it all.
        examples: how many rows in succession are of different examples; 1 if rows
            are of the whole batch.
    """

    names: list[str]
    factors: dict[str, MetricFactor]
    gradient: dict[str, Tensor]
    residual: Tensor | None
    rest: dict[str, Tensor] | None
    source: dict[str, MetricFactor] | None
    costates: dict[str, MetricFactor]
    examples: int = 1


def carry(
    uses: Sequence[Use],
    outputs: Sequence[Tensor],
    stacks: Sequence[Tensor],
    *,
    batched: bool | None,
    keep: bool = False,
) -> tuple[list[Carried], bool]:
    """Carry cotangents down to the outputs of every use.

    Args:
        uses: recorded calls.
        outputs: the model's outputs.
        stacks: cotangents at each output, ``(k, n, *output)``.
        batched: see :func:`riemannian_modules.reverse.reverse_pass`.
        keep: whether to keep the graph.

    Returns:
        For each use and each of its differentiable outputs ``(k, *shape)`` or None,
        and whether the pass was batched.

    Raises:
        NotRecordedError: the outputs do not come from the recorded pass, or there is
            neither an output metric nor a loss.
    """
    if not stacks:
        raise NotRecordedError(
            "there is nothing to pull back: the metric was built with output=None and "
            "no loss was given; use metric.backward(loss, outputs)"
        )
    edges = [edge for use in uses for edge in use.edges]
    active = [i for i, output in enumerate(outputs) if output.requires_grad]
    dtypes = {use.dtype for use in uses} | {output.dtype for output in outputs}
    back = None
    if torch.float16 in dtypes:
        # Its range is short; bfloat16 has that of float32.
        stacks, back = unit_scaled(stacks)
    flat, batched = reverse_pass(
        [outputs[i] for i in active],
        edges,
        [stacks[i].to(outputs[i].dtype) for i in active],
        batched=batched,
        keep=keep,
    )
    if back is not None:
        flat = [None if each is None else rescaled(each, back) for each in flat]
    if all(each is None for each in flat):
        raise NotRecordedError(
            "these outputs do not come from the recorded pass; call the model inside "
            "metric.record() and hand on what it returned"
        )
    pieces = iter(flat)
    return [tuple(next(pieces) for _ in use.edges) for use in uses], batched


def narrowed(carried: Carried, stop: int) -> Carried:
    """Return the first cotangents only."""
    return tuple(None if each is None else each[:stop] for each in carried)


def assemble(
    watch: Watch,
    uses: Sequence[Use],
    carried: Sequence[Carried],
    graph: Graph,
    examples: int,
) -> dict[str, MetricFactor]:
    """Return the factor of every parameter, one row for each cotangent and example.

    Args:
        watch: what explains which parameter.
        uses: recorded calls.
        carried: cotangents at their outputs.
        graph: layouts and memos of the uses.
        examples: number of examples.

    Returns:
        ``{parameter name: factor}``.

    Raises:
        UnexplainedError: a rule refuses a call.
        LinearizationError: a rule fails or returns what does not fit.
    """
    found: dict[str, list[MetricFactor]] = {}
    for index, (use, cotangents) in enumerate(zip(uses, carried, strict=True)):
        if all(each is None for each in cotangents):
            continue
        jobs: list[Job] = watch.jobs[use.name]
        while len(graph.memos) <= index:
            graph.memos.append([{} for _ in jobs])
        for job, memo in zip(jobs, graph.memos[index], strict=True):
            call = Call(
                use.module,
                use.args,
                use.kwargs,
                use.places,
                cotangents,
                graph.layouts[index],
                examples,
                job.wanted,
                use.label,
                use.values,
                memo,
                watch.name_of,
            )
            if not (use.plain or job.entry is GENERIC):
                reason = f"{use.label} ran another forward than that of its class"
                raise UnexplainedError(job.names, reason)
            if not use.own:
                reason = (
                    f"{use.label} was called with other tensors in the place of its "
                    "parameters (torch.func.functional_call)"
                )
                raise UnexplainedError(job.names, reason)
            if use.settings != settings_of(use.module):
                reason = (
                    f"{use.label} has other attributes now than when it was called; "
                    "call metric.backward before they change"
                )
                raise UnexplainedError(job.names, reason)
            for name, factor in _explained(job, call).items():
                found.setdefault(name, []).append(factor)
    return {name: joined(factors) for name, factors in found.items()}


def _explained(job: Job, call: Call) -> dict[str, MetricFactor]:
    """Return the factors that a rule makes of a call, by name in the model.

    Raises:
        UnexplainedError: the rule cannot explain this call.
        LinearizationError: the rule is wrong: it fails, or what it returns does not
            fit; names the layer and the parameters.
    """
    names = dict(zip(job.wanted, job.names, strict=True))

    try:
        factors: object = job.entry.rule(call)
    except (LinearizationError, RuntimeError, IndexError, ShapeError) as error:
        raise UnexplainedError(job.names, str(error)) from error
    except Exception as error:
        reason = f"raised {type(error).__name__}: {error}"
        raise LinearizationError(_wrong(job, call, reason)) from error
    if not isinstance(factors, Mapping):
        reason = f"returned a {type(factors).__name__}, not a mapping to factors"
        raise LinearizationError(_wrong(job, call, reason))
    missing = [name for path, name in names.items() if path not in factors]
    if missing:
        raise UnexplainedError(
            missing, f"the rule of {call.label} gives no factor for {missing}"
        )
    rows = next(len(each) for each in call.cotangents if each is not None)
    for path, name in names.items():
        factor, shape = factors[path], tuple(call.module.get_parameter(path).shape)
        if not isinstance(factor, MetricFactor):
            reason = (
                f"returned a {type(factor).__name__} for '{name}', not a MetricFactor "
                "such as riemannian_modules.factors.DenseFactor(rows)"
            )
            raise LinearizationError(_wrong(job, call, reason))
        if (factor.rank, tuple(factor.shape)) != (rows * call.examples, shape):
            reason = (
                f"returned a factor of rank {factor.rank} and shape "
                f"{tuple(factor.shape)} for '{name}', not of rank "
                f"{rows * call.examples} ({rows} cotangents for each of "
                f"{call.examples} examples) and shape {shape}"
            )
            raise LinearizationError(_wrong(job, call, reason))
    return {name: factors[path] for path, name in names.items()}


def _wrong(job: Job, call: Call, reason: str) -> str:
    title = ", ".join(f"'{name}'" for name in job.names)
    return (
        f"the rule of {call.label} ({type(call.module).__name__}), asked for factors "
        f"of {title}, {reason}; test it with riemannian_modules.testing.check_rule"
    )


def linearize(
    whole: Mapping[str, MetricFactor],
    rows: Rows,
    examples: int,
    *,
    carried: bool = True,
) -> Linearization:
    """Take rows, costate and rest apart.

    Args:
        whole: factors of all cotangents that were carried down.
        rows: what they were.
        examples: number of examples.
        carried: whether the costate is among the cotangents; where the first row
            leads it need not be, and there are no factors of costates then.

    Returns:
        The linearisation.
    """

    def part(start: int, stop: int) -> dict[str, MetricFactor]:
        ends = start * examples, stop * examples
        return {name: factor.narrow(*ends) for name, factor in whole.items()}

    r = rows.rank
    factors = part(0, r) if r else {}
    if rows.joint:
        factors = {name: summed(each, r) for name, each in factors.items()}
    gradient: dict[str, Tensor] = {}
    own: dict[str, MetricFactor] = {}
    source, covectors = None, None
    if not carried:
        assert rows.residual is not None
        y = rows.residual[:examples]
        gradient = {name: each.rmatvec(y) for name, each in part(0, 1).items()}
    elif rows.has_costate:
        own = part(r, r + 1)
        gradient = {name: factor.row_sum() for name, factor in own.items()}
        if rows.residual is None:
            source, covectors = own, gradient
        elif rows.has_rest:
            source = part(r + 1, r + 2)
            covectors = {name: factor.row_sum() for name, factor in source.items()}
    count = 1 if rows.joint else examples
    return Linearization(
        list(whole), factors, gradient, rows.residual, covectors, source, own, count
    )
