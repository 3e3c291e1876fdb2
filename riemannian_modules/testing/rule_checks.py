"""The laws of a rule: a layer's factors are the rows of its dense Jacobian.

The layer is put into the small models of
:mod:`riemannian_modules.testing.rule_probe`.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import RiemannianModulesError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.manifolds import PoincareBall, Sphere, Stiefel
from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.nested import tensors_in
from riemannian_modules.output import Euclidean
from riemannian_modules.rules import GENERIC, entry_of
from riemannian_modules.tangent import TangentSpace
from riemannian_modules.testing.factor_checks import factor_laws
from riemannian_modules.testing.guarded import guarded, worst
from riemannian_modules.testing.metric_probe import MetricProbe, relative_gap
from riemannian_modules.testing.module_case import factors_of, largest_gap
from riemannian_modules.testing.reference import dense_sharp
from riemannian_modules.testing.result import CheckResult
from riemannian_modules.testing.rule_probe import (
    WIDTH,
    Around,
    RuleCase,
    Select,
    dense_rows,
)

__all__ = ["check_rule"]

_MASS = 0.1


def _metric(model: Around) -> LayerwiseMetric:
    # One block, as the dense solution is one of all parameters.
    return LayerwiseMetric(
        model, Euclidean(), mass=_MASS, reduction="sum", blocks="model"
    )


_MESSAGES = {
    "factor": "the rows of K are those of L times the Jacobian",
    "shared": "a layer that is used twice has the sum of both factors",
    "folded": "two rows of the layer's batch that make one example add up",
}


def _rows(case: RuleCase, kind: str) -> Iterator[CheckResult]:
    message = _MESSAGES[kind]
    model = case.model(kind)
    wanted = dense_rows(model)
    metric = _metric(model)
    try:
        with metric.record():
            z = model()
        metric.pull_back(z)
    except RiemannianModulesError as error:
        yield CheckResult(kind, False, math.inf, case.exact, f"{message}: {error}")
        return
    case.found[kind] = metric
    found = {name: each.to_dense() for name, each in factors_of(metric).items()}
    yield CheckResult.at_most(kind, largest_gap(found, wanted), case.exact, message)


def _explained(case: RuleCase) -> CheckResult:
    entry = entry_of(case.layer)
    jobs = case.found["factor"]._recorder.watch.jobs if case.found else {}
    own = entry is not None and all(
        job.entry is not GENERIC for each in jobs.values() for job in each
    )
    return CheckResult(
        "explained", own, float(not own), 0.0, "the layer's own rule gives its factors"
    )


def _gradient(case: RuleCase) -> Iterator[CheckResult]:
    message = "the assembled gradient is autograd's, and the solution the dense one"
    model = case.model("factor")
    metric = _metric(model)
    tensors = {n: p for n, p in model.named_parameters() if p.requires_grad}
    z = model()
    target = case.draw(*z.shape).to(z)
    loss = 0.5 * (z - target).square().sum()
    expected = torch.autograd.grad(
        loss, list(tensors.values()), allow_unused=True, materialize_grads=True
    )
    gradient = dict(zip(tensors, expected, strict=True))
    try:
        with metric.record():
            z = model()
        metric.backward(0.5 * (z - target).square().sum(), z)
    except RiemannianModulesError as error:
        yield CheckResult(
            "gradient", False, math.inf, case.exact, f"{message}: {error}"
        )
        return
    own = {n: p.grad for n, p in tensors.items() if p.grad is not None}
    gap = largest_gap(own, gradient)
    yield CheckResult.at_most("gradient", gap, case.exact, message)
    wide = model.wide()
    spaces = {d.name: d.space() for d in DeclaredParameters(wide, _MASS)}
    covector = {name: value.double() for name, value in gradient.items()}
    solution = dense_sharp(spaces, dense_rows(model), covector)
    amp = max(
        1.0 + (float(values[0]) if len(values) else 0.0)
        for values in (block.gram_spectrum() for block in metric.blocks.values())
    )
    yield CheckResult.at_most(
        "natural_gradient",
        largest_gap(metric.natural_gradient(), solution),
        case.exact + 50.0 * case.eps * amp,
        "the Riemannian gradient is the dense one",
    )


def _products(case: RuleCase) -> Iterator[CheckResult]:
    for kind, metric in case.found.items():
        for block in metric.blocks.values():
            for law in factor_laws(MetricProbe(block, case.generator)):
                yield replace(law, message=f"{_MESSAGES[kind]}: {law.message}")
    for name, factor in factors_of(case.found["factor"]).items():
        yield from _parts(case, name, factor)
        yield from _curved(case, name, factor)


def _parts(case: RuleCase, name: str, factor: MetricFactor) -> Iterator[CheckResult]:
    K, n = factor.to_dense(), factor.rank // WIDTH
    size = float(K.norm())
    pieces = [factor.narrow(j * n, (j + 1) * n) for j in range(WIDTH)]
    yield CheckResult.at_most(
        "narrow",
        relative_gap(torch.cat([piece.to_dense() for piece in pieces]), K, size),
        case.exact,
        f"{name}: narrow(i, j) has the rows i to j",
    )
    yield CheckResult.at_most(
        "double",
        relative_gap(factor.double().to_dense(), K, size)
        if factor.double().dtype == torch.float64
        else math.inf,
        case.exact,
        f"{name}: double() is the same in float64",
    )
    short = [
        float(piece.to_dense().norm(dim=1).sum() - piece.magnitude())
        for piece in pieces
    ]
    yield CheckResult.at_most(
        "magnitude",
        worst(short) / max(size, 1e-30),
        case.exact,
        f"{name}: magnitude() bounds the sum of the rows' norms",
    )


def _curved(case: RuleCase, name: str, factor: MetricFactor) -> Iterator[CheckResult]:
    shape, dtype = factor.shape, factor.dtype
    if not shape or shape[-1] < 2:
        return
    bases = [Sphere(), PoincareBall()] + [Stiefel()] * (len(shape) >= 2)
    for base in bases:
        point = base.projx(case.draw(*shape))
        if isinstance(base, PoincareBall):
            point = 0.5 * point / point.norm(dim=-1, keepdim=True).clamp_min(1.0)
        space = TangentSpace(base, point.to(dtype), name=name)
        metric = LayerMetric([Part(name, space, factor)])
        for law in factor_laws(MetricProbe(metric, case.generator)):
            if law.name == "gram":
                yield replace(
                    law, name="curved_gram", message=f"{law.message} on {base.name}"
                )


def _states(case: RuleCase) -> list[Tensor]:
    states = [*case.layer.state_dict().values(), *case.inputs]
    return [each.detach().clone() for each in states]


def _laws(case: RuleCase) -> Iterator[CheckResult]:
    before = _states(case)
    yield from guarded("the factors", lambda: _rows(case, "factor"))
    if "factor" in case.found:
        yield _explained(case)
        yield from guarded("two uses", lambda: _rows(case, "shared"))
        n = case.inputs[0].shape[case.dim]
        if n % 2 == 0 and n > 2:
            yield from guarded("folded examples", lambda: _rows(case, "folded"))
        yield from guarded("the gradient", lambda: _gradient(case))
        yield from guarded("the products", lambda: _products(case))
    same = all(map(torch.equal, before, _states(case)))
    yield CheckResult(
        "unchanged", same, float(not same), 0.0, "parameters, buffers, inputs stay"
    )


def check_rule(
    layer: nn.Module,
    *inputs: Tensor,
    options: Mapping[str, Any] | None = None,
    dim: int = 0,
    select: Select | None = None,
    generator: torch.Generator | None = None,
) -> list[CheckResult]:
    """Measure whether a layer's rule gives the rows of its Jacobian, in every use.

    The findings are named ``factor``, ``explained``, ``shared`` (the layer used twice),
    ``folded`` (two rows of the batch are one example); ``gradient``,
    ``natural_gradient``; ``matvec``, ``rmatvec``, ``row_sum``, ``rows``, ``gram``,
    ``block_gram``, ``narrow``, ``double``, ``magnitude``, ``curved_gram`` (on spheres,
    balls and orthonormal rows, where the shape allows it); ``unchanged``. If there are
    no factors, ``factor`` fails and says why; ``raised`` says what else was raised.

    Args:
        layer: the layer, with small parameters: the cost is O(p^3) for p of them. It
            is deterministic, and its examples do not interact.
        *inputs: its arguments, tensors with the examples in ``dim``; at least 4
            examples in an even number test everything.
        options: keyword arguments without examples.
        dim: the dimension of the examples.
        select: returns a tensor with the examples first from what the layer returns;
            None: the first one of floating point, with ``dim`` moved to the front.
        generator: source of the random numbers, on the CPU.

    Returns:
        The findings.

    >>> layer = torch.nn.Conv1d(2, 3, 2, dtype=torch.float64)
    >>> x = torch.linspace(-1.0, 1.0, 32, dtype=torch.float64).sin().view(4, 2, 4)
    >>> all(result.passed for result in check_rule(layer, x))
    True
    """

    def first(returned: Any) -> Tensor:
        floating = (t for t in tensors_in(returned) if t.is_floating_point())
        return next(floating).movedim(dim, 0)

    case = RuleCase(layer, inputs, options or {}, dim, select or first, generator)
    return list(_laws(case))
