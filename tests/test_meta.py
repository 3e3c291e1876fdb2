"""A step never waits for the device: it runs on ``meta``, where nothing can be read."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import output

Loss = Callable[[Tensor, Tensor], Tensor]

CASES: dict[str, tuple[output.OutputMetric | None, Loss]] = {
    "Categorical": (
        output.Categorical(),
        lambda z, t: F.cross_entropy(z, t.softmax(-1)),
    ),
    "Euclidean": (output.Euclidean(), F.mse_loss),
    "Bernoulli": (
        output.Bernoulli(),
        lambda z, t: F.binary_cross_entropy_with_logits(z, t.sigmoid()),
    ),
    "Poisson": (
        output.Poisson(),
        lambda z, t: F.poisson_nll_loss(z, t.exp()),
    ),
    "Gaussian": (output.Gaussian(), F.mse_loss),
    "Gaussian covariance": (
        output.Gaussian(torch.diag(torch.arange(1.0, 5.0))),
        F.mse_loss,
    ),
    "Gaussian learned": (
        output.Gaussian(learned="log_variance"),
        # F.gaussian_nll_loss itself reads the variance on the host.
        lambda z, t: (
            (z[:, :2] - t[:, :2]).square() * (-z[:, 2:]).exp() + z[:, 2:]
        ).mean(),
    ),
    "Sampled": (
        output.Sampled(output.Categorical(), probes=2),
        lambda z, t: F.cross_entropy(z, t.softmax(-1)),
    ),
    "Sampled Poisson": (
        output.Sampled(output.Poisson()),
        lambda z, t: F.poisson_nll_loss(z, t.exp()),
    ),
    "none": (None, F.mse_loss),
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "decay": {"weight_decay": 0.1, "momentum": 0.5, "maximize": True},
}


def chain(device: str = "cpu", dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """A Stiefel layer of either orientation, a sphere layer and a Euclidean one."""
    keys: dict[str, Any] = {"device": device, "dtype": dtype}
    return rm.nn.Sequential(
        rm.nn.Linear(8, 6, manifold=rm.manifolds.Stiefel(), **keys),
        nn.Tanh(),
        rm.nn.Linear(6, 8, manifold=rm.manifolds.Stiefel(), **keys),
        nn.Tanh(),
        rm.nn.Linear(8, 6, manifold=rm.manifolds.Sphere(), **keys),
        nn.Tanh(),
        nn.Linear(6, 4, **keys),
    )


def train(
    model: nn.Module, metric: rm.LayerwiseMetric, loss: Loss, steps: int, **options: Any
) -> rm.optim.RiemannianSGD:
    parameter = next(model.parameters())
    data = torch.Generator().manual_seed(5)
    x = torch.randn(5, 8, generator=data).to(parameter)
    target = torch.randn(5, 4, generator=data).to(parameter)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1, **options)
    for _ in range(steps):
        with metric.record():
            outputs = model(x)
        metric.backward(loss(outputs, target), outputs)
        optimizer.step()
    return optimizer


def every_pair() -> list[Any]:
    """Every two of an output metric, blocks and options meet once."""
    return [
        pytest.param(case, blocks, kind, id=f"{name}-{blocks}-{kind}")
        for i, (name, case) in enumerate(CASES.items())
        for j, blocks in enumerate(("tensor", "layer", "model"))
        for kind in [list(OPTIONS)[(i + j) % len(OPTIONS)]]
    ]


@pytest.mark.parametrize(("case", "blocks", "kind"), every_pair())
def test_a_step_runs_on_meta(
    case: tuple[output.OutputMetric | None, Loss], blocks: str, kind: str
) -> None:
    metric_of_outputs, loss = case
    model = chain("meta")
    metric = rm.LayerwiseMetric(model, metric_of_outputs, mass=0.1, blocks=blocks)
    optimizer = train(model, metric, loss, 2, **OPTIONS[kind])
    assert metric.version == metric.passes == 2
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.is_meta
        assert p.grad.shape == p.shape
    for entries in optimizer.state.values():
        assert entries["momentum_buffer"].is_meta
    assert all(vector.is_meta for vector in metric.natural_gradient().values())


@pytest.mark.parametrize(
    "manifold",
    [rm.manifolds.CanonicalStiefel(), rm.manifolds.PoincareBall(), rm.manifolds.SPD()],
    ids=lambda m: m.name,
)
@pytest.mark.parametrize("width", [2, 40])
def test_other_manifolds_run_on_meta(manifold: Any, width: int) -> None:
    keys: dict[str, Any] = {"device": "meta"}
    model = rm.nn.Sequential(
        rm.nn.Linear(8, 8, manifold=manifold, **keys),
        nn.Tanh(),
        nn.Linear(8, width, **keys),
        nn.Tanh(),
        nn.Linear(width, 4, **keys),
    )
    metric = rm.LayerwiseMetric(model, output.Categorical(), mass=0.1)
    train(model, metric, CASES["Categorical"][1], 2, momentum=0.5)


def test_a_clipped_step_runs_on_meta() -> None:
    model = chain("meta")
    metric = rm.LayerwiseMetric(model, output.Categorical(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    x = torch.empty(5, 8, device="meta")
    with metric.record():
        outputs = model(x)
    metric.backward(outputs.square().mean(), outputs)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    assert {block.branch for block in optimizer.report} <= {"woodbury", "primal"}


def test_a_frozen_pass_and_a_pull_back_run_on_meta() -> None:
    model = chain("meta")
    metric = rm.LayerwiseMetric(model, output.Categorical(), mass=0.1)
    optimizer = train(model, metric, CASES["Categorical"][1], 1)
    x = torch.empty(5, 8, device="meta")
    with metric.frozen():
        with metric.record():
            outputs = model(x)
        metric.backward(outputs.square().mean(), outputs)
        optimizer.step()
    with metric.record():
        outputs = model(x)
    metric.pull_back(outputs)
    assert metric.version == 2


def test_construction_on_meta() -> None:
    model = chain(device="meta", dtype=torch.float32)
    assert all(p.is_meta for p in model.parameters())
    rm.LayerwiseMetric(model, output.Categorical())


def test_an_error_of_the_meta_device_would_be_seen() -> None:
    with pytest.raises(RuntimeError):
        bool(torch.ones((), device="meta") > 0)


@pytest.mark.gpu
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("name", [n for n in CASES if not n.startswith("Sampled")])
def test_a_step_on_cuda_is_that_on_the_cpu(name: str, options: dict[str, Any]) -> None:
    metric_of_outputs, loss = CASES[name]
    model = chain()
    twin = copy.deepcopy(model).to("cuda")
    for each in (model, twin):
        metric = rm.LayerwiseMetric(each, metric_of_outputs, mass=0.1)
        optimizer = train(each, metric, loss, 3, **options)
    for path, p in twin.named_parameters():
        expected = model.get_parameter(path).detach().as_subclass(torch.Tensor)
        found = p.detach().as_subclass(torch.Tensor).cpu()
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    assert len(str(optimizer.report).splitlines()) == 5


@pytest.mark.gpu
def test_a_sampled_step_on_cuda_learns() -> None:
    model = chain().to("cuda")
    metric = rm.LayerwiseMetric(model, CASES["Sampled"][0], mass=0.1)
    train(model, metric, CASES["Sampled"][1], 3)
    assert all(bool(p.isfinite().all()) for p in model.parameters())


@pytest.mark.gpu
def test_a_failed_step_on_cuda_changes_nothing() -> None:
    model = chain().to("cuda")
    metric = rm.LayerwiseMetric(model, output.Categorical(), mass=0.1)
    loss = CASES["Categorical"][1]
    optimizer = train(model, metric, loss, 1, momentum=0.9)
    before = [p.detach().clone() for p in model.parameters()]
    x = torch.full((5, 8), torch.nan, device="cuda")
    with metric.record():
        outputs = model(x)
    metric.backward(loss(outputs, torch.zeros_like(outputs)), outputs)
    optimizer.step()
    assert not bool(metric.succeeded())
    for p, value in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, value)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_on_cuda_does_not_synchronise() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)).to("cuda")
    metric = rm.LayerwiseMetric(model, output.Categorical(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    x = torch.randn(5, 64, device="cuda")
    target = torch.zeros(5, dtype=torch.long, device="cuda")

    def step() -> None:
        with metric.record():
            outputs = model(x)
        metric.backward(F.cross_entropy(outputs, target), outputs)
        optimizer.step()

    step()  # The first pass of a graph compares the gradient with autograd's.
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
