"""Functions of named parameters instead of a network."""

import geoopt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.func import jacrev

import riemannian_modules as rm
from riemannian_modules.errors import ShapeError
from riemannian_modules.functional import FunctionalMetric, Parameters, of_batch


def oscillation(p, t, seen):
    """A long output of few parameters."""
    return (
        p["height"] * torch.exp(-p["rates"][0] * t) * (p["rates"][1] * t).cos() - seen
    )


@settings(max_examples=10)
@given(seed=st.integers(0, 2**31 - 1), times=st.sampled_from([2, 9]))
def test_few_parameters_and_many_give_the_dense_step(seed, times):
    """By forward mode where an example has more outputs than there are parameters."""
    torch.manual_seed(seed)
    model = Parameters(rates=torch.rand(2), height=torch.rand(1))
    t, seen = torch.rand(3, times), torch.randn(3, times)
    metric = FunctionalMetric(model, oscillation, rm.output.Euclidean(2.0), mass=0.1)
    values = metric(t, seen)
    metric.backward(values.square().sum(1).mean(), values)
    point = {name: p.detach() for name, p in model.named_parameters()}
    found = jacrev(lambda p: oscillation(p, t, seen))(point)
    J = torch.cat([found[n].reshape(3 * times, -1) for n in point], 1)
    y = values.detach().reshape(-1)
    G = 0.1 * torch.eye(3) + 2.0 / 3.0 * J.mT @ J
    expected = torch.linalg.solve(G, 2.0 / 3.0 * J.mT @ y)
    step = metric.natural_gradient()
    torch.testing.assert_close(torch.cat([step[n] for n in point]), expected)


def test_few_parameters_and_numbers_as_outputs():
    torch.manual_seed(0)
    model, t = Parameters(k=torch.tensor(0.7)), torch.rand(6)
    output = rm.output.Sampled(rm.output.Euclidean(), probes=3)
    metric = FunctionalMetric(model, lambda p, t: (p["k"] * t).exp() - 2.0, output)
    values = metric(t)
    metric.backward(0.5 * values.square().mean(), values)
    expected = (values.detach() * t * (0.7 * t).exp()).mean()
    torch.testing.assert_close(model["k"].grad, expected)


def test_a_network_and_a_coefficient_together():
    """The coefficient of ``u' = -c u`` is found from what u is at some points."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    rate = geoopt.ManifoldParameter(torch.tensor([0.3]), rm.manifolds.Positive())
    model = Parameters(net=net, rate=rate)

    def equation(p, t):
        slope = torch.func.jvp(p["net"], (t,), (torch.ones_like(t),))[1]
        return slope + p["rate"] * p["net"](t)

    def data(p, t, seen):
        return p["net"](t) - seen

    metric = FunctionalMetric(
        model,
        {"equation": equation, "data": data},
        {"equation": rm.output.Euclidean(2.0), "data": rm.output.Euclidean(2.0)},
    )
    optimizer = rm.optim.LevenbergMarquardt(metric)
    t = torch.linspace(0.0, 2.0, 15).unsqueeze(1)
    examples = {"equation": t, "data": (t[::3], (-1.3 * t[::3]).exp())}

    def loss(values):
        return sum(each.square().mean() for each in values.values())

    for _ in range(30):
        values = metric(examples)
        metric.backward(loss(values), values)
        optimizer.step(lambda: loss(metric(examples)))
    assert abs(rate.item() - 1.3) < 1e-3


def test_what_members_share_is_one_parameter():
    layer = nn.Linear(2, 2, bias=False)
    model = Parameters(first=layer, second=nn.Sequential(layer, nn.Tanh()))
    x = torch.randn(4, 2)
    metric = FunctionalMetric(model, lambda p, x: p["second"](p["first"](x)))
    values = metric(x)
    metric.backward(0.5 * values.square().sum(1).mean(), values)
    outputs = layer(layer(x)).tanh()
    loss = 0.5 * outputs.square().sum(1).mean()
    (expected,) = torch.autograd.grad(loss, [layer.weight])
    torch.testing.assert_close(layer.weight.grad, expected)


def test_a_function_of_a_batch_is_one_of_an_example():
    model, x = Parameters(w=torch.randn(3)), torch.randn(5, 3)
    whole = of_batch(lambda p, x: x @ p["w"])
    torch.testing.assert_close(FunctionalMetric(model, whole)(x), x @ model["w"])
    mean = FunctionalMetric(model, of_batch(lambda p, x: (x @ p["w"]).mean()))
    with pytest.raises(ShapeError, match="without sum or mean"):
        mean(x)


def test_members_are_real_tensors_or_modules():
    for wrong in (1.0, "net", torch.tensor([1, 2])):
        with pytest.raises(TypeError, match="holds tensors of real numbers"):
            Parameters(wrong=wrong)  # type: ignore[arg-type]
    model = Parameters(w=torch.ones(2))
    with pytest.raises(KeyError, match="there are"):
        model["v"]
    assert model()["w"] is model["w"]
