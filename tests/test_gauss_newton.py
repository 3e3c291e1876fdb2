"""Gauss-Newton steps for many outputs: products, preconditioner, solver, optimizer."""

import math
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.gauss_newton import INVERSES, MAPS, SOLVERS
from torch import nn

import riemannian_modules as rm
from riemannian_modules.block import Part
from riemannian_modules.errors import (
    NonFiniteError,
    NotRecordedError,
    OutputMetricError,
)
from riemannian_modules.factors import BiasFactor, DenseFactor, LinearFactor
from riemannian_modules.functional import FunctionalMetric
from riemannian_modules.optim import GaussNewton, kronecker
from riemannian_modules.optim.conjugate import Proximal
from riemannian_modules.optim.kronecker import KroneckerInverse, sides
from riemannian_modules.optim.output_map import OutputMap
from riemannian_modules.output import Categorical, Euclidean, Sampled, Weighted

SEEDS = st.integers(0, 2**31 - 1)
MANIFOLDS = {
    "euclidean": lambda: None,
    "stiefel": rm.manifolds.Stiefel,
    "sphere": rm.manifolds.Sphere,
}


def problem(manifold="euclidean", output=None, mass=0.1, dtype=None):
    model = nn.Sequential(
        rm.nn.Linear(4, 3, manifold=MANIFOLDS[manifold]()), nn.Tanh(), nn.Linear(3, 2)
    ).to(dtype)
    x, y = torch.randn(8, 4, dtype=dtype), torch.randn(8, 2, dtype=dtype)
    output = Sampled(Euclidean(1.0)) if output is None else output
    metric = rm.LayerwiseMetric(model, output, mass=mass)

    def pull_back():
        with metric.record():
            z = model(x)
        metric.pull_back(z)

    return model, metric, pull_back, lambda: model(x), lambda z: F.mse_loss(z, y)


def tensors(metric):
    return {d.name: d.tensor for d in metric.parameters}


def tangents(metric):
    return {
        d.name: d.space().project(torch.randn_like(d.tensor)) for d in metric.parameters
    }


def dense_jacobian(model, x):
    names = [name for name, _ in model.named_parameters()]
    values = [p.detach().as_subclass(torch.Tensor) for p in model.parameters()]

    def outputs(*values):
        return torch.func.functional_call(
            model, dict(zip(names, values, strict=True)), (x,)
        )

    jacobians = torch.func.jacrev(outputs, tuple(range(len(values))))(*values)
    rows = outputs(*values).numel()
    return torch.cat([j.reshape(rows, -1) for j in jacobians], 1)


def stacked(u):
    return torch.cat([x.reshape(-1) for x in u.values()])


# --- products


def map_findings(kind, output, seed):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    x = torch.randn(5, 4)
    z = model(x)
    map = kind(dict(model.named_parameters()), output, z, "mean")
    J = dense_jacobian(model, x)
    u = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    v = torch.randn_like(z)
    exact = output
    if isinstance(exact, Weighted) and isinstance(exact.metric, Sampled):
        exact = Weighted(exact.metric.metric, exact.weights)
    exact = exact.metric if isinstance(exact, Sampled) else exact
    L = exact.factor(z.detach()).flatten(2)
    H = torch.block_diag(*(L.mT @ L)) / exact.terms(z)
    return {
        "push": torch.allclose(map.push(u)[0].reshape(-1), J @ stacked(u)),
        "pull": torch.allclose(stacked(map.pull([v])), J.mT @ v.reshape(-1)),
        "lower": torch.allclose(map.lower([v])[0].reshape(-1), H @ v.reshape(-1)),
    }


WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 1.0])


@pytest.mark.parametrize(
    "output",
    [
        Euclidean(0.7),
        Sampled(Categorical()),
        Weighted(Sampled(Categorical()), WEIGHTS),
        Sampled(Weighted(Euclidean(), WEIGHTS)),
    ],
    ids=repr,
)
@given(seed=SEEDS)
@settings(max_examples=10)
def test_products_are_those_of_the_dense_jacobian(output, seed):
    findings = map_findings(OutputMap, output, seed)
    assert all(findings.values()), findings


@pytest.mark.parametrize("name", MAPS)
def test_wrong_maps_are_rejected(name):
    assert not all(map_findings(MAPS[name], Euclidean(0.7), 0).values())


def test_several_outputs_and_parameters_that_one_does_not_see():
    a, b = nn.Linear(3, 2), nn.Linear(3, 1)
    x = torch.randn(4, 3)
    output = {"a": Euclidean(), "b": Euclidean(2.0), "c": Euclidean()}
    values = {"a": a(x), "b": b(x), "c": torch.ones(4, 1)}
    named = {"a": a.weight, "b": b.weight, "spare": nn.Parameter(torch.ones(2))}
    map = OutputMap(named, output, values, "sum")
    u = {n: torch.randn_like(p) for n, p in named.items()}
    first, second, third = map.push(u)
    torch.testing.assert_close(first, x @ u["a"].mT)
    torch.testing.assert_close(second, x @ u["b"].mT)
    assert not third.any()
    pulled = map.pull([first, second, third])
    torch.testing.assert_close(pulled["b"], second.mT @ x)
    assert not pulled["spare"].any()
    torch.testing.assert_close(map.lower([first, second, third])[1], 2.0 * second)


# --- preconditioner


def inverse_findings(kind, manifold, seed):
    torch.manual_seed(seed)
    _, metric, pull_back, *_ = problem(manifold)
    pull_back()
    parts = [part for block in metric.blocks.values() for part in block.parts]
    inverse = kind(parts)
    e, f = ({p.name: torch.randn_like(p.space.point) for p in parts} for _ in "ef")
    x, y = inverse(e), inverse(f)
    size = stacked(x).norm() * stacked(f).norm()
    bias = next(p for p in parts if p.name == "2.bias")
    rows = bias.factor.to_dense()
    exact = torch.linalg.solve(
        rows.mT @ rows + bias.space.mass.scalar * torch.eye(2), e["2.bias"]
    )
    return {
        "symmetric": float((stacked(x) @ stacked(f) - stacked(y) @ stacked(e)).abs())
        < 1e-12 * float(size),
        "positive": float(stacked(x) @ stacked(e)) > 0.0,
        "tangent": all(
            torch.allclose(p.space.project(x[p.name]), x[p.name]) for p in parts
        ),
        "exact for vectors": torch.allclose(x["2.bias"], exact),
    }


@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(seed=SEEDS)
@settings(max_examples=10)
def test_the_preconditioner_is_symmetric_positive_and_tangent(manifold, seed):
    findings = inverse_findings(KroneckerInverse, manifold, seed)
    assert all(findings.values()), findings


@pytest.mark.parametrize("name", INVERSES)
def test_wrong_preconditioners_are_rejected(name):
    assert not all(inverse_findings(INVERSES[name], "stiefel", 0).values())


@given(seed=SEEDS, r=st.integers(1, 3))
@settings(max_examples=15)
def test_sides_without_rows_are_those_of_the_rows(seed, r):
    torch.manual_seed(seed)
    cotangents = torch.randn(r, 5, 1, 4)
    for factor in (
        LinearFactor(torch.randn(5, 1, 3), cotangents),
        LinearFactor(torch.randn(5, 2, 3), torch.randn(r, 5, 2, 4)),
        BiasFactor(torch.randn(r, 5, 2, 4)),
    ):
        rows = factor.to_dense().reshape(factor.rank, 4, -1)
        found = sides(factor)
        torch.testing.assert_close(found.left, (rows @ rows.mT).sum(0))
        torch.testing.assert_close(found.right, (rows.mT @ rows).sum(0))
        torch.testing.assert_close(found.trace, rows.square().sum())
    # With more positions than entries the rows are the shorter way.
    assert sides(LinearFactor(torch.randn(5, 4, 3), torch.randn(r, 5, 4, 4))) is None
    assert sides(DenseFactor(rows)) is None


@given(seed=SEEDS)
@settings(max_examples=10)
def test_rows_in_chunks_make_the_same_sides(seed):
    torch.manual_seed(seed)
    rows = torch.randn(7, 3, 2, 2)
    space = rm.TangentSpace(rm.manifolds.Euclidean(), torch.zeros(3, 2, 2))
    e = torch.randn(3, 2, 2)
    found = KroneckerInverse([Part("w", space, DenseFactor(rows))])({"w": e})["w"]
    matrices = rows.flatten(2)
    left = torch.einsum("roi,rpi->op", matrices, matrices)
    right = torch.einsum("roi,roj->ij", matrices, matrices)
    share, ratio = left.trace().sqrt(), math.sqrt(4 / 3)
    a = torch.linalg.inv(left / share + ratio * torch.eye(3))
    b = torch.linalg.inv(right / share + torch.eye(4) / ratio)
    torch.testing.assert_close(found.flatten(1), a @ e.flatten(1) @ b)


def test_chunks_and_long_sides(monkeypatch):
    rows = torch.randn(7, 3, 4)
    space = rm.TangentSpace(rm.manifolds.Euclidean(), torch.zeros(3, 4))
    part, e = Part("w", space, DenseFactor(rows)), {"w": torch.randn(3, 4)}
    whole = KroneckerInverse([part])(e)["w"]
    monkeypatch.setattr(kronecker, "_CHUNK_ENTRIES", 25)
    torch.testing.assert_close(KroneckerInverse([part])(e)["w"], whole)
    monkeypatch.setattr(kronecker, "_LONGEST", 3)
    found = KroneckerInverse([part])(e)["w"]
    left = torch.einsum("roi,rpi->op", rows, rows)
    right = rows.square().sum((0, 1))
    share, ratio = right.sum().sqrt(), math.sqrt(4 / 3)
    a = torch.linalg.inv(left / share + ratio * torch.eye(3))
    torch.testing.assert_close(found, a @ e["w"] / (right / share + 1.0 / ratio))


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_a_scaled_mass_is_that_mass(manifold):
    model, metric, pull_back, *_ = problem(manifold)
    torch.manual_seed(5)
    pull_back()
    parts = [part for block in metric.blocks.values() for part in block.parts]
    e = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    scaled = KroneckerInverse(parts)
    # One that was used before it is scaled has to factorise anew.
    scaled(e)
    scaled.scale_mass(3.0)
    metric.scale_mass(3.0)
    parts = [part for block in metric.blocks.values() for part in block.parts]
    anew, found = KroneckerInverse(parts)(e), scaled(e)
    for name in e:
        torch.testing.assert_close(found[name], anew[name])


# --- solver


def solver_findings(kind, manifold, seed, warm):
    torch.manual_seed(seed)
    model, metric, pull_back, outputs, loss = problem(manifold, Euclidean(1.0))
    pull_back()
    z = outputs()
    map = OutputMap(tensors(metric), metric.output, z, "mean")
    (costate,) = torch.autograd.grad(loss(z), z, retain_graph=True)
    e = map.pull([costate])
    spaces = {d.name: d.space() for d in metric.parameters}
    inverse = KroneckerInverse(
        part for block in metric.blocks.values() for part in block.parts
    )
    start = tangents(metric) if warm else None
    found = kind(map, spaces, e).minimise(inverse, start, 80, 0.0)
    # The dense problem in an orthonormal basis of the product of tangent spaces.
    joint = rm.LayerwiseMetric(model, Euclidean(1.0), mass=0.1, blocks="model")
    with joint.record():
        z = outputs()
    joint.pull_back(z)
    block = joint.blocks["model"]
    basis = torch.stack([stacked(b) for b in block.basis()])
    names = list(e)
    order = {n: stacked({n: e[n]}) for n in names}
    covector = basis @ torch.cat([order[p.name] for p in block.parts])
    best = -torch.linalg.solve(block.to_dense(), covector)
    u = torch.cat([found.vectors[p.name].reshape(-1) for p in block.parts])
    image = block.image({p.name: found.vectors[p.name] for p in block.parts})
    decrease = -float(basis.mT @ covector @ u) - 0.5 * float(image.square().sum())
    return {
        "solution": torch.allclose(basis.mT @ best, u, rtol=1e-6, atol=1e-8),
        "decrease": math.isclose(found.decrease, decrease, rel_tol=1e-6),
    }


@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(seed=SEEDS, warm=st.booleans())
@settings(max_examples=8)
def test_many_iterations_solve_the_joint_metric(manifold, seed, warm):
    findings = solver_findings(Proximal, manifold, seed, warm)
    assert all(findings.values()), findings


@pytest.mark.parametrize("name", SOLVERS)
def test_wrong_solvers_are_rejected(name):
    assert not all(solver_findings(SOLVERS[name], "stiefel", 0, True).values())


def test_greed_stops_where_the_gain_for_the_work_falls():
    model = nn.Linear(30, 1, bias=False)
    x = torch.randn(60, 30) * torch.logspace(0, -2, 30)
    z = model(x)
    map = OutputMap({"w": model.weight}, Euclidean(2.0), z, "mean")
    e = map.pull([2.0 * (z.detach() - torch.randn(60, 1)) / 60])
    space = rm.TangentSpace(
        rm.manifolds.Euclidean(), torch.zeros(1, 30), rm.mass.Mass(1e-6)
    )
    solver = Proximal(map, {"w": space}, e)

    def run(iterations, greed):
        return solver.minimise(dict, None, iterations, greed)

    model_values = []
    for count in range(1, 25):
        found = run(count, 0.0)
        weight = float(space.inner(found.vectors["w"], found.vectors["w"]))
        model_values.append(found.decrease - 0.5 * weight)
    assert all(b >= a for a, b in pairwise(model_values))
    gains = [model_values[0], *(b - a for a, b in pairwise(model_values))]
    for greed in (0.2, 1.0):
        wanted = next(
            count
            for count in range(2, 25)
            if 0.5 * sum(gains[count - 2 : count])
            < greed * model_values[count - 1] / (3.0 + count)
        )
        assert run(24, greed).iterations == wanted


# --- optimizer


@given(seed=SEEDS)
@settings(max_examples=10)
def test_linear_least_squares_are_solved_in_one_step(seed):
    torch.manual_seed(seed)
    model = nn.Linear(4, 2)
    x, y = torch.randn(9, 4), torch.randn(9, 2)
    metric = rm.LayerwiseMetric(model, Sampled(Euclidean(1.0)), mass=1e-9)
    optimizer = GaussNewton(metric, greed=0.0)
    with metric.record():
        z = model(x)
    metric.pull_back(z)
    optimizer.step(lambda: model(x), lambda z: F.mse_loss(z, y))
    design = torch.cat([x, torch.ones(9, 1)], 1)
    best = torch.linalg.lstsq(design, y).solution
    found = torch.cat([model.weight, model.bias[:, None]], 1).mT
    torch.testing.assert_close(found, best, rtol=1e-5, atol=1e-5)
    assert optimizer.report.accepted
    assert math.isclose(optimizer.report.ratio, 1.0, rel_tol=1e-6)


def stepped(lr, manifold="euclidean", steps=3):
    """Return the parameters after some steps, the first of them a part of one."""
    torch.manual_seed(2)
    model, metric, pull_back, outputs, loss = problem(manifold)
    optimizer = GaussNewton(metric, lr=lr, retraction=rm.retractions.Projection())
    points, reports = [[p.detach().clone() for p in model.parameters()]], []
    for _ in range(steps):
        pull_back()
        final = optimizer.step(outputs, loss)
        assert final == optimizer.report.new_loss
        assert final == pytest.approx(float(loss(outputs()).detach()), rel=1e-6)
        points.append([p.detach().clone() for p in model.parameters()])
        reports.append(optimizer.report)
    return points, reports


def test_lr_is_the_part_of_the_step_that_is_taken():
    (start, whole), (full,) = stepped(1.0, steps=1)
    (_, part), (half,) = stepped(0.5, steps=1)
    for a, b, c in zip(start, whole, part, strict=True):
        torch.testing.assert_close(c, 0.5 * (a + b))
    assert (half.length, half.ratio) == (0.5 * full.length, full.ratio)
    assert half.mass == full.mass
    assert (half.predicted, half.loss) == (full.predicted, full.loss)


def test_part_of_a_step_follows_the_retraction():
    (start, whole), _ = stepped(1.0, "sphere", steps=1)
    (_, part), _ = stepped(0.3, "sphere", steps=1)
    x, there, here = (
        each[0].as_subclass(torch.Tensor) for each in (start, whole, part)
    )
    vector = there / (x * there).sum(-1, keepdim=True) - x
    torch.testing.assert_close(here, F.normalize(x + 0.3 * vector, dim=-1))


def test_a_scheduler_of_torch_sets_the_part():
    torch.manual_seed(2)
    model, metric, pull_back, outputs, loss = problem()
    optimizer = GaussNewton(metric)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=2)
    lengths = []
    for _ in range(3):
        pull_back()
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step(outputs, loss)
        schedule.step()
        lengths.append(optimizer.report.length)
    assert lengths == [1.0, 0.5, 0.0]
    assert all(map(torch.equal, before, model.parameters()))


def test_where_the_part_is_no_point_nothing_moves():
    torch.manual_seed(2)
    model, metric, pull_back, outputs, loss = problem()
    optimizer = GaussNewton(metric, lr=0.5)
    pull_back()
    before = [p.detach().clone() for p in model.parameters()]
    calls = []

    def broken(z):
        calls.append(z)
        return loss(z) * (math.inf if len(calls) == 3 else 1.0)

    assert optimizer.step(outputs, broken) == optimizer.report.loss
    assert len(calls) == 3
    assert optimizer.report.length == 0.0
    assert not optimizer.report.accepted
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("lr", [0.0, 1.5, -1.0, math.nan, "0.1", True, None])
def test_parts_that_are_none(lr):
    model, metric, pull_back, outputs, loss = problem()
    with pytest.raises(ValueError, match="part of each step"):
        GaussNewton(metric, lr=lr)
    optimizer = GaussNewton(metric)
    pull_back()
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.param_groups[0]["lr"] = 2.0
    with pytest.raises(ValueError, match=r"lr=2\.0.*part of each step"):
        optimizer.step(outputs, loss)
    assert all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mass", [1e-6, 1e-3, 1.0])
def test_every_initial_mass_gets_there(mass, dtype):
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    x = torch.linspace(-2.0, 2.0, 30, dtype=dtype).unsqueeze(1)
    metric = rm.LayerwiseMetric(net, Sampled(Euclidean(2.0)), mass=mass)
    optimizer = GaussNewton(metric)
    losses = []
    for _ in range(40):
        with metric.record():
            z = net(x)
        metric.pull_back(z)
        optimizer.step(lambda: net(x), lambda z: F.mse_loss(z, x.sin()))
        losses.append(optimizer.report.new_loss)
    assert losses[-1] < 2e-5
    assert all(after <= before for before, after in pairwise(losses))


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_steps_stay_on_the_manifold_and_a_part_of_the_examples_preconditions(manifold):
    model, metric, pull_back, outputs, loss = problem(manifold)
    optimizer = GaussNewton(metric)
    before = float(loss(outputs()).detach())
    for index in range(20):
        if index % 3 == 0:
            pull_back()
        after = optimizer.step(outputs, loss)
        assert after <= before
        assert all(p.grad is None for p in model.parameters())
        before = after
    metric.parameters.verify()
    assert after < 0.7


def test_classification_needs_no_learning_rate():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x = torch.randn(60, 5)
    y = x[:, :3].argmax(1)
    metric = rm.LayerwiseMetric(model, Sampled(Categorical()), mass=10.0)
    optimizer = GaussNewton(metric)
    for _ in range(25):
        with metric.record():
            z = model(x)
        metric.pull_back(z)
        final = optimizer.step(lambda: model(x), lambda z: F.cross_entropy(z, y))
    assert final < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e9])
def test_without_a_better_point_the_parameters_stay_bit_for_bit(bad):
    model, metric, pull_back, outputs, loss = problem("stiefel")
    optimizer = GaussNewton(metric, trials=2, shorten=1)
    pull_back()
    before = [p.detach().clone() for p in model.parameters()]

    def broken(z):
        return loss(z) if z.requires_grad else torch.tensor(bad)

    start = float(loss(outputs()).detach())
    assert optimizer.step(outputs, broken) == start
    assert not optimizer.report.accepted
    assert optimizer.report.trials == 4
    assert "no step" in str(optimizer.report)
    assert all(map(torch.equal, before, model.parameters()))
    assert math.isclose(optimizer.report.mass, 4.0**2)


def test_a_step_that_overshoots_is_shortened():
    _, metric, pull_back, outputs, loss = problem()
    optimizer = GaussNewton(metric)
    pull_back()
    values = iter([1e3])

    def once(z):
        value = loss(z)
        return value if z.requires_grad else next(values, value)

    before = float(loss(outputs()).detach())
    after = optimizer.step(outputs, once)
    report = optimizer.report
    assert after < before
    assert report.trials == 2
    assert report.length == 0.1
    assert math.isclose(report.mass, 2.0)
    torch.testing.assert_close(after, float(loss(outputs()).detach()))


def test_float32_masses_stop_where_rounding_begins():
    torch.manual_seed(0)
    _, metric, pull_back, outputs, loss = problem(dtype=torch.float32, mass=1e-9)
    optimizer = GaussNewton(metric)
    pull_back()
    optimizer.step(outputs, loss)
    for _ in range(10):
        optimizer.step(outputs, loss)
    assert optimizer.report.mass >= 1.0


def test_it_asks_for_what_it_needs():
    model, metric, pull_back, outputs, loss = problem()
    optimizer = GaussNewton(metric)
    pull_back()
    with pytest.raises(NotRecordedError, match="no_grad"):
        optimizer.step(lambda: outputs().detach(), loss)
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NonFiniteError, match="where the step begins"):
        optimizer.step(outputs, lambda z: loss(z) * math.nan)
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(ValueError, match="0 < shrink"):
        GaussNewton(metric, shrink=2.0)
    with pytest.raises(ValueError, match="at least one iteration"):
        GaussNewton(metric, iterations=0)
    bare = rm.LayerwiseMetric(model, None)
    with bare.record():
        z = outputs()
    bare.backward(loss(z), z)
    with pytest.raises(OutputMetricError, match="no metric"):
        GaussNewton(bare).step(outputs, loss)


@pytest.mark.parametrize(
    "loss",
    [
        lambda z: z.square().mean().item(),
        lambda z: None,
        lambda z: z.square(),
        lambda z: z.detach().square().mean(),
    ],
)
def test_it_says_what_a_loss_is(loss):
    model = nn.Linear(2, 1)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean())
    x = torch.randn(3, 2)
    with metric.record():
        outputs = model(x)
    metric.pull_back(outputs)
    with pytest.raises(TypeError, match="the loss function returned"):
        rm.optim.GaussNewton(metric).step(lambda: model(x), loss)


def test_functions_of_a_model_step_too():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))
    points = torch.linspace(0.0, 3.0, 20).unsqueeze(1)

    def residual(net, z):
        return torch.func.jacrev(net)(z)[0] - z.cos()

    metric = FunctionalMetric(net, residual, Euclidean(2.0))
    optimizer = GaussNewton(metric)

    def outputs():
        return torch.func.vmap(residual, (None, 0))(net, points)

    for _ in range(15):
        metric.pull_back(metric(points))
        final = optimizer.step(outputs, lambda z: z.square().mean())
    assert final < 1e-3


def test_a_fit_without_residuals_goes_on():
    torch.manual_seed(0)
    x = torch.randn(24, 4, dtype=torch.float32)
    t = x.sin()[:, :2]
    model = nn.Sequential(nn.Linear(4, 32), nn.Tanh(), nn.Linear(32, 2)).float()
    metric = rm.LayerwiseMetric(model, rm.output.Sampled(rm.output.Euclidean(1.0)))
    optimizer = rm.optim.GaussNewton(metric)
    for _ in range(45):
        with metric.record():
            z = model(x)
        metric.pull_back(z)
        final = optimizer.step(lambda: model(x), lambda z: F.mse_loss(z, t))
    assert final < 1e-9


@pytest.mark.parametrize("scale", [1e20, 1e-25])
def test_iterations_are_the_same_where_products_leave_float32(scale):
    def run(dtype):
        torch.manual_seed(0)
        model = nn.Linear(4, 2).to(dtype)
        x, t = torch.randn(6, 4).to(dtype), torch.randn(6, 2).to(dtype)
        metric = rm.LayerwiseMetric(model, Euclidean(), mass=1e-2)
        optimizer = GaussNewton(metric)

        def loss(z):
            return scale * (z - t).square().sum(1).mean() / 2

        with metric.record():
            z = model(x)
        metric.backward(loss(z), z)
        optimizer.step(lambda: model(x), loss)
        return optimizer.report

    narrow, wide = run(torch.float32), run(torch.float64)
    assert narrow.iterations == wide.iterations > 0
    assert narrow.predicted == pytest.approx(wide.predicted, rel=1e-3)
