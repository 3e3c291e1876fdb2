"""What every manifold of this library has, the new ones and the repaired ones."""

import copy
import math
import pickle
from collections.abc import Callable

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import Shape, draw, gap
from test_manifolds import STIEFEL_SHAPES
from test_new_manifolds import KINDS as NEW
from test_new_manifolds import tangent
from test_repaired_manifolds import KINDS as REPAIRED
from test_repaired_manifolds import NO_DISTANCE, NO_GEODESICS
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Mass, Part, TangentSpace, manifolds
from riemannian_modules.factors import DenseFactor
from riemannian_modules.manifolds.riesz import (
    dimension,
    flat,
    require_own_formulas,
    riesz,
    root,
    root_adjoint,
)
from riemannian_modules.testing import check_base_manifold, check_metric, raise_failures
from riemannian_modules.testing.reference import dense_sharp

SEEDS = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=max(2, settings.default.max_examples // 5))
PRECISIONS = [torch.float64, torch.float32]

KINDS = {**NEW, **REPAIRED}
CASES = [(kind, shape) for kind, (_, shapes) in KINDS.items() for shape in shapes]
RANKS = {kind for kind in NEW if kind.startswith("rank")}
# Their laws are in test_manifolds.py.
STIEFEL = {
    "stiefel": (manifolds.Stiefel, STIEFEL_SHAPES),
    "canonical": (manifolds.CanonicalStiefel, STIEFEL_SHAPES),
}
EVERY = {**KINDS, **STIEFEL}
POINTS = [(kind, shape) for kind, (_, shapes) in EVERY.items() for shape in shapes]


def build(kind: str) -> geoopt.Manifold:
    return EVERY[kind][0]()


@pytest.mark.parametrize(("kind", "shape"), CASES)
@FEW
@given(seed=SEEDS)
def test_every_check_passes(kind: str, shape: Shape, seed: int) -> None:
    generator = torch.manual_seed(seed)
    manifold = build(kind)
    results = check_base_manifold(manifold, draw(manifold, shape), generator=generator)
    raise_failures(results)
    found = {result.name for result in results}
    assert {"riesz", "projection_complete", "random_on_manifold"} <= found
    assert ("expmap_geodesic" in found) == (kind not in RANKS | NO_GEODESICS)
    assert ("distance" in found) == (kind not in RANKS | NO_DISTANCE)


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_every_check_passes_in_float32(kind: str, shape: Shape) -> None:
    torch.set_default_dtype(torch.float32)
    manifold = build(kind)
    for _ in range(3):
        point = draw(manifold, shape)
        assert point.dtype == torch.float32
        raise_failures(check_base_manifold(manifold, point))


@pytest.mark.parametrize(("kind", "shape"), CASES)
def test_they_may_carry_a_layer_metric(kind: str, shape: Shape) -> None:
    manifold = build(kind)
    assert manifolds.ensure_contract(manifold) is manifold
    require_own_formulas(manifold, "w")
    view = manifolds.MetricManifold(manifold)
    point = view.random(*shape)
    assert point.manifold is view
    assert view.check_point_on_manifold(point, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), CASES)
@FEW
@given(seed=SEEDS)
def test_riesz_and_its_roots_in_a_tangent_basis(
    kind: str, shape: Shape, dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    manifold = build(kind)
    x = draw(manifold, shape).to(dtype)
    x = manifold.projx(x)
    eye = torch.eye(x.numel(), dtype=dtype).view(-1, *shape)

    def matrix(f: Callable[..., Tensor]) -> Tensor:
        return f(manifold, x, eye).reshape(x.numel(), -1).mT

    R, P = matrix(riesz), matrix(lambda m, x, u: m.proju(x, u))
    C, D = matrix(root), matrix(root_adjoint)
    left, values, _ = torch.linalg.svd(P)
    dim = int((values > 0.5).sum())
    rank = int(torch.linalg.matrix_rank(R, rtol=30 * torch.finfo(dtype).eps))
    assert dim == rank == dimension(manifold, x) == TangentSpace(manifold, x).dim
    B = left[:, :dim].mT
    basis = B.view(dim, *shape)
    G = torch.stack(
        [
            torch.stack([manifold.inner(x, u, v, keepdim=True).sum() for v in basis])
            for u in basis
        ]
    )
    tolerance = 1e3 * torch.finfo(dtype).eps * float(torch.linalg.cond(G))
    assert gap(R, B.mT @ torch.linalg.solve(G, B)) <= tolerance
    assert gap(C @ D, R) <= tolerance
    assert gap(D, C.mT) <= tolerance
    F = flat(manifold, x, basis).reshape(dim, -1)
    assert gap(B @ F.mT, G) <= tolerance
    assert gap((R @ F.mT).mT, B) <= tolerance


@pytest.mark.parametrize(
    ("kind", "shape", "expected"),
    [
        ("grassmann", (5, 2), 6),
        ("grassmann", (2, 5), 6),
        ("grassmann", (3, 5, 2), 18),
        ("rotations", (4, 4), 6),
        ("rotations", (2, 3, 3), 6),
        ("columns", (4, 3), 9),
        ("rows", (4, 3), 8),
        ("rows", (2, 4, 3), 16),
        ("positive", (2, 3), 6),
        ("rank_2", (4, 3), 10),
        ("rank_2", (2, 4, 3), 20),
        ("rank_3", (3, 3), 9),
        ("lorentz", (4,), 3),
        ("lorentz", (3, 4), 9),
        ("birkhoff", (4, 4), 9),
        ("birkhoff", (2, 3, 3), 8),
        ("log_euclidean", (3, 3), 6),
        ("log_euclidean", (2, 3, 3), 12),
        ("scaled_stiefel", (3, 5), 9),
        ("scaled_birkhoff", (3, 3), 4),
    ],
)
def test_dimensions(kind: str, shape: Shape, expected: int) -> None:
    manifold = build(kind)
    assert dimension(manifold, draw(manifold, shape)) == expected


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize(("kind", "shape"), CASES)
@FEW
@given(seed=SEEDS, offset=st.integers(-2, 2), log_mass=st.floats(-3, 3))
def test_layer_metrics_are_the_dense_ones(
    kind: str, shape: Shape, dtype: torch.dtype, seed: int, offset: int, log_mass: float
) -> None:
    generator = torch.manual_seed(seed)
    manifold = build(kind)
    x = manifold.projx(draw(manifold, shape).to(dtype))
    rank = max(1, dimension(manifold, x) + offset)
    space = TangentSpace(manifold, x, Mass(scalar=math.exp(log_mass)), "w")
    factor = DenseFactor(torch.randn(rank, *shape, dtype=dtype) / rank)
    metric = LayerMetric([Part("w", space, factor)])
    raise_failures(check_metric(metric, generator=generator))
    if dtype == torch.float64:
        e = torch.randn(shape)
        K = factor.rows(0, rank).view(rank, -1)
        expected = dense_sharp({"w": space}, {"w": K}, {"w": e})["w"]
        torch.testing.assert_close(metric.sharp(e), expected, rtol=1e-8, atol=1e-10)


# ---- the layer metric ------------------------------------------------------------


class Energy(nn.Module):
    """Forgets the basis in which its input is written."""

    def forward(self, z: Tensor) -> Tensor:
        return z.square().sum(-1, keepdim=True)


def net(kind: str, shape: Shape) -> nn.Module:
    first = rm.nn.Linear(shape[1], shape[0], bias=False, manifold=build(kind))
    if kind == "grassmann":
        return rm.nn.Sequential(first, Energy())
    return rm.nn.Sequential(first, nn.Tanh(), nn.Linear(shape[0], 3))


# With momentum the lr has to be well below the mass on some of them.
@pytest.mark.parametrize(
    ("kind", "shape", "momentum", "lr"),
    [
        case
        for kind, shape, lr in [
            ("grassmann", (2, 6), 0.06),
            ("rotations", (4, 4), 0.06),
            ("columns", (4, 5), 0.06),
            ("rows", (4, 5), 0.06),
            ("positive", (4, 5), 0.06),
            ("rank_2", (4, 5), 0.06),
            ("lorentz", (4, 5), 0.02),
            ("birkhoff", (4, 4), 0.02),
            ("log_euclidean", (4, 4), 0.02),
            ("scaled_stiefel", (3, 5), 0.02),
            ("scaled_lorentz", (4, 5), 0.02),
        ]
        for case in [(kind, shape, 0.0, 0.3), (kind, shape, 0.8, lr)]
    ],
)
def test_layers_learn_and_stay_on_their_manifold(
    kind: str, shape: Shape, momentum: float, lr: float
) -> None:
    model, teacher = net(kind, shape), net(kind, shape)
    x = torch.randn(64, shape[1])
    target = teacher(x).detach()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.05)
    optimizer = rm.optim.RiemannianSGD(metric, lr=lr, momentum=momentum)
    losses = []
    for _ in range(40):
        with metric.record():
            outputs = model(x)
        loss = 0.5 * (outputs - target).square().sum(-1).mean()
        metric.backward(loss, outputs)
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    weight = model[0].weight.data
    assert build(kind).check_point_on_manifold(weight, atol=1e-10, rtol=1e-10)


# ---- points ----------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "shape"), POINTS)
def test_random_origin_and_checks(kind: str, shape: Shape) -> None:
    manifold = build(kind)
    double = [
        manifold.random(*shape),
        manifold.random(shape),
        manifold.origin(*shape),
    ]
    if kind != "scaled_spd":  # geoopt's takes no tuple
        double.append(manifold.origin(shape))
    for point in (*double, manifold.random(*shape, dtype=torch.float32)):
        assert isinstance(point, geoopt.ManifoldTensor)
        assert point.manifold is manifold
        assert point.shape == shape
        single = point.dtype == torch.float32
        close = {} if single else {"atol": 1e-12, "rtol": 1e-12}
        assert manifold.check_point_on_manifold(point, **close)
        x = point.data.as_subclass(Tensor)
        u = tangent(manifold, x)
        assert manifold.check_vector_on_tangent(point, u, **close)
        assert manifold.check_point_on_manifold(manifold.retr(x, 0.1 * u))
        if kind in STIEFEL:
            assert not manifold.check_point_on_manifold(1.1 * x)
            assert not manifold.check_vector_on_tangent(point, u + x)
    off = torch.randn(shape) - 2.0
    x = double[-1].data.as_subclass(Tensor)
    if dimension(manifold, x) < x.numel() or "positive" in kind:
        assert not manifold.check_point_on_manifold(off)
    if dimension(manifold, x) < x.numel():
        assert not manifold.check_vector_on_tangent(x, off)
    geoopt.ManifoldParameter(manifold.random(*shape), manifold=manifold)


@pytest.mark.parametrize(
    ("kind", "shape", "match"),
    [
        ("grassmann", (3, 3), "square"),
        ("grassmann", (3,), "matrices"),
        ("rotations", (3, 4), "square"),
        ("rotations", (1, 1), "at least 2"),
        ("columns", (1, 3), "columns"),
        ("rows", (3, 1), "rows"),
        ("rows", (3,), "rows"),
        ("rank_2", (1, 5), "at least 2 rows"),
        ("positive_points", (), "more than 1 dim"),
        ("lorentz", (1,), "should"),
        ("lorentz_k", (1,), "should"),
        ("birkhoff", (2, 3), "should"),
        ("log_euclidean", (2, 3), "should"),
        ("stiefel", (3,), "matrices"),
        ("canonical", (3,), "matrices"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(
    kind: str, shape: Shape, match: str
) -> None:
    manifold = build(kind)
    for tensor in (torch.zeros(shape), torch.ones(shape)):
        assert not manifold.check_point(tensor)
    for make in (manifold.random, manifold.origin):
        with pytest.raises(ValueError, match=match):
            make(*shape)


@pytest.mark.parametrize(("kind", "shape"), POINTS)
def test_they_are_copied_pickled_and_printed(kind: str, shape: Shape) -> None:
    manifold = build(kind)
    x, e = draw(manifold, shape), torch.randn(shape)
    u = tangent(manifold, x)
    parameter = geoopt.ManifoldParameter(x.clone(), manifold=manifold)
    for twin in (
        copy.deepcopy(manifold),
        pickle.loads(pickle.dumps(manifold)),
        copy.deepcopy(parameter).manifold,
    ):
        assert type(twin) is type(manifold)
        assert repr(twin) == repr(manifold)
        assert torch.equal(twin.retr(x, u), manifold.retr(x, u))
        assert torch.equal(twin.egrad2rgrad(x, e), manifold.egrad2rgrad(x, e))
    if kind not in REPAIRED:
        assert list(manifold.state_dict()) == []


# ---- batches and devices ---------------------------------------------------------


def calls(kind: str, x: Tensor, u: Tensor):
    """Yield (name, function of points and vectors, arguments)."""
    manifold = build(kind)
    y = manifold.retr(x, u)
    geodesics = kind not in RANKS | NO_GEODESICS
    names = ["proju", "egrad2rgrad", "retr", "inner"]
    names += ["expmap"] if geodesics else []
    names += ["logmap", "dist"] if geodesics and kind not in STIEFEL else []
    for name in names:
        second = y if name in {"logmap", "dist"} else u
        yield name, getattr(manifold, name), (x, second)
    yield "projx", manifold.projx, (x,)
    yield "projx of others", manifold.projx, (2.0 * x + u,)
    yield "transp", manifold.transp, (x, y, u)
    if geodesics:
        yield "follow", manifold.transp_follow_expmap, (x, u, u)


# Older versions of torch say so of matrix_exp, and are right all the same.
@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize(
    ("kind", "shape"), [case for case in POINTS if not case[0].startswith("scaled")]
)
def test_batches_vmap_and_meta(kind: str, shape: Shape) -> None:
    manifold = build(kind)
    x = draw(manifold, (4, *shape))
    u = 0.3 * tangent(manifold, x)
    close = {"rtol": 1e-10, "atol": 1e-12} if kind in REPAIRED else {}
    for name, call, arguments in calls(kind, x, u):
        batched = call(*arguments)
        single = torch.stack([call(*each) for each in zip(*arguments, strict=True)])
        torch.testing.assert_close(batched, single, msg=name)
        mapped = torch.func.vmap(call)(*arguments)
        torch.testing.assert_close(mapped, batched, msg=name, **close)
        on_meta = call(*(a.to("meta") for a in arguments))
        assert on_meta.shape == batched.shape, name
        assert on_meta.dtype == batched.dtype, name
    for name in ("proju", "egrad2rgrad", "retr"):
        call = getattr(manifold, name)
        many = call(x[0], torch.stack([u[0], 2.0 * u[0]]))
        torch.testing.assert_close(many[1], call(x[0], 2.0 * u[0]), msg=name)
    for function in (flat, root, root_adjoint):
        many = function(manifold, x[0], torch.stack([u[0], u[1]]))
        torch.testing.assert_close(many[1], function(manifold, x[0], u[1]))
        assert function(manifold, x[0].to("meta"), u.to("meta")).shape == u.shape


@pytest.mark.parametrize("kind", ["grassmann", "columns"])
def test_wide_is_the_transpose_of_tall(kind: str) -> None:
    wide = kind if kind == "grassmann" else "rows"
    x = draw(build(kind), (2, 5, 3))
    u = 0.3 * tangent(build(kind), x)
    pairs = zip(calls(kind, x, u), calls(wide, x.mT, u.mT), strict=True)
    for (name, call, arguments), (_, other, turned) in pairs:
        expected = call(*arguments)
        found = other(*turned)
        matrix = name not in {"inner", "dist"}
        torch.testing.assert_close(found.mT if matrix else found, expected, msg=name)
