"""The Riemannian gradient equals the one with every matrix written out."""

import pytest
import torch
import torch.nn.functional as F
from cases import BASES, MODELS, OUTPUTS, Branches, Loss, Tied, Twice, chain, inputs
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.output import OutputMetric
from riemannian_modules.testing.reference import dense_natural_gradient

BLOCKS = ("tensor", "layer", "model")
SIZES = (1, 2, 3, 5, 8, 16, 33, 64)


def linearise(
    model: nn.Module, x: Tensor, output: OutputMetric, loss: Loss, **options
) -> rm.LayerwiseMetric:
    metric = rm.LayerwiseMetric(model, output, **options)
    with metric.record():
        outputs = model(x)
    metric.backward(loss(outputs), outputs)
    return metric


def amplification(metric: rm.LayerwiseMetric) -> float:
    return max(1.0 + float(b.gram_spectrum()[0]) for b in metric.blocks.values())


def general(metric: rm.LayerwiseMetric) -> dict[str, Tensor]:
    """The same gradient, solved without the whitened residual."""
    covector = {n: p.grad.clone() for n, p in metric.model.named_parameters()}
    solutions = metric.solve(covector, gradient=0.0).values()
    return {n: x for solution in solutions for n, x in solution.vectors.items()}


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        error = float((found[name] - x).norm() / x.norm())
        assert error <= 1e-10, f"{name}: {error:.1e}"


def compare(
    model: nn.Module, x: Tensor, output: OutputMetric, loss: Loss, **options
) -> rm.LayerwiseMetric:
    metric = linearise(model, x, output, loss, **options)
    assert amplification(metric) <= 1e4, "the case is meant to be better conditioned"
    expected = dense_natural_gradient(model, output, x, loss, **options)
    assert_equal(metric.natural_gradient(), expected)
    assert_equal(general(metric), expected)
    return metric


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("base", BASES)
def test_every_manifold_output_and_block(base: str, output: str, blocks: str) -> None:
    index = list(BASES).index(base) + list(OUTPUTS).index(output)
    index += BLOCKS.index(blocks)
    model = chain(base, output, bias=index % 2 == 0, manifold_last=index % 3 == 0)
    x = inputs(model, n=1 + index % 5)
    case = OUTPUTS[output]
    loss = case.loss_for(model(x).detach())
    metric = compare(model, x, case.metric(), loss, mass=0.1, blocks=blocks)
    assert (
        len(metric.blocks)
        == {
            "tensor": len(list(model.parameters())),
            "layer": 2,
            "model": 1,
        }[blocks]
    )


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("n", SIZES)
def test_every_batch_size(n: int, blocks: str, bias: bool) -> None:
    base = list(BASES)[SIZES.index(n)]
    model = chain(base, bias=bias)
    x = inputs(model, n)
    loss = OUTPUTS["categorical"].loss_for(model(x).detach())
    compare(model, x, rm.output.Categorical(), loss, mass=0.05, blocks=blocks)


def test_both_forms_of_the_inverse_are_met() -> None:
    forms = set()
    for n in SIZES:
        model = chain("stiefel-wide")
        x = inputs(model, n)
        loss = OUTPUTS["categorical"].loss_for(model(x).detach())
        metric = linearise(model, x, rm.output.Categorical(), loss)
        forms |= {solution.branch for solution in metric.solve().values()}
    assert forms == {"push-through", "primal"}


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("positions", [(2,), (3, 2)], ids=str)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("output", ["categorical", "gaussian", "bernoulli"])
def test_positions(base: str, output: str, positions, reduction: str) -> None:
    model = chain(base, output)
    x = inputs(model, 2, positions)
    case = OUTPUTS[output]
    loss = case.loss_for(model(x).detach(), reduction)
    blocks = BLOCKS[len(base) % 3]
    options = {"mass": 0.2, "blocks": blocks, "reduction": reduction}
    compare(model, x, case.metric(), loss, **options)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("base", [b for b in BASES if not b.endswith(("wide", "tall"))])
@pytest.mark.parametrize("kind", [Twice, Tied])
def test_shared_weights(kind, base: str, blocks: str) -> None:
    model = kind(base, 3)
    loss = OUTPUTS["categorical"].loss_for(torch.zeros(3, 3))
    x = inputs(model, 3)
    compare(model, x, rm.output.Categorical(), loss, mass=0.1, blocks=blocks)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("n", [2, 20])
def test_branches(n: int, blocks: str) -> None:
    model = Branches(3)
    loss = OUTPUTS["categorical"].loss_for(torch.zeros(n, 3))
    x = torch.randn(n, 4)
    compare(model, x, rm.output.Categorical(), loss, mass=0.1, blocks=blocks)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("n", [2, 20])
@pytest.mark.parametrize("name", ["curved-biases", "scalars"])
def test_biases_on_manifolds_and_scalars(name: str, n: int, blocks: str) -> None:
    model = MODELS[name]()
    loss = OUTPUTS["categorical"].loss_for(torch.zeros(n, 3))
    x = inputs(model, n)
    compare(model, x, rm.output.Categorical(), loss, mass=0.1, blocks=blocks)


@pytest.mark.parametrize("blocks", BLOCKS)
@pytest.mark.parametrize("n", [2, 20])
def test_masses_by_name(n: int, blocks: str) -> None:
    model = chain("euclidean")
    mass = {
        "0.weight": (torch.tensor([0.1, 0.5, 2.0]), torch.tensor([1.0, 0.2, 3.0, 0.7])),
        "0.bias": 0.3,
        "2.weight": torch.rand(3, 3) + 0.1,
        "2.bias": 2.0,
    }
    loss = OUTPUTS["categorical"].loss_for(torch.zeros(n, 3))
    x = inputs(model, n)
    compare(model, x, rm.output.Categorical(), loss, mass=mass, blocks=blocks)


def test_random_rows() -> None:
    generator = torch.Generator()
    output = rm.output.Sampled(rm.output.Categorical(), 2, generator)
    model = chain("stiefel-tall")
    x = inputs(model, 4)
    loss = OUTPUTS["categorical"].loss_for(model(x).detach())
    generator.manual_seed(3)
    metric = linearise(model, x, output, loss, mass=0.1)
    generator.manual_seed(3)
    expected = dense_natural_gradient(model, output, x, loss, mass=0.1)
    assert_equal(metric.natural_gradient(), expected)


def test_without_an_output_metric_it_is_the_massed_base_gradient() -> None:
    model = chain("sphere")
    x = inputs(model, 4)
    metric = rm.LayerwiseMetric(model, None, mass=0.25)
    with metric.record():
        outputs = model(x)
    metric.backward(F.cross_entropy(outputs, torch.arange(4) % 3), outputs)
    found = metric.natural_gradient()
    weight = model[0].weight
    radial = (weight.grad * weight).sum(-1, keepdim=True) * weight
    torch.testing.assert_close(
        found["0.weight"], 4 * (weight.grad - radial).detach(), rtol=1e-13, atol=1e-14
    )
    torch.testing.assert_close(found["2.weight"], 4 * model[2].weight.grad)


def test_sum_of_gradient_and_covector() -> None:
    model = chain("stiefel-wide")
    x = inputs(model, 3)
    loss = OUTPUTS["categorical"].loss_for(model(x).detach())
    metric = linearise(model, x, rm.output.Categorical(), loss, mass=0.1)
    extra = {n: torch.randn_like(p).detach() for n, p in model.named_parameters()}
    extra = {n: e.as_subclass(Tensor) for n, e in extra.items()}

    def vectors(**options):
        solutions = metric.solve(**options).values()
        return {n: x for s in solutions for n, x in s.vectors.items()}

    alone = vectors(covector=extra, gradient=0.0)
    both = vectors(covector=extra, gradient=-2.0)
    for name, x in metric.natural_gradient().items():
        torch.testing.assert_close(both[name], alone[name] - 2.0 * x)
