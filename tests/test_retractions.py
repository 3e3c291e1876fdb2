import dataclasses
import math

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import assert_two_derivatives
from mutants.manifolds import RETRACTIONS as MUTANTS
from torch import Tensor

from riemannian_modules import manifolds
from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds.stiefel import cayley_step
from riemannian_modules.retractions import (
    QR,
    Cayley,
    Default,
    Exponential,
    Orthographic,
    Projection,
    Retraction,
)
from riemannian_modules.testing import (
    best_window_slope,
    check_retraction,
    error_slope,
    failures,
)

EVERYWHERE = (Default(), Exponential(), Projection())
ON_STIEFEL = (*EVERYWHERE, Cayley(), QR())

# The exact order of agreement with the geodesic: the claim must equal it, not just be
# a lower bound. Shapes are such that no accident of dimension raises it.
ORDERS = {
    ("Stiefel", (5, 3)): (1, math.inf, 2, 1, 1),
    ("Stiefel", (3, 5)): (1, math.inf, 2, 1, 1),
    ("CanonicalStiefel", (5, 3)): (2, math.inf, 1, 2, 1),
    ("CanonicalStiefel", (3, 5)): (2, math.inf, 1, 2, 1),
    ("CanonicalStiefel", (2, 7, 3)): (2, math.inf, 1, 2, 1),
    ("Euclidean", (3, 2)): (math.inf, math.inf, math.inf),
    ("Sphere", (4,)): (2, math.inf, 2),
    ("Sphere", (2, 3)): (2, math.inf, 2),
    ("SphereExact", (4,)): (math.inf, math.inf, 2),
    ("PoincareBall", (3,)): (1, math.inf, 1),
    ("PoincareBall", (2, 3)): (1, math.inf, 1),
    ("PoincareBallExact", (3,)): (math.inf, math.inf, 1),
    ("SPD", (3, 3)): (2, math.inf, 1),
}
PAIRS = [
    (name, shape, retraction, order)
    for (name, shape), orders in ORDERS.items()
    for retraction, order in zip(ON_STIEFEL, orders, strict=False)
]


def build(name: str) -> geoopt.Manifold:
    source = manifolds if name in manifolds.__all__ else geoopt
    return getattr(source, name)()


def plain(point: Tensor) -> Tensor:
    return point.detach().as_subclass(Tensor)


@pytest.mark.parametrize(("name", "shape", "retraction", "order"), PAIRS)
@settings(max_examples=max(2, settings.default.max_examples // 5))
@given(seed=st.integers(0, 2**31 - 1))
def test_retractions_pass_every_check_with_their_exact_order(
    name: str,
    shape: tuple[int, ...],
    retraction: Retraction,
    order: float,
    seed: int,
) -> None:
    generator = torch.manual_seed(seed)
    manifold = build(name)
    point = plain(manifold.random(*shape))
    results = check_retraction(manifold, retraction, point, generator=generator)
    assert not failures(results), [str(result) for result in failures(results)]
    assert retraction.order(manifold) == min(order, 2)
    assert results[-1].name == "retraction_order"
    if math.isinf(order):
        assert math.isinf(results[-1].value)
    else:
        # Nearly degenerate draws hide the leading term; they look better, not worse.
        assert results[-1].value > order + 0.75


@pytest.mark.parametrize(
    ("name", "shape", "retraction", "order"), [p for p in PAIRS if not math.isinf(p[3])]
)
def test_claimed_order_is_attained_and_no_more(
    name: str, shape: tuple[int, ...], retraction: Retraction, order: float
) -> None:
    manifold = build(name)
    slopes = []
    for _ in range(5):
        point = plain(manifold.random(*shape))
        slopes.append(check_retraction(manifold, retraction, point)[-1].value)
    assert sorted(slopes)[2] == pytest.approx(order + 1, abs=0.2)


@pytest.mark.parametrize("name", ["Stiefel", "CanonicalStiefel", "Sphere", "SPD"])
@pytest.mark.parametrize("retraction", EVERYWHERE)
def test_retractions_pass_in_float32(name: str, retraction: Retraction) -> None:
    torch.set_default_dtype(torch.float32)
    manifold = build(name)
    point = plain(manifold.random(3, 3) if name == "SPD" else manifold.random(5, 3))
    results = check_retraction(manifold, retraction, point)
    assert not failures(results), [str(result) for result in failures(results)]


@pytest.mark.parametrize("law", MUTANTS)
def test_every_law_rejects_its_mutant(law: str) -> None:
    manifold = manifolds.Stiefel()
    point = plain(manifold.random(5, 3))
    results = check_retraction(manifold, MUTANTS[law], point)
    assert law in {result.name for result in failures(results)}
    assert {result.name for result in results} == set(MUTANTS)


@pytest.mark.parametrize("retraction", ON_STIEFEL)
def test_a_metric_manifold_is_looked_through(retraction: Retraction) -> None:
    base = manifolds.CanonicalStiefel()
    view = manifolds.MetricManifold(base)
    x = plain(base.random(4, 2))
    u = base.proju(x, torch.randn(4, 2))
    assert torch.equal(retraction(view, x, u), retraction(base, x, u))
    assert retraction.order(view) == retraction.order(base)


@pytest.mark.parametrize("retraction", ON_STIEFEL)
def test_a_view_in_another_shape_is_looked_through(retraction: Retraction) -> None:
    base = manifolds.CanonicalStiefel()
    view = manifolds.Reshaped(manifolds.Scaled(base, 2.0), (2, 2, 3), (2, 6))
    x = plain(base.random(2, 6))
    u = base.proju(x, torch.randn(2, 6))
    moved = retraction(view, x.view(2, 2, 3), u.view(2, 2, 3))
    torch.testing.assert_close(moved, retraction(base, x, u).view(2, 2, 3))
    assert retraction.order(view) == retraction.order(base)
    rank = manifolds.FixedRank(2)
    filters = manifolds.Reshaped(rank, (4, 3, 2), (4, 6))
    x = plain(filters.random(4, 3, 2))
    u = filters.proju(x, torch.randn(4, 3, 2))
    moved = Orthographic()(filters, x, 0.1 * u).view(4, 6)
    expected = Orthographic()(rank, x.view(4, 6), 0.1 * u.view(4, 6))
    torch.testing.assert_close(moved, expected)


def test_cayley_is_the_full_solve() -> None:
    x = plain(manifolds.CanonicalStiefel().random(2, 5, 3))
    u = manifolds.CanonicalStiefel().proju(x, torch.randn(2, 5, 3))
    eye = torch.eye(5)
    half = 0.5 * (eye - 0.5 * x @ x.mT) @ u @ x.mT
    half = half - half.mT
    full = torch.linalg.solve(eye - half, (eye + half) @ x)
    torch.testing.assert_close(cayley_step(x, u), full)
    torch.testing.assert_close(cayley_step(x.mT, u.mT), full.mT)


def test_projection_on_stiefel_is_polar() -> None:
    manifold = manifolds.Stiefel()
    x = plain(manifold.random(5, 3))
    u = manifold.proju(x, torch.randn(5, 3))
    values, vectors = torch.linalg.eigh(torch.eye(3) + u.mT @ u)
    polar = (x + u) @ (vectors / values.sqrt()) @ vectors.mT
    torch.testing.assert_close(Projection()(manifold, x, u), polar)


# torch 2.6 says so of its own gradcheck.
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")
@pytest.mark.parametrize("spread", [0.0, 1.0], ids=["equal", "random"])
@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("Stiefel", (4, 2)),
        ("CanonicalStiefel", (2, 2, 3)),
        ("Stiefel", (3, 3)),
        ("Grassmann", (4, 2)),
        ("SpecialOrthogonal", (2, 3, 3)),
    ],
)
def test_projections_have_derivatives(
    name: str, shape: tuple[int, ...], spread: float
) -> None:
    """Also where singular values coincide, as they do on the manifold."""
    manifold = build(name)
    x = 2.0 * plain(manifold.random(*shape)) + spread * torch.randn(shape)
    project = manifold.projx
    moving = x.clone().requires_grad_()
    assert_two_derivatives(project, (moving,), batched=True)
    jacfwd, jacrev = torch.func.jacfwd, torch.func.jacrev
    hessian = jacrev(jacrev(project))(x)
    torch.testing.assert_close(jacfwd(jacfwd(project))(x), hessian)
    u, v = torch.randn(2, *shape)

    def bend(x: Tensor) -> Tensor:
        return torch.func.jvp(jacrev(project), (x,), (u,))[1]

    exact = torch.func.jvp(bend, (x,), (v,))[1]
    near = (bend(x + 1e-5 * v) - bend(x - 1e-5 * v)) / 2e-5
    torch.testing.assert_close(exact, near, rtol=1e-5, atol=1e-6)


def test_rotations_near_singular_matrices_and_reflections_have_derivatives() -> None:
    for least in (0.0, -0.5):
        x = torch.tensor([2.0, 1.0, least]).diag().requires_grad_()
        assert torch.autograd.gradcheck(manifolds.SpecialOrthogonal().projx, x)
        assert torch.autograd.gradgradcheck(manifolds.SpecialOrthogonal().projx, x)


@pytest.mark.parametrize("retraction", [Cayley(), QR()])
def test_stiefel_rules_refuse_other_manifolds(retraction: Retraction) -> None:
    sphere, x = manifolds.Sphere(), torch.eye(3)[0]
    with pytest.raises(ManifoldContractError, match=r"Stiefel.*Default"):
        retraction(sphere, x, torch.zeros(3))
    with pytest.raises(ManifoldContractError, match=r"Stiefel.*Default"):
        retraction.order(sphere)


@pytest.mark.parametrize("length", [1.0, 1e3, 1e6])
@pytest.mark.parametrize("name", ["Stiefel", "CanonicalStiefel", "SpecialOrthogonal"])
def test_long_geodesics_stay_on_the_manifold(name: str, length: float) -> None:
    manifold = build(name)
    x = plain(manifold.random(5, 4, 4, dtype=torch.float32))
    u = manifold.proju(x, torch.randn_like(x))
    u = u * (length / torch.linalg.matrix_norm(u, keepdim=True))
    y = Exponential()(manifold, x, u.requires_grad_())
    assert y.dtype == torch.float32
    torch.testing.assert_close(y.mT @ y, torch.eye(4).expand(5, 4, 4).float())
    (slope,) = torch.autograd.grad(y.square().sum(), u)
    assert bool(slope.isfinite().all())


def test_exponential_without_expmap_names_the_remedy() -> None:
    manifold = geoopt.UpperHalf()
    x = manifold.random(2, 2)
    with pytest.raises(ManifoldContractError, match=r"no expmap.*Default"):
        Exponential()(manifold, x, torch.zeros_like(x))
    results = check_retraction(manifold, Default(), x)
    assert "retraction_order" not in {result.name for result in results}


def test_the_order_of_a_product_is_its_worst_part() -> None:
    good = geoopt.ProductManifold((geoopt.Sphere(), 3), (manifolds.SPD(), (2, 2)))
    mixed = geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.PoincareBall(), 2))
    assert Default().order(good) == 2
    assert Default().order(mixed) == 1
    assert Projection().order(good) == 1
    assert Exponential().order(mixed) == 2


def test_orders_on_geoopts_own_stiefel_classes() -> None:
    # Their expmap is now and then off by 1e-12: too much for the laws above.
    first, exact = geoopt.EuclideanStiefel(), geoopt.EuclideanStiefelExact()
    assert [retraction.order(first) for retraction in ON_STIEFEL] == [1, 2, 2, 1, 1]
    assert [retraction.order(exact) for retraction in ON_STIEFEL] == [2, 2, 2, 1, 1]


class OwnRetraction(geoopt.Sphere):
    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        return self.projx(x + u + (u * u).sum(-1, keepdim=True) * u)


def test_an_unknown_retraction_claims_first_order() -> None:
    assert Default().order(OwnRetraction()) == 1


def test_retractions_are_values() -> None:
    assert Default() == Default()
    assert len({Default(), Default(), QR()}) == 2
    assert repr(Cayley()) == "Cayley()"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Default().order = None


# -- slopes ----------------------------------------------------------------------------


@given(exponent=st.floats(0.5, 5.0), scale=st.floats(1e-3, 1e3))
def test_slope_of_a_power(exponent: float, scale: float) -> None:
    steps = torch.logspace(-3, 0, 20)
    slope = best_window_slope(steps, scale * steps**exponent)
    assert slope.value == pytest.approx(exponent, abs=1e-8)


def test_slope_ignores_both_ends() -> None:
    steps = torch.logspace(-4, 0.5, 40)
    errors = steps**2 + 5.0 * steps**6 + 1e-6 * torch.rand(40)
    slope = best_window_slope(steps, errors, floor=1e-5)
    assert slope.value == pytest.approx(2.0, abs=0.05)
    assert slope.window is not None
    assert 1e-3 < slope.window[0] < slope.window[1] < 1.0


def test_slope_of_nothing_is_infinite_and_of_nan_is_nan() -> None:
    steps = torch.logspace(-3, 0, 10)
    exact = best_window_slope(steps, torch.zeros(10))
    assert math.isinf(exact.value)
    assert exact.window is None
    assert math.isnan(best_window_slope(steps, torch.full((10,), math.nan)).value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_error_slope_of_a_taylor_remainder(dtype: torch.dtype) -> None:
    slope = error_slope(
        lambda t: (torch.exp(torch.tensor(t, dtype=dtype)) - 1.0 - t).abs(), dtype
    )
    assert slope.value == pytest.approx(2.0, abs=0.2)
