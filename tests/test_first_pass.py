"""What the first pass through a graph costs, and that it looks as sharply as before."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import riemannian_modules as rm
from riemannian_modules import explore, linearize


class Adapted(nn.Module):
    """A frozen convolution and two trained factors, as everybody writes it."""

    def __init__(self, channels: int, rank: int = 2) -> None:
        super().__init__()
        self.inner = nn.Conv2d(channels, channels, 3, 1, 1).requires_grad_(False)
        self.a = nn.Parameter(0.1 * torch.randn(rank, channels, 3, 3))
        self.b = nn.Parameter(0.1 * torch.randn(channels, rank, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        added = functional.conv2d(functional.conv2d(x, self.a, padding=1), self.b)
        return self.inner(x) + added


def adapted(count: int) -> nn.Sequential:
    layers: list[nn.Module] = [nn.Conv2d(1, 4, 3, 2, 1)]
    for _ in range(count):
        layers += [nn.Tanh(), Adapted(4)]
    return nn.Sequential(
        *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
    )


@pytest.mark.parametrize("count", [2, 5])
def test_modules_to_replay_are_found_in_one_round_and_asked_once(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rounds, asked = [], []
    assemble, explained = linearize.assemble, linearize.explained

    def counted(*args: Any) -> Any:
        rounds.append(len(args[1]))
        return assemble(*args)

    def told(job: Any, call: Any) -> Any:
        asked.append((job.entry, job.names))
        return explained(job, call)

    monkeypatch.setattr(explore, "assemble", counted)
    monkeypatch.setattr(linearize, "explained", told)
    torch.manual_seed(0)
    model = adapted(count)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    x = torch.randn(6, 1, 8, 8)
    with metric.record():
        outputs = model(x)
    metric.backward(outputs.square().sum(), outputs)
    assert len(rounds) == 2
    # Each adapted layer by two rules, the other two layers by their own, all once.
    assert len(asked) == 2 * count + 2 == len(set(asked))
