"""Passes that leave ``.grad`` empty: the same steps, without its products."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import riemannian_modules as rm
from riemannian_modules.factors import LinearFactor
from riemannian_modules.optim import (
    LevenbergMarquardt,
    LineSearch,
    RiemannianSGD,
    TrustRegion,
)

OUTPUTS = {
    "exact": rm.output.Categorical,
    "random": lambda: rm.output.Sampled(rm.output.Categorical(), gradient_rows=False),
    "gradient": lambda: rm.output.Sampled(rm.output.Categorical(), probes=0),
}
RULES = {
    "lr": {"lr": 0.1},
    "momentum": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "spring": {"lr": 0.1, "spring": 0.7},
    "clip": {"lr": 0.1, "clip": 0.2},
    "decay": {"lr": 0.1, "weight_decay": 0.1},
    "automatic": {},
}


class Problem:
    """A small classifier with a Stiefel layer, convolution and scale, and its batch."""

    def __init__(self, *, fill_grad: bool, output: str = "exact", **options):
        torch.manual_seed(0)
        self.model = nn.Sequential(
            nn.Conv1d(2, 3, 2),
            nn.Tanh(),
            nn.Flatten(),
            rm.nn.Linear(9, 5, manifold=rm.manifolds.Stiefel()),
            nn.PReLU(),
            nn.Linear(5, 3),
        ).double()
        self.x = torch.randn(6, 2, 4, dtype=torch.float64)
        self.y = torch.randint(3, (6,))
        self.metric = rm.LayerwiseMetric(
            self.model, OUTPUTS[output](), mass=0.1, fill_grad=fill_grad, **options
        )

    def loss(self):
        return F.cross_entropy(self.model(self.x), self.y)

    def backward(self, part=slice(None), **options):
        with self.metric.record():
            z = self.model(self.x[part])
        self.metric.backward(F.cross_entropy(z, self.y[part]), z, **options)

    def values(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def grads(self):
        return [parameter.grad for parameter in self.model.parameters()]


def both(output="exact", **options):
    return [Problem(fill_grad=fill, output=output, **options) for fill in (True, False)]


def same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("blocks", ["layer", "model"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_steps_are_the_same(output, rule, blocks):
    numbers = []
    filled, empty = both(output, blocks=blocks)
    for problem in (filled, empty):
        optimizer = RiemannianSGD(problem.metric, **RULES[rule])
        for step in range(4):
            torch.manual_seed(step)
            problem.backward()
            optimizer.step()
        parts = optimizer.report.numbers(spectrum=True).values()
        numbers.append(torch.tensor([n for part in parts for n in part.values()]))
        assert all(grad is None for grad in problem.grads()) == (problem is empty)
    same(empty.values(), filled.values())
    torch.testing.assert_close(numbers[1], numbers[0], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("make", [LevenbergMarquardt, LineSearch, TrustRegion])
def test_trial_steps_are_the_same(make):
    filled, empty = both()
    for problem in (filled, empty):
        optimizer = make(problem.metric)
        for _ in range(3):
            problem.backward()
            optimizer.step(problem.loss)
    same(empty.values(), filled.values())


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_step_makes_one_product_for_each_weight(output, monkeypatch):
    model = nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))
    calls = []
    pull = LinearFactor.pull

    def counted(self, cotangent):
        calls.append(self.shape)
        return pull(self, cotangent)

    monkeypatch.setattr(LinearFactor, "pull", counted)
    counts = []
    for fill in (True, False):
        metric = rm.LayerwiseMetric(
            model, OUTPUTS[output](), mass=0.1, solver="cholesky", fill_grad=fill
        )
        optimizer = RiemannianSGD(metric, lr=0.01)
        for _ in range(3):
            calls.clear()
            with metric.record():
                z = model(torch.randn(5, 8))
            metric.backward(F.cross_entropy(z, torch.arange(5) % 3), z)
            optimizer.step()
        counts.append(len(calls))
    assert counts == [4, 2]


@pytest.mark.parametrize("lr", [0.1, None])
def test_what_is_put_into_grad_counts(lr):
    filled, empty = both()
    for problem in (filled, empty):
        optimizer = RiemannianSGD(problem.metric, lr=lr)
        for _ in range(2):
            problem.backward()
            for parameter in problem.model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step()
    same(empty.values(), filled.values())


def test_some_of_them_put_into_grad_count():
    filled, empty = both()
    for problem in (filled, empty):
        problem.backward()
        problem.model[0].weight.grad = torch.ones_like(problem.model[0].weight)
        RiemannianSGD(problem.metric, lr=0.1).step()
    same(empty.values(), filled.values())


def test_taking_gradients_away_changes_nothing():
    problem = Problem(fill_grad=False)
    optimizer = RiemannianSGD(problem.metric, lr=0.1)
    problem.backward()
    expected = problem.metric.natural_gradient()
    before = problem.values()
    optimizer.zero_grad()
    optimizer.step()
    moved = problem.values()["5.weight"] - before["5.weight"]
    torch.testing.assert_close(moved, -0.1 * expected["5.weight"])


def test_gradients_of_before_are_taken_away():
    problem = Problem(fill_grad=False)
    problem.loss().backward()
    problem.backward()
    assert all(grad is None for grad in problem.grads())


def test_parameters_outside_the_model_have_their_gradient():
    problem = Problem(fill_grad=False)
    scale = nn.Parameter(torch.ones((), dtype=torch.float64))
    with problem.metric.record():
        z = problem.model(problem.x)
    loss = F.cross_entropy(z * scale, problem.y)
    expected = torch.autograd.grad(loss, scale, retain_graph=True)[0]
    problem.metric.backward(loss, z)
    torch.testing.assert_close(scale.grad, expected)


def test_a_batch_in_parts_and_held_rows():
    filled, empty = both()
    for problem in (filled, empty):
        optimizer = RiemannianSGD(problem.metric, lr=0.1)
        problem.backward(slice(2), accumulate=True)
        problem.backward(slice(2, 6))
        optimizer.step()
        with problem.metric.frozen():
            problem.backward()
        optimizer.step()
    same(empty.values(), filled.values())


def test_it_is_no_part_of_autocast():
    problem = Problem(fill_grad=False)
    problem.model.float()
    problem.x = problem.x.float()
    problem.backward()
    problem.backward()
    with torch.autocast("cpu", torch.bfloat16):
        gradient = problem.metric.gradients.of("5.weight")
    expected = torch.autograd.grad(problem.loss(), problem.model[5].weight)[0]
    torch.testing.assert_close(gradient, expected)
    assert not gradient.requires_grad


def test_the_tree_knows_the_gradient():
    filled, empty = both()
    for problem in (filled, empty):
        problem.backward()
    assert rm.nn.tree(empty.model, empty.metric) == rm.nn.tree(
        filled.model, filled.metric
    )


def test_copies_keep_it():
    problem = Problem(fill_grad=False)
    assert not problem.metric.of(Problem(fill_grad=True).model).gradients.fills


@pytest.mark.parametrize("fill_grad", [True, False])
@pytest.mark.parametrize("part", [0.0, 0.3])
def test_slopes_are_those_of_the_gradient(part, fill_grad):
    problem = Problem(fill_grad=fill_grad)
    optimizer = RiemannianSGD(problem.metric)
    for _ in range(3):
        with problem.metric.record():
            z = problem.model(problem.x)
        # The rows of the softmax metric explain nothing of a sum over classes.
        loss = F.cross_entropy(z, problem.y) + part * z.logsumexp(1).square().mean()
        parameters = dict(problem.model.named_parameters())
        gradient = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
        problem.metric.backward(loss, z)
        found = problem.metric.linearization
        assert found.residual is not None
        assert (found.rest is None) == (part == 0.0)
        optimizer.step()
        slopes = dict(zip(parameters, gradient, strict=True))
        for block in optimizer.report:
            expected = -sum((slopes[n] * u).sum() for n, u in block.steps.items())
            torch.testing.assert_close(
                block.predicted_decrease, float(expected), rtol=1e-9, atol=1e-13
            )
