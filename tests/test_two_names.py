"""A module with two names keeps its parameters, whatever calls it with other values."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import testing


def half_square(z: Tensor) -> Tensor:
    return 0.5 * (z - 1.0).square().sum(-1).mean()


def record(model: nn.Module, x: Tensor) -> None:
    rm.action.record_pass([model], x, half_square)


def residuals(model: nn.Module, x: Tensor) -> None:
    found = rm.action.record_pass([model], x, half_square)
    assert rm.action.kkt_residuals(found).largest < 1e-13


def sweep(model: nn.Module, x: Tensor) -> None:
    metric = rm.LayerwiseMetric(nn.Sequential(model), rm.output.Euclidean())
    rm.action.riccati_sweep(metric, x, torch.ones_like(x))


def check(model: nn.Module, x: Tensor) -> None:
    results = testing.check_module(
        model, x, output=rm.output.Euclidean(), loss=half_square, blocks="model"
    )
    assert [result for result in results if not result.passed] == []


@pytest.mark.parametrize("use", [record, residuals, sweep, check])
def test_the_parameters_stay_in_place(
    use: Callable[[nn.Module, Tensor], None],
) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(2, 2)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    weight, bias = layer.weight, layer.bias
    use(model, torch.randn(5, 2))
    assert layer.weight is weight
    assert layer.bias is bias
