"""The interface of geoopt, law by law, on every manifold and with a metric on it."""

from typing import Any

import geoopt
import pytest
import torch
from geoopt_defects import CLAMPED, SCALAR, SINKHORN, UNTAGGED_ORIGIN, defects
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from manifold_cases import GEOOPT, OURS, Case
from mutants import geoopt_contract as mutants
from torch import Tensor

import riemannian_modules as rm
from riemannian_modules.errors import ManifoldContractError, ShapeError
from riemannian_modules.manifolds import MetricManifold, Product, Quotient
from riemannian_modules.testing import (
    check_geoopt_manifold,
    failures,
    raise_failures,
)

# A check looks at some hundred numbers; shrinking a failure would take minutes.
FEW = settings(
    max_examples=5,
    phases=[Phase.explicit, Phase.reuse, Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SEEDS = st.integers(0, 2**32 - 1)
ALL = [*GEOOPT, *OURS]


def accepted(case: Case) -> bool:
    try:
        rm.manifolds.ensure_contract(case.make())
    except ManifoldContractError:
        return False
    return True


CARRIERS = [case for case in ALL if accepted(case)]


def named(case: Case) -> str:
    return f"{'geoopt' if case in GEOOPT else 'rm'}-{case.name}"


def sampler(case: Case, manifold: geoopt.Manifold) -> Any:
    """Points of a batch of the case's shape; None where ``random`` will do."""
    if case in OURS and case.random is None:
        return None
    return lambda shape: case.draw(manifold, shape[: len(shape) - len(case.shape)])


def noisy(manifold: geoopt.Manifold) -> tuple[str, ...]:
    """Laws that depend on where geoopt's Sinkhorn iteration stops, at 1e-5."""
    return SINKHORN if type(manifold) is geoopt.BirkhoffPolytope else ()


def expected(case: Case, manifold: geoopt.Manifold) -> dict[str, str]:
    """What the class itself fails: geoopt's own, and what is built upon it."""
    if case in GEOOPT:
        return defects(case.name, manifold)
    match manifold:
        case rm.manifolds.Scaled() | rm.manifolds.Reshaped():
            inner = manifold.base
            return CLAMPED if isinstance(inner, geoopt.Sphere) else {}
        case geoopt.SymmetricPositiveDefinite():
            return {
                **UNTAGGED_ORIGIN,
                "random_carries_the_manifold": "random returns a plain tensor",
            }
        case Product():
            return {}
        case geoopt.ProductManifold():
            return SCALAR
        case geoopt.Sphere() | geoopt.Stereographic():
            return defects(case.name, manifold)
    return {}


@pytest.mark.parametrize("case", ALL, ids=named)
def test_every_manifold_keeps_what_it_is_not_known_to_break(case: Case) -> None:
    manifold = case.make()
    found = check_geoopt_manifold(
        manifold, case.shape, draw=sampler(case, manifold), skip=noisy(manifold)
    )
    raise_failures(found, expected_failures=expected(case, manifold))


# ---- with a metric on it ---------------------------------------------------------


def carried(view: MetricManifold, case: Case) -> dict[str, str]:
    """What is left of a class's failures in a MetricManifold of it."""
    mended = {
        "inner_shape",
        "random_carries_the_manifold",
        "origin_carries_the_manifold",
    }
    known = expected(case, view.base)
    if "origin_points" in known:  # there is no origin to carry it
        mended.remove("origin_carries_the_manifold")
    return {law: reason for law, reason in known.items() if law not in mended}


@pytest.mark.parametrize("case", CARRIERS, ids=named)
def test_without_a_factor(case: Case) -> None:
    view = MetricManifold(case.make())
    found = check_geoopt_manifold(view, case.shape, draw=sampler(case, view.base))
    raise_failures(found, expected_failures=carried(view, case))


def with_factor(
    case: Case, *, rank: int = 4, mass: float = 0.3, seed: int = 0
) -> tuple[MetricManifold, Tensor]:
    base = case.make()
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng():
        # Not the seed of the check: its vectors would be multiples of the point.
        torch.manual_seed(seed ^ 0x5EED)
        point = case.draw(base).as_subclass(Tensor).detach()
    space = rm.TangentSpace(base, point, rm.Mass(scalar=mass), "w")
    rows = torch.randn(rank, *case.shape, generator=generator)
    if isinstance(base, Quotient):
        # Outputs that depend on the point alone do not feel its representatives.
        rows = base.proju(point, rows)
    metric = rm.LayerMetric([rm.Part("w", space, rm.factors.DenseFactor(rows))])
    view = MetricManifold(base)
    view.bind(metric)
    return view, point


# expmap follows the base's geodesics; those of another metric have no closed form.
OTHER_METRIC = ("expmap_geodesic",)
DISTANCES = {"dist_zero", "dist_symmetric", "dist2", "logmap_inverse", "distance"}


@pytest.mark.parametrize("case", CARRIERS, ids=named)
def test_with_a_factor(case: Case) -> None:
    law_with_a_factor(case, 0)


@FEW
@given(case=st.sampled_from(CARRIERS), seed=SEEDS)
def test_with_any_factor(case: Case, seed: int) -> None:
    law_with_a_factor(case, seed)


def law_with_a_factor(case: Case, seed: int) -> None:
    view, x = with_factor(case, seed=seed)

    def draw(shape: tuple[int, ...]) -> Tensor:
        """The metric's own point and another one."""
        return torch.stack([x, case.draw(view.base).as_subclass(Tensor)])

    found = check_geoopt_manifold(
        view,
        case.shape,
        batch=(2,),
        draw=draw,
        skip=OTHER_METRIC,
        generator=torch.Generator().manual_seed(seed),
    )
    names = {result.name for result in found}
    assert {"riesz", "inner_shape", "batch_egrad2rgrad", "gradient_slope"} <= names
    assert not names & DISTANCES
    known = {n: r for n, r in carried(view, case).items() if n in names}
    raise_failures(found, expected_failures=known)


def test_a_factor_changes_the_geodesics() -> None:
    """What the laws above skip by name is skipped for a reason."""
    view, _ = with_factor(next(case for case in OURS if case.name == "Sphere"))
    found = {r.name: r for r in check_geoopt_manifold(view, (4,))}
    assert not found["expmap_geodesic"].passed


@pytest.mark.parametrize("case", CARRIERS, ids=named)
def test_points_of_a_batch_are_looked_at_one_by_one(case: Case) -> None:
    view, x = with_factor(case)
    y = case.draw(view.base, (2,)).as_subclass(Tensor)
    u, v = view.proju(y, torch.randn_like(y)), view.proju(y, torch.randn_like(y))
    rows = view.metric.parts[0].factor.to_dense()
    flats = u.flatten(1), v.flatten(1)
    base = torch.stack(
        [view.base.inner(y[i], u[i], v[i], keepdim=True).sum() for i in range(2)]
    )
    wanted = 0.3 * base + ((flats[0] @ rows.mT) * (flats[1] @ rows.mT)).sum(1)
    torch.testing.assert_close(view.inner(y, u, v), wanted, rtol=1e-10, atol=1e-12)
    kept = view.inner(y, u, v, keepdim=True)
    assert kept.shape == (2, *(1,) * x.ndim)
    assert torch.equal(view.component_inner(y, u, v), kept)
    assert view.inner(y[:0], u[:0]).shape == (0,)
    assert view.egrad2rgrad(y[:0], u[:0]).shape == (0, *x.shape)


# ---- inside products -------------------------------------------------------------

INSIDE = [
    case for case in OURS if case.name in ("Stiefel, tall", "SPD", "Grassmann, tall")
]


@pytest.mark.parametrize("kind", ["geoopt", "library"])
@pytest.mark.parametrize("case", INSIDE, ids=named)
def test_a_metric_is_part_of_a_product(case: Case, kind: str) -> None:
    view, x = with_factor(case)
    if isinstance(view.base, Quotient) and kind == "geoopt":
        pytest.skip("geoopt's product does not know which tensors are one point")
    parts = [(view, case.shape), (geoopt.Euclidean(), (2,))]
    if kind == "geoopt":
        product: geoopt.Manifold = geoopt.ProductManifold(*parts)
        nested = geoopt.ProductManifold((product, product.n_elements), parts[1])
    else:
        product = Product({"w": parts[0], "b": parts[1]})
        nested = Product({"inner": (product, (product.n_elements,)), "c": parts[1]})

    def draw(shape: tuple[int, ...]) -> Tensor:
        weight = torch.stack([x, case.draw(view.base).as_subclass(Tensor)]).flatten(1)
        return torch.cat([weight, torch.randn(2, shape[-1] - weight.shape[-1])], -1)

    known = dict(SCALAR) if kind == "geoopt" else {}
    skipped = {*OTHER_METRIC, *DISTANCES, "logmap_length"}
    for manifold in (product, nested):
        size = (manifold.n_elements,)
        found = check_geoopt_manifold(
            manifold, size, batch=(2,), draw=draw, skip=skipped
        )
        raise_failures(
            [r for r in found if not r.name.startswith("origin")],
            expected_failures=known,
        )


def test_a_product_s_inner_is_the_sum() -> None:
    view, x = with_factor(OURS[0])
    product = Product(
        {"w": (view, x.shape), "b": (geoopt.Euclidean(), (2,))},
        masses={"w": rm.Mass(scalar=2.0)},
    )
    values = {"w": x, "b": torch.randn(2)}
    u = {name: torch.randn_like(value) for name, value in values.items()}
    total = product.inner(product.pack(values), product.pack(u))
    wanted = 2.0 * view.inner(x, u["w"]) + u["b"].square().sum()
    torch.testing.assert_close(total, wanted)
    view.release()
    again = product.inner(product.pack(values), product.pack(u))
    torch.testing.assert_close(
        again, 2.0 * u["w"].square().sum() + u["b"].square().sum()
    )


# ---- what is refused -------------------------------------------------------------


def test_scaled_around_a_metric_is_refused() -> None:
    view, _ = with_factor(OURS[0])
    for each in (view, MetricManifold(geoopt.Sphere())):
        with pytest.raises(ManifoldContractError, match=r"mass.*Scaled\(base"):
            geoopt.Scaled(each, 2.0)


@pytest.mark.parametrize(
    "kind", [geoopt.optim.SparseRiemannianSGD, geoopt.optim.SparseRiemannianAdam]
)
def test_sparse_optimizers_stop_before_they_change_anything(kind: Any) -> None:
    case = next(case for case in OURS if case.name == "Euclidean")
    view, x = with_factor(case)
    parameter = geoopt.ManifoldParameter(x.clone(), manifold=view)
    optimizer = kind([parameter], lr=0.1)
    indices = torch.tensor([[1]])
    parameter.grad = torch.sparse_coo_tensor(
        indices, torch.ones(1, 2), x.shape, check_invariants=True
    )
    with pytest.raises(
        ShapeError, match=r"(?s)\(3, 2\).*\(1, 2\).*[Ss]parse optimizers"
    ):
        optimizer.step()
    assert torch.equal(parameter.detach(), x)
    view.release()
    optimizer.step()
    changed = (parameter.detach() != x).any(-1)
    assert changed.tolist() == [False, True, False]


@pytest.mark.parametrize("kind", ["RSGLD", "RHMC", "SGRHMC"])
def test_samplers_are_refused(kind: str) -> None:
    sampler = getattr(geoopt.samplers, kind)
    plain = geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.Euclidean())
    sampler([plain])
    for bound in (False, True):
        view, x = with_factor(OURS[0])
        if not bound:
            view.release()
        parameter = geoopt.ManifoldParameter(x.clone(), manifold=view)
        with pytest.raises(ValueError, match="reversible"):
            sampler([parameter])


def test_parts_of_a_tensor_have_no_metric() -> None:
    view, x = with_factor(OURS[0])
    with pytest.raises(ShapeError, match=r"\(3, 2\).*couples all"):
        view.inner(x[:1], x[:1])
    with pytest.raises(ShapeError, match="couples all"):
        view.egrad2rgrad(x, x[0])


# ---- mutants ---------------------------------------------------------------------


@pytest.mark.parametrize("law", mutants.MANIFOLDS)
def test_the_law_rejects_its_mutant(law: str) -> None:
    make, shape = mutants.MANIFOLDS[law]
    found = {r.name: r for r in check_geoopt_manifold(make(), shape)}
    assert law in found
    assert not found[law].passed


@pytest.mark.parametrize("law", mutants.VIEWS)
def test_the_law_rejects_its_view(law: str) -> None:
    case = next(case for case in OURS if case.name == "Stiefel, wide")
    view, _ = with_factor(case)
    wrong = mutants.VIEWS[law](view.base)
    wrong.bind(view.metric)
    found = failures(check_geoopt_manifold(wrong, case.shape, skip=OTHER_METRIC))
    assert law in {result.name for result in found}


def test_every_law_has_a_mutant() -> None:
    from riemannian_modules.testing import check_base_manifold, check_retraction

    sphere = geoopt.Sphere()
    found = {r.name for r in check_geoopt_manifold(sphere, (4,))}
    x = sphere.random(4)
    older = {r.name for r in check_base_manifold(sphere, x)}
    older |= {r.name for r in check_retraction(sphere, rm.retractions.Default(), x)}
    assert found - older <= set(mutants.MANIFOLDS)


def test_an_error_is_a_finding() -> None:
    found = {r.name: r for r in check_geoopt_manifold(mutants.Raising(), (4,))}
    assert not found["batch_transp"].passed
    assert "ZeroDivisionError" in str(found["batch_transp"])
