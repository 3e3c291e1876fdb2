"""Derivatives carried through a network together, against torch.func."""

from contextlib import nullcontext

import geoopt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.jets import MUTANTS
from torch import nn

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError, ShapeError
from riemannian_modules.factors import BiasFactor, LinearFactor
from riemannian_modules.functional import DifferentialOperator, FunctionalMetric
from riemannian_modules.functional.elementwise import named
from riemannian_modules.functional.jet import TorchJet
from riemannian_modules.functional.orders import Orders
from riemannian_modules.functional.streams import Streams, lift

SEEDS = st.integers(0, 2**31 - 1)


class Elementwise(nn.Module):
    """An activation that is no module of torch."""

    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ACTIVATIONS = {
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    # torch differentiates its SiLU forwards once only.
    "silu": lambda: Elementwise(
        lambda x: F.silu(x) if isinstance(x, Streams) else x * x.sigmoid()
    ),
    "softplus": lambda: nn.Softplus(beta=2.0, threshold=1.0),
    "gelu": nn.GELU,
    "gelu-tanh": lambda: nn.GELU(approximate="tanh"),
    "logsigmoid": nn.LogSigmoid,
    "tanhshrink": nn.Tanhshrink,
    "sin": lambda: Elementwise(torch.sin),
    "cos": lambda: Elementwise(lambda x: x.cos()),
    "sinh": lambda: Elementwise(torch.sinh),
    "cosh": lambda: Elementwise(torch.cosh),
    "exp": lambda: Elementwise(torch.exp),
    "log": lambda: Elementwise(lambda x: torch.log(2.0 + x.square())),
    "sqrt": lambda: Elementwise(lambda x: (1.0 + x * x).sqrt()),
    "reciprocal": lambda: Elementwise(lambda x: 1.0 / (1.0 + x**2)),
    "quotient": lambda: Elementwise(lambda x: torch.sin(x) / (2.0 + torch.cos(x))),
    "pow": lambda: Elementwise(lambda x: torch.pow(x, 3) - 0.5 * x + 1.0),
    "atan": lambda: Elementwise(torch.atan),
    "erf": lambda: Elementwise(lambda x: 2.0 - torch.erf(x) / 2.0),
    "linear": lambda: Elementwise(lambda x: -x),
    "product": lambda: Elementwise(lambda x: x * torch.tanh(x)),
    "parts": lambda: Elementwise(
        lambda x: (
            torch.cat([x[..., :2].sin(), x[:, 2:] @ torch.eye(3)], -1)
            if isinstance(x, Streams)
            else torch.cat([x[..., :2].sin(), x[..., 2:] @ torch.eye(3)], -1)
        )
    ),
}


def all_terms(u, z):
    """Every derivative that is offered, and products of them."""
    last = u.inputs - 1
    first = u.value * u.d(0) + u.gradient().sum(-1)
    second = u.laplacian() - u.d(last, last) + 0.5 * u.d(0, last) * u.d(last)
    return first + second + u.laplacian(0) * z.sum()


def value(u, z, known):
    return u.value - known


OPERATORS = {
    "all": all_terms,
    "heat": lambda u, z: u.d(0) - u.d(u.inputs - 1, u.inputs - 1),
    "laplacian": lambda u, z: u.laplacian(),
    "gradient": lambda u, z: u.gradient().square().sum(-1),
    "mixed": lambda u, z: u.d(0, u.inputs - 1),
}


def network(activation: str, inputs: int, outputs: int = 1) -> nn.Sequential:
    make = ACTIVATIONS[activation]
    return nn.Sequential(
        nn.Linear(inputs, 5), make(), nn.Linear(5, 5), make(), nn.Linear(5, outputs)
    )


def metrics(model, function, z, edge, known, **options):
    """The same metric twice: structured, and by torch.func with stored rows."""
    found = []
    for structured in (True, False):
        functions = {"in": function, "on": value}
        metric = FunctionalMetric(
            model,
            {
                name: DifferentialOperator(each, structured=structured)
                for name, each in functions.items()
            },
            {"in": rm.output.Euclidean(2.0), "on": rm.output.Euclidean(6.0)},
            mass=0.1,
            **options,
        )
        values = metric({"in": z, "on": (edge, known)})
        loss = values["in"].square().mean() + 3.0 * values["on"].square().mean()
        metric.backward(loss, values)
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        found.append((metric, values, grads))
    return found


def require_equal(
    model, function, inputs, outputs=1, *, n=4, m=3, bending=False, **options
) -> None:
    z, edge = torch.randn(n, inputs), torch.randn(m, inputs)
    one, other = metrics(model, function, z, edge, torch.randn(m, outputs), **options)
    close = {"rtol": 1e-10, "atol": 1e-10}
    for mine, theirs in zip(one[1:], other[1:], strict=True):
        for name in theirs:
            scale = 1.0 + theirs[name].detach().abs().max()
            torch.testing.assert_close(
                mine[name].detach() / scale, theirs[name].detach() / scale, **close
            )
    for name, block in other[0].blocks.items():
        dense = block.to_dense()
        torch.testing.assert_close(
            one[0].blocks[name].to_dense() / dense.abs().max(),
            dense / dense.abs().max(),
            **close,
        )
    steps, reference = one[0].natural_gradient(), other[0].natural_gradient()
    for name in reference:
        torch.testing.assert_close(steps[name], reference[name], rtol=1e-8, atol=1e-10)
    if not bending:
        return
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    bends = [metric.bend(direction) for metric, *_ in (one, other)]
    scale = 1.0 + bends[1].abs().max()
    torch.testing.assert_close(bends[0] / scale, bends[1] / scale, **close)


@settings(max_examples=2)
@given(seed=SEEDS, inputs=st.integers(1, 3))
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_structured_factors_are_the_stored_ones(activation, seed, inputs):
    torch.manual_seed(seed)
    require_equal(network(activation, inputs), all_terms, inputs)


ARITHMETIC = {
    "x / 2": lambda x: x / 2.0,
    "div(x, 3)": lambda x: torch.div(x, 3.0),
    "2 / x": lambda x: 2.0 / (x.exp() + 1.0),
    "x / y": lambda x: x.sin() / (x * x + 1.0),
    "x - 1": lambda x: torch.tanh(x - 0.5) - 1.0,
    "1 - x": lambda x: torch.tanh(1.5 - x),
    "x - y": lambda x: x.sin() - x * x,
    "rsub(x, 1)": lambda x: torch.rsub(x.sin(), 1.0),
    "c - x": lambda x: torch.ones(4) - x.sin(),
    "c / x": lambda x: torch.ones(4) / (x.exp() + 1.0),
    "-x": lambda x: torch.neg(x.cos()) * 1.5,
    "input=": lambda x: torch.neg(input=torch.tanh(input=x)),
    "wider": lambda x: (x[..., :1] + torch.linspace(0.0, 1.0, 4)).sin(),
    "c - narrow": lambda x: torch.ones(4) - x[..., :1].sin(),
}


@pytest.mark.parametrize("name", ARITHMETIC)
def test_arithmetic_is_that_of_the_stored_rows(name):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 4), Elementwise(ARITHMETIC[name]), nn.Tanh(), nn.Linear(4, 1)
    )
    require_equal(model, all_terms, 2)


@settings(max_examples=2)
@given(seed=SEEDS, inputs=st.integers(1, 3), outputs=st.integers(1, 3))
@pytest.mark.parametrize("operator", OPERATORS)
def test_every_operator_and_several_outputs(operator, seed, inputs, outputs):
    torch.manual_seed(seed)
    model = network("tanh", inputs, outputs)
    require_equal(model, OPERATORS[operator], inputs, outputs, reduction="sum")


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mistakes_are_noticed(mutant, monkeypatch):
    name, wrong = MUTANTS[mutant]
    monkeypatch.setattr(Streams, name, wrong)
    with pytest.raises((AssertionError, LinearizationError)):
        require_equal(network("product", 2), all_terms, 2)


class Growing(nn.Module):
    """Takes a further layer from some pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = (nn.Linear(*s, bias=False) for s in ((2, 4), (4, 1)))
        self.further, self.grown = nn.Linear(4, 4), False

    def forward(self, x):
        h = torch.tanh(self.first(x))
        return self.last(torch.tanh(self.further(h)) if self.grown else h)


def test_another_graph_is_compared_again(monkeypatch):
    name, wrong = MUTANTS["biased"]  # right as long as there are no biases
    monkeypatch.setattr(Streams, name, wrong)
    model, z = Growing(), torch.randn(3, 2)
    metric = FunctionalMetric(model, DifferentialOperator(all_terms))
    for grown, refused in ((False, False), (False, False), (True, True)):
        model.grown = grown
        values = metric(z)
        with pytest.raises(LinearizationError) if refused else nullcontext():
            metric.backward(values.square().mean(), values)
    assert metric.version == 2


class Shared(nn.Module):
    """One layer twice, a skip connection and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.lift, self.inner = nn.Linear(2, 4), nn.Linear(4, 4, bias=False)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        h = torch.tanh(self.lift(x))
        h = h + torch.tanh(self.inner(h))
        return self.head(h * torch.sigmoid(self.inner(h)))


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_a_shared_layer_adds_up_its_uses(blocks):
    require_equal(Shared(), all_terms, 2, blocks=blocks, bending=True)


@pytest.mark.parametrize("manifold", [rm.manifolds.Stiefel(), rm.manifolds.Sphere()])
def test_weights_on_manifolds(manifold):
    model = nn.Sequential(
        nn.Linear(2, 5),
        nn.Tanh(),
        rm.nn.Linear(5, 4, manifold=manifold),
        nn.Tanh(),
        nn.Linear(4, 1),
    )
    require_equal(model, all_terms, 2, n=5)


def test_a_wide_network_is_never_multiplied_out():
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(2, 80), nn.Tanh(), nn.Linear(80, 80), nn.Tanh(), nn.Linear(80, 1)
    )
    z, edge = torch.randn(12, 2), torch.randn(3, 2)
    (mine, *_), (theirs, *_) = metrics(model, all_terms, z, edge, torch.zeros(3, 1))
    factors, dense = mine.linearization.factors, theirs.linearization.factors
    weight = factors["2.weight"]
    assert isinstance(weight, LinearFactor)
    assert isinstance(factors["2.bias"], BiasFactor)
    stored = weight.inputs.numel() + weight.cotangents.numel()
    assert stored < 15 * 80 * 80 / 4
    torch.testing.assert_close(weight.to_dense(), dense["2.weight"].to_dense())


def test_frozen_and_unused_parameters():
    model = network("tanh", 2)
    model[2].weight.requires_grad_(False)
    model[0].bias.requires_grad_(False)
    z = torch.randn(4, 2)
    steps = []
    for structured in (True, False):
        operator = DifferentialOperator(lambda u, z: u.d(0), structured=structured)
        metric = FunctionalMetric(model, operator)
        values = metric(z)
        metric.backward(0.5 * values.square().mean(), values)
        steps.append(metric.natural_gradient())
    assert set(steps[0]) == {"0.weight", "2.bias", "4.weight", "4.bias"}
    assert not steps[0]["4.bias"].any()
    for name in steps[0]:
        torch.testing.assert_close(steps[0][name], steps[1][name])


def test_losses_for_autograd_are_the_same_residuals():
    model, z = network("gelu", 2), torch.randn(6, 2)
    grads = []
    for structured in (True, False):
        operator = DifferentialOperator(all_terms, structured=structured)
        values = operator.residuals(model, z)
        grads.append(
            torch.autograd.grad(values.square().sum(), list(model.parameters()))
        )
    torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-10)


def test_penalised_sampled_and_float32():
    """A costate outside of the row span, and another data type."""
    model, z = network("tanh", 2).float(), torch.randn(5, 2, dtype=torch.float32)
    output = rm.output.Sampled(rm.output.Euclidean(), probes=1)
    metric = FunctionalMetric(model, DifferentialOperator(all_terms), output)
    values = metric(z)
    metric.backward(0.5 * values.square().mean(), values)
    operator = DifferentialOperator(all_terms, structured=False)
    loss = 0.5 * operator.residuals(model, z).square().mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        size = float(gradient.norm())
        assert float((parameter.grad - gradient).norm()) < 1e-4 * (1.0 + size)


# --- what is refused

OPERATOR = DifferentialOperator(lambda u, z: u.laplacian())


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x):
        return x * self.scale


class Power(nn.Module):
    """Starts at ``1^p``, whose derivative by p is zero."""

    def __init__(self, exponent) -> None:
        super().__init__()
        self.zero, self.exponent = nn.Linear(5, 1), exponent
        nn.init.zeros_(self.zero.weight)
        nn.init.zeros_(self.zero.bias)

    def forward(self, x):
        return torch.exp(self.zero(x)) ** self.exponent


class Constant(nn.Module):
    def forward(self, x):
        return torch.ones(3, 1)


def behind(*modules: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(2, 5), *modules)


def computing(function) -> nn.Sequential:
    return behind(Elementwise(function))


REFUSED = {
    "relu": (lambda: behind(nn.ReLU()), r"layer '1' \(ReLU\).*relu"),
    "exponent": (
        lambda: behind(Power(nn.Parameter(torch.tensor(2.0)))),
        r"'1' \(Power\).*exponent depends on parameters",
    ),
    "exponents": (
        lambda: behind(Power(torch.tensor([1.0, 2.0]))),
        r"'1' \(Power\).*several entries.*\(2,\)",
    ),
    "norm": (lambda: behind(nn.LayerNorm(5)), r"'1' \(LayerNorm\)"),
    "scale": (lambda: behind(Scaled()), r"'1'.*depends on parameters"),
    "inplace": (lambda: behind(nn.SiLU(inplace=True)), "inplace=True"),
    "method": (lambda: computing(lambda x: x.cumsum(-1)), r"\.cumsum"),
    "index": (lambda: computing(lambda x: x[0]), "index 0"),
    "mixed": (
        lambda: computing(lambda x: torch.cat([x, torch.ones(3, 1)], -1)),
        "cat along",
    ),
    "batch": (lambda: computing(lambda x: torch.cat([x, x])), "dimension 0"),
    "sum": (lambda: computing(lambda x: x + torch.ones(3, 1)), r"\(3, 1\)"),
    "keywords": (lambda: computing(lambda x: torch.cat(tensors=[x, x])), "cat with"),
    "left": (lambda: computing(lambda x: torch.eye(4) @ x), "matmul"),
    "detached": (lambda: behind(Constant()), "returns a Tensor"),
    "weight-norm": (
        lambda: nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(2, 5))),
        "parametrization",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_carried_is_named_with_the_remedy(name):
    make, message = REFUSED[name]
    model = make()
    hooks = [len(module._forward_pre_hooks) for module in model.modules()]
    z = torch.randn(3, 2)
    metric = FunctionalMetric(model, OPERATOR)

    def run():
        values = metric(z)
        metric.backward(values.square().mean(), values)

    with pytest.raises(LinearizationError, match=message) as caught:
        run()
    assert "structured=False" in str(caught.value)
    assert [len(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert metric.version == 0


def test_an_exponent_may_be_a_tensor_that_is_a_number():
    x, orders = torch.randn(3, 2), Orders((0, 1), ((((0, 0), 1.0),),))
    for exponent in (torch.tensor(3.0), torch.tensor([3.0])):
        found = lift(x, orders) ** exponent
        assert torch.equal(found.data, (lift(x, orders) ** 3.0).data)


def test_the_remedy_works():
    model = nn.Sequential(nn.Linear(2, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 1))
    operator = DifferentialOperator(lambda u, z: u.laplacian(), structured=False)
    metric = FunctionalMetric(model, operator)
    values = metric(torch.randn(3, 2))
    metric.backward(values.square().mean(), values)
    assert all(p.grad is not None for p in model.parameters())


def test_parameters_beside_the_network_are_refused():
    model = network("tanh", 2)
    model.nu = nn.Parameter(torch.ones(1))
    beside = FunctionalMetric(
        model, DifferentialOperator(lambda u, z: model.nu * u.d(0))
    )
    values = beside(torch.randn(3, 2))
    with pytest.raises(LinearizationError, match="otherwise than through its first"):
        beside.backward(values.square().mean(), values)


def test_orders_and_coordinates_that_are_not_there():
    z = torch.randn(3, 2)
    for function, error, message in (
        (lambda u, z: u.d(0, 0, 1), LinearizationError, "order 3"),
        (lambda u, z: u.d(2), ShapeError, "coordinates 0 to 1"),
        (lambda u, z: u.laplacian(-1), ShapeError, "coordinates 0 to 1"),
    ):
        metric = FunctionalMetric(network("tanh", 2), DifferentialOperator(function))
        with pytest.raises(error, match=message):
            metric(z)
    metric = FunctionalMetric(network("tanh", 2), OPERATOR)
    with pytest.raises(ShapeError, match=r"points of shape \(n, inputs\)"):
        metric(torch.randn(3))
    with pytest.raises(TypeError, match="function of a Jet"):
        DifferentialOperator(3.0)  # type: ignore[arg-type]


def test_a_laplacian_counts_every_coordinate_once():
    jet = TorchJet(lambda z: (z**2).sum(-1, keepdim=True), torch.ones(3))
    assert jet.laplacian().item() == 6.0
    assert jet.laplacian(0, 2, 0).item() == 4.0
    assert jet.d().item() == 3.0
    assert jet.gradient().tolist() == [[2.0, 2.0, 2.0]]


def test_every_named_function_has_its_derivatives():
    v = torch.tensor([0.3, 1.7])
    for name in ("tanh", "erf", "log", "sqrt", "reciprocal", "atan", "cosh"):
        function = getattr(torch, name)
        derivatives = named(name)
        assert derivatives is not None
        slope = torch.func.vmap(torch.func.grad(function))(v)
        second = torch.func.vmap(torch.func.grad(torch.func.grad(function)))(v)
        torch.testing.assert_close(derivatives(v, 2), [function(v), slope, second])
    assert named("relu") is None


def test_points_may_require_gradients():
    model, z = network("tanh", 2), torch.randn(3, 2, requires_grad=True)
    for structured in (True, False):
        operator = DifferentialOperator(all_terms, structured=structured)
        metric = FunctionalMetric(model, operator)
        values = metric(z)
        metric.backward(values.square().mean(), values)
        assert z.grad is None
        assert metric.bend(metric.natural_gradient()).requires_grad is False


def test_one_operator_for_points_of_different_dimensions():
    operator = DifferentialOperator(lambda u, z: u.laplacian() + u.d(u.inputs - 1))
    for inputs in (3, 2, 3, 1):
        model, z = network("tanh", inputs), torch.randn(4, inputs)
        expected = torch.func.vmap(operator, (None, 0))(model, z)
        torch.testing.assert_close(operator.residuals(model, z), expected)


# --- minibatches of points


def test_resampled_points_train_with_riemannian_sgd():
    torch.manual_seed(0)
    model = network("tanh", 1)
    metric = FunctionalMetric(
        model,
        {
            "in": DifferentialOperator(lambda u, z: u.d(0) - z.cos()),
            "on": DifferentialOperator(value),
        },
        {"in": rm.output.Euclidean(2.0), "on": rm.output.Euclidean(2.0)},
        mass=1e-2,
    )
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5)
    test = torch.linspace(0.0, 3.0, 50).unsqueeze(1)

    def error():
        with torch.no_grad():
            return float((model(test) - test.sin()).norm() / test.sin().norm())

    before = error()
    for _ in range(60):
        z = 3.0 * torch.rand(int(torch.randint(8, 13, ())), 1)
        values = metric({"in": z, "on": (torch.zeros(1, 1), torch.zeros(1, 1))})
        metric.backward(sum(each.square().mean() for each in values.values()), values)
        optimizer.step()
    assert error() < 0.05 < before


def test_a_euclidean_geoopt_parameter_is_a_parameter():
    model = network("tanh", 2)
    model[0].weight = geoopt.ManifoldParameter(
        model[0].weight.detach(), manifold=geoopt.Euclidean()
    )
    require_equal(model, all_terms, 2)
