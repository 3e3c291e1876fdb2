"""Sampled rows that keep the gradient: unbiased, exact residual, rows of a batch."""

import itertools

import geoopt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.rows import SAMPLED
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import carry_rows, recorder
from riemannian_modules.contraction import loss_lipschitz
from riemannian_modules.errors import ContractionError, OutputMetricError
from riemannian_modules.output import (
    Bernoulli,
    Categorical,
    Euclidean,
    Gaussian,
    OutputMetric,
    Poisson,
    Sampled,
)
from riemannian_modules.testing.reference import dense_factor, dense_natural_gradient

SEEDS = st.integers(0, 2**31)
PER = st.sampled_from(["example", "batch"])


class Scripted(OutputMetric):
    """A metric whose random rows are those of given outcomes."""

    def __init__(self, metric: OutputMetric, rows: Tensor) -> None:
        self.metric, self.rows = metric, rows

    def factor(self, outputs: Tensor) -> Tensor:
        return self.metric.factor(outputs)

    def whiten(self, outputs: Tensor, cotangent: Tensor):
        return self.metric.whiten(outputs, cotangent)

    def sample(self, outputs, probes, generator=None) -> Tensor:
        return self.rows


def normal(seed: int, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def whole(rows: Tensor) -> Tensor:
    """``L^T L`` of rows ``(n, r, *output)`` that are sums over the examples."""
    flat = rows.movedim(1, 0).flatten(1)
    return flat.mT @ flat


def apart(rows: Tensor) -> Tensor:
    """``L^T L`` of rows that are of one example each, the examples side by side."""
    flat = rows.flatten(2)
    return torch.block_diag(*(flat.mT @ flat))


def outcomes(p: Tensor, probes: int):
    """Every draw of classes with its probability and its scores, ``(n, probes, C)``."""
    n, classes = p.shape
    for drawn in itertools.product(range(classes), repeat=n * probes):
        index = torch.tensor(drawn).view(n, probes)
        chance = p.gather(1, index).prod()
        yield chance, F.one_hot(index, classes) - p.unsqueeze(1)


def expectation(kind, per: str, z: Tensor, v: Tensor, probes: int) -> Tensor:
    total, gram = 0.0, whole if per == "batch" else apart
    for chance, scores in outcomes(z.softmax(-1), probes):
        sampled = kind(Scripted(Categorical(), scores), probes, per=per)
        total = total + chance * gram(sampled.split(z, v)[0])
    return total


@given(SEEDS, PER, st.integers(1, 2))
@settings(max_examples=8)
def test_the_mean_over_all_draws_is_the_metric(seed, per, probes):
    z = normal(seed, 2, 3)
    v = z.softmax(-1) - torch.eye(3)[[0, 2]]
    expected = apart(Categorical().factor(z))
    torch.testing.assert_close(expectation(Sampled, per, z, v, probes), expected)
    # At an optimum nothing is left for the gradient's row to keep.
    still = expectation(Sampled, per, z, torch.zeros_like(z), probes)
    torch.testing.assert_close(still, expected)


@pytest.mark.parametrize("mutant", SAMPLED)
def test_the_mean_rejects(mutant):
    z = normal(0, 2, 3)
    v = z.softmax(-1) - torch.eye(3)[[0, 2]]
    wrong = expectation(mutant, "example", z, v, 2) - apart(Categorical().factor(z))
    assert wrong.abs().max() > 1e-3


def masks(n: int, like: Tensor) -> list[Tensor]:
    shape = (1, n, *[1] * (like.ndim - 2))
    return [one.view(shape) for one in torch.eye(n)]


METRICS = {
    "categorical": (Categorical(), (4,)),
    "positions": (Categorical(), (2, 3)),
    "euclidean": (Euclidean(scale=0.5), (3,)),
    "bernoulli": (Bernoulli(), (3,)),
    "poisson": (Poisson(), (2,)),
    "gaussian": (Gaussian(learned="log_variance"), (4,)),
}


@pytest.mark.parametrize("name", METRICS)
@given(seed=SEEDS, per=PER, probes=st.integers(0, 3))
@settings(max_examples=5)
def test_the_gradient_is_a_multiple_of_its_row(name, seed, per, probes):
    metric, shape = METRICS[name]
    z, v = normal(seed, 3, *shape), normal(seed + 1, 3, *shape)
    if name in ("categorical", "positions"):
        v = v - v.mean(-1, keepdim=True)
    y, rest = metric.whiten(z, v)
    generator = torch.Generator().manual_seed(seed)
    rows, found, left = Sampled(metric, probes, generator, per=per).split(z, v)
    assert rows.shape == (3, 1 + probes, *shape)
    torch.testing.assert_close(left, rest)
    indices = "r" if per == "batch" else "nr"
    combined = torch.einsum(f"nr...,{indices}->n...", rows, found)
    torch.testing.assert_close(combined + left, v)
    length = y.norm() if per == "batch" else y.norm(dim=1)
    torch.testing.assert_close(found[..., 0], length)
    assert not found[..., 1:].any()
    # Where the rows are S L, the first row of S has length 1 and meets no other.
    dual = torch.linalg.pinv(apart(metric.factor(z)), hermitian=True, rtol=1e-12)
    side = rows.movedim(1, 0)
    sides = [side] if per == "batch" else [side * one for one in masks(3, side)]
    for each in sides:
        flat = each.flatten(1)
        crossed = flat[0] @ dual @ flat.mT
        expected = torch.zeros_like(crossed)
        expected[0] = 1.0
        torch.testing.assert_close(crossed, expected, rtol=1e-7, atol=1e-7)


def test_without_gradient_rows_it_is_as_before():
    z, v = normal(0, 3, 4), normal(1, 3, 4)
    old = Sampled(
        Categorical(), 2, torch.Generator().manual_seed(0), gradient_rows=False
    )
    new = Sampled(Categorical(), 2, torch.Generator().manual_seed(0))
    rows, y, rest = old.split(z, v)
    assert y is None
    assert torch.equal(rest, v)
    assert torch.equal(rows, new.factor(z))
    assert repr(old) == "Sampled(Categorical(), probes=2, gradient_rows=False)"
    assert repr(Sampled(Categorical(), per="batch")) == (
        "Sampled(Categorical(), probes=1, per='batch')"
    )


# ---- in a model ---------------------------------------------------------------------


def network(manifold) -> nn.Sequential:
    return nn.Sequential(
        rm.nn.Linear(3, 4, manifold=manifold), nn.Tanh(), nn.Linear(4, 3)
    )


def cross_entropy(z: Tensor) -> Tensor:
    return F.cross_entropy(z, torch.arange(len(z)) % 3)


def linearised(model, output, x, **options):
    metric = rm.LayerwiseMetric(model, output, **options)
    with metric.record():
        z = model(x)
    metric.backward(cross_entropy(z), z)
    return metric


@given(
    seed=SEEDS,
    per=PER,
    probes=st.integers(0, 2),
    blocks=st.sampled_from(["tensor", "layer", "model"]),
    manifold=st.sampled_from([geoopt.Euclidean(ndim=2), rm.manifolds.Stiefel()]),
)
@settings(max_examples=12)
def test_a_step_equals_the_dense_solve(seed, per, probes, blocks, manifold):
    torch.manual_seed(seed)
    model, generator = network(manifold), torch.Generator()
    output = Sampled(Categorical(), probes, generator, per=per)
    x = torch.randn(5, 3)
    metric = linearised(model, output, x, mass=0.1, blocks=blocks)
    # In the second pass the graph is known.
    generator.manual_seed(seed)
    with metric.record():
        z = model(x)
    metric.backward(cross_entropy(z), z)
    rank = (1 + probes) * (1 if per == "batch" else 5)
    assert all(block.rank == rank for block in metric.blocks.values())
    generator.manual_seed(seed)
    expected = dense_natural_gradient(
        model, output, x, cross_entropy, mass=0.1, blocks=blocks
    )
    for name, vector in metric.natural_gradient().items():
        torch.testing.assert_close(vector, expected[name], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("blocks", ["layer", "model"])
def test_the_gradient_and_what_one_example_does_are_those_of_the_first_pass(blocks):
    torch.manual_seed(0)
    model, x = network(rm.manifolds.Stiefel()), torch.randn(5, 3)
    output = Sampled(Categorical(), 0)
    metric = linearised(model, output, x, mass=0.1, blocks=blocks)
    first = metric.linearization, loss_lipschitz(metric).value
    with metric.record():
        z = model(x)
    metric.backward(cross_entropy(z), z)
    second = metric.linearization, loss_lipschitz(metric).value
    assert second[1] == pytest.approx(first[1], rel=1e-12)
    gradients = torch.autograd.grad(cross_entropy(model(x)), list(model.parameters()))
    names = [name for name, _ in model.named_parameters()]
    for name, expected in zip(names, gradients, strict=True):
        torch.testing.assert_close(second[0].gradient[name], expected)
        assert metric.parameters[name].tensor.grad is second[0].gradient[name]


@settings(max_examples=30)
@given(seed=SEEDS, per=PER, probes=st.integers(0, 2), scale=st.floats(0.1, 60.0))
def test_a_cheap_inverse_and_whitening_give_the_same_rows(seed, per, probes, scale):
    z = scale * normal(seed, 4, 5)
    v = z.softmax(-1) - F.one_hot(torch.arange(4), 5)
    assert Categorical().sharp(z, v) is not None
    found = []
    for look_closer in (False, True):
        generator = torch.Generator().manual_seed(seed)
        metric = Sampled(Categorical(), probes, generator, per=per)
        if look_closer:
            metric.metric.sharp = lambda *_: None
        found.append(metric.split(z, v))
    for cheap, careful in zip(*found, strict=True):
        torch.testing.assert_close(cheap, careful, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("dtype", "gap"), [(torch.float32, 150.0), (torch.float64, 350.0)]
)
def test_extreme_or_strange_cotangents_are_looked_at_closely(dtype, gap):
    z = torch.tensor([[0.0, gap, 1.0]], dtype=dtype)
    wrong = z.softmax(-1) - torch.eye(3, dtype=dtype)[:1]
    assert Categorical().sharp(z, wrong) is None
    assert Categorical().sharp(0.9 * z, 0.9 * z) is None
    assert Categorical().sharp(0.5 * z, wrong) is not None
    assert Categorical().sharp(torch.zeros(1, 3), torch.ones(1, 3)) is None
    meta = torch.zeros(1, 3, device="meta")
    assert Categorical().sharp(meta, meta) is None


@pytest.mark.parametrize("probes", [0, 1, 3])
def test_the_costate_is_not_carried_where_a_row_says_the_same(probes, monkeypatch):
    torch.manual_seed(0)
    model, x = network(rm.manifolds.Stiefel()), torch.randn(5, 3)
    metric = linearised(model, Sampled(Categorical(), probes), x, mass=0.1)
    carried, own = [], carry_rows.carry

    def counted(uses, outputs, stacks, **options):
        carried.append(len(stacks[0]))
        return own(uses, outputs, stacks, **options)

    monkeypatch.setattr(carry_rows, "carry", counted)
    monkeypatch.setattr(recorder.Recorder, "_scales", lambda *_: None)
    with metric.record():
        z = model(x)
    metric.backward(cross_entropy(z), z)
    assert carried == [1 + probes]


@pytest.mark.parametrize("probes", [0, 1])
def test_the_first_pass_and_those_after_it_have_the_same_bits(probes):
    torch.manual_seed(0)
    model, x = network(rm.manifolds.Stiefel()), torch.randn(5, 3)
    generator = torch.Generator().manual_seed(0)
    metric = linearised(model, Sampled(Categorical(), probes, generator), x, mass=0.1)
    first = metric.natural_gradient(), metric.linearization.gradient
    generator.manual_seed(0)
    with metric.record():
        z = model(x)
    metric.backward(cross_entropy(z), z)
    second = metric.natural_gradient(), metric.linearization.gradient
    for before, after in zip(first, second, strict=True):
        for name, value in before.items():
            assert torch.equal(value, after[name]), name


class Boastful(OutputMetric):
    """Says that its first row leads, and spreads the cotangent over all rows."""

    leads = True

    def factor(self, outputs: Tensor) -> Tensor:
        return Categorical().factor(outputs)

    def whiten(self, outputs: Tensor, cotangent: Tensor):
        return Categorical().whiten(outputs, cotangent)


def test_a_first_row_that_does_not_lead_is_not_believed():
    torch.manual_seed(0)
    model, x = network(rm.manifolds.Stiefel()), torch.randn(5, 3)
    metric = linearised(model, Boastful(), x, mass=0.1)
    with metric.record():
        z = model(x)
    metric.backward(cross_entropy(z), z)
    expected = torch.autograd.grad(cross_entropy(model(x)), list(model.parameters()))
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_constants_of_examples_need_the_rows_of_examples():
    metric = linearised(
        network(rm.manifolds.Stiefel()), Categorical(), torch.randn(5, 3), history=1
    )
    with pytest.raises(ContractionError, match=r"metric\.of\(model\)"):
        loss_lipschitz(metric)


class Silent(OutputMetric):
    """Explains some cotangents and not others."""

    def factor(self, outputs: Tensor) -> Tensor:
        return Euclidean().factor(outputs)

    def whiten(self, outputs: Tensor, cotangent: Tensor):
        y, rest = Euclidean().whiten(outputs, cotangent)
        return (None, cotangent) if bool((cotangent > 0).all()) else (y, rest)

    def sample(self, outputs, probes, generator=None) -> Tensor:
        return torch.ones_like(outputs).unsqueeze(1)


def test_a_metric_that_explains_half_is_refused():
    with pytest.raises(OutputMetricError, match="random rows"):
        Sampled(Silent()).split(torch.ones(2, 3), -torch.ones(2, 3))
    rows, y, _ = Sampled(Silent()).split(torch.ones(2, 3), torch.ones(2, 3))
    assert y is None
    assert rows.shape == (2, 1, 3)


@pytest.mark.parametrize("per", ["example", "batch"])
def test_the_rows_of_every_layer_are_those_of_the_output(per):
    torch.manual_seed(0)
    model, generator = network(geoopt.Euclidean(ndim=2)), torch.Generator()
    output, x = Sampled(Categorical(), 2, generator, per=per), torch.randn(4, 3)
    metric = rm.LayerwiseMetric(model, output)
    # Without a loss there are the random rows alone; explored and known graphs alike.
    for seed in range(2):
        generator.manual_seed(seed)
        with metric.record():
            z = model(x)
        metric.pull_back(z)
        generator.manual_seed(seed)
        expected = dense_factor(model, output, x)
        for block in metric.blocks.values():
            for part in block.parts:
                assert part.factor is not None
                torch.testing.assert_close(part.factor.to_dense(), expected[part.name])


@pytest.mark.parametrize("mass", [1e-2, 1e-6, 1e-10])
def test_a_small_mass_does_not_amplify_the_gradient(mass):
    # |x|_g^2 = e(x) <= |y|^2, whatever the mass; without the row it grows as 1 / mass.
    torch.manual_seed(0)
    model, x = network(geoopt.Euclidean(ndim=2)), torch.randn(6, 3)
    exact = linearised(model, Categorical(), x, mass=mass, blocks="model")
    bound = float(exact.linearization.residual.square().sum())
    kept = linearised(model, Sampled(Categorical()), x, mass=mass, blocks="model")
    (solution,) = kept.solve().values()
    assert float(solution.squared_norm) <= bound * (1 + 1e-9)
    output = Sampled(Categorical(), gradient_rows=False)
    lost = linearised(model, output, x, mass=mass, blocks="model")
    (solution,) = lost.solve().values()
    assert float(solution.squared_norm) > 1e-4 / mass


def test_rows_of_a_batch_and_of_examples_do_not_mix():
    model = nn.Linear(3, 6)
    output = [Sampled(Categorical(), per="batch"), Categorical()]
    metric = rm.LayerwiseMetric(model, output)
    with metric.record():
        z = model(torch.randn(4, 3))
    with pytest.raises(OutputMetricError, match="choose one of them"):
        metric.pull_back((z[:, :3], z[:, 3:]))
    assert metric.version == 0


def test_several_outputs_have_rows_of_the_batch_each():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 6), torch.randn(4, 3)
    output = [Sampled(Categorical(), per="batch"), Sampled(Euclidean(), 2, per="batch")]
    metric = rm.LayerwiseMetric(model, output, blocks="model", mass=0.1)
    with metric.record():
        z = model(x)
    heads = (z[:, :3], z[:, 3:])
    loss = cross_entropy(heads[0]) + 0.5 * heads[1].square().sum(1).mean()
    metric.backward(loss, heads)
    (block,) = metric.blocks.values()
    assert block.rank == 2 + 3
    found = metric.linearization
    for part in block.parts:
        covector = part.factor.rmatvec(found.residual)
        torch.testing.assert_close(covector, found.gradient[part.name])


def test_the_gradients_row_needs_a_loss():
    model, output = nn.Linear(3, 3), Sampled(Categorical(), 0)
    metric = rm.LayerwiseMetric(model, output)
    with metric.record():
        z = model(torch.randn(4, 3))
    with pytest.raises(OutputMetricError, match=r"metric\.backward\(loss, outputs\)"):
        metric.pull_back(z)


def test_functions_have_rows_of_examples_only():
    model = nn.Linear(2, 2)
    output = Sampled(Euclidean(), per="batch")
    metric = rm.functional.FunctionalMetric(model, lambda net, x: net(x), output)
    z = metric(torch.randn(3, 2))
    with pytest.raises(OutputMetricError, match="per='example'"):
        metric.backward(z.square().sum(), z)
