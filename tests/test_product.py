"""The product manifold of all parameters, with and without the metrics of blocks."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, chain
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import OURS, Case
from mutants import state as mutants
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Mass, Part, TangentSpace, manifolds
from riemannian_modules.errors import ManifoldContractError, MassError, ShapeError
from riemannian_modules.factors import DenseFactor
from riemannian_modules.manifolds import MetricProduct, Product
from riemannian_modules.manifolds.riesz import dimension, flat, root, root_adjoint
from riemannian_modules.retractions import Default, Exponential, Projection
from riemannian_modules.testing import (
    check_base_manifold,
    check_metric,
    check_retraction,
    failures,
    raise_failures,
)

SEEDS = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=max(4, settings.default.max_examples // 5))
BLOCKS = ["tensor", "layer", "model"]
CASES = {case.name: case for case in OURS}


def products(max_parts: int = 4) -> st.SearchStrategy[tuple[list[Case], list[float]]]:
    """Parts with masses."""
    masses = st.floats(0.1, 10.0)
    pairs = st.lists(
        st.tuples(st.sampled_from(OURS), masses), min_size=1, max_size=max_parts
    )
    return pairs.map(lambda found: tuple(map(list, zip(*found, strict=True))))


def build(found: tuple[list[Case], list[float]]) -> tuple[Product, list[Case]]:
    cases, masses = found
    parts = {f"p{i}": (case.make(), case.shape) for i, case in enumerate(cases)}
    weights = {f"p{i}": Mass(scalar=mass) for i, mass in enumerate(masses)}
    return Product(parts, masses=weights), cases


def points(product: Product, cases: list[Case], batch: tuple[int, ...] = ()) -> Tensor:
    drawn = [
        case.draw(manifold, batch)
        for case, manifold in zip(cases, product.manifolds, strict=True)
    ]
    return product.pack(dict(zip(product.names, drawn, strict=True)))


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm().clamp_min(1e-300))


# ---- flat vectors and named tensors ----------------------------------------------


@FEW
@given(found=products(), batch=st.sampled_from([(), (1,), (3,), (2, 3), (0,)]))
def test_packing_is_undone_by_unpacking(found: Any, batch: tuple[int, ...]) -> None:
    product, cases = build(found)
    values = {
        name: torch.randn(*batch, *case.shape)
        for name, case in zip(product.names, cases, strict=True)
    }
    point = product.pack(values)
    assert point.shape == (*batch, product.n_elements)
    back = product.unpack(point)
    assert list(back) == list(values)
    assert all(torch.equal(back[name], values[name]) for name in values)
    assert torch.equal(product.pack_point(*values.values()), point)


def test_names_may_be_nested() -> None:
    model = nn.Sequential(nn.Linear(3, 2), nn.Sequential(nn.Tanh(), nn.Linear(2, 2)))
    product = Product.of(model)
    values = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    point = product.pack(values)
    nested = product.unpack_nested(point)
    assert torch.equal(nested["1"]["1"]["bias"], values["1.1.bias"])
    assert sorted(nested) == ["0", "1"]
    assert torch.equal(product.pack(nested), point)
    mixed = {"0": nested["0"], "1.1": nested["1"]["1"]}
    assert torch.equal(product.pack(mixed), point)


def test_parameters_may_be_packed_as_they_are() -> None:
    model = rm.nn.Linear(3, 2, manifold=manifolds.Sphere())
    point = Product.of(model).pack(dict(model.named_parameters()))
    assert type(point) is Tensor
    parameters = list(model.parameters())
    assert torch.equal(point, nn.utils.parameters_to_vector(parameters))
    point.sum().backward()
    assert model.bias.grad is not None


def test_unpacked_tensors_share_the_memory_of_the_vector() -> None:
    product = Product({"a": (geoopt.Euclidean(), (2,)), "b": (geoopt.Euclidean(), ())})
    point = torch.zeros(3)
    product.unpack(point)["b"].fill_(2.0)
    assert point.tolist() == [0.0, 0.0, 2.0]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"a": torch.ones(2)}, "'b' is missing"),
        ({"a": torch.ones(3), "b": torch.ones(3)}, r"'a' has shape \(3,\)"),
        ({"a": torch.ones(()), "b": torch.ones(3)}, r"'a' has shape \(\)"),
        ({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1)}, "'c'"),
        ({"a": {"x": torch.ones(2)}, "b": torch.ones(3)}, "'a' is missing"),
    ],
)
def test_what_cannot_be_packed(values: Any, words: str) -> None:
    product = Product({"a": (geoopt.Euclidean(), (2,)), "b": (geoopt.Sphere(), (3,))})
    with pytest.raises(ShapeError, match=words):
        product.pack(values)


@pytest.mark.parametrize("shape", [(), (4,), (2, 6)])
def test_what_cannot_be_unpacked(shape: tuple[int, ...]) -> None:
    product = Product({"a": (geoopt.Euclidean(), (2,)), "b": (geoopt.Sphere(), (3,))})
    with pytest.raises(ShapeError, match="5"):
        product.unpack(torch.ones(shape))


@pytest.mark.parametrize(
    ("part", "error", "words"),
    [
        ((manifolds.Stiefel(), (3,)), ShapeError, "'w' of shape"),
        ((geoopt.Lorentz(), (3,)), ManifoldContractError, "w: geoopt.Lorentz"),
    ],
)
def test_what_is_no_part(part: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        Product({"w": part})


def test_a_product_of_nothing() -> None:
    with pytest.raises(ShapeError, match="at least one part"):
        Product.of(nn.Tanh())


def test_masses_that_a_part_cannot_carry() -> None:
    mass = {"w": Mass(diagonal=torch.ones(3))}
    Product({"w": (geoopt.Euclidean(), (3,))}, masses=mass)
    with pytest.raises(MassError, match="'w' lives on Sphere"):
        Product({"w": (geoopt.Sphere(), (3,))}, masses=mass)


# ---- the contract, without blocks ------------------------------------------------


@FEW
@given(found=products(3), seed=SEEDS)
def test_every_check_passes(found: Any, seed: int) -> None:
    generator = torch.manual_seed(seed)
    product, cases = build(found)
    results = check_base_manifold(product, points(product, cases), generator=generator)
    raise_failures(results)
    assert {"riesz", "projection_complete", "random_on_manifold"} <= {
        result.name for result in results
    }


@pytest.mark.parametrize(("law", "make"), mutants.MANIFOLDS)
def test_wrong_manifolds_are_found(
    law: str, make: Callable[[], geoopt.Manifold]
) -> None:
    manifold = make()
    reshaped = isinstance(manifold, manifolds.Reshaped)
    shape = manifold.shape if reshaped else (manifold.n_elements,)
    right = manifolds.Reshaped(manifold.base, shape, (4, 18)) if reshaped else manifold
    point = right.projx(torch.rand(shape) + 0.5)
    assert law in {r.name for r in failures(check_base_manifold(manifold, point))}


@FEW
@given(found=products(), seed=SEEDS, ahead=st.sampled_from([(), (3,), (2, 3)]))
def test_everything_is_part_by_part(
    found: Any, seed: int, ahead: tuple[int, ...]
) -> None:
    torch.manual_seed(seed)
    product, cases = build(found)
    x = points(product, cases)
    ambient = torch.randn(*ahead, product.n_elements)
    u = 0.1 * product.proju(x, ambient)
    y = product.retr(x, u)
    assert y.shape == u.shape == ambient.shape
    moved = product.transp(x, y, u)
    sharp = product.egrad2rgrad(x, ambient)
    lowered = flat(product, x, u)
    component = product.component_inner(x, u)
    total = torch.zeros(ahead)
    for i, (name, manifold) in enumerate(
        zip(product.names, product.manifolds, strict=True)
    ):
        p, e, a, b, c, s, f, k = (
            product.unpack(t)[name]
            for t in (x, ambient, u, y, moved, sharp, lowered, component)
        )
        mass = product.masses[i].scalar
        torch.testing.assert_close(manifold.proju(p, 0.1 * e), a)
        torch.testing.assert_close(manifold.retr(p, a), b)
        torch.testing.assert_close(manifold.transp(p, b, a), c)
        torch.testing.assert_close(manifold.egrad2rgrad(p, e.clone()) / mass, s)
        torch.testing.assert_close(flat(manifold, p, a) * mass, f)
        own = mass * manifold.component_inner(p, a)
        torch.testing.assert_close(own.expand_as(k), k)
        term = mass * manifold.inner(p, a, keepdim=True)
        total = total + term.reshape(*ahead, -1).sum(-1)
    torch.testing.assert_close(product.inner(x, u), total)
    torch.testing.assert_close(product.inner(x, u, u, keepdim=True)[..., 0], total)
    torch.testing.assert_close(product.norm(x, u) ** 2, total)
    torch.testing.assert_close((lowered * u).sum(-1), total)
    assert dimension(product, x) == sum(
        dimension(manifold, product.unpack(x)[name])
        for name, manifold in zip(product.names, product.manifolds, strict=True)
    )


@FEW
@given(found=products(3), seed=SEEDS)
def test_batches_of_points(found: Any, seed: int) -> None:
    torch.manual_seed(seed)
    product, cases = build(found)
    x = points(product, cases, (3,))
    e = torch.randn(3, product.n_elements)
    u = 0.1 * product.proju(x, e)
    for verb in (
        product.projx,
        product.retr,
        product.egrad2rgrad,
        product.inner,
        product.component_inner,
    ):
        arguments = (x,) if verb == product.projx else (x, u)
        together = verb(*arguments)
        for i in range(3):
            alone = verb(*(t[i] for t in arguments))
            torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-9)


def has_distance(case: Case) -> bool:
    manifold = case.make()
    x = case.draw(manifold)
    try:
        manifold.dist(x, x, keepdim=True)
    except NotImplementedError:
        return False
    return True


DISTANT = [case for case in OURS if has_distance(case)]


@FEW
@given(
    cases=st.lists(st.sampled_from(DISTANT), min_size=1, max_size=4),
    seed=SEEDS,
    mass=st.floats(0.1, 10.0),
)
def test_distances_add_up_by_pythagoras(
    cases: list[Case], seed: int, mass: float
) -> None:
    torch.manual_seed(seed)
    product, _ = build((cases, [mass] * len(cases)))
    x, y = points(product, cases), points(product, cases)
    squares = sum(
        manifold.dist(p, q, keepdim=True).square().sum()
        for manifold, p, q in zip(
            product.manifolds,
            product.unpack(x).values(),
            product.unpack(y).values(),
            strict=True,
        )
    )
    torch.testing.assert_close(product.dist(x, y), (mass * squares).sqrt())
    torch.testing.assert_close(product.dist2(x, y), mass * squares)
    assert product.dist(x, y, keepdim=True).shape == (1,)
    batch = product.dist(x, torch.stack([y, x, y]))
    torch.testing.assert_close(batch[2], product.dist(x, y))


@pytest.mark.parametrize("ndim", [0, 2])
def test_distances_with_a_mass_for_every_entry(ndim: int) -> None:
    mass = Mass(diagonal=torch.rand(2, 3) + 0.5)
    flat_ = {"w": (geoopt.Euclidean(ndim=ndim), (2, 3))}
    product = Product(flat_, masses={"w": mass})
    x, y = torch.randn(2, 6)
    expected = (mass.diagonal.flatten() * (x - y).square()).sum()
    torch.testing.assert_close(product.dist2(x, y), expected)
    torch.testing.assert_close(product.inner(x, x - y), expected)


def test_a_part_without_a_distance() -> None:
    product, cases = build(([CASES["Stiefel, tall"], CASES["Sphere"]], [1.0, 1.0]))
    x = points(product, cases)
    with pytest.raises(NotImplementedError):
        product.dist(x, x)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_batches_without_points(case: Case) -> None:
    product, _ = build(([case, CASES["Sphere"]], [2.0, 1.0]))
    size = product.n_elements
    x, u = torch.empty(2, 0, size), torch.empty(size)
    for verb in ("projx", "proju", "egrad2rgrad", "retr", "logmap", "component_inner"):
        arguments = (x,) if verb == "projx" else (x, u)
        assert getattr(product, verb)(*arguments).shape == (2, 0, size), verb
    assert product.expmap(x, u).shape == product.transp(x, x, u).shape == x.shape
    for verb in ("inner", "norm", "dist", "dist2"):
        call = getattr(product, verb)
        assert call(x, u).shape == (2, 0)
        assert call(x, u, keepdim=True).shape == (2, 0, 1)
    assert [part.shape for part in product.retr_transp(x, u, u)] == [x.shape] * 2
    assert product.check_point_on_manifold(x)
    assert product.check_vector_on_tangent(x, x)


@FEW
@given(found=products(3), seed=SEEDS)
def test_random_points_and_origins(found: Any, seed: int) -> None:
    torch.manual_seed(seed)
    product, cases = build(found)
    if any("ProductManifold" in case.name for case in cases):
        return  # geoopt's hands the data type on to parts of another one
    for point in (
        product.random(product.n_elements),
        product.random(2, product.n_elements, dtype=torch.float32),
    ):
        assert point.manifold is product
        assert point.shape[-1] == product.n_elements
        tolerance = 1e-9 if point.dtype == torch.float64 else 1e-4
        assert product.check_point_on_manifold(point, atol=tolerance, rtol=tolerance)


@FEW
@given(found=products(2), seed=SEEDS)
def test_a_root_of_the_riesz_map(found: Any, seed: int) -> None:
    torch.manual_seed(seed)
    product, cases = build(found)
    x = points(product, cases)
    e, z = torch.randn(2, product.n_elements)
    there = root(product, x, root_adjoint(product, x, e))
    assert gap(there, product.egrad2rgrad(x, e)) < 1e-9
    torch.testing.assert_close(
        (root(product, x, z) * e).sum(), (z * root_adjoint(product, x, e)).sum()
    )


def test_it_carries_a_layer_metric() -> None:
    product, cases = build(([CASES["Stiefel, wide"], CASES["PoincareBall"]], [0.5, 2]))
    space = TangentSpace(product, points(product, cases), Mass(scalar=0.3))
    factor = DenseFactor(torch.randn(5, product.n_elements))
    raise_failures(check_metric(LayerMetric([Part("all", space, factor)])))


def test_products_of_products() -> None:
    inner, _ = build(([CASES["Sphere"], CASES["Positive"]], [2.0, 3.0]))
    outer = Product(
        {"in": (inner, (inner.n_elements,)), "w": (manifolds.Stiefel(), (2, 4))},
        masses={"in": Mass(scalar=0.5)},
    )
    level = Product(
        {
            "in.p0": (manifolds.Sphere(), (4,)),
            "in.p1": (manifolds.Positive(), (3, 2)),
            "w": (manifolds.Stiefel(), (2, 4)),
        },
        masses={"in.p0": Mass(scalar=1.0), "in.p1": Mass(scalar=1.5)},
    )
    x = level.random(level.n_elements).data
    nested = outer.unpack_nested(x)
    assert sorted(nested["in"]) == ["p0", "p1"]
    assert torch.equal(outer.pack(nested), x)
    assert torch.equal(outer.pack(level.unpack(x)), x)
    with pytest.raises(ShapeError, match="'p1' is missing"):
        outer.pack({"in": {"p0": nested["in"]["p0"]}, "w": nested["w"]})
    e = torch.randn(3, level.n_elements)
    torch.testing.assert_close(outer.egrad2rgrad(x, e), level.egrad2rgrad(x, e))
    torch.testing.assert_close(outer.inner(x, e), level.inner(x, e))
    assert dimension(outer, x) == dimension(level, x)
    raise_failures(check_base_manifold(outer, x))
    assert repr(outer).count("\n") == 4


def test_retractions_know_its_parts() -> None:
    second, _ = build(([CASES["Sphere"], CASES["Positive"]], [1.0, 2.0]))
    first, _ = build(([CASES["Sphere"], CASES["Stiefel, wide"]], [1.0, 2.0]))
    assert (Default().order(second), Default().order(first)) == (2, 1)
    generator = torch.manual_seed(0)
    for retraction in (Default(), Projection(), Exponential()):
        for product in (second, first):
            point = product.random(product.n_elements).data
            raise_failures(
                check_retraction(product, retraction, point, generator=generator)
            )


def test_why_it_is_not_geoopt_s() -> None:
    wide = geoopt.ProductManifold((manifolds.Stiefel(), (2, 4)))
    with pytest.raises(RuntimeError, match="view"):
        wide.projx(torch.randn(8))
    x = torch.eye(3)[0]
    assert float(geoopt.ProductManifold((geoopt.Euclidean(), 3)).dist(x, x)) > 1e-8
    assert float(Product({"a": (geoopt.Euclidean(), (3,))}).dist(x, x)) == 0.0
    ball = geoopt.PoincareBall(c=torch.tensor(1.0, dtype=torch.float32))
    other = geoopt.PoincareBall(c=torch.tensor(1.0, dtype=torch.float64))
    with pytest.raises(ValueError, match="dtype"):
        geoopt.ProductManifold((ball, 2), (other, 2))
    Product({"a": (ball, (2,)), "b": (other, (2,))})


# ---- with the metrics of blocks --------------------------------------------------


X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def passed(
    model: nn.Module, blocks: str = "layer", **options: Any
) -> rm.LayerwiseMetric:
    metric = rm.LayerwiseMetric(
        model,
        output=rm.output.Categorical(),
        blocks=blocks,
        **{"mass": 0.1, **options},
    )
    first = next(module for module in model.modules() if isinstance(module, nn.Linear))
    x = torch.randn(6, first.in_features, dtype=first.weight.dtype)
    with metric.record():
        outputs = model(x)
    target = torch.arange(len(outputs)) % outputs.shape[-1]
    metric.backward(F.cross_entropy(outputs, target), outputs)
    return metric


def here(metric: rm.LayerwiseMetric) -> Tensor:
    values = {d.name: d.tensor.detach() for d in metric.parameters}
    return metric.manifold.pack(values)


def gradient(metric: rm.LayerwiseMetric) -> Tensor:
    return metric.manifold.pack({d.name: d.tensor.grad for d in metric.parameters})


def law_gradient(metric: rm.LayerwiseMetric, manifold: MetricProduct) -> None:
    sharp = manifold.egrad2rgrad(here(metric), gradient(metric))
    assert gap(sharp, manifold.pack(metric.natural_gradient())) < 1e-9


def law_inner(metric: rm.LayerwiseMetric, manifold: MetricProduct) -> None:
    x = here(metric)
    u, v = manifold.proju(x, torch.randn(2, manifold.n_elements))
    blocks = metric.blocks.values()
    named_u, named_v = manifold.unpack(u), manifold.unpack(v)
    expected = sum(block.inner(named_u, named_v) for block in blocks)
    torch.testing.assert_close(manifold.inner(x, u, v), expected)
    component = manifold.unpack(manifold.component_inner(x, u, v))
    for block in blocks:
        for part in block.parts:
            own = block.inner(named_u, named_v).expand(part.space.point.shape)
            torch.testing.assert_close(component[part.name], own)


def law_moved(metric: rm.LayerwiseMetric, manifold: MetricProduct) -> None:
    x, e = here(metric), gradient(metric)
    y = manifold.retr(x, 0.5 * manifold.proju(x, torch.randn_like(x)))
    named = manifold.unpack(y)
    moved = [
        block.at({part.name: named[part.name] for part in block.parts})
        for block in metric.blocks.values()
    ]
    expected = {n: w for m in moved for n, w in m.sharp(manifold.unpack(e)).items()}
    assert gap(manifold.egrad2rgrad(y, e), manifold.pack(expected)) < 1e-12
    u = manifold.proju(y, torch.randn_like(y))
    torch.testing.assert_close(
        manifold.inner(y, manifold.egrad2rgrad(y, e), u), (e * u).sum()
    )


def law_batches(metric: rm.LayerwiseMetric, manifold: MetricProduct) -> None:
    x = here(metric)
    e = torch.randn(2, 3, manifold.n_elements)
    sharp, norms = manifold.egrad2rgrad(x, e), manifold.inner(x, e)
    lowered = flat(manifold, x, e)
    assert sharp.shape == e.shape
    assert norms.shape == (2, 3)
    assert manifold.inner(x, e, keepdim=True).shape == (2, 3, 1)
    for i in range(2):
        for j in range(3):
            alone = e[i, j]
            assert torch.equal(sharp[i, j], manifold.egrad2rgrad(x, alone))
            assert torch.equal(norms[i, j], manifold.inner(x, alone))
            assert torch.equal(lowered[i, j], flat(manifold, x, alone))
    y = manifold.retr(x, 0.1 * manifold.proju(x, e[0]))
    both = manifold.egrad2rgrad(y, e)
    assert torch.equal(both[1, 2], manifold.egrad2rgrad(y[2], e[1, 2]))
    assert manifold.egrad2rgrad(x, e[:, :0]).shape == (2, 0, manifold.n_elements)


LAWS = {
    "gradient": law_gradient,
    "inner": law_inner,
    "moved": law_moved,
    "batches": law_batches,
}


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("law", LAWS)
def test_it_agrees_with_the_blocks(law: str, name: str, blocks: str) -> None:
    metric = passed(MODELS[name](), blocks)
    manifold = metric.manifold
    assert isinstance(manifold, MetricProduct)
    assert manifold.version == metric.version
    LAWS[law](metric, manifold)


@pytest.mark.parametrize(("law", "kind"), mutants.PRODUCTS)
def test_wrong_products_are_found(law: str, kind: type[MetricProduct]) -> None:
    metric = passed(MODELS["chain"]())
    right = metric.manifold
    parts = dict(
        zip(right.names, zip(right.manifolds, right.shapes, strict=True), strict=True)
    )
    LAWS[law](metric, MetricProduct(parts, right.blocks, right.version))
    with pytest.raises(AssertionError):
        LAWS[law](metric, kind(parts, right.blocks, right.version))


@pytest.mark.parametrize("base", ["stiefel-wide", "canonical-tall", "poincare", "spd"])
@FEW
@given(seed=SEEDS, mass=st.floats(1e-2, 10.0))
def test_the_riesz_identity_anywhere(base: str, seed: int, mass: float) -> None:
    torch.manual_seed(seed)
    metric = passed(chain(base), mass=mass)
    manifold, x = metric.manifold, here(metric)
    x = manifold.retr(x, 0.1 * manifold.proju(x, torch.randn_like(x)))
    e = torch.randn_like(x)
    before = e.clone()
    sharp = manifold.egrad2rgrad(x, e)
    assert torch.equal(e, before)
    torch.testing.assert_close(manifold.proju(x, sharp), sharp, rtol=1e-8, atol=1e-8)
    for u in manifold.proju(x, torch.randn(3, len(x))):
        torch.testing.assert_close(
            manifold.inner(x, sharp, u), (e * u).sum(), rtol=1e-8, atol=1e-8
        )
    torch.testing.assert_close(
        (flat(manifold, x, sharp) * u).sum(), (e * u).sum(), rtol=1e-8, atol=1e-8
    )


def test_points_and_vectors_are_those_of_the_parts() -> None:
    metric = passed(MODELS["chain"]())
    manifold, plain = metric.manifold, Product.of(metric.model)
    assert manifold.names == plain.names
    x = here(metric)
    e = torch.randn(3, len(x))
    u = manifold.proju(x, 0.1 * e)
    y = manifold.retr(x, u)
    assert torch.equal(u, plain.proju(x, 0.1 * e))
    assert torch.equal(y, plain.retr(x, u))
    assert torch.equal(manifold.expmap(x, u), plain.expmap(x, u))
    assert torch.equal(manifold.projx(e), plain.projx(e))
    assert torch.equal(manifold.transp(x, y, u), plain.transp(x, y, u))
    assert manifold.check_point_on_manifold(y, atol=1e-9, rtol=1e-9)
    assert manifold.check_vector_on_tangent(x, u[0], atol=1e-9, rtol=1e-9)
    assert not manifold.check_point_on_manifold(2.0 * y)


def test_geodesics_of_factors_are_refused() -> None:
    metric = passed(MODELS["chain"]())
    x = here(metric)
    for verb in (metric.manifold.dist, metric.manifold.dist2, metric.manifold.logmap):
        with pytest.raises(NotImplementedError, match=r"Product\.of\(model\)"):
            verb(x, x)


def test_before_the_first_pass_it_has_the_masses() -> None:
    model = MODELS["chain"]()
    row, column = torch.rand(3) + 0.5, torch.rand(3) + 0.5
    weights = {"0.weight": 0.3, "2.weight": (row, column), "*": 2.0}
    metric = rm.LayerwiseMetric(model, output=None, mass=weights)
    manifold = metric.manifold
    assert type(manifold) is Product
    x = here(metric)
    u, e = manifold.proju(x, torch.randn(2, len(x)))
    parts = manifold.unpack(u)
    expected = (
        0.3 * parts["0.weight"].square().sum()
        + 2.0 * parts["0.bias"].square().sum()
        + (torch.outer(row, column) * parts["2.weight"].square()).sum()
        + 2.0 * parts["2.bias"].square().sum()
    )
    torch.testing.assert_close(manifold.inner(x, u), expected)
    torch.testing.assert_close(manifold.component_inner(x, u).shape, x.shape)
    sharp = manifold.egrad2rgrad(x, e)
    torch.testing.assert_close(manifold.inner(x, sharp, u), (e * u).sum())
    with pytest.raises(NotImplementedError):
        manifold.dist(x, x)


def test_it_belongs_to_its_pass() -> None:
    model = MODELS["chain"]()
    metric = passed(model)
    manifold, x, e = metric.manifold, here(metric), gradient(metric)
    before = manifold.egrad2rgrad(x, e)
    with metric.record():
        outputs = model(torch.randn(6, 5))
    metric.pull_back(outputs)
    assert torch.equal(manifold.egrad2rgrad(x, e), before)
    assert metric.manifold.version == manifold.version + 1
    assert gap(metric.manifold.egrad2rgrad(x, e), before) > 1e-3


def test_parameters_that_the_pass_did_not_reach_weigh_their_mass() -> None:
    model = nn.ModuleDict({"used": nn.Linear(5, 3), "idle": nn.Linear(2, 2)})
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.25)
    with metric.record():
        outputs = model["used"](X)
    metric.pull_back(outputs)
    manifold = metric.manifold
    e = torch.randn(manifold.n_elements)
    sharp = manifold.unpack(manifold.egrad2rgrad(here(metric), e))
    named = manifold.unpack(e)
    torch.testing.assert_close(sharp["idle.weight"], 4.0 * named["idle.weight"])
    own = metric.blocks["used"].sharp(named)
    torch.testing.assert_close(sharp["used.weight"], own["used.weight"])


def test_blocks_must_fit_the_parts() -> None:
    metric = passed(MODELS["chain"]())
    parts = {d.name: (d.manifold, d.tensor.shape) for d in metric.parameters}
    for blocks in (list(metric.blocks.values())[:1], [*metric.blocks.values()] * 2):
        with pytest.raises(ShapeError, match="must hold each"):
            MetricProduct(parts, blocks)


def test_a_step_along_the_product_is_a_step_of_the_optimizer() -> None:
    model = MODELS["chain"]()
    metric = passed(model)
    manifold = metric.manifold
    x, e = here(metric), gradient(metric)
    expected = manifold.retr(x, -0.2 * manifold.egrad2rgrad(x, e))
    rm.optim.RiemannianSGD(metric, lr=0.2).step()
    assert gap(here(metric), expected) < 1e-9
    whole = geoopt.ManifoldParameter(x, manifold=manifold)
    whole.grad = e
    geoopt.optim.RiemannianSGD([whole], lr=0.2).step()
    assert gap(whole.detach(), expected) < 1e-12


def test_shared_parameters_are_one_part() -> None:
    metric = passed(MODELS["tied"]())
    assert list(metric.manifold.names) == list(dict(metric.model.named_parameters()))


@pytest.mark.parametrize(
    "copier", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_drop_the_factors(copier: Callable[[Any], Any]) -> None:
    metric = passed(MODELS["chain"]())
    manifold, x, e = metric.manifold, here(metric), gradient(metric)
    before = manifold.egrad2rgrad(x, e)
    twin = copier(manifold)
    assert type(twin) is Product
    bare = {
        name: mass.scalar for name, mass in zip(twin.names, twin.masses, strict=True)
    }
    assert bare == dict.fromkeys(manifold.names, 0.1)
    torch.testing.assert_close(
        twin.egrad2rgrad(x, e), 10.0 * Product.of(metric.model).egrad2rgrad(x, e)
    )
    assert torch.equal(manifold.egrad2rgrad(x, e), before)
    assert len(pickle.dumps(passed(MODELS["chain"](), mass=0.1).manifold)) < 10_000


def test_it_is_printed_with_its_parts() -> None:
    metric = passed(MODELS["chain"]())
    lines = repr(metric.manifold).splitlines()
    assert lines[0].startswith("MetricProduct(version 1; 0: rank 12, 2: rank 12)")
    assert "0.weight (3, 5): Stiefel manifold" in lines[1]
    assert len(lines) == 5


def test_parameters_of_two_data_types() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3).float())

    def mixed(x: Tensor) -> Tensor:
        return model[2](model[1](model[0](x)).float())

    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    with metric.record():
        outputs = mixed(X)
    metric.backward(F.cross_entropy(outputs, torch.arange(6) % 3), outputs)
    manifold = metric.manifold
    sharp = manifold.egrad2rgrad(here(metric), gradient(metric))
    assert gap(sharp, manifold.pack(metric.natural_gradient())) < 1e-5


@pytest.mark.gpu
def test_on_a_cuda_device() -> None:
    metric = passed(MODELS["chain"]())
    x, e = here(metric), gradient(metric)
    expected = metric.manifold.egrad2rgrad(x, e)
    model = copy.deepcopy(metric.model).to("cuda")
    Product.of(model).projx(x.cuda())
    parts = {d.name: (d.manifold, d.tensor.shape) for d in metric.parameters}
    assert Product(parts).egrad2rgrad(x.cuda(), e.cuda()).shape == expected.shape
