"""Captured steps of other metrics, under autocast, and of tables."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured_cases import Training, same_bits, training
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import NotCapturedWarning

OLD = torch.__version__.startswith("2.6.")


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 5), nn.Tanh(), nn.Linear(5, 1))


def slope(net: Any, x: Tensor) -> Tensor:
    return torch.func.jacrev(net)(x)[0] - x.cos()


def operator() -> Any:
    return rm.functional.DifferentialOperator(lambda u, x: u.laplacian() + 4 * u.value)


def functional(function: Callable[[], Any], **options: Any) -> Callable[[], Training]:
    def build() -> Training:
        model = net()
        metric = rm.functional.FunctionalMetric(model, function(), mass=1e-2)
        optimizer = rm.optim.RiemannianSGD(metric, **options)

        def step(points: Tensor) -> Tensor:
            residuals = metric(points)
            loss = 0.5 * residuals.square().mean()
            metric.backward(loss, residuals)
            optimizer.step()
            return loss

        def batch(index: int) -> tuple[Tensor]:
            generator = torch.Generator().manual_seed(index)
            return (torch.rand(7, 1, generator=generator),)

        return Training(model, metric, optimizer, step, batch)

    return build


@pytest.mark.parametrize("lr", [None, 0.5])
def test_functional_metrics(lr: float | None) -> None:
    if not OLD:
        same_bits(functional(lambda: slope, lr=lr))
        return
    # There torch.func makes tensors that no mode sees.
    with pytest.warns(NotCapturedWarning, match="another one in each step"):
        same_bits(functional(lambda: slope, lr=lr), replayed=0)


# Whether they can be captured is up to the streams; the bits are the same anyway.
@pytest.mark.filterwarnings("ignore::riemannian_modules.errors.NotCapturedWarning")
def test_differential_operators() -> None:
    same_bits(functional(operator), 14, replayed=-1)


@pytest.mark.parametrize("outside", [True, False])
def test_autocast(outside: bool) -> None:
    def cast(model: nn.Module, metric: Any, optimizer: Any) -> Callable[..., Any]:
        def step(x: Tensor, y: Tensor) -> Tensor:
            with metric.record(), torch.autocast("cpu", torch.bfloat16):
                outputs = model(x)
            loss = F.cross_entropy(outputs.float(), y)
            metric.backward(loss, outputs)
            optimizer.step()
            return loss

        def around(x: Tensor, y: Tensor) -> Tensor:
            with torch.autocast("cpu", torch.bfloat16):
                return step(x, y)

        return step if not outside else around

    same_bits(training(dtype=torch.float32, make_step=cast))


def test_autocast_around_the_captured_step() -> None:
    seen = []
    for captured in (False, True):
        torch.manual_seed(0)
        built = training(dtype=torch.float32)()
        step = built.step
        if captured:
            step = rm.optim.CapturedStep(built.optimizer, built.step)
        losses = []
        for index in range(20):
            with torch.autocast("cpu", torch.bfloat16, enabled=index % 2 == 1):
                losses.append(step(*built.batch(index)).item())
        seen.append(losses)
    assert seen[0] == seen[1]
    assert step.replayed == 20 - 1 - 6 - 6


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(self.table(x).mean(1))
        return z


def lookups(index: int, rows: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(index)
    order = torch.randperm(7, generator=generator)[:rows]
    x = order.repeat(6)[:18].view(6, 3)
    return x, torch.randint(3, (6,), generator=generator)


def test_tables() -> None:
    # How many rows are looked up is a shape, and may not differ.
    same_bits(training(Table, batch=lambda index: lookups(index, 5)))
    build = training(Table, batch=lambda index: lookups(index, 3 + index % 4))
    with pytest.warns(NotCapturedWarning, match="differs"):
        same_bits(build, 14, replayed=0)


def test_tables_with_other_rows_later() -> None:
    def batch(index: int) -> tuple[Tensor, Tensor]:
        return lookups(index, 4 if index in (8, 10) else 5)

    same_bits(training(Table, batch=batch), 12, replayed=3)
