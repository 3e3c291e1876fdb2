"""The laws of a layer metric, over metrics on both sides of rank = dimension."""

import math

import geoopt
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Mass, Part, TangentSpace
from riemannian_modules.errors import NotPositiveDefiniteError, ShapeError
from riemannian_modules.factors import BiasFactor, DenseFactor, LinearFactor
from riemannian_modules.testing import check_metric, raise_failures
from riemannian_modules.testing import strategies as rst
from riemannian_modules.testing.metric_probe import MetricProbe

SEEDS = st.integers(0, 2**31 - 1)
PRECISIONS = [torch.float64, torch.float32]
ROTATED = ["euclidean", "stiefel", "canonical_stiefel", "sphere", "poincare_ball"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def single(manifold: geoopt.Manifold, point: Tensor, factor, mass=1.0) -> LayerMetric:
    mass = mass if isinstance(mass, Mass) else Mass(scalar=mass)
    return LayerMetric([Part("w", TangentSpace(manifold, point, mass, "w"), factor)])


def euclidean(K: Tensor, mass=1.0) -> LayerMetric:
    return single(
        rm.manifolds.Euclidean(), torch.zeros(K.shape[1]), DenseFactor(K), mass
    )


# ---- every law on every kind of metric -------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("factor", ["dense", "linear"])
@pytest.mark.parametrize("kind", rst.MANIFOLDS)
@given(data=st.data(), seed=SEEDS)
def test_every_law(kind: str, factor: str, dtype: torch.dtype, data, seed: int) -> None:
    metric = data.draw(
        rst.layer_metrics(kinds=[kind], factor_kinds=[factor], dtype=dtype)
    )
    raise_failures(check_metric(metric, generator=seeded(seed)))


@pytest.mark.parametrize("kind", rst.MANIFOLDS)
@given(data=st.data(), seed=SEEDS)
def test_every_law_with_equal_sides(kind: str, data, seed: int) -> None:
    # Rank and dimension within one of each other, where the form changes.
    metric = data.draw(
        rst.layer_metrics(kinds=[kind], max_rank=1, bias=False, scalar=False)
    )
    dim = metric.dim
    rank = data.draw(st.integers(max(1, dim - 1), dim + 1))
    part = metric.parts[0]
    shape = part.space.point.shape
    factor = data.draw(rst.factors(shape, rank=rank))
    metric = LayerMetric([Part(part.name, part.space, factor)])
    assume(MetricProbe(metric, None).amp <= 1e8)
    assert metric.inverse.form == ("dual" if rank < dim else "primal")
    raise_failures(check_metric(metric, generator=seeded(seed)))


# ---- statements that need no dense twin ------------------------------------------


@given(metric=rst.layer_metrics(min_rank=1), seed=SEEDS)
def test_the_two_forms_agree_on_combinations_of_rows(metric, seed: int) -> None:
    probe = MetricProbe(metric, seeded(seed))
    y = probe.draw(metric.rank)
    pushed = metric.solve(residual=y).vectors
    general = metric.sharp(probe.pull(y))
    scale = probe.size(pushed) + probe.amp**-0.5 * float(y.norm())
    assert probe.gap(general, pushed, scale) <= probe.solved


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@given(data=st.data(), seed=SEEDS)
def test_rows_may_be_permuted(dtype: torch.dtype, data, seed: int) -> None:
    metric = data.draw(
        rst.layer_metrics(min_rank=1, factor_kinds=["linear"], dtype=dtype)
    )
    probe = MetricProbe(metric, seeded(seed))
    order = torch.randperm(metric.rank, generator=seeded(seed))
    permuted = LayerMetric(
        [
            Part(p.name, p.space, DenseFactor(p.factor.rows(0, metric.rank)[order]))
            for p in metric.parts
        ]
    )
    e = probe.covectors()
    assert probe.gap(permuted.sharp(e), metric.sharp(e)) <= 2 * probe.solved


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("kind", [*ROTATED, "spd"])
@given(data=st.data(), seed=SEEDS)
def test_rotated_inputs_rotate_the_gradient(
    kind: str, dtype: torch.dtype, data, seed: int
) -> None:
    metric = data.draw(
        rst.layer_metrics(
            kinds=[kind],
            factor_kinds=["linear"],
            mass_kinds=["scalar"],
            bias=False,
            scalar=False,
            min_rank=1,
            dtype=dtype,
        )
    )
    (part,) = metric.parts
    probe = MetricProbe(metric, seeded(seed))
    W, x, l = part.space.point, part.factor.inputs, part.factor.cotangents
    Q = torch.linalg.qr(probe.draw(W.shape[1], W.shape[1]))[0].to(W)
    left = Q if kind == "spd" else torch.eye(len(W)).to(W)

    def turn(u: Tensor) -> Tensor:
        return left @ u @ Q.mT

    space = TangentSpace(part.space.manifold, turn(W), part.space.mass, "weight")
    turned = LayerMetric([Part("weight", space, LinearFactor(x @ Q.mT, l @ left.mT))])
    e = probe.covectors()["weight"]
    expected = turn(metric.sharp(e))
    found = turned.sharp(turn(e))
    gap = float((found - expected).norm() / expected.norm())
    # Positive definite matrices amplify the rounding of their own rotation.
    assert gap <= 4 * probe.solved * (10 if kind == "spd" else 1)


@given(seed=SEEDS, rank=st.integers(1, 9), log_mass=st.floats(-4, 4))
def test_log_determinant_and_spectrum_of_an_explicit_matrix(seed, rank, log_mass):
    K = torch.randn(rank, 5, generator=seeded(seed))
    mass = 10.0**log_mass
    metric = euclidean(K, mass)
    G = mass * torch.eye(5) + K.mT @ K
    values = torch.linalg.eigvalsh(G).flip(0)
    torch.testing.assert_close(metric.logdet(), torch.logdet(G), rtol=1e-9, atol=1e-9)
    assert metric.spectrum().shape == (min(rank, 5),)
    torch.testing.assert_close(
        metric.spectrum(), values[: min(rank, 5)], rtol=1e-10, atol=1e-10 * values[0]
    )
    torch.testing.assert_close(metric.to_dense(), G)
    assert (metric.rank, metric.dim) == (rank, 5)
    M = K @ K.mT / mass
    rate = torch.linalg.eigvalsh(M @ torch.linalg.inv(torch.eye(rank) + M))[0]
    torch.testing.assert_close(
        metric.contraction_rate(), rate.clamp_min(0.0), rtol=1e-7, atol=1e-7
    )
    inner = torch.eye(rank) + M if rank < 5 else torch.eye(5) + K.mT @ K / mass
    expected = torch.linalg.cond(inner)
    torch.testing.assert_close(metric.condition(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("solver", ["auto", "cholesky", "primal"])
@given(seed=SEEDS, rank=st.integers(1, 9))
def test_the_condition_is_that_of_the_matrix_that_is_factorised(solver, seed, rank):
    K = torch.randn(rank, 5, generator=seeded(seed))
    metric = LayerMetric(euclidean(K, 1e-2).parts, solver=solver)
    dual = solver == "cholesky" or (solver == "auto" and rank < 5)
    S = torch.eye(rank) + K @ K.mT / 1e-2
    G = torch.eye(5) + K.mT @ K / 1e-2
    expected = torch.linalg.cond(S if dual else G)
    torch.testing.assert_close(metric.condition(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("solver", ["auto", "cholesky", "primal"])
def test_log_determinants_of_matrices_that_are_singular_by_rounding(solver, dtype):
    # Two equal rows: the smallest eigenvalue of the dual matrix is one.
    size = 1e6
    row = torch.tensor([3.0, 1.0, -2.0], dtype=torch.float64)
    K, mass = size * torch.stack([row, row]).to(dtype), 1e-10
    space = TangentSpace(
        geoopt.Euclidean(), torch.zeros(3, dtype=dtype), Mass(scalar=mass)
    )
    metric = LayerMetric(
        [Part("w", space, DenseFactor(K))], solver=solver, precision=dtype
    )
    expected = math.log(2.0 * 14.0 * size**2) + 2.0 * math.log(mass)
    assert abs(float(metric.logdet()) - expected) < 1e-4 * abs(expected)


def test_a_log_determinant_out_of_reach_is_an_error(monkeypatch):
    monkeypatch.setattr("riemannian_modules.inverse._FALLBACK_ENTRIES", 1)
    metric = euclidean(1e9 * torch.ones(2, 3), 1e-10)
    with pytest.raises(NotPositiveDefiniteError, match="the mass is too small"):
        metric.logdet()


@given(seed=SEEDS, rank=st.integers(1, 8))
def test_without_mass_it_is_the_least_norm_gauss_newton_step(seed, rank):
    K = torch.randn(rank, 9, generator=seeded(seed))
    assume(torch.linalg.cond(K) < 1e3)
    y = torch.randn(rank, generator=seeded(seed))
    x = euclidean(K, 1e-12).solve(residual=y).vectors["w"]
    torch.testing.assert_close(x, torch.linalg.pinv(K) @ y, rtol=1e-5, atol=1e-5)


@given(data=st.data(), seed=SEEDS)
def test_a_rank_one_mass_is_the_diagonal_of_its_products(data, seed: int) -> None:
    shape = (3, 4)
    mass = data.draw(rst.masses(shape, kinds=["rank_one"]))
    factor = data.draw(rst.factors(shape, rank=data.draw(st.integers(1, 14))))
    point, flat = torch.zeros(shape), rm.manifolds.Euclidean()
    diagonal = Mass(diagonal=torch.outer(mass.row, mass.column))
    one, other = (single(flat, point, factor, m) for m in (mass, diagonal))
    probe = MetricProbe(one, seeded(seed))
    e = probe.covectors()
    assert probe.gap(one.sharp(e), other.sharp(e)) <= probe.solved
    torch.testing.assert_close(one.logdet(), other.logdet())
    torch.testing.assert_close(one.to_dense(), other.to_dense())
    constant = Mass(scalar=0.3), Mass(diagonal=torch.full(shape, 0.3))
    one, other = (single(flat, point, factor, m) for m in constant)
    torch.testing.assert_close(one.to_dense(), other.to_dense())


@given(data=st.data(), seed=SEEDS)
def test_a_diagonal_mass_is_a_change_of_coordinates(data, seed: int) -> None:
    K = torch.randn(data.draw(st.integers(1, 8)), 5, generator=seeded(seed))
    mass = data.draw(rst.masses((5,), kinds=["diagonal"]))
    e, root = torch.randn(5, generator=seeded(seed + 1)), mass.diagonal.sqrt()
    expected = euclidean(K / root).sharp(e / root) / root
    torch.testing.assert_close(euclidean(K, mass).sharp(e), expected, rtol=1e-8, atol=0)


# ---- positive definite always, or an error ---------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@given(data=st.data())
def test_the_small_matrix_is_always_factorised(dtype: torch.dtype, data) -> None:
    most = 1e12 if dtype == torch.float64 else 1e8
    metric = data.draw(
        rst.layer_metrics(
            min_rank=1,
            min_mass=1e-6,
            max_mass=1e6,
            max_amplification=most,
            dtype=dtype,
        )
    )
    e = MetricProbe(metric, seeded(0)).covectors()
    solution = metric.solve(covector=e)
    assert bool(metric.inverse.succeeded)
    assert solution.branch in {"woodbury", "primal"}
    assert float(solution.squared_norm) >= 0.0
    assert all(bool(x.isfinite().all()) for x in solution.vectors.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("rank", [2, 20])
@given(data=st.data(), kind=st.sampled_from(list(rst.MANIFOLDS)))
def test_a_factor_that_is_not_finite_is_refused(bad, rank, data, kind) -> None:
    metric = data.draw(
        rst.layer_metrics(
            kinds=[kind], factor_kinds=["linear"], min_rank=rank, max_rank=rank
        )
    )
    assume(metric.inverse.form == ("dual" if rank == 2 else "primal"))
    part = metric.parts[0]
    inputs = part.factor.inputs.clone()
    inputs.view(-1)[data.draw(st.integers(0, inputs.numel() - 1))] = bad
    factor = LinearFactor(inputs, part.factor.cotangents)
    broken = LayerMetric([Part(part.name, part.space, factor)], name="first")
    with pytest.raises(NotPositiveDefiniteError, match=r"'first'.*not finite"):
        broken.sharp(torch.ones_like(part.space.point))
    with pytest.raises(NotPositiveDefiniteError, match=r"'first'.*not finite"):
        broken.solve(residual=torch.ones(rank))


# ---- objects ---------------------------------------------------------------------


@pytest.mark.parametrize("kind", rst.MANIFOLDS)
@given(data=st.data(), seed=SEEDS)
def test_the_metric_at_another_point_keeps_its_rows(kind: str, data, seed) -> None:
    metric = data.draw(
        rst.layer_metrics(kinds=[kind], min_rank=1, max_amplification=1e4)
    )
    points = {p.name: p.space.point for p in metric.parts}
    assert metric.at(points) is metric
    assert metric.at({n: x.clone() for n, x in points.items()}) is metric
    manifold = metric.parts[0].space.manifold
    shape = points["weight"].shape
    moved = {**points, "weight": data.draw(rst.points(manifold, shape))}
    other = metric.at(moved)
    assert other.version == metric.version
    assert torch.equal(other.parts[0].space.point, moved["weight"])
    assert torch.equal(
        other.parts[0].factor.to_dense(), metric.parts[0].factor.to_dense()
    )
    probe = MetricProbe(other, seeded(seed))
    if probe.amp <= 1e6:
        raise_failures(check_metric(other, generator=seeded(seed)))
    assert metric.at(points) is metric


def test_one_parameter_needs_no_mapping() -> None:
    metric = euclidean(torch.randn(2, 4), 0.1)
    u, v = torch.randn(4), torch.randn(4)
    assert torch.equal(metric.inner(u, v), metric.inner({"w": u}, {"w": v}))
    assert torch.equal(metric.sharp(u), metric.sharp({"w": u})["w"])
    assert torch.equal(metric.flat(u), metric.flat({"w": u})["w"])
    assert torch.equal(metric.image(u), metric.parts[0].factor.matvec(u))


def test_several_parameters_need_one() -> None:
    x, l = torch.randn(2, 1, 3), torch.randn(2, 2, 1, 4)
    flat = rm.manifolds.Euclidean()
    parts = [
        Part("weight", TangentSpace(flat, torch.zeros(4, 3)), LinearFactor(x, l)),
        Part("bias", TangentSpace(flat, torch.zeros(4)), BiasFactor(l)),
    ]
    metric = LayerMetric(parts, name="first")
    with pytest.raises(ShapeError, match=r"'first'.*'weight', 'bias'"):
        metric.sharp(torch.ones(4, 3))


def test_a_part_without_a_factor_keeps_its_base_gradient() -> None:
    flat = rm.manifolds.Euclidean()
    K = torch.randn(2, 3)
    parts = [
        Part("a", TangentSpace(flat, torch.zeros(3), Mass(scalar=0.5)), DenseFactor(K)),
        Part("b", TangentSpace(flat, torch.zeros(2), Mass(scalar=4.0))),
    ]
    e = {"a": torch.randn(3), "b": torch.randn(2)}
    x = LayerMetric(parts).sharp(e)
    assert torch.equal(x["b"], e["b"] / 4.0)
    G = 0.5 * torch.eye(3) + K.mT @ K
    torch.testing.assert_close(x["a"], torch.linalg.solve(G, e["a"]))


@pytest.mark.parametrize(
    ("parts", "match"),
    [
        ([], "at least one parameter"),
        ([DenseFactor(torch.ones(2, 4)), DenseFactor(torch.ones(3, 4))], r"\[2, 3\]"),
        ([DenseFactor(torch.ones(2, 5))], r"\(5,\), the parameter \(4,\)"),
    ],
    ids=["none", "ranks", "shape"],
)
def test_parts_that_do_not_fit_are_refused(parts, match: str) -> None:
    space = TangentSpace(rm.manifolds.Euclidean(), torch.zeros(4))
    with pytest.raises(ShapeError, match=match):
        LayerMetric([Part(f"w{i}", space, f) for i, f in enumerate(parts)])


def test_factors_of_shared_parameters_add_up() -> None:
    x, l = torch.randn(3, 2, 4), torch.randn(2, 3, 2, 5)
    y, m = torch.randn(3, 1, 4), torch.randn(2, 3, 1, 5)
    one, other = LinearFactor(x, l), LinearFactor(y, m)
    dense = DenseFactor(other.rows(0, 6))
    expected = one.to_dense() + other.to_dense()
    for total in (one + other, one + dense, dense + one):
        torch.testing.assert_close(total.to_dense(), expected)
    bias = BiasFactor(l) + BiasFactor(m)
    torch.testing.assert_close(
        bias.to_dense(), BiasFactor(l).to_dense() + BiasFactor(m).to_dense()
    )
    mixed = BiasFactor(l) + DenseFactor(BiasFactor(m).rows(0, 6))
    torch.testing.assert_close(mixed.to_dense(), bias.to_dense())
