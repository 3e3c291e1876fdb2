"""What every manifold of this library has, the new ones and the repaired ones."""

import math
from collections.abc import Callable

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from manifold_cases import Shape, draw, gap
from test_new_manifolds import KINDS as NEW
from test_repaired_manifolds import KINDS as REPAIRED
from test_repaired_manifolds import NO_DISTANCE, NO_GEODESICS
from torch import Tensor

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
FEW = settings(max_examples=max(4, settings.default.max_examples // 5))
PRECISIONS = [torch.float64, torch.float32]

KINDS = {**NEW, **REPAIRED}
CASES = [(kind, shape) for kind, (_, shapes) in KINDS.items() for shape in shapes]
RANKS = {kind for kind in NEW if kind.startswith("rank")}


def build(kind: str) -> geoopt.Manifold:
    return KINDS[kind][0]()


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
