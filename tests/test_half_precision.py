"""Autocast: products in half precision, what is small in them still counts."""

import copy
from collections.abc import Callable, Sequence

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.half_precision import MUTANTS
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.reverse import (
    loss_scale,
    rescaled,
    scaled_grad,
    unit_scaled,
)

DTYPES = [torch.bfloat16, torch.float16]
Gradients = dict[str, Tensor]


class InFloat32(nn.Module):
    """Computes in half precision inside, and returns float32."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside = inside

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.inside(x)
        return outputs if outputs.dtype == torch.float64 else outputs.float()


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).float()


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 6)),
        nn.Conv1d(1, 4, 3),
        nn.Tanh(),
        nn.Flatten(),
        nn.Linear(16, 3),
    ).float()


def gradients(
    model: nn.Module, x: Tensor, residual: Tensor, dtype: torch.dtype | None
) -> tuple[Gradients, Gradients]:
    """The gradient and the natural gradient of a loss with a given costate."""
    model = copy.deepcopy(model)
    if dtype is None:
        model, x, residual = model.double(), x.double(), residual.double()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1e-2)
    with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
        with metric.record():
            outputs = model(x)
        wide = outputs if dtype is None else outputs.float()
        loss = (wide * residual).sum() / len(x)
    metric.backward(loss, outputs)
    plain = {d.name: d.tensor.grad for d in metric.parameters}
    return (
        {name: g.double() for name, g in plain.items() if g is not None},
        {name: g.double() for name, g in metric.natural_gradient().items()},
    )


def error(found: Gradients, exact: Gradients) -> float:
    return max(float((found[k] - exact[k]).norm() / exact[k].norm()) for k in exact)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("size", [1e-6, 1e-3, 1.0, 1e5])
@pytest.mark.parametrize("make", [mlp, convolutional, lambda: InFloat32(mlp())])
def test_costates_of_any_size_are_carried(
    make: Callable[[], nn.Module], size: float, dtype: torch.dtype
) -> None:
    torch.manual_seed(1)
    model = make()
    x, residual = torch.randn(32, 6).float(), size * torch.randn(32, 3).float()
    exact = gradients(model, x, residual, None)
    found = gradients(model, x, residual, dtype)
    rounding = torch.finfo(dtype).eps
    assert error(found[0], exact[0]) < 4 * rounding
    assert error(found[1], exact[1]) < 10 * rounding


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_gradient_is_that_of_autograd(dtype: torch.dtype) -> None:
    model, x = mlp(), torch.randn(32, 6).float()
    target = torch.arange(32) % 3
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=1e-2)
    with torch.autocast("cpu", dtype):
        with metric.record():
            logits = model(x)
        loss = F.cross_entropy(logits, target)
    metric.backward(loss, logits)
    found = {d.name: d.tensor.grad for d in metric.parameters}
    with torch.autocast("cpu", dtype):
        loss = F.cross_entropy(model(x), target)
    parameters = dict(model.named_parameters())
    for name, expected in zip(
        parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True
    ):
        own = found[name]
        assert own is not None
        assert own.dtype == torch.float32
        difference = (own - expected).norm() / expected.norm()
        assert difference < 2 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_matrices_are_never_in_half_precision(dtype: torch.dtype) -> None:
    model, x = mlp(), torch.randn(8, 6).float()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=1e-2)
    with torch.autocast("cpu", dtype):
        with metric.record():
            logits = model(x)
        loss = F.cross_entropy(logits, torch.zeros(8).long())
        # Inside the scope, where they do not belong.
        metric.backward(loss, logits)
        inside = metric.natural_gradient()
    outside = metric.natural_gradient()
    for name, vector in inside.items():
        assert torch.equal(vector, outside[name])
    for block in metric.blocks.values():
        assert block.inverse.factor.lower.dtype in (torch.float32, torch.float64)


def test_a_step_inside_autocast_stays_on_the_manifold() -> None:
    layer = rm.nn.Linear(6, 3, manifold=rm.manifolds.Stiefel()).float()
    metric = rm.LayerwiseMetric(layer, rm.output.Euclidean(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5)
    with torch.autocast("cpu", torch.bfloat16):
        with metric.record():
            outputs = layer(torch.randn(8, 6).float())
        metric.backward(outputs.float().square().mean(), outputs)
        optimizer.step()
    W = layer.weight.detach().as_subclass(Tensor)
    assert (W @ W.mT - torch.eye(3).float()).abs().max() < 1e-6


def test_a_scale_for_float16_only() -> None:
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        assert loss_scale([torch.zeros(64, 2, dtype=dtype)]) == 1.0
    assert loss_scale([torch.zeros(64, 2, dtype=torch.float16)]) == 2.0**10
    assert loss_scale([torch.zeros(64, 2)], half=True) == 2.0**10
    assert loss_scale([torch.zeros(10**6, 2, dtype=torch.float16)]) == 2.0**15


@settings(max_examples=20)
@given(
    sizes=st.lists(st.floats(1e-30, 1e30), min_size=1, max_size=4),
    second=st.booleans(),
)
def test_scales_are_taken_back_exactly(sizes: list[float], second: bool) -> None:
    shapes = [(len(sizes), 3, 2), (len(sizes), 3)][: 1 + second]
    column = torch.tensor(sizes)
    stacks = [
        (torch.randn(shape) * column.view(-1, *[1] * (len(shape) - 1))).float()
        for shape in shapes
    ]
    scaled, back = unit_scaled(stacks)
    largest = torch.stack([s.abs().flatten(1).amax(1) for s in scaled]).amax(0)
    assert ((largest >= 0.5) & (largest < 1.0)).all()
    for one, other in zip(scaled, stacks, strict=True):
        assert torch.equal(rescaled(one, back), other)


def test_nothing_to_scale() -> None:
    scaled, back = unit_scaled([torch.zeros(2, 3, 1)])
    assert torch.equal(scaled[0], torch.zeros(2, 3, 1))
    assert torch.equal(back, torch.ones(2))


Grad = Callable[[Tensor, Sequence[Tensor], float], list[Tensor | None]]


def loses_digits(grad: Grad) -> bool:
    """Whether derivatives in float16 are worse than float16 is."""
    outputs = torch.zeros(64, 2, dtype=torch.float16, requires_grad=True)
    for factor in (1e-6, 1.0, 1e4):
        weights = factor * (1.0 + torch.rand(64, 2).float())
        (found,) = grad((outputs.float() * weights).sum() / 64, [outputs], 1024.0)
        assert found is not None
        if not (found * 64 / weights - 1.0).abs().max() < 2e-3:
            return True
    return False


def test_derivatives_by_half_precision_outputs() -> None:
    assert not loses_digits(scaled_grad)


@pytest.mark.parametrize("name", MUTANTS)
def test_ways_that_lose_them_are_found(name: str) -> None:
    assert loses_digits(MUTANTS[name])


class Differences(rm.output.OutputMetric):
    """Sees differences of outputs only, and leaves the whitening to the default."""

    def factor(self, outputs: Tensor) -> Tensor:
        d = outputs.shape[-1]
        rows = torch.eye(d, dtype=outputs.dtype)[:-1] - 1.0 / d
        return rows.expand(len(outputs), -1, -1)


def sampled() -> rm.output.OutputMetric:
    generator = torch.Generator().manual_seed(0)
    return rm.output.Sampled(rm.output.Categorical(), generator=generator)


def weighted() -> rm.output.OutputMetric:
    weights = torch.tensor([1.0, 0.0, 3.0, 1.0, 0.5, 2.0, 1.0, 1.0])
    return rm.output.Weighted(rm.output.Categorical(), weights)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "output", [rm.output.Categorical, weighted, sampled, Differences]
)
def test_rounding_of_the_cotangent_is_no_rest(output, dtype: torch.dtype) -> None:
    # One over the mass times what is outside of the row space is the step there.
    torch.manual_seed(0)
    model, x = nn.Linear(20, 10).float(), torch.randn(8, 20).float()
    targets = torch.randint(10, (8,))
    steps = []
    for wide in (False, True):
        metric = rm.LayerwiseMetric(model, output=output(), mass=1e-6)
        with torch.autocast("cpu", dtype=dtype):
            with metric.record():
                z = model(x)
                z = z.float() if wide else z
            losses = F.cross_entropy(z, targets, reduction="none")
        own = metric.output
        w = own.weights if isinstance(own, rm.output.Weighted) else torch.ones(8)
        metric.backward((losses * w).sum() / w.sum(), z)
        steps.append({n: u.double() for n, u in metric.natural_gradient().items()})
    assert error(*steps) < 3e-2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_rest_beyond_rounding_is_kept(dtype: torch.dtype) -> None:
    model, x = nn.Linear(20, 10).float(), torch.randn(8, 20).float()
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=1.0)
    with torch.autocast("cpu", dtype=dtype):
        with metric.record():
            z = model(x)
        loss = (F.cross_entropy(z, torch.arange(8)) + z[:, 0].mean()).float()
    metric.backward(loss, z)
    (solution,) = metric.solve().values()
    assert solution.branch == "push-through + woodbury"
