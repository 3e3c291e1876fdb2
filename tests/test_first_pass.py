"""What the first pass through a graph costs, and that it looks as sharply as before."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import riemannian_modules as rm
from riemannian_modules import explore, linearize, probing
from riemannian_modules.carry import carry_to
from riemannian_modules.layout import Fitting, Layout, probe_masks, probes
from riemannian_modules.rules.job import explained


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
    assemble = linearize.assemble

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


# --- probes


@pytest.mark.parametrize("n", [*range(1, 40), 64, 100, 252, 253])
def test_of_any_two_examples_each_is_somewhere_without_the_other(n: int) -> None:
    masks = probe_masks(n, torch.device("cpu"))
    assert masks[0].all()
    others = masks[1:].double()
    alone = others.T @ (1.0 - others)
    assert (alone + torch.eye(n) > 0).all()
    # That is what makes a multiple of the first of their sum.
    assert len(others.sum(0).unique()) <= 1
    count = len(others)
    assert n == 1 or math.comb(count - 1, (count - 1) // 2) < n


def looked_at(carried: Tensor, masks: Tensor, *, at_once: int) -> Fitting:
    fitting = Fitting(carried.shape[1:], masks)
    for part in carried.split(at_once):
        fitting.see(part)
    return fitting


@pytest.mark.parametrize("at_once", [1, 3, 100])
def test_what_leaks_from_any_example_into_any_other_is_seen(at_once: int) -> None:
    n = 7
    masks = probe_masks(n, torch.device("cpu"))
    carried = probes(torch.zeros(n, 3, dtype=torch.float64), masks)
    clean = looked_at(carried, masks, at_once=at_once)
    assert clean.found == (Layout(), True)
    assert clean.is_linear()
    for source in range(n):
        for target in set(range(n)) - {source}:
            leak = carried.clone()
            leak[:, target, 2] += carried[:, source, 1] - carried[:, source, 0]
            assert looked_at(leak, masks, at_once=at_once).found == (None, False)


@pytest.mark.parametrize("layout", [Layout(1), Layout(0), Layout(0, major=False)])
def test_the_layout_is_the_only_one_that_fits(layout: Layout) -> None:
    n = 6
    masks = probe_masks(n, torch.device("cpu"))
    plain = probes(torch.zeros(n, n), masks)
    if layout.dim == 1:
        carried = plain.mT
    elif layout.major:
        carried = probes(torch.zeros(n, 2), masks).flatten(1, 2)
    else:
        carried = probes(torch.zeros(n, 2), masks).mT.flatten(1, 2)
    assert looked_at(carried, masks, at_once=2).found == (layout, True)


@pytest.mark.parametrize("which", range(5))
def test_what_is_not_linear_is_seen_in_any_probe(which: int) -> None:
    n = 6
    masks = probe_masks(n, torch.device("cpu"))
    assert len(masks) == 5
    carried = probes(torch.zeros(n, 4), masks)
    changed = carried.clone()
    changed[which] *= 1.01
    assert not looked_at(changed, masks, at_once=1).is_linear()
    clipped = carried / carried.flatten(1).norm(dim=1).view(-1, 1, 1)
    assert not looked_at(clipped, masks, at_once=2).is_linear()
    # A value that is not finite is found with the gradient, and named there.
    changed = carried.clone()
    changed[which, 2, 0] = float("nan")
    fitting = looked_at(changed, masks, at_once=1)
    assert fitting.is_linear()
    assert fitting.found == (Layout(), True)


def test_probes_are_let_go_and_no_place_is_reached_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    carried: list[tuple[int, int]] = []
    places: list[object] = []

    def counted(edges: Any, outputs: Any, stacks: Any, **how: Any) -> Any:
        carried.append((len(edges), len(stacks[0])))
        if len(stacks[0]) > 1:
            places.extend((edge.node, edge.output_nr) for edge in edges)
        return carry_to(edges, outputs, stacks, **how)

    monkeypatch.setattr(probing, "carry_to", counted)
    torch.manual_seed(0)
    model = adapted(3)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    x = torch.randn(10, 1, 8, 8)
    with metric.record():
        outputs = model(x)
    metric.backward(outputs.square().sum(), outputs)
    # Three rows, the costate and two probes are kept; three more are carried alone.
    assert [count for _, count in carried[:4]] == [6, 1, 1, 1]
    assert len(places) == len(set(places))
