"""The laws of batches: weights, order, repetition, and what is left untouched."""

import pytest
import torch
from cases import BASES, OUTPUTS, chain, inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.output import OutputMetric

SEEDS = st.integers(0, 2**31 - 1)
PRECISIONS = [torch.float64, torch.float32]
precisions = pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
bases = st.sampled_from(list(BASES))
outputs_by_name = st.sampled_from(list(OUTPUTS))
sizes = st.integers(1, 12)
blocks_by_name = st.sampled_from(["tensor", "layer", "model"])


def gradient(
    model: nn.Module, x: Tensor, output: OutputMetric, loss, **options
) -> tuple[dict[str, Tensor], float]:
    """Return the Riemannian gradient and the tolerance that it is known to."""
    metric = rm.LayerwiseMetric(model, output, **options)
    with metric.record():
        outputs = model(x)
    metric.backward(loss(outputs), outputs)
    values = [block.gram_spectrum()[0] for block in metric.blocks.values()]
    eps = torch.finfo(outputs.dtype).eps
    return metric.natural_gradient(), 50.0 * eps * (1.0 + float(max(values)))


def assert_equal(one, other) -> None:
    found, tolerance = one
    expected, other_tolerance = other
    assert found.keys() == expected.keys()
    floor = 1e-2 * max(float(x.norm()) for x in expected.values())
    for name, x in expected.items():
        error = float((found[name] - x).norm()) / max(float(x.norm()), floor)
        assert error <= tolerance + other_tolerance, name


@precisions
@given(base=bases, output=outputs_by_name, n=sizes, seed=SEEDS, blocks=blocks_by_name)
def test_a_batch_given_twice_has_the_same_gradient(
    dtype, base, output, n, seed, blocks
) -> None:
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    case, model = OUTPUTS[output], chain(base, output)
    x = inputs(model, n)
    loss = case.loss_for(model(x).detach())
    options = {"mass": 0.1, "blocks": blocks}
    once = gradient(model, x, case.metric(), loss, **options)
    twice = gradient(
        model,
        torch.cat([x, x]),
        case.metric(),
        lambda z: 0.5 * (loss(z[:n]) + loss(z[n:])),
        **options,
    )
    assert_equal(twice, once)


@precisions
@given(base=bases, output=outputs_by_name, n=sizes, seed=SEEDS, blocks=blocks_by_name)
def test_a_sum_is_a_mean_with_the_mass_of_all_terms(
    dtype, base, output, n, seed, blocks
) -> None:
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    case, model = OUTPUTS[output], chain(base, output)
    x = inputs(model, n)
    z = model(x).detach()
    terms = case.metric().terms(z)
    mean = gradient(model, x, case.metric(), case.loss_for(z), mass=0.1, blocks=blocks)
    total = gradient(
        model,
        x,
        case.metric(),
        lambda outputs: terms * case.loss_for(z)(outputs),
        mass=0.1 * terms,
        blocks=blocks,
        reduction="sum",
    )
    assert_equal(total, mean)


@precisions
@given(base=bases, n=sizes, seed=SEEDS, blocks=blocks_by_name)
def test_the_order_of_examples_is_irrelevant(dtype, base, n, seed, blocks) -> None:
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    case, model = OUTPUTS["categorical"], chain(base)
    x = inputs(model, n)
    loss = case.loss_for(model(x).detach())
    order = torch.randperm(n)
    options = {"mass": 0.1, "blocks": blocks}
    expected = gradient(model, x, case.metric(), loss, **options)
    back = order.argsort()
    found = gradient(model, x[order], case.metric(), lambda z: loss(z[back]), **options)
    assert_equal(found, expected)


class Rotated(OutputMetric):
    """The same metric with another factor, ``Q L``."""

    def __init__(self, metric: OutputMetric, seed: int) -> None:
        self.metric = metric
        self.seed = seed

    def factor(self, outputs: Tensor) -> Tensor:
        L = self.metric.factor(outputs)
        generator = torch.Generator().manual_seed(self.seed)
        A = torch.randn(L.shape[1], L.shape[1], generator=generator).to(L)
        return torch.einsum("sr,nr...->ns...", torch.linalg.qr(A)[0], L)

    def terms(self, outputs: Tensor) -> int:
        return self.metric.terms(outputs)


@precisions
@given(base=bases, output=outputs_by_name, n=sizes, seed=SEEDS)
def test_any_factor_of_the_output_metric_will_do(dtype, base, output, n, seed) -> None:
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    case, model = OUTPUTS[output], chain(base, output)
    x = inputs(model, n)
    loss = case.loss_for(model(x).detach())
    expected = gradient(model, x, case.metric(), loss, mass=0.1)
    found = gradient(model, x, Rotated(case.metric(), seed), loss, mass=0.1)
    assert_equal(found, expected)


@precisions
@pytest.mark.parametrize("output", ["categorical", "gaussian", "bernoulli", "poisson"])
@given(base=bases, n=st.integers(1, 4), seed=SEEDS)
def test_independent_positions_are_examples(dtype, output, base, n, seed) -> None:
    torch.set_default_dtype(dtype)
    torch.manual_seed(seed)
    case, model = OUTPUTS[output], chain(base, output)
    x = inputs(model, n, (3,))
    loss = case.loss_for(model(x).detach())
    expected = gradient(model, x, case.metric(), loss, mass=0.1)
    flat = gradient(
        model,
        x.flatten(0, 1),
        case.metric(),
        lambda z: loss(z.unflatten(0, (n, 3))),
        mass=0.1,
    )
    assert_equal(flat, expected)


@given(base=bases, n=sizes, seed=SEEDS)
def test_an_example_of_weight_zero_only_changes_the_mean(base, n, seed) -> None:
    # Rows of zero do nothing: the metric of n + 1 examples, one of them mute.
    torch.manual_seed(seed)
    model = chain(base, "euclidean")
    x = inputs(model, n)

    class Mute(OutputMetric):
        def factor(self, outputs):
            rows = rm.output.Euclidean().factor(outputs).clone()
            rows[n:] = 0.0
            return rows

    loss = OUTPUTS["euclidean"].loss_for(model(x).detach(), "sum")
    options = {"mass": 0.1, "reduction": "sum"}
    expected = gradient(model, x, rm.output.Euclidean(), loss, **options)
    more = torch.cat([x, inputs(model, 1)])
    found = gradient(model, more, Mute(), lambda z: loss(z[:n]), **options)
    assert_equal(found, expected)


@precisions
@pytest.mark.parametrize("base", BASES)
def test_nothing_of_the_caller_is_changed(base: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    model = chain(base)
    x = inputs(model, 5).requires_grad_()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    with metric.record():
        outputs = model(x)
    loss = OUTPUTS["categorical"].loss_for(outputs.detach())(outputs)
    covector = {
        n: torch.randn_like(p).detach().as_subclass(Tensor)
        for n, p in model.named_parameters()
    }
    mine = [x, outputs, loss, *model.parameters(), *covector.values()]
    before = [t.detach().clone() for t in mine]
    metric.backward(loss, outputs)
    gradient = {n: p.grad for n, p in model.named_parameters()}
    copies = {n: g.clone() for n, g in gradient.items()}
    natural = metric.natural_gradient()
    metric.solve(covector)
    assert all(
        torch.equal(t.detach(), old) for t, old in zip(mine, before, strict=True)
    )
    assert x.grad is None
    for name, parameter in model.named_parameters():
        assert parameter.grad is gradient[name]
        assert torch.equal(parameter.grad, copies[name])
        found = natural[name]
        assert (found.shape, found.dtype) == (parameter.shape, dtype)
        assert not found.requires_grad


@pytest.mark.parametrize("base", BASES)
def test_pulling_back_leaves_gradients_alone(base: str) -> None:
    model = chain(base)
    mark = torch.ones(())
    for parameter in model.parameters():
        parameter.grad = mark.expand(parameter.shape)
    grads = [p.grad for p in model.parameters()]
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    with metric.record():
        outputs = model(inputs(model, 2))
    metric.pull_back(outputs)
    assert all(p.grad is g for p, g in zip(model.parameters(), grads, strict=True))
    assert metric.version == 1


@precisions
@pytest.mark.parametrize("n", [1, 2, 7])
@pytest.mark.parametrize("base", BASES)
def test_float32_agrees_with_float64(base: str, n: int, dtype: torch.dtype) -> None:
    wide = chain(base)
    x = inputs(wide, n)
    loss = OUTPUTS["categorical"].loss_for(wide(x).detach())
    expected = gradient(wide, x, rm.output.Categorical(), loss, mass=0.1)
    torch.set_default_dtype(dtype)
    model = chain(base)
    with torch.no_grad():
        for own, other in zip(model.parameters(), wide.parameters(), strict=True):
            own.copy_(other)
    found = gradient(model, x.to(dtype), rm.output.Categorical(), loss, mass=0.1)
    assert next(iter(found[0].values())).dtype == dtype
    assert_equal(found, expected)
