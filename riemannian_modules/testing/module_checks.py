"""The laws of a model and its rules: factors, gradients, batches, the whole gradient.

Tolerances, for the rounding unit eps: 200 eps times the number of recorded layers for
what a reverse pass computes, relative to the size of what is compared; 50 eps amp with
``amp = 1 + |M| / mu`` for the Riemannian gradient.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from riemannian_modules.declared import Blocks
from riemannian_modules.errors import LinearizationError
from riemannian_modules.functional.binding import Binding
from riemannian_modules.heads import Reduction
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.output import OutputMetric
from riemannian_modules.testing.guarded import guarded, worst
from riemannian_modules.testing.module_case import (
    Loss,
    Masses,
    ModuleCase,
    factors_of,
    floor_of,
    largest_gap,
)
from riemannian_modules.testing.reference import dense_factor, dense_natural_gradient
from riemannian_modules.testing.result import CheckResult

__all__ = ["check_module"]


def _gradients(case: ModuleCase) -> Iterator[CheckResult]:
    names = list(case.trainable)
    outputs = case.model(case.x)
    loss = case.loss(outputs)
    tensors = list(case.trainable.values())
    (v,) = torch.autograd.grad(loss, outputs, retain_graph=True)
    expected = dict(
        zip(names, torch.autograd.grad(loss, tensors, retain_graph=True), strict=True)
    )
    message = "the assembled gradient is autograd's"
    try:
        metric, z = case.linearised
    except LinearizationError as error:
        yield CheckResult(
            "gradient", False, math.inf, case.exact, f"{message}: {error}"
        )
        return
    own = {n: p.grad for n, p in case.trainable.items() if p.grad is not None}
    yield CheckResult.at_most(
        "gradient", largest_gap(own, expected), case.exact, message
    )
    y, rest = case.output.whiten(z, v)
    if y is None:
        return
    terms = case.output.terms(z) if case.reduction == "mean" else 1
    residual = y.mT.reshape(-1) * math.sqrt(terms)
    others = torch.autograd.grad(outputs, tensors, rest)
    factors = factors_of(metric)
    total = {
        name: factors[name].rmatvec(residual) + other
        for name, other in zip(names, others, strict=True)
        if name in factors
    }
    yield CheckResult.at_most(
        "residual",
        largest_gap(total, expected),
        case.exact,
        "K^T y + rest is the gradient",
    )


def _recursion(case: ModuleCase) -> Iterator[CheckResult]:
    metric, z = case.linearised
    factors = factors_of(metric)
    dense = dense_factor(case.model, case.output, case.x, case.reduction)
    dense = {name: dense[name] for name in case.trainable}
    found = {name: factor.to_dense() for name, factor in factors.items()}
    same = all(found[n].shape == K.shape for n, K in dense.items() if n in found)
    yield CheckResult.at_most(
        "factor",
        largest_gap(found, dense) if same else math.inf,
        case.exact,
        "the rows of K are those of L times the Jacobian",
    )
    if not same or set(found) != set(dense):
        return
    tangents = {n: case.draw(p) for n, p in case.trainable.items()}
    frozen = {
        n: p.detach().as_subclass(Tensor) for n, p in case.model.named_parameters()
    }
    still = {n: tangents.get(n, torch.zeros_like(p)) for n, p in frozen.items()}

    binding = Binding(case.model)

    def forward(values: dict[str, Tensor]) -> Tensor:
        outputs: Tensor = binding.call(values, case.x)
        return outputs

    velocity = torch.func.jvp(forward, (frozen,), (still,))[1]
    weight = case.output.terms(z) if case.reduction == "mean" else 1
    rows = case.output.factor(z) / math.sqrt(weight)
    pushed = (rows * velocity.unsqueeze(1)).flatten(2).sum(-1).mT.reshape(-1)
    a = case.draw(pushed)
    pulled = sum(float((factors[n].rmatvec(a) * t).sum()) for n, t in tangents.items())
    size = sum(
        float(factors[n].rmatvec(a).norm() * t.norm()) for n, t in tangents.items()
    )
    yield CheckResult.at_most(
        "adjoint",
        abs(float(pushed @ a) - pulled) / (size + float(pushed.norm() * a.norm())),
        case.exact,
        "<a, L A v> = <K^T a, v>",
    )


def _batches(case: ModuleCase) -> Iterator[CheckResult]:
    n = len(case.x)
    whole = factors_of(case.pulled_back(case.x, "sum"))
    singles = [
        factors_of(case.pulled_back(each.unsqueeze(0), "sum")) for each in case.x
    ]
    stacked = {
        # The example is the fast index of the rows.
        name: torch.stack([each[name].to_dense() for each in singles], 1).flatten(0, 1)
        for name in whole
    }
    rows = {name: factor.to_dense() for name, factor in whole.items()}
    yield CheckResult.at_most(
        "per_example",
        largest_gap(rows, stacked),
        case.exact,
        "a batch has the rows of its examples",
    )
    if case.reduction == "mean":
        once = case.pulled_back(case.x)
        twice = case.pulled_back(torch.cat([case.x, case.x]))
        yield CheckResult.at_most(
            "duplication",
            worst(_metric_gap(case, once, twice, name) for name in once.blocks),
            2.0 * case.solved,
            f"a batch of {n} given twice has the same metric",
        )


def _metric_gap(
    case: ModuleCase, one: LayerwiseMetric, other: LayerwiseMetric, block: str
) -> float:
    u = {p.name: case.draw(p.space.point) for p in one.blocks[block].parts}
    u = {p.name: p.space.project(u[p.name]) for p in one.blocks[block].parts}
    wanted = float(one.blocks[block].inner(u, u))
    return abs(float(other.blocks[block].inner(u, u)) - wanted) / wanted


def _solution(case: ModuleCase) -> Iterator[CheckResult]:
    metric, _ = case.linearised
    expected = dense_natural_gradient(
        case.model,
        case.output,
        case.x,
        case.loss,
        mass=case.mass,
        blocks=case.blocks,
        reduction=case.reduction,
    )
    gradient = {n: p.grad for n, p in case.trainable.items() if p.grad is not None}
    # What the reverse pass rounds away of a gradient comes back divided by the mass.
    floor = floor_of(gradient)
    floors = {n: floor * float(v[-1]) for n, v in case.sharp_values.items()}
    yield CheckResult.at_most(
        "natural_gradient",
        largest_gap(metric.natural_gradient(), expected, floors),
        case.solved,
        "the Riemannian gradient is the dense one",
    )
    general = {
        n: x
        for solution in metric.solve(gradient, gradient=0.0).values()
        for n, x in solution.vectors.items()
    }
    yield CheckResult.at_most(
        "covector",
        largest_gap(general, expected, floors),
        case.solved,
        "solving for the bare gradient gives the same",
    )


def _states(case: ModuleCase) -> dict[str, Tensor]:
    state = {n: t.detach().clone() for n, t in case.model.state_dict().items()}
    return {**state, "x": case.x.detach().clone()}


def _laws(case: ModuleCase) -> Iterator[CheckResult]:
    before = _states(case)
    yield from guarded("the gradient", lambda: _gradients(case))
    if "linearised" in case.__dict__:
        yield from guarded("the recursion", lambda: _recursion(case))
        yield from guarded("batches", lambda: _batches(case))
        yield from guarded("the solution", lambda: _solution(case))
    after = _states(case)
    same = all(torch.equal(value, after[name]) for name, value in before.items())
    yield CheckResult(
        "unchanged", same, float(not same), 0.0, "parameters, buffers and x stay as is"
    )


def check_module(
    model: nn.Module,
    x: Tensor,
    output: OutputMetric,
    loss: Loss,
    *,
    mass: Masses = 1e-1,
    blocks: Blocks = "layer",
    reduction: Reduction = "mean",
    generator: torch.Generator | None = None,
) -> list[CheckResult]:
    """Measure whether a model's layers have the factors that their rules claim.

    The findings are named ``gradient``, ``residual``; ``factor``, ``adjoint``;
    ``per_example``, ``duplication``; ``natural_gradient``, ``covector``; ``unchanged``.
    The reference is :mod:`torch.func` on the same model, so a model of one layer tests
    that layer's rule. If the recorded uses do not explain the gradient, only
    ``gradient`` is found, failed. Where something raises, ``raised`` takes the place of
    what is left of its group.

    Args:
        model: the model under test; its ``.grad`` are overwritten. It is deterministic
            and its examples do not interact.
        x: inputs, ``(n, ...)``.
        output: an output metric whose factor is not random.
        loss: function of the outputs, a scalar.
        mass: as in :class:`riemannian_modules.LayerwiseMetric`.
        blocks: as there.
        reduction: as there.
        generator: source of the random vectors, on the CPU.

    Returns:
        The findings. Cost O(p^3) for p parameters: small models only.

    >>> import riemannian_modules as rm
    >>> model = torch.nn.Linear(3, 2, dtype=torch.float64)
    >>> x = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).view(4, 3)
    >>> results = check_module(
    ...     model, x, rm.output.Euclidean(), lambda z: z.square().sum()
    ... )
    >>> all(result.passed for result in results)
    True
    """
    case = ModuleCase(model, x, output, loss, mass, blocks, reduction, generator)
    return list(_laws(case))
