"""Layers whose input is a parameter, or a buffer: steps and users write there."""

from contextlib import nullcontext

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.testing.reference import dense_natural_gradient

X = torch.randn(9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(9, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


class Query(nn.Module):
    """A layer applied to a learned query."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Parameter(torch.randn(1, 4))
        self.inner, self.head = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.head(
            torch.tanh(self.inner(self.q.expand(len(x), -1)) * x)
        )
        return scores


class Prompt(nn.Module):
    """Attention from learned tokens to the data, or among themselves."""

    def __init__(self, *, alone: bool = False) -> None:
        super().__init__()
        self.alone = alone
        self.q = nn.Parameter(torch.randn(1, 2, 4))
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        q = self.q.expand(len(x), -1, -1)
        other = q if self.alone else x.unsqueeze(1)
        tokens = self.attention(q, other, other)[0].flatten(1)
        scores: Tensor = self.head(tokens * torch.cat([x, x], 1))
        return scores


def backward(metric: rm.LayerwiseMetric, x: Tensor = X) -> None:
    with metric.record():
        z = metric.model(x)
    metric.backward(F.mse_loss(z, Y), z)


def metric_of(model: nn.Module, **options: object) -> rm.LayerwiseMetric:
    return rm.LayerwiseMetric(model, rm.output.Euclidean(2.0), mass=0.01, **options)


@pytest.mark.parametrize("make", [Query, Prompt, lambda: Prompt(alone=True)])
def test_the_step_is_the_dense_one(make) -> None:
    torch.manual_seed(0)
    model = make().double()
    metric = metric_of(model)
    backward(metric)
    wanted = dense_natural_gradient(
        model, rm.output.Euclidean(2.0), X, lambda z: F.mse_loss(z, Y), mass=0.01
    )
    found = metric.natural_gradient()
    for name, expected in wanted.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("make", [Query, Prompt])
def test_the_order_of_parameters_does_not_matter_to_geoopt(make) -> None:
    ends = []
    for order in (1, -1):
        torch.manual_seed(0)
        model = rm.geometrize(make().double(), {"*": rm.manifolds.Euclidean()})
        metric = metric_of(model)
        parameters = [*model.parameters()][::order]
        optimizer = geoopt.optim.RiemannianSGD(parameters, lr=1.0)
        backward(metric)
        optimizer.step()
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("make", "layer"), [(Query, "inner"), (Prompt, "attention")])
def test_rows_that_are_held_stay_as_they_were(make, layer: str) -> None:
    torch.manual_seed(0)
    metric = metric_of(make().double(), refresh=2)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5)
    backward(metric)
    block = metric.blocks[layer]
    vector = {p.name: torch.randn_like(p.space.point) for p in block.parts}
    before = block.image(vector)
    optimizer.step()
    assert torch.equal(block.image(vector), before)
    backward(metric)
    optimizer.step()


@pytest.mark.parametrize("frozen", [False, True])
def test_a_buffer_that_held_rows_need_is_not_refilled(frozen: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double()
    metric = metric_of(model, refresh=1 if frozen else 3)
    buffer = X.clone()
    backward(metric, buffer)
    metric.natural_gradient()
    with metric.frozen() if frozen else nullcontext():
        backward(metric, buffer.copy_(X.flip(0)))
    with pytest.raises(rm.errors.LinearizationError, match="changed in place"):
        metric.natural_gradient()


def test_a_trial_does_not_spoil_a_learned_input() -> None:
    torch.manual_seed(0)
    model = Prompt().double()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1e-6)
    optimizer = rm.optim.LevenbergMarquardt(metric)
    tried = []
    for _ in range(8):
        with metric.record():
            z = model(X)
        metric.backward((9 * z).sin().mean(), z)
        optimizer.step(lambda: (9 * model(X)).sin().mean())
        assert optimizer.report is not None
        tried.append(optimizer.report.trials)
    assert max(tried) > 1
