"""RiemannianSGD: torch's SGD and geoopt's in the limits, the metric's step between."""

import copy
import io
import itertools
from collections.abc import Callable, Collection, Mapping
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.testing.reference import (
    dense_factor,
    dense_natural_gradient,
    dense_sharp,
)

X = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 1])
MASS = 0.1


def cross_entropy(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, TARGET)


def euclidean_chain() -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))


def chain(manifold: geoopt.Manifold | None = None) -> nn.Sequential:
    first = rm.nn.Linear(5, 4, manifold=manifold or rm.manifolds.Stiefel())
    return rm.nn.Sequential(first, nn.Tanh(), rm.nn.Linear(4, 3))


def layer_metric(model: nn.Module, **options: Any) -> rm.LayerwiseMetric:
    options = {"output": rm.output.Categorical(), "mass": MASS, **options}
    return rm.LayerwiseMetric(model, **options)


def backward(metric: rm.LayerwiseMetric, x: Tensor = X) -> Tensor:
    with metric.record():
        outputs = metric.model(x)
    loss = cross_entropy(outputs)
    metric.backward(loss, outputs)
    return loss.detach()


def loss_of(model: nn.Module, x: Tensor = X) -> float:
    with torch.no_grad():
        return float(cross_entropy(model(x)))


def values(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: p.detach().as_subclass(torch.Tensor).clone()
        for name, p in model.named_parameters()
    }


def assert_same(
    one: Mapping[str, Tensor], other: Mapping[str, Tensor], tolerance: float = 0.0
) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        torch.testing.assert_close(
            value,
            other[name],
            rtol=tolerance,
            atol=tolerance,
            msg=lambda text, name=name: f"{name}: {text}",
        )


# --- torch.optim.SGD


SGD_OPTIONS = [
    {
        "momentum": momentum,
        "dampening": dampening,
        "nesterov": nesterov,
        "maximize": maximize,
        "weight_decay": decay,
    }
    for momentum, dampening, nesterov, maximize, decay in itertools.product(
        (0.0, 0.5, 0.9), (0.0, 0.3), (False, True), (False, True), (0.0, 0.2)
    )
    if not (nesterov and (momentum == 0.0 or dampening > 0.0))
]


def name_options(options: dict[str, Any]) -> str:
    return ",".join(f"{key}={value}" for key, value in options.items() if value)


@pytest.mark.parametrize("options", SGD_OPTIONS, ids=name_options)
def test_without_a_factor_it_is_sgd(options: dict[str, Any]) -> None:
    model = euclidean_chain()
    twin = copy.deepcopy(model)
    metric = layer_metric(model, output=None, mass=1.0)
    lr, decay = 0.1, options["weight_decay"]
    ours = rm.optim.RiemannianSGD(metric, lr=lr, **options)
    plain = {k: v for k, v in options.items() if k != "weight_decay"}
    theirs = torch.optim.SGD(twin.parameters(), lr=lr, **plain)
    for _ in range(20):
        backward(metric)
        ours.step()
        theirs.zero_grad()
        cross_entropy(twin(X)).backward()
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(1.0 - lr * decay)
        theirs.step()
    assert_same(values(model), values(twin), 1e-13)


def test_weight_decay_is_that_of_adamw() -> None:
    model = euclidean_chain()
    metric = layer_metric(model, output=None, mass=1.0)
    before = values(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5, weight_decay=0.2)
    with metric.record():
        outputs = model(X)
    metric.backward(0.0 * outputs.sum(), outputs)
    optimizer.step()
    assert_same(values(model), {n: 0.9 * v for n, v in before.items()}, 1e-15)


def test_a_mass_divides_the_step() -> None:
    model = euclidean_chain()
    before = values(model)
    metric = layer_metric(model, output=None, mass={"*.weight": 4.0, "*.bias": 0.5})
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    backward(metric)
    optimizer.step()
    for name, p in model.named_parameters():
        mass = 4.0 if name.endswith("weight") else 0.5
        expected = before[name] - 0.1 * p.grad / mass
        torch.testing.assert_close(p.detach(), expected, rtol=1e-14, atol=1e-15)


def test_switched_off_momentum_leaves_no_state() -> None:
    metric = layer_metric(chain())
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    backward(metric)
    optimizer.step()
    assert optimizer.state_dict()["state"] == {}


# --- geoopt


@pytest.mark.parametrize(
    "manifold",
    [
        rm.manifolds.Stiefel(),
        rm.manifolds.CanonicalStiefel(),
        rm.manifolds.Sphere(),
        rm.manifolds.PoincareBall(),
    ],
    ids=lambda m: m.name,
)
def test_without_a_factor_it_is_geoopt(manifold: geoopt.Manifold) -> None:
    model = chain(manifold)
    twin = copy.deepcopy(model)
    metric = layer_metric(model, output=None, mass=1.0)
    ours = rm.optim.RiemannianSGD(metric, lr=0.1)
    theirs = geoopt.optim.RiemannianSGD(twin.parameters(), lr=0.1)
    for _ in range(10):
        backward(metric)
        ours.step()
        theirs.zero_grad()
        cross_entropy(twin(X)).backward()
        theirs.step()
    assert_same(values(model), values(twin), 1e-13)


@pytest.mark.parametrize(
    "manifold",
    [rm.manifolds.Stiefel(), rm.manifolds.Sphere(), rm.manifolds.Euclidean()],
    ids=lambda m: m.name,
)
def test_geoopt_steps_in_the_same_metric(manifold: geoopt.Manifold) -> None:
    model = chain(manifold)
    twin = copy.deepcopy(model)
    metrics = [layer_metric(m, blocks="tensor") for m in (model, twin)]
    ours = rm.optim.RiemannianSGD(metrics[0], lr=0.3)
    theirs = geoopt.optim.RiemannianSGD(twin.parameters(), lr=0.3)
    before = values(model)
    for _ in range(5):
        for metric in metrics:
            backward(metric)
        ours.step()
        theirs.step()
    assert_same(values(model), values(twin), 1e-11)
    moved = max(float((values(model)[n] - v).norm()) for n, v in before.items())
    assert moved > 0.1


def test_geoopt_adam_decreases_the_loss() -> None:
    model = chain()
    metric = layer_metric(model, blocks="tensor")
    optimizer = geoopt.optim.RiemannianAdam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        losses.append(float(backward(metric)))
        optimizer.step()
    assert losses[-1] < losses[0]
    rows = model[0].weight.detach()
    torch.testing.assert_close(rows @ rows.mT, torch.eye(4), rtol=0.0, atol=1e-10)


# --- momentum


def test_the_momentum_covector_stays_tangential() -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.2, momentum=0.9)
    weight = model[0].weight
    for _ in range(5):
        backward(metric)
        point = weight.detach().as_subclass(torch.Tensor).clone()
        optimizer.step()
        buffer = optimizer.state[weight]["momentum_buffer"]
        tangential = rm.manifolds.Stiefel().proju(point, buffer)
        torch.testing.assert_close(buffer, tangential, rtol=0.0, atol=1e-14)
    assert float(buffer.norm()) > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_momentum_is_the_dense_solve_of_the_carried_covector(
    blocks: str, nesterov: bool
) -> None:
    model = chain()
    metric = layer_metric(model, blocks=blocks)
    lr, momentum = 0.1, 0.8
    optimizer = rm.optim.RiemannianSGD(
        metric, lr=lr, momentum=momentum, nesterov=nesterov
    )
    carried: dict[str, Tensor] = {}
    for _ in range(3):
        backward(metric)
        spaces = {d.name: d.space() for d in metric.parameters}
        fresh = {
            n: s.project(s.point.new_tensor(model.get_parameter(n).grad.tolist()))
            for n, s in spaces.items()
        }
        carried = {
            n: g + momentum * spaces[n].project(carried[n]) if carried else g
            for n, g in fresh.items()
        }
        covector = carried
        if nesterov:
            covector = {n: g + momentum * carried[n] for n, g in fresh.items()}
        expected = dense_step(metric, covector, lr)
        optimizer.step()
        assert_same(values(model), expected, 1e-11)


def dense_step(
    metric: rm.LayerwiseMetric,
    covector: Mapping[str, Tensor],
    lr: float | Mapping[str, float],
    K: Mapping[str, Tensor] | None = None,
    still: Collection[str] = (),
) -> dict[str, Tensor]:
    """The step along ``covector`` with every matrix explicit, where some stand still.

    The metric of those that move is the part of the matrix that is theirs.
    """
    spaces = {d.name: d.space() for d in metric.parameters}
    K = dense_factor(metric.model, metric.output, X) if K is None else K
    result = {}
    for block in metric.blocks.values():
        names = [part.name for part in block.parts if part.name not in still]
        own = {name: spaces[name] for name in names}
        if own:
            result.update(dense_sharp(own, K, covector))
    moved = {
        name: spaces[name].manifold.retr(
            spaces[name].point,
            -(lr if isinstance(lr, float) else lr[name]) * vector,
        )
        for name, vector in result.items()
    }
    return {name: spaces[name].point for name in still} | moved


# --- the metric's own step


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_a_step_is_the_dense_step(blocks: str) -> None:
    model = chain()
    metric = layer_metric(model, blocks=blocks)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.3)
    backward(metric)
    expected = dense_natural_gradient(
        model, rm.output.Categorical(), X, cross_entropy, mass=MASS, blocks=blocks
    )
    points = {
        d.name: d.manifold.retr(d.space().point, -0.3 * expected[d.name])
        for d in metric.parameters
    }
    optimizer.step()
    assert_same(values(model), points, 1e-10)


@pytest.mark.parametrize(
    ("retraction", "move"),
    [
        (None, lambda m, x, u: m.retr(x, u)),
        (rm.retractions.Default(), lambda m, x, u: m.retr(x, u)),
        (rm.retractions.Exponential(), lambda m, x, u: m.expmap(x, u)),
        (rm.retractions.Projection(), lambda m, x, u: m.projx(x + u)),
        (
            rm.retractions.Cayley(),
            lambda m, x, u: rm.manifolds.CanonicalStiefel().retr(x, u),
        ),
    ],
    ids=["default", "Default", "Exponential", "Projection", "Cayley"],
)
def test_the_retraction_is_the_one_passed_in(
    retraction: rm.retractions.Retraction | None,
    move: Callable[[geoopt.Manifold, Tensor, Tensor], Tensor],
) -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=2.0, retraction=retraction)
    backward(metric)
    vector = metric.natural_gradient()["0.weight"]
    point = values(model)["0.weight"]
    manifold = rm.manifolds.Stiefel()
    expected = move(manifold, point, -2.0 * vector)
    optimizer.step()
    torch.testing.assert_close(
        values(model)["0.weight"], expected, rtol=1e-13, atol=1e-13
    )
    if isinstance(retraction, rm.retractions.Projection):
        other = manifold.retr(point, -2.0 * vector)
        assert float((other - expected).norm()) > 1e-3


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("mass", [1e-4, 1e-1])
def test_a_small_step_decreases_the_loss(blocks: str, mass: float) -> None:
    model = chain()
    metric = layer_metric(model, blocks=blocks, mass=mass)
    optimizer = rm.optim.RiemannianSGD(metric, lr=1e-3)
    for _ in range(5):
        before = float(backward(metric))
        optimizer.step()
        assert loss_of(model) < before


@pytest.mark.parametrize("blocks", ["layer", "model"])
def test_maximize_ascends(blocks: str) -> None:
    model = chain()
    metric = layer_metric(model, blocks=blocks)
    optimizer = rm.optim.RiemannianSGD(metric, lr=1e-2, maximize=True)
    before = float(backward(metric))
    optimizer.step()
    assert loss_of(model) > before


def test_weight_decay_along_manifolds() -> None:
    ball = rm.manifolds.PoincareBall()
    model = rm.nn.Sequential(
        rm.nn.Linear(5, 4, manifold=ball),
        rm.nn.Linear(4, 3, manifold=rm.manifolds.Stiefel()),
    )
    metric = layer_metric(model, output=None, mass=1.0)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5, weight_decay=0.2)
    before = values(model)
    with metric.record():
        outputs = model(X)
    metric.backward(0.0 * outputs.sum(), outputs)
    optimizer.step()
    after = values(model)
    torch.testing.assert_close(after["1.weight"], before["1.weight"])
    shrunk = ball.retr(before["0.weight"], -0.1 * before["0.weight"])
    torch.testing.assert_close(after["0.weight"], shrunk)


# --- groups, schedulers, closures


def test_groups_have_their_own_rates() -> None:
    model = chain()
    metric = layer_metric(model, blocks="model")
    lrs = {"0.weight": 0.3, "0.bias": 0.3, "2.weight": 0.1, "2.bias": 0.0}
    groups = [
        {"params": list(model[0].parameters()), "lr": 0.3},
        {"params": [model[2].weight]},
        {"params": [model[2].bias], "lr": 0.0},
    ]
    optimizer = rm.optim.RiemannianSGD(metric, groups, lr=0.1)
    backward(metric)
    gradient = {n: p.grad for n, p in model.named_parameters()}
    expected = dense_step(metric, gradient, lrs, still=["2.bias"])
    before = values(model)
    optimizer.step()
    assert_same(values(model), expected, 1e-11)
    assert torch.equal(values(model)["2.bias"], before["2.bias"])


def two_layers() -> tuple[nn.Sequential, rm.LayerwiseMetric]:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    return model, rm.LayerwiseMetric(model, rm.output.Euclidean())


@pytest.mark.parametrize("key", ["mass", "betas"])
def test_options_that_a_step_does_not_know_are_refused(key: str) -> None:
    model, metric = two_layers()
    hint = r"LayerwiseMetric\(.*mass=" if key == "mass" else "there are clip, dampening"
    groups = [{"params": model[0].parameters(), key: 1e3}]
    with pytest.raises(ValueError, match=f"'{key}'.*{hint}"):
        rm.optim.RiemannianSGD(metric, groups, lr=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, model[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=f"'{key}'"):
        optimizer.add_param_group({"params": model[2].parameters(), key: 1e3})
    assert len(optimizer.param_groups) == 1


@pytest.mark.parametrize("lr", [0.1, None])
def test_what_schedulers_write_into_groups_stays(lr: float | None) -> None:
    schedulers = torch.optim.lr_scheduler
    model, metric = two_layers()
    optimizer = rm.optim.RiemannianSGD(metric, lr=lr)
    schedulers.OneCycleLR(optimizer, 0.1, total_steps=9, cycle_momentum=False)
    schedulers.CyclicLR(optimizer, 0.1, 0.2, cycle_momentum=False)
    state = optimizer.state_dict()
    assert {"initial_lr", "max_lr", "min_lr"} <= set(state["param_groups"][0])
    other = rm.optim.RiemannianSGD(metric, lr=lr)
    other.load_state_dict(state)
    assert other.state_dict()["param_groups"] == state["param_groups"]
    group = {**optimizer.param_groups[0], "name": "first"}
    group["params"] = list(model[0].parameters())
    rm.optim.RiemannianSGD(metric, [group], lr=0.1 if lr is None else lr)


def test_a_learning_rate_goes_by_name() -> None:
    model, metric = two_layers()
    with pytest.raises(TypeError, match=r"RiemannianSGD\(metric, lr=0.1\)"):
        rm.optim.RiemannianSGD(metric, 0.1)  # type: ignore[arg-type]
    groups = [
        {"params": layer.parameters(), "lr": 0.1} for layer in (model[0], model[2])
    ]
    with pytest.raises(ValueError, match="give the optimizer an lr, too"):
        rm.optim.RiemannianSGD(metric, groups)
    factors = [{"params": model[0].parameters()}, {**groups[1]}]
    optimizer = rm.optim.RiemannianSGD(metric, factors)
    assert [group["lr"] for group in optimizer.param_groups] == [1.0, 0.1]


def test_groups_have_their_own_momentum() -> None:
    model = chain()
    metric = layer_metric(model)
    groups = [
        {"params": list(model[0].parameters()), "momentum": 0.9},
        {"params": list(model[2].parameters())},
    ]
    optimizer = rm.optim.RiemannianSGD(metric, groups, lr=0.1)
    old: dict[str, Tensor] = {}
    for _ in range(3):
        backward(metric)
        spaces = {d.name: d.space() for d in metric.parameters}
        covector = {
            n: spaces[n].project(p.grad.as_subclass(torch.Tensor))
            for n, p in model.named_parameters()
        }
        for name in ("0.weight", "0.bias"):
            if old:
                covector[name] = covector[name] + 0.9 * spaces[name].project(old[name])
        old = covector
        expected = dense_step(metric, covector, 0.1)
        optimizer.step()
        assert_same(values(model), expected, 1e-10)
    assert len(optimizer.state_dict()["state"]) == 2


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_an_optimizer_of_some_parameters_descends(blocks: str) -> None:
    # The inputs are nearly collinear with the bias, so that the joint solve of
    # weight and bias moves the weight against its own gradient.
    model = nn.Sequential(nn.Linear(5, 3))
    metric = layer_metric(model, blocks=blocks, mass=1e-3)
    optimizer = rm.optim.RiemannianSGD(metric, [model[0].weight], lr=1e-4)
    x = 1.0 + 0.05 * X
    before = values(model)
    descents = []
    for seed in range(10):
        torch.manual_seed(seed)
        model.load_state_dict({n: torch.randn_like(v) for n, v in before.items()})
        loss = float(backward(metric, x))
        bias = model[0].bias.detach().clone()
        optimizer.step()
        assert torch.equal(model[0].bias, bias)
        descents.append(loss_of(model, x) < loss)
    assert all(descents), descents


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_an_optimizer_of_some_parameters_takes_their_dense_step(blocks: str) -> None:
    model = chain()
    metric = layer_metric(model, blocks=blocks, mass=1e-3)
    some = [model[0].weight, model[2].bias]
    optimizer = rm.optim.RiemannianSGD(metric, some, lr=0.3)
    still = ["0.bias", "2.weight"]
    for _ in range(2):
        backward(metric)
        gradient = {n: p.grad for n, p in model.named_parameters()}
        expected = dense_step(metric, gradient, 0.3, still=still)
        optimizer.step()
        assert_same(values(model), expected, 1e-9)
    assert {name for block in optimizer.report for name in block.moves} == {
        "0.weight",
        "2.bias",
    }


def test_a_full_step_of_one_parameter_ends_at_its_minimum() -> None:
    # Least squares: the joint step, of which only the weight's part is taken, would
    # overshoot a hundred times, since the bias does not follow.
    torch.manual_seed(0)
    x, t = torch.randn(50, 3) + 3.0, torch.randn(50, 1)
    model = nn.Linear(3, 1)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1e-9)
    optimizer = rm.optim.RiemannianSGD(metric, [model.weight], lr=1.0)
    for _ in range(2):
        with metric.record():
            z = model(x)
        metric.backward((z - t).square().sum(1).mean() / 2, z)
        optimizer.step()
    solved = torch.linalg.lstsq(x, t - model.bias.detach()).solution
    torch.testing.assert_close(model.weight.detach(), solved.mT, rtol=1e-5, atol=1e-6)


def test_a_parameter_whose_gradient_was_dropped_stays() -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1, momentum=0.5)
    before = values(model)
    backward(metric)
    model[2].weight.grad = None
    covector = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    expected = dense_step(metric, covector, 0.1, still=["2.weight"])
    optimizer.step()
    assert torch.equal(values(model)["2.weight"], before["2.weight"])
    assert_same(values(model), expected, 1e-11)
    assert model[2].weight not in optimizer.state


def test_schedulers_change_the_rate() -> None:
    models = [chain()]
    models.append(copy.deepcopy(models[0]))
    optimizers = [
        rm.optim.RiemannianSGD(layer_metric(m), lr=0.4, momentum=0.5) for m in models
    ]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], 1, gamma=0.5)
    for step in range(4):
        backward(optimizers[0].metric)
        optimizers[0].step()
        scheduler.step()
        backward(optimizers[1].metric)
        optimizers[1].param_groups[0]["lr"] = 0.4 * 0.5**step
        optimizers[1].step()
    assert optimizers[0].param_groups[0]["lr"] == 0.4 * 0.5**4
    assert_same(values(models[0]), values(models[1]))


def test_a_tensor_is_a_rate_too() -> None:
    models = [chain()]
    models.append(copy.deepcopy(models[0]))
    for model, lr in zip(models, (0.3, torch.tensor(0.3)), strict=True):
        metric = layer_metric(model)
        optimizer = rm.optim.RiemannianSGD(metric, lr=lr)
        backward(metric)
        optimizer.step()
    assert_same(values(models[0]), values(models[1]), 1e-15)


def test_closures_are_called_once() -> None:
    model = chain()
    twin = copy.deepcopy(model)
    metric, other = layer_metric(model), layer_metric(twin)
    calls = []

    def closure() -> float:
        assert torch.is_grad_enabled()
        calls.append(float(backward(metric)))
        return calls[-1]

    optimizer = rm.optim.RiemannianSGD(metric, lr=0.2)
    with torch.no_grad():
        assert optimizer.step(closure) == calls[0]
    assert len(calls) == 1
    backward(other)
    rm.optim.RiemannianSGD(other, lr=0.2).step()
    assert_same(values(model), values(twin))


def test_zero_grad_is_optional() -> None:
    models = [chain()]
    models.append(copy.deepcopy(models[0]))
    for index, model in enumerate(models):
        metric = layer_metric(model)
        optimizer = rm.optim.RiemannianSGD(metric, lr=0.2, momentum=0.5)
        for _ in range(4):
            if index:
                optimizer.zero_grad(set_to_none=index == 1)
            backward(metric)
            optimizer.step()
    assert_same(values(models[0]), values(models[1]))


# --- state


def resume(state: Any, model: nn.Module) -> rm.optim.RiemannianSGD:
    optimizer = rm.optim.RiemannianSGD(layer_metric(model), lr=1e3)
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.parametrize("through_file", [False, True])
def test_a_loaded_state_resumes_bit_for_bit(through_file: bool) -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(
        metric, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01
    )
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(3):
        backward(metric)
        optimizer.step()
        scheduler.step()
    states: Any = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    if through_file:
        buffer = io.BytesIO()
        torch.save(states, buffer)
        buffer.seek(0)
        states = torch.load(buffer, weights_only=True)
    else:
        states = copy.deepcopy(states)
    twin = chain()
    twin.load_state_dict(states["model"])
    other = resume(states["optimizer"], twin)
    assert other.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"]
    for _ in range(3):
        backward(metric)
        optimizer.step()
        backward(other.metric)
        other.step()
    assert_same(values(model), values(twin))


# --- gradients that were changed between backward and step


def clip_norm(model: nn.Module) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)


def clip_value(model: nn.Module) -> None:
    nn.utils.clip_grad_value_(model.parameters(), 0.01)


def replace_one(model: nn.Module) -> None:
    model[2].weight.grad = 2.0 * model[2].weight.grad


def accumulate(model: nn.Module) -> None:
    model(X).square().mean().backward()


@pytest.mark.parametrize("change", [clip_norm, clip_value, replace_one, accumulate])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_changed_gradient_is_honoured(
    change: Callable[[nn.Module], None], momentum: float
) -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.3, momentum=momentum)
    backward(metric)
    unchanged = {n: p.grad.clone() for n, p in model.named_parameters()}
    change(model)
    covector = {n: p.grad for n, p in model.named_parameters()}
    assert any(not torch.equal(covector[n], g) for n, g in unchanged.items())
    expected = dense_step(metric, covector, 0.3)
    optimizer.step()
    assert_same(values(model), expected, 1e-11)


# --- the report


def test_the_report_tells_what_happened() -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.2)
    backward(metric)
    gradient = metric.natural_gradient()
    blocks = dict(metric.blocks)
    points = values(model)
    K = dense_factor(model, rm.output.Categorical(), X)
    spaces = {d.name: d.space() for d in metric.parameters}
    optimizer.step()
    report = optimizer.report
    assert [block.name for block in report] == ["0", "2"]
    for block in report:
        names = [part.name for part in blocks[block.name].parts]
        own = {name: gradient[name] for name in names}
        assert report[block.name] is block
        assert block.rank == 14
        assert block.dim == sum(spaces[name].dim for name in names)
        assert block.gradient_norm == pytest.approx(
            float(blocks[block.name].norm(own)), rel=1e-12
        )
        assert block.predicted_decrease == pytest.approx(
            0.2 * block.gradient_norm**2, rel=1e-12
        )
        steps = sum(float((0.2 * own[name]).square().sum()) for name in names)
        assert block.update_norm == pytest.approx(steps**0.5, rel=1e-12)
        assert 0.0 <= block.residual < 1e-12
        M = sum(
            (K[n] @ torch.stack([spaces[n].sharp(k).flatten() for k in rows]).mT)
            for n, rows in ((n, K[n].view(-1, *points[n].shape)) for n in names)
        )
        eigenvalues = torch.linalg.eigvalsh(M @ torch.linalg.inv(torch.eye(14) + M))
        if block.rank <= block.dim:
            assert block.contraction_rate == pytest.approx(
                float(eigenvalues[0]), rel=1e-8, abs=1e-12
            )
        inner = torch.linalg.eigvalsh(torch.eye(14) + M)
        if block.branch != "primal":
            assert block.condition == pytest.approx(
                float(inner[-1] / inner[0]), rel=1e-9
            )


def test_the_report_names_the_branch() -> None:
    wide = nn.Sequential(nn.Linear(5, 40), nn.Tanh(), nn.Linear(40, 3))
    metric = layer_metric(wide)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    backward(metric)
    optimizer.step()
    assert {b.name: b.branch for b in optimizer.report} == dict.fromkeys(
        "02", "push-through"
    )
    backward(metric)
    nn.utils.clip_grad_norm_(wide.parameters(), 1e-3)
    optimizer.step()
    assert {b.branch for b in optimizer.report} == {"woodbury"}
    small = nn.Sequential(nn.Linear(5, 2), nn.Tanh(), nn.Linear(2, 3))
    metric = layer_metric(small)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    backward(metric)
    optimizer.step()
    assert {b.name: b.branch for b in optimizer.report} == dict.fromkeys("02", "primal")
    assert optimizer.report["2"].contraction_rate == 0.0
    metric = layer_metric(small, output=None)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    backward(metric)
    optimizer.step()
    assert {b.branch for b in optimizer.report} == {"base"}
    assert [b.rank for b in optimizer.report] == [0, 0]
    assert [b.condition for b in optimizer.report] == [1.0, 1.0]


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_the_predicted_decrease_is_the_slope_of_the_loss(blocks: str) -> None:
    lr = 1e-6
    model = chain()
    metric = layer_metric(model, blocks=blocks)
    optimizer = rm.optim.RiemannianSGD(metric, lr=lr)
    before = float(backward(metric))
    optimizer.step()
    decrease = before - loss_of(model)
    predicted = sum(block.predicted_decrease for block in optimizer.report)
    assert decrease == pytest.approx(predicted, rel=1e-4)


@pytest.mark.parametrize("options", [{}, {"dampening": 0.5}, {"nesterov": True}])
def test_the_predicted_decrease_of_a_step_with_momentum(
    options: dict[str, Any],
) -> None:
    metric = layer_metric(model := chain())
    optimizer = rm.optim.RiemannianSGD(metric, lr=1e-5, momentum=0.9, **options)
    for _ in range(4):
        backward(metric)
        before = values(model)
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
        after = values(model)
        slope = sum(
            float((g * (after[n] - before[n])).sum()) for n, g in gradients.items()
        )
        predicted = sum(block.predicted_decrease for block in optimizer.report)
        assert predicted == pytest.approx(-slope, rel=1e-3)


def test_the_report_is_a_table() -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.2, momentum=0.9, weight_decay=0.1)
    for _ in range(2):
        backward(metric)
        optimizer.step()
    lines = str(optimizer.report).splitlines()
    assert len(lines) == 3
    assert lines[0].split()[:4] == ["block", "dim", "rank", "solver"]
    assert all(line == line.rstrip() for line in lines)
    start = lines[0].index("|grad|_g")
    for line, block in zip(lines[1:], optimizer.report, strict=True):
        assert line[start:].startswith(f"{block.gradient_norm:.2e}")
    assert lines[1].startswith("0 ")
    assert lines[2].startswith("2 ")


def test_representations_are_short_and_print_computes() -> None:
    model = chain()
    metric = layer_metric(model, mass={"0.weight": 0.5, "*": 0.1})
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.2)
    backward(metric)
    optimizer.step()
    report, block = optimizer.report, optimizer.report["0"]
    part = metric.blocks["0"].parts[0]
    things = [report, block, block.solution, part, part.space, part.factor]
    things += [block.metric, next(iter(metric.parameters)), part.space.mass]
    for thing in things:
        assert "tensor(" not in repr(thing)
        assert "object at" not in repr(thing)
        assert len(repr(thing)) < 300
    # A representation reads nothing; only what is printed is computed.
    assert "gradient_norm" not in vars(block)
    head, *lines = str(block).splitlines()
    assert head == repr(block)
    assert "0.weight, 0.bias" in head
    assert f"{block.gradient_norm:.2e}" in lines[0]
    assert [line.split()[-1] for line in lines] == str(report).splitlines()[1].split()[
        -len(lines) :
    ]
    assert repr(rm.Mass(diagonal=torch.ones(2))) == "Mass(diagonal (2,))"
    row = rm.Mass(row=torch.ones(2), column=torch.ones(3))
    assert repr(row) == "Mass(scalar 1, row (2,), column (3,))"


def test_the_report_counts_the_decay_as_a_step() -> None:
    model = nn.Sequential(nn.Linear(5, 3))
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.2, weight_decay=0.5)
    before = values(model)
    backward(metric)
    optimizer.step()
    moved = sum(float((values(model)[n] - v).square().sum()) for n, v in before.items())
    assert optimizer.report["0"].update_norm == pytest.approx(moved**0.5, rel=1e-12)


# --- line searches and passes without a loss


def move(model: nn.Module, scale: float) -> None:
    with torch.no_grad():
        for p in model.parameters():
            manifold = getattr(p, "manifold", geoopt.Euclidean())
            p.copy_(manifold.retr(p, manifold.proju(p, scale * torch.randn_like(p))))


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_a_frozen_metric_keeps_its_factors(blocks: str) -> None:
    model = chain()
    metric = layer_metric(model, blocks=blocks)
    backward(metric)
    K = dense_factor(model, rm.output.Categorical(), X)
    version, passes = metric.version, metric.passes
    first = metric.natural_gradient()
    move(model, 0.1)
    with metric.frozen():
        backward(metric)
        assert "frozen" in repr(metric)
    assert metric.version == version
    assert metric.passes == passes + 1
    gradient = {n: p.grad for n, p in model.named_parameters()}
    with torch.enable_grad():
        fresh = torch.autograd.grad(cross_entropy(model(X)), list(model.parameters()))
    assert_same(gradient, dict(zip(gradient, fresh, strict=True)), 1e-14)
    found = metric.natural_gradient()
    expected = {}
    spaces = {d.name: d.space() for d in metric.parameters}
    for block in metric.blocks.values():
        own = {part.name: spaces[part.name] for part in block.parts}
        expected.update(dense_sharp(own, K, gradient))
    assert_same(found, expected, 1e-10)
    assert any(float((found[n] - v).norm()) > 1e-3 for n, v in first.items())
    point = values(model)["0.weight"]
    tangent = rm.manifolds.Stiefel().proju(point, found["0.weight"])
    torch.testing.assert_close(found["0.weight"], tangent, rtol=0.0, atol=1e-12)


def test_a_step_with_a_frozen_metric() -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.2, momentum=0.5)
    backward(metric)
    K = dense_factor(model, rm.output.Categorical(), X)
    optimizer.step()
    with metric.frozen():
        backward(metric)
    covector = {n: p.grad for n, p in model.named_parameters()}
    spaces = {d.name: d.space() for d in metric.parameters}
    covector = {
        n: spaces[n].project(g)
        + 0.5
        * spaces[n].project(optimizer.state[model.get_parameter(n)]["momentum_buffer"])
        for n, g in covector.items()
    }
    expected = dense_step(metric, covector, 0.2, K)
    optimizer.step()
    assert_same(values(model), expected, 1e-10)
    backward(metric)
    assert metric.version == 2


def test_a_frozen_metric_without_factors_is_made() -> None:
    metric = layer_metric(chain())
    with metric.frozen():
        backward(metric)
    assert metric.version == 1
    assert metric.natural_gradient()


def test_freezing_ends_with_the_scope() -> None:
    metric = layer_metric(chain())
    backward(metric)
    with pytest.raises(KeyError), metric.frozen():
        raise KeyError
    backward(metric)
    assert metric.version == 2


def test_a_pull_back_leaves_the_gradients_alone() -> None:
    model = chain()
    metric = layer_metric(model)
    backward(metric)
    version, passes = metric.version, metric.passes
    before = {n: (p.grad, p.grad.clone()) for n, p in model.named_parameters()}
    with metric.record():
        outputs = model(X[:3])
    metric.pull_back(outputs)
    for name, p in model.named_parameters():
        assert p.grad is before[name][0]
        assert torch.equal(p.grad, before[name][1])
    assert metric.version == version + 1
    assert metric.passes == passes
    assert {block.rank for block in metric.blocks.values()} == {6}


def test_a_pull_back_gives_the_metric_of_a_backward() -> None:
    model = chain()
    metrics = [layer_metric(model), layer_metric(model)]
    backward(metrics[0])
    with metrics[1].record():
        outputs = model(X)
    metrics[1].pull_back(outputs)
    for name, block in metrics[0].blocks.items():
        torch.testing.assert_close(
            metrics[1].blocks[name].to_dense(), block.to_dense(), rtol=1e-14, atol=1e-15
        )


def test_a_pull_back_without_an_output_metric() -> None:
    model = chain()
    metric = layer_metric(model, output=None)
    with metric.record():
        outputs = model(X)
    with pytest.raises(rm.errors.NotRecordedError, match="output=None"):
        metric.pull_back(outputs)
    assert metric.version == 0


def test_a_parameter_moved_after_backward_is_not_stepped() -> None:
    model = chain(rm.manifolds.Stiefel())
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    backward(metric)
    with torch.no_grad():
        model[0].weight.copy_(rm.manifolds.Stiefel().random(*model[0].weight.shape))
    before = values(model)
    with pytest.raises(rm.errors.NotRecordedError, match=r"0\.weight.*backward"):
        optimizer.step()
    assert_same(values(model), before)


def test_a_replaced_layer_is_noticed() -> None:
    model = chain()
    metric = layer_metric(model)
    model[2] = nn.Linear(model[2].in_features, model[2].out_features)
    with (
        pytest.raises(rm.errors.LostManifoldError, match=r"2\.weight.*anew"),
        metric.record(),
    ):
        model(X)


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_two_optimizers_share_one_pass(blocks: str) -> None:
    # Each takes the step that it would take if the other were not there.
    models = [chain() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    metrics = [layer_metric(model, blocks=blocks) for model in models]

    def of(index: int, layer: int, lr: float) -> rm.optim.RiemannianSGD:
        own = list(models[index][layer].parameters())
        return rm.optim.RiemannianSGD(metrics[index], own, lr=lr)

    both = [of(0, 0, 0.2), of(0, 2, 0.4)]
    alone = [of(1, 0, 0.2), of(2, 2, 0.4)]
    for metric in metrics:
        backward(metric)
    for optimizer in (*both, *alone):
        optimizer.step()
    found = values(models[0])
    for name, value in values(models[1]).items():
        if name.startswith("0"):
            assert_same({name: found[name]}, {name: value})
    for name, value in values(models[2]).items():
        if name.startswith("2"):
            assert_same({name: found[name]}, {name: value})
    # A second step of either would be of a gradient at another point.
    with pytest.raises(rm.errors.NotRecordedError):
        both[0].step()


def test_a_scheduler_that_cycles_momentum_is_told_of() -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric)
    torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1.0, total_steps=10)
    backward(metric)
    before = values(model)
    with pytest.raises(ValueError, match="cycle_momentum=False"):
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())


@pytest.mark.parametrize("unscaled", [False, True])
def test_a_scaler_is_refused_and_leaves_nothing_behind(unscaled: bool) -> None:
    model = chain()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    scaler = torch.amp.GradScaler("cpu")
    with metric.record():
        outputs = model(X)
    metric.backward(scaler.scale(cross_entropy(outputs)), outputs)
    before = values(model)
    if unscaled:
        scaler.unscale_(optimizer)
    with pytest.raises(TypeError, match="GradScaler"):
        scaler.step(optimizer)
    assert_same(values(model), before)
    metric.natural_gradient()
    backward(metric)
    optimizer.step()
    off = torch.amp.GradScaler("cpu", enabled=False)
    backward(metric)
    off.step(optimizer)


def test_one_of_two_optimizers_misses_its_gradients() -> None:
    model = chain()
    metric = layer_metric(model)
    first = rm.optim.RiemannianSGD(metric, model[0].parameters(), lr=0.1)
    second = rm.optim.RiemannianSGD(metric, model[2].parameters(), lr=0.1)
    backward(metric)
    first.zero_grad()
    with pytest.raises(rm.errors.NotRecordedError, match="grad is None"):
        first.step()
    second.step()


@pytest.mark.parametrize(
    "options",
    [{"momentum": 1.5}, {"lr": -1.0}, {"weight_decay": -1.0}, {"nesterov": True}],
)
def test_numbers_of_groups_are_checked(options: dict[str, Any]) -> None:
    metric = layer_metric(model := chain())
    groups = [{"params": list(model.parameters()), **options}]
    with pytest.raises(ValueError, match=next(iter(options))):
        rm.optim.RiemannianSGD(metric, groups, lr=0.1)


@pytest.mark.parametrize("options", [{"lr": 1e39}, {"lr": 1.0, "weight_decay": 1e39}])
def test_numbers_beyond_the_data_type_change_nothing(options: dict[str, Any]) -> None:
    metric = layer_metric(model := chain().float())
    optimizer = rm.optim.RiemannianSGD(metric, **options)
    backward(metric, X.float())
    before = values(model)
    with pytest.raises(rm.errors.NonFiniteError, match="learning rate"):
        optimizer.step()
    assert_same(values(model), before)
    with pytest.raises(ValueError, match="finite"):
        rm.optim.RiemannianSGD(metric, lr=0.1, weight_decay=float("inf"))


def test_a_step_warns_of_the_gradient_of_another_metric() -> None:
    model = chain()
    one, other = layer_metric(model), layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(one, lr=0.1)
    backward(one)
    backward(other)
    with pytest.warns(UserWarning, match="another metric"):
        optimizer.step()
    backward(other)
    backward(one)
    for p in model.parameters():
        p.grad = 0.5 * p.grad
    optimizer.step()
