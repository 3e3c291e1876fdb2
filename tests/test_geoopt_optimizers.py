"""geoopt's optimizers in the layer metric: same steps, saved states, line searches."""

import copy
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.interop.geoopt_optimizers import load_state_, seed_momentum_

X = torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 1, 0, 2])
MANIFOLDS = {
    "Stiefel": rm.manifolds.Stiefel,
    "Sphere": rm.manifolds.Sphere,
    "Oblique": rm.manifolds.Oblique,
    "PoincareBall": rm.manifolds.PoincareBall,
    "Euclidean": rm.manifolds.Euclidean,
}


def chain(manifold: str = "Stiefel") -> nn.Sequential:
    return rm.nn.Sequential(
        rm.nn.Linear(5, 4, manifold=MANIFOLDS[manifold]()),
        nn.Tanh(),
        rm.nn.Linear(4, 3),
    )


def viewed(model: nn.Module, mass: float = 0.1) -> rm.LayerwiseMetric:
    output = rm.output.Categorical()
    return rm.LayerwiseMetric(model, output=output, mass=mass, blocks="tensor")


def backward(metric: rm.LayerwiseMetric) -> float:
    with metric.record():
        outputs = metric.model(X)
    loss = F.cross_entropy(outputs, TARGET)
    metric.backward(loss, outputs)
    return float(loss.detach())


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_a_hundred_steps_of_both_are_one_trajectory(manifold: str) -> None:
    model = chain(manifold)
    twin, start = copy.deepcopy(model), copy.deepcopy(model)
    metrics = viewed(model), viewed(twin)
    ours = rm.optim.RiemannianSGD(metrics[0], lr=0.05)
    theirs = geoopt.optim.RiemannianSGD(twin.parameters(), lr=0.05)
    for _ in range(100):
        for metric in metrics:
            backward(metric)
        ours.step()
        theirs.step()
    assert distance(model, twin) < 1e-12
    assert distance(model, start) > 0.1


# ---- saved in one process, continued in another ----------------------------------


def rsgd(model: nn.Module) -> Any:
    metric = viewed(model)
    return metric, rm.optim.RiemannianSGD(metric, lr=0.1, momentum=0.7, nesterov=True)


def layered(model: nn.Module) -> Any:
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    return metric, rm.optim.RiemannianSGD(metric, lr=0.1, weight_decay=0.01)


def sgd(model: nn.Module) -> Any:
    optimizer = geoopt.optim.RiemannianSGD(
        model.parameters(), lr=0.02, momentum=0.7, stabilize=3
    )
    seed_momentum_(optimizer)
    return viewed(model), optimizer


def adam(model: nn.Module) -> Any:
    return viewed(model), geoopt.optim.RiemannianAdam(
        model.parameters(), lr=0.02, amsgrad=True
    )


MAKERS = {make.__name__: make for make in (rsgd, layered, sgd, adam)}


def steps(metric: rm.LayerwiseMetric, optimizer: Any, count: int) -> None:
    for _ in range(count):
        backward(metric)
        optimizer.step()


def go_on(folder: str) -> None:
    """What the other process does: for each optimizer load, continue, save."""
    for name, make in MAKERS.items():
        state = torch.load(f"{folder}/{name}.pt", weights_only=True)
        model = chain()
        metric, optimizer = make(model)
        model.load_state_dict(state["model"])
        metric.load_state_dict(state["metric"])
        load_state_(optimizer, state["optimizer"])
        steps(metric, optimizer, 4)
        torch.save(model.state_dict(), f"{folder}/{name}.end.pt")


def test_another_process_goes_on_bit_for_bit(tmp_path: Path) -> None:
    ends = {}
    for name, make in MAKERS.items():
        model = chain()
        metric, optimizer = make(model)
        steps(metric, optimizer, 4)
        content = {
            "model": model.state_dict(),
            "metric": metric.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(content, tmp_path / f"{name}.pt")
        before = {n: v.clone() for n, v in model.state_dict().items()}
        steps(metric, optimizer, 4)
        ends[name] = model.state_dict()
        assert any(not torch.equal(before[n], v) for n, v in ends[name].items())
    script = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import test_geoopt_optimizers
test_geoopt_optimizers.go_on({str(tmp_path)!r})
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    for name, end in ends.items():
        found = torch.load(tmp_path / f"{name}.end.pt", weights_only=True)
        wrong = [n for n, value in end.items() if not torch.equal(found[n], value)]
        assert not wrong, name


# ---- line searches ---------------------------------------------------------------


@pytest.mark.parametrize("manifold", ["Stiefel", "Sphere", "PoincareBall"])
@pytest.mark.parametrize("method", ["armijo", "wolfe"])
def test_a_line_search_with_a_frozen_metric(manifold: str, method: str) -> None:
    model = chain(manifold)
    metric = viewed(model, mass=0.5)
    search = geoopt.optim.RiemannianLineSearch(
        model.parameters(), line_search_method=method
    )

    def closure() -> float:
        return backward(metric)

    losses, evaluations = [], 0
    for _ in range(6):
        losses.append(closure())  # renews the factors
        held = [p.manifold.metric for p in model.parameters()]
        version, passes = metric.version, metric.passes
        with metric.frozen():
            search.step(closure, recompute_gradients=True)
        assert metric.version == version
        assert all(
            p.manifold.metric is own
            for p, own in zip(model.parameters(), held, strict=True)
        )
        evaluations += metric.passes - passes
    assert all(after < before for before, after in pairwise(losses))
    assert losses[-1] < 0.8 * losses[0]
    assert evaluations >= 12
    base = model[0].weight.manifold.base
    value = model[0].weight.detach().as_subclass(Tensor)
    torch.testing.assert_close(base.projx(value.clone()), value, rtol=0.0, atol=1e-12)


def test_the_slope_of_a_line_search_is_that_of_the_loss() -> None:
    """What the search believes, ``-|grad f|_g^2``, is the derivative of its phi."""
    model = chain()
    metric = viewed(model)
    slopes = []

    def method(phi: Any, derphi: Any, derphi0: float, **known: Any) -> float:
        h = 1e-5
        slopes.append(((phi(h) - phi(-h)) / (2.0 * h), derphi0, derphi(h)))
        return 0.1

    search = geoopt.optim.RiemannianLineSearch(
        model.parameters(), line_search_method=method
    )
    backward(metric)
    with metric.frozen():
        search.step(lambda: backward(metric), recompute_gradients=True)
    ((measured, believed, near),) = slopes
    assert believed == pytest.approx(measured, rel=1e-6)
    assert near == pytest.approx(measured, rel=1e-3)


def test_without_freezing_the_factors_would_change_during_the_search() -> None:
    model = chain()
    metric = viewed(model)
    search = geoopt.optim.RiemannianLineSearch(model.parameters())
    backward(metric)
    version = metric.version
    search.step(lambda: backward(metric), recompute_gradients=True)
    assert metric.version > version + 1


def test_adam_in_a_product_of_geoopt() -> None:
    """Its second moments see a number for each part of a product."""
    base = geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.Euclidean(), 2))
    x = torch.cat([geoopt.Sphere().random(3).data, torch.zeros(2)])
    ends = []
    for manifold in (base, rm.manifolds.MetricManifold(base)):
        point = geoopt.ManifoldParameter(x.clone(), manifold=manifold)
        optimizer = geoopt.optim.RiemannianAdam([point], lr=0.1)
        for _ in range(3):
            point.grad = torch.arange(5.0)
            optimizer.step()
        ends.append(point.detach().clone())
    assert torch.equal(*ends)
