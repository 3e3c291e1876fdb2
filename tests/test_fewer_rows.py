"""Rows that are chosen or combined: what they keep, what they leave out."""

from dataclasses import replace

import geoopt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.rows import LARGEST
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import TangentSpace
from riemannian_modules.errors import ShapeError
from riemannian_modules.factors import (
    BiasFactor,
    DenseFactor,
    LinearFactor,
    Shared,
    ViewedFactor,
    column,
    combined,
    concatenated,
    energies,
    owned,
    scaled,
    summed,
    taken,
)
from riemannian_modules.linearization import Linearization
from riemannian_modules.output import Categorical
from riemannian_modules.rows import (
    FewerRows,
    History,
    Largest,
    Neglected,
    Pivoted,
    Sketch,
)
from riemannian_modules.rows.pivoted import pivoted_cholesky

SEEDS = st.integers(0, 2**31)
MANIFOLDS = {
    "euclidean": geoopt.Euclidean(ndim=2),
    "stiefel": rm.manifolds.Stiefel(),
    "sphere": rm.manifolds.Sphere(),
}
KINDS = st.sampled_from(sorted(MANIFOLDS))


def network(kind: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first = rm.nn.Linear(3, 4, manifold=MANIFOLDS[kind])
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3))


def images(kind: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv1d(1, 2, 2), nn.Tanh(), nn.Flatten(), nn.LayerNorm(4), nn.Linear(4, 3)
    )


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % 3)


def linearised(model: nn.Module, x: Tensor, **options) -> rm.LayerwiseMetric:
    metric = rm.LayerwiseMetric(model, Categorical(), mass=0.1, **options)
    with metric.record():
        z = model(x)
    metric.backward(cross_entropy(z), z)
    return metric


def spaces_of(metric: rm.LayerwiseMetric) -> dict[str, TangentSpace]:
    return {p.name: p.space for b in metric.blocks.values() for p in b.parts}


def small_matrix(found: Linearization, spaces) -> Tensor:
    """``K sharp K^T`` of all parameters, dense."""
    total = 0.0
    for name, factor in found.factors.items():
        rows = factor.rows(0, factor.rank)
        total = total + rows.flatten(1) @ spaces[name].sharp(rows).flatten(1).mT
    return total


def rooted(found: Linearization, spaces) -> Tensor:
    """``K C`` with ``C C^T = sharp``, all parameters side by side."""
    return torch.cat(
        [
            spaces[name].root_adjoint(factor.rows(0, factor.rank)).flatten(1)
            for name, factor in found.factors.items()
        ],
        1,
    )


def require_laws(reduced, neglected, found, spaces) -> None:
    """``K~^T y~ = K^T y``, and ``0 <= K^T K - K~^T K~ <= trace``."""
    for name, factor in reduced.factors.items():
        covector = factor.rmatvec(reduced.residual)
        expected = found.factors[name].rmatvec(found.residual)
        torch.testing.assert_close(covector, expected, rtol=1e-10, atol=1e-12)
    full, fewer = rooted(found, spaces), rooted(reduced, spaces)
    values = torch.linalg.eigvalsh(full.mT @ full - fewer.mT @ fewer)
    size = float(full.square().sum())
    assert float(values[0]) > -1e-12 * size
    assert float(values[-1]) <= float(neglected.trace) + 1e-12 * size
    assert float(values.sum()) <= float(neglected.trace) + 1e-12 * size
    assert float(neglected.total) == pytest.approx(size)
    assert len(fewer) == neglected.kept


# ---- the largest and the pivoted rows -----------------------------------------------


@given(seed=SEEDS, kind=KINDS, count=st.integers(1, 12), pivoted=st.booleans())
@settings(max_examples=12)
def test_the_gradient_stays_and_the_rest_is_bounded(seed, kind, count, pivoted):
    metric = linearised(network(kind, seed), torch.randn(5, 3), blocks="model")
    found, spaces = metric.linearization, spaces_of(metric)
    reduction = Pivoted(count) if pivoted else Largest(count)
    require_laws(*reduction.reduce(found, spaces), found, spaces)


@pytest.mark.parametrize("reduction", [Largest(4), Pivoted(4)])
def test_any_layer_may_have_fewer_rows(reduction):
    metric = linearised(images("", 0), torch.randn(5, 1, 3), blocks="model")
    found, spaces = metric.linearization, spaces_of(metric)
    require_laws(*reduction.reduce(found, spaces), found, spaces)


@pytest.mark.parametrize("mutant", LARGEST)
def test_the_laws_reject(mutant):
    metric = linearised(network("euclidean", 0), torch.randn(5, 3), blocks="model")
    found, spaces = metric.linearization, spaces_of(metric)
    with pytest.raises(AssertionError):
        require_laws(*mutant(4).reduce(found, spaces), found, spaces)


@given(seed=SEEDS, pivoted=st.booleans())
@settings(max_examples=6)
def test_the_bound_is_attained(seed, pivoted):
    # Three long rows, orthogonal to parallel short ones: what is left has rank one.
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(6, 6, generator=generator)).Q
    lengths = torch.tensor([3.0, 2.0, 4.0, 0.5])
    rows = torch.cat([lengths.unsqueeze(1) * basis[:4], basis[3:4] * 0.25])
    found = Linearization(
        ["w"], {"w": DenseFactor(rows)}, {}, None, None, None, {}, examples=5
    )
    spaces = {"w": TangentSpace(geoopt.Euclidean(), torch.zeros(6))}
    reduction = Pivoted(3) if pivoted else Largest(3)
    reduced, neglected = reduction.reduce(found, spaces)
    difference = rows.mT @ rows - (
        reduced.factors["w"].to_dense().mT @ reduced.factors["w"].to_dense()
    )
    largest = torch.linalg.eigvalsh(difference)[-1]
    torch.testing.assert_close(largest, neglected.trace)
    assert float(neglected.trace) == pytest.approx(0.25 + 0.0625)


@given(seed=SEEDS, kind=KINDS)
@settings(max_examples=6)
def test_a_rate_is_off_by_the_bound_at_most(seed, kind):
    metric = linearised(network(kind, seed), torch.randn(5, 3), blocks="model")
    found, spaces = metric.linearization, spaces_of(metric)
    reduced, neglected = Largest(5).reduce(found, spaces)
    full, fewer = rooted(found, spaces), rooted(reduced, spaces)
    eye = torch.eye(full.shape[1])
    root = torch.randn(full.shape[1], full.shape[1])
    hessian = root @ root.mT

    def rate(rows: Tensor) -> float:
        lower = torch.linalg.cholesky(eye + rows.mT @ rows)
        left = torch.linalg.solve_triangular(lower, hessian, upper=False)
        both = torch.linalg.solve_triangular(lower, left.mT, upper=False)
        return float(torch.linalg.eigvalsh(0.5 * (both + both.mT))[0])

    exact, approximate = rate(full), rate(fewer)
    least, most = neglected.rates(approximate)
    assert float(least) * (1 - 1e-6) - 1e-9 <= exact <= float(most) * (1 + 1e-6) + 1e-9
    assert float(least) == pytest.approx(approximate / (1 + float(neglected.trace)))
    with pytest.raises(ShapeError, match="on average"):
        replace(neglected, bounds=False).rates(1.0)


def test_largest_keeps_the_structure_of_layers():
    metric = linearised(
        network("euclidean", 0), torch.randn(5, 3), rows=Largest(4), blocks="layer"
    )
    for block in metric.blocks.values():
        weight, bias = (part.factor for part in block.parts)
        assert isinstance(weight, LinearFactor)
        assert isinstance(bias, BiasFactor)
        assert bias.belongs_to(weight)
        assert block.rank == 4 + 5
    assert repr(metric.neglected).startswith("Neglected(9 of 10 rows kept, energy")
    assert 0.0 < float(metric.neglected.share) < 1.0


@pytest.mark.parametrize("examples", [1, 2, 8])
@pytest.mark.parametrize(
    "options",
    [{"history": 2}, *({"rows": Largest(k)} for k in (1, 2, 4, 6, 7, 9))],
    ids=str,
)
def test_a_rest_beside_rows_of_other_examples(options, examples):
    torch.manual_seed(0)
    model = network("euclidean", 0)
    output = rm.output.Sampled(Categorical(), probes=2, gradient_rows=False)
    metric = rm.LayerwiseMetric(model, output, mass=0.1, **options)
    for _ in range(3):
        x = torch.randn(examples, 3)
        with metric.record():
            z = model(x)
        metric.backward(cross_entropy(z) + z.logsumexp(1).square().mean(), z)
        found = metric.natural_gradient()
        for block in metric.blocks.values():
            K = torch.cat([part.factor.to_dense() for part in block.parts], 1)
            names = [part.name for part in block.parts]
            e = torch.cat([model.get_parameter(n).grad.reshape(-1) for n in names])
            want = torch.linalg.solve(K.mT @ K + 0.1 * torch.eye(len(e)), e)
            own = torch.cat([found[n].reshape(-1) for n in names])
            torch.testing.assert_close(own, want)


def test_largest_makes_no_row_of_rounding_errors():
    # All of the residual of the first example is in rows that are kept.
    factor = LinearFactor(torch.randn(3, 1, 4), torch.randn(2, 3, 1, 5))
    factor.cotangents[0, 0] *= 10.0
    y = torch.tensor([1.0, 1e-17, 0.4, 3e-17, 0.3, 0.2])
    spaces = {"w": TangentSpace(geoopt.Euclidean(), torch.zeros(5, 4))}
    reduced = {}
    for name, sign in (("one", 1.0), ("other", -1.0)):
        y[3] *= sign
        gradient = {"w": factor.rmatvec(y)}
        found = Linearization(
            ["w"], {"w": factor}, gradient, y.clone(), None, None, {}, examples=3
        )
        reduced[name], _ = Largest(1).reduce(found, spaces)
        rows, residual = reduced[name].factors["w"].to_dense(), reduced[name].residual
        assert not rows[1].any()
        assert residual[1] == 0.0
        torch.testing.assert_close(rows.mT @ residual, gradient["w"].reshape(-1))
    one, other = (each.factors["w"].to_dense() for each in reduced.values())
    assert torch.equal(one, other)


@pytest.mark.parametrize("margin", [25.0, 100.0])
def test_a_large_residual_leaves_those_of_other_examples(margin):
    torch.manual_seed(0)
    model, x = nn.Linear(6, 4).float(), 9.0 * torch.randn(32, 6).float()
    x[:, 0], x[0] = 0.0, torch.eye(6)[0]
    with torch.no_grad():
        model.weight[:, 0] = margin * torch.eye(4)[1] - model.bias
        labels = model(x).argmax(1)
    labels[0] = 0
    metric = rm.LayerwiseMetric(model, Categorical(), rows=Largest(8), blocks="model")
    with metric.record():
        z = model(x)
    assert float((z[0, 1] - z[0, 0]).detach()) == pytest.approx(margin, rel=1e-3)
    metric.backward(F.cross_entropy(z, labels), z)
    found = metric.linearization
    assert found.rest is None
    for name, factor in found.factors.items():
        expected = model.get_parameter(name).grad
        error = factor.rmatvec(found.residual) - expected
        assert float(error.norm()) < 1e-5 * float(expected.norm())


def test_few_rows_are_left_alone():
    metric = linearised(network("sphere", 0), torch.randn(5, 3))
    found, spaces = metric.linearization, spaces_of(metric)
    for reduction in (Largest(5), Pivoted(9), Sketch(9)):
        reduced, neglected = reduction.reduce(found, spaces)
        assert reduced is found
        assert float(neglected.trace) == 0.0


@given(seed=SEEDS, rank=st.integers(1, 6))
@settings(max_examples=6)
def test_pivots_find_all_of_a_matrix_of_low_rank(seed, rank):
    root = torch.randn(8, rank, generator=torch.Generator().manual_seed(seed))
    matrix = root @ root.mT
    lower, left = pivoted_cholesky(matrix.diagonal(), lambda j: matrix[:, int(j)], 7)
    torch.testing.assert_close(lower @ lower.mT, matrix, rtol=1e-7, atol=1e-8)
    assert float(left) <= 1e-8 * float(matrix.trace())
    some, left = pivoted_cholesky(matrix.diagonal(), lambda j: matrix[:, int(j)], 1)
    torch.testing.assert_close((matrix - some @ some.mT).trace(), left)
    most = int(matrix.diagonal().argmax())
    torch.testing.assert_close(some[most, 0].square(), matrix[most, most])


# ---- random rows --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sign", "gaussian", "hadamard"])
@pytest.mark.parametrize("rank", [5, 8])
def test_sketches_are_right_on_average(kind, rank):
    draws, total, square = 3000, 0.0, 0.0
    sketch = Sketch(3, kind, torch.Generator().manual_seed(0))
    for _ in range(draws):
        S = sketch.matrix(rank)
        assert S.shape == (3, rank)
        outer = S.mT @ S
        total, square = total + outer, square + outer.square()
    mean = total / draws
    deviation = ((square / draws - mean.square()).clamp_min(0.0) / draws).sqrt()
    assert ((mean - torch.eye(rank)).abs() <= 6 * deviation + 1e-12).all()


def test_all_rows_of_a_hadamard_matrix_are_exact():
    S = Sketch(8, "hadamard", torch.Generator().manual_seed(0)).matrix(6)
    torch.testing.assert_close(S.mT @ S, torch.eye(6))
    S = Sketch(3, "hadamard", torch.Generator().manual_seed(0)).matrix(8)
    torch.testing.assert_close(S @ S.mT, torch.eye(3) * 8 / 3)


class Scripted(Sketch):
    """A sketch that is given."""

    def __init__(self, matrix: Tensor) -> None:
        super().__init__(len(matrix))
        self.given = matrix

    def matrix(self, rank, device=None):
        return self.given


def test_the_mean_over_all_signs_is_the_metric():
    metric = linearised(network("stiefel", 0), torch.randn(2, 3), blocks="model")
    found, spaces = metric.linearization, spaces_of(metric)
    full = rooted(found, spaces)
    signs = 1.0 - 2.0 * torch.cartesian_prod(*[torch.arange(2.0)] * len(full))
    mean = 0.0
    for row in signs:
        reduced, neglected = Scripted(row.unsqueeze(0)).reduce(found, spaces)
        fewer = rooted(reduced, spaces)
        assert len(fewer) == neglected.kept == 2
        assert not neglected.bounds
        mean = mean + fewer.mT @ fewer / len(signs)
        covector = reduced.factors["2.weight"].rmatvec(reduced.residual)
        torch.testing.assert_close(covector, found.gradient["2.weight"])
    torch.testing.assert_close(mean, full.mT @ full)


@pytest.mark.parametrize(
    "rows", [Largest(3), Pivoted(3), Sketch(3), Sketch(3, "hadamard")]
)
@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_a_step_solves_the_reduced_metric(rows, blocks):
    metric = linearised(
        network("sphere", 3), torch.randn(4, 3), rows=rows, blocks=blocks
    )
    found = metric.linearization
    for block in metric.blocks.values():
        solution = block.solve(residual=found.residual)
        matrix, basis = block.to_dense(), block.basis()
        flat = torch.stack(
            [
                sum((found.gradient[n] * v[n]).sum() for n in solution.vectors)
                for v in basis
            ]
        )
        dense = torch.linalg.solve(matrix, flat)
        for name, x in solution.vectors.items():
            expected = sum(c * v[name] for c, v in zip(dense, basis, strict=True))
            torch.testing.assert_close(x, expected, rtol=1e-10, atol=1e-10)


# ---- what they are made of ----------------------------------------------------------


def linear(seed: int, positions: int, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(3, positions, 4, generator=g, dtype=dtype)
    l = torch.randn(2, 3, positions, 4, generator=g, dtype=dtype)
    return LinearFactor(x, l), BiasFactor(l)


@given(seed=SEEDS, kind=KINDS, positions=st.integers(1, 2), j=st.integers(0, 5))
@settings(max_examples=12)
def test_energies_and_columns_are_those_of_the_gram_matrix(seed, kind, positions, j):
    manifold = MANIFOLDS[kind]
    point = manifold.projx(torch.randn(4, 4))
    spaces = [
        TangentSpace(manifold, point, rm.Mass(scalar=0.3)),
        TangentSpace(geoopt.Euclidean(), torch.zeros(4), rm.Mass(scalar=2.0)),
    ]
    weight, bias = linear(seed, positions)
    spaces.append(spaces[0])
    factors = [weight, bias, ViewedFactor(weight)]
    for factor, space in zip(factors, spaces, strict=True):
        dense = DenseFactor(factor.rows(0, 6))
        gram = dense.gram(space, torch.float64)
        index = torch.tensor(j)
        for each in (factor, dense):
            torch.testing.assert_close(energies(each, space), gram.diagonal())
            torch.testing.assert_close(column(each, space, index), gram[:, j])


@given(seed=SEEDS, positions=st.integers(1, 2))
@settings(max_examples=6)
def test_parts_of_factors_equal_parts_of_their_rows(seed, positions):
    index, shared = torch.tensor([4, 0, 5]), Shared()
    weights = torch.randn(6)
    weight, bias = linear(seed, positions)
    for factor in (weight, bias, ViewedFactor(weight)):
        rows = factor.rows(0, 6)
        grouped = rows.view(2, 3, *factor.shape)
        sums = torch.einsum("jn,jn...->n...", weights.view(2, 3), grouped)
        for each in (factor, DenseFactor(rows)):
            kind = type(each)
            for found, expected in (
                (taken(each, index, shared), rows[index]),
                (combined(each, weights, 3, shared), sums),
                (scaled(each, -2.0), -2.0 * rows),
                (owned(each), rows),
                (
                    concatenated([each, scaled(each, 3.0)], 2),
                    torch.cat([grouped, 3.0 * grouped], 1).flatten(0, 1),
                ),
            ):
                assert type(found) is kind
                torch.testing.assert_close(found.rows(0, found.rank), expected)
            torch.testing.assert_close(summed(each, 2).rows(0, 2), grouped.sum(1))


def test_passes_of_different_lengths_fit_together():
    (short, _), (long, _) = linear(0, 1), linear(1, 3)
    found = concatenated([short, long], 2)
    assert isinstance(found, LinearFactor)
    parts = [f.rows(0, 6).view(2, 3, 4, 4) for f in (short, long)]
    expected = torch.cat(parts, 1).flatten(0, 1)
    torch.testing.assert_close(found.rows(0, 12), expected)


def test_errors_of_the_parts():
    one, two = linear(0, 1)
    with pytest.raises(ShapeError, match="one parameter each"):
        concatenated([one, two], 2)
    with pytest.raises(ShapeError, match="groups"):
        summed(one, 4)
    for make in (lambda: Largest(1.5), lambda: Pivoted(2.0), lambda: Sketch(1.5)):
        with pytest.raises(ShapeError, match="a whole number of rows"):
            make()
    with pytest.raises(ShapeError, match=r"History\(1\.5"):
        History(1.5)
    with pytest.raises(ValueError, match=r"refresh=1\.5"):
        FewerRows(refresh=1.5)
    for make in (lambda: Largest(0), lambda: Pivoted(0), lambda: Sketch(0)):
        with pytest.raises(ShapeError, match="at least one row"):
            make()
    with pytest.raises(ShapeError, match="hadamard"):
        Sketch(1, "sparse")
    for make in (lambda: History(0), lambda: History(1, 0.0), lambda: History(1, 1.1)):
        with pytest.raises(ShapeError, match="decay"):
            make()
    with pytest.raises(TypeError, match="RowReduction"):
        FewerRows(rows=3)
    with pytest.raises(TypeError, match="History"):
        FewerRows(history=0.5)
    with pytest.raises(ValueError, match="refresh=0"):
        FewerRows(refresh=0)


def test_they_show_what_they_are():
    reductions = [Largest(2), Pivoted(3), Sketch(4), History(2)]
    assert [repr(r) for r in reductions] == [
        "Largest(2)",
        "Pivoted(3)",
        "Sketch(4, 'sign')",
        "History(2, decay=0.8)",
    ]
    meta = torch.empty((), device="meta")
    assert repr(Neglected(meta, meta, 1, 2)) == "Neglected(1 of 2 rows kept)"


def test_nothing_waits_for_a_device():
    factor, bias = (f for f in linear(0, 1))
    factors = {
        "w": LinearFactor(factor.inputs.to("meta"), factor.cotangents.to("meta")),
        "b": BiasFactor(bias.cotangents.to("meta")),
    }
    y = torch.empty(6, device="meta")
    found = Linearization(["w", "b"], factors, {}, y, None, None, {}, examples=3)
    spaces = {
        name: TangentSpace(geoopt.Euclidean(), torch.empty(shape, device="meta"))
        for name, shape in (("w", (4, 4)), ("b", (4,)))
    }
    for reduction in (Largest(2), Pivoted(2), Sketch(2), Sketch(2, "hadamard")):
        reduced, neglected = reduction.reduce(found, spaces)
        assert reduced.residual.shape == (neglected.kept,)
    without = replace(found, residual=None)
    assert Largest(2).reduce(without, spaces)[1].kept == 2
