"""Rates of contraction against finite differences, trajectories and worked examples."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from cases import BASES, OUTPUTS
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import OURS
from mutants import rates as mutants
from rate_cases import One, flow, half_lie_derivative, problem
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.contraction import Side, Verdict, rate
from riemannian_modules.contraction.chart import Chart
from riemannian_modules.contraction.derivatives import (
    christoffel,
    hessian_product,
    joint_product,
)
from riemannian_modules.contraction.geometry import Geometry
from riemannian_modules.contraction.hessian import Hessian
from riemannian_modules.contraction.replica import Replica
from riemannian_modules.contraction.smooth import chart_step
from riemannian_modules.errors import ContractionError

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text(encoding="utf-8"))
BLOCKS = ("tensor", "layer", "model")


class Quadratic(nn.Module):
    """phi(w) = w + w^2 / 2 of the golden example."""

    def __init__(self, w: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.w + self.w**2 / 2)


class Scalars(nn.Module):
    """Two layers of one number each."""

    def __init__(self, first: float, second: float) -> None:
        super().__init__()
        self.first = nn.Linear(1, 1, bias=False)
        self.second = nn.Linear(1, 1, bias=False)
        with torch.no_grad():
            self.first.weight.fill_(first)
            self.second.weight.fill_(second)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


def halves(target: Tensor | float) -> Callable[[Tensor], Tensor]:
    return lambda z: 0.5 * (z - target).square().flatten(1).sum(1).mean()


def dense_pair(metric, loss, x, kind="true") -> tuple[Tensor, Tensor, Hessian]:
    replica = Replica(metric, loss, [x])
    hessian = Hessian(replica.geometry(), replica.blocks, kind)
    H, G, _ = hessian.dense()
    return H, G, hessian


def smallest(H: Tensor, G: Tensor) -> float:
    return float(scipy.linalg.eigh(H.numpy(), G.numpy(), eigvals_only=True)[0])


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    error = float((found - expected).norm() / expected.norm())
    assert error <= tolerance, f"{error:.1e}"


# ---- worked examples -----------------------------------------------------------------


def test_golden_hessian_in_one_dimension() -> None:
    given, wanted = GOLDEN["hessian_1d"]["inputs"], GOLDEN["hessian_1d"]["outputs"]
    metric = rm.LayerwiseMetric(
        Quadratic(float(given["w"])), rm.output.Euclidean(), mass=given["mu"]
    )
    x = torch.ones(1, 1)
    for kind, entry in (("true", "rate"), ("frozen", "frozen_rate")):
        found = rate(metric, halves(0.0), x, kind=kind)
        assert abs(found.value - wanted[entry]) <= 1e-10
        assert (found.side, found.verdict) == (Side.EXACT, Verdict.CERTIFIED)
        assert found.kind == kind
        assert "at this point" in found.where
    H, G, hessian = dense_pair(metric, halves(0.0), x)
    assert abs(float(H) - wanted["hess"]) <= 1e-10
    assert abs(float(G) - wanted["G"]) <= 1e-10
    assert abs(float(hessian.velocity) - wanted["X"]) <= 1e-10
    H, _, _ = dense_pair(metric, halves(0.0), x, "frozen")
    assert abs(float(H) - wanted["f2"]) <= 1e-10


# ---- the Hessian in the metric -------------------------------------------------------


def assert_half_lie(metric, loss, x, tolerance: float) -> None:
    """The Hessian is symmetric, and half the Lie derivative of the metric."""
    replica = Replica(metric, loss, [x])
    hessian = Hessian(replica.geometry(), replica.blocks, "true")
    vectors = torch.randn(2, hessian.size)
    expected, G = half_lie_derivative(hessian.geometry, replica, vectors)
    products = [hessian.product(v) for v in vectors]
    found = vectors @ torch.stack(products, 1)
    assert_near(found.mT, found, 1e-8)
    assert_near(found, expected, tolerance)
    u = hessian.geometry.origin
    for v in vectors:
        assert_near(hessian.metric(v), G @ v, 1e-9)
        assert_near(hessian.geometry.product(u, v), G @ v, 1e-9)


@settings(max_examples=8)
@given(
    base=st.sampled_from(sorted(BASES)),
    output=st.sampled_from(sorted(OUTPUTS)),
    blocks=st.sampled_from(BLOCKS),
    n=st.integers(1, 3),
)
def test_hessian_is_half_the_lie_derivative(base, output, blocks, n) -> None:
    assert_half_lie(*problem(base, output, blocks, n), 1e-7)


@settings(max_examples=5)
@given(base=st.sampled_from(sorted(BASES)), output=st.sampled_from(sorted(OUTPUTS)))
def test_joint_metric_takes_the_short_way(base, output) -> None:
    metric, loss, x = problem(base, output, "model")
    replica = Replica(metric, loss, [x])
    hessian = Hessian(replica.geometry(), replica.blocks, "true")
    v, X = torch.randn(hessian.size), hessian.velocity
    long = hessian_product(hessian.geometry, v, X)
    assert_near(joint_product(hessian.geometry, v, X), long, 1e-11)
    assert_near(hessian.product(v), long, 1e-11)


def one(case, output=rm.output.Euclidean, mass=0.5):
    manifold = case.make()
    model = One(manifold, case.draw(manifold))
    metric = rm.LayerwiseMetric(model, output(), mass=mass)
    return metric, halves(torch.tensor([0.3, -0.4, 0.1, 0.2])), torch.randn(3, 4)


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_every_manifold(case) -> None:
    assert_half_lie(*one(case), 1e-6)


def test_constant_metric_leaves_the_plain_hessian() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    metric = rm.LayerwiseMetric(model, None, mass=0.5)
    x, loss = torch.randn(5, 3), halves(torch.randn(5, 2))
    H, G, hessian = dense_pair(metric, loss, x)
    plain = torch.func.hessian(hessian.geometry.loss)(hessian.geometry.origin)
    assert_near(H, plain, 1e-12)
    assert_near(G, 0.5 * torch.eye(len(G)), 1e-12)


def test_critical_points_have_the_plain_hessian_too() -> None:
    metric, _, x = problem("euclidean", "euclidean", "layer")
    with torch.no_grad():
        loss = halves(metric.model(x))
    true, frozen = (rate(metric, loss, x, kind=kind) for kind in ("true", "frozen"))
    assert abs(true.value - frozen.value) <= 1e-9


# ---- coordinates do not matter -------------------------------------------------------


def charted(metric, loss, x, retraction) -> Hessian:
    replica = Replica(metric, loss, [x])
    spaces = {p.name: p.space for b in replica.blocks.values() for p in b.parts}
    geometry = Geometry(
        replica.model,
        [x],
        loss,
        metric.output,
        metric.reduction,
        Chart(spaces, retraction=retraction),
        {n: [p.name for p in b.parts] for n, b in replica.blocks.items()},
    )
    return Hessian(geometry, replica.blocks, "true")


class Bent(rm.retractions.Retraction):
    """The default after a random quadratic change of the tangent vector."""

    def __call__(self, manifold, point, tangent):
        generator = torch.Generator().manual_seed(3)
        Q = torch.randn(2, point.numel(), point.numel(), generator=generator)
        flat = tangent.reshape(-1)
        turn = manifold.proju(point, ((Q[0] @ flat) * (Q[1] @ flat)).view_as(point))
        return chart_step(manifold, point, tangent + turn)

    def order(self, manifold):
        return 1


@pytest.mark.parametrize(
    ("base", "rule"),
    [
        *((base, Bent()) for base in sorted(BASES) if base != "euclidean"),
        ("stiefel-tall", rm.retractions.QR()),
        ("stiefel-wide", rm.retractions.QR()),
        ("sphere", rm.retractions.Projection()),
    ],
)
def test_hessian_does_not_depend_on_the_chart(base, rule) -> None:
    """It is a tensor, and all charts have the same basis at the point."""
    metric, loss, x = problem(base, "euclidean", "layer", 2)
    one, other = charted(metric, loss, x, None), charted(metric, loss, x, rule)
    v = torch.randn(one.size)
    assert_near(other.product(v), one.product(v), 1e-9)


def spectrum(H: Tensor, G: Tensor) -> list[float]:
    return list(scipy.linalg.eigh(H.numpy(), G.numpy(), eigvals_only=True))


@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), d=st.integers(1, 4))
def test_spectrum_is_invariant_under_reparametrisation(seed, d) -> None:
    """For any loss and metric on R^d, in coordinates w = phi(y)."""
    generator = torch.Generator().manual_seed(seed)
    A, B, C = torch.randn(3, d, d, generator=generator)
    y = 0.3 * torch.randn(d, generator=generator)

    def phi(y: Tensor) -> Tensor:
        return y + 0.2 * torch.sin(A @ y) * y.square().sum() + 0.1 * (B @ y) ** 2

    def loss(w: Tensor) -> Tensor:
        return torch.cosh(A @ w).sum() + (C @ w).prod()

    def metric(w: Tensor) -> Tensor:
        K = torch.tanh(B + torch.outer(w, C @ w))
        return K.mT @ K + 0.5 * torch.eye(d)

    def pulled(y: Tensor) -> Tensor:
        J = torch.func.jacrev(phi)(y)
        return J.mT @ metric(phi(y)) @ J

    def pair(point: Tensor, f, G) -> tuple[Tensor, Tensor]:
        X = torch.linalg.solve(G(point), torch.func.grad(f)(point))
        bent = [
            christoffel(
                lambda w, a, b: a @ G(w) @ b,
                lambda w, v: G(w) @ v,
                point,
                e,
                X,
            )
            for e in torch.eye(d)
        ]
        H = torch.func.hessian(f)(point) - torch.stack(bent)
        assert_near(H.mT, H, 1e-8)
        return 0.5 * (H + H.mT), G(point)

    here = torch.tensor(spectrum(*pair(phi(y), loss, metric)))
    there = torch.tensor(spectrum(*pair(y, lambda y: loss(phi(y)), pulled)))
    assert_near(there, here, 1e-6)


# ---- trajectories --------------------------------------------------------------------


def apart(metric, x, a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Return the distance of two near points, the mean of the norms at both."""
    lengths = []
    for here, there in ((a, b), (b, a)):
        with torch.no_grad():
            for declared in metric.parameters:
                declared.tensor.copy_(here[declared.name])
        fresh = rm.LayerwiseMetric(
            metric.model,
            metric.output,
            mass={d.name: d.mass for d in metric.parameters},
            blocks=metric.grouping,
        )
        with fresh.record():
            z = metric.model(x)
        fresh.pull_back(z)
        square = 0.0
        for block in fresh.blocks.values():
            step = {
                p.name: p.space.project(there[p.name] - here[p.name])
                for p in block.parts
            }
            square += float(block.inner(step, step))
        lengths.append(square**0.5)
    return sum(lengths) / 2


def measured_rate(metric, loss, x, direction: dict[str, Tensor]) -> float:
    """Return how fast two simulated trajectories approach each other."""
    start = {d.name: d.space().point.clone() for d in metric.parameters}
    manifolds = {d.name: d.manifold for d in metric.parameters}
    lengths, size, h = [], 1e-5, 4e-4

    def moved(sign: int) -> dict[str, Tensor]:
        return {
            name: chart_step(
                manifolds[name], start[name], sign * size * direction[name]
            )
            for name in start
        }

    ends = [moved(-1), moved(1)]
    for time in (-h, h):
        there = [flow(metric.model, metric, x, loss, w, time, 1) for w in ends]
        lengths.append(apart(metric, x, *there))
    with torch.no_grad():
        for declared in metric.parameters:
            declared.tensor.copy_(start[declared.name])
    return -float(torch.tensor(lengths[1] / lengths[0]).log()) / (2 * h)


def slowest(metric, loss, x) -> tuple[float, dict[str, Tensor]]:
    H, G, hessian = dense_pair(metric, loss, x)
    _, vectors = scipy.linalg.eigh(H.numpy(), G.numpy())
    direction = torch.from_numpy(vectors[:, 0])
    return rate(metric, loss, x).value, hessian.geometry.chart.embed(direction)


@pytest.mark.parametrize(
    ("base", "output", "blocks"),
    [
        ("euclidean", "categorical", "layer"),
        ("stiefel-wide", "euclidean", "layer"),
        ("canonical-tall", "poisson", "model"),
        ("spd", "euclidean", "tensor"),
        ("spd", "bernoulli", "model"),
    ],
)
def test_trajectories_approach_at_the_true_rate(base, output, blocks) -> None:
    metric, loss, x = problem(base, output, blocks)
    value, direction = slowest(metric, loss, x)
    found = measured_rate(metric, loss, x, direction)
    assert abs(found - value) <= 1e-4 * max(1.0, abs(value))
    frozen = rate(metric, loss, x, kind="frozen").value
    assert abs(found - frozen) > 1e-2, "the case is meant to tell the two apart"


def test_frozen_rate_can_have_the_wrong_sign() -> None:
    model = Scalars(1.0, 2.0)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    x, loss = torch.ones(1, 1), halves(-1.0)
    value, direction = slowest(metric, loss, x)
    found = measured_rate(metric, loss, x, direction)
    frozen = rate(metric, loss, x, kind="frozen")
    joint = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1, blocks="model")
    assert abs(found - value) <= 1e-4
    assert value > 1.5
    assert frozen.value < -4.0
    assert frozen.verdict is Verdict.REFUTED
    assert rate(joint, loss, x).value < -1.0
    assert "frozen" in str(frozen)


# ---- mutants -------------------------------------------------------------------------


def lie_law() -> None:
    torch.manual_seed(0)
    assert_half_lie(*problem("stiefel-wide", "categorical", "layer", 2), 1e-7)


def joint_law() -> None:
    torch.manual_seed(0)
    assert_half_lie(*problem("poincare", "poisson", "model", 2), 1e-7)


def verdict_law() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    x, loss = torch.randn(20, 2), halves(torch.randn(20, 2))
    seen = rate(metric, loss, x, method="lanczos", weight_decay=0.1)
    assert (seen.side, seen.verdict) == (Side.UPPER, Verdict.EVIDENCE)
    proved = rate(metric, loss, x, weight_decay=0.1)
    assert proved.verdict is Verdict.CERTIFIED
    fitted = halves(model(x[:1]).detach())
    assert rate(metric, fitted, x[:1]).verdict is Verdict.NOT_CERTIFIED


LAWS = {
    "lie": lie_law,
    "joint": joint_law,
    "verdict": verdict_law,
}


@pytest.mark.parametrize(("law", "target", "mistake"), mutants.RATES)
def test_wrong_rates_are_found(law, target, mistake, monkeypatch) -> None:
    LAWS[law]()
    monkeypatch.setattr(target, mistake)
    with pytest.raises((AssertionError, ContractionError)):
        LAWS[law]()


# ---- every printed number says what it is --------------------------------------------


def test_cross_entropy_of_a_float32_model() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).float()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    x, y = torch.randn(6, 3).float(), torch.randint(3, (6,))
    found = rate(metric, lambda z: F.cross_entropy(z, y), x)
    wide = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))
    wide.load_state_dict(model.state_dict())
    same = rm.LayerwiseMetric(wide, rm.output.Categorical(), mass=0.1)
    expected = rate(same, lambda z: F.cross_entropy(z, y), x.double())
    assert abs(found.value - expected.value) <= 1e-8
    for word in ("true", str(found.verdict), "layerwise Categorical", "at this point"):
        assert word in str(found)


@pytest.mark.parametrize("kind", ["true", "frozen"])
@pytest.mark.parametrize("method", ["dense", "lanczos"])
def test_a_metric_without_a_derivative_is_named(kind: str, method: str) -> None:
    """torch has none of eigenvectors where eigenvalues coincide."""
    model = rm.nn.Linear(2, 2, manifold=rm.manifolds.LogEuclideanSPD())
    with torch.no_grad():
        model.weight.copy_(torch.eye(2))
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    with pytest.raises(ContractionError, match=r"'weight' on LogEuclideanSPD.*use SPD"):
        rate(metric, lambda z: z.sum(), torch.randn(3, 2), kind=kind, method=method)
