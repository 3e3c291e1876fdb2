"""What torch.func.vmap differentiates wrongly: autograd has the last word."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import riemannian_modules as rm

torch_vmap_is_wrong_for_them = {"cdist"}


class LogDet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        matrix = torch.sin(x @ self.w).view(-1, 2, 2) + 2.0 * torch.eye(2).to(x)
        return torch.linalg.slogdet(matrix)[1].unsqueeze(1)


class Solve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2) + 3.0 * torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.w.expand(len(x), 2, 2)
        return torch.linalg.solve(matrix, x.unsqueeze(-1)).squeeze(-1)


class Centers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, self.w))


def equilibrium() -> nn.Module:
    inner = nn.Linear(3, 3)
    inner.weight.data.mul_(0.3)
    both = rm.nn.Join(nn.Linear(2, 3), inner)
    fixed = rm.nn.FixedPoint(rm.nn.Sequential(both, nn.Tanh()), 3)
    return nn.Sequential(fixed, nn.Linear(3, 2))


MODELS: dict[str, Any] = {
    "slogdet": LogDet,
    "solve": Solve,
    "cdist": Centers,
    "fixed point": equilibrium,
}


def rows_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The rows of the Euclidean metric by autograd, one output entry at a time."""
    z, parameters = model(x), dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for j in range(z.shape[1]):
        for i in range(len(x)):
            grads = torch.autograd.grad(
                z[i, j], list(parameters.values()), retain_graph=True
            )
            for name, grad in zip(parameters, grads, strict=True):
                found[name].append(grad.flatten() / len(x) ** 0.5)
    return {name: torch.stack(rows) for name, rows in found.items()}


def require_rows(metric: Any, x: Tensor) -> None:
    expected = rows_of(metric.model, x)
    for block in metric.blocks.values():
        for part in block.parts:
            found = part.factor.to_dense()
            torch.testing.assert_close(
                found.mT @ found,
                expected[part.name].mT @ expected[part.name],
                rtol=1e-9,
                atol=1e-11,
            )


@pytest.mark.parametrize("name", MODELS)
def test_a_layerwise_metric_has_the_rows_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), torch.randn(6, 2).double()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), blocks="tensor")
    for _ in range(2):
        with metric.record():
            z = model(x)
        metric.backward(0.5 * z.square().sum(1).mean(), z)
        require_rows(metric, x)


@pytest.mark.parametrize("examples", [1, 2, 6])
@pytest.mark.parametrize("name", MODELS)
def test_a_functional_metric_has_the_gradient_of_autograd(
    name: str, examples: int
) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), torch.randn(examples, 2).double()
    metric = rm.functional.FunctionalMetric(
        model,
        lambda net, x: net(x.unsqueeze(0))[0],
        rm.output.Euclidean(),
        blocks="tensor",
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            z = metric(x)
            metric.backward(0.5 * z.square().sum(1).mean(), z)
    told = [str(each.message) for each in said if "one by one" in str(each.message)]
    assert len(told) <= (name in torch_vmap_is_wrong_for_them)
    require_rows(metric, x)
    loss = 0.5 * model(x).square().sum(1).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, e in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, e, rtol=1e-9, atol=1e-12)


class Attention(nn.Module):
    """The derivative by the bias of its keys is nothing but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.q(x) @ self.k(x).mT / 4.0, -1)
        y: Tensor = (scores @ self.v(x)).mean(-2)
        return y


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("examples", [4, 9])
def test_rounding_is_no_reason_to_go_one_by_one(examples: int) -> None:
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(examples, 7, 16).double()
    metric = rm.functional.FunctionalMetric(
        model, lambda net, x: net(x), rm.output.Euclidean()
    )
    z = metric(x)
    metric.backward(0.5 * z.square().sum(1).mean(), z)
