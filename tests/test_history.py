"""Rows of past passes, and rows that are renewed every k-th step."""

import copy
from itertools import pairwise

import geoopt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.rows import HISTORIES
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.factors import BiasFactor, DenseFactor, LinearFactor
from riemannian_modules.output import Categorical, Euclidean, OutputMetric, Sampled
from riemannian_modules.rows import History, Largest
from riemannian_modules.testing.reference import dense_factor, dense_sharp

SEEDS = st.integers(0, 2**31)
MANIFOLDS = {
    "euclidean": geoopt.Euclidean(ndim=2),
    "stiefel": rm.manifolds.Stiefel(),
    "sphere": rm.manifolds.Sphere(),
}


def network(kind: str, seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    first = rm.nn.Linear(3, 4, manifold=MANIFOLDS[kind])
    return nn.Sequential(first, nn.Tanh(), nn.Linear(4, 3))


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % 3)


def linearise(metric: rm.LayerwiseMetric, x: Tensor, *, loss: bool = True) -> None:
    with metric.record():
        z = metric.model(x)
    if loss:
        metric.backward(cross_entropy(z), z)
    else:
        metric.pull_back(z)


def mean_of_passes(history, output, kind, seed, sizes, blocks="layer"):
    """Train a few steps; return the metric and its dense rows, pass by pass."""
    model = network(kind, seed)
    metric = rm.LayerwiseMetric(model, output, mass=0.1, blocks=blocks, history=history)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    passes = []
    for index, size in enumerate(sizes):
        x = torch.randn(size, 3)
        passes.append(dense_factor(model, output, x))
        linearise(metric, x)
        if index + 1 < len(sizes):
            optimizer.step()
    return metric, passes[::-1]


def largest_error(history, kind, seed, sizes, blocks, decay=0.5, window=2) -> float:
    """How far the metric and its gradient are from the dense weighted sum."""
    metric, passes = mean_of_passes(history, Categorical(), kind, seed, sizes, blocks)
    passes = passes[: window + 1]
    powers = [decay**j for j in range(len(passes))]
    K = {
        name: torch.cat(
            [
                (power / sum(powers)) ** 0.5 * each[name]
                for power, each in zip(powers, passes, strict=True)
            ]
        )
        for name in passes[0]
    }
    gradient = metric.natural_gradient()
    errors = []
    for block in metric.blocks.values():
        assert block.rank == sum(len(each["0.weight"]) for each in passes)
        spaces = {part.name: part.space for part in block.parts}
        for part in block.parts:
            point = metric.parameters[part.name].tensor
            assert torch.equal(part.space.point, point)
        covector = {n: metric.linearization.gradient[n] for n in spaces}
        expected = dense_sharp(spaces, K, covector)
        errors += [float((gradient[n] - expected[n]).abs().max()) for n in spaces]
        for part in block.parts:
            dense = part.factor.to_dense()
            difference = dense.mT @ dense - K[part.name].mT @ K[part.name]
            errors.append(float(difference.abs().max()))
    return max(errors)


@given(
    seed=SEEDS,
    kind=st.sampled_from(sorted(MANIFOLDS)),
    sizes=st.lists(st.integers(2, 5), min_size=1, max_size=4),
    blocks=st.sampled_from(["tensor", "layer", "model"]),
)
@settings(max_examples=10)
def test_a_step_solves_the_weighted_sum_of_passes(seed, kind, sizes, blocks):
    history = History(2, decay=0.5)
    assert largest_error(history, kind, seed, sizes, blocks) <= 1e-10


@pytest.mark.parametrize("mutant", HISTORIES)
def test_the_weighted_sum_rejects(mutant):
    assert largest_error(mutant(2, 0.5), "stiefel", 0, [4, 4], "layer") > 1e-3


def test_weights_add_up_to_one():
    history = History(3, decay=0.25)
    for passes in range(1, 5):
        weights = history.weights(passes)
        assert sum(weights) == pytest.approx(1.0)
        for later, earlier in pairwise(weights):
            assert earlier == pytest.approx(0.25 * later)


@pytest.mark.parametrize("per", ["example", "batch"])
def test_sampled_rows_are_remembered(per):
    output = Sampled(Categorical(), 1, torch.Generator().manual_seed(0), per=per)
    metric, _ = mean_of_passes(3, output, "sphere", 0, [4, 3])
    found = metric.linearization
    for block in metric.blocks.values():
        assert block.rank == (2 + 2 if per == "batch" else 8 + 6)
        for part in block.parts:
            covector = part.factor.rmatvec(found.residual)
            torch.testing.assert_close(covector, found.gradient[part.name])


def test_linear_layers_keep_their_structure():
    metric, _ = mean_of_passes(2, Categorical(), "euclidean", 0, [4, 4, 4])
    for block in metric.blocks.values():
        weight, bias = (part.factor for part in block.parts)
        assert isinstance(weight, LinearFactor)
        assert isinstance(bias, BiasFactor)
        assert bias.belongs_to(weight)
        assert weight.inputs.shape[0] == 12


def test_other_layers_store_rows():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 5)), nn.Conv1d(1, 2, 2), nn.Flatten(), nn.LayerNorm(8)
    )
    model.append(nn.Linear(8, 3))
    metric = rm.LayerwiseMetric(model, Categorical(), history=1)
    for _ in range(2):
        linearise(metric, torch.randn(3, 5))
        gradient = metric.linearization.gradient
        for block in metric.blocks.values():
            for part in block.parts:
                covector = part.factor.rmatvec(metric.linearization.residual)
                torch.testing.assert_close(covector, gradient[part.name])
    assert isinstance(metric.blocks["3"].parts[0].factor, DenseFactor)
    assert type(metric.blocks["1"].parts[0].factor).__name__ == "ConvolutionFactor"


def test_an_overwritten_input_leaves_the_past_alone():
    # A buffer for batches, as loaders reuse them.
    model, buffer = network("euclidean", 0), torch.randn(4, 3)
    metric = rm.LayerwiseMetric(model, Categorical(), history=1)
    linearise(metric, buffer)
    before = {p.name: p.factor for b in metric.blocks.values() for p in b.parts}
    before = {name: factor.to_dense().clone() for name, factor in before.items()}
    buffer.copy_(torch.randn(4, 3))
    linearise(metric, buffer)
    for block in metric.blocks.values():
        for part in block.parts:
            rows = part.factor.rows(0, part.factor.rank).view(2, 8, -1)[:, 4:]
            weight = (0.8 / 1.8) ** 0.5
            expected = weight * before[part.name].view(2, 4, -1)
            torch.testing.assert_close(rows, expected)


def test_what_does_not_fit_starts_anew():
    model = network("euclidean", 0)
    output = Sampled(Categorical(), 1)
    metric = rm.LayerwiseMetric(model, output, history=2)
    linearise(metric, torch.randn(4, 3))
    linearise(metric, torch.randn(4, 3))
    assert metric.blocks["0"].rank == 2 * 8
    linearise(metric, torch.randn(4, 3), loss=False)
    assert metric.blocks["0"].rank == 4
    model.float()
    linearise(metric, torch.randn(4, 3, dtype=torch.float32), loss=False)
    assert metric.blocks["0"].rank == 4


def test_a_state_starts_the_history_anew():
    metric, _ = mean_of_passes(2, Categorical(), "stiefel", 0, [4, 4])
    state = copy.deepcopy(metric.state_dict())
    assert set(state) == {"version", "mass", "manifolds"}
    x = torch.randn(4, 3)
    other = rm.LayerwiseMetric(
        copy.deepcopy(metric.model), Categorical(), mass=0.5, history=2
    )
    linearise(other, x)
    for one in (metric, other):
        one.load_state_dict(state)
        linearise(one, x)
    for name, vector in metric.natural_gradient().items():
        assert torch.equal(vector, other.natural_gradient()[name])


def test_a_failing_pass_is_not_remembered():
    metric, _ = mean_of_passes(2, Categorical(), "euclidean", 0, [4])
    with metric.record():
        z = metric.model(torch.randn(4, 3))
    with pytest.raises(rm.errors.NonFiniteError):
        metric.backward(cross_entropy(z) * float("nan"), z)
    linearise(metric, torch.randn(4, 3))
    assert metric.blocks["0"].rank == 2 * 8


def test_history_of_chosen_rows():
    model = network("sphere", 0)
    metric = rm.LayerwiseMetric(
        model, Categorical(), mass=0.1, history=1, rows=Largest(2)
    )
    for _ in range(2):
        linearise(metric, torch.randn(4, 3))
    found = metric.linearization
    assert metric.blocks["0"].rank == 2 * (2 + 4)
    for block in metric.blocks.values():
        for part in block.parts:
            covector = part.factor.rmatvec(found.residual)
            torch.testing.assert_close(covector, found.gradient[part.name])


# ---- rows that are renewed now and then


class Counting(OutputMetric):
    """Counts how often rows are made."""

    def __init__(self) -> None:
        self.calls = 0

    def factor(self, outputs: Tensor) -> Tensor:
        self.calls += 1
        return Euclidean().factor(outputs)

    def whiten(self, outputs: Tensor, cotangent: Tensor):
        return Euclidean().whiten(outputs, cotangent)


@given(seed=SEEDS, kind=st.sampled_from(sorted(MANIFOLDS)))
@settings(max_examples=5)
def test_refresh_is_frozen_in_between(seed, kind):
    output = Counting()
    first = network(kind, seed)
    second = copy.deepcopy(first)
    lazy = rm.LayerwiseMetric(first, output, mass=0.1, refresh=3)
    plain = rm.LayerwiseMetric(second, Euclidean(), mass=0.1)
    steps = [rm.optim.RiemannianSGD(metric, lr=0.1) for metric in (lazy, plain)]
    calls = []
    for index in range(5):
        x = torch.randn(4, 3)
        linearise(lazy, x)
        calls.append(output.calls)
        if index % 3:
            with plain.frozen():
                linearise(plain, x)
        else:
            linearise(plain, x)
        for step in steps:
            step.step()
        expected = dict(second.named_parameters())
        for name, value in first.named_parameters():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-13)
        assert lazy.version == plain.version == index // 3 + 1
    # The first pass through a graph asks no more than once either.
    assert calls == [1, 1, 1, 2, 2]


def test_in_between_a_line_search_is_not_counted():
    metric = rm.LayerwiseMetric(network("sphere", 0), Categorical(), refresh=2)
    x = torch.randn(4, 3)
    linearise(metric, x)
    with metric.frozen():
        linearise(metric, x)
        linearise(metric, x)
    assert metric.fewer.holds
    linearise(metric, x)
    assert metric.version == 1
    linearise(metric, x)
    assert metric.version == 2
    # A pull-back is asked for by name, so it is made.
    linearise(metric, x, loss=False)
    assert metric.version == 3


@pytest.mark.parametrize(("kind", "shared"), [("euclidean", True), ("sphere", False)])
def test_a_constant_metric_is_factorised_once(kind, shared):
    metric = rm.LayerwiseMetric(network(kind, 0), Categorical(), mass=0.1, refresh=2)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    linearise(metric, torch.randn(4, 3))
    optimizer.step()
    before = metric.blocks["0"].inverse
    linearise(metric, torch.randn(4, 3))
    after = metric.blocks["0"]
    assert (after.inverse.factor is before.factor) is shared
    covector = {n: metric.linearization.gradient[n] for n in ("0.weight", "0.bias")}
    spaces = {part.name: part.space for part in after.parts}
    K = {part.name: part.factor.to_dense() for part in after.parts}
    expected = dense_sharp(spaces, K, covector)
    for name, vector in after.solve(covector=covector).vectors.items():
        torch.testing.assert_close(vector, expected[name], rtol=1e-10, atol=1e-10)


def test_a_copy_of_the_metric_has_the_rows_of_its_own_pass():
    metric, _ = mean_of_passes(2, Categorical(), "euclidean", 0, [4, 4])
    other = metric.of(copy.deepcopy(metric.model))
    for _ in range(2):
        linearise(other, torch.randn(4, 3))
    assert other.blocks["0"].rank == 8
