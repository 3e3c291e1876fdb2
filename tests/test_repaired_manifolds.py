"""The repaired geoopt manifolds: Lorentz, Birkhoff, Scaled, log-Euclidean matrices."""

import copy
import math
import re
from collections.abc import Callable
from functools import partial

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import assert_two_derivatives, draw, gap, own_product, spd
from mutants import repaired_manifolds as mutants
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Mass, Part, TangentSpace, manifolds
from riemannian_modules.errors import ManifoldContractError, MassError
from riemannian_modules.factors import DenseFactor
from riemannian_modules.manifolds.riesz import (
    flat,
    require_own_formulas,
    riesz,
    root,
    root_adjoint,
)
from riemannian_modules.retractions import Default, Exponential, Projection, Retraction
from riemannian_modules.testing import (
    check_base_manifold,
    check_retraction,
    error_slope,
    failures,
    raise_failures,
)
from riemannian_modules.testing.reference import dense_natural_gradient

SEEDS = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=max(2, settings.default.max_examples // 5))
PRECISIONS = [torch.float64, torch.float32]

Shape = tuple[int, ...]
Make = Callable[[], geoopt.Manifold]


def scaled(base: Make, scale: float) -> Make:
    return lambda: manifolds.Scaled(base(), scale)


KINDS: dict[str, tuple[Make, list[Shape]]] = {
    "lorentz": (manifolds.Lorentz, [(4,), (2,), (3, 4), (2, 3, 3)]),
    "lorentz_k": (lambda: manifolds.Lorentz(0.3), [(4,), (3, 5)]),
    "birkhoff": (manifolds.BirkhoffPolytope, [(4, 4), (2, 2), (2, 3, 3), (2, 1, 4, 4)]),
    "log_euclidean": (manifolds.LogEuclideanSPD, [(3, 3), (1, 1), (2, 3, 3)]),
    "scaled_sphere": (scaled(manifolds.Sphere, 2.0), [(4,), (2, 3)]),
    "scaled_flat": (scaled(manifolds.Euclidean, 0.3), [(3, 2)]),
    "scaled_stiefel": (scaled(manifolds.Stiefel, 1.7), [(5, 3), (3, 5)]),
    "scaled_canonical": (scaled(manifolds.CanonicalStiefel, 0.4), [(5, 3), (2, 3, 4)]),
    "scaled_grassmann": (scaled(manifolds.Grassmann, 1.3), [(5, 2), (2, 4)]),
    "scaled_spd": (scaled(manifolds.SPD, 3.0), [(3, 3), (2, 2, 2)]),
    "scaled_ball": (scaled(manifolds.PoincareBall, 0.7), [(3,), (2, 3)]),
    "scaled_lorentz": (scaled(lambda: manifolds.Lorentz(2.0), 1.5), [(4,), (2, 3)]),
    "scaled_birkhoff": (scaled(manifolds.BirkhoffPolytope, 2.0), [(3, 3)]),
    "scaled_twice": (scaled(scaled(manifolds.Sphere, 2.0), 0.3), [(4,)]),
}
CASES = [(kind, shape) for kind, (_, shapes) in KINDS.items() for shape in shapes]
OWN = [case for case in CASES if not case[0].startswith("scaled")]
NO_GEODESICS = {"birkhoff", "scaled_birkhoff"}
NO_DISTANCE = NO_GEODESICS | {"scaled_stiefel", "scaled_canonical"}

# Measured order of the default retraction.
ORDERS = {
    "lorentz": math.inf,
    "lorentz_k": math.inf,
    "log_euclidean": math.inf,
    "scaled_sphere": 2,
    "scaled_flat": math.inf,
    "scaled_stiefel": 1,
    "scaled_canonical": 2,
    "scaled_grassmann": 2,
    "scaled_spd": 2,
    "scaled_ball": 1,
    "scaled_lorentz": math.inf,
    "scaled_twice": 2,
}


def build(kind: str) -> geoopt.Manifold:
    return KINDS[kind][0]()


def tangent(manifold: geoopt.Manifold, x: Tensor) -> Tensor:
    """A tangent vector of norm 1, for the whole tensor."""
    flat = manifold.proju(x, torch.randn_like(x))
    return flat / length(manifold, x, flat)


def length(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    return manifold.inner(x, u, keepdim=True).sum().sqrt()


# ---- the contract ----------------------------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("rule", [Default(), Exponential(), Projection()])
@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_retractions_pass_every_check(
    kind: str, shape: Shape, rule: Retraction, dtype: torch.dtype
) -> None:
    torch.set_default_dtype(dtype)
    manifold = build(kind)
    for _ in range(3):
        point = draw(manifold, shape)
        results = check_retraction(manifold, rule, point)
        if rule == Exponential() and kind in NO_GEODESICS:
            (finding,) = results
            assert (finding.name, finding.passed) == ("raised", False)
            assert re.search(r"ManifoldContractError.*no expmap.*Default", str(finding))
        else:
            raise_failures(results)
            has_order = results[-1].name == "retraction_order"
            assert has_order == (kind not in NO_GEODESICS)


@pytest.mark.parametrize(
    ("kind", "shape"), [case for case in CASES if case[0] in ORDERS and case[1] != (2,)]
)
def test_default_retractions_have_this_order(kind: str, shape: Shape) -> None:
    manifold, order = build(kind), ORDERS[kind]
    slopes = [
        check_retraction(manifold, Default(), draw(manifold, shape))[-1].value
        for _ in range(5)
    ]
    assert Default().order(manifold) <= order
    if math.isinf(order):
        assert all(map(math.isinf, slopes))
    else:
        assert sorted(slopes)[2] == pytest.approx(order + 1, abs=0.25)


@pytest.mark.parametrize(("law", "make", "shape"), mutants.MANIFOLDS)
def test_wrong_manifolds_are_found(law: str, make: Make, shape: Shape) -> None:
    manifold = make()
    point = draw(manifold, shape)
    assert law in {r.name for r in failures(check_base_manifold(manifold, point))}


@pytest.mark.parametrize(("law", "make", "shape"), mutants.RETRACTIONS)
def test_wrong_retractions_are_found(law: str, make: Make, shape: Shape) -> None:
    manifold = make()
    point = draw(manifold, shape)
    results = check_retraction(manifold, Default(), point)
    assert law in {result.name for result in failures(results)}


# What geoopt's own classes fail, and all that they fail, in check_base_manifold and in
# check_retraction(Default()).
ORIGINALS: dict[str, tuple[Make, Shape, set[str], set[str]]] = {
    "lorentz": (geoopt.Lorentz, (4,), {"riesz_pure"}, {"retraction_zero"}),
    "scaled": (
        lambda: geoopt.Scaled(geoopt.Sphere(), 2.0),
        (4,),
        {"retraction_derivative", "expmap_derivative"},
        {"retraction_derivative"},
    ),
    "spd_lem": (lambda: spd("LEM"), (3, 3), {"distance"}, set()),
    "spd_sm": (lambda: spd("SM"), (3, 3), {"distance"}, set()),
    "upper_half": (
        geoopt.UpperHalf,
        (3, 3),
        {"projection_idempotent", "projection_complete"},
        set(),
    ),
    "bounded_domain": (
        geoopt.BoundedDomain,
        (3, 3),
        {"riesz", "riesz_normal", "projection_idempotent", "projection_complete"},
        set(),
    ),
}


def broken(manifold: geoopt.Manifold, x: Tensor) -> tuple[set[str], set[str]]:
    contract = {result.name for result in failures(check_base_manifold(manifold, x))}
    steps = failures(check_retraction(manifold, Default(), x))
    return contract, {result.name for result in steps}


@pytest.mark.parametrize("name", ORIGINALS)
@pytest.mark.parametrize("seed", range(5))
def test_geoopts_originals_fail_exactly_this(name: str, seed: int) -> None:
    torch.manual_seed(seed)
    make, shape, contract, retraction = ORIGINALS[name]
    manifold = make()
    assert broken(manifold, draw(manifold, shape)) == (contract, retraction)


@pytest.mark.parametrize("seed", range(5))
def test_geoopts_birkhoff_fails_even_at_an_accurate_point(seed: int) -> None:
    torch.manual_seed(seed)
    point = draw(manifolds.BirkhoffPolytope(), (4, 4))
    contract, retraction = broken(geoopt.BirkhoffPolytope(), point)
    assert {"riesz", "projection_idempotent", "projection_complete"} <= contract
    assert {"random_on_manifold", "expmap_geodesic", "projx_idempotent"} <= contract
    assert not contract & {"riesz_pure", "riesz_linear", "metric_symmetric", "pure"}
    assert retraction <= {
        "retraction_on_manifold",
        "retraction_derivative",
        "retraction_zero",
    }


REFUSED: dict[str, tuple[Make, str]] = {
    "lorentz": (geoopt.Lorentz, r"manifolds\.Lorentz\(k\)"),
    "birkhoff": (geoopt.BirkhoffPolytope, r"manifolds\.BirkhoffPolytope\(\)"),
    "scaled": (
        lambda: geoopt.Scaled(geoopt.Sphere(), 2.0),
        r"manifolds\.Scaled\(manifold, scale\)",
    ),
    "canonical": (geoopt.CanonicalStiefel, r"manifolds\.CanonicalStiefel\(\)"),
    "spd_lem": (lambda: spd("LEM"), r"manifolds\.LogEuclideanSPD\(\)"),
    "spd_sm": (lambda: spd("SM"), r"manifolds\.SPD\(\)"),
    "upper_half": (geoopt.UpperHalf, r"complex.*real.*manifolds\.SPD\(\)"),
    "bounded_domain": (geoopt.BoundedDomain, r"complex.*real.*manifolds\.SPD\(\)"),
    "ball": (lambda: geoopt.PoincareBall(learnable=True), r"learnable=False"),
    "chart": (lambda: geoopt.Stereographic(0.3, learnable=True), r"learnable=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_originals_are_refused_with_their_remedy(name: str) -> None:
    make, remedy = REFUSED[name]
    wrapped: list[Make] = [
        make,
        lambda: geoopt.ProductManifold((geoopt.Sphere(), 3), (make(), (4, 4))),
    ]
    if name in {"lorentz", "ball", "chart"}:
        wrapped[1] = lambda: geoopt.ProductManifold((geoopt.Sphere(), 3), (make(), 3))
    for manifold in wrapped:
        with pytest.raises(ManifoldContractError, match=remedy) as caught:
            manifolds.ensure_contract(manifold(), "fc1.weight")
        assert "fc1.weight" in str(caught.value)
    with pytest.raises(ManifoldContractError, match=remedy):
        manifolds.MetricManifold(make())
    with pytest.raises(ManifoldContractError, match=remedy):
        manifolds.Scaled(make(), 2.0)


class MendedUpperHalf(geoopt.UpperHalf):
    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        return 0.5 * (u + u.mT)


def test_complex_points_are_refused_even_where_the_contract_is_mended() -> None:
    manifold = MendedUpperHalf()
    raise_failures(check_base_manifold(manifold, draw(manifold, (3, 3))))
    with pytest.raises(ManifoldContractError, match="points are complex"):
        manifolds.ensure_contract(manifold)


class HalfMended(geoopt.Lorentz):
    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        return super().egrad2rgrad(x, u.clone())


def test_half_a_repair_is_none() -> None:
    assert not failures(check_base_manifold(HalfMended(), draw_far(0.5)))
    with pytest.raises(ManifoldContractError, match="HalfMended"):
        manifolds.ensure_contract(HalfMended())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_point_alone_has_no_lengths_to_measure(
    sign: float, dtype: torch.dtype
) -> None:
    """Stiefel matrices of one entry are isolated."""
    point = torch.full((1, 1), sign, dtype=dtype)
    results = check_base_manifold(manifolds.Stiefel(), point)
    raise_failures(results)
    (law,) = (r for r in results if r.name == "metric_positive")
    assert "no tangent u" in law.message


def test_they_are_parts_of_products() -> None:
    manifold = own_product()
    assert manifolds.ensure_contract(manifold) is manifold
    for shape in [(11,), (2, 11)]:
        raise_failures(check_base_manifold(manifold, draw(manifold, shape)))


class OtherMetric(manifolds.Lorentz):
    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        return 2.0 * super().inner(x, u, v, keepdim=keepdim)


class OtherOblique(manifolds.Oblique):
    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        return 2.0 * super().inner(x, u, v, keepdim=keepdim)


def test_a_metric_of_its_own_would_get_the_wrong_formulas() -> None:
    with pytest.raises(ManifoldContractError, match="OtherMetric changes inner"):
        require_own_formulas(OtherMetric(), "w")
    with pytest.raises(ManifoldContractError, match="OtherMetric changes inner"):
        manifolds.Scaled(OtherMetric(), 2.0)
    with pytest.raises(ManifoldContractError, match="Oblique changes inner of Oblique"):
        require_own_formulas(OtherOblique(), "w")


# ---- the layer metric ------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "shape"),
    [("lorentz", (3, 4)), ("birkhoff", (4, 4)), ("log_euclidean", (3, 3))],
)
@pytest.mark.parametrize("blocks", ["tensor", "model"])
def test_natural_gradients_of_a_model_are_the_dense_ones(
    kind: str, shape: Shape, blocks: str
) -> None:
    first = rm.nn.Linear(shape[1], shape[0], manifold=build(kind))
    model = rm.nn.Sequential(first, nn.Tanh(), nn.Linear(shape[0], 3))
    x, target = torch.randn(5, shape[1]), torch.randint(3, (5,))
    loss = nn.CrossEntropyLoss()
    output = rm.output.Categorical()
    metric = rm.LayerwiseMetric(model, output, mass=0.05, blocks=blocks)
    with metric.record():
        outputs = model(x)
    metric.backward(loss(outputs, target), outputs)
    expected = dense_natural_gradient(
        model, output, x, lambda z: loss(z, target), mass=0.05, blocks=blocks
    )
    for name, vector in metric.natural_gradient().items():
        torch.testing.assert_close(vector, expected[name], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", ["RiemannianSGD", "RiemannianAdam"])
@pytest.mark.parametrize("name", ["lorentz", "birkhoff", "log_euclidean"])
def test_geoopts_optimizers_find_a_point(name: str, kind: str) -> None:
    manifold = build(name)
    shape = KINDS[name][1][0]
    target = draw(manifold, shape)
    x = geoopt.ManifoldParameter(manifold.random(*shape), manifold=manifold)
    options = {"momentum": 0.5} if kind == "RiemannianSGD" else {}
    optimizer = getattr(geoopt.optim, kind)([x], lr=0.05, stabilize=10, **options)
    for step in range(300):
        optimizer.zero_grad()
        if name == "birkhoff":
            loss = (target * (target / x).log()).sum()
        else:
            loss = 0.5 * manifold.dist(x, target).square().sum()
        loss.backward()
        optimizer.step()
        if step == 200:
            optimizer.param_groups[0]["lr"] = 0.003
    torch.testing.assert_close(x.data, target, rtol=0, atol=0.02)
    assert manifold.check_point_on_manifold(x, atol=1e-10, rtol=1e-10)


# ---- geodesics, logarithms, transports -------------------------------------------

GEODESIC = [case for case in CASES if case[0] not in NO_DISTANCE]
LOGARITHMS = [case for case in GEODESIC if case[0] != "scaled_grassmann"]


@pytest.mark.parametrize(("kind", "shape"), LOGARITHMS)
@FEW
@given(seed=SEEDS, size=st.floats(1e-3, 2.0))
def test_logarithms_undo_exponentials(kind: str, shape: Shape, seed: int, size: float):
    torch.manual_seed(seed)
    manifold = build(kind)
    x = draw(manifold, shape)
    if kind.startswith(("scaled_sphere", "scaled_twice", "scaled_ball")):
        size = 0.2 + 0.2 * size  # on this side of geoopt's clamps and the cut locus
    u = size * tangent(manifold, x)
    y = manifold.expmap(x, u)
    tolerance = 1e-12 if kind in {"lorentz", "lorentz_k", "log_euclidean"} else 1e-6
    assert gap(manifold.logmap(x, y), u) < tolerance / size
    total = manifold.dist(x, y, keepdim=True).square().sum().sqrt()
    assert float(total) == pytest.approx(float(length(manifold, x, u)), rel=1e-5)
    back = manifold.dist(y, x, keepdim=True).square().sum().sqrt()
    torch.testing.assert_close(back, total)
    squared = manifold.dist2(x, y, keepdim=True).sum()
    torch.testing.assert_close(squared, total.square())


ISOMETRIC = [
    case
    for case in CASES
    if case[0]
    in {"lorentz", "lorentz_k", "log_euclidean", "scaled_lorentz", "scaled_spd"}
]


def not_isometric(manifold: geoopt.Manifold, x: Tensor, y: Tensor) -> float:
    u, v = tangent(manifold, x), tangent(manifold, x)
    moved, other = manifold.transp(x, y, u), manifold.transp(x, y, v)
    before = manifold.inner(x, u, v, keepdim=True)
    after = manifold.inner(y, moved, other, keepdim=True)
    stray = gap(manifold.proju(y, moved), moved)
    return max(float((before - after).abs().max()), stray)


@pytest.mark.parametrize(("kind", "shape"), ISOMETRIC)
@FEW
@given(seed=SEEDS)
def test_transports_are_isometric_and_parallel(kind: str, shape: Shape, seed: int):
    torch.manual_seed(seed)
    manifold = build(kind)
    x, y = draw(manifold, shape), draw(manifold, shape)
    assert not_isometric(manifold, x, y) < 1e-12
    forward = manifold.transp(x, y, manifold.logmap(x, y))
    torch.testing.assert_close(forward, -manifold.logmap(y, x), rtol=1e-9, atol=1e-10)
    u = tangent(manifold, x)
    torch.testing.assert_close(manifold.transp(y, x, manifold.transp(x, y, u)), u)
    torch.testing.assert_close(manifold.transp(x, x, u), u)
    step = 0.3 * tangent(manifold, x)
    end = manifold.expmap(x, step)
    follow = manifold.transp_follow_expmap(x, step, u)
    torch.testing.assert_close(follow, manifold.transp(x, end, u))
    both = manifold.expmap_transp(x, step, u)
    torch.testing.assert_close(both, (end, follow))
    point, moved = manifold.retr_transp(x, step, u)
    torch.testing.assert_close(point, manifold.retr(x, step))
    torch.testing.assert_close(moved, manifold.transp_follow_retr(x, step, u))


@pytest.mark.parametrize(("_law", "make", "shape"), mutants.TRANSPORTS)
def test_wrong_transports_are_found(_law: str, make: Make, shape: Shape) -> None:
    manifold = make()
    x, y = draw(manifold, shape), draw(manifold, shape)
    assert not_isometric(manifold, x, y) > 1e-3


@pytest.mark.parametrize("make", [manifolds.Lorentz, manifolds.LogEuclideanSPD])
def test_short_ways_and_their_mutants(make: Make) -> None:
    shape = (4,) if make is manifolds.Lorentz else (3, 3)
    for size in (1e-3, 1e-5, 1e-7):
        manifold = make()
        x = draw(manifold, shape)
        u = size * tangent(manifold, x)
        y = manifold.expmap(x, u)
        assert gap(manifold.logmap(x, y), u) < 1e-14 / size
        assert float(manifold.dist(x, y)) == pytest.approx(size, rel=1e-14 / size)
    wrong = [case for case in mutants.ROUND_TRIPS if issubclass(case[1], make)]
    for law, kind, _ in wrong:
        found = getattr(kind(), law)(x, y)
        expected = u if law == "logmap" else torch.tensor(size)
        assert gap(found, expected) > 1e-9


# ---- Lorentz ---------------------------------------------------------------------


def draw_far(radius: float, size: int = 4) -> Tensor:
    direction = torch.randn(size - 1)
    direction = radius * direction / direction.norm()
    return manifolds.Lorentz().expmap0(torch.cat((torch.zeros(1), direction)))


@FEW
@given(seed=SEEDS)
def test_lorentz_is_geoopts_where_that_is_right(seed: int) -> None:
    torch.manual_seed(seed)
    ours, theirs = manifolds.Lorentz(0.7), geoopt.Lorentz(0.7)
    assert isinstance(ours, geoopt.Lorentz)
    x, y = draw(ours, (3, 5)), draw(ours, (3, 5))
    u, v = ours.proju(x, torch.randn(3, 5)), ours.proju(x, torch.randn(3, 5))
    near = {"rtol": 1e-7, "atol": 1e-7}
    ambient = torch.randn(3, 5)
    pairs = [
        (ours.inner(x, u, v), theirs.inner(x, u, v)),
        (ours.proju(x, ambient), theirs.proju(x, ambient)),
        (ours.egrad2rgrad(x, ambient), theirs.egrad2rgrad(x, ambient.clone())),
        (ours.projx(ambient), theirs.projx(ambient)),
        (ours.expmap(x, u), theirs.expmap(x, u)),
        (ours.logmap(x, y), theirs.logmap(x, y)),
        (ours.dist(x, y), theirs.dist(x, y)),
        (ours.transp(x, y, u), theirs.transp(x, y, u)),
        (ours.dist0(x), theirs.dist0(x)),
        (ours.logmap0(x), theirs.logmap0(x)),
        (ours.logmap0back(x), theirs.logmap0back(x)),
        (ours.transp0back(x, u), theirs.transp0back(x, u)),
    ]
    start = torch.cat((torch.zeros(3, 1), torch.randn(3, 4)), dim=-1)
    unit = u / ours.norm(x, u, keepdim=True)
    pairs += [
        (ours.expmap0(start), theirs.expmap0(start)),
        (ours.transp0(x, start), theirs.transp0(x, start)),
        (ours.geodesic_unit(0.3, x, unit), ours.expmap(x, 0.3 * unit)),
        (ours.norm(x, u), theirs.norm(u)),
    ]
    for one, other in pairs:
        torch.testing.assert_close(one, other, **near)


def test_lorentz_leaves_every_argument_alone() -> None:
    manifold = manifolds.Lorentz()
    x, y = draw(manifold, (2, 4)), draw(manifold, (2, 4))
    u, v = manifold.proju(x, torch.randn(2, 4)), torch.randn(2, 4)
    calls: list[tuple[str, tuple[Tensor, ...]]] = [
        ("egrad2rgrad", (x, v)),
        ("proju", (x, v)),
        ("projx", (v,)),
        ("inner", (x, u, u)),
        ("expmap", (x, u)),
        ("logmap", (x, y)),
        ("dist", (x, y)),
        ("transp", (x, y, u)),
        ("logmap0back", (x,)),
    ]
    for method, arguments in calls:
        copies = [argument.clone() for argument in arguments]
        getattr(manifold, method)(*copies)
        assert all(map(torch.equal, copies, arguments)), method


@pytest.mark.parametrize("radius", [0.0, 1e-9, 1.0, 5.0, 10.0])
def test_a_step_of_nothing_stays_exactly(radius: float) -> None:
    manifold = manifolds.Lorentz(0.7)
    x = manifold.projx(draw_far(radius))
    assert torch.equal(manifold.expmap(x, torch.zeros(4)), x)
    assert float(manifold.dist(x, x)) == 0.0
    assert torch.equal(manifold.logmap(x, x), torch.zeros(4))


def reference(X: list, Y: list, U: list, V: list) -> dict[str, list]:
    """Lengths, distances, logarithms and transports with 60 digits, k = 1."""
    mp = pytest.importorskip("mpmath")

    def form(a: list, b: list) -> object:
        return sum(p * q for p, q in zip(a[1:], b[1:], strict=True)) - a[0] * b[0]

    n, d = mp.sqrt(form(U, U)), mp.acosh(-form(X, Y))
    share = form(Y, V) / (1 - form(X, Y))
    pairs = list(zip(X, Y, U, V, strict=True))
    return {
        "norm": [n],
        "dist": [d],
        "expmap": [mp.cosh(n) * x + mp.sinh(n) / n * u for x, _, u, _ in pairs],
        "logmap": [d / mp.sinh(d) * (y - mp.cosh(d) * x) for x, y, _, _ in pairs],
        "transp": [v + share * (x + y) for x, y, _, v in pairs],
    }


@pytest.mark.parametrize("radius", [0.5, 2.0, 5.0, 8.0, 12.0])
@pytest.mark.parametrize("size", [1e-6, 1e-2, 1.0, 3.0])
@pytest.mark.parametrize("radial", [False, True])
def test_lorentz_against_sixty_digits(radius: float, size: float, radial: bool) -> None:
    mp = pytest.importorskip("mpmath")
    manifold = manifolds.Lorentz()

    def exact(space: Tensor, x: list | None = None) -> list:
        s = [mp.mpf(entry) for entry in space.tolist()]
        if x is None:
            return [mp.sqrt(1 + sum(entry**2 for entry in s)), *s]
        return [sum(a * b for a, b in zip(x[1:], s, strict=True)) / x[0], *s]

    def unit(x: Tensor, w: Tensor) -> Tensor:
        u = manifold._tangent(x, w)
        return u / manifold.norm(x, u)

    def error(x: Tensor, found: Tensor, expected: list) -> float:
        gaps = torch.tensor(
            [
                float(mp.mpf(a) - b)
                for a, b in zip(found.tolist(), expected, strict=True)
            ]
        )
        return float(manifold.norm(x, manifold._tangent(x, gaps[1:])))

    with mp.workdps(60):
        x = manifold.projx(draw_far(radius))
        u = size * unit(x, x[1:] if radial else torch.randn(3))
        v = unit(x, torch.randn(3))
        y = manifold.expmap(x, u)
        X, Y = exact(x[1:]), exact(y[1:])
        true = reference(X, Y, exact(u[1:], X), exact(v[1:], X))
        # Rounding the coordinates of x and y moves them by this much.
        unsure = 20 * 2.0**-53 * math.cosh(radius + size)
        assert float(manifold.norm(x, u)) == pytest.approx(
            float(true["norm"][0]), rel=1e-14
        )
        assert float(manifold.dist(x, y)) == pytest.approx(
            float(true["dist"][0]), abs=unsure
        )
        assert error(y, y, true["expmap"]) < unsure * math.cosh(size)
        assert error(x, manifold.logmap(x, y), true["logmap"]) < unsure * (1 + size)
        # Also for vectors whose coordinates are about e^radius times their length.
        outward = unit(x, x[1:])
        for w in (v, outward, v + outward):
            true = reference(X, Y, exact(u[1:], X), exact(w[1:], X))
            off = error(y, manifold.transp(x, y, w), true["transp"])
            assert off < unsure * math.cosh(size)


@pytest.mark.parametrize("radius", [3.0, 6.0, 10.0])
def test_vectors_keep_their_digits_far_from_the_origin(radius: float) -> None:
    manifold = manifolds.Lorentz()
    for _ in range(5):
        x = draw_far(radius)
        assert manifold.check_point_on_manifold(x, atol=1e-14, rtol=1e-14)
        u = tangent(manifold, x)
        assert manifold.check_vector_on_tangent(x, u, atol=1e-14, rtol=1e-14)
        torch.testing.assert_close(manifold.proju(x, u), u, rtol=1e-15, atol=0)
        e = torch.randn(4)
        sharp = manifold.egrad2rgrad(x, e)
        assert float(manifold.inner(x, sharp, u)) == pytest.approx(
            float((e * u).sum()), rel=1e-10, abs=1e-12 * float(e.norm() * u.norm())
        )
        assert float(manifold.inner(x, u)) == pytest.approx(1.0, rel=1e-14)


def test_slopes_of_the_distance_where_coordinates_have_none() -> None:
    manifold = manifolds.Lorentz(0.7)
    y = draw(manifold, (4,))
    for point in (manifold.origin(4).data, manifold.projx(1e-9 * torch.randn(4))):
        x = point.clone().requires_grad_()
        (slope,) = torch.autograd.grad(manifold.dist(x, y), x)
        ahead = manifold.logmap(point, y)
        expected = -ahead / manifold.norm(point, ahead)
        found = manifold.egrad2rgrad(point, slope)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-7)
    x = y.clone().requires_grad_()
    (slope,) = torch.autograd.grad(manifold.dist(x, y), x)
    assert torch.equal(slope, torch.zeros(4))


def test_random_points_stay_near_in_every_dimension() -> None:
    for k in (1.0, 0.3, 10.0):
        manifold = manifolds.Lorentz(k)
        for size in (3, 30, 300):
            distances = manifold.dist0(draw(manifold, (200, size)))
            assert 0.7 < float(distances.mean()) / k**0.5 < 1.2
    manifold = manifolds.Lorentz()
    wide = manifold.random_normal(2000, 3, std=0.5)
    ahead = manifold.logmap0(wide.data)[:, 1:]
    assert float(ahead.std()) == pytest.approx(0.5, rel=0.1)


def test_the_manifolds_own_precision_does_not_matter() -> None:
    torch.set_default_dtype(torch.float32)
    manifold = manifolds.Lorentz()
    torch.set_default_dtype(torch.float64)
    x = draw(manifold, (2, 4))
    assert x.dtype == torch.float64
    assert manifold.check_point_on_manifold(x, atol=1e-12, rtol=1e-12)
    raise_failures(check_base_manifold(manifold, x))


@pytest.mark.parametrize("k", [0.5, 0.3])
def test_a_curvature_in_single_precision_is_a_number_like_any_other(k: float) -> None:
    torch.set_default_dtype(torch.float32)
    manifold = manifolds.Lorentz(k)
    torch.set_default_dtype(torch.float64)
    x = draw(manifold, (2, 4))
    u, e = manifold.proju(x, torch.randn(2, 4)), torch.randn(2, 4)
    close = partial(torch.testing.assert_close, rtol=1e-13, atol=1e-13)
    close(manifold.dist(x, manifold.expmap(x, u)), manifold.norm(x, u))
    close(root(manifold, x, root_adjoint(manifold, x, e)), riesz(manifold, x, e))


@pytest.mark.parametrize("k", [0.0, -1.0, math.nan])
def test_curvatures_that_are_none(k: float) -> None:
    with pytest.raises(ManifoldContractError, match="k must be positive"):
        manifolds.Lorentz(k)


# ---- Birkhoff --------------------------------------------------------------------


def sums_off(x: Tensor) -> float:
    return max(float((x.sum(dim) - 1.0).abs().max()) for dim in (-1, -2))


def hard_matrices(n: int) -> dict[str, Tensor]:
    permutation = torch.eye(n)[torch.randperm(n)]
    return {
        "positive": torch.randn(n, n).abs(),
        "signed": torch.randn(n, n),
        "permutation": permutation,
        "near_permutation": permutation + 1e-9 * torch.rand(n, n),
        "wide": (20.0 * torch.randn(n, n)).clamp(-80.0, 80.0).exp(),
        "sparse": torch.rand(n, n) * (torch.rand(n, n) < 2.0 / n),
        "zero": torch.zeros(n, n),
        "batch": torch.randn(3, 2, n, n).exp(),
    }


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("n", [2, 3, 8, 30])
@FEW
@given(seed=SEEDS)
def test_projections_are_doubly_stochastic(n: int, dtype: torch.dtype, seed: int):
    torch.manual_seed(seed)
    torch.set_default_dtype(dtype)
    manifold, eps = manifolds.BirkhoffPolytope(), torch.finfo(dtype).eps
    for name, ambient in hard_matrices(n).items():
        x = manifold.projx(ambient)
        assert float(x.min()) > 0.0, name
        assert sums_off(x) <= 20 * eps, name
        assert gap(manifold.projx(x), x) <= 40 * n * eps, name
        u = manifold.egrad2rgrad(x, torch.randn_like(x))
        assert max(float(u.sum(d).abs().max()) for d in (-1, -2)) < 200 * n * eps, name


def test_projection_scales_rows_and_columns() -> None:
    ambient = torch.randn(4, 4).abs()
    x = manifolds.BirkhoffPolytope().projx(ambient)
    logs = (x / ambient).log()
    rows, columns = logs - logs[:1], logs - logs[:, :1]
    torch.testing.assert_close(rows, rows[:, :1].expand(4, 4), rtol=0, atol=1e-13)
    torch.testing.assert_close(columns, columns[:1].expand(4, 4), rtol=0, atol=1e-13)
    other = manifolds.BirkhoffPolytope().projx(ambient * torch.rand(4, 1))
    torch.testing.assert_close(other, x, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", PRECISIONS)
def test_projection_is_blind_to_scales_of_rows_and_columns(dtype: torch.dtype) -> None:
    manifold = manifolds.BirkhoffPolytope()
    known = torch.tensor([[1.0, 1e-8], [1.0, 4e-8]], dtype=dtype)
    wanted = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=dtype) / 3.0
    torch.testing.assert_close(manifold.projx(known), wanted)
    x = torch.rand(5, 5, dtype=dtype) + 0.1
    rows = 10.0 ** torch.linspace(-12.0, 12.0, 5, dtype=dtype).roll(2)
    columns = torch.finfo(dtype).eps ** torch.linspace(0.0, 1.5, 5, dtype=dtype)
    scaled = rows[:, None] * x * columns
    torch.testing.assert_close(manifold.projx(scaled), manifold.projx(x))


def test_a_matrix_in_a_batch_is_projected_as_if_alone() -> None:
    manifold = manifolds.BirkhoffPolytope()
    easy, hard = torch.rand(4, 4), hard_matrices(4)["sparse"]
    both = manifold.projx(torch.stack((easy, hard)))
    torch.testing.assert_close(both[0], manifold.projx(easy), rtol=1e-14, atol=1e-16)
    torch.testing.assert_close(both[1], manifold.projx(hard), rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("size", [1.0, 1e2, 1e4, 1e8])
def test_steps_of_any_length_stay_inside(size: float) -> None:
    manifold = manifolds.BirkhoffPolytope()
    x = draw(manifold, (5, 4, 4))
    y = manifold.retr(x, size * tangent(manifold, x))
    assert manifold.check_point_on_manifold(y, atol=1e-13, rtol=0.0)


def test_birkhoff_is_geoopts_up_to_its_repairs() -> None:
    ours, theirs = manifolds.BirkhoffPolytope(), geoopt.BirkhoffPolytope(tol=1e-15)
    assert isinstance(ours, geoopt.BirkhoffPolytope)
    x, e = draw(ours, (4, 4)), torch.randn(4, 4)
    torch.testing.assert_close(
        ours.egrad2rgrad(x, e), 4.0 * theirs.egrad2rgrad(x, e), rtol=1e-8, atol=1e-9
    )
    torch.testing.assert_close(
        ours.proju(x, e), theirs.proju(x, e / x), rtol=1e-8, atol=1e-9
    )
    u, v = ours.proju(x, e), ours.proju(x, torch.randn(4, 4))
    torch.testing.assert_close(ours.inner(x, u, v), theirs.inner(x, u, v))
    near = 0.05 * u * x.min()
    torch.testing.assert_close(
        ours.retr(x, near), theirs.retr(x, near), rtol=1e-5, atol=1e-6
    )
    assert torch.equal(ours.transp(x, x, u), ours.proju(x, u))


def test_projections_solve_the_full_system() -> None:
    # [diag(x 1), x; x^T, diag(x^T 1)] (a, b) = (u 1, u^T 1), by a pseudo-inverse.
    manifold = manifolds.BirkhoffPolytope()
    x, u = draw(manifold, (4, 4)), torch.randn(4, 4)
    system = torch.cat(
        (
            torch.cat((torch.diag(x.sum(-1)), x), dim=-1),
            torch.cat((x.mT, torch.diag(x.sum(-2))), dim=-1),
        )
    )
    ab = torch.linalg.pinv(system) @ torch.cat((u.sum(-1), u.sum(-2)))
    expected = u - x * (ab[:4, None] + ab[None, 4:])
    torch.testing.assert_close(manifold.proju(x, u), expected)
    torch.testing.assert_close(mutants.unrefined(x, u), expected)


def test_projections_near_the_boundary_are_tangent() -> None:
    # One pass is off by the condition number, 1e9 and more.
    manifold = manifolds.BirkhoffPolytope()
    x = manifold.projx(hard_matrices(4)["near_permutation"])
    u = torch.randn(4, 4)
    once, twice = mutants.unrefined(x, u), manifold.proju(x, u)
    assert max(float(twice.sum(d).abs().max()) for d in (-1, -2)) < 2e-14
    assert max(float(once.sum(d).abs().max()) for d in (-1, -2)) > 1e-12


def geodesic(x: Tensor, u: Tensor, steps: int = 40) -> Tensor:
    """Runge and Kutta's method for ``x'' = P(x'^2 / 2 x)``, to time 1.

    The geodesics of the metric ``uv / x`` without constraints have ``sqrt(x)`` linear;
    with them, the tangent part of their equation is left.
    """
    project = manifolds.BirkhoffPolytope().proju

    def slope(state: Tensor) -> Tensor:
        point, speed = state
        return torch.stack((speed, project(point, speed.square() / (2.0 * point))))

    state, h = torch.stack((x, u)), 1.0 / steps
    for _ in range(steps):
        a = slope(state)
        b = slope(state + 0.5 * h * a)
        c = slope(state + 0.5 * h * b)
        d = slope(state + h * c)
        state = state + h / 6.0 * (a + 2.0 * b + 2.0 * c + d)
    return state


@pytest.mark.parametrize("rule", [Default(), Projection()])
def test_birkhoff_retractions_are_first_order(rule: Retraction) -> None:
    manifold = manifolds.BirkhoffPolytope()
    for _ in range(3):
        x = manifold.projx(draw(manifold, (4, 4)) + 0.2)
        u = 0.5 * x.min() * tangent(manifold, x)
        end, speed = geodesic(x, u)
        torch.testing.assert_close(manifold.norm(end, speed), manifold.norm(x, u))
        slope = error_slope(
            lambda t, x=x, u=u: torch.linalg.vector_norm(
                rule(manifold, x, t * u) - geodesic(x, t * u)[0]
            ),
            torch.float64,
            scale=1e-3,
        )
        assert slope.value == pytest.approx(2.0, abs=0.15)
        assert rule.order(manifold) == 1


@pytest.mark.parametrize("kind", ["zero", "tangent", "any"])
def test_the_derivative_of_the_lorentz_projection(kind: str) -> None:
    # At zero and at tangent vectors, too, where rounding is taken off.
    manifold = manifolds.Lorentz()
    x, e = draw(manifold, (4,)), torch.randn(4)
    start = {"zero": 0.0 * e, "tangent": tangent(manifold, x), "any": e}[kind]
    found = torch.autograd.functional.jacobian(lambda u: manifold.proju(x, u), start)
    wanted = torch.stack([manifold.proju(x, unit) for unit in torch.eye(4)], 1)
    torch.testing.assert_close(found, wanted)


# torch 2.6 says so of its own gradcheck.
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")
@pytest.mark.parametrize("on", [True, False], ids=["on it", "off it"])
@pytest.mark.parametrize("shape", [(2, 2), (3, 3), (2, 3, 3)])
def test_birkhoff_projections_have_derivatives(shape: Shape, on: bool) -> None:
    """Also on the manifold, where there is nothing left to scale."""
    manifold = manifolds.BirkhoffPolytope()
    x = torch.rand(shape) + 0.1
    x = (manifold.projx(x) if on else x).requires_grad_()
    u = (0.1 * manifold.proju(x, torch.randn(shape))).detach().requires_grad_()
    calls = [(manifold.projx, (x,)), (manifold.retr, (x, u))]
    for call, arguments in calls:
        assert_two_derivatives(call, arguments, batched=True)


@pytest.mark.parametrize("a", [0.1, 1e-3, 1e-12])
def test_the_derivative_of_a_birkhoff_projection_near_the_boundary(a: float) -> None:
    # In closed form: 1 / (1 + sqrt(b c / (a d))) is the upper left entry.
    x = torch.tensor([[1.0 - a, a], [a, 1.0 - a]])
    jacobian = torch.func.jacrev(manifolds.BirkhoffPolytope().projx)(x)
    slopes = torch.tensor([[a, a - 1.0], [a - 1.0, a]])
    torch.testing.assert_close(jacobian[0, 0], 0.5 * slopes, rtol=1e-9, atol=0.0)


def test_birkhoff_has_no_geodesics() -> None:
    manifold = manifolds.BirkhoffPolytope()
    x = draw(manifold, (3, 3))
    u = tangent(manifold, x)
    for call in (
        lambda: manifold.expmap(x, u),
        lambda: manifold.expmap_transp(x, u, u),
        lambda: manifold.transp_follow_expmap(x, u, u),
        lambda: manifold.logmap(x, x),
        lambda: manifold.dist(x, x),
    ):
        with pytest.raises(NotImplementedError):
            call()
    with pytest.raises(ManifoldContractError, match="no expmap"):
        Exponential()(manifold, x, u)


def test_birkhoff_points_and_vectors_are_checked() -> None:
    manifold = manifolds.BirkhoffPolytope()
    x = draw(manifold, (3, 3))
    assert manifold.check_point_on_manifold(manifold.origin(2, 3, 3), atol=1e-15)
    assert manifold.check_vector_on_tangent(x, tangent(manifold, x), atol=1e-14)
    assert not manifold.check_vector_on_tangent(x, torch.randn(3, 3))
    for bad, reason in (
        (1.001 * x, "sum is off 1"),
        (torch.eye(3), "not all entries are positive"),
        (torch.ones(2, 3), "square"),
    ):
        ok, found = manifold.check_point_on_manifold(bad, explain=True)
        assert not ok
        assert reason in found


@pytest.mark.parametrize("make", [manifolds.BirkhoffPolytope, manifolds.SPD])
def test_there_is_nothing_wrong_with_no_points(make: Make) -> None:
    x = torch.empty(0, 3, 3)
    for manifold in (
        manifolds.MetricManifold(make()),
        manifolds.Scaled(make()),
        manifolds.Reshaped(make(), (9,), (3, 3)),
    ):
        none = x.view(0, 9) if isinstance(manifold, manifolds.Reshaped) else x
        assert manifold.check_point_on_manifold(none)
        assert manifold.check_vector_on_tangent(none, none)


VIEWS: dict[str, Callable[[geoopt.Manifold, Shape], geoopt.Manifold]] = {
    "metric": lambda base, shape: manifolds.MetricManifold(base),
    "scaled": lambda base, shape: manifolds.Scaled(base, 2.0),
    "reshaped": lambda base, shape: manifolds.Reshaped(base, (6,), shape),
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (manifolds.Euclidean, (6,)),
        (partial(manifolds.Euclidean, ndim=2), (2, 3)),
        (manifolds.Sphere, (2, 3)),
        (manifolds.PoincareBall, (6,)),
        (manifolds.Stiefel, (3, 2)),
    ],
)
def test_no_points_have_no_numbers(make: Make, shape: Shape, view: str) -> None:
    """geoopt's classes take the larger of two sizes, which is not that of nothing."""
    manifold = VIEWS[view](make(), shape)
    own = (6,) if view == "reshaped" else shape
    x, one = torch.empty(4, 0, *own), torch.full(own, 0.1)
    numbers = x.shape[: x.ndim - manifold.ndim]
    kept = (*numbers, *(1,) * manifold.ndim)
    distances = ["dist", "dist2"] if make is not manifolds.Stiefel else []
    for name in ["inner", "norm", *distances]:
        for other in (x, one):
            call = getattr(manifold, name)
            assert call(x, other).shape == call(other, x).shape == numbers, name
            assert call(x, other, keepdim=True).shape == kept, name
    for name in ("component_inner", "egrad2rgrad", "proju", "retr", "expmap", "logmap"):
        assert getattr(manifold, name)(x, one).shape == x.shape, name
    for name in ("transp", "transp_follow_retr", "transp_follow_expmap"):
        assert getattr(manifold, name)(x, one, one).shape == x.shape, name
    for name in ("retr_transp", "expmap_transp"):
        found = getattr(manifold, name)(x, one, one)
        assert [part.shape for part in found] == [x.shape] * 2, name
    assert manifold.projx(x).shape == x.shape


# ---- Scaled ----------------------------------------------------------------------

BASES: dict[str, tuple[Make, Shape]] = {
    "sphere": (manifolds.Sphere, (2, 4)),
    "stiefel": (manifolds.Stiefel, (3, 5)),
    "spd": (manifolds.SPD, (3, 3)),
    "lorentz": (manifolds.Lorentz, (2, 4)),
    "flat": (manifolds.Euclidean, (2, 3)),
    "product": (own_product, (11,)),
}


@pytest.mark.parametrize("name", BASES)
def test_scaling_is_of_the_metric_alone(name: str) -> None:
    make, shape = BASES[name]
    base, s = make(), 1.7
    manifold = manifolds.Scaled(base, s)
    x = draw(base, shape)
    e, u = torch.randn(shape), base.proju(x, torch.randn(shape))
    v = base.proju(x, torch.randn(shape))
    y = base.retr(x, 0.3 * u)
    close = torch.testing.assert_close
    close(manifold.inner(x, u, v), s**2 * base.inner(x, u, v))
    close(manifold.norm(x, u), s * base.norm(x, u))
    close(manifold.component_inner(x, u, v), s**2 * base.component_inner(x, u, v))
    close(manifold.egrad2rgrad(x, e), base.egrad2rgrad(x, e.clone()) / s**2)
    for method, arguments in {
        "proju": (x, e),
        "projx": (x + 0.1 * e,),
        "retr": (x, u),
        "expmap": (x, u),
        "transp": (x, y, u),
        "retr_transp": (x, 0.3 * u, v),
        "expmap_transp": (x, 0.3 * u, v),
        "transp_follow_retr": (x, 0.3 * u, v),
        "transp_follow_expmap": (x, 0.3 * u, v),
    }.items():
        close(getattr(manifold, method)(*arguments), getattr(base, method)(*arguments))
    if name not in {"stiefel", "product"}:
        close(manifold.logmap(x, y), base.logmap(x, y))
        close(manifold.dist(x, y), s * base.dist(x, y))
        close(manifold.dist2(x, y), s**2 * base.dist2(x, y))


def test_batches_of_scaled_balls_have_a_number_for_each_point() -> None:
    base = manifolds.PoincareBall()
    x, u, v = 0.1 * torch.randn(3, 4, 2)
    for manifold in (
        manifolds.Scaled(base, 1.7),
        manifolds.MetricManifold(manifolds.Scaled(base, 1.7)),
    ):
        inner = 1.7**2 * base.inner(x, u, v, keepdim=True)
        length = 1.7 * base.norm(x, u, keepdim=True)
        torch.testing.assert_close(manifold.inner(x, u, v, keepdim=True), inner)
        torch.testing.assert_close(manifold.inner(x, u, v), inner.squeeze(-1))
        torch.testing.assert_close(manifold.norm(x, u, keepdim=True), length)
        torch.testing.assert_close(manifold.norm(x, u), length.squeeze(-1))


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("scale", [0.2, 3.0])
def test_a_scale_is_a_mass(name: str, scale: float) -> None:
    make, shape = BASES[name]
    base = make()
    x, e = draw(base, shape), torch.randn(shape)
    factor = DenseFactor(torch.randn(3, *shape))

    def metric(manifold: geoopt.Manifold, mass: float) -> LayerMetric:
        space = TangentSpace(manifold, x, Mass(scalar=mass), "w")
        return LayerMetric([Part("w", space, factor)])

    one = metric(manifolds.Scaled(base, scale), 0.1)
    other = metric(base, 0.1 * scale**2)
    torch.testing.assert_close(one.sharp(e), other.sharp(e))
    torch.testing.assert_close(one.inner(e, e), other.inner(e, e))
    torch.testing.assert_close(one.contraction_rate(), other.contraction_rate())
    # Determinants are relative to g0, which is scaled.
    shift = 2.0 * one.dim * math.log(scale)
    torch.testing.assert_close(one.logdet() + shift, other.logdet())


def test_a_scaled_sphere_has_its_radius() -> None:
    x = torch.tensor([-1.0, 0.0])
    y = torch.tensor([0.0, 1.0])
    sphere = manifolds.Scaled(manifolds.Sphere(), 2.0)
    assert float(sphere.dist(x, y)) == pytest.approx(math.pi)
    assert float(geoopt.Scaled(geoopt.Sphere(), 2.0).dist(x, y)) == pytest.approx(
        math.pi
    )
    assert repr(sphere) == "Scaled(Sphere)(scale=2) manifold"


def test_a_scaled_quotient_is_one() -> None:
    manifold = manifolds.Scaled(manifolds.Grassmann(), 2.0)
    x = draw(manifold, (4, 2))
    assert isinstance(manifold, manifolds.Quotient)
    assert not isinstance(build("scaled_sphere"), manifolds.Quotient)
    torch.testing.assert_close(manifold.invariant(x), x @ x.mT)
    twin = copy.deepcopy(manifold)
    assert twin.invariant.__self__ is twin.base


def test_what_cannot_be_scaled() -> None:
    view = manifolds.MetricManifold(manifolds.Sphere())
    with pytest.raises(ManifoldContractError, match=r"its \.base"):
        manifolds.Scaled(view, 2.0)
    with pytest.raises(ManifoldContractError, match="got str"):
        manifolds.Scaled("sphere", 2.0)
    for scale in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(MassError, match="must be positive"):
            manifolds.Scaled(manifolds.Sphere(), scale)


def test_a_scaled_point_belongs_to_the_scaled_manifold() -> None:
    manifold = manifolds.Scaled(manifolds.SPD(), 2.0)
    for point in (manifold.random(3, 3), manifold.origin(3, 3)):
        assert point.manifold is manifold
        assert manifold.check_point_on_manifold(point)
        assert manifold.check_vector_on_tangent(point, torch.eye(3))
    assert not manifold.check_point_on_manifold(-torch.eye(3))
    assert not manifold.check_point(torch.ones(2, 3, 1)[..., 0, 0])
    ok, reason = build("scaled_grassmann").check_point(torch.eye(3), explain=True)
    assert not ok
    assert "square" in reason
    pair = manifolds.Scaled(own_product(), 2.0)
    x = draw(own_product(), (11,))
    assert torch.equal(pair.pack_point(*pair.unpack_tensor(x)), x)


# ---- log-Euclidean ---------------------------------------------------------------


def log_by_series(x: Tensor) -> Tensor:
    """The matrix logarithm by square roots and Gregory's series, without eigh."""
    eye = torch.eye(x.shape[-1], dtype=x.dtype)
    roots = 6
    for _ in range(roots):
        y, z = x, eye
        for _ in range(30):  # Denman and Beavers
            y, z = 0.5 * (y + torch.linalg.inv(z)), 0.5 * (z + torch.linalg.inv(y))
        x = y
    ratio = (x - eye) @ torch.linalg.inv(x + eye)
    total, power = torch.zeros_like(x), ratio
    for k in range(1, 40, 2):
        total, power = total + power / k, power @ ratio @ ratio
    return 2.0**roots * 2.0 * total


@pytest.mark.parametrize("spread", [1.0, 1e-3, 1e-8, 0.0])
def test_the_derivative_of_the_logarithm(spread: float) -> None:
    # Equal and nearly equal eigenvalues, where a quotient of differences cancels.
    manifold = manifolds.LogEuclideanSPD()
    q = torch.linalg.qr(torch.randn(4, 4))[0]
    values = 1.5 + spread * torch.tensor([0.0, 0.2, 0.5, 1.0])
    x = (q * values) @ q.mT
    u, v = (manifold.proju(x, torch.randn(4, 4)) for _ in range(2))
    _, du = torch.func.jvp(log_by_series, (x,), (u,))
    _, dv = torch.func.jvp(log_by_series, (x,), (v,))
    torch.testing.assert_close(manifold.inner(x, u, v), (du * dv).sum())
    torch.testing.assert_close(manifold.inner(x, u), (du * du).sum())


def test_it_is_flat_in_logarithms() -> None:
    manifold = manifolds.LogEuclideanSPD()
    x, y, z = (draw(manifold, (2, 3, 3)) for _ in range(3))
    log = log_by_series
    expected = (log(x[0]) - log(y[0])).norm()
    torch.testing.assert_close(manifold.dist(x, y)[0], expected)
    u = tangent(manifold, x)
    direct = manifold.transp(x, z, u)
    torch.testing.assert_close(manifold.transp(y, z, manifold.transp(x, y, u)), direct)
    half = manifold.expmap(x, 0.5 * manifold.logmap(x, y))
    torch.testing.assert_close(log(half[0]), 0.5 * (log(x[0]) + log(y[0])))
    torch.testing.assert_close(manifold.dist(4.0 * x, 4.0 * y), manifold.dist(x, y))
    inverse = torch.linalg.inv
    torch.testing.assert_close(
        manifold.dist(inverse(x), inverse(y)), manifold.dist(x, y)
    )


def test_it_meets_the_affine_metric_where_matrices_commute() -> None:
    ours, affine = manifolds.LogEuclideanSPD(), manifolds.SPD()
    x = torch.diag(torch.rand(3) + 0.5)
    y, u = torch.diag(torch.rand(3) + 0.5), torch.diag(torch.randn(3))
    e = torch.diag(torch.randn(3))
    close = torch.testing.assert_close
    close(ours.dist(x, y), affine.dist(x, y))
    close(ours.inner(x, u), affine.inner(x, u))
    close(ours.egrad2rgrad(x, e), affine.egrad2rgrad(x, e))
    close(ours.expmap(x, u), affine.expmap(x, u))
    full = draw(ours, (3, 3))
    v = tangent(ours, full)
    assert abs(float(ours.inner(full, v) - affine.inner(full, v))) > 1e-4


def test_log_euclidean_points_and_vectors_are_checked() -> None:
    manifold = manifolds.LogEuclideanSPD()
    x = draw(manifold, (3, 3))
    assert manifold.check_point_on_manifold(manifold.origin(2, 3, 3))
    assert manifold.check_vector_on_tangent(x, tangent(manifold, x))
    assert not manifold.check_vector_on_tangent(x, torch.randn(3, 3))
    for bad, reason in (
        (torch.diag(torch.tensor([1.0, -1.0])), "not positive definite"),
        (torch.ones(2, 2).triu(), "x^T"),
        (torch.ones(2, 3), "square"),
    ):
        ok, found = manifold.check_point_on_manifold(bad, explain=True)
        assert not ok
        assert reason in found
    assert manifold.check_point_on_manifold(manifold.projx(torch.randn(5, 3, 3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    "values",
    [(-3.0, -1.0, 2.0), (0.0, 0.0, 2.0), (-1e-3, 1e-12, 1.0), (-2.0, -2.0, -2.0)],
    ids=str,
)
def test_log_euclidean_projections_are_away_from_the_boundary(values, dtype) -> None:
    manifold = manifolds.LogEuclideanSPD()
    q = torch.linalg.qr(torch.randn(3, 3))[0]
    x = ((q * torch.tensor(values)) @ q.mT).to(dtype)
    # What is across the symmetric matrices does not matter.
    skew = torch.tensor([[0, 1, 2], [-1, 0, 3], [-2, -3, 0]], dtype=dtype)
    point = manifold.projx(x + skew)
    assert point.dtype == dtype
    assert manifold.check_point_on_manifold(point)
    eps = torch.finfo(dtype).eps
    sizes = torch.tensor(values).abs().to(dtype)
    wanted = sizes.maximum(eps**0.5 * sizes.max()).sort().values
    found = torch.linalg.eigvalsh(point)
    close = {"rtol": 0.0, "atol": 20.0 * eps * float(sizes.max())}
    torch.testing.assert_close(found, wanted, **close)
    torch.testing.assert_close(manifold.projx(point), point, **close)
    u = manifold.proju(point, torch.randn(3, 3, dtype=dtype))
    assert bool(flat(manifold, point, u).isfinite().all())


def test_singular_matrices_are_no_log_euclidean_points() -> None:
    manifold = manifolds.LogEuclideanSPD()
    for least in (0.0, 1e-16, -1e-16):
        x = torch.diag(torch.tensor([1.0, least]))
        ok, reason = manifold.check_point_on_manifold(x, explain=True)
        assert not ok
        assert "begin at" in reason
    assert not manifold.check_point_on_manifold(manifold.projx(torch.zeros(2, 2)))
    assert manifold.check_point_on_manifold(torch.diag(torch.tensor([1.0, 1e-14])))


def test_the_projection_of_lorentz_has_its_derivative_at_tangent_vectors() -> None:
    """What rounding leaves is taken as none in the value, not in the derivative."""
    manifold = rm.manifolds.Lorentz()
    x = manifold.random(4).as_subclass(torch.Tensor)
    P = torch.stack([manifold.proju(x, e) for e in torch.eye(4)], 1)
    for v in (torch.zeros(4), manifold.proju(x, torch.randn(4))):
        J = torch.func.jacrev(lambda u: manifold.proju(x, u))(v)
        torch.testing.assert_close(J, P)
        torch.testing.assert_close(
            torch.func.jacfwd(lambda u: manifold.proju(x, u))(v), P
        )
