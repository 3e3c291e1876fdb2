"""Metrics of functions of a model, against Jacobians written out."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.func import functional_call, jacrev, jvp

import riemannian_modules as rm
from riemannian_modules.errors import (
    EmptyBatchError,
    LinearizationError,
    NonFiniteError,
    NotRecordedError,
    OutputMetricError,
    ShapeError,
)
from riemannian_modules.functional import DifferentialOperator, FunctionalMetric
from riemannian_modules.output import Categorical, Euclidean, Gaussian, Sampled

SEEDS = st.integers(0, 2**31 - 1)


def network(inputs: int = 2, outputs: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 5), nn.Tanh(), nn.Linear(5, outputs))


def heat(net, z):
    """The residual of ``u_t = u_xx``."""
    along = torch.eye(2)
    u_t = jvp(net, (z,), (along[0],))[1]
    u_xx = jvp(lambda y: jvp(net, (y,), (along[1],))[1], (z,), (along[1],))[1]
    return u_t - u_xx


def boundary(net, z, target):
    return net(z)[0] - target


def flat(vectors, model) -> torch.Tensor:
    return torch.cat([vectors[n].reshape(-1) for n, _ in model.named_parameters()])


def jacobian(model, outputs) -> torch.Tensor:
    """``d outputs / d parameters`` with all examples at once, ``(entries, p)``."""
    point = {n: p.detach() for n, p in model.named_parameters()}
    found = jacrev(outputs)(point)
    count = outputs(point).numel()
    return torch.cat([found[n].reshape(count, -1) for n in point], 1)


def explicit(model, function, *examples):
    """The outputs as a function of the parameters, one example after the other."""

    def outputs(point):
        def net(x):
            return functional_call(model, point, (x,))

        return torch.stack(
            [function(net, *each) for each in zip(*examples, strict=True)]
        )

    return outputs


@given(seed=SEEDS, n=st.integers(1, 6), log_mass=st.floats(-4.0, 1.0))
def test_derivatives_of_a_network_give_the_dense_gauss_newton_step(seed, n, log_mass):
    torch.manual_seed(seed)
    model, z, mass = network(), torch.randn(n, 2), 10.0**log_mass
    metric = FunctionalMetric(model, heat, Euclidean(2.0), mass=mass)
    residuals = metric(z)
    metric.backward(residuals.square().mean(), residuals)
    J = jacobian(model, explicit(model, heat, z))
    r = residuals.detach().reshape(-1)
    G = mass * torch.eye(J.shape[1]) + 2.0 / n * J.mT @ J
    gradient = 2.0 / n * J.mT @ r
    grads = {name: p.grad for name, p in model.named_parameters()}
    torch.testing.assert_close(flat(grads, model), gradient, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        flat(metric.natural_gradient(), model),
        torch.linalg.solve(G, gradient),
        rtol=1e-8,
        atol=1e-12,
    )


OUTPUTS = {
    "categorical": (3, Categorical(), lambda z: z.logsumexp(-1).sum() - z[:, 0].sum()),
    "euclidean": (2, Euclidean(), lambda z: 0.5 * (z - 1.0).square().sum()),
    "gaussian": (
        2,
        Gaussian(torch.tensor([[2.0, 0.5], [0.5, 1.0]])),
        lambda z: 0.5 * (z.square() @ torch.tensor([0.3, 0.7])).sum(),
    ),
}


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("kind", OUTPUTS)
def test_a_plain_forward_pass_gives_the_layerwise_metric(kind, reduction, blocks):
    width, output, loss = OUTPUTS[kind]
    first = rm.nn.Linear(4, 3, manifold=rm.manifolds.Stiefel())
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(3, width))
    x = torch.randn(5, 4)
    scale = 0.2 if reduction == "mean" else 1.0
    common = {"mass": 0.03, "blocks": blocks, "reduction": reduction}
    expected = rm.LayerwiseMetric(model, output, **common)
    with expected.record():
        z = model(x)
    expected.backward(scale * loss(z), z)
    theirs = {n: p.grad.clone() for n, p in model.named_parameters()}
    metric = FunctionalMetric(model, lambda net, one: net(one), output, **common)
    values = metric(x)
    metric.backward(scale * loss(values), values)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name])
    steps, reference = metric.natural_gradient(), expected.natural_gradient()
    for name in reference:
        torch.testing.assert_close(steps[name], reference[name], rtol=1e-9, atol=1e-11)
    for name, block in expected.blocks.items():
        torch.testing.assert_close(metric.blocks[name].to_dense(), block.to_dense())


@given(seed=SEEDS, n=st.integers(1, 4), m=st.integers(1, 4))
def test_the_rows_of_several_sets_stand_under_each_other(seed, n, m):
    torch.manual_seed(seed)
    model, z, edge, target = network(), torch.randn(n, 2), torch.randn(m, 2), None
    target = torch.randn(m)
    metric = FunctionalMetric(
        model,
        {"inside": heat, "edge": boundary},
        {"inside": Euclidean(2.0), "edge": Euclidean(6.0)},
        mass=0.1,
    )
    values = metric({"inside": z, "edge": (edge, target)})
    loss = values["inside"].square().mean() + 3.0 * values["edge"].square().mean()
    metric.backward(loss, values)
    inside = jacobian(model, explicit(model, heat, z))
    outside = jacobian(model, explicit(model, boundary, edge, target))
    J = torch.cat([(2.0 / n) ** 0.5 * inside, (6.0 / m) ** 0.5 * outside])
    y = torch.cat(
        [
            (2.0 / n) ** 0.5 * values["inside"].detach().reshape(-1),
            (6.0 / m) ** 0.5 * values["edge"].detach(),
        ]
    )
    G = 0.1 * torch.eye(J.shape[1]) + J.mT @ J
    torch.testing.assert_close(
        flat(metric.natural_gradient(), model),
        torch.linalg.solve(G, J.mT @ y),
        rtol=1e-8,
        atol=1e-12,
    )


def test_sampled_rows_leave_the_gradient_exact():
    model, x = network(3, 4), torch.randn(6, 3)
    metric = FunctionalMetric(
        model, lambda net, one: net(one), Sampled(Categorical(), probes=1), mass=0.5
    )
    values = metric(x)
    labels = torch.arange(6) % 4
    metric.backward(nn.functional.cross_entropy(values, labels), values)
    expected = torch.autograd.grad(
        nn.functional.cross_entropy(model(x), labels), list(model.parameters())
    )
    grads = [p.grad for p in model.parameters()]
    torch.testing.assert_close(grads, list(expected))
    (block,) = metric.blocks.values()
    steps = metric.natural_gradient()
    for name, covector in block.flat(steps).items():
        torch.testing.assert_close(covector, model.get_parameter(name).grad)


@given(seed=SEEDS)
def test_bend_is_the_second_derivative_along_a_line(seed):
    torch.manual_seed(seed)
    model, z = network(), torch.randn(4, 2)
    metric = FunctionalMetric(model, heat, Euclidean(3.0), reduction="sum")
    values = metric(z)
    metric.backward(values.square().sum(), values)
    direction = {n: torch.randn_like(p) for n, p in model.named_parameters()}
    outputs = explicit(model, heat, z)
    point = {n: p.detach() for n, p in model.named_parameters()}

    def line(t):
        return outputs({n: w + t * direction[n] for n, w in point.items()})

    second = jacrev(jacrev(line))(torch.zeros(()))
    expected = 3.0**0.5 * second.reshape(-1)
    exact, near = metric.bend(direction), metric.bend(direction, 1e-3)
    torch.testing.assert_close(exact, expected, rtol=1e-9, atol=1e-10)
    assert float((near - expected).norm()) < 1e-3 * (1.0 + float(expected.norm()))


def test_chunks_change_nothing():
    model, z = network(), torch.randn(7, 2)
    steps = []
    for chunk_size in (None, 3):
        metric = FunctionalMetric(model, heat, chunk_size=chunk_size)
        values = metric(z)
        metric.backward(values.square().mean(), values)
        steps.append(flat(metric.natural_gradient(), model))
    torch.testing.assert_close(*steps, rtol=1e-12, atol=1e-14)


def ready(**options):
    model = network()
    return model, FunctionalMetric(model, heat, **options)


def test_outputs_are_good_for_one_pass_and_for_their_own_metric():
    _, metric = ready()
    values = metric(torch.randn(3, 2))
    with pytest.raises(NotRecordedError, match="outputs of the last call"):
        metric.backward(values.sum(), values.clone())
    metric.backward(values.square().sum(), values)
    with pytest.raises(NotRecordedError, match="outputs of the last call"):
        metric.backward(values.square().sum(), values)


def test_a_penalty_in_the_loss_is_refused():
    model, metric = ready()
    values = metric(torch.randn(3, 2))
    penalty = sum(p.square().sum() for p in model.parameters())
    with pytest.raises(LinearizationError, match="other than through the outputs"):
        metric.backward(values.square().mean() + penalty, values)
    assert all(p.grad is None for p in model.parameters())
    assert metric.version == 0


def test_parameters_past_the_first_argument_are_refused():
    model, outside = network(), nn.Parameter(torch.tensor(2.0))
    model.nu = nn.Parameter(torch.tensor(2.0))
    functions = {
        "'nu'": lambda net, z: model.nu * net(z),
        r"'\d\.(weight|bias)'": lambda _, z: model(z) - z[0],
        r"of shape \(\) outside the model": lambda net, z: outside * net(z),
        "'nu'.*Parameters": lambda net, z: model.nu * jacrev(net)(z)[0],
    }
    for message, function in functions.items():
        metric = FunctionalMetric(model, function)
        values = metric(torch.randn(3, 2))
        with pytest.raises(LinearizationError, match=message):
            metric.backward(values.square().mean(), values)
        assert metric.version == 0
    outside.requires_grad_(False)
    model.nu.requires_grad_(False)
    metric = FunctionalMetric(model, lambda net, z: model.nu * outside * net(z))
    values = metric(torch.randn(3, 2))
    metric.backward(values.square().mean(), values)


LATE = {
    "factor": lambda net, z, nu: nu * net(z),
    "summand": lambda net, z, nu: net(z) + nu,
    "derivatives": lambda net, z, nu: nu * jacrev(net)(z)[0],
    "forwards": lambda net, z, nu: (net(z) + nu).expand(40),
    # torch maps it wrongly, so that it is differentiated example by example.
    "loop": lambda net, z, nu: torch.cdist(net(z)[None], torch.ones(3, 1)) + nu,
}


@pytest.mark.filterwarnings("ignore:torch.func.vmap gives other")
@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("name", [*LATE, "structured"])
def test_parameters_that_come_in_later_are_refused(name, chunk_size):
    model = network()
    model.nu = nn.Parameter(torch.tensor(2.0))
    passes = []

    def nu():
        return model.nu if len(passes) == 2 else 2.0

    def function(net, z):
        return LATE[name](net, z, nu())

    if name == "structured":
        function = DifferentialOperator(lambda u, z: nu() * u.d(0))
    metric = FunctionalMetric(model, function, chunk_size=chunk_size)
    for _ in range(2):
        values = metric(torch.randn(5, 2))
        metric.backward(values.square().mean(), values)
        passes.append(values)
    values = metric(torch.randn(5, 2))
    with pytest.raises(LinearizationError, match="on the parameter 'nu'"):
        metric.backward(values.square().mean(), values)
    assert metric.version == 2


@pytest.mark.parametrize("structured", [False, True])
def test_outputs_without_parameters_have_rows_of_zeros(structured):
    model, function = network(), lambda _, z: 2.0 * z
    if structured:
        function = DifferentialOperator(function)
    metric = FunctionalMetric(model, function)
    for _ in range(2):
        values = metric(torch.randn(3, 2))
        metric.backward(values.square().mean(), values)
    for parameter in model.parameters():
        assert torch.equal(parameter.grad, torch.zeros_like(parameter))
    assert all(not x.any() for x in metric.natural_gradient().values())


def test_examples_that_do_not_fit_are_refused():
    _, metric = ready()
    with pytest.raises(EmptyBatchError, match="there are none"):
        metric(torch.zeros(0, 2))
    with pytest.raises(ShapeError, match="same first dimension"):
        metric(torch.zeros(3, 2), torch.zeros(4))
    with pytest.raises(ShapeError, match="same first dimension"):
        metric()
    pair = FunctionalMetric(network(), {"a": heat, "b": heat})
    with pytest.raises(ShapeError, match="one dictionary"):
        pair(torch.zeros(3, 2))
    with pytest.raises(ShapeError, match=r"examples for \['a'\]"):
        pair({"a": torch.zeros(3, 2)})
    with pytest.raises(OutputMetricError, match="same keys"):
        FunctionalMetric(network(), {"a": heat}, {"b": Euclidean()})


def test_values_that_are_not_finite_are_refused_by_example():
    model = network()
    metric = FunctionalMetric(model, lambda net, z: net(z) / z[0])
    z = torch.ones(4, 2)
    z[2] = 0.0
    with pytest.raises(NonFiniteError, match="example 2 of 4"):
        metric(z)
    values = metric(torch.ones(4, 2))
    with pytest.raises(NonFiniteError, match="the loss is"):
        metric.backward(values.sum() * float("inf"), values)
    assert metric.version == 0


@pytest.mark.parametrize("structured", [None, True, False])
def test_common_slips_are_named(structured):
    model, z = network(), torch.randn(3, 2)

    def made(function):
        if structured is None:
            return lambda net, z: function(net(z), z)
        operator = rm.functional.DifferentialOperator
        return operator(lambda u, z: function(u.value, z), structured=structured)

    metric = FunctionalMetric(model, made(lambda u, z: (u, z)))
    with pytest.raises(ShapeError, match="the function returns a tuple"):
        metric(z)
    metric = FunctionalMetric(model, made(lambda u, z: u))
    for wrong in (z.float(), torch.ones(3, 2, dtype=torch.long)):
        with pytest.raises(TypeError, match=r"convert the examples with \.to"):
            metric(wrong)
    values = metric(z)
    with pytest.raises(TypeError, match="the loss is a float"):
        metric.backward(1.0, values)
    with pytest.raises(TypeError, match="the loss is a NoneType"):
        metric.backward(None, values)
    with pytest.raises(OutputMetricError, match="takes no weights of terms"):
        metric.backward(values.square().mean(), values, weights=torch.ones(3))
    assert metric.version == 0
    metric.backward(values.square().mean(), values)


def test_an_error_of_the_function_is_left_as_it_is():
    def failing(net, z, number):
        raise RuntimeError("made up")

    with pytest.raises(RuntimeError, match=r"^made up$"):
        FunctionalMetric(network(), failing)(torch.randn(3, 2), torch.ones(3))


@pytest.mark.parametrize("output", [[Euclidean(), Euclidean()], (Euclidean(),)])
def test_several_output_metrics_need_names(output):
    with pytest.raises(OutputMetricError, match="each function has one output metric"):
        FunctionalMetric(network(), heat, output)


def test_bending_needs_a_pass():
    _, metric = ready()
    with pytest.raises(NotRecordedError, match="backward"):
        metric.bend({})


def test_masses_and_version_are_its_state():
    model, metric = ready(mass={"*.weight": 0.5, "*.bias": 2.0})
    values = metric(torch.randn(3, 2))
    metric.backward(values.square().mean(), values)
    other = FunctionalMetric(model, heat)
    other.load_state_dict(metric.state_dict())
    assert other.version == 1
    assert other.state_dict() == metric.state_dict()
