"""Solvers of blocks: conjugate gradients, what they cost, and which one runs."""

from collections.abc import Mapping

import mpmath
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutants.solvers import MUTANTS
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Part, TangentSpace
from riemannian_modules.block import Block
from riemannian_modules.conjugate import (
    ConjugateGradients,
    Target,
    conjugate_gradients,
)
from riemannian_modules.cost_model import costs, predicted_iterations
from riemannian_modules.errors import CostWarning, NotConvergedWarning
from riemannian_modules.factors import DenseFactor, LinearFactor
from riemannian_modules.preconditioner import PivotedPreconditioner
from riemannian_modules.testing import strategies as rst
from riemannian_modules.testing.metric_probe import MetricProbe

SEEDS = st.integers(0, 2**31 - 1)
TIGHT = ConjugateGradients(tolerance=1e-11, iterations=2000)
SOLVERS = ("cholesky", "primal", TIGHT)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def with_solver(metric: LayerMetric, solver, **options) -> LayerMetric:
    return LayerMetric(metric.parts, name=metric.name, solver=solver, **options)


def gap(
    metric: LayerMetric, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> float:
    """Distance relative to the size of what is expected, both in the metric."""
    error = {name: found[name] - expected[name] for name in expected}
    return float(metric.norm(error) / metric.norm(expected).clamp_min(1e-30))


def dense_gram(block: Block) -> Tensor:
    """``K sharp K^T`` from rows and images that are all written out."""
    total = torch.zeros(block.rank, block.rank, dtype=torch.float64)
    for part in block.parts:
        if part.factor is not None:
            rows = part.factor.rows(0, block.rank)
            images = torch.stack([part.space.sharp(row) for row in rows])
            total += rows.reshape(len(rows), -1) @ images.reshape(len(rows), -1).mT
    return total


def block_of(metric: LayerMetric) -> Block:
    return metric.inverse.block


# ---- products without the matrix --------------------------------------------------


@pytest.mark.parametrize("factor", ["dense", "linear"])
@pytest.mark.parametrize("kind", rst.MANIFOLDS)
@given(data=st.data(), seed=SEEDS)
@settings(max_examples=10)
def test_products_columns_and_diagonal(kind, factor, data, seed: int) -> None:
    metric = data.draw(
        rst.layer_metrics(kinds=[kind], factor_kinds=[factor], min_rank=1)
    )
    block, M = block_of(metric), dense_gram(block_of(metric))
    scale = float(M.diagonal().sum()) + 1e-30
    a = torch.randn(block.rank, generator=seeded(seed))
    index = torch.randperm(block.rank, generator=seeded(seed))[:3]
    near = {"rtol": 0.0, "atol": 1e-10 * scale}
    torch.testing.assert_close(
        block.gram_product(a), M @ a, rtol=0.0, atol=1e-10 * scale * float(a.norm())
    )
    torch.testing.assert_close(block.gram_columns(index), M[:, index], **near)
    torch.testing.assert_close(block.gram_diagonal(), M.diagonal(), **near)


@pytest.mark.parametrize("examples", [3, 12])
def test_products_of_a_bias_that_travels_with_its_weight(examples: int) -> None:
    # Below and above twice the width of the inputs, where the way to multiply changes.
    model, generator = nn.Linear(4, 3).double(), seeded(0)
    metric = pulled_back(model, torch.randn(examples, 4, generator=generator))
    block = block_of(metric.blocks["model"])
    M, a = dense_gram(block), torch.randn(block.rank, generator=generator)
    torch.testing.assert_close(block.gram_product(a), M @ a)
    torch.testing.assert_close(block.gram_columns(torch.arange(2)), M[:, :2])
    torch.testing.assert_close(block.gram_diagonal(), M.diagonal())


# ---- conjugate gradients against other ways ---------------------------------------


@pytest.mark.parametrize("factor", ["dense", "linear"])
@pytest.mark.parametrize("kind", rst.MANIFOLDS)
@given(data=st.data(), seed=SEEDS)
@settings(max_examples=10)
def test_the_step_is_within_the_tolerance(kind, factor, data, seed: int) -> None:
    metric = data.draw(
        rst.layer_metrics(kinds=[kind], factor_kinds=[factor], min_rank=1)
    )
    probe = MetricProbe(metric, seeded(seed))
    y, e = probe.draw(metric.rank), probe.covectors()
    how = ConjugateGradients(tolerance=1e-6, pivots=3)
    for residual, covector in ((y, None), (None, e), (y, e)):
        exact = metric.solve(residual=residual, covector=covector, refinements=1)
        found = with_solver(metric, how).solve(
            residual=residual, covector=covector, refinements=0
        )
        assert found.branch == "cg"
        assert found.converged
        # The rounding of K^T d is not in the bound; nor is that of the other way.
        rounding = probe.solved * (1.0 + probe.amp**0.5)
        assert gap(metric, found.vectors, exact.vectors) <= 1e-6 + rounding
        measured = metric.image(found.vectors)
        scale = measured.norm() + float(metric.norm(found.vectors))
        assert float((measured - found.velocity).norm()) <= 1e-7 * float(scale) * (
            1.0 + probe.amp**0.5
        )


def pulled_back(model: nn.Module, x: Tensor, **options) -> rm.LayerwiseMetric:
    options = {"mass": 1e-2, "blocks": "model", **options}
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), **options)
    with metric.record():
        outputs = model(x)
    metric.backward(0.5 * outputs.square().sum(1).mean(), outputs)
    return metric


def network() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(2)
        return nn.Sequential(
            rm.nn.Linear(4, 6, manifold=rm.manifolds.Stiefel()),
            nn.Tanh(),
            nn.Unflatten(1, (1, 6)),
            nn.Conv1d(1, 2, 3),
            nn.Flatten(),
            nn.LayerNorm(8),
            rm.nn.Linear(8, 3, manifold=rm.manifolds.Oblique()),
        )


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("mass", [1.0, 1e-3])
def test_solvers_agree_on_a_model(blocks, mass: float) -> None:
    model, x = network(), torch.randn(9, 4, generator=seeded(3))
    found = [
        pulled_back(model, x, blocks=blocks, solver=solver, mass=mass)
        for solver in SOLVERS
    ]
    steps = [metric.natural_gradient() for metric in found]
    for other in steps[1:]:
        for name, block in found[0].blocks.items():
            own = {part.name for part in block.parts}
            expected = {n: x for n, x in steps[0].items() if n in own}
            assert gap(block, other, expected) <= 1e-10, name


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant) -> None:
    """Each breaks the agreement of conjugate gradients with the dense solve."""
    generator = seeded(4)
    K = torch.randn(6, 20, generator=generator)
    y, b = torch.randn(6, generator=generator), torch.randn(6, generator=generator)
    M = 30.0 * K @ K.mT
    d = torch.linalg.solve(torch.eye(6) + M, y - b)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(mutant(M, y, b), d, rtol=1e-6, atol=1e-9)


# ---- the rule to stop ---------------------------------------------------------------


@given(seed=SEEDS, rank=st.integers(1, 12), log_mass=st.floats(-5, 3))
@example(seed=1007, rank=6, log_mass=0.0)
@settings(max_examples=25)
def test_the_reported_error_is_a_bound(seed: int, rank: int, log_mass: float) -> None:
    generator = seeded(seed)
    K = torch.randn(rank, 9, generator=generator) / 10.0 ** (log_mass / 2)
    y, e = torch.randn(rank, generator=generator), torch.randn(9, generator=generator)
    M, target = K @ K.mT, Target(y, K @ e, e @ e)
    G = torch.eye(9) + K.mT @ K
    exact = torch.linalg.solve(G, K.mT @ y + e)
    for limit in (1, 2, 4):
        found = conjugate_gradients(lambda v: M @ v, target, 1e-9, limit, lambda r: r)
        x = e + K.mT @ found.d
        error = (x - exact) @ G @ (x - exact) / (x @ G @ x)
        assert float(error) ** 0.5 <= float(found.error) * (1.0 + 1e-6) + 1e-7
        assert found.converged == (float(found.error) <= 1e-9)


def exact_step(K: Tensor, mass: float, y: Tensor, e: Tensor | None) -> mpmath.matrix:
    """The solution of ``(mass + K^T K) x = K^T y + e`` with 60 digits."""
    with mpmath.workdps(60):
        rows = mpmath.matrix(K.tolist())
        covector = rows.T * mpmath.matrix(y.tolist())
        if e is not None:
            covector += mpmath.matrix(e.tolist())
        G = rows.T * rows + mpmath.mpf(mass) * mpmath.eye(K.shape[1])
        return mpmath.lu_solve(G, covector)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(
    seed=SEEDS,
    shape=st.tuples(st.integers(1, 8), st.integers(1, 4)),
    spread=st.floats(0.0, 4.0),
    log_mass=st.floats(-8.0, 0.0),
    fits=st.booleans(),
    rest=st.booleans(),
)
@example(seed=0, shape=(4, 1), spread=4.0, log_mass=-6.0, fits=False, rest=False)
@example(seed=0, shape=(8, 3), spread=1.0, log_mass=-8.0, fits=False, rest=False)
@example(seed=0, shape=(2, 2), spread=3.0, log_mass=0.0, fits=False, rest=False)
@example(seed=1, shape=(4, 1), spread=0.0, log_mass=0.0, fits=False, rest=False)
@settings(max_examples=25, deadline=None)
def test_rounding_is_in_the_reported_error(
    dtype, seed: int, shape, spread: float, log_mass: float, fits: bool, rest: bool
) -> None:
    (rank, dim), generator, mass = shape, seeded(seed), 10.0**log_mass
    K = torch.randn(rank, dim, generator=generator)
    K = (torch.logspace(spread, 0.0, rank).unsqueeze(1) * K).to(dtype)
    y = torch.randn(rank, generator=generator).to(dtype)
    y = K @ torch.randn(dim, generator=generator).to(dtype) if fits else y
    e = torch.randn(dim, generator=generator).to(dtype) if rest else None
    space = TangentSpace(
        rm.manifolds.Euclidean(), torch.zeros(dim, dtype=dtype), rm.Mass(scalar=mass)
    )
    metric = LayerMetric([Part("w", space, DenseFactor(K))], solver="cg")
    solver = metric.inverse.strategy.iterative
    found = solver.solve(y, None if e is None else {"w": e}, None, 500, None)
    x = exact_step(K, mass, y, e)
    with mpmath.workdps(60):
        rows = mpmath.matrix(K.tolist())

        def size(u: mpmath.matrix, rows: mpmath.matrix = rows) -> mpmath.mpf:
            image = rows * u
            return mpmath.sqrt(mpmath.mpf(mass) * (u.T * u)[0] + (image.T * image)[0])

        error = size(mpmath.matrix(found.vectors["w"].tolist()) - x) / size(x)
        # Of the step that is stored, rounded to the data type, whatever the signs.
        stored = size(x.apply(abs), rows.apply(abs)) / size(x)
    stored = float(stored) * torch.finfo(dtype).eps
    reported = float(found.error)
    # Relative to what was found, so that one of 1, or NaN, says nothing.
    if reported < 1.0:
        assert error <= reported * (1.0 + 1e-6) / (1.0 - reported) + stored
    assert found.converged == (reported <= solver.tolerance)


def test_more_rows_than_parameters_are_solved_to_the_tolerance() -> None:
    generator = seeded(0)
    for dtype, mass in ((torch.float64, 1e-2), (torch.float32, 1e-2)):
        K = 10.0 * torch.randn(300, 6, generator=generator).to(dtype)
        residual = torch.randn(300, generator=generator).to(dtype)
        # Most of it is out of reach of the parameters.
        inside = K @ torch.linalg.lstsq(K, residual.unsqueeze(1)).solution.squeeze(1)
        y = residual - 0.9 * inside
        space = TangentSpace(
            rm.manifolds.Euclidean(), torch.zeros(6, dtype=dtype), rm.Mass(scalar=mass)
        )
        metric = LayerMetric([Part("w", space, DenseFactor(K))], solver="cg")
        found = metric.solve(residual=y)
        assert found.branch == "cg"
        wide = with_solver(metric.double(), "primal")
        expected = wide.solve(residual=y.double()).vectors
        vectors = {name: x.double() for name, x in found.vectors.items()}
        assert (
            gap(wide, vectors, expected) <= metric.inverse.strategy.iterative.tolerance
        )


@given(seed=SEEDS, rank=st.integers(2, 20), pivots=st.integers(0, 20))
@settings(max_examples=25)
def test_the_preconditioner_is_positive_definite(seed, rank: int, pivots: int) -> None:
    K = torch.randn(rank, max(1, rank - 3), generator=seeded(seed))
    M = 100.0 * K @ K.mT
    found = PivotedPreconditioner(M.diagonal(), lambda index: M[:, index], pivots)
    P = torch.stack([found(row) for row in torch.eye(rank)])
    torch.testing.assert_close(P, P.mT, rtol=0.0, atol=1e-9)
    assert float(torch.linalg.eigvalsh(0.5 * (P + P.mT))[0]) > 0.0
    assert len(found.pivots.unique()) == min(pivots, rank)
    # It never takes more out of M than there is: its inverse lies below 1 + M.
    excess = torch.linalg.eigvalsh(torch.eye(rank) + M - torch.linalg.inv(P))
    assert float(excess[0]) >= -1e-6 * float(M.diagonal().sum())
    assert float(found.remaining) <= float(M.diagonal().sum()) + 1e-9
    if pivots >= rank:
        torch.testing.assert_close(
            P, torch.linalg.inv(torch.eye(rank) + M), rtol=1e-4, atol=1e-6
        )


def test_pivots_save_iterations() -> None:
    generator = seeded(5)
    K = torch.randn(200, 300, generator=generator) * 0.9 ** torch.arange(300.0)
    metric = LayerMetric(
        [
            Part(
                "w",
                TangentSpace(rm.manifolds.Euclidean(), torch.zeros(300)),
                DenseFactor(30.0 * K),
            )
        ]
    )
    y = torch.randn(200, generator=generator)
    used = [
        with_solver(metric, ConjugateGradients(pivots=pivots))
        .solve(residual=y)
        .iterations
        for pivots in (0, 20, 60)
    ]
    assert used[0] > 2 * used[1] > 4 * used[2] > 0, used


# ---- warm start ---------------------------------------------------------------------


@given(seed=SEEDS, scale=st.floats(-3.0, 3.0))
@settings(max_examples=15)
def test_a_warm_start_changes_nothing_but_the_iterations(seed, scale: float) -> None:
    generator = seeded(seed)
    K, y = torch.randn(7, 30, generator=generator), torch.randn(7, generator=generator)
    space = TangentSpace(rm.manifolds.Euclidean(), torch.zeros(30))
    metric = LayerMetric([Part("w", space, DenseFactor(K))])
    exact = metric.solve(residual=y).vectors
    how = ConjugateGradients(tolerance=1e-9, pivots=0, warm_start=True)
    cold = with_solver(metric, how)
    first = cold.solve(residual=y)
    guess = torch.randn(7, generator=generator)
    for start in (cold.inverse.last, scale * guess, torch.zeros(7), torch.ones(5)):
        warm = with_solver(metric, how, start=start).solve(residual=y)
        assert gap(metric, warm.vectors, exact) <= 2e-9
    again = with_solver(metric, how, start=cold.inverse.last).solve(residual=y)
    assert again.iterations == 1 <= first.iterations
    ignored = with_solver(metric, ConjugateGradients(1e-9, pivots=0), start=guess)
    assert ignored.solve(residual=y).iterations == first.iterations


def test_a_model_starts_warm_from_the_pass_before() -> None:
    model, x = network(), torch.randn(9, 4, generator=seeded(3))
    how = ConjugateGradients(pivots=0, warm_start=True)
    metric = pulled_back(model, x, solver=how)
    first = metric.solve()["model"].iterations
    with metric.record():
        outputs = model(x)
    metric.backward(0.5 * outputs.square().sum(1).mean(), outputs)
    assert metric.solve()["model"].iterations == 1 < first


# ---- who runs ---------------------------------------------------------------------


def linear_block(examples: int, rows: int, width: int) -> Part:
    x = torch.ones(examples, 1, width)
    l = torch.ones(rows, examples, 1, width)
    space = TangentSpace(rm.manifolds.Euclidean(), torch.zeros(width, width))
    return Part("w", space, LinearFactor(x, l))


@given(rank=st.integers(1, 100), width=st.integers(1, 200))
def test_small_ranks_are_solved_directly(rank: int, width: int) -> None:
    metric = LayerMetric([linear_block(rank, 1, width)])
    assert metric.inverse.strategy.limit == 0
    known = costs(block_of(metric), torch.float64)
    assert known.iterative(8) > 0.5 * known.direct(metric.inverse.form)


@pytest.mark.parametrize("width", [256, 512])
def test_costs_grow_as_they_should(width: int) -> None:
    small, large = (
        costs(block_of(LayerMetric([linear_block(n, 9, width)])), torch.float64)
        for n in (128, 512)
    )
    assert large.cholesky > 15 * small.cholesky
    assert large.iterative(10) < 15 * small.iterative(10)
    assert large.affordable("dual") > small.affordable("dual") > 5
    assert large.pivots <= 128


def test_predicted_iterations() -> None:
    assert predicted_iterations(0.0, 16, 1e-5) < predicted_iterations(1e4, 16, 1e-5)
    assert predicted_iterations(1e4, 64, 1e-5) < predicted_iterations(1e4, 16, 1e-5)
    assert predicted_iterations(float("inf"), 16, 1e-5) > 10**6


def test_auto_takes_what_costs_less_and_says_so() -> None:
    generator = seeded(6)
    x = torch.randn(128, 1, 64, generator=generator)
    l = torch.randn(9, 128, 1, 64, generator=generator) / 128**0.5
    y = torch.randn(1152, generator=generator)
    branches = []
    for mass in (1e3, 1e-6):
        space = TangentSpace(
            rm.manifolds.Euclidean(), torch.zeros(64, 64), rm.Mass(scalar=mass)
        )
        part = Part("w", space, LinearFactor(x, l))
        solution = LayerMetric([part]).solve(residual=y)
        exact = LayerMetric([part], solver="cholesky")
        assert gap(exact, solution.vectors, exact.solve(residual=y).vectors) < 1e-6
        branches.append((solution.branch, solution.iterations > 0, solution.converged))
    assert branches == [("cg", True, True), ("push-through", False, True)]


def test_a_model_does_not_repeat_what_did_not_pay() -> None:
    generator = seeded(9)
    x = torch.randn(512, 40, generator=generator)
    model = nn.Linear(40, 40).double()
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=1e-7)
    solvers = []
    for examples in (20, 20, 20, 10):
        with metric.record():
            outputs = model(x[:examples])
        metric.backward(outputs.square().mean(), outputs)
        (solution,) = metric.solve().values()
        assert solution.branch == "push-through"
        solvers.append(metric.blocks["model"].solver)
    assert solvers == ["auto", "cholesky", "cholesky", "auto"]


def dear(scale: float, **options) -> LayerMetric:
    """Twenty examples with a thousand outputs each: few numbers, many rows."""
    generator = seeded(0)
    x = scale * torch.randn(20, 1, 1500, generator=generator)
    l = torch.randn(1000, 20, 1, 16, generator=generator)
    space = TangentSpace(rm.manifolds.Euclidean(), torch.zeros(16, 1500))
    part = Part("w", space, LinearFactor(x, l))
    return LayerMetric([part], name="wide", **options)


def test_a_warning_comes_before_a_solve_that_takes_very_long() -> None:
    metric = dear(10.0)
    with pytest.warns(
        CostWarning, match=r"'wide' has the rank 20000 .*Sampled.*solver="
    ):
        metric.inverse.strategy.warn()
    # Once for all metrics that know of each other, whatever their mass or point.
    for other in (metric, metric.double(), dear(10.0, once=metric.once)):
        other.inverse.strategy.warn()
    # Nor where a few iterations are enough, or somebody has decided how to solve.
    for other in (dear(1e-4), dear(10.0, solver="cholesky"), dear(10.0, solver="cg")):
        other.inverse.strategy.warn()


@pytest.mark.parametrize("blocks", ["tensor", "layer"])
def test_a_model_warns_once_of_what_it_costs(monkeypatch, blocks) -> None:
    for name, value in {"_MANY_ROWS": 8, "_DEAR": 0.0, "_LONG": 0.0}.items():
        monkeypatch.setattr(f"riemannian_modules.strategy.{name}", value)
    torch.manual_seed(0)
    metric = rm.LayerwiseMetric(
        network(), rm.output.Euclidean(), mass=0.1, blocks=blocks
    )
    optimizer = rm.optim.RiemannianSGD(metric)

    def train() -> None:
        for _ in range(3):
            with metric.record():
                z = metric.model(torch.randn(12, 4))
            metric.backward(z.square().mean(), z)
            optimizer.step()
            metric.scale_mass(2.0)
            metric.natural_gradient()

    with pytest.warns(CostWarning) as found:
        train()
    assert len(found) == 1


def hard() -> tuple[LayerMetric, Tensor]:
    generator = seeded(7)
    K = torch.randn(60, 90, generator=generator)
    space = TangentSpace(
        rm.manifolds.Euclidean(), torch.zeros(90), rm.Mass(scalar=1e-4)
    )
    metric = LayerMetric([Part("w", space, DenseFactor(K))], name="first")
    return metric, torch.randn(60, generator=generator)


def test_where_iterations_are_in_vain_a_direct_solve_follows() -> None:
    metric, y = hard()
    inverse = with_solver(metric, ConjugateGradients(iterations=3, pivots=0))
    found, again = inverse.solve(residual=y), inverse.solve(residual=y)
    assert (found.branch, found.iterations) == ("cg, then push-through", 3)
    assert (again.branch, again.iterations) == ("push-through", 0)
    assert gap(metric, found.vectors, metric.solve(residual=y).vectors) < 1e-9


def test_where_that_is_out_of_reach_a_warning_names_the_block(monkeypatch) -> None:
    metric, y = hard()
    monkeypatch.setattr("riemannian_modules.strategy._REACH", 0.0)
    iterative = with_solver(metric, ConjugateGradients(iterations=3, pivots=0))
    with pytest.warns(NotConvergedWarning, match=r"'first' \(rank 60.* 3 iterations"):
        found = iterative.solve(residual=y)
    assert found.branch == "cg"
    assert found.converged is False
    assert found.error is not None
    assert float(found.error) > 1e-7


def test_rates_and_spectra_of_a_block_that_was_solved_by_iterations() -> None:
    model, x = network(), torch.randn(9, 4, generator=seeded(3))
    (direct,) = pulled_back(model, x).blocks.values()
    metric = pulled_back(model, x, solver="cg")
    metric.natural_gradient()
    (found,) = metric.blocks.values()
    for name in ("logdet", "spectrum", "contraction_rate", "condition"):
        torch.testing.assert_close(
            getattr(found, name)(), getattr(direct, name)(), rtol=1e-8, atol=1e-9
        )
    assert abs(found.inverse.trace / direct_trace(direct) - 1.0) < 1e-9


def direct_trace(metric: LayerMetric) -> float:
    metric.solve(residual=torch.zeros(metric.rank))
    return metric.inverse.trace


def test_single_precision_keeps_its_tolerance_where_products_do_not() -> None:
    # The largest eigenvalue is 1e9: a product in float32 is off by more than one.
    generator = seeded(8)
    U = torch.linalg.qr(torch.randn(40, 40, generator=generator))[0]
    K = U @ torch.diag(torch.logspace(4.5, -1, 40))
    y = torch.randn(40, generator=generator)
    space = TangentSpace(rm.manifolds.Euclidean(), torch.zeros(41))
    rows = torch.cat([K, torch.zeros(40, 1)], 1).float()
    metric = LayerMetric(
        [Part("w", space.to(torch.float32), DenseFactor(rows))],
        solver=ConjugateGradients(tolerance=1e-4, pivots=20),
    )
    found = metric.solve(residual=y)
    assert found.converged
    d, M = metric.inverse.last, rows.double() @ rows.double().mT
    assert d is not None

    def error(product: Tensor) -> float:
        return float((y - d - product).norm() / (y @ product).sqrt())

    assert error(M @ d) <= 1e-4
    assert error(block_of(metric).gram_product(d)) > 1e-3


@pytest.mark.parametrize("solver", ["lu", ConjugateGradients])
def test_other_solvers_are_refused(solver) -> None:
    with pytest.raises(ValueError, match="choose one of"):
        rm.LayerwiseMetric(nn.Linear(2, 2), output=rm.output.Euclidean(), solver=solver)


@pytest.mark.parametrize(
    "wrong",
    [
        {"tolerance": 0.0},
        {"tolerance": 2.0},
        {"iterations": 0},
        {"iterations": 2.5},
        {"pivots": -1},
        {"pivots": 2.5},
    ],
)
def test_impossible_settings_are_refused(wrong) -> None:
    with pytest.raises(ValueError, match="tolerance must lie"):
        ConjugateGradients(**wrong)


def test_a_step_on_the_meta_device_reads_nothing() -> None:
    part = linear_block(4, 2, 3)
    factor = LinearFactor(
        part.factor.inputs.to("meta"), part.factor.cotangents.to("meta")
    )
    space = TangentSpace(rm.manifolds.Euclidean(), torch.zeros(3, 3, device="meta"))
    how = ConjugateGradients(iterations=4, pivots=2)
    metric = LayerMetric([Part("w", space, factor)], solver=how)
    found = metric.solve(residual=torch.zeros(8, device="meta"))
    assert (found.converged, found.iterations) == (None, 4)
    assert found.vectors["w"].shape == (3, 3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(seed=st.integers(0, 2**31 - 1), pivots=st.sampled_from([20, 32, 64, 90, 100]))
@settings(max_examples=8)
def test_the_preconditioner_is_that_of_its_columns(dtype, seed, pivots):
    torch.manual_seed(seed)
    rows = torch.randn(100, 120, dtype=torch.float64)
    rows *= torch.logspace(0, -2, 120, dtype=torch.float64)
    M = rows @ rows.mT
    found = PivotedPreconditioner(
        M.diagonal(), lambda index: M[:, index].to(dtype), pivots
    )
    P = found.pivots
    assert len(P) == len(P.unique()) == pivots
    C = M[:, P]
    known = C @ torch.linalg.solve(M[P][:, P], C.mT)
    tolerance = 1e-8 if dtype == torch.float64 else 1e-3
    left = M - known
    assert abs(float(found.remaining - left.trace())) <= tolerance * float(M.trace())
    v = torch.randn(100, dtype=torch.float64)
    exact = torch.linalg.solve(torch.eye(100, dtype=torch.float64) + known, v)
    assert (found(v) - exact).norm() <= tolerance * v.norm()
