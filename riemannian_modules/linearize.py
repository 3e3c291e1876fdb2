r"""The recursion: from rows of the output metric to the factor of every parameter.

    L    = output.factor(outputs)                    rows of the output metric
    L, v = backward(L), backward(d loss/d outputs)   one batched reverse pass
    K    = rule(layer).factors(inputs, L)            each parameter's factor

Implements :eq:`factor-init`, :eq:`factor-recursion` and :eq:`parameter-factor`. The
ordinary gradient is assembled in the same way from the costate v, which is a factor
with one row for each example.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import LinearizationError, NotRecordedError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.output import OutputMetric
from riemannian_modules.reverse import reverse_pass
from riemannian_modules.rules import rule_of
from riemannian_modules.tape import Tape, Use

__all__ = ["Linearization", "Reduction", "linearize"]

Reduction = Literal["mean", "sum"]
Reached = list[tuple[Use, Tensor]]


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
        costates: ``{name: factor}`` whose row sums are the gradient.
        batched: whether the reverse pass could carry all cotangents at once.
    """

    names: list[str]
    factors: dict[str, MetricFactor]
    gradient: dict[str, Tensor]
    residual: Tensor | None
    rest: dict[str, Tensor] | None
    source: dict[str, MetricFactor] | None
    costates: dict[str, MetricFactor]
    batched: bool


def linearize(
    tape: Tape,
    outputs: Tensor,
    costate: Tensor | None,
    *,
    output: OutputMetric | None,
    reduction: Reduction,
    parameters: DeclaredParameters,
    batched: bool | None,
) -> Linearization:
    """Carry the rows of L and the costate down and make factors of them.

    Args:
        tape: the recorded pass.
        outputs: its outputs, ``(n, *output)``.
        costate: d loss/d outputs, or None without a loss.
        output: the output metric, or None for no factor.
        reduction: how the loss sums over examples.
        parameters: the model's parameters.
        batched: see :func:`riemannian_modules.reverse.reverse_pass`.

    Returns:
        The linearisation. Cost: one reverse pass to layer outputs with a cotangent
        for each output row, one for the costate and at most one for the rest.

    Raises:
        NotRecordedError: the outputs do not come from the recorded pass, or there is
            neither an output metric nor a loss.
        LinearizationError: examples of the batch interact (looked at in the first pass
            through a graph).
    """
    rows, residual, rest = _output_rows(output, reduction, outputs, costate)
    r = 0 if rows is None else len(rows)
    stack = [] if rows is None else [rows]
    stack += [c.unsqueeze(0) for c in (costate, rest) if c is not None]
    probing = batched is None and len(outputs) > 1
    if not stack:
        raise NotRecordedError(
            "there is nothing to pull back: the metric was built with output=None and "
            "no loss was given; use metric.backward(loss, outputs)"
        )
    if probing:
        stack.append(_half_of_the_batch(outputs))
    carried, batched = reverse_pass(
        outputs,
        [use.edge for use in tape.uses],
        torch.cat([cotangents.to(outputs.dtype) for cotangents in stack]),
        batched=batched,
    )
    reached = [(u, c) for u, c in zip(tape.uses, carried, strict=True) if c is not None]
    if not reached:
        raise NotRecordedError(
            "these outputs do not come from the recorded pass; call the model inside "
            "metric.record() and hand on what it returned"
        )
    if probing:
        _require_separate(reached, len(outputs) // 2)
    whole = _assemble(reached, parameters)
    n = len(outputs)

    def rows_of(start: int, stop: int) -> dict[str, MetricFactor]:
        return {m: f.narrow(start * n, stop * n) for m, f in whole.items()}

    factors = rows_of(0, r) if r else {}
    gradient, own, source, covectors = {}, {}, None, None
    if costate is not None:
        own = rows_of(r, r + 1)
        gradient = {name: factor.row_sum() for name, factor in own.items()}
        if residual is None:
            source, covectors = own, gradient
        elif rest is not None:
            source = rows_of(r + 1, r + 2)
            covectors = {name: factor.row_sum() for name, factor in source.items()}
    names = list(own or factors)
    return Linearization(
        names, factors, gradient, residual, covectors, source, own, batched
    )


def _half_of_the_batch(outputs: Tensor) -> Tensor:
    """Return one cotangent that is zero on the second half of the examples."""
    size = outputs.numel()
    pattern = torch.linspace(
        1.0, 2.0, size, dtype=outputs.dtype, device=outputs.device
    ).view_as(outputs)
    pattern[len(outputs) // 2 :] = 0.0
    return pattern.unsqueeze(0)


def _require_separate(reached: Reached, half: int) -> None:
    # A gradient is a sum over examples and does not notice rows that end up in
    # another example, so this is a check of its own.
    for use, carried in reached:
        leaked = carried[-1, half:]
        # A value that is not finite is another error, found with the gradient.
        touched = (leaked != 0) & torch.isfinite(leaked)
        if not leaked.is_meta and bool(touched.any()):
            raise LinearizationError(
                f"at {use.label} the examples of the batch interact, or its first "
                f"dimension is not the examples (input {tuple(use.input.shape)}): a "
                "cotangent of one half of the outputs arrives at the other half. Keep "
                "the examples apart and in the first dimension of every layer"
            )


def _output_rows(
    output: OutputMetric | None,
    reduction: Reduction,
    outputs: Tensor,
    costate: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return rows of L ``(r, n, *output)``, residual y ``(r n,)`` and the rest."""
    if output is None:
        return None, None, None
    output.validate(outputs)
    weight = 1.0 / output.terms(outputs) if reduction == "mean" else 1.0
    # Never below float32: under autocast the outputs may be in half precision.
    dtype = torch.promote_types(outputs.dtype, torch.float32)
    outputs = outputs.detach().to(dtype)
    rows = output.factor(outputs).movedim(1, 0) * weight**0.5
    if costate is None:
        return rows, None, None
    y, rest = output.whiten(outputs, costate.to(dtype))
    if y is None:
        return rows, None, None
    residual = y.mT.reshape(-1) / weight**0.5
    # Reading the remainder is free on the CPU only; elsewhere it travels along.
    spans = rest.device.type == "cpu" and not bool(rest.any())
    return rows, residual, None if spans else rest


def _assemble(
    reached: Reached, parameters: DeclaredParameters
) -> dict[str, MetricFactor]:
    """Return the factor of every parameter, one row for each cotangent and example."""
    calls: dict[int, Reached] = {}
    for use, carried in reached:
        calls.setdefault(id(use.module), []).append((use, carried))
    factors: dict[str, MetricFactor] = {}
    for uses in calls.values():
        module = uses[0][0].module
        found = rule_of(module).factors(
            module, [use.input for use, _ in uses], [c for _, c in uses]
        )
        for attribute, factor in found.items():
            name = parameters.name_of(getattr(module, attribute))
            if name is not None:
                known = factors.get(name)
                factors[name] = factor if known is None else known + factor
    return factors
