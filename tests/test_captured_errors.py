"""Errors, reports and memory of captured steps are those of ordinary ones."""

import gc
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captured_cases import (
    Training,
    bits,
    chain,
    classes,
    run,
    same_bits,
    training,
)
from conftest import seed_torch
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import (
    LinearizationError,
    LostManifoldError,
    NonFiniteError,
    NotCapturedWarning,
    NotOnManifoldError,
    NotPositiveDefiniteError,
    NotRecordedError,
)


def test_errors_of_its_own() -> None:
    def build() -> Training:
        built = training()()
        inner = built.step

        def step(x: Tensor, y: Tensor) -> Any:
            if x.max() > 50.0:
                raise KeyError("too large")
            return inner(x, y)

        built.step = step
        return built

    built = build()
    step = rm.optim.CapturedStep(built.optimizer, built.step)
    run(built, step, 10)
    before = built.state()
    x, y = built.batch(0)
    with pytest.raises(KeyError):
        step(100.0 * x, y)
    assert built.state() == before
    assert (step.taken, step.replayed) == (10, 3)
    run(built, step, 1)
    assert step.replayed == 4


def spoil(training: Training, value: float) -> None:
    with torch.no_grad():
        training.model[0].weight[0, 0] = value


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3))


def sphere() -> nn.Module:
    first = rm.nn.Linear(4, 3, manifold=rm.manifolds.Sphere())
    return rm.nn.Sequential(first, nn.Tanh(), rm.nn.Linear(3, 3))


def nan_data(training: Training, x: Tensor, y: Tensor) -> None:
    x[0, 0] = float("nan")


def huge_data(training: Training, x: Tensor, y: Tensor) -> None:
    x.mul_(1e308)


def bad_target(training: Training, x: Tensor, y: Tensor) -> None:
    y[0] = 17


def bad_parameter(training: Training, x: Tensor, y: Tensor) -> None:
    spoil(training, float("nan"))


def off_manifold(training: Training, x: Tensor, y: Tensor) -> None:
    spoil(training, 5.0)


def frozen(training: Training, x: Tensor, y: Tensor) -> None:
    training.model[0].weight.requires_grad_(False)


def another_parameter(training: Training, x: Tensor, y: Tensor) -> None:
    training.model[0].bias = nn.Parameter(torch.zeros(3))


def other_width(training: Training, x: Tensor, y: Tensor) -> None:
    x.resize_(6, 3)


FAILURES: dict[str, tuple[Callable[[Training, Tensor, Tensor], None], Any]] = {
    "NaN in the data": (nan_data, NonFiniteError),
    "overflow": (huge_data, NotPositiveDefiniteError),
    "a class that is none": (bad_target, IndexError),
    "NaN in a parameter": (bad_parameter, NonFiniteError),
    "off its manifold": (off_manifold, NotOnManifoldError),
    "frozen": (frozen, LinearizationError),
    "replaced": (another_parameter, LostManifoldError),
    "another width": (other_width, RuntimeError),
}


@pytest.mark.parametrize("name", FAILURES)
def test_the_same_errors_and_nothing_changed(name: str) -> None:
    fails, kind = FAILURES[name]
    messages, after = [], []
    for captured in (False, True):
        seed_torch(0)
        built = training(sphere)()
        step = built.step
        if captured:
            step = rm.optim.CapturedStep(built.optimizer, built.step)
        run(built, step, 10)
        if captured:
            assert step.replayed == 3
        x, y = built.batch(10)
        fails(built, x, y)
        before = bits(list(built.model.parameters()))
        with pytest.raises(kind) as raised:
            step(x, y)
        messages.append(str(raised.value))
        assert bits(list(built.model.parameters())) == before
        after.append((before, bits(built.optimizer.state_dict()["state"])))
        if captured:
            assert (step.taken, step.replayed) == (10, 3)
    assert messages[0] == messages[1]
    assert after[0] == after[1]


@pytest.mark.parametrize("model", [chain, noisy])
def test_after_an_error_steps_are_replayed_again(model: Any) -> None:
    def batch(index: int) -> tuple[Tensor, Tensor]:
        x, y = classes()(index)
        if index in (8, 9, 20, 30):
            x[0, 0] = float("nan")
        return x, y

    def build() -> Training:
        built = training(model, batch=batch)()
        inner = built.step

        def step(x: Tensor, y: Tensor) -> Any:
            try:
                return inner(x, y)
            except NonFiniteError:
                return None

        built.step = step
        return built

    # Random numbers are drawn anew where a program ends early, and few errors between
    # many steps do not cost it.
    same_bits(build, 34, replayed=34 - 7 - 4)


def test_float32_that_begins_to_need_float64() -> None:
    def between(training: Training, index: int) -> None:
        training.seen["scale"].fill_(1e4 if index >= 9 else 1.0)

    def build() -> Training:
        scale = torch.ones(())
        built = training(
            lambda: Scaled(scale), dtype=torch.float32, metric={"mass": 1e-6}, lr=1e-3
        )()
        built.seen["scale"] = scale
        return built

    step = same_bits(build, 20, between, replayed=-1)
    # Two steps do not fit, three more are looked at.
    assert step.replayed == 2 + 20 - 9 - 5


class Scaled(nn.Module):
    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.inner, self.scale = chain(), scale

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x) * self.scale
        return z


def test_reports_and_blocks_after_replays() -> None:
    built = training()()
    step = rm.optim.CapturedStep(built.optimizer, built.step)
    run(built, step, 9)
    assert step.replayed == 2
    assert built.metric.version == built.metric.passes == 9
    # Values that a program has left are not looked at again.
    declared = list(built.metric.parameters)
    assert all(each.verified == each.tensor._version for each in declared)
    with pytest.raises(NotRecordedError, match=r"CapturedStep\.ordinary"):
        _ = built.optimizer.report
    with pytest.raises(NotRecordedError):
        built.metric.natural_gradient()
    with pytest.raises(NotRecordedError):
        built.optimizer.step()
    step.ordinary(*built.batch(9))
    assert [block.name for block in built.optimizer.report] == ["0", "2"]
    assert set(built.metric.natural_gradient()) == set(
        built.metric.parameters.tensors()
    )
    assert (step.taken, step.replayed, built.metric.passes) == (10, 2, 10)
    run(built, step, 1)
    assert step.replayed == 3


def test_programs_hold_no_data() -> None:
    alive = []

    def batch(index: int) -> tuple[Tensor, Tensor]:
        found = classes()(index)
        alive.extend(weakref.ref(tensor) for tensor in found)
        return found

    built = training(batch=batch)()
    step = rm.optim.CapturedStep(built.optimizer, built.step)
    run(built, step, 10)
    gc.collect()
    assert step.replayed == 3
    assert not [ref for ref in alive if ref() is not None]
    (kind,) = [kind for kind in step._kinds.values() if kind.known]
    assert kind.last is None
    held = [t for t in kind.known[0].program._names.values() if isinstance(t, Tensor)]
    own = set(map(id, built.model.parameters()))
    assert all(id(t) in own or t.numel() <= 36 for t in held)


def test_a_step_that_writes_to_its_argument() -> None:
    def build() -> Training:
        built = training()()
        inner, batch = built.step, built.batch

        def step(x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = inner(x, y)
            x.mul_(2.0)
            return loss

        def remembered(index: int) -> tuple[Tensor, Tensor]:
            built.seen["x"], y = batch(index)
            return built.seen["x"], y

        def state() -> dict[str, Any]:
            return {**Training.state(built), "argument": bits(built.seen["x"])}

        built.step, built.batch = step, remembered
        built.state = state  # type: ignore[method-assign]
        return built

    same_bits(build)


def test_a_step_that_repairs_a_parameter() -> None:
    def build() -> Training:
        built = training()()
        inner, weight = built.step, built.model[0].weight

        def step(x: Tensor, y: Tensor) -> Tensor:
            with torch.no_grad():
                weight.nan_to_num_(0.5)
            loss: Tensor = inner(x, y)
            return loss

        built.step = step
        return built

    def between(training: Training, index: int) -> None:
        if index == 8:
            spoil(training, torch.nan)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotCapturedWarning)
        step = same_bits(build, 12, between, replayed=-1)
    assert step.taken == 12


def test_sparse_arguments() -> None:
    def sparse() -> Training:
        built = training()()
        inner, batch = built.step, built.batch
        built.step = lambda x, y: inner(x.to_dense(), y)
        built.batch = lambda index: (batch(index)[0].to_sparse(), batch(index)[1])
        return built

    with pytest.warns(NotCapturedWarning, match="sparse"):
        same_bits(sparse, replayed=0)
