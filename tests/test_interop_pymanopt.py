"""Manifolds and models in pymanopt, pymanopt's manifolds in geoopt."""

import copy
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import geoopt
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import OURS, Case
from scripts import loaded
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import (
    ManifoldContractError,
    NonFiniteError,
    NotOnManifoldError,
    ProblemError,
    ShapeError,
)
from riemannian_modules.manifolds.quotient import Quotient
from riemannian_modules.testing import best_window_slope, check_base_manifold, failures

pymanopt = pytest.importorskip("pymanopt", reason="belongs to the extra 'pymanopt'")
from mutants import interop as mutants  # noqa: E402
from pymanopt import manifolds as pm  # noqa: E402
from pymanopt.manifolds.manifold import RiemannianSubmanifold  # noqa: E402
from pymanopt.optimizers import (  # noqa: E402
    ConjugateGradient,
    NelderMead,
    ParticleSwarm,
    SteepestDescent,
    TrustRegions,
)

from riemannian_modules.interop.pymanopt import (  # noqa: E402
    GeooptSubmanifold,
    as_geoopt,
    as_pymanopt,
    problem,
)

REPOSITORY = Path(__file__).parents[1]
SEEDS = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=max(3, settings.default.max_examples // 10))

Array = np.ndarray


@pytest.fixture(autouse=True)
def _numpy_seed() -> None:
    np.random.seed(0)  # noqa: NPY002


def seeded(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002


# --- laws of pymanopt manifolds, in numpy and through pymanopt's interface only


def slope(error: Callable[[float], float]) -> float:
    """The order at which an error vanishes with the step."""
    steps = torch.logspace(-3.0, -0.7, 20, dtype=torch.float64)
    errors = torch.tensor([error(t) for t in steps.tolist()], dtype=torch.float64)
    return best_window_slope(steps, errors, floor=1e-13).value


class Cost:
    """A smooth function of a point with its ordinary derivatives, by torch."""

    def __init__(self, manifold: geoopt.Manifold | None, shape: tuple[int, ...]):
        quotient = isinstance(manifold, Quotient)
        self.invariant = manifold.invariant if quotient else lambda x: x
        size = self.invariant(torch.rand(shape)).numel()
        self.rows, self.shift = 0.7 * torch.randn(4, size), torch.randn(4)

    def _value(self, x: Tensor) -> Tensor:
        return (self.rows @ self.invariant(x).reshape(-1) + self.shift).sin().sum()

    def value(self, point: Array) -> float:
        return float(self._value(torch.from_numpy(point)))

    def gradient(self, point: Array) -> Array:
        return torch.func.grad(self._value)(torch.from_numpy(point)).numpy()

    def hessian(self, point: Array, vector: Array) -> Array:
        pair = (torch.from_numpy(point),), (torch.from_numpy(vector),)
        return torch.func.jvp(torch.func.grad(self._value), *pair)[1].numpy()


def gradient_slope(manifold: Any, cost: Any, x: Array, u: Array, move: Any) -> float:
    """First-order model: 2, or infinite where it is exact."""
    e = cost.gradient(x)
    g = manifold.euclidean_to_riemannian_gradient(x, e)
    first = manifold.inner_product(x, g, u)
    f = cost.value(x)
    return slope(lambda t: abs(cost.value(move(x, t * u)) - f - t * first))


def hessian_slope(manifold: Any, cost: Any, x: Array, u: Array, move: Any) -> float:
    """Second-order model along a curve of order 2: 3."""
    e = cost.gradient(x)
    g = manifold.euclidean_to_riemannian_gradient(x, e)
    h = manifold.euclidean_to_riemannian_hessian(x, e, cost.hessian(x, u), u)
    first, second = manifold.inner_product(x, g, u), manifold.inner_product(x, h, u)
    f = cost.value(x)
    return slope(
        lambda t: abs(cost.value(move(x, t * u)) - f - t * first - 0.5 * t**2 * second)
    )


def findings(manifold: Any, cost: Any, x: Array, move: Any) -> dict[str, bool]:
    """Which laws hold; ``move`` is a retraction of second order."""
    u = 0.5 * manifold.random_tangent_vector(x)
    v = manifold.random_tangent_vector(x)
    ambient = np.random.standard_normal(x.shape)  # noqa: NPY002
    y = manifold.retraction(x, 0.3 * v)
    close = {"rtol": 1e-8, "atol": 1e-9}
    tangent = manifold.projection(x, ambient)
    e = cost.gradient(x)
    g = manifold.euclidean_to_riemannian_gradient(x, e)
    hu, hv = (
        manifold.euclidean_to_riemannian_hessian(x, e, cost.hessian(x, w), w)
        for w in (u, v)
    )
    carried = manifold.transport(x, y, u)

    def chord(t: float) -> Array:
        return np.abs(manifold.retraction(x, t * u) - x - t * u)

    norm = manifold.norm(x, u)
    return {
        "inner": bool(
            np.isclose(manifold.inner_product(x, u, v), manifold.inner_product(x, v, u))
            and np.isclose(norm**2, manifold.inner_product(x, u, u))
            and np.isclose(manifold.norm(x, v), 1.0)
        ),
        "projection": bool(
            np.allclose(manifold.projection(x, tangent), tangent, **close)
            and np.allclose(manifold.projection(x, u), u, **close)
            and np.allclose(manifold.to_tangent_space(x, v), v, **close)
            and not (manifold.dim < x.size and np.allclose(tangent, ambient, **close))
        ),
        "gradient": bool(
            np.allclose(manifold.projection(x, g), g, rtol=1e-7, atol=1e-9)
            and np.isclose(manifold.inner_product(x, g, v), (e * v).sum())
            and gradient_slope(manifold, cost, x, u, manifold.retraction) > 1.85
        ),
        "hessian": bool(
            np.allclose(manifold.projection(x, hu), hu, rtol=1e-7, atol=1e-8)
            and np.isclose(
                manifold.inner_product(x, hu, v), manifold.inner_product(x, u, hv)
            )
            and hessian_slope(manifold, cost, x, u, move) > 2.8
        ),
        "retraction": bool(
            np.allclose(manifold.retraction(x, manifold.zero_vector(x)), x, **close)
            and slope(lambda t: chord(t).max()) > 1.85
        ),
        "transport": bool(
            np.allclose(manifold.projection(y, carried), carried, rtol=1e-7, atol=1e-8)
            and np.allclose(manifold.transport(x, x, u), u, rtol=1e-7, atol=1e-8)
            and np.allclose(
                manifold.transport(x, y, 2.0 * u), 2.0 * carried, rtol=1e-7, atol=1e-8
            )
        ),
    }


def second_order(case: Case, manifold: Any) -> Callable[[Array, Array], Array] | None:
    """A curve that agrees with geodesics to second order, or None."""
    if "Birkhoff" in case.name:
        return None
    return manifold.retraction if "FixedRank" in case.name else manifold.exp


CURVED = [case for case in OURS if "Birkhoff" not in case.name]


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
@given(seed=SEEDS)
@FEW
def test_views_keep_the_laws_of_pymanopt(case: Case, seed: int) -> None:
    seeded(seed)
    view = as_pymanopt(case.make(), case.shape)
    x = view.random_point()
    assert x.shape == case.shape
    assert x.dtype == np.float64
    move = second_order(case, view)
    found = findings(view, Cost(view.manifold, case.shape), x, move or view.retraction)
    if move is None:  # no curve of second order is known
        del found["hessian"]
    assert all(found.values()), found
    assert view.typical_dist > 0


@pytest.mark.parametrize(("law", "kind"), mutants.VIEWS, ids=str)
def test_wrong_views_break_their_law(law: str, kind: type) -> None:
    for manifold, shape in (
        (rm.manifolds.Stiefel(), (5, 3)),
        (rm.manifolds.Sphere(), (4,)),
    ):
        view = mutants.view(kind, manifold, shape)
        x = view.random_point()
        right = as_pymanopt(manifold, shape)
        found = findings(view, Cost(manifold, shape), x, right.exp)
        assert not found[law], (kind.__name__, found)


NO_LOGARITHM = {
    "Stiefel, tall",
    "Stiefel, wide",
    "CanonicalStiefel, tall",
    "CanonicalStiefel, wide",
    "Scaled(CanonicalStiefel)",
    "BirkhoffPolytope",
    "Scaled(BirkhoffPolytope)",
    "FixedRank(2)",
    "Product",
}


@pytest.mark.parametrize("case", OURS, ids=lambda case: case.name)
def test_geodesics_are_closed_forms_or_refused_with_a_reason(case: Case) -> None:
    manifold = case.make()
    view = as_pymanopt(manifold, case.shape)
    x = view.random_point()
    u = 0.2 * view.random_tangent_vector(x)
    if case.name in NO_LOGARITHM:
        with pytest.raises(NotImplementedError, match=re.escape(str(view))):
            view.log(x, view.retraction(x, u))
        with pytest.raises(NotImplementedError, match="pair_mean"):
            view.pair_mean(x, view.retraction(x, u))
        return
    y = view.exp(x, u)
    w = view.log(x, y)
    np.testing.assert_allclose(w, u, rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(view.dist(x, y), view.norm(x, u), rtol=1e-6)
    middle = view.pair_mean(x, y)
    np.testing.assert_allclose(view.dist(x, middle), 0.1, rtol=1e-6)
    np.testing.assert_allclose(view.dist(middle, y), 0.1, rtol=1e-6)


TWINS = [
    (rm.manifolds.Euclidean(), (3, 2), pm.Euclidean(3, 2)),
    (rm.manifolds.Sphere(), (4,), pm.Sphere(4)),
    (rm.manifolds.Stiefel(), (5, 3), pm.Stiefel(5, 3)),
    (rm.manifolds.Grassmann(), (5, 2), pm.Grassmann(5, 2)),
    (rm.manifolds.SPD(), (3, 3), pm.SymmetricPositiveDefinite(3)),
    (rm.manifolds.Oblique(), (3, 4), pm.Oblique(3, 4)),
    (rm.manifolds.Positive(), (3, 2), pm.Positive(3, 2)),
    # Made in float32, where geoopt computes the curvature from another number.
    (rm.manifolds.PoincareBall(), (3,), pm.PoincareBall(3)),
]


@pytest.mark.parametrize(
    ("manifold", "shape", "other"), TWINS, ids=lambda v: getattr(v, "name", "")
)
@given(seed=SEEDS)
@FEW
def test_views_equal_pymanopts_own_manifolds(
    manifold: geoopt.Manifold, shape: tuple[int, ...], other: Any, seed: int
) -> None:
    """All of the geometry, the Hessian included, computed by two libraries."""
    seeded(seed)
    view = as_pymanopt(manifold, shape)
    assert view.dim == other.dim
    assert np.isclose(view.typical_dist, other.typical_dist)
    x = other.random_point()
    if shape == (3,):  # far from the boundary, where all digits are good
        x = 0.8 * x
    u, v = (0.5 * other.random_tangent_vector(x) for _ in range(2))
    e, h = (np.random.standard_normal(shape) for _ in range(2))  # noqa: NPY002
    if isinstance(manifold, rm.manifolds.SPD):
        e, h = e + e.T, h + h.T
    if isinstance(manifold, rm.manifolds.Grassmann):
        # Ordinary derivatives of a function of the subspace along horizontal vectors.
        cost = Cost(manifold, shape)
        e, h = cost.gradient(x), cost.hessian(x, u)
    close = {"rtol": 1e-9, "atol": 1e-9}
    np.testing.assert_allclose(
        view.inner_product(x, u, v), other.inner_product(x, u, v), **close
    )
    for verb, arguments in (
        ("projection", (x, h)),
        ("euclidean_to_riemannian_gradient", (x, e)),
        ("euclidean_to_riemannian_hessian", (x, e, h, u)),
    ):
        found, expected = (getattr(m, verb)(*arguments) for m in (view, other))
        np.testing.assert_allclose(found, expected, err_msg=verb, **close)
    y = other.exp(x, u)
    if isinstance(manifold, rm.manifolds.Grassmann):
        projector = y @ y.T
        y = view.exp(x, u)
        np.testing.assert_allclose(y @ y.T, projector, **close)
    else:
        np.testing.assert_allclose(view.exp(x, u), y, **close)
    if not isinstance(manifold, rm.manifolds.Stiefel):
        np.testing.assert_allclose(view.dist(x, y), other.dist(x, y), rtol=1e-7)


EMBEDDED = [
    (rm.manifolds.Sphere(), (4,), pm.Sphere(4)),
    (rm.manifolds.Stiefel(), (5, 3), pm.Stiefel(5, 3)),
]


@pytest.mark.parametrize(
    ("manifold", "shape", "other"), EMBEDDED, ids=lambda v: getattr(v, "name", "")
)
def test_weingarten_maps_equal_pymanopts(
    manifold: geoopt.Manifold, shape: tuple[int, ...], other: Any
) -> None:
    view = as_pymanopt(manifold, shape)
    assert isinstance(view, RiemannianSubmanifold)
    x = view.random_point()
    u = view.random_tangent_vector(x)
    ambient = np.random.standard_normal(shape)  # noqa: NPY002
    n = ambient - view.projection(x, ambient)
    np.testing.assert_allclose(
        view.weingarten(x, u, n), other.projection(x, other.weingarten(x, u, n))
    )
    # With it pymanopt's own formula for submanifolds gives the same Hessian.
    e, h = (np.random.standard_normal(shape) for _ in range(2))  # noqa: NPY002
    np.testing.assert_allclose(
        RiemannianSubmanifold.euclidean_to_riemannian_hessian(view, x, e, h, u),
        view.euclidean_to_riemannian_hessian(x, e, h, u),
    )


def test_submanifolds_are_those_with_the_surrounding_metric() -> None:
    inside = {
        case.name: isinstance(as_pymanopt(case.make(), case.shape), GeooptSubmanifold)
        for case in OURS
    }
    assert inside["FixedRank(2)"]
    assert inside["Oblique, rows"]
    assert inside["Reshaped(Sphere)"]
    assert inside["SpecialOrthogonal"]
    for name in ("CanonicalStiefel, tall", "Grassmann, wide", "SPD", "Product"):
        assert not inside[name], name
    unit = rm.manifolds.Product({"a": (rm.manifolds.Sphere(), (3,))})
    assert isinstance(as_pymanopt(unit, (3,)), GeooptSubmanifold)


def test_random_points_come_from_numpys_stream() -> None:
    view = as_pymanopt(rm.manifolds.Stiefel(), (4, 2))
    before = torch.get_rng_state()
    np.random.seed(7)  # noqa: NPY002
    first = view.random_point()
    np.random.seed(7)  # noqa: NPY002
    second = view.random_point()
    assert np.array_equal(first, second)
    assert not np.array_equal(first, view.random_point())
    state = np.random.get_state()[1].copy()  # noqa: NPY002
    assert view.typical_dist == 2**0.5
    assert np.array_equal(state, np.random.get_state()[1])  # noqa: NPY002
    assert torch.equal(before, torch.get_rng_state())


def test_pymanopts_product_takes_views() -> None:
    """Layouts of several arrays: a nested product is flattened into one of them."""
    inner = rm.manifolds.Product(
        {"a": (rm.manifolds.Stiefel(), (3, 2)), "b": (rm.manifolds.Euclidean(), (2,))}
    )
    product = pm.Product([as_pymanopt(inner, (8,)), pm.Sphere(3)])
    assert product.point_layout == (1, 1)
    assert product.dim == 3 + 2 + 2
    target = torch.randn(8)

    @pymanopt.function.pytorch(product)
    def cost(flat: Tensor, unit: Tensor) -> Tensor:
        return (flat - target).square().sum() + unit[0] * flat[0]

    task = pymanopt.Problem(product, cost)
    result = TrustRegions(verbosity=0, min_gradient_norm=1e-9).run(task)
    assert result.gradient_norm < 1e-9
    w = result.point[0][:6].reshape(3, 2)
    np.testing.assert_allclose(w.T @ w, np.eye(2), atol=1e-12)


def test_bad_views_are_refused() -> None:
    with pytest.raises(ManifoldContractError, match="CanonicalStiefel"):
        as_pymanopt(geoopt.CanonicalStiefel(), (3, 2))
    with pytest.raises(ShapeError, match=r"\(3,\)"):
        as_pymanopt(rm.manifolds.Stiefel(), (3,))
    view = as_pymanopt(rm.manifolds.Sphere(), (3,))
    with pytest.raises(ShapeError, match=r"got an array of shape \(4,\)"):
        view.projection(np.zeros(4), np.zeros(4))
    birkhoff = as_pymanopt(rm.manifolds.BirkhoffPolytope(), (3, 3))
    x = birkhoff.random_point()
    with pytest.raises(NotImplementedError, match="Birkhoff"):
        birkhoff.exp(x, np.zeros((3, 3)))


# --- a metric with a factor as a pymanopt manifold


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        rm.nn.Linear(4, 3, manifold=rm.manifolds.Stiefel()),
        nn.Tanh(),
        nn.Linear(3, 2),
    ).double()


def data(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(12, 4, generator=generator, dtype=torch.float64)
    return x, (x[:, 0] * x[:, 1] > 0).long()


def cross_entropy(y: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda logits: F.cross_entropy(logits, y)


def recorded(model: nn.Module, **settings: Any) -> rm.LayerwiseMetric:
    x, y = data()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1, **settings)
    with metric.record():
        logits = model(x)
    metric.backward(F.cross_entropy(logits, y), logits)
    return metric


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_layer_metrics_keep_the_laws_of_pymanopt(blocks: str) -> None:
    metric = recorded(small_model(), blocks=blocks)
    product = metric.manifold
    view = as_pymanopt(product, (product.n_elements,))
    base = as_pymanopt(rm.manifolds.Product.of(metric.model), (product.n_elements,))
    x = product.pack({d.name: d.tensor.detach() for d in metric.parameters}).numpy()
    cost = Cost(None, (product.n_elements,))
    found = findings(view, cost, x, base.exp)
    assert all(found.values()), found
    for verb, arguments in (
        ("exp", (x, x)),
        ("log", (x, x)),
        ("dist", (x, x)),
        ("pair_mean", (x, x)),
    ):
        with pytest.raises(NotImplementedError, match=f"{verb}: the geodesics"):
            getattr(view, verb)(*arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_views_of_one_parameter_are_snapshots(dtype: torch.dtype) -> None:
    """A float32 metric is taken in float64, and does not change when it is renewed."""
    model = small_model().to(dtype)
    x, y = (t.to(dtype) if t.is_floating_point() else t for t in data())
    metric = rm.LayerwiseMetric(
        model, rm.output.Categorical(), mass=0.1, blocks="tensor"
    )
    with metric.record():
        logits = model(x)
    metric.backward(F.cross_entropy(logits, y), logits)
    weight = model[0].weight
    view = as_pymanopt(weight.manifold, weight.shape)
    point = weight.detach().double().numpy()
    point = view.manifold.projx(torch.from_numpy(point)).numpy()
    found = findings(view, Cost(None, (3, 4)), point, _stiefel_exp)
    assert all(found.values()), found
    u = view.random_tangent_vector(point)
    expected = metric.blocks["0.weight"].inner(*2 * (torch.from_numpy(u).to(dtype),))
    np.testing.assert_allclose(view.norm(point, u) ** 2, float(expected), rtol=1e-5)
    before = view.inner_product(point, u, u)
    metric.set_mass(10.0)
    with metric.record():
        logits = model(x)
    metric.pull_back(logits)
    assert view.inner_product(point, u, u) == before


def _stiefel_exp(x: Array, u: Array) -> Array:
    pair = torch.from_numpy(x), torch.from_numpy(u)
    return rm.manifolds.Stiefel().expmap(*pair).numpy()


def test_without_a_factor_and_with_mass_one_a_metric_is_its_base() -> None:
    """Also where it was pulled back; with another mass it is in other units."""
    model = small_model()
    x, _ = data()
    for mass, unit in ((1.0, 1.0), (4.0, 2.0)):
        metric = rm.LayerwiseMetric(model, output=None, mass=mass)
        with metric.record():
            outputs = model(x)
        metric.backward(outputs.square().mean(), outputs)
        weight = model[0].weight
        view = as_pymanopt(weight.manifold, (3, 4))
        base = as_pymanopt(rm.manifolds.Stiefel(), (3, 4))
        point = base.random_point()
        u = base.random_tangent_vector(point)
        assert view.norm(point, u) == pytest.approx(unit * base.norm(point, u))
        assert view.typical_dist == pytest.approx(unit * base.typical_dist)
        product = metric.manifold
        whole = as_pymanopt(product, (product.n_elements,))
        flat = np.concatenate([point.ravel(), np.zeros(11)])
        ahead = np.concatenate([u.ravel(), np.ones(11)])
        expected = unit**2 * (base.inner_product(point, u, u) + 11.0)
        assert whole.inner_product(flat, ahead, ahead) == pytest.approx(expected)
        assert np.array_equal(view.exp(point, u), base.exp(point, u))


# --- pymanopt's manifolds in geoopt

FOREIGN = [
    pm.Euclidean(3, 2),
    pm.Symmetric(3),
    pm.SkewSymmetric(3),
    pm.Sphere(4),
    pm.Stiefel(5, 3),
    pm.Stiefel(4, 2, k=2),
    pm.Grassmann(5, 2),
    pm.Grassmann(4, 2, k=2),
    pm.Oblique(3, 4),
    pm.SpecialOrthogonalGroup(3),
    pm.SymmetricPositiveDefinite(3),
    pm.Positive(3, 2),
    pm.PoincareBall(3),
]


@pytest.mark.parametrize("other", FOREIGN, ids=str)
def test_pymanopts_manifolds_keep_geoopts_contract(other: Any) -> None:
    manifold = as_geoopt(other)
    point = 0.7 * torch.ones(manifold.shape)
    x = torch.as_tensor(manifold.random(*manifold.shape).data)
    assert manifold.check_point_on_manifold(x, atol=1e-9, rtol=1e-9)
    assert manifold.check_point_on_manifold(manifold.projx(x + 0.1 * point))
    found = failures(check_base_manifold(manifold, x))
    assert not found, found
    assert rm.manifolds.riesz.dimension(manifold, x) == other.dim
    size = x.numel()
    for view in (
        rm.manifolds.Reshaped(manifold, (size,), x.shape),
        rm.manifolds.Product({"a": (manifold, x.shape)}),
    ):
        assert not failures(check_base_manifold(view, x.reshape(size)))


def test_points_and_vectors_of_other_representations() -> None:
    """pymanopt's rotations have skew tangent vectors, geoopt's ambient ones."""
    own, foreign = (
        rm.manifolds.SpecialOrthogonal(),
        as_geoopt(pm.SpecialOrthogonalGroup(3)),
    )
    x, y = own.random(2, 3, 3), own.random(2, 3, 3)
    u = own.proju(x, torch.randn(2, 3, 3))
    torch.testing.assert_close(foreign.proju(x, u), u)
    torch.testing.assert_close(foreign.inner(x, u), own.inner(x, u))
    torch.testing.assert_close(foreign.expmap(x, u), own.expmap(x, u))
    torch.testing.assert_close(foreign.logmap(x, y), own.logmap(x, y))
    torch.testing.assert_close(foreign.transp(x, y, u), own.transp(x, y, u))
    torch.testing.assert_close(foreign.dist(x, y), own.dist(x, y))


@pytest.mark.parametrize(
    ("manifold", "shape", "other"), TWINS, ids=lambda v: getattr(v, "name", "")
)
def test_round_trips_are_identities(
    manifold: geoopt.Manifold, shape: tuple[int, ...], other: Any
) -> None:
    """From pymanopt to geoopt and back again, Hessian included."""
    back = as_pymanopt(as_geoopt(other), shape)
    x = back.random_point()
    u, v = (back.random_tangent_vector(x) for _ in range(2))
    e, h = (np.random.standard_normal(shape) for _ in range(2))  # noqa: NPY002
    if isinstance(manifold, rm.manifolds.SPD):
        e, h = e + e.T, h + h.T
    close = {"rtol": 1e-9, "atol": 1e-10}
    np.testing.assert_allclose(
        back.inner_product(x, u, v), other.inner_product(x, u, v), **close
    )
    for verb, arguments in (
        ("retraction", (x, u)),
        ("euclidean_to_riemannian_gradient", (x, e)),
        ("transport", (x, other.retraction(x, u), v)),
    ):
        if verb == "transport" and isinstance(other, pm.PoincareBall):
            continue  # pymanopt has none
        found, expected = (getattr(m, verb)(*arguments) for m in (back, other))
        np.testing.assert_allclose(found, expected, err_msg=verb, **close)
    found, expected = (
        m.inner_product(x, m.euclidean_to_riemannian_hessian(x, e, h, u), v)
        for m in (back, other)
    )
    np.testing.assert_allclose(found, expected, **close)


def test_batches_and_data_types() -> None:
    sphere = as_geoopt(pm.Sphere(3))
    x = sphere.random(2, 4, 3, dtype=torch.float32)
    assert x.dtype == torch.float32
    u = sphere.proju(x, torch.randn(4, 3, dtype=torch.float32))
    assert u.shape == (2, 4, 3)
    assert u.dtype == torch.float32
    assert sphere.inner(x, u).shape == (2, 4)
    assert sphere.inner(x, u, keepdim=True).shape == (2, 4, 1)
    assert sphere.dist(x, sphere.retr(x, u), keepdim=True).shape == (2, 4, 1)
    torch.testing.assert_close(sphere.inner(x, u), geoopt.Sphere().inner(x, u))
    assert torch.equal(sphere.origin(3), sphere.origin(3))
    with pytest.raises(ValueError, match=r"\(4,\)"):
        sphere.random(4)


def test_products_become_products() -> None:
    product = as_geoopt(pm.Product([pm.Stiefel(3, 2), pm.Sphere(4)]))
    assert isinstance(product, rm.manifolds.Product)
    x = torch.as_tensor(product.random(10).data)
    assert not failures(check_base_manifold(product, x))
    assert rm.manifolds.riesz.dimension(product, x) == 6
    custom = as_geoopt(
        pm.Product([pm.Elliptope(3, 2), pm.Sphere(4)]), [unit_rows, None]
    )
    assert custom.check_point_on_manifold(custom.random(10))


def unit_rows(array: Array) -> Array:
    return array / np.linalg.norm(array, axis=1, keepdims=True)


def test_what_geoopt_cannot_hold_is_refused() -> None:
    with pytest.raises(ManifoldContractError, match="3 arrays"):
        as_geoopt(pm.FixedRankEmbedded(4, 3, 2))
    with pytest.raises(ManifoldContractError, match="complex"):
        as_geoopt(pm.ComplexCircle(3))
    with pytest.raises(ManifoldContractError, match="projx=function"):
        as_geoopt(pm.Elliptope(3, 2))
    with pytest.raises(ManifoldContractError, match="one for each part"):
        as_geoopt(pm.Product([pm.Sphere(3), pm.Sphere(2)]), unit_rows)
    with pytest.raises(ManifoldContractError, match="function"):
        as_geoopt(pm.Sphere(3), [unit_rows])
    elliptope = as_geoopt(pm.Elliptope(3, 2), unit_rows)
    x = elliptope.random(3, 2)
    with pytest.raises(NotImplementedError, match="retraction"):
        elliptope.expmap(x, torch.zeros(3, 2))


def test_a_layer_on_a_pymanopt_manifold_takes_the_same_steps() -> None:
    """A parameter there, under a layer metric, next to one on the library's own."""
    x, y = data()
    weights = []
    for manifold in (as_geoopt(pm.Stiefel(4, 3)), rm.manifolds.Stiefel()):
        torch.manual_seed(0)
        model = Tall(manifold)
        metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
        optimizer = rm.optim.RiemannianSGD(metric, lr=0.3)
        for _ in range(3):
            with metric.record():
                logits = model(x)
            metric.backward(F.cross_entropy(logits, y), logits)
            optimizer.step()
        weights.append(model.weight.detach().clone())
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-10)


class Tall(nn.Module):
    def __init__(self, manifold: geoopt.Manifold) -> None:
        super().__init__()
        point, _ = torch.linalg.qr(torch.randn(4, 3))
        view = rm.manifolds.MetricManifold(manifold)
        self.weight = geoopt.ManifoldParameter(point, manifold=view)

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight)[:, :2]


# --- problems


class ProblemCost:
    """The derivatives of a problem under the names of the laws above."""

    def __init__(self, task: Any) -> None:
        self.value, self.gradient = task.cost, task.euclidean_gradient
        self.hessian = task.euclidean_hessian


def make(model: nn.Module | None = None, **options: Any) -> tuple[Any, nn.Module]:
    x, y = data()
    model = small_model() if model is None else model
    blocks = options.pop("blocks", "layer")
    mass = options.pop("mass", 0.1)
    metric = rm.LayerwiseMetric(
        model, rm.output.Categorical(), mass=mass, blocks=blocks
    )
    return problem(metric, cross_entropy(y), x, **options), model


@pytest.mark.parametrize("geometry", ["layer", "base"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
def test_problems_keep_the_laws_of_pymanopt(geometry: str, weight_decay: float) -> None:
    task, _ = make(geometry=geometry, weight_decay=weight_decay)
    base, _ = make(geometry="base")
    found = findings(
        task.manifold, ProblemCost(task), task.initial_point, base.manifold.exp
    )
    assert all(found.values()), found


def test_problems_have_the_derivatives_of_the_model() -> None:
    """Against torch on the model itself, weight decay included."""
    task, model = make(weight_decay=0.3)
    x, y = data()
    point, names = task.initial_point, dict(model.named_parameters())

    def cost(*values: Tensor) -> Tensor:
        named = dict(zip(names, values, strict=True))
        logits = torch.func.functional_call(model, named, (x,))
        squares = sum(value.square().sum() for value in values)
        return F.cross_entropy(logits, y) + 0.15 * squares

    values = tuple(p.detach().as_subclass(Tensor) for p in names.values())
    assert task.cost(point) == pytest.approx(float(cost(*values)))
    gradient = torch.func.grad(cost, argnums=tuple(range(len(values))))
    expected = torch.cat([g.reshape(-1) for g in gradient(*values)])
    np.testing.assert_allclose(task.euclidean_gradient(point), expected, atol=1e-12)
    u = np.random.standard_normal(point.shape)  # noqa: NPY002
    parts = task.manifold.unpack(u)
    along = tuple(torch.from_numpy(parts[name]) for name in names)
    _, rates = torch.func.jvp(gradient, values, along)
    expected = torch.cat([rate.reshape(-1) for rate in rates])
    np.testing.assert_allclose(task.euclidean_hessian(point, u), expected, atol=1e-12)
    assert np.array_equal(task.manifold.pack(parts), u)


def test_the_metric_is_that_of_the_point_asked_about() -> None:
    """Against a metric recorded at that point by hand, also after going back."""
    task, model = make()
    x, y = data()
    first = task.initial_point
    u = 0.5 * task.manifold.random_tangent_vector(first)
    second = task.manifold.retraction(first, u)
    for point in (second, first, second, task.manifold.retraction(first, -u), first):
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for name, value in task.manifold.unpack(point).items():
                twin.get_parameter(name).copy_(torch.from_numpy(value))
        metric = rm.LayerwiseMetric(twin, rm.output.Categorical(), mass=0.1)
        with metric.record():
            logits = twin(x)
        metric.backward(F.cross_entropy(logits, y), logits)
        product = metric.manifold
        expected = product.pack(metric.natural_gradient()).numpy()
        found = task.riemannian_gradient(point)
        np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-11)
        v = task.manifold.random_tangent_vector(point)
        pair = torch.from_numpy(point), torch.from_numpy(v)
        inner = float(product.inner(*pair))
        np.testing.assert_allclose(task.manifold.norm(point, v) ** 2, inner)


def test_a_metric_that_stays_behind_is_found() -> None:
    task, _ = make()
    stale = mutants.StaleMetric(
        task._metric, ModelCostOf(task), task.manifold, task._pulled, None
    )
    x = task.initial_point
    u = task.manifold.random_tangent_vector(x)
    y = task.manifold.retraction(x, u)
    assert stale.manifold is task.manifold
    fresh, _ = make()
    e = fresh.euclidean_gradient(y)
    wrong = stale.manifold.euclidean_to_riemannian_gradient(y, e)
    right = fresh.riemannian_gradient(y)
    assert np.abs(wrong - right).max() > 1e-3 * np.abs(right).max()


class ModelCostOf:
    def __init__(self, task: Any) -> None:
        self.value = self.gradient = self.hessian = task.cost


def test_line_searches_hold_the_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    """One pull-back for an iterate, none for the points that are tried."""
    task, _ = make(mass=1e-3)
    pulls, costs = [], []
    pulled = task.manifold._pulled
    original = pulled._pull_back

    def counted(point: Tensor) -> Any:
        pulls.append(point)
        return original(point)

    monkeypatch.setattr(pulled, "_pull_back", counted)
    cost = task.cost
    monkeypatch.setattr(task, "_cost", lambda p: costs.append(p) or cost(p))
    result = SteepestDescent(max_iterations=6, verbosity=0).run(
        task, initial_point=task.initial_point
    )
    assert len(pulls) == result.iterations
    assert len(costs) > len(pulls) + 3


@pytest.mark.parametrize(
    ("optimizer", "options"),
    [
        (SteepestDescent, {}),
        (ConjugateGradient, {}),
        (ConjugateGradient, {"geometry": "base"}),
        (ConjugateGradient, {"geometry": "base", "preconditioner": "layer"}),
        (ConjugateGradient, {"preconditioner": "base"}),
        (TrustRegions, {}),
        (TrustRegions, {"blocks": "model"}),
        (TrustRegions, {"geometry": "base"}),
        (TrustRegions, {"geometry": "base", "preconditioner": "layer"}),
        (TrustRegions, {"preconditioner": "base"}),
    ],
)
def test_optimizers_find_a_minimum(optimizer: type, options: dict[str, Any]) -> None:
    task, model = make(weight_decay=0.1, **options)
    x, y = data()
    start = task.initial_point
    values = {n: p.detach().clone() for n, p in model.named_parameters()}
    tolerance = 1e-9 if optimizer is TrustRegions else 1e-4
    result = optimizer(
        verbosity=0, max_iterations=200, min_gradient_norm=tolerance
    ).run(task, initial_point=start)
    assert result.gradient_norm < tolerance, result
    # Nothing of it was seen by the model.
    for name, parameter in model.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, values[name])
    task.write_back(result)
    with torch.no_grad():
        decay = 0.05 * sum(float(p.square().sum()) for p in model.parameters())
        loss = float(F.cross_entropy(model(x), y)) + decay
    assert loss == pytest.approx(result.cost, rel=1e-12)
    assert loss < task.cost(start)
    assert np.array_equal(task.initial_point, result.point)
    assert all(p.grad is None for p in model.parameters())


class Unit(nn.Module):
    """Vectors with geodesics of closed form, one on a sphere, one free."""

    def __init__(self) -> None:
        super().__init__()
        view = rm.manifolds.MetricManifold(rm.manifolds.Sphere())
        point = torch.tensor([[0.6, 0.8, 0.0]])
        self.weight = geoopt.ManifoldParameter(point, manifold=view)
        self.bias = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.mT + self.bias


@pytest.mark.parametrize("optimizer", [NelderMead, ParticleSwarm])
def test_optimizers_without_derivatives(optimizer: type) -> None:
    """In the base metric where it has geodesics; a clear refusal elsewhere."""
    x = torch.diag(torch.tensor([1.0, 2.0, 3.0]))

    def loss(outputs: Tensor) -> Tensor:
        return outputs.square().sum()

    def task(model: nn.Module, geometry: str) -> Any:
        metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
        return problem(metric, loss, x, geometry=geometry)

    model = Unit()
    base = task(model, "base")
    method = optimizer(verbosity=0, max_iterations=15)
    result = method.run(base)
    assert result.cost < 0.5 * base.cost(base.initial_point)
    base.write_back(result)
    assert float(model.weight.detach().norm()) == pytest.approx(1.0)
    with pytest.raises(NotImplementedError, match="base manifold"):
        optimizer(verbosity=0, max_iterations=3).run(task(Unit(), "layer"))
    stiefel, _ = make(geometry="base")
    with pytest.raises(NotImplementedError, match="no closed form"):
        optimizer(verbosity=0, max_iterations=3).run(stiefel)


def test_without_a_factor_and_with_mass_one_the_trajectory_is_the_base_one() -> None:
    x, y = data()
    paths = []
    for output, geometry in ((None, "layer"), (rm.output.Categorical(), "base")):
        model = small_model()
        metric = rm.LayerwiseMetric(model, output=output, mass=1.0)
        task = problem(metric, cross_entropy(y), x, geometry=geometry)
        assert task.manifold.typical_dist == pytest.approx((3.0 + 8.0 + 3.0) ** 0.5)
        optimizer = ConjugateGradient(verbosity=0, max_iterations=15, log_verbosity=1)
        result = optimizer.run(task, initial_point=task.initial_point)
        paths.append(np.array(result.log["iterations"]["point"]))
    np.testing.assert_allclose(*paths, rtol=1e-10, atol=1e-11)


def test_a_float32_model_is_evaluated_in_float32() -> None:
    seen = set()
    model = small_model().float()
    model[1].register_forward_hook(lambda m, args, out: seen.add(out.dtype))
    x, y = data()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    task = problem(metric, cross_entropy(y), x.float())
    point = task.initial_point
    assert point.dtype == np.float64
    result = SteepestDescent(verbosity=0, max_iterations=10).run(
        task, initial_point=point
    )
    assert seen == {torch.float32}
    assert result.cost < task.cost(point)
    task.write_back(result)
    assert model[0].weight.dtype == torch.float32
    gram = model[0].weight @ model[0].weight.T
    torch.testing.assert_close(gram, torch.eye(3, dtype=torch.float32))


def test_retractions_are_values() -> None:
    x, y = data()
    model = small_model()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    for retraction in (rm.retractions.Cayley(), rm.retractions.Projection()):
        task = problem(metric, cross_entropy(y), x, retraction=retraction)
        point = task.initial_point
        u = task.manifold.random_tangent_vector(point)
        moved = task.manifold.unpack(task.manifold.retraction(point, u))
        parts, along = task.manifold.unpack(point), task.manifold.unpack(u)
        pair = [torch.from_numpy(t["0.weight"]) for t in (parts, along)]
        expected = retraction(rm.manifolds.Stiefel(), *pair)
        np.testing.assert_allclose(moved["0.weight"], expected, atol=1e-14)
        assert np.array_equal(moved["2.bias"], parts["2.bias"] + along["2.bias"])


class Hyperbolic(nn.Module):
    """Points of a ball of which pairs are compared, and a parameter without a use."""

    def __init__(self, *, asks: bool) -> None:
        super().__init__()
        self.asks = asks
        ball = rm.manifolds.MetricManifold(geoopt.PoincareBall(c=0.5))
        self.points = geoopt.ManifoldParameter(0.3 * torch.randn(3, 2), manifold=ball)
        self.unused = nn.Parameter(torch.ones(2))

    def forward(self, pairs: Tensor) -> Tensor:
        x, y = self.points[pairs[:, 0]], self.points[pairs[:, 1]]
        ball = geoopt.PoincareBall(c=0.5)
        if self.asks:
            ball = self.points.manifold.base
        gap = ball.mobius_add(-x, y).square().sum(-1, keepdim=True)
        return 2.0 / ball.c.sqrt() * torch.atanh((ball.c * gap).sqrt())


@pytest.mark.parametrize("geometry", ["layer", "base"])
def test_curved_parameters_and_parameters_without_a_use(geometry: str) -> None:
    """In the base metric the forward may ask its weight for its manifold."""
    model, x = Hyperbolic(asks=geometry == "base"), torch.tensor([[0, 1], [1, 2]])
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    task = problem(
        metric,
        lambda d: (d - 0.7).square().sum(),
        x,
        geometry=geometry,
        weight_decay=1e-2,
    )
    result = TrustRegions(verbosity=0, min_gradient_norm=1e-8, max_iterations=50).run(
        task, initial_point=task.initial_point
    )
    assert result.gradient_norm < 1e-8
    found = task.manifold.unpack(result.point)
    assert np.abs(found["unused"]).max() < 1e-5


@pytest.mark.parametrize("seed", range(4))
def test_typical_distances_count_what_outputs_add(seed: int) -> None:
    """From the base one times the root of the mass up to that of the largest gain."""
    torch.manual_seed(seed)
    model = rm.nn.Linear(3, 1, manifold=rm.manifolds.Sphere(), bias=False)
    rows, mass = torch.diag(torch.tensor([2.0, 3.0, 4.0])), 0.1
    metric = rm.LayerwiseMetric(
        model, rm.output.Euclidean(), mass=mass, reduction="sum"
    )
    task = problem(metric, lambda y: y.square().sum(), rows)
    ratio = (task.manifold.typical_dist / np.pi) ** 2
    assert 2.0**2 + mass <= ratio <= 4.0**2 + mass


def test_a_module_with_two_names_has_the_gradient_of_both_uses() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2, dtype=torch.float64)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(5, 2, dtype=torch.float64)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1, blocks="model")
    task = problem(metric, lambda z: 0.5 * z.square().sum(-1).mean(), x)
    with metric.record():
        z = model(x)
    metric.backward(0.5 * z.square().sum(-1).mean(), z)
    for _ in range(2):  # the metric is pulled back behind the cost
        found = task.riemannian_gradient(task.initial_point)
    own = torch.cat([v.flatten() for v in metric.natural_gradient().values()])
    assert np.allclose(found, own.numpy(), rtol=1e-10)


def test_metrics_of_copies_have_the_same_settings() -> None:
    model = small_model()
    masses = {"0.*": 0.5, "2.weight": torch.rand(2, 3) + 0.5, "2.bias": 2.0}
    metric = rm.LayerwiseMetric(
        model, rm.output.Categorical(), mass=masses, blocks="model", reduction="sum"
    )
    twin = copy.deepcopy(model)
    x, y = data()
    gradients = []
    for own, each in ((model, metric), (twin, metric.of(twin))):
        with each.record():
            logits = own(x)
        each.backward(F.cross_entropy(logits, y), logits)
        gradients.append(each.natural_gradient())
        assert list(each.blocks) == ["model"]
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected)


def test_sampled_rows_belong_to_the_point() -> None:
    """The same ones at every visit; nobody's stream of random numbers moves."""
    x, y = data()
    output = rm.output.Sampled(rm.output.Categorical(), probes=1)
    metric = rm.LayerwiseMetric(small_model(), output, mass=0.1)
    task = problem(metric, cross_entropy(y), x)
    points = [task.initial_point]
    for _ in range(3):
        u = task.manifold.random_tangent_vector(points[0])
        points.append(task.manifold.retraction(points[0], 0.1 * u))
    state = torch.get_rng_state()
    first, *_, last = (task.riemannian_gradient(p) for p in (*points, points[0]))
    assert np.array_equal(first, last)
    assert torch.equal(state, torch.get_rng_state())


def test_bad_problems_are_refused() -> None:
    x, y = data()
    model = small_model()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    loss = cross_entropy(y)
    for options in (
        {"geometry": "euclidean"},
        {"preconditioner": "jacobi"},
        {"weight_decay": -1.0},
        {"weight_decay": float("nan")},
    ):
        with pytest.raises(ProblemError, match=next(iter(options))):
            problem(metric, loss, x, **options)
    with pytest.raises(ProblemError, match="Product"):
        problem(metric.manifold, loss, x)
    noisy = nn.Sequential(small_model(), nn.Dropout(0.5))
    with pytest.raises(ProblemError, match=r"model\.eval"):
        problem(rm.LayerwiseMetric(noisy, rm.output.Categorical()), loss, x)
    with pytest.raises(ShapeError, match="scalar"):
        problem(metric, lambda logits: logits, x)
    with pytest.raises(NonFiniteError, match="not finite"):
        problem(metric, lambda logits: logits.sum() * float("nan"), x)


def test_bad_results_are_not_written_back() -> None:
    task, model = make()
    before = copy.deepcopy(model.state_dict())
    point = task.initial_point
    with pytest.raises(NotOnManifoldError, match=r"0\.weight"):
        task.write_back(point + 0.1)
    with pytest.raises(NonFiniteError, match="NaN"):
        task.write_back(np.full_like(point, np.nan))
    with pytest.raises(ShapeError, match="shape"):
        task.write_back(point[:-1])
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
    # A cost that is not a number is as bad as any for a line search.
    assert task.cost(np.full_like(point, np.nan)) == np.inf


# --- the package


def test_the_library_does_not_need_pymanopt() -> None:
    code = """
import sys
sys.modules["pymanopt"] = None
import riemannian_modules
import riemannian_modules.interop
try:
    import riemannian_modules.interop.pymanopt
except ImportError as error:
    assert "pip install riemannian-modules[pymanopt]" in str(error), error
else:
    raise SystemExit("imported without pymanopt")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.fixture(scope="module")
def rayleigh() -> ModuleType:
    return loaded("examples/pymanopt_rayleigh.py")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_layer_metric_conditions_a_rayleigh_quotient(
    rayleigh: ModuleType, seed: int
) -> None:
    """Condition number 1e3: 30 iterations do, where the base metric takes over 300."""
    layer, base = rayleigh.compare(rayleigh.arguments(["--seed", str(seed)]))
    assert layer.converged
    assert layer.iterations <= 30
    assert layer.errors[-1] < 1e-11
    assert not base.converged
    assert base.iterations == 300
    assert base.errors[-1] > 1e-4
