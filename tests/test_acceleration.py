"""The acceleration of geodesics, and the Hessians of functions on manifolds."""

from collections.abc import Callable

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import GEOOPT, OURS, Case
from mutants import acceleration as mutants
from torch import Tensor

from riemannian_modules.manifolds import MetricManifold, Sphere
from riemannian_modules.manifolds.acceleration import (
    base_hessian,
    geodesic_acceleration,
    hessian_correction,
)
from riemannian_modules.manifolds.quotient import Quotient
from riemannian_modules.manifolds.riesz import flat, riesz
from riemannian_modules.testing import error_slope

Acceleration = Callable[[geoopt.Manifold, Tensor, Tensor], Tensor]

SEEDS = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=max(3, settings.default.max_examples // 10))

REFUSED = {
    "Stiefel (canonical)",
    "BirkhoffPolytope",
    "UpperHalf",
    "BoundedDomain",
    "Lorentz",
    "Scaled",
}
LEFT_OUT = REFUSED | {
    "PoincareBall (learnable)",
    "Stereographic (learnable)",
    "SymmetricPositiveDefinite(SM)",
    "SymmetricPositiveDefinite(LEM)",
}
KNOWN = [*OURS, *(case for case in GEOOPT if case.name not in LEFT_OUT)]
by_case = pytest.mark.parametrize("case", KNOWN, ids=lambda case: case.name)


def plain(manifold: geoopt.Manifold) -> geoopt.Manifold:
    return manifold.base if hasattr(manifold, "base") else manifold


def draw(case: Case) -> tuple[geoopt.Manifold, Tensor, Tensor, Tensor]:
    manifold = case.make()
    x = case.draw(manifold)
    u, v = (manifold.proju(x, 0.4 * torch.randn_like(x)) for _ in range(2))
    return manifold, x, u, v


def lagrange_defect(
    manifold: geoopt.Manifold, x: Tensor, u: Tensor, a: Tensor
) -> Tensor:
    """Equations of Euler and Lagrange for the energy, on tangent vectors.

    Only ``inner`` enters, with its derivatives, and the tangent projection.
    """

    # In reverse mode: under torch.func.jvp geoopt's scripted functions are wrong from
    # the second call on.
    point, velocity = x.clone().requires_grad_(), u.clone().requires_grad_()
    energy = 0.5 * manifold.inner(point, velocity, keepdim=True).sum()
    force, momentum = torch.autograd.grad(
        energy, (point, velocity), create_graph=True, materialize_grads=True
    )
    probe = torch.zeros_like(x, requires_grad=True)
    by_point, by_velocity = torch.autograd.grad(
        (momentum * probe).sum(),
        (point, velocity),
        create_graph=True,
        materialize_grads=True,
    )
    rate = (by_point * u).sum() + (by_velocity * a).sum()
    (change,) = torch.autograd.grad(rate, probe)
    return riesz(manifold, x, change - force.detach())


def normal_defect(manifold: geoopt.Manifold, x: Tensor, u: Tensor, a: Tensor) -> Tensor:
    """What keeps a curve on the manifold is the same for all curves with a velocity."""
    step = 1e-3
    ahead, behind = (manifold.retr(x, t * step * u) for t in (1.0, -1.0))
    difference = (ahead - 2.0 * x + behind) / step**2 - a
    return difference - manifold.proju(x, difference)


def is_geodesic(case: Case, acceleration: Acceleration) -> bool:
    manifold, x, u, _ = draw(case)
    a = acceleration(manifold, x, u)
    scale = float(1.0 + a.norm() + u.norm())
    flat = float(lagrange_defect(manifold, x, u, a).norm())
    normal = float(normal_defect(manifold, x, u, a).norm())
    return flat < 1e-9 * scale and normal < 1e-4 * scale


@by_case
@given(seed=SEEDS)
@FEW
def test_accelerations_solve_the_geodesic_equation(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    if isinstance(plain(case.make()), Quotient):
        pytest.skip("only the horizontal part of a curve's velocity has energy")
    assert is_geodesic(case, geodesic_acceleration)


@by_case
def test_accelerations_are_those_of_expmap(case: Case) -> None:
    manifold, x, u, _ = draw(case)
    try:
        manifold.expmap(x, u)
    except NotImplementedError:
        pytest.skip("its geodesics have no closed form")
    a = geodesic_acceleration(manifold, x, u)
    step = 1e-4
    ahead, behind = (manifold.expmap(x, t * step * u) for t in (1.0, -1.0))
    measured = (ahead - 2.0 * x + behind) / step**2
    torch.testing.assert_close(a, measured, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("what", "name", "acceleration"),
    mutants.ACCELERATIONS,
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_accelerations_are_found(
    what: str, name: str, acceleration: Acceleration
) -> None:
    (case,) = (case for case in OURS if case.name == name)
    assert is_geodesic(case, geodesic_acceleration)
    assert not is_geodesic(case, acceleration), what


@by_case
@given(seed=SEEDS)
@FEW
def test_accelerations_are_quadratic_forms(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    manifold, x, u, v = draw(case)
    e = torch.randn_like(x)

    def form(w: Tensor) -> Tensor:
        return (e * geodesic_acceleration(manifold, x, w)).sum()

    mixed = 0.25 * (form(u + v) - form(u - v))
    found = (hessian_correction(manifold, x, u, e) * v).sum()
    torch.testing.assert_close(found, mixed, rtol=1e-8, atol=1e-9)
    torch.testing.assert_close(form(-3.0 * u), 9.0 * form(u), rtol=1e-8, atol=1e-9)


def smooth(manifold: geoopt.Manifold, x: Tensor) -> Callable[[Tensor], Tensor]:
    """A function of points that is neither linear nor quadratic."""
    rows = torch.randn(3, x.numel())
    shift = torch.randn(3)
    if isinstance(manifold, Quotient):
        size = manifold.invariant(x).numel()
        rows = torch.randn(3, size)
        return lambda y: (rows @ manifold.invariant(y).reshape(-1) + shift).sin().sum()
    return lambda y: (rows @ y.reshape(-1) + shift).sin().sum()


@by_case
@given(seed=SEEDS)
@FEW
def test_hessians_have_slope_three(case: Case, seed: int) -> None:
    """The second-order model along a geodesic is off by the third power of the step."""
    torch.manual_seed(seed)
    manifold, x, u, v = draw(case)
    # Near the edge of a ball a short vector is a long way, with other powers of t.
    u = u / (flat(manifold, x, u) * u).sum().sqrt().clamp_min(1.0)
    f = smooth(manifold, x)
    gradient = torch.func.grad(f)
    e = gradient(x)

    def hessian(w: Tensor) -> Tensor:
        return base_hessian(manifold, x, w, e, torch.func.jvp(gradient, (x,), (w,))[1])

    torch.testing.assert_close(
        (hessian(u) * v).sum(), (hessian(v) * u).sum(), rtol=1e-8, atol=1e-9
    )
    first, second = (e * u).sum(), (hessian(u) * u).sum()

    def along(t: float) -> Tensor:
        if "Birkhoff" in case.name:  # flat, so that a polynomial stays on it
            return x + t * u + 0.5 * t**2 * geodesic_acceleration(manifold, x, u)
        if "FixedRank" in case.name:  # its retraction is second order
            return manifold.retr(x, t * u)
        return manifold.expmap(x, t * u)

    def error(t: float) -> Tensor:
        return (f(along(t)) - f(x) - t * first - 0.5 * t**2 * second).abs()

    scale = float(1.0 + f(x).abs())
    assert error_slope(error, x.dtype, scale=scale).value > 2.8


def test_views_have_the_acceleration_of_their_base() -> None:
    x, u = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0])
    view = MetricManifold(Sphere())
    expected = geodesic_acceleration(Sphere(), x, u)
    assert torch.equal(geodesic_acceleration(view, x, u), expected)
    correction = hessian_correction(view, x, u, x)
    assert torch.equal(correction, hessian_correction(Sphere(), x, u, x))


def test_nothing_is_changed() -> None:
    """Also where gradients are switched off, as in an optimizer's step."""
    x = Sphere().random(3)
    u, e = Sphere().proju(x, torch.randn(3)), torch.randn(3)
    before = [t.clone() for t in (x, u, e)]
    with torch.no_grad():
        found = hessian_correction(Sphere(), x, u, e)
    assert not found.requires_grad
    assert all(map(torch.equal, (x, u, e), before))


@pytest.mark.parametrize(
    "case", [c for c in GEOOPT if c.name in REFUSED], ids=lambda case: case.name
)
def test_unknown_manifolds_are_refused(case: Case) -> None:
    manifold = case.make()
    x = case.draw(manifold)
    with pytest.raises(NotImplementedError, match=type(manifold).__name__):
        geodesic_acceleration(manifold, x, x)
    with pytest.raises(NotImplementedError, match=r"geodesic_acceleration\.register"):
        hessian_correction(manifold, x, x, x)
