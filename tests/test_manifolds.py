import json
import warnings
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.manifolds import MANIFOLDS as MUTANTS
from torch import Tensor

from riemannian_modules import manifolds
from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.testing import check_base_manifold, failures

Case = tuple[Callable[[], geoopt.Manifold], tuple[int, ...]]


def product() -> geoopt.Manifold:
    return geoopt.ProductManifold(
        (geoopt.Sphere(), 3),
        (geoopt.EuclideanStiefel(), (3, 2)),
        (manifolds.SPD(), (2, 2)),
    )


STIEFEL_SHAPES = [
    (5, 3),
    (3, 5),
    (6, 2),
    (2, 6),
    (3, 3),
    (4, 1),
    (1, 4),
    (2, 4, 3),
    (2, 3, 4),
]
STIEFEL: list[Case] = [
    (kind, shape)
    for kind in (manifolds.Stiefel, manifolds.CanonicalStiefel)
    for shape in STIEFEL_SHAPES
]
GOOD: list[Case] = [
    *STIEFEL,
    (manifolds.Euclidean, (3,)),
    (lambda: manifolds.Euclidean(ndim=2), (2, 3, 2)),
    (manifolds.Sphere, (4,)),
    (manifolds.Sphere, (2, 3)),
    (manifolds.PoincareBall, (3,)),
    (manifolds.PoincareBall, (2, 3)),
    (lambda: manifolds.PoincareBall(c=0.5), (4,)),
    (manifolds.SPD, (3, 3)),
    (manifolds.SPD, (2, 2, 2)),
    (geoopt.SphereExact, (3,)),
    (geoopt.EuclideanStiefel, (4, 2)),
    (geoopt.EuclideanStiefelExact, (4, 2)),
    (geoopt.PoincareBallExact, (3,)),
    (lambda: geoopt.Stereographic(k=0.3), (2, 3)),
    (product, (13,)),
    (product, (2, 13)),
]


def case_id(case: Any) -> str:
    if isinstance(case, tuple):
        return "x".join(map(str, case))
    return case().name


def plain(point: Tensor) -> Tensor:
    return point.detach().as_subclass(Tensor)


def draw(manifold: geoopt.Manifold, shape: tuple[int, ...]) -> Tensor:
    if isinstance(manifold, geoopt.ProductManifold):
        blocks = [
            plain(part.random(*shape[:-1], *size))
            for part, size in zip(manifold.manifolds, manifold.shapes, strict=True)
        ]
        return manifold.pack_point(*blocks)
    return plain(manifold.random(*shape))


def names(results: Any) -> set[str]:
    return {result.name for result in failures(results)}


# -- the contract ----------------------------------------------------------------------


@pytest.mark.parametrize(("make", "shape"), GOOD, ids=case_id)
@settings(max_examples=max(4, settings.default.max_examples // 5))
@given(seed=st.integers(0, 2**31 - 1))
def test_good_manifolds_pass_every_check(
    make: Callable[[], geoopt.Manifold], shape: tuple[int, ...], seed: int
) -> None:
    generator = torch.manual_seed(seed)
    manifold = make()
    results = check_base_manifold(manifold, draw(manifold, shape), generator=generator)
    assert not failures(results), [str(result) for result in failures(results)]
    assert {"riesz", "projection_complete", "expmap_geodesic"} <= {
        r.name for r in results
    }


@pytest.mark.parametrize(
    ("make", "shape"), [case for case in GOOD if case[1] != (13,)], ids=case_id
)
def test_good_manifolds_pass_in_float32(
    make: Callable[[], geoopt.Manifold], shape: tuple[int, ...]
) -> None:
    torch.set_default_dtype(torch.float32)
    manifold = make()
    point = draw(manifold, shape)
    assert point.dtype == torch.float32
    results = check_base_manifold(manifold, point)
    assert not failures(results), [str(result) for result in failures(results)]
    assert "expmap_geodesic" not in {r.name for r in results}


def test_spherical_chart_passes_away_from_its_pole() -> None:
    results = check_base_manifold(geoopt.SphereProjection(), 0.3 * torch.randn(3))
    assert not failures(results), [str(result) for result in failures(results)]


@pytest.mark.parametrize("law", MUTANTS)
def test_every_law_rejects_its_mutant(law: str) -> None:
    make, shape = MUTANTS[law]
    manifold = make()
    point = geoopt.Sphere().projx(torch.randn(*shape))
    if not isinstance(manifold, geoopt.Sphere):
        point = draw(manifold, shape)
    assert law in names(check_base_manifold(manifold, point))


def test_every_law_has_a_mutant() -> None:
    manifold = manifolds.Sphere()
    laws = {
        result.name for result in check_base_manifold(manifold, draw(manifold, (3,)))
    }
    assert laws == {*MUTANTS, "point_on_manifold"}


def test_a_point_off_the_manifold_is_found() -> None:
    point = 1.01 * draw(manifolds.Sphere(), (3,))
    assert "point_on_manifold" in names(check_base_manifold(manifolds.Sphere(), point))


def test_missing_methods_are_left_out() -> None:
    manifold = geoopt.UpperHalf()
    laws = {
        result.name for result in check_base_manifold(manifold, draw(manifold, (3, 3)))
    }
    assert not laws & {"expmap_derivative", "expmap_geodesic", "distance"}


def test_checks_leave_the_global_random_state_alone() -> None:
    point = draw(manifolds.Sphere(), (3,))
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(3)
    first = check_base_manifold(manifolds.Sphere(), point, generator=generator)
    assert torch.equal(torch.get_rng_state(), before)
    generator.manual_seed(3)
    again = check_base_manifold(manifolds.Sphere(), point, generator=generator)
    assert first == again


def spd(metric: str) -> geoopt.Manifold:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return manifolds.SPD(metric)


REFUSED: dict[str, tuple[geoopt.Manifold, tuple[int, ...], set[str], str]] = {
    "canonical": (
        geoopt.CanonicalStiefel(),
        (5, 3),
        {"projection_idempotent", "retraction_derivative", "expmap_derivative"},
        "use riemannian_modules.manifolds.CanonicalStiefel",
    ),
    "scaled": (
        geoopt.Scaled(geoopt.Sphere(), 2.0),
        (4,),
        {"retraction_derivative", "expmap_derivative"},
        "mass",
    ),
    "birkhoff": (
        geoopt.BirkhoffPolytope(),
        (4, 4),
        {"riesz", "projection_idempotent"},
        "n proju",
    ),
    "bounded": (
        geoopt.BoundedDomain(),
        (3, 3),
        {"riesz", "projection_idempotent"},
        "repairs both",
    ),
    "upper_half": (geoopt.UpperHalf(), (3, 3), {"projection_idempotent"}, "proju"),
    "spd_sm": (spd("SM"), (3, 3), {"distance"}, r"manifolds\.SPD\(\)"),
    "spd_lem": (spd("LEM"), (3, 3), {"distance"}, r"manifolds\.SPD\(\)"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_broken_geoopt_classes_fail_their_law_and_are_refused(key: str) -> None:
    manifold, shape, laws, remedy = REFUSED[key]
    assert laws <= names(check_base_manifold(manifold, draw(manifold, shape)))
    with pytest.raises(ManifoldContractError, match=remedy) as caught:
        manifolds.ensure_contract(manifold, name="fc1.weight")
    assert "fc1.weight" in str(caught.value)
    assert type(manifold).__name__ in str(caught.value)


def test_riesz_of_upper_half_is_right() -> None:
    # Only its projection is broken; the law about the Riesz map must not blame it.
    manifold = geoopt.UpperHalf()
    assert "riesz" not in names(check_base_manifold(manifold, draw(manifold, (3, 3))))


def test_lorentz_mutates_the_covector_and_nothing_else() -> None:
    manifold = geoopt.Lorentz()
    point = plain(manifold.random_normal(4))
    assert names(check_base_manifold(manifold, point)) == {"riesz_pure"}
    covector = torch.randn(4)
    passed = covector.clone()
    manifold.egrad2rgrad(point, passed)
    assert not torch.equal(passed, covector)
    with pytest.raises(ManifoldContractError, match=r"manifolds\.Lorentz\(k\)"):
        manifolds.ensure_contract(manifold)


@pytest.mark.parametrize(("make", "shape"), GOOD, ids=case_id)
def test_good_manifolds_are_returned_unchanged(
    make: Callable[[], geoopt.Manifold], shape: tuple[int, ...]
) -> None:
    manifold = make()
    assert manifolds.ensure_contract(manifold) is manifold


class Inherited(geoopt.CanonicalStiefel):
    pass


class Repaired(geoopt.CanonicalStiefel):
    proju = manifolds.CanonicalStiefel.proju
    retr = manifolds.CanonicalStiefel.retr
    expmap = manifolds.CanonicalStiefel.expmap


def test_subclasses_are_judged_by_what_they_inherit() -> None:
    repaired = Repaired()
    assert manifolds.ensure_contract(repaired) is repaired
    with pytest.raises(ManifoldContractError, match="Inherited"):
        manifolds.ensure_contract(Inherited())


def test_products_are_judged_by_their_parts() -> None:
    broken = geoopt.ProductManifold((geoopt.Sphere(), 3), (Inherited(), (3, 2)))
    with pytest.raises(ManifoldContractError, match="Inherited"):
        manifolds.ensure_contract(broken)


def test_what_is_no_manifold_is_refused() -> None:
    with pytest.raises(ManifoldContractError, match="got str"):
        manifolds.ensure_contract("stiefel")


def test_base_of_looks_through_a_metric_only() -> None:
    base = manifolds.Stiefel()
    assert manifolds.base_of(manifolds.MetricManifold(base)) is base
    assert manifolds.base_of(base) is base
    scaled = geoopt.Scaled(geoopt.Sphere(), 2.0)
    assert manifolds.base_of(scaled) is scaled


# -- Stiefel ---------------------------------------------------------------------------

X = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0]], dtype=torch.float64)
E = torch.tensor([[1.0, 1.0], [2.0, 0.0], [1.0, 3.0]], dtype=torch.float64)
ROWS = torch.tensor(
    [[[1.0, 2.0], [0.0, 1.0], [1.0, 0.0]], [[0.0, 1.0], [-1.0, 0.0], [2.0, 1.0]]],
    dtype=torch.float64,
)
GOLDEN = [
    (
        manifolds.Stiefel,
        [[0.0, -0.5], [0.5, 0.0], [1.0, 3.0]],
        [[3.0, 4.0], [4.0, 7.0]],
    ),
    (
        manifolds.CanonicalStiefel,
        [[0.0, -1.0], [1.0, 0.0], [1.0, 3.0]],
        [[5.0, 6.0], [6.0, 9.0]],
    ),
]


@pytest.mark.parametrize(("kind", "gradient", "gram"), GOLDEN)
@pytest.mark.parametrize("wide", [False, True])
def test_golden_base_gradients(
    kind: type[geoopt.Manifold],
    gradient: list[list[float]],
    gram: list[list[float]],
    wide: bool,
) -> None:
    # By hand, on St(3, 2) at the leading block of the identity.
    x, e, rows, expected = X, E, ROWS, torch.tensor(gradient)
    if wide:
        x, e, rows, expected = x.mT, e.mT, rows.mT, expected.mT
    manifold = kind()
    torch.testing.assert_close(manifold.egrad2rgrad(x, e), expected, rtol=0, atol=1e-15)
    sharp = manifold.egrad2rgrad(x, rows)
    pairings = torch.einsum("iab,jab->ij", rows, sharp)
    torch.testing.assert_close(pairings, torch.tensor(gram), rtol=0, atol=1e-14)
    inner = manifold.inner(x, sharp[:, None], sharp[None])
    torch.testing.assert_close(inner, torch.tensor(gram), rtol=0, atol=1e-14)


def test_stiefel_is_geoopts_on_tall_matrices() -> None:
    ours, theirs = manifolds.Stiefel(), geoopt.EuclideanStiefel()
    x = draw(ours, (2, 5, 3))
    u = ours.proju(x, torch.randn(2, 5, 3))
    assert isinstance(ours, geoopt.EuclideanStiefel)
    for method in ("proju", "egrad2rgrad", "retr", "expmap", "inner"):
        torch.testing.assert_close(
            getattr(ours, method)(x, u), getattr(theirs, method)(x, u)
        )


@pytest.mark.parametrize("kind", [manifolds.Stiefel, manifolds.CanonicalStiefel])
@pytest.mark.parametrize("shape", [(5, 3), (2, 4, 2), (3, 3)])
def test_wide_is_the_transpose_of_tall(
    kind: type[geoopt.Manifold], shape: tuple[int, ...]
) -> None:
    manifold = kind()
    x = draw(manifold, shape)
    u = manifold.proju(x, torch.randn(shape))
    # A square matrix counts as tall either way; its transpose is a point all the same.
    for method in ("proju", "retr", "expmap"):
        tall, wide = (
            getattr(manifold, method)(x, u),
            getattr(manifold, method)(x.mT, u.mT),
        )
        if shape[-1] != shape[-2]:
            torch.testing.assert_close(wide, tall.mT)
        assert wide.shape == x.mT.shape
    torch.testing.assert_close(
        manifold.inner(x.mT, u.mT, keepdim=True), manifold.inner(x, u, keepdim=True)
    )


def test_off_manifold_message_names_the_side() -> None:
    manifold = manifolds.Stiefel()
    _, tall = manifold.check_point_on_manifold(torch.ones(3, 2), explain=True)
    _, wide = manifold.check_point_on_manifold(torch.ones(2, 3), explain=True)
    assert "X^T X" in tall
    assert "X X^T" in wide


def test_random_is_uniform() -> None:
    # Without the sign fix the first entry would always be negative.
    sample = plain(manifolds.Stiefel().random(20000, 3, 2))
    assert float(sample.mean(0).abs().max()) < 6 / (3 * 20000) ** 0.5
    second = torch.einsum("nab,ncd->abcd", sample, sample) / len(sample)
    expected = torch.einsum("ac,bd->abcd", torch.eye(3), torch.eye(2)) / 3
    assert float((second - expected).abs().max()) < 6 / 20000**0.5


@pytest.mark.parametrize(("make", "shape"), STIEFEL, ids=case_id)
@pytest.mark.parametrize("method", ["retr", "expmap"])
def test_steps_in_degenerate_directions(
    make: Callable[[], geoopt.Manifold], shape: tuple[int, ...], method: str
) -> None:
    # A normal part of deficient rank has no unique orthonormal basis.
    manifold = make()
    x = draw(manifold, shape)
    one = torch.zeros(shape)
    one[..., -1, -1] = 1.0
    u = manifold.proju(x, one)
    for tangent in (torch.zeros(shape), u, 1e-9 * u):
        moved = getattr(manifold, method)(x, tangent)
        assert manifold.check_point_on_manifold(moved, atol=1e-14, rtol=0.0)
        if method == "expmap":
            halves = manifold.expmap(x, 0.5 * tangent)
            back = 2.0 * manifold.expmap(x, 1e-4 * tangent) - x - x
            assert bool(torch.isfinite(halves).all())
            torch.testing.assert_close(0.5e4 * back, tangent, atol=1e-3, rtol=0)


@pytest.mark.parametrize("kind", [manifolds.Stiefel, manifolds.CanonicalStiefel])
@pytest.mark.parametrize("shape", [(6, 2), (2, 6), (4, 3), (3, 3)])
def test_geodesics_have_constant_speed_and_compose(
    kind: type[geoopt.Manifold], shape: tuple[int, ...]
) -> None:
    manifold = kind()
    x = draw(manifold, shape)
    u = manifold.proju(x, torch.randn(shape))
    _, start = torch.func.jvp(
        lambda t: manifold.expmap(x, t * u), (torch.tensor(0.3),), (torch.tensor(1.0),)
    )
    middle = manifold.expmap(x, 0.3 * u)
    torch.testing.assert_close(manifold.norm(middle, start), manifold.norm(x, u))
    torch.testing.assert_close(
        manifold.expmap(middle, 0.7 * start), manifold.expmap(x, u)
    )


@pytest.mark.parametrize("kind", [manifolds.Stiefel, manifolds.CanonicalStiefel])
@pytest.mark.parametrize("length", [1e-3, 0.02, 0.03, 0.04, 0.05, 0.1, 1.0, 10.0])
def test_geodesics_stay_on_the_manifold_at_every_length(
    kind: type[geoopt.Manifold], length: float
) -> None:
    # torch.matrix_exp alone is off by 1e-11 where the norm is just below 0.05.
    manifold = kind()
    for shape in [(4, 2), (2, 2), (5, 3)]:
        x = draw(manifold, (20, *shape))
        u = manifold.proju(x, torch.randn(20, *shape))
        u = length * u / torch.linalg.matrix_norm(u, 1)[:, None, None]
        y = manifold.expmap(x, u)
        error = (y.mT @ y - torch.eye(shape[-1])).abs().max()
        assert float(error) < 50 * (1 + length) * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("kind", [manifolds.Stiefel, manifolds.CanonicalStiefel])
@pytest.mark.parametrize("method", ["retr", "expmap"])
def test_many_large_float32_steps_stay_on_the_manifold(
    kind: type[geoopt.Manifold], method: str
) -> None:
    manifold = kind()
    x = plain(manifold.random(12, 5, dtype=torch.float32))
    for _ in range(200):
        u = manifold.proju(x, torch.randn(12, 5, dtype=torch.float32))
        x = getattr(manifold, method)(x, u)
    error = float((x.mT @ x - torch.eye(5, dtype=torch.float32)).abs().max())
    assert error < 50 * torch.finfo(torch.float32).eps


def test_manifolds_survive_a_state_dict_and_repr() -> None:
    assert repr(manifolds.Stiefel()) == "Stiefel manifold"
    assert repr(manifolds.CanonicalStiefel()) == "CanonicalStiefel manifold"
    assert json.dumps(list(manifolds.Stiefel().state_dict())) == "[]"
