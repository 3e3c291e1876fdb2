"""Parameters that the loss depends on and the metric does not measure."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm

Y = torch.arange(12) % 3


class Whole(nn.Module):
    """An encoder, a body that has the metric, a head, and a temperature."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 5)
        self.body = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 6))
        self.head = nn.Linear(6, 3)
        self.temperature = nn.Parameter(torch.tensor(1.5))

    def outside(self) -> list[Tensor]:
        return [p for n, p in self.named_parameters() if not n.startswith("body")]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("sampled", [False, True])
def test_metric_backward_replaces_loss_backward(static: bool, sampled: bool) -> None:
    torch.manual_seed(0)
    whole = Whole()
    output: rm.output.OutputMetric = rm.output.Euclidean()
    if sampled:
        output = rm.output.Sampled(output, gradient_rows=False)
    metric = rm.LayerwiseMetric(whole.body, output, mass=0.1, static_graph=static)
    for _ in range(5):
        x = torch.randn(12, 4)
        with metric.record():
            h = whole.body(whole.encoder(x))
        loss = F.cross_entropy(whole.head(h) * whole.temperature, Y)
        metric.backward(loss, h)
        found = {n: p.grad.clone() for n, p in whole.named_parameters()}
        whole.zero_grad()
        again = whole.head(whole.body(whole.encoder(x))) * whole.temperature
        F.cross_entropy(again, Y).backward()
        for name, parameter in whole.named_parameters():
            torch.testing.assert_close(found[name], parameter.grad)


def test_gradients_are_set_and_have_memory_of_their_own() -> None:
    torch.manual_seed(0)
    body, one, other = (
        nn.Linear(4, 3),
        nn.Parameter(torch.ones(3)),
        nn.Parameter(torch.arange(3.0)),
    )
    metric = rm.LayerwiseMetric(body, rm.output.Categorical(), mass=0.1)
    x = torch.randn(12, 4)
    for _ in range(2):
        with metric.record():
            z = body(x)
        # Both have the same derivative.
        metric.backward(F.cross_entropy(z + one + other, Y), z)
        torch.testing.assert_close(one.grad, other.grad)
        one.grad.zero_()
        assert other.grad.any()
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    with metric.record():
        z = body(x)
    metric.backward(F.cross_entropy(z + frozen, Y), z)
    assert frozen.grad is None


def test_an_error_leaves_them_alone() -> None:
    torch.manual_seed(0)
    body, scale = nn.Linear(4, 3), nn.Parameter(torch.ones(3))
    metric = rm.LayerwiseMetric(body, rm.output.Categorical(), mass=0.1)
    x = torch.randn(12, 4)
    with metric.record():
        z = body(x)
    metric.backward(F.cross_entropy(z * scale, Y), z)
    before = scale.grad
    with metric.record():
        z = body(x)
    with pytest.raises(rm.errors.NonFiniteError):
        metric.backward(F.cross_entropy(z * scale, Y) * torch.inf, z)
    assert scale.grad is before


def test_heads_that_take_turns() -> None:
    torch.manual_seed(0)
    body = nn.Linear(4, 6)
    heads = [nn.Linear(6, 3), nn.Linear(6, 3)]
    metric = rm.LayerwiseMetric(body, rm.output.Euclidean(), mass=0.1)
    for turn in (0, 1, 0, 0, 1):
        with metric.record():
            h = body(torch.randn(12, 4))
        metric.backward(F.cross_entropy(heads[turn](h), Y), h)
        assert all(p.grad is not None for p in heads[turn].parameters())
        assert all(p.grad is None for p in heads[1 - turn].parameters())
    # A pass without a loss, and what others put there, are no reason to take it away.
    kept = [p.grad for p in heads[1].parameters()]
    with metric.record():
        h = body(torch.randn(12, 4))
    metric.pull_back(h)
    assert all(p.grad is g for p, g in zip(heads[1].parameters(), kept, strict=True))
    heads[1].weight.grad = torch.ones(3, 6)
    with metric.record():
        h = body(torch.randn(12, 4))
    metric.backward(F.cross_entropy(heads[0](h), Y), h)
    assert torch.equal(heads[1].weight.grad, torch.ones(3, 6))
    assert heads[1].bias.grad is None
