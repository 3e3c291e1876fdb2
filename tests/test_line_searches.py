"""Lengths of steps: rules on random functions, retracted curves, trust regions."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.line_searches import CURVES, MODELS, RULES, WOLFES
from torch import nn

import riemannian_modules as rm
from riemannian_modules.errors import NonFiniteError, NotRecordedError
from riemannian_modules.optim import (
    Armijo,
    LineSearch,
    StrongWolfe,
    TrustRegion,
    trust_region,
)
from riemannian_modules.optim.line_search import RetractedCurve
from riemannian_modules.optim.trial import Trial
from riemannian_modules.output import Euclidean, Sampled
from riemannian_modules.retractions import Default

SEEDS = st.integers(0, 2**31 - 1)
MANIFOLDS = {
    "euclidean": lambda: None,
    "stiefel": rm.manifolds.Stiefel,
    "sphere": rm.manifolds.Sphere,
    "poincare": rm.manifolds.PoincareBall,
}


class Wave:
    """A smooth function that is bounded below, with its derivative."""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        a, b, c = torch.rand(3, 4, generator=generator)
        self.heights, self.speeds, self.shifts = a, 6.0 * b, 6.3 * c
        self.pull = float(torch.rand((), generator=generator)) + 0.05
        self.place = 3.0 * float(torch.rand((), generator=generator)) + 0.1

    def value(self, t):
        wave = self.heights * (self.speeds * t + self.shifts).sin()
        return float(wave.sum()) + self.pull * (t - self.place) ** 2

    def slope(self, t):
        wave = self.heights * self.speeds * (self.speeds * t + self.shifts).cos()
        return float(wave.sum()) + 2.0 * self.pull * (t - self.place)


def rule_findings(rule, seed, first):
    wave = Wave(seed)
    value, slope = wave.value(0.0), wave.slope(0.0)
    if slope > -1e-3:
        return {}
    found = rule.search(wave, value, slope, first)
    t = found.length
    findings = {
        "satisfied": found.satisfied and found.finite and t > 0.0,
        "value": found.value == wave.value(t),
        "decrease": wave.value(t) <= value + rule.sufficient * t * slope,
    }
    if isinstance(rule, StrongWolfe):
        findings["flat"] = abs(wave.slope(t)) <= -rule.curvature * slope
    return findings


@given(
    seed=SEEDS,
    first=st.floats(1e-3, 1e3),
    rule=st.sampled_from(
        [Armijo(), Armijo(0.4), StrongWolfe(), StrongWolfe(curvature=0.1)]
    ),
)
@settings(max_examples=200)
def test_what_a_rule_finds_fulfils_its_conditions(rule, seed, first):
    findings = rule_findings(rule, seed, first)
    assert all(findings.values()), findings


@pytest.mark.parametrize("kind", [*RULES.values(), *WOLFES.values()])
def test_wrong_rules_are_rejected(kind):
    rule = kind(0.3) if issubclass(kind, Armijo) else kind(1e-4, 0.1)
    assert not all(all(rule_findings(rule, seed, 1.0).values()) for seed in range(100))


class Wall(Wave):
    """Infinite beyond some point."""

    def value(self, t):
        return math.inf if t > 0.02 else -t

    def slope(self, t):
        return -1.0


def test_walls_make_rules_go_back():
    found = Armijo().search(Wall(0), 0.0, -1.0, 1.0)
    assert found.satisfied
    assert 0.0 < found.length <= 0.02
    found = StrongWolfe().search(Wall(0), 0.0, -1.0, 1.0)
    assert not found.satisfied  # nowhere is it flat
    assert 0.015 < found.length <= 0.02
    assert found.value == -found.length


@pytest.mark.parametrize("lost", [math.nan, math.inf])
def test_a_slope_that_is_no_number_counts_as_too_far(lost):
    class Cliff(Wave):
        """Its value goes on falling where its slope is lost."""

        def value(self, t):
            return (t - 1.0) ** 2 if t < 2.0 else -t

        def slope(self, t):
            return 2.0 * (t - 1.0) if t < 2.0 else lost

    found = StrongWolfe(curvature=0.1).search(Cliff(0), 1.0, -2.0, 16.0)
    assert found.satisfied
    assert abs(found.length - 1.0) <= 0.1


@pytest.mark.parametrize("rule", [Armijo(trials=3), StrongWolfe(trials=3)])
@pytest.mark.parametrize("level", [math.nan, math.inf, 1.0])
def test_where_nothing_is_good_the_length_is_zero(rule, level):
    class Flat:
        def value(self, t):
            return level

        def slope(self, t):
            raise AssertionError("a slope is of no use here")

    found = rule.search(Flat(), 0.0, -1.0, 1.0)
    assert (found.length, found.value, found.satisfied) == (0.0, 0.0, False)
    assert found.finite is math.isfinite(level)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Armijo(0.0),
        lambda: Armijo(0.6),
        lambda: Armijo(trials=0),
        lambda: StrongWolfe(0.5, 0.4),
        lambda: StrongWolfe(curvature=1.0),
        lambda: StrongWolfe(trials=0),
    ],
)
def test_rules_refuse_numbers_out_of_range(make):
    with pytest.raises(ValueError, match=r"curvature|sufficient"):
        make()


# --- curves and steps


def problem(manifold="euclidean", blocks="model", mass=0.1, output=None):
    model = nn.Sequential(
        rm.nn.Linear(4, 3, manifold=MANIFOLDS[manifold]()), nn.Tanh(), nn.Linear(3, 2)
    )
    x, y = torch.randn(8, 4), torch.randn(8, 2)
    metric = rm.LayerwiseMetric(
        model, output or Euclidean(1.0), mass=mass, blocks=blocks
    )

    def loss():
        return F.mse_loss(model(x), y)

    def backward():
        with metric.record():
            z = model(x)
        value = F.mse_loss(z, y)
        metric.backward(value, z)

    return model, metric, loss, backward


def curve_error(kind, manifold, seed, t):
    torch.manual_seed(seed)
    _, metric, loss, _ = problem(manifold)
    moving = {d.name: d for d in metric.parameters}
    direction = {
        n: d.space().project(torch.randn_like(d.tensor)) for n, d in moving.items()
    }
    curve = kind(Trial(moving, Default()), direction, loss)
    h = 1e-5
    difference = (curve.value(t + h) - curve.value(t - h)) / (2.0 * h)
    curve.value(t)
    return abs(curve.slope(t) - difference) / (1.0 + abs(difference))


@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(seed=SEEDS, t=st.floats(0.0, 1.5))
@settings(max_examples=10)
def test_slopes_are_those_of_the_retracted_curve(manifold, seed, t):
    assert curve_error(RetractedCurve, manifold, seed, t) < 1e-6


@pytest.mark.parametrize("kind", CURVES.values())
def test_wrong_slopes_are_rejected(kind):
    assert curve_error(kind, "stiefel", 0, 0.8) > 1e-3


@pytest.mark.parametrize("blocks", ["tensor", "model"])
@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(seed=SEEDS, wolfe=st.booleans())
@settings(max_examples=5)
def test_steps_fulfil_the_conditions(manifold, blocks, seed, wolfe):
    torch.manual_seed(seed)
    _, metric, loss, backward = problem(manifold, blocks)
    rule = StrongWolfe(curvature=0.5) if wolfe else Armijo()
    optimizer = LineSearch(metric, rule, lr=4.0)
    before = float(loss().detach())
    for _ in range(3):
        backward()
        after = optimizer.step(loss)
        report = optimizer.report
        assert report.accepted
        assert report.loss == before
        assert after <= before + rule.sufficient * report.length * report.slope
        torch.testing.assert_close(after, float(loss().detach()))
        before = after
    metric.parameters.verify()


@pytest.mark.parametrize("rule", [Armijo(), StrongWolfe()])
def test_least_squares_are_solved(rule):
    model = nn.Linear(4, 2)
    x, y = torch.randn(30, 4), torch.randn(30, 2)
    # The metric is half of the Hessian: whole steps go twice too far.
    metric = rm.LayerwiseMetric(model, Euclidean(0.5), mass=1e-8, blocks="model")
    optimizer = LineSearch(metric, rule)
    for _ in range(6):
        with metric.record():
            z = model(x)
        metric.backward(F.mse_loss(z, y), z)
        optimizer.step(lambda: F.mse_loss(model(x), y))
    design = torch.cat([x, torch.ones(30, 1)], 1)
    best = torch.linalg.lstsq(design, y).solution
    found = torch.cat([model.weight, model.bias[:, None]], 1).mT
    torch.testing.assert_close(found, best, rtol=1e-4, atol=1e-4)


def test_the_metric_of_the_start_is_left_alone():
    _, metric, loss, backward = problem()
    optimizer = LineSearch(metric, StrongWolfe())
    backward()
    blocks, version = metric.blocks, metric.version
    grads = [d.tensor.grad for d in metric.parameters]
    optimizer.step(loss)
    assert metric.blocks is blocks
    assert metric.version == version
    assert all(
        d.tensor.grad is g for d, g in zip(metric.parameters, grads, strict=True)
    )


OPTIMIZERS = {
    "armijo": lambda m: LineSearch(m, Armijo(trials=3)),
    "wolfe": lambda m: LineSearch(m, StrongWolfe(trials=3)),
    "trust region": lambda m: TrustRegion(m, trials=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("manifold", ["euclidean", "stiefel"])
def test_without_a_better_point_the_parameters_stay_bit_for_bit(name, manifold):
    model, metric, _, backward = problem(manifold)
    optimizer = OPTIMIZERS[name](metric)
    backward()
    before = [p.detach().clone() for p in model.parameters()]
    assert optimizer.step(lambda: torch.tensor(1e9)) == float(metric.loss)
    assert not optimizer.report.accepted
    assert optimizer.report.trials == 3
    assert "no " in str(optimizer.report)
    assert all(map(torch.equal, before, model.parameters()))
    metric.parameters.require_unmoved(model.parameters())


@pytest.mark.parametrize("name", ["armijo", "wolfe"])
def test_losses_that_are_no_numbers_are_an_error(name):
    model, metric, _, backward = problem()
    optimizer = OPTIMIZERS[name](metric)
    backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match="all 3 points"):
        optimizer.step(lambda: torch.tensor(math.nan))
    assert all(map(torch.equal, before, model.parameters()))


def test_they_refuse_settings_out_of_range():
    _, metric, loss, backward = problem()
    with pytest.raises(TypeError, match="instance"):
        LineSearch(metric, Armijo)
    with pytest.raises(ValueError, match="lr=0"):
        LineSearch(metric, lr=0.0)
    for wrong in ({"accept": 0.5}, {"trials": 0}):
        with pytest.raises(ValueError, match="accept <= bad"):
            TrustRegion(metric, **wrong)
    for wrong in ({"shrink": 1.0}, {"grow": 0.5}):
        with pytest.raises(ValueError, match="shrink < 1"):
            TrustRegion(metric, **wrong)
    with pytest.raises(ValueError, match="radius=-1"):
        TrustRegion(metric, radius=-1.0)
    backward()
    with pytest.raises(NotRecordedError, match="graph"):
        LineSearch(metric, StrongWolfe()).step(lambda: loss().item())


# --- trust regions


def region_findings(seed, radius, curvature):
    """Steps on least squares, where the model and its mistakes are known.

    The loss is ``curvature`` times as curved as the model says, so the ratio of a step
    that is the part p of the whole one is ``(p - c p^2 / 2) / (p - p^2 / 2)``.
    """
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    x, y = torch.randn(12, 3), torch.randn(12, 2)
    output = Euclidean(1.0 / curvature)
    metric = rm.LayerwiseMetric(model, output, mass=1e-9, blocks="model")
    optimizer = TrustRegion(metric, radius=radius, trials=1)
    with metric.record():
        z = model(x)
    metric.backward(F.mse_loss(z, y), z)
    before = [p.detach().clone() for p in model.parameters()]
    block = metric.blocks["model"]
    e = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    G = block.to_dense()
    whole = -torch.linalg.solve(G, e)
    norm = float((whole @ G @ whole).sqrt())
    optimizer.step(lambda: F.mse_loss(model(x), y))
    report = optimizer.report
    p = 1.0 if radius is None else min(1.0, radius / norm)
    predicted = (p - 0.5 * p * p) * norm**2
    ratio = (p - 0.5 * curvature * p * p) / (p - 0.5 * p * p)
    taken = ratio > 1e-4
    if ratio < 0.25:
        after = 0.25 * p * norm
    elif radius is None:
        after = norm
    elif ratio > 0.75 and p * norm >= 0.99 * radius:
        after = 2.0 * radius
    else:
        after = radius
    moved = torch.cat(
        [
            (a.detach() - b).reshape(-1)
            for a, b in zip(model.parameters(), before, strict=True)
        ]
    )
    wanted = p * whole if taken else 0.0 * whole
    close = {"rel_tol": 1e-5, "abs_tol": 1e-9}
    return {
        "norm": math.isclose(report.norm, p * norm, **close),
        "predicted": math.isclose(report.predicted, predicted, **close),
        "ratio": math.isclose(report.ratio, ratio, rel_tol=1e-4, abs_tol=1e-5),
        "accepted": report.accepted is taken,
        "radius": math.isclose(report.radius, after, **close),
        "kept": optimizer.param_groups[0]["radius"] == report.radius,
        "step": torch.allclose(moved, wanted, rtol=1e-4, atol=1e-7),
    }


@given(
    seed=SEEDS,
    radius=st.one_of(st.none(), st.floats(1e-3, 10.0)),
    curvature=st.sampled_from([0.5, 1.0, 1.6, 2.5, 4.0]),
)
@settings(max_examples=40)
def test_regions_follow_the_ratio(seed, radius, curvature):
    findings = region_findings(seed, radius, curvature)
    assert all(findings.values()), findings


@pytest.mark.parametrize("name", MODELS)
def test_wrong_regions_are_rejected(name, monkeypatch):
    monkeypatch.setattr(trust_region, "QuadraticModel", MODELS[name])
    assert not all(all(region_findings(seed, 0.3, 1.0).values()) for seed in range(5))


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_regions_train_blocks_and_manifolds(manifold, blocks):
    _, metric, loss, backward = problem(manifold, blocks)
    optimizer = TrustRegion(metric, radius=1e-2)
    start = before = float(loss().detach())
    for _ in range(25):
        backward()
        after = optimizer.step(loss)
        assert after <= before
        before = after
    metric.parameters.verify()
    assert after < 0.8 * start
    assert optimizer.report.radius > 1e-2


def near_the_minimum(**options):
    """Least squares in float32, where a short step gains less than rounding."""
    torch.manual_seed(0)
    x, y = torch.randn(20, 3).float(), torch.randn(20, 1).float()
    model = nn.Linear(3, 1).float()
    found = torch.linalg.lstsq(torch.cat([x, torch.ones_like(y)], 1), y).solution
    with torch.no_grad():
        model.weight.copy_(found[:3].mT + 1e-3)
        model.bias.copy_(found[3])
    metric = rm.LayerwiseMetric(model, Euclidean(2.0), mass=1e-3)
    with metric.record():
        z = model(x)
    metric.backward(F.mse_loss(z, y), z)
    optimizer = TrustRegion(metric, **options)
    return metric, optimizer, lambda: F.mse_loss(model(x), y)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({"radius": 1e-6, "largest": 1e-6}, 1e-6),
        ({"radius": 1e-6}, 1e-6),
        ({"radius": 1e-5, "largest": 1e-4}, 1e-5),
        ({"largest": 1e-6}, 1e-6),
    ],
)
def test_no_step_is_longer_than_a_radius_that_was_given(options, most):
    metric, optimizer, loss = near_the_minimum(**options)
    before = {d.name: d.tensor.detach().clone() for d in metric.parameters}
    optimizer.step(loss)
    assert optimizer.report.norm <= most * (1.0 + 1e-6)
    (block,) = metric.blocks.values()
    moved = {d.name: d.tensor.detach() - before[d.name] for d in metric.parameters}
    # The parameters themselves are rounded.
    assert float(block.norm(moved)) <= most + 1e-6
    # It may have grown, once.
    assert optimizer.report.radius <= min(2.0 * most, options.get("largest", math.inf))


def test_a_radius_that_the_search_has_found_is_widened_up_to_the_largest():
    _, optimizer, loss = near_the_minimum(radius=1.0)
    group = optimizer.param_groups[0]
    group["radius"] = group["found"] = 1e-7
    optimizer.step(loss)
    assert optimizer.report.norm > 1e-4
    _, optimizer, loss = near_the_minimum(largest=1e-3)
    group = optimizer.param_groups[0]
    group["radius"] = group["found"] = 1e-7
    optimizer.step(loss)
    assert 1e-4 < optimizer.report.norm <= 1e-3 * (1.0 + 1e-9)


def test_regions_of_sampled_metrics_and_their_largest_radius():
    _, metric, loss, backward = problem(output=Sampled(Euclidean(1.0)))
    optimizer = TrustRegion(metric, radius=0.01, largest=0.03)
    for _ in range(10):
        backward()
        optimizer.step(loss)
        assert optimizer.report.norm <= 0.03 * (1.0 + 1e-9)
    assert optimizer.report.radius == 0.03
    assert "edge" in str(optimizer.report)


@pytest.mark.parametrize(
    "kind", [LineSearch, TrustRegion, rm.optim.LevenbergMarquardt, "wolfe"]
)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_gradients_that_are_no_numbers_are_named_and_nothing_changes(kind, bad):
    model, metric, loss, backward = problem(blocks="layer")
    optimizer = OPTIMIZERS[kind](metric) if kind == "wolfe" else kind(metric)
    backward()
    optimizer.step(loss)
    backward()
    model[0].bias.grad[1] = bad
    states = [
        model.state_dict,
        optimizer.state_dict,
        lambda: metric.state_dict()["mass"],
    ]
    before = copy.deepcopy([state() for state in states])
    with pytest.raises(NonFiniteError, match=r"gradient of '0\.bias' holds NaN") as e:
        optimizer.step(loss)
    assert "weight" not in str(e.value)
    after = [state() for state in states]
    torch.testing.assert_close(after, before, rtol=0.0, atol=0.0)
    metric.parameters.require_unmoved(model.parameters())
    backward()
    assert optimizer.step(loss) <= float(metric.loss)


def test_directions_that_are_no_numbers_are_an_error():
    _, metric, _, backward = problem()
    backward()
    gradient = {d.name: d.tensor.grad for d in metric.parameters}
    quadratic = rm.optim.quadratic.QuadraticModel(metric, gradient)
    direction = {name: e / 0.0 for name, e in gradient.items()}
    with pytest.raises(NonFiniteError, match="the gradient is finite, but"):
        quadratic.best([direction])


@pytest.mark.parametrize("scale", [1e20, 1e-23])
@pytest.mark.parametrize("manifold", ["euclidean", "stiefel"])
def test_slopes_have_the_range_of_float64(scale, manifold):
    def run(dtype):
        torch.manual_seed(0)
        model, metric, _, _ = problem(manifold)
        model.to(dtype)
        x, y = torch.randn(8, 4).to(dtype), torch.randn(8, 2).to(dtype)
        with metric.record():
            z = model(x)
        metric.backward(scale * F.mse_loss(z, y), z)
        moving = dict(metric.gradients.moving())
        gradient = {name: metric.gradients.of(name) for name in moving}
        optimizer = LineSearch(metric, StrongWolfe(), lr=1e-3 / scale)
        trial = Trial(moving, Default())
        down = optimizer._descent(moving)
        curve = RetractedCurve(trial, down, lambda: scale * F.mse_loss(model(x), y))
        curve.value(1e-3 / scale)
        slope = curve.slope(1e-3 / scale)
        trial.restore()
        optimizer.step(lambda: scale * F.mse_loss(model(x), y))
        step = rm.optim.quadratic.QuadraticModel(metric, gradient).best([down])
        report = optimizer.report
        return [slope, report.slope, report.length * scale, step.decrease]

    assert run(torch.float32) == pytest.approx(run(torch.float64), rel=1e-3)
