"""Grassmann, SO(n), oblique, positive and fixed-rank manifolds."""

import math
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import assert_two_derivatives, gap
from mutants import new_manifolds as mutants
from torch import Tensor, nn

from riemannian_modules import Mass, manifolds
from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds.fixed_rank import orthographic_step
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
    check_base_manifold,
    check_retraction,
    error_slope,
    failures,
    raise_failures,
)

SEEDS = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=max(4, settings.default.max_examples // 5))
PRECISIONS = [torch.float64, torch.float32]

Shape = tuple[int, ...]
KINDS: dict[str, tuple[Callable[[], geoopt.Manifold], list[Shape]]] = {
    "grassmann": (
        manifolds.Grassmann,
        [(5, 2), (2, 5), (4, 3), (3, 4), (4, 1), (1, 4), (2, 5, 2), (2, 3, 4)],
    ),
    "rotations": (manifolds.SpecialOrthogonal, [(2, 2), (3, 3), (4, 4), (2, 3, 3)]),
    "columns": (manifolds.Oblique, [(4, 3), (3, 5), (2, 3), (4, 1), (2, 3, 2)]),
    "rows": (lambda: manifolds.Oblique("rows"), [(4, 3), (3, 5), (1, 4), (2, 3, 2)]),
    "positive": (manifolds.Positive, [(), (4,), (2, 3), (2, 3, 2)]),
    "positive_points": (lambda: manifolds.Positive(ndim=1), [(4,), (2, 3)]),
    "rank_1": (lambda: manifolds.FixedRank(1), [(4, 3), (3, 5), (2, 3, 2)]),
    "rank_2": (lambda: manifolds.FixedRank(2), [(4, 3), (3, 5), (2, 4, 3), (2, 4)]),
    "rank_3": (lambda: manifolds.FixedRank(3), [(3, 3), (3, 5)]),
}
CASES = [(kind, shape) for kind, (_, shapes) in KINDS.items() for shape in shapes]
GEODESIC = [case for case in CASES if not case[0].startswith("rank")]


def build(kind: str) -> geoopt.Manifold:
    return KINDS[kind][0]()


def plain(point: Tensor) -> Tensor:
    return point.detach().as_subclass(Tensor)


def draw(manifold: geoopt.Manifold, shape: Shape, **options: Any) -> Tensor:
    return plain(manifold.random(*shape, **options))


def tangent(manifold: geoopt.Manifold, x: Tensor) -> Tensor:
    u = torch.randn_like(x)
    u = x * u if isinstance(manifold, manifolds.Positive) else u
    # A nearly normal draw leaves little but rounding: stretch it and project again.
    part = manifold.proju(x, u)
    return manifold.proju(x, part * (u.norm() / part.norm()))


def size(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    """The norm of the whole tensor."""
    return manifold.inner(x, u, keepdim=True).sum().clamp_min(0.0).sqrt()


def largest_angle(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    """How far u goes, where 1 is the least distance at which geodesics meet."""
    if isinstance(manifold, manifolds.Grassmann):
        return torch.linalg.matrix_norm(u, 2).max() / (math.pi / 2)
    if isinstance(manifold, manifolds.SpecialOrthogonal):
        return torch.linalg.matrix_norm(u, 2).max() / math.pi
    if isinstance(manifold, manifolds.Oblique):
        return u.norm(dim=manifold.dim).max() / math.pi
    return (u / x).abs().max() / 5.0


# ---- the contract ----------------------------------------------------------------


@pytest.mark.parametrize(("law", "make", "shape"), mutants.MANIFOLDS)
def test_wrong_manifolds_are_found(
    law: str, make: Callable[[], geoopt.Manifold], shape: Shape
) -> None:
    manifold = make()
    point = manifold.projx(torch.rand(shape) + 0.5)
    assert law in {r.name for r in failures(check_base_manifold(manifold, point))}


# ---- the layer metric ------------------------------------------------------------


@pytest.mark.parametrize("shape", [(8, 3), (3, 8)])
@pytest.mark.parametrize("kind", ["RiemannianSGD", "RiemannianAdam"])
def test_geoopt_finds_a_principal_subspace(kind: str, shape: Shape) -> None:
    manifold = manifolds.Grassmann()
    vectors = torch.linalg.qr(torch.randn(8, 8))[0]
    A = (vectors * torch.linspace(-2.0, 2.0, 8)) @ vectors.mT
    x = geoopt.ManifoldParameter(manifold.random(*shape), manifold=manifold)
    options = {"momentum": 0.5} if kind == "RiemannianSGD" else {}
    optimizer = getattr(geoopt.optim, kind)([x], lr=0.1, **options)
    for step in range(400):
        optimizer.zero_grad()
        (-0.5 * (A * manifold.invariant(x)).sum()).backward()
        optimizer.step()
        if step == 300:
            optimizer.param_groups[0]["lr"] = 0.01
    top = vectors[:, -3:]
    found = manifold.dist(plain(x), top if shape[0] > shape[1] else top.mT)
    assert float(found) < 1e-3
    assert manifold.check_point_on_manifold(x, atol=1e-12)


# ---- retractions -----------------------------------------------------------------

EVERYWHERE = (Default(), Exponential(), Projection(), Cayley(), QR())
ORDERS: dict[tuple[str, Shape], tuple[float, ...]] = {
    ("grassmann", (5, 2)): (2, math.inf, 2, 2, 2),
    ("grassmann", (2, 5)): (2, math.inf, 2, 2, 2),
    ("grassmann", (2, 3, 4)): (2, math.inf, 2, 2, 2),
    ("rotations", (3, 3)): (2, math.inf, 2, 2, 1),
    ("rotations", (2, 4, 4)): (2, math.inf, 2, 2, 1),
    ("columns", (4, 3)): (2, math.inf, 2),
    ("rows", (4, 3)): (2, math.inf, 2),
    ("rows", (2, 4, 3)): (2, math.inf, 2),
    ("positive", (2, 3)): (2, math.inf, 1),
    ("positive_points", (2, 3)): (2, math.inf, 1),
}
PAIRS = [
    (*case, retraction, order)
    for case, orders in ORDERS.items()
    for retraction, order in zip(EVERYWHERE, orders, strict=False)
]


@pytest.mark.parametrize(("kind", "shape", "retraction", "order"), PAIRS)
@FEW
@given(seed=SEEDS)
def test_retractions_have_exactly_their_order(
    kind: str, shape: Shape, retraction: Retraction, order: float, seed: int
) -> None:
    generator = torch.manual_seed(seed)
    manifold = build(kind)
    point = draw(manifold, shape)
    results = check_retraction(manifold, retraction, point, generator=generator)
    raise_failures(results)
    assert retraction.order(manifold) == min(order, 2)
    assert results[-1].name == "retraction_order"
    if math.isinf(order):
        assert math.isinf(results[-1].value)
    else:
        assert order + 0.75 < results[-1].value < order + 1.5


@pytest.mark.parametrize(("kind", "shape", "retraction", "order"), PAIRS)
def test_retractions_pass_in_float32(
    kind: str, shape: Shape, retraction: Retraction, order: float
) -> None:
    torch.set_default_dtype(torch.float32)
    manifold = build(kind)
    for _ in range(3):
        point = draw(manifold, shape)
        raise_failures(check_retraction(manifold, retraction, point))


FIXED = [case for case in CASES if case[0].startswith("rank")]


def acceleration_slope(
    manifold: geoopt.Manifold, retraction: Retraction, x: Tensor, u: Tensor
) -> float:
    """The order of the tangent part of R(x, t u) - x - t u; 3 at second order.

    A curve of second order has a normal acceleration (Absil, Mahony & Sepulchre, 2008,
    proposition 5.5.5); this needs no geodesic.
    """
    return error_slope(
        lambda t: manifold.proju(x, retraction(manifold, x, t * u) - x - t * u).norm(),
        x.dtype,
        scale=float(x.norm()),
    ).value


@pytest.mark.parametrize(("kind", "shape"), FIXED)
@pytest.mark.parametrize("retraction", [Default(), Projection(), Orthographic()])
@FEW
@given(seed=SEEDS)
def test_retractions_of_fixed_rank_are_second_order(
    kind: str, shape: Shape, retraction: Retraction, seed: int
) -> None:
    generator = torch.manual_seed(seed)
    manifold = build(kind)
    x = draw(manifold, shape)
    raise_failures(check_retraction(manifold, retraction, x, generator=generator))
    assert retraction.order(manifold) == 2
    # At a least singular value of 1/2 the cubic term ends at steps of about 0.1.
    u = 0.2 * tangent(manifold, x) / math.sqrt(x.numel())
    slope = acceleration_slope(manifold, retraction, x, u)
    exact = retraction == Orthographic() or manifold.rank == min(shape[-2:])
    assert math.isinf(slope) if exact else 2.75 < slope < 3.5


@pytest.mark.parametrize(("kind", "shape"), FIXED)
@pytest.mark.parametrize("retraction", [Default(), Orthographic()])
def test_retractions_of_fixed_rank_pass_in_float32(
    kind: str, shape: Shape, retraction: Retraction
) -> None:
    torch.set_default_dtype(torch.float32)
    manifold = build(kind)
    for _ in range(3):
        raise_failures(check_retraction(manifold, retraction, draw(manifold, shape)))


@pytest.mark.parametrize(("law", "retraction", "make"), mutants.RETRACTIONS)
def test_wrong_retractions_are_found(
    law: str, retraction: Retraction, make: Callable[[], geoopt.Manifold]
) -> None:
    manifold = make()
    shape = (4, 4) if make is manifolds.SpecialOrthogonal else (4, 3)
    x = draw(manifold, shape)
    if law == "acceleration":
        u = 0.2 * tangent(manifold, x)
        assert acceleration_slope(manifold, retraction, x, u) < 2.5
    else:
        results = check_retraction(manifold, retraction, x)
        assert law in {result.name for result in failures(results)}


def test_orthographic_moves_by_a_normal_vector() -> None:
    manifold = manifolds.FixedRank(2)
    x = draw(manifold, (3, 5, 4))
    u = 0.1 * tangent(manifold, x)
    y = Orthographic()(manifold, x, u)
    assert manifold.check_point_on_manifold(y, atol=1e-12)
    assert float(manifold.proju(x, y - x - u).abs().max()) < 1e-15
    view = manifolds.MetricManifold(manifold)
    assert torch.equal(Orthographic()(view, x, u), y)
    assert Orthographic().order(view) == 2


def test_retractions_refuse_other_manifolds() -> None:
    x = torch.eye(3)
    for rule in (Cayley(), QR()):
        with pytest.raises(ManifoldContractError, match=r"Grassmann.*got Oblique"):
            rule(manifolds.Oblique(), x, 0.0 * x)
        with pytest.raises(ManifoldContractError, match=r"Grassmann.*got FixedRank"):
            rule.order(manifolds.FixedRank(1))
    with pytest.raises(ManifoldContractError, match=r"FixedRank.*got Oblique"):
        Orthographic()(manifolds.Oblique(), x, 0.0 * x)
    with pytest.raises(ManifoldContractError, match=r"FixedRank.*got Oblique"):
        Orthographic().order(manifolds.Oblique())
    with pytest.raises(ManifoldContractError, match="FixedRank has no expmap"):
        Exponential()(manifolds.FixedRank(1), x, x)


def test_fixed_rank_says_why_it_has_no_geodesics() -> None:
    manifold = manifolds.FixedRank(2)
    x = draw(manifold, (4, 3))
    for verb in ("expmap", "logmap", "dist"):
        with pytest.raises(NotImplementedError, match=f"{verb}.*rank 2.*closed form"):
            getattr(manifold, verb)(x, x)


@pytest.mark.parametrize("shape", [(5, 2), (2, 5), (2, 4, 3)])
def test_grassmann_retractions_span_the_same(shape: Shape) -> None:
    manifold = manifolds.Grassmann()
    x = draw(manifold, shape)
    u = tangent(manifold, x)
    found = [rule(manifold, x, u) for rule in (Default(), QR(), Projection())]
    for y in found[1:]:
        torch.testing.assert_close(manifold.invariant(y), manifold.invariant(found[0]))
    # Angles of x + u are arc tangents, those of the Cayley map twice those of u / 2.
    angles = torch.linalg.svdvals(u)
    for y, expected in (
        (found[0], angles.atan()),
        (Cayley()(manifold, x, u), 2.0 * (0.5 * angles).atan()),
    ):
        folded = torch.minimum(expected, math.pi - expected)
        torch.testing.assert_close(manifold.dist(x, y), folded.norm(dim=-1))


def test_cayley_on_rotations_is_the_full_solve() -> None:
    manifold = manifolds.SpecialOrthogonal()
    x = draw(manifold, (2, 4, 4))
    u = tangent(manifold, x)
    half, eye = 0.5 * x.mT @ u, torch.eye(4)
    expected = x @ torch.linalg.solve(eye - half, eye + half)
    torch.testing.assert_close(manifold.retr(x, u), expected)
    torch.testing.assert_close(Cayley()(manifold, x, u), expected)


@given(seed=SEEDS)
def test_positive_numbers_of_any_size(seed: int) -> None:
    """Quotients of two of them may be too large, or too small, for a number."""
    torch.manual_seed(seed)
    manifold, eps = manifolds.Positive(), torch.finfo(torch.float32).eps
    a, b, c = (170.0 * (torch.rand(3, 50) - 0.5)).exp().float().unbind()
    A, B, C = a.double(), b.double(), c.double()
    exact = {"rtol": 8.0 * eps, "atol": 0.0}
    logs = (B / A).log()
    torch.testing.assert_close(manifold.dist(a, b).double(), logs.abs(), **exact)
    torch.testing.assert_close(manifold.dist2(a, b).double(), logs.square(), **exact)
    for found, wanted in (
        (manifold.transp(a, b, c), B / A * C),
        (manifold.logmap(a, b), logs * A),
    ):
        held = (wanted.abs() > 1e-37) & (wanted.abs() < 1e38)
        torch.testing.assert_close(found[held].double(), wanted[held], **exact)
    held = ((logs * A).abs() > 1e-37) & ((logs * A).abs() < 1e38)
    reached = manifold.expmap(a, (logs * A).float())
    torch.testing.assert_close(reached[held], b[held], rtol=200.0 * eps, atol=0.0)


@pytest.mark.parametrize("gap", [1e-3, 1e-9, 1e-15])
def test_positive_numbers_that_are_near(gap: float) -> None:
    manifold, x = manifolds.Positive(), torch.tensor([1.0, 1e-300, 1e300])
    y = x * (1.0 + gap)
    expected = torch.log1p((y - x) / x)
    torch.testing.assert_close(manifold.dist(x, y), expected, rtol=1e-15, atol=0.0)
    near, far = torch.tensor([2.0, 3.0]), torch.tensor([3.0, 1e3])
    for y in (near, far):
        assert torch.autograd.gradgradcheck(
            manifold.dist2, (near.clone().requires_grad_(), y.requires_grad_())
        )


def test_positive_never_leaves() -> None:
    manifold = manifolds.Positive()
    x = draw(manifold, (1000,), dtype=torch.float32)
    u = 1e4 * torch.randn(1000, dtype=torch.float32)
    assert bool((manifold.retr(x, u) >= 0.499 * x).all())
    assert bool((manifold.retr(x, -x) == 0.5 * x).all())
    floor = manifold.projx(torch.tensor([-1.0, 0.0, 1e-30, 2.0], dtype=torch.float32))
    assert bool((floor > 0).all())
    assert bool((manifold.egrad2rgrad(floor, torch.ones(4)) > 0).all())
    assert float(floor[3]) == 2.0
    assert bool(manifold.projx(torch.tensor(torch.nan)).isnan())


# ---- geodesics, logarithms, distances, transports --------------------------------


def geodesic_laws(manifold: geoopt.Manifold, shape: Shape, share: float, dtype: Any):
    """Yield (law, error), with errors of the order of the rounding unit."""
    x = draw(manifold, shape, dtype=dtype)
    u, v, w = (tangent(manifold, x) for _ in range(3))
    u = u * (share / largest_angle(manifold, x, u))
    length = size(manifold, x, u)
    y = manifold.expmap(x, u)
    yield "logmap", float(size(manifold, x, manifold.logmap(x, y) - u) / length)
    end = manifold.expmap(x, manifold.logmap(x, y))
    yield "end", float(manifold.dist(y, end).norm())
    d = manifold.dist(x, y, keepdim=True)
    yield "length", abs(float(d.norm() / length) - 1.0)
    yield "symmetric", gap(manifold.dist(y, x, keepdim=True), d)
    yield "zero", float(manifold.dist(x, x).norm())
    tiny = manifold.expmap(x, 1e-3 * u)
    small = manifold.dist(x, tiny).norm() / (1e-3 * length)
    yield "small_distance", 1e-3 * abs(float(small) - 1.0)
    z = draw(manifold, shape, dtype=dtype)
    detour = manifold.dist(x, z) + manifold.dist(z, y) - manifold.dist(x, y)
    yield "triangle", max(0.0, -float(detour.min()))

    start = x.clone().requires_grad_()
    half = 0.5 * manifold.dist(start, y).square().sum()
    (e,) = torch.autograd.grad(half, start)
    gradient = manifold.egrad2rgrad(x, e)
    yield "distance_gradient", float(size(manifold, x, gradient + u) / length)

    def follow(start: Tensor, step: Tensor, vector: Tensor) -> Tensor:
        exact = isinstance(manifold, manifolds.Grassmann)
        if exact:
            return manifold.transp_follow_expmap(start, step, vector)
        return manifold.transp(start, manifold.expmap(start, step), vector)

    moved, other = follow(x, u, v), follow(x, u, w)
    scale = size(manifold, x, v) * size(manifold, x, w)
    before = manifold.inner(x, v, w, keepdim=True).sum()
    after = manifold.inner(y, moved, other, keepdim=True).sum()
    yield "isometry", float((after - before).abs() / scale)
    yield "transport_tangent", gap(manifold.proju(y, moved), moved)
    yield "transport_zero", gap(manifold.transp(x, x, v), v)

    exact = manifold.transp_follow_expmap
    yield "velocity", gap(exact(x, u, u), -manifold.logmap(y, x))
    middle, rest = manifold.expmap(x, 0.4 * u), exact(x, 0.4 * u, 0.6 * u)
    yield "path", gap(exact(middle, rest, exact(x, 0.4 * u, v)), exact(x, u, v))
    pair = manifold.expmap_transp(x, u, v)
    yield "pair", gap(pair[0], y) + gap(pair[1], exact(x, u, v))
    if isinstance(manifold, manifolds.Grassmann):
        yield "basis", max(basis_laws(manifold, x, y, z, u, v).values())


def basis_laws(
    manifold: manifolds.Grassmann, x: Tensor, y: Tensor, z: Tensor, u: Tensor, v: Tensor
) -> dict[str, float]:
    """How much depends on the bases that stand for the subspaces."""
    if x.shape[-2] < x.shape[-1]:
        x, y, z, u, v = (a.mT for a in (x, y, z, u, v))
    k = x.shape[-1]
    Q, P = torch.linalg.qr(torch.randn(2, k, k, dtype=x.dtype))[0]
    e = torch.randn_like(x)
    carried = manifold.transp(x @ Q, y @ P, v @ Q)

    def seen(a: Tensor, b: Tensor) -> float:
        return gap(manifold.invariant(a), manifold.invariant(b))

    return {
        "proju": gap(manifold.proju(x @ Q, e @ Q), manifold.proju(x, e) @ Q),
        "retr": seen(manifold.retr(x @ Q, u @ Q), manifold.retr(x, u)),
        "expmap": seen(manifold.expmap(x @ Q, u @ Q), manifold.expmap(x, u)),
        "logmap": gap(manifold.logmap(x @ Q, y @ P), manifold.logmap(x, y) @ Q),
        "dist": gap(manifold.dist(x @ Q, z @ P), manifold.dist(x, z)),
        "transp": gap(carried, manifold.transp(x, y, v) @ P),
    }


def tolerance(share: float, dtype: torch.dtype) -> float:
    # Directions of short vectors, and logarithms near their end, lose digits.
    return 2e3 * torch.finfo(dtype).eps / min(share, 1.0 - share)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), GEODESIC)
@given(seed=SEEDS, share=st.floats(0.02, 0.9))
def test_geodesics_logarithms_distances_transports(
    kind: str, shape: Shape, dtype, seed: int, share: float
) -> None:
    torch.manual_seed(seed)
    found = dict(geodesic_laws(build(kind), shape, share, dtype))
    most = tolerance(share, dtype)
    assert not {law: error for law, error in found.items() if not error <= most}


@pytest.mark.parametrize(("law", "make", "shape"), mutants.GEODESICS)
def test_wrong_geodesics_are_found(
    law: str, make: Callable[[], geoopt.Manifold], shape: Shape
) -> None:
    share = 0.02 if law == "small_distance" else 0.6
    found = dict(geodesic_laws(make(), shape, share, torch.float64))
    assert not found[law] <= 2.0 * tolerance(share, torch.float64)


@pytest.mark.parametrize("kind", ["grassmann", "rotations", "columns", "rows"])
@FEW
@given(seed=SEEDS)
def test_exact_transport_is_parallel(kind: str, seed: int) -> None:
    # With the metric of the surrounding space: the derivative is normal (vertical).
    torch.manual_seed(seed)
    manifold = build(kind)
    x = draw(manifold, KINDS[kind][1][0])
    u, v = tangent(manifold, x), tangent(manifold, x)
    _, rate = torch.func.jvp(
        lambda t: manifold.transp_follow_expmap(x, t * u, v),
        (torch.tensor(1e-3),),
        (torch.tensor(1.0),),
    )
    y = manifold.expmap(x, 1e-3 * u)
    assert float(manifold.proju(y, rate).norm()) < 1e-9 * float(u.norm() * v.norm())


def test_cauchy_schwarz_of_the_grassmann_projection() -> None:
    # Projection shortens by the cosines of the angles at most, and does not turn.
    manifold = manifolds.Grassmann()
    x = draw(manifold, (20, 6, 2))
    u = tangent(manifold, x)
    u = u * (0.8 / torch.linalg.matrix_norm(u, 2))[:, None, None]
    y, v = manifold.expmap(x, u), tangent(manifold, x)
    ratio = manifold.norm(y, manifold.transp(x, y, v)) / manifold.norm(x, v)
    assert bool((ratio <= 1.0 + 1e-12).all())
    assert bool((ratio >= math.cos(0.8) - 1e-12).all())


def test_distances_of_known_angles() -> None:
    t = torch.tensor([0.3, 1.2])
    x = torch.eye(4, 2)
    y = torch.stack(
        [
            torch.stack([t[0].cos(), t[0] * 0, t[0].sin(), t[0] * 0]),
            torch.stack([t[1] * 0, t[1].cos(), t[1] * 0, t[1].sin()]),
        ],
        dim=-1,
    )
    torch.testing.assert_close(manifolds.Grassmann().dist(x, y), t.norm())
    torch.testing.assert_close(manifolds.Grassmann().dist(x.mT, -y.mT), t.norm())
    torch.testing.assert_close(manifolds.Oblique().dist(x, y), t.norm())
    rotation = torch.block_diag(
        *(torch.stack([a.cos(), -a.sin(), a.sin(), a.cos()]).view(2, 2) for a in t)
    )
    rotations = manifolds.SpecialOrthogonal()
    torch.testing.assert_close(
        rotations.dist(torch.eye(4), rotation), math.sqrt(2.0) * t.norm()
    )
    half_turn = torch.diag(torch.tensor([-1.0, -1.0, 1.0]))
    torch.testing.assert_close(
        rotations.dist(torch.eye(3), half_turn), torch.tensor(2.0**0.5 * math.pi)
    )
    positive = manifolds.Positive(ndim=1)
    ones = torch.ones(2)
    torch.testing.assert_close(positive.dist(ones, t.exp()), t.norm())
    torch.testing.assert_close(manifolds.Positive().dist(ones, (-t).exp()), t)


NEAR: list[tuple[Callable[[], geoopt.Manifold], Shape]] = [
    (manifolds.Oblique, (4, 3)),
    (lambda: manifolds.Oblique("rows"), (2, 3)),
    (manifolds.Positive, (3,)),
    (lambda: manifolds.Positive(ndim=1), (2, 3)),
    (lambda: manifolds.Lorentz(0.3), (2, 4)),
]


SQUARES: list[tuple[Callable[[], geoopt.Manifold], Shape]] = [
    *NEAR,
    (manifolds.Grassmann, (5, 2)),
    (manifolds.Grassmann, (2, 2, 3)),
    (manifolds.SpecialOrthogonal, (2, 2)),
    (manifolds.SpecialOrthogonal, (2, 3, 3)),
    (manifolds.SpecialOrthogonal, (4, 4)),
    (manifolds.LogEuclideanSPD, (3, 3)),
    (lambda: manifolds.Scaled(manifolds.Grassmann(), 2.0), (4, 2)),
    (lambda: manifolds.Reshaped(manifolds.Oblique(), (12,), (4, 3)), (12,)),
    (lambda: manifolds.Reshaped(manifolds.Grassmann(), (4, 4), (2, 4, 2)), (4, 4)),
    (lambda: both(Mass()), (10,)),
    (lambda: both(Mass(diagonal=torch.rand(4) + 0.5)), (10,)),
]


def both(mass: Mass) -> geoopt.Manifold:
    parts = {
        "flat": (geoopt.Euclidean(), (4,)),
        "curved": (manifolds.Oblique(), (3, 2)),
    }
    return manifolds.Product(parts, masses={"flat": mass, "curved": Mass(3.0)})


@pytest.mark.parametrize(("make", "shape"), SQUARES)
def test_squared_distances_where_two_points_are_one(
    make: Callable[[], geoopt.Manifold], shape: Shape
) -> None:
    manifold = make()
    x = manifold.projx(draw(manifold, shape))
    u, v = torch.randn(2, *shape)
    jvp, jacrev, jacfwd = torch.func.jvp, torch.func.jacrev, torch.func.jacfwd

    def square(y: Tensor) -> Tensor:
        return manifold.dist2(x, manifold.projx(y)).sum()

    def along(t: Tensor, s: Tensor) -> Tensor:
        return square(x + t * u + s * v)

    pushed = (jvp(manifold.projx, (x,), (w,))[1] for w in (u, v))
    # A basis may turn within its subspace.
    moved, turned = (manifold.proju(x, w) for w in pushed)
    assert float(jacrev(square)(x).abs().max()) < 1e-14
    expected = 2.0 * manifold.inner(x, moved, turned, keepdim=True).sum()
    zero = torch.tensor(0.0)
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacrev), (jacfwd, jacfwd)):
        found = outer(inner(along, 0), 1)(zero, zero)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(("make", "shape"), SQUARES)
def test_squared_distances_have_two_derivatives(
    make: Callable[[], geoopt.Manifold], shape: Shape
) -> None:
    manifold = make()
    x, y = (manifold.projx(draw(manifold, shape)) for _ in range(2))

    def square(a: Tensor, b: Tensor) -> Tensor:
        return manifold.dist2(manifold.projx(x + a), manifold.projx(y + b))

    still = tuple(torch.zeros(shape).requires_grad_() for _ in range(2))
    assert_two_derivatives(square, still)


@pytest.mark.parametrize("angle", [0.0, 1e-9, 0.3, 1.5])
def test_squared_distances_of_equal_angles(angle: float) -> None:
    def turned(t: Tensor, copies: int) -> Tensor:
        turn = torch.stack([t.cos(), -t.sin(), t.sin(), t.cos()]).view(2, 2)
        return torch.block_diag(*(turn,) * copies)

    def lines(t: Tensor) -> Tensor:
        return manifolds.Grassmann().dist2(torch.eye(4)[:, ::2], turned(t, 2)[:, ::2])

    def rotations(t: Tensor) -> Tensor:
        double = turned(2.0 * t, 2)
        return manifolds.SpecialOrthogonal().dist2(torch.eye(4), double)

    t = torch.tensor(angle)
    for square, factor in ((lines, 2.0), (rotations, 16.0)):
        torch.testing.assert_close(square(t), factor * t.square())
        slope, bend = torch.func.grad(square), torch.func.grad(torch.func.grad(square))
        torch.testing.assert_close(slope(t), 2.0 * factor * t)
        torch.testing.assert_close(bend(t), torch.tensor(2.0 * factor))
        torch.testing.assert_close(torch.func.jacfwd(slope)(t), bend(t))


@pytest.mark.parametrize(("make", "shape"), NEAR)
def test_logarithms_where_two_points_are_one(
    make: Callable[[], geoopt.Manifold], shape: Shape
) -> None:
    manifold = make()
    x = manifold.projx(draw(manifold, shape))
    u, v = torch.randn(2, *shape)
    jvp = torch.func.jvp

    def log(y: Tensor) -> Tensor:
        return manifold.logmap(x, manifold.projx(y))

    moved = jvp(manifold.projx, (x,), (u,))[1]
    torch.testing.assert_close(jvp(log, (x,), (u,))[1], moved)
    torch.testing.assert_close(torch.autograd.functional.jvp(log, x, u)[1], moved)
    bend = jvp(lambda y: jvp(log, (y,), (u,))[1], (x,), (v,))[1]
    near = jvp(log, (x + 1e-5 * v,), (u,))[1] - jvp(log, (x - 1e-5 * v,), (u,))[1]
    torch.testing.assert_close(bend, near / 2e-5, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("angle", [1e-12, 1e-8, 1e-4, 1.0, 3.0, math.pi - 1e-6])
def test_rotations_about_an_axis(angle: float) -> None:
    # Rodrigues' formula, written out.
    manifold = manifolds.SpecialOrthogonal()
    a = nn.functional.normalize(torch.randn(3), dim=0)
    K = torch.linalg.cross(a.expand(3, 3), torch.eye(3)).mT
    versine = 2.0 * math.sin(0.5 * angle) ** 2
    rotation = torch.eye(3) + math.sin(angle) * K + versine * K @ K
    torch.testing.assert_close(manifold.expmap(torch.eye(3), angle * K), rotation)
    log = manifold.logmap(torch.eye(3), rotation)
    error = float((log - angle * K).norm())
    assert error < 1e-14 * (1.0 + 1.0 / (math.pi - angle))
    far = manifold.dist(torch.eye(3), rotation)
    assert abs(float(far) - 2.0**0.5 * angle) < 1e-14


@pytest.mark.parametrize("kind", ["grassmann", "rotations", "columns", "rows"])
def test_nothing_breaks_where_geodesics_meet(kind: str) -> None:
    manifold = build(kind)
    shape = (4, 4) if kind == "rotations" else (4, 2)
    x = draw(manifold, shape)
    if kind == "grassmann":
        y = torch.linalg.svd(x)[0][:, 2:]
        expected = math.pi / 2 * 2**0.5
    else:
        y = -x
        expected = math.pi * (2.0 if kind == "rotations" or kind == "rows" else 2**0.5)
    torch.testing.assert_close(manifold.dist(x, y), torch.tensor(expected))
    for found in (manifold.logmap(x, y), manifold.transp(x, y, tangent(manifold, x))):
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("n", [2, 3, 4, 5])
@pytest.mark.parametrize("dtype", PRECISIONS)
def test_logarithms_at_half_turns_are_among_the_shortest(
    n: int, dtype: torch.dtype
) -> None:
    manifold = manifolds.SpecialOrthogonal()
    signs = torch.ones(2, n, dtype=dtype)
    signs[0, :2], signs[1, : 2 * (n // 2)] = -1.0, -1.0
    x, q = draw(manifold, (2, 2, n, n), dtype=dtype)
    y = x @ q @ signs.diag_embed() @ q.mT
    u = manifold.logmap(x, y)
    assert manifold.check_vector_on_tangent(x, u)
    torch.testing.assert_close(manifold.norm(x, u), manifold.dist(x, y))
    close = {"atol": 1e-12, "rtol": 1e-12} if dtype == torch.float64 else {}
    torch.testing.assert_close(manifold.expmap(x, u), y, **close)


# ---- points ----------------------------------------------------------------------


def test_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match=r"'diagonal'.*'rows'"):
        manifolds.Oblique("diagonal")
    with pytest.raises(ValueError, match="rank=0"):
        manifolds.FixedRank(0)


def test_reasons_say_what_is_wrong() -> None:
    def reason(manifold: geoopt.Manifold, x: Tensor) -> str:
        ok, why = manifold.check_point_on_manifold(x, explain=True)
        assert not ok
        return why

    flipped = torch.diag(torch.tensor([1.0, 1.0, -1.0]))
    assert "det X = -1" in reason(manifolds.SpecialOrthogonal(), flipped)
    assert "X^T X" in reason(manifolds.SpecialOrthogonal(), 2.0 * flipped)
    assert "columns" in reason(manifolds.Oblique(), torch.ones(2, 3))
    assert "rows" in reason(manifolds.Oblique("rows"), torch.ones(2, 3))
    assert "least entry is -1" in reason(
        manifolds.Positive(), torch.tensor([1.0, -1.0])
    )
    low = torch.stack([torch.eye(3), torch.ones(3, 3)])
    assert "rank is 1, 3, expected 2" in reason(manifolds.FixedRank(2), low)
    assert "X X^T" in reason(manifolds.Grassmann(), torch.ones(2, 3))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        *((KINDS[kind][0], shape) for kind, shape in CASES),
        (manifolds.Lorentz, (4,)),
        (manifolds.LogEuclideanSPD, (3, 3)),
        (manifolds.BirkhoffPolytope, (3, 3)),
        (manifolds.Stiefel, (4, 2)),
        (manifolds.CanonicalStiefel, (2, 4)),
    ],
)
def test_numbers_that_are_not_finite_are_no_points(
    make: Callable[[], geoopt.Manifold], shape: Shape, value: float
) -> None:
    manifold = make()
    some = draw(manifold, shape).contiguous()
    some.view(-1)[0] = value
    for x in (some, torch.full(shape, value)):
        ok, why = manifold.check_point_on_manifold(x, explain=True)
        assert not ok
        assert why


def test_a_small_matrix_has_a_rank_like_any_other() -> None:
    manifold = manifolds.FixedRank(2)
    x = draw(manifold, (5, 4))
    for scale in (1e-12, 1e-5, 1e5):
        assert manifold.check_point_on_manifold(scale * x)
        assert not manifolds.FixedRank(1).check_point_on_manifold(scale * x)
    assert not manifold.check_point_on_manifold(torch.zeros(5, 4))
    dropped = x + 1e-7 * torch.randn(5, 4)
    assert manifold.check_point_on_manifold(dropped)


def test_nearest_rotation_is_nearest() -> None:
    manifold = manifolds.SpecialOrthogonal()
    a = torch.randn(200, 3, 3)
    y = manifold.projx(a)
    assert manifold.check_point_on_manifold(y, atol=1e-13)
    others = draw(manifold, (200, 3, 3))
    for z in (others, manifold.retr(y, 0.1 * tangent(manifold, y))):
        closer = torch.linalg.matrix_norm(a - z) < torch.linalg.matrix_norm(a - y)
        assert not bool(closer.any())
    right = torch.linalg.det(a) > 0
    torch.testing.assert_close(y[right], manifolds.Stiefel().projx(a[right]))


# torch 2.6 says so of its own gradcheck.
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")
@pytest.mark.parametrize("place", ["on", "equal", "off"])
@pytest.mark.parametrize(
    ("rank", "shape"),
    [(1, (3, 2)), (2, (4, 3)), (2, (3, 5)), (3, (3, 3)), (1, (2, 3, 2))],
)
def test_derivatives_of_fixed_rank(rank: int, shape: Shape, place: str) -> None:
    """Singular values may coincide, and those left out vanish, as on the manifold."""
    manifold = manifolds.FixedRank(rank)
    x, u = draw(manifold, shape), 0.1 * torch.randn(shape)
    if place == "equal":
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        x = 2.0 * left[..., :rank] @ right[..., :rank, :]
    x = x + (0.1 * torch.randn(shape) if place == "off" else 0.0)
    x, u = x.requires_grad_(), u.requires_grad_()
    for call, arguments in (
        (manifold.projx, (x,)),
        (manifold.proju, (x, u)),
        (lambda x, u: orthographic_step(x, u, rank), (x, u)),
    ):
        assert_two_derivatives(call, arguments, batched=True)


@pytest.mark.parametrize("rank", [1, 2])
def test_the_third_derivative_of_a_projection_of_fixed_rank(rank: int) -> None:
    manifold = manifolds.FixedRank(rank)
    x, u = draw(manifold, (3, 4)), torch.randn(3, 4)
    jacfwd = torch.func.jacfwd

    def second(t: Tensor) -> Tensor:
        return jacfwd(jacfwd(lambda s: manifold.projx(x + 0.1 * s * u)))(t)

    near, far = (
        second(torch.tensor(h)) - second(torch.tensor(-h)) for h in (1e-2, 2e-2)
    )
    expected = (8.0 * near - far) / 12e-2
    found = jacfwd(second)(torch.tensor(0.0))
    assert float(expected.norm()) > 1e-3
    assert gap(found, expected) < 1e-4


def test_the_second_derivative_of_a_step_of_rank_one() -> None:
    manifold = manifolds.FixedRank(1)
    x = torch.tensor([[2.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    u = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])

    def corner(t: Tensor) -> Tensor:
        return manifold.retr(x, t * u)[1, 1]

    for first in (torch.func.grad, torch.func.jacfwd):
        for second in (torch.func.grad, torch.func.jacfwd):
            found = second(first(corner))(torch.tensor(0.0))
            torch.testing.assert_close(found, torch.tensor(1.0))


def test_nearest_matrix_of_fixed_rank_is_nearest() -> None:
    manifold = manifolds.FixedRank(2)
    a = torch.randn(100, 4, 5)
    y = manifold.projx(a)
    dropped = torch.linalg.svdvals(a)[:, 2:].norm(dim=-1)
    torch.testing.assert_close(torch.linalg.matrix_norm(a - y), dropped)
    assert manifold.check_point_on_manifold(y, atol=1e-12)


@pytest.mark.parametrize("n", [2, 3, 4])
def test_random_rotations_are_uniform(n: int) -> None:
    count = 20000
    sample = draw(manifolds.SpecialOrthogonal(), (count, n, n))
    assert bool((torch.linalg.det(sample) > 0).all())
    bound = 6.0 / count**0.5
    assert float(sample.mean(0).abs().max()) < bound
    if n > 2:  # in the plane the second moments of SO(2) and O(2) differ
        second = torch.einsum("nab,ncd->abcd", sample, sample) / count
        eye = torch.eye(n)
        expected = torch.einsum("ac,bd->abcd", eye, eye) / n
        assert float((second - expected).abs().max()) < bound
    else:
        angle = torch.atan2(sample[:, 1, 0], sample[:, 0, 0])
        moments = torch.stack([(k * angle).cos().mean() for k in (1, 2, 3, 4)])
        assert float(moments.abs().max()) < bound


def test_random_points_have_the_stated_distributions() -> None:
    count = 20000
    bound = 6.0 / count**0.5
    columns = draw(manifolds.Oblique(), (count, 3, 2))
    second = torch.einsum("nab,ncb->bac", columns, columns) / count
    assert float((second - torch.eye(3) / 3).abs().max()) < bound
    assert float(columns.mean(0).abs().max()) < bound
    bases = draw(manifolds.Grassmann(), (count, 3, 2))
    mean = manifolds.Grassmann().invariant(bases).mean(0)
    assert float((mean - 2.0 / 3.0 * torch.eye(3)).abs().max()) < bound
    logs = draw(manifolds.Positive(), (count,)).log()
    assert abs(float(logs.mean())) < bound
    assert abs(float(logs.var()) - 1.0) < 2.0 * bound
    values = torch.linalg.svdvals(draw(manifolds.FixedRank(2), (2000, 4, 3)))
    assert 0.5 <= float(values[:, 1].min()) < 0.51
    assert 1.49 < float(values[:, 0].max()) <= 1.5
    assert float(values[:, 2].max()) < 1e-14


# ---- batches, devices, precision -------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), [c for c in GEODESIC if c[1]])
@pytest.mark.parametrize("keepdim", [False, True])
def test_shapes_of_numbers(kind: str, shape: Shape, keepdim: bool) -> None:
    manifold = build(kind)
    x = draw(manifold, shape)
    u, y = tangent(manifold, x), draw(manifold, shape)
    n = manifold.ndim
    expected = shape[: len(shape) - n] + (1,) * (n * keepdim)
    assert manifold.inner(x, u, keepdim=keepdim).shape == expected
    assert manifold.inner(x, u, u, keepdim=keepdim).shape == expected
    assert manifold.norm(x, u, keepdim=keepdim).shape == expected
    assert manifold.dist(x, y, keepdim=keepdim).shape == expected
    torch.testing.assert_close(manifold.inner(x, u), manifold.inner(x, u, u))


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("method", ["retr", "expmap"])
def test_many_large_float32_steps_stay_on_the_manifold(
    kind: str, shape: Shape, method: str
) -> None:
    manifold = build(kind)
    if method == "expmap" and (kind, shape) not in GEODESIC:
        return
    x = draw(manifold, shape, dtype=torch.float32)
    step = 0.1 if kind.startswith(("positive", "rank")) else 1.0
    for _ in range(200):
        x = getattr(manifold, method)(x, step * tangent(manifold, x))
    eps = 50.0 * torch.finfo(torch.float32).eps
    ok, reason = manifold.check_point_on_manifold(x, explain=True, atol=eps, rtol=eps)
    assert ok, reason


@pytest.mark.parametrize(("kind", "shape"), CASES)
@pytest.mark.parametrize("method", ["retr", "expmap"])
def test_steps_in_degenerate_directions(kind: str, shape: Shape, method: str) -> None:
    manifold = build(kind)
    if method == "expmap" and (kind, shape) not in GEODESIC:
        return
    x = draw(manifold, shape)
    one = torch.zeros(shape)
    one.view(-1)[-1] = 1.0
    u = manifold.proju(x, one)
    for vector in (torch.zeros(shape), u, 1e-9 * u):
        moved = getattr(manifold, method)(x, vector)
        assert manifold.check_point_on_manifold(moved, atol=1e-13, rtol=1e-13)
        if float(vector.norm()) < 1e-8:
            seen = getattr(manifold, "invariant", lambda point: point)
            assert float((seen(moved) - seen(x + vector)).norm()) < 1e-14 * 20


def test_names() -> None:
    assert repr(manifolds.FixedRank(2)) == "FixedRank(rank=2) manifold"
    assert repr(manifolds.Oblique("rows")) == "Oblique(unit=rows) manifold"
    assert repr(manifolds.SpecialOrthogonal()) == "SpecialOrthogonal manifold"


@pytest.mark.parametrize("inside", ["grad", "jvp", "dual", "vmap", "nothing"])
@pytest.mark.parametrize(
    "manifold",
    [manifolds.Stiefel(), manifolds.FixedRank(2), manifolds.BirkhoffPolytope()],
    ids=lambda m: type(m).__name__,
)
def test_projections_have_derivatives_only_where_somebody_may_ask(
    manifold: geoopt.Manifold, inside: str
) -> None:
    x = torch.rand(4, 4) + 0.1
    plain = manifold.projx(x)
    u = torch.randn(4, 4)
    h = 1e-6
    slope = (manifold.projx(x + h * u) - manifold.projx(x - h * u)) / (2.0 * h)
    if inside == "grad":
        x.requires_grad_()
        y = manifold.projx(x)
        (found,) = torch.autograd.grad(y, x, slope)
        torch.testing.assert_close(
            (found * u).sum(), slope.square().sum(), rtol=1e-6, atol=0.0
        )
    elif inside == "jvp":
        y, found = torch.func.jvp(manifold.projx, (x,), (u,))
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-6)
    elif inside == "dual":
        with torch.autograd.forward_ad.dual_level():
            both = manifold.projx(torch.autograd.forward_ad.make_dual(x, u))
            y, found = torch.autograd.forward_ad.unpack_dual(both)
        torch.testing.assert_close(found, slope, rtol=1e-6, atol=1e-6)
    elif inside == "vmap":
        y = torch.func.vmap(manifold.projx)(x.unsqueeze(0))[0]
    else:
        with torch.no_grad():
            y = manifold.projx(x.requires_grad_())
        assert not y.requires_grad
    torch.testing.assert_close(y.detach(), plain, rtol=1e-14, atol=1e-15)
