"""The action of trajectories: worked numbers, zeros, orders, and the tube it bounds."""

import itertools
import json
import math
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from cases import BASES
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import action as mutants
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Mass, Part, TangentSpace, retractions
from riemannian_modules import action as ac
from riemannian_modules.contraction import Rate, Verdict
from riemannian_modules.errors import ContractionError, NotRecordedError, ShapeError
from riemannian_modules.factors import DenseFactor

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())["action"]
OUT = GOLDEN["outputs"]
EPS = torch.finfo(torch.float64).eps
seeds = st.integers(0, 2**31)


def close(found: float, expected: float, tolerance: float = 1e-10) -> None:
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


def euclidean_metric(point: Tensor, mass: float, K: Tensor | None = None):
    factor = None if K is None else DenseFactor(K)
    space = TangentSpace(rm.manifolds.Euclidean(), point, Mass(scalar=mass))
    return (LayerMetric([Part("w", space, factor)]),)


class Quadratic:
    """``1/2 (w - c)^T H (w - c)`` in the constant metric ``mu + K^T K``."""

    def __init__(self, H: Tensor, mass: float, K: Tensor | None = None, c=0.0) -> None:
        self.H, self.mass, self.K, self.c = H, mass, K, c

    def __call__(self, point) -> ac.Local:
        w = point["w"]
        e = self.H @ (w - self.c)
        loss = float(0.5 * (w - self.c) @ e)
        return ac.Local(loss, {"w": e}, euclidean_metric(w, self.mass, self.K))

    def matrix(self) -> Tensor:
        p = len(self.H)
        extra = 0.0 if self.K is None else self.K.mT @ self.K
        return self.mass * torch.eye(p) + extra

    @classmethod
    def random(cls, seed: int, p: int = 3, shift: float = 0.1) -> "Quadratic":
        torch.manual_seed(seed)
        root = torch.randn(p, p)
        K = torch.randn(2, p)
        return cls(root @ root.mT + shift * torch.eye(p), 0.5, K, torch.randn(p))


class Wavy(Quadratic):
    """The same plus a sine, so that nothing is quadratic."""

    def __call__(self, point) -> ac.Local:
        w, local = point["w"], super().__call__(point)
        return ac.Local(
            local.loss + float(torch.sin(2.0 * w).sum()),
            {"w": local.covector["w"] + 2.0 * torch.cos(2.0 * w)},
            euclidean_metric(w, self.mass, (1.0 + w.square().sum()) * self.K),
        )


def path_of(points, h, landscape) -> ac.Trajectory:
    return ac.Trajectory([{"w": w} for w in points], [h] * (len(points) - 1), landscape)


def golden_path(steps: int, slope: float = 0.5) -> ac.Trajectory:
    landscape = Quadratic(torch.tensor([[2.0]]), 3.0)
    times = torch.linspace(0.0, 1.0, steps + 1)
    return path_of([(1 - slope * t).view(1) for t in times], 1.0 / steps, landscape)


# --- worked numbers


def test_golden_action() -> None:
    path = golden_path(2)
    assert [float(p["w"]) for p in path.points] == GOLDEN["inputs"]["path"]
    left = ac.action(path)
    close(left.value, OUT["S_left_N2"])
    close(left.energy, OUT["S_energy_left_N2"])
    for kind in ("midpoint", "discrete_gradient"):
        found = ac.action(path, kind)
        close(found.value, OUT["S_mid_N2"])
        close(found.energy, OUT["S_mid_N2"])
    bound = ac.tube_bound(OUT["S"], OUT["rate"], 1.0)
    close(bound.value, OUT["tube_bound_T1"])
    assert OUT["true_distance_T1"] <= bound.value
    assert bound.verdict is Verdict.CERTIFIED


def test_orders_of_the_discretisations() -> None:
    """At another slope than the worked one, whose integrand has equal ends."""
    exact = 1.5 * (25 / 144 - 5 / 72 + 1 / 108)
    for kind, order in (("left", 1), ("midpoint", 2), ("discrete_gradient", 2)):
        errors = [
            abs(ac.action(golden_path(n, 0.25), kind).value - exact) for n in (16, 32)
        ]
        assert errors[0] / errors[1] == pytest.approx(2**order, rel=0.15)


def test_an_action_of_a_discrete_path_is_evidence() -> None:
    bound = ac.tube_bound(ac.action(golden_path(2)), Rate(OUT["rate"]))
    assert bound.verdict is Verdict.EVIDENCE
    close(
        bound.value, math.sqrt(OUT["S_left_N2"] / OUT["S"]) * OUT["tube_bound_T1"], 1e-9
    )
    with pytest.raises(ContractionError, match="give t="):
        ac.tube_bound(0.1, 0.5)
    assert math.isinf(ac.tube_bound(0.1, -1.0, 1e4).value)
    close(ac.tube_bound(0.1, 0.0, 3.0).value, math.sqrt(2 * 0.1 * 3.0))


# --- where it vanishes


MODELS = {
    name: BASES[name]
    for name in (
        "euclidean",
        "stiefel-wide",
        "stiefel-tall",
        "canonical-wide",
        "sphere",
        "poincare",
        "spd",
    )
}


def trained(name: str, steps: int = 4, lr: float = 0.2, rule=None, **options):
    """A recorded run of the library's own optimizer, and how to evaluate its loss."""
    base = MODELS[name]
    out, inner = base.shape
    first = rm.nn.Linear(inner, out, manifold=base.manifold())
    model = rm.nn.Sequential(first, nn.Tanh(), nn.Linear(out, 2))
    x, t = torch.randn(6, inner), torch.randn(6, 2)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.3)
    optimizer = rm.optim.RiemannianSGD(metric, lr=lr, retraction=rule, **options)

    def evaluate():
        z = model(x)
        return 0.5 * (z - t).square().sum(-1).mean(), z

    recorder = ac.TrajectoryRecorder(metric, rule)
    for _ in range(steps):
        with metric.record():
            loss, z = evaluate()
        metric.backward(loss, z)
        with recorder.step(loss, duration=lr):
            optimizer.step()
    return recorder, evaluate, metric


def rounding(path: ac.Trajectory) -> float:
    """What rounding of the points to 50 eps does to the action."""
    total = 0.0
    for k, h in enumerate(path.durations):
        local = path.local(k)
        largest = max(float(block.spectrum()[0]) for block in local.blocks)
        size = sum(float(w.square().sum()) for w in path.points[k].values())
        total += 0.5 * h * largest * size / h**2
    return (50 * EPS) ** 2 * total


@pytest.mark.parametrize("name", MODELS)
@given(seeds)
@settings(max_examples=2)
def test_the_librarys_own_iterates_have_no_left_action(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    recorder, _, _ = trained(name)
    path = recorder.trajectory()
    found = ac.action(path)
    assert 0.0 <= found.value <= rounding(path)
    assert found.energy is None


@pytest.mark.parametrize("rule", [retractions.Exponential(), retractions.Projection()])
def test_other_retractions_have_none_either(rule) -> None:
    path = trained("sphere", rule=rule)[0].trajectory()
    assert ac.action(path).value <= rounding(path)


def test_the_wrong_retraction_is_noticed() -> None:
    path = trained("sphere", rule=retractions.Exponential())[0].trajectory()
    wrong = ac.Trajectory(
        path.points, path.durations, None, path.manifolds, seen=path.seen
    )
    assert ac.action(wrong).value > 1e3 * rounding(path)


def test_decay_and_momentum_are_action() -> None:
    recorder, _, _ = trained("euclidean", weight_decay=0.1)
    path = recorder.trajectory()
    wanted = 0.0
    for k, h in enumerate(path.durations):
        decay = {name: 0.1 * w for name, w in path.points[k].items()}
        wanted += 0.5 * h * path.local(k).inner(decay, decay)
    close(ac.action(path).value, wanted, 1e-9)
    momentum = trained("euclidean", momentum=0.9)[0].trajectory()
    assert ac.action(momentum).contributions[0] <= rounding(momentum)
    assert ac.action(momentum).value > 1e-4


@given(seeds)
@settings(max_examples=10)
def test_implicit_midpoint_iterates_have_no_midpoint_action(seed: int) -> None:
    f = Quadratic.random(seed)
    h, w = 0.3, torch.randn(3)
    A = torch.linalg.solve(f.matrix(), f.H)
    points = [w]
    for _ in range(4):
        ahead = torch.eye(3) + 0.5 * h * A
        right = (torch.eye(3) - 0.5 * h * A) @ points[-1] + h * A @ f.c
        points.append(torch.linalg.solve(ahead, right))
    path = path_of(points, h, f)
    for kind in ("midpoint", "discrete_gradient"):
        assert ac.action(path, kind).value <= 1e-24 * (1 + float(w @ w))
    assert ac.action(path, "left").value > 1e-10


# --- the two forms


@given(seeds)
@settings(max_examples=15)
def test_both_forms_agree_for_discrete_gradients(seed: int) -> None:
    f = Wavy.random(seed)
    path = path_of([torch.randn(3) for _ in range(4)], 0.5, f)
    found = ac.action(path, "discrete_gradient")
    close(found.energy, found.value, 1e-9)
    assert found.value >= 0.0
    for mutant in mutants.FORMS:
        assert mutant(path) != pytest.approx(found.value, rel=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_both_forms_agree_on_manifolds(name: str) -> None:
    recorder, evaluate, metric = trained(name, steps=3)
    before = [d.tensor.detach().clone() for d in metric.parameters]
    gradients = [d.tensor.grad for d in metric.parameters]
    path = recorder.trajectory(evaluate)
    found = ac.action(path, "discrete_gradient")
    close(found.energy, found.value, 1e-9)
    assert ac.action(path, "midpoint").value >= 0.0
    for declared, value, grad in zip(metric.parameters, before, gradients, strict=True):
        assert torch.equal(declared.tensor, value)
        assert declared.tensor.grad is grad


def test_the_energy_of_one_sided_gradients_certifies_nothing() -> None:
    """On a concave loss it is negative, and the sum of squares is not."""
    f = Quadratic(torch.tensor([[-1.0]]), 1.0)
    path = path_of([torch.ones(1), torch.tensor([2.0])], 1.0, f)
    assert ac.action(path, "left").value == 0.0
    assert mutants.energy_left(path) == pytest.approx(-0.5)
    assert ac.action(path, "discrete_gradient").value > 0.0


# --- what it bounds


@given(seeds, st.sampled_from([0.1, -2.0]))
@settings(max_examples=25)
def test_the_tube_holds_the_flow(seed: int, shift: float) -> None:
    """Piecewise straight paths, whose action Simpson's rule gives exactly."""
    f = Quadratic.random(seed, shift=shift)
    G, H, c = f.matrix().numpy(), f.H.numpy(), f.c.numpy()
    points = np.cumsum(0.4 * np.random.default_rng(seed).normal(size=(5, 3)), axis=0)
    h, S = 0.5, 0.0
    A = np.linalg.solve(G, H)
    for a, b in itertools.pairwise(points):
        miss = [(b - a) / h + A @ (a + s * (b - a) - c) for s in (0.0, 0.5, 1.0)]
        squares = [m @ G @ m for m in miss]
        S += 0.5 * h * (squares[0] + 4 * squares[1] + squares[2]) / 6
    t = h * (len(points) - 1)
    flow = c + scipy.linalg.expm(-A * t) @ (points[0] - c)
    distance = math.sqrt((points[-1] - flow) @ G @ (points[-1] - flow))
    rate = scipy.linalg.eigh(H, G, eigvals_only=True)[0]
    assert distance <= ac.tube_bound(S, rate, t).value * (1 + 1e-9)


def test_the_tube_is_attained() -> None:
    """In one dimension, by the perturbation that weighs late times as the flow does."""
    rate, t, n = 1.5, 1.0, 400
    h = t / n
    w, S = 0.0, 0.0
    for k in range(n):
        push = math.exp(-rate * (t - (k + 0.5) * h))
        S += 0.5 * h * push**2
        w = w * math.exp(-rate * h) + push * -math.expm1(-rate * h) / rate
    bound = ac.tube_bound(S, rate, t).value
    assert bound * 0.9999 <= w <= bound * (1 + 1e-6)
    assert w > mutants.tube_of_one_rate(S, rate, t)


@given(seeds)
@settings(max_examples=15)
def test_a_step_minimises_its_model(seed: int) -> None:
    f = Wavy.random(seed)
    local, lr = f({"w": torch.randn(3)}), 0.3
    best = {"w": -lr * local.gradient["w"]}
    least = ac.proximal_value(local, lr)
    close(ac.proximal_model(local, best, lr), least, 1e-9)
    assert ac.one_step_action(local, best, lr) <= 1e-20 * abs(least)
    other = {"w": best["w"] + 0.1 * torch.randn(3)}
    excess = ac.proximal_model(local, other, lr) - least
    assert excess > 0
    close(ac.one_step_action(local, other, lr), excess, 1e-8)
    with pytest.raises(ContractionError, match="step length"):
        ac.proximal_value(local, 0.0)


@given(seeds, st.floats(0.05, 1.9))
@settings(max_examples=15)
def test_descent_on_quadratics(seed: int, share: float) -> None:
    f = Quadratic.random(seed)
    largest = scipy.linalg.eigh(f.H.numpy(), f.matrix().numpy(), eigvals_only=True)[-1]
    lr = share / largest
    w = torch.randn(3)
    local = f({"w": w})
    after = f({"w": w - lr * local.gradient["w"]})
    squared = local.inner(local.gradient, local.gradient)
    drop = lr * (1 - lr * largest / 2) * squared
    assert local.loss - after.loss >= drop - 1e-12 * abs(local.loss)


@given(seeds)
@settings(max_examples=10)
def test_the_hamiltonian(seed: int) -> None:
    f = Wavy.random(seed)
    local = f({"w": torch.randn(3)})
    e = local.covector["w"]
    G = local.blocks[0].to_dense()
    energy = float(e @ torch.linalg.solve(G, e))
    assert abs(ac.hamiltonian(local, {"w": -e})) <= 1e-12 * energy
    p = torch.randn(3)
    wanted = 0.5 * float(p @ torch.linalg.solve(G, p)) - 0.5 * energy
    assert ac.hamiltonian(local, {"w": p}) == pytest.approx(wanted, rel=1e-9, abs=1e-12)


def test_dissipation_along_the_flow() -> None:
    f = Quadratic.random(1)
    A = torch.linalg.solve(f.matrix(), f.H)
    errors = []
    for n in (40, 80):
        times = torch.linspace(0.0, 1.0, n + 1)
        start = torch.ones(3)
        points = [f.c + torch.linalg.matrix_exp(-A * t) @ (start - f.c) for t in times]
        found = ac.dissipation(path_of(points, 1.0 / n, f))
        errors.append(abs(found.gradient / found.drop - 1))
        assert found.velocity == pytest.approx(found.drop, rel=4.0 / n)
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.1)


# --- the inverse of a retraction


RULES = {
    "euclidean": [retractions.Default()],
    "stiefel-wide": [retractions.QR(), retractions.Projection(), retractions.Cayley()],
    "stiefel-tall": [retractions.QR(), retractions.Projection()],
    "canonical-wide": [retractions.Default()],
    "sphere": [retractions.Default(), retractions.Exponential()],
    "poincare": [retractions.Default(), retractions.Exponential()],
    "spd": [retractions.Default(), retractions.Exponential()],
}


@pytest.mark.parametrize(
    ("name", "rule"),
    [(name, rule) for name, rules in RULES.items() for rule in rules],
    ids=lambda each: each if isinstance(each, str) else type(each).__name__,
)
@given(seeds, st.floats(1e-6, 0.3))
@settings(max_examples=4)
def test_inverse_retractions(name: str, rule, seed: int, size: float) -> None:
    torch.manual_seed(seed)
    base = BASES[name]
    manifold = base.manifold()
    x = manifold.random(*base.shape)
    if name == "spd":
        x = x / torch.linalg.matrix_norm(x, ord=2) + torch.eye(4)
    if name == "poincare":
        x = 0.5 * x
    u = manifold.proju(x, torch.randn(*base.shape))
    u = size * u / u.norm()
    found = ac.inverse_retraction(manifold, x, rule(manifold, x, u), rule)
    torch.testing.assert_close(found, u, rtol=1e-10, atol=1e-13)


def test_points_too_far_apart() -> None:
    sphere = rm.manifolds.Sphere()
    x = torch.tensor([1.0, 0.0, 0.0])
    with pytest.raises(ContractionError, match="Sphere"):
        ac.inverse_retraction(sphere, x, -x)


# --- what the records refuse


def test_records_that_do_not_join() -> None:
    recorder, evaluate, metric = trained("euclidean", steps=2)
    with torch.no_grad():
        next(iter(metric.parameters)).tensor.add_(1.0)
    with metric.record():
        loss, z = evaluate()
    metric.backward(loss, z)
    with (
        pytest.raises(ShapeError, match="changed since the last recorded step"),
        recorder.step(loss, 0.1),
    ):
        pass
    with pytest.raises(ShapeError, match="duration"), recorder.step(loss, 0.0):
        pass
    fresh = ac.TrajectoryRecorder(metric)
    with pytest.raises(NotRecordedError, match="no step"):
        fresh.trajectory()
    with pytest.raises(ZeroDivisionError), fresh.step(loss, 0.1):
        1 / 0  # noqa: B018
    with pytest.raises(NotRecordedError):
        fresh.trajectory()


def test_trajectories_that_are_refused() -> None:
    w = {"w": torch.zeros(1)}
    with pytest.raises(ShapeError, match="N durations"):
        ac.Trajectory([w], [])
    with pytest.raises(ShapeError, match="positive"):
        ac.Trajectory([w, w], [-1.0])
    with pytest.raises(NotRecordedError, match="landscape"):
        ac.action(ac.Trajectory([w, w], [1.0]))
    with pytest.raises(ContractionError, match="choose 'left'"):
        ac.action(golden_path(2), "right")
