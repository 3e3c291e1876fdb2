"""Steps without a learning rate: the quadratic model, and what the loss makes of it."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from mutants.levenberg_marquardt import MUTANTS
from torch import nn

import riemannian_modules as rm
from riemannian_modules.errors import MassError
from riemannian_modules.functional import FunctionalMetric
from riemannian_modules.optim import LevenbergMarquardt
from riemannian_modules.optim.quadratic import QuadraticModel
from riemannian_modules.output import Categorical, Euclidean, Sampled

SEEDS = st.integers(0, 2**31 - 1)


def problem(blocks="model", manifold=None, mass=0.1):
    model = nn.Sequential(
        rm.nn.Linear(4, 3, manifold=manifold), nn.Tanh(), nn.Linear(3, 2)
    )
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    metric = rm.LayerwiseMetric(model, Euclidean(1.0), mass=mass, blocks=blocks)

    def loss():
        return F.mse_loss(model(x), y)

    def backward():
        with metric.record():
            z = model(x)
        value = F.mse_loss(z, y)
        metric.backward(value, z)
        return value.detach()

    return model, metric, loss, backward


def tangents(metric):
    return {
        d.name: d.space().project(torch.randn_like(d.tensor)) for d in metric.parameters
    }


def dense(metric, gradient, directions):
    """The model's value at a combination of directions, from dense matrices."""
    rows = []
    for block in metric.blocks.values():
        for part in block.parts:
            K = part.factor.to_dense().flatten(1)
            rows.append((part.name, K))
    total = [sum(K @ u[name].reshape(-1) for name, K in rows) for u in directions]
    slopes = [sum((gradient[n] * u[n]).sum() for n in u) for u in directions]

    def value(c):
        image = sum(a * t for a, t in zip(c, total, strict=True))
        return sum(a * s for a, s in zip(c, slopes, strict=True)) + 0.5 * image @ image

    def weight(c):
        u = {
            n: sum(a * d[n] for a, d in zip(c, directions, strict=True))
            for n in gradient
        }
        return 0.5 * 0.1 * sum(v.square().sum() for v in u.values())

    return value, weight


def quadratic_findings(kind, blocks, count):
    model, metric, _, backward = problem(blocks)
    backward()
    gradient = {n: p.grad for n, p in model.named_parameters()}
    directions = [tangents(metric) for _ in range(count)]
    step = kind(metric, gradient).best(directions)
    value, weight = dense(metric, gradient, directions)
    c = torch.tensor(step.coefficients, requires_grad=True)
    (slope,) = torch.autograd.grad(value(c) + weight(c), c)
    vectors = {
        n: sum(a * u[n] for a, u in zip(step.coefficients, directions, strict=True))
        for n in gradient
    }
    return {
        "stationary": float(slope.norm()) < 1e-9,
        "decrease": math.isclose(
            step.decrease, -float(value(c.detach())), rel_tol=1e-9
        ),
        "vectors": all(torch.allclose(step.vectors[n], vectors[n]) for n in gradient),
    }


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@given(seed=SEEDS, count=st.integers(1, 3))
def test_the_best_step_is_stationary_in_the_joint_model(blocks, seed, count):
    torch.manual_seed(seed)
    findings = quadratic_findings(QuadraticModel, blocks, count)
    assert all(findings.values()), findings


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_models_are_rejected(name):
    torch.manual_seed(0)
    findings = quadratic_findings(MUTANTS[name], "layer", 2)
    assert not all(findings.values())


def test_dependent_and_tiny_directions_do_no_harm():
    model, metric, _, backward = problem()
    backward()
    gradient = {n: p.grad for n, p in model.named_parameters()}
    u = tangents(metric)
    alone = QuadraticModel(metric, gradient).best([u])
    twice = QuadraticModel(metric, gradient).best(
        [u, {n: 1e-9 * v for n, v in u.items()}]
    )
    assert math.isclose(alone.decrease, twice.decrease, rel_tol=1e-9)
    zero = QuadraticModel(metric, gradient).best(
        [u, {n: 0.0 * v for n, v in u.items()}]
    )
    assert math.isclose(alone.decrease, zero.decrease, rel_tol=1e-9)


@given(seed=SEEDS)
def test_linear_least_squares_are_solved_in_one_step_that_keeps_its_word(seed):
    torch.manual_seed(seed)
    model = nn.Linear(4, 2)
    x, y = torch.randn(9, 4), torch.randn(9, 2)
    metric = rm.LayerwiseMetric(model, Euclidean(1.0), mass=1e-9, blocks="model")
    optimizer = LevenbergMarquardt(metric)
    with metric.record():
        z = model(x)
    metric.backward(F.mse_loss(z, y), z)
    optimizer.step(lambda: F.mse_loss(model(x), y))
    design = torch.cat([x, torch.ones(9, 1)], 1)
    best = torch.linalg.lstsq(design, y).solution
    found = torch.cat([model.weight, model.bias[:, None]], 1).mT
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)
    assert optimizer.report.accepted
    assert math.isclose(optimizer.report.ratio, 1.0, rel_tol=1e-6)


@pytest.mark.parametrize("mass", [1e-6, 1e-3, 1.0, 100.0])
def test_every_initial_mass_gets_there(mass):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    points = torch.linspace(0.0, 3.0, 30).unsqueeze(1)

    def residual(net, z):
        return torch.func.jacrev(net)(z)[0] - z.cos()

    metric = FunctionalMetric(net, residual, Euclidean(2.0), mass=mass)
    optimizer = LevenbergMarquardt(metric)
    losses = []
    for _ in range(40):
        values = metric(points)
        loss = values.square().mean()
        metric.backward(loss, values)
        losses.append(float(loss.detach()))
        optimizer.step(lambda: metric(points).square().mean())
        assert optimizer.report.loss == losses[-1]
    assert losses[-1] < 1e-7
    assert all(after <= before for before, after in pairwise(losses))


def test_the_bend_helps():
    finals = []
    for bend in (None, False):
        torch.manual_seed(5)
        net = nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 1))
        z = torch.rand(30, 2)
        target = (3.0 * z[:, 0]).sin() * z[:, 1]
        metric = FunctionalMetric(net, lambda net, p, t: net(p) - t, Euclidean(2.0))
        optimizer = LevenbergMarquardt(metric, bend=bend)
        for _ in range(20):
            values = metric(z, target)
            metric.backward(values.square().mean(), values)
            optimizer.step(lambda m=metric, e=(z, target): m(*e).square().mean())
        finals.append(optimizer.report.new_loss)
    assert finals[0] < 0.5 * finals[1]


@pytest.mark.parametrize("blocks", ["layer", "model"])
def test_steps_stay_on_the_manifold_and_lower_the_loss(blocks):
    model, metric, loss, backward = problem(blocks, rm.manifolds.Stiefel())
    optimizer = LevenbergMarquardt(metric)
    before = float(loss().detach())
    for _ in range(25):
        backward()
        after = optimizer.step(loss)
        assert after <= before
        before = after
    W = model[0].weight.detach()
    torch.testing.assert_close(W @ W.mT, torch.eye(3), rtol=0.0, atol=1e-12)
    assert after < 0.6


def test_classification_needs_no_learning_rate():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(60, 5)
    y = x[:, :3].argmax(1)
    metric = rm.LayerwiseMetric(model, Categorical(), mass=10.0)
    optimizer = LevenbergMarquardt(metric)
    for _ in range(30):
        with metric.record():
            z = model(x)
        metric.backward(F.cross_entropy(z, y), z)
        final = optimizer.step(lambda: F.cross_entropy(model(x), y))
    assert final < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_without_a_better_point_the_parameters_stay_bit_for_bit(bad):
    model, metric, _, backward = problem()
    optimizer = LevenbergMarquardt(metric, trials=3)
    backward()
    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(lambda: torch.tensor(bad)) == float(metric.loss)
    assert not optimizer.report.accepted
    assert optimizer.report.trials == 3
    assert "no step" in str(optimizer.report)
    assert all(map(torch.equal, before, model.parameters()))
    assert math.isclose(optimizer.report.mass, 4.0**3)


def linear(dtype, mass):
    """Least squares that a step or two solve."""
    torch.manual_seed(0)
    model = nn.Linear(8, 1).to(dtype)
    x = torch.randn(64, 8).to(dtype)
    y = x.sum(1, keepdim=True) + 1
    metric = rm.LayerwiseMetric(model, Euclidean(2.0), mass=mass)
    optimizer = LevenbergMarquardt(metric)

    def loss():
        return F.mse_loss(model(x), y)

    def step():
        with metric.record():
            z = model(x)
        metric.backward(F.mse_loss(z, y), z)
        return optimizer.step(loss)

    return model, optimizer, step


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_goes_on_where_nothing_is_left_to_gain(dtype):
    _, optimizer, step = linear(dtype, 1e-2)
    for _ in range(60):
        final = step()
    assert final < 1e3 * torch.finfo(dtype).eps ** 2
    assert not optimizer.report.accepted
    # With the mass that served it last, and not with what was tried since.
    assert optimizer.report.mass < 1e4


def test_a_mass_that_is_far_too_small_is_found():
    torch.manual_seed(0)
    model, metric, _, backward = problem("layer", mass=1e-12)
    optimizer = LevenbergMarquardt(metric, trials=3)
    for _ in range(12):
        backward()
        # Falls only where the step is short: the model's promise means nothing.
        start = [p.detach().clone() for p in model.parameters()]

        def far(start=start):
            moved = [
                (a - b).norm() for a, b in zip(start, model.parameters(), strict=True)
            ]
            length = sum(m * m for m in moved).sqrt()
            return metric.loss + length * (length - 1e-3)

        optimizer.step(far)
        if optimizer.report.accepted:
            break
    assert optimizer.report.accepted
    assert optimizer.report.mass > 1e6


def test_the_mass_has_an_end():
    _, optimizer, step = linear(torch.float32, 1e-2)
    step()
    for _ in range(20):
        assert optimizer._weigh(1e3) >= 1.0
    assert optimizer.param_groups[0]["scale"] == pytest.approx(1e20)
    assert optimizer._weigh(0.5) == 0.5


def test_it_refuses_settings_out_of_range():
    _, metric, *_ = problem()
    with pytest.raises(ValueError, match="bend=True"):
        LevenbergMarquardt(metric, bend=True)
    with pytest.raises(ValueError, match="0 < shrink"):
        LevenbergMarquardt(metric, shrink=2.0)
    with pytest.raises(MassError, match="multiply"):
        metric.scale_mass(0.0)


def test_a_scaled_mass_counts_at_once():
    _, metric, _, backward = problem(mass=0.2)
    backward()
    before = metric.blocks["model"].to_dense()
    gram = before - 0.2 * torch.eye(len(before))
    metric.scale_mass(3.0)
    after = metric.blocks["model"].to_dense()
    torch.testing.assert_close(after, gram + 0.6 * torch.eye(len(before)))
    backward()
    torch.testing.assert_close(metric.blocks["model"].to_dense(), after)


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize(
    "manifold", [None, rm.manifolds.Stiefel(), rm.manifolds.Sphere()], ids=str
)
def test_sampled_rows_and_every_kind_of_block_lower_the_loss(blocks, manifold):
    model = nn.Sequential(
        rm.nn.Linear(4, 3, manifold=manifold), nn.Tanh(), nn.Linear(3, 2)
    )
    x, y = torch.randn(40, 4), torch.randn(40, 2)
    output = Sampled(Euclidean(1.0), probes=2)
    metric = rm.LayerwiseMetric(model, output, mass=0.1, blocks=blocks)
    optimizer = LevenbergMarquardt(metric)
    before = start = float(F.mse_loss(model(x), y).detach())
    for _ in range(15):
        with metric.record():
            z = model(x)
        metric.backward(F.mse_loss(z, y), z)
        after = optimizer.step(lambda: F.mse_loss(model(x), y))
        assert after <= before
        before = after
    metric.parameters.verify()
    assert after < 0.95 * start


@pytest.mark.parametrize("precision", [None, torch.float32])
@pytest.mark.parametrize("known", [True, False])
def test_the_mass_stops_where_the_small_matrix_loses_its_digits(precision, known):
    torch.manual_seed(2)
    model = nn.Linear(4, 2).float()
    x = torch.randn(3, 4, dtype=torch.float32)
    y = model(x).detach() + 1.0
    metric = rm.LayerwiseMetric(
        model, Euclidean(1.0), mass=1e-3, blocks="model", precision=precision
    )
    optimizer = LevenbergMarquardt(metric, shrink=1e-2)
    shrunk = 0
    for _ in range(12):
        with metric.record():
            z = model(x)
        # Another target each time, so that every step keeps its word.
        metric.backward(F.mse_loss(z, y), z)
        if not known:  # as on a device where reading it would make the host wait
            for block in metric.blocks.values():
                _ = block.inverse.factor
                block.inverse._trace = math.inf
        before = optimizer.param_groups[0]["scale"]
        optimizer.step(lambda y=y: F.mse_loss(model(x), y))
        shrunk += optimizer.param_groups[0]["scale"] < before
        y = y + torch.randn(3, 2, dtype=torch.float32)
    eps = torch.finfo(torch.float64 if precision is None else precision).eps
    rows = x.square().sum() / 3 * 2 + 2
    bound = eps * float(rows) / 1e-3
    lowest = 1e-3 * optimizer.param_groups[0]["scale"]
    assert lowest >= 0.99 * bound
    assert shrunk >= (1 if precision is None else 0)
    assert lowest < 1e4 * bound or precision is not None


def test_an_interrupted_step_leaves_the_mass_bit_for_bit():
    torch.manual_seed(0)
    x, model = torch.randn(5, 3), torch.nn.Linear(3, 1)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(2.0), mass=3e-3)
    optimizer = rm.optim.LevenbergMarquardt(metric, grow=3.0)
    with metric.record():
        outputs = model(x)
    metric.backward(outputs.square().mean(), outputs)
    losses = iter([100.0])
    with pytest.raises(StopIteration):
        optimizer.step(lambda: next(losses))
    assert {d.mass.scalar for d in metric.parameters} == {3e-3}
    assert optimizer.param_groups[0]["scale"] == 1.0


@pytest.mark.parametrize(
    "kind", [LevenbergMarquardt, rm.optim.TrustRegion, rm.optim.LineSearch]
)
def test_a_trial_that_overflows_is_one_that_failed(kind):
    model = rm.functional.Parameters(k=torch.tensor([-20.0]))

    def residual(net, x):
        return net["k"].exp() * x - 1e-3

    metric = FunctionalMetric(model, residual, mass=1e-22)
    optimizer, x = kind(metric), torch.ones(3)
    values = metric(x)
    start = values.square().mean()
    metric.backward(start, values)
    reached = optimizer.step(lambda: metric(x).square().mean())
    assert math.isfinite(reached)
    assert reached <= start.item()
    assert all(bool(p.isfinite().all()) for p in model.parameters())
