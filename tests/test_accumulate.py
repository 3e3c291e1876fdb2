"""A batch in several passes: the step is the one that a single pass leads to."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from distributed_cases import CASES, Case, entropy, features, mlp
from hypothesis import given
from hypothesis import strategies as st
from mutants.accumulate import MUTANTS
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.joining import passes

EXAMPLES = 8
STEPS = 3
SPLITS = [(3,), (1, 4), (2, 2, 2)]
# Sketches of the global dice differ from run to run, and functions have no passes.
NAMED = {
    name: case
    for name, case in CASES.items()
    if case.functional is None and case.tolerance < 1.0 and not case.sizes
}


def trained(case: Case) -> tuple[list[Tensor], rm.LayerwiseMetric]:
    """The parameters after every step, and the metric of the last one."""
    torch.manual_seed(1)
    model = case.model().to(case.dtype)
    x, numbers = case.batch(EXAMPLES), case.numbers(EXAMPLES)
    x = x.to(case.dtype) if x.is_floating_point() else x
    metric = case.metric(model)
    assert isinstance(metric, rm.LayerwiseMetric)
    optimizer = case.steps(metric)
    found = []
    for _ in range(STEPS):
        case.step(metric, optimizer, x, numbers)
        values = [p.detach().flatten() for p in model.parameters()]
        found.append(torch.cat(values))
    return found, metric


def difference(one: Tensor, other: Tensor) -> float:
    return float((one - other).abs().max() / other.abs().max().clamp_min(1e-30))


def measured(block: rm.LayerMetric) -> Tensor:
    """Inner products of some tangent vectors; bases of tangent spaces are a choice."""
    torch.manual_seed(3)
    some = [
        {p.name: p.space.project(torch.randn_like(p.space.point)) for p in block.parts}
        for _ in range(3)
    ]
    return torch.stack([block.inner(u, v) for u in some for v in some])


def worst(case: Case, split: tuple[int, ...]) -> float:
    """The largest difference of parameters, gradients and metrics."""
    (whole, one), (split_up, other) = trained(case), trained(replace(case, sizes=split))
    found = [difference(b, a) for a, b in zip(whole, split_up, strict=True)]
    assert one.blocks.keys() == other.blocks.keys()
    for name, block in one.blocks.items():
        found.append(difference(measured(other.blocks[name]), measured(block)))
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    for a, b in pairs:
        if a.grad is not None:
            assert b.grad is not None
            found.append(difference(b.grad, a.grad))
    assert one.loss is not None
    assert other.loss is not None
    return max(*found, difference(other.loss, one.loss))


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("name", NAMED)
def test_passes_are_one_batch(name: str, split: tuple[int, ...]) -> None:
    case = NAMED[name]
    assert worst(case, split) < max(case.tolerance, 1e-9)


@given(
    n=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    output=st.sampled_from([rm.output.Categorical(), rm.output.Euclidean(0.7), None]),
    reduction=st.sampled_from(["mean", "sum"]),
    blocks=st.sampled_from(["tensor", "layer", "model"]),
    seed=st.integers(0, 99),
)
def test_any_division_of_a_batch(
    n: list[int], output: Any, reduction: Any, blocks: Any, seed: int
) -> None:
    torch.manual_seed(seed)
    x, target = torch.randn(sum(n), 3).double(), torch.arange(sum(n)) % 4
    start = mlp().double()

    def gradient(sizes: list[int]) -> dict[str, Tensor]:
        model = copy.deepcopy(start)
        options = {"mass": 0.1, "blocks": blocks, "reduction": reduction}
        metric = rm.LayerwiseMetric(model, output, **options)
        last = len(sizes) - 1
        pieces = zip(x.split(sizes), target.split(sizes), strict=True)
        for index, (inputs, labels) in enumerate(pieces):
            with metric.record():
                z = model(inputs)
            loss = F.cross_entropy(z, labels, reduction=reduction)
            metric.backward(loss, z, accumulate=index < last)
        return metric.natural_gradient()

    whole, split_up = gradient([sum(n)]), gradient(n)
    for name, value in whole.items():
        assert difference(split_up[name], value) < 1e-9, name


def test_rows_that_dice_choose_keep_the_gradient() -> None:
    torch.manual_seed(0)
    model, x, y = mlp().double(), torch.randn(9, 3).double(), torch.arange(9) % 4
    metric = rm.LayerwiseMetric(
        model, rm.output.Sampled(rm.output.Categorical()), mass=0.1
    )
    for piece, more in ((slice(0, 4), True), (slice(4, 9), False)):
        with metric.record():
            z = model(x[piece])
        metric.backward(F.cross_entropy(z, y[piece]), z, accumulate=more)
    expected = torch.autograd.grad(F.cross_entropy(model(x), y), model.parameters())
    found = metric.natural_gradient()
    for (name, p), e in zip(model.named_parameters(), expected, strict=True):
        assert p.grad is not None
        torch.testing.assert_close(p.grad, e, rtol=1e-12, atol=1e-14)
        block = metric.blocks[name.split(".")[0]]
        assert block.rank == 18
        assert found[name].shape == p.shape
    for block in metric.blocks.values():
        x_ = {part.name: found[part.name] for part in block.parts}
        lowered = block.flat(x_)
        for part in block.parts:
            want = dict(model.named_parameters())[part.name].grad
            assert want is not None
            torch.testing.assert_close(lowered[part.name], want, rtol=1e-8, atol=1e-10)


def test_nothing_changes_before_the_batch_is_complete() -> None:
    model, x = mlp(), features(4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    with metric.record():
        z = model(x)
    metric.backward(entropy(z, torch.arange(4)), z, accumulate=True)
    assert len(metric.waiting) == 1
    assert metric.passes == 0
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(rm.errors.NotRecordedError, match="accumulate=True"):
        optimizer.step()
    with metric.record():
        z = model(x)
    metric.backward(entropy(z, torch.arange(4)), z)
    optimizer.step()
    assert len(metric.waiting) == 0
    assert metric.passes == 1


def record(model: nn.Module, metric: rm.LayerwiseMetric, x: Tensor) -> Tensor:
    with metric.record():
        z: Tensor = model(x)
    return z


def test_parameters_that_moved_are_another_batch() -> None:
    model, x, numbers = mlp(), features(4), torch.arange(4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    z = record(model, metric, x)
    metric.backward(entropy(z, numbers), z, accumulate=True)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    z = record(model, metric, x)
    with pytest.raises(rm.errors.LinearizationError, match=r"'0\.weight' has moved"):
        metric.backward(entropy(z, numbers), z)
    # They are dropped, so that the next batch begins anew.
    z = record(model, metric, x)
    metric.backward(entropy(z, numbers), z)
    assert metric.blocks["0"].rank == 4 * 3


def test_inputs_that_are_overwritten_between_passes() -> None:
    model, x, numbers = mlp(), features(4), torch.arange(4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    z = record(model, metric, x)
    metric.backward(entropy(z, numbers), z, accumulate=True)
    x.mul_(2.0)
    z = record(model, metric, x)
    with pytest.raises(rm.errors.LinearizationError, match="changed in place"):
        metric.backward(entropy(z, numbers), z)


def test_a_batch_whose_last_pass_is_missing() -> None:
    model, x, numbers = mlp().double(), features(6).double(), torch.arange(6)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    whole = rm.LayerwiseMetric(copy.deepcopy(model), rm.output.Categorical())
    for piece in (slice(0, 2), slice(2, 5)):
        z = record(model, metric, x[piece])
        metric.backward(entropy(z, numbers[piece]), z, accumulate=True)
    metric.complete()
    z = record(whole.model, whole, x[:5])
    whole.backward(entropy(z, numbers[:5]), z)
    assert len(metric.waiting) == 0
    assert metric.passes == 1
    for name, value in whole.natural_gradient().items():
        torch.testing.assert_close(metric.natural_gradient()[name], value)
    # One pass alone, and one whose input is gone.
    z = record(model, metric, x)
    metric.backward(entropy(z, numbers), z, accumulate=True)
    x.mul_(2.0)
    with pytest.raises(rm.errors.LinearizationError, match="changed in place"):
        metric.complete()
    assert len(metric.waiting) == 1


@pytest.mark.parametrize("passes", [1, 2])
def test_a_batch_is_not_completed_at_another_point(passes: int) -> None:
    model, x, numbers = mlp(), features(4), torch.arange(4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    for _ in range(passes):
        z = record(model, metric, x)
        metric.backward(entropy(z, numbers), z, accumulate=True)
    with torch.no_grad():
        next(model.parameters()).add_(1.0)
    with pytest.raises(rm.errors.LinearizationError, match=r"'0\.weight' has moved"):
        metric.complete()
    assert len(metric.waiting) == 0
    assert metric.passes == 0


def test_frozen_and_other_passes_are_no_batch() -> None:
    model, x, numbers = mlp(), features(4), torch.arange(4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    z = record(model, metric, x)
    metric.backward(entropy(z, numbers), z)
    with metric.frozen():
        z = record(model, metric, x)
        metric.backward(entropy(z, numbers), z, accumulate=True)
    z = record(model, metric, x)
    with pytest.raises(rm.errors.LinearizationError, match="frozen"):
        metric.backward(entropy(z, numbers), z)


def test_a_pass_that_another_replaced_is_told() -> None:
    model, x, numbers = mlp(), features(4), torch.arange(4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)

    def backward() -> None:
        z = record(model, metric, x)
        metric.backward(entropy(z, numbers), z)

    backward(), backward()
    with pytest.warns(UserWarning, match="accumulate=True"):
        optimizer.step()
    # Nothing to tell: of the first pass something was made, or it is a search's.
    backward(), metric.natural_gradient(), backward(), optimizer.step()
    with metric.frozen():
        backward(), backward(), optimizer.step()
    backward(), optimizer.step()


def test_outputs_that_are_divided_in_other_proportions() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor, more: int) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y, self.layer(x).unsqueeze(1).expand(-1, more, -1).clone()

    model, x = Two(), features(4)
    metric = rm.LayerwiseMetric(
        model, [rm.output.Categorical(), rm.output.Categorical()]
    )
    for more in (1, 3):
        with metric.record():
            ends = model(x, more)
        loss = sum(end.square().mean() for end in ends)
        assert isinstance(loss, Tensor)
        if more == 1:
            metric.backward(loss, ends, accumulate=True)
        else:
            with pytest.raises(rm.errors.ShapeError, match="different proportions"):
                metric.backward(loss, ends)
    assert len(metric.waiting) == 1
    metric.waiting.clear()
    with pytest.raises(rm.errors.NotRecordedError, match="no pass waits"):
        metric.complete()


def test_parameters_outside_the_model() -> None:
    model, x = mlp(), features(6)
    scale = nn.Parameter(torch.tensor(0.5))
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean())
    for piece, more in ((slice(0, 2), True), (slice(2, 6), False)):
        z = record(model, metric, x[piece])
        metric.backward((scale * z.square().sum(1)).mean(), z, accumulate=more)
    expected = model(x).square().sum(1).mean()
    assert scale.grad is not None
    torch.testing.assert_close(scale.grad, expected)


def test_a_pass_that_fails_leaves_the_others_waiting() -> None:
    model, x, numbers = mlp(), features(4), torch.arange(4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    z = record(model, metric, x)
    metric.backward(entropy(z, numbers), z, accumulate=True)
    z = record(model, metric, x)
    with pytest.raises(rm.errors.NonFiniteError) as error:
        metric.backward(entropy(z, numbers) * float("nan"), z)
    assert "metric.waiting.clear()" in error.value.__notes__[0]
    assert len(metric.waiting) == 1
    z = record(model, metric, x)
    metric.backward(entropy(z, numbers), z)
    assert metric.blocks["0"].rank == 2 * 4 * 3


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.__name__)
def test_wrong_ways_to_join_are_found(
    mutant: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    mutant(monkeypatch, passes)
    case = replace(CASES["layer"])
    assert worst(case, (1, 4)) > 1e-6
