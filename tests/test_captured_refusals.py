"""Steps that are no list of operations, and what replays leave behind."""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured_cases import (
    Training,
    chain,
    classes,
    plain_step,
    run,
    same_bits,
    training,
)
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import (
    NotCapturedWarning,
)

Step = Callable[..., Any]


def around(after: Callable[[Training, Tensor, Tensor], Any]) -> Callable[[], Training]:
    """Return a training whose step does something else at its end."""

    def build() -> Training:
        built = training()()
        inner = built.step

        def step(x: Tensor, y: Tensor) -> Any:
            return after(built, x, inner(x, y))

        built.step = step
        return built

    return build


def item(training: Training, x: Tensor, loss: Tensor) -> Any:
    training.seen["calls"] = training.seen.get("calls", 0) + 1
    return loss.item()


def text(training: Training, x: Tensor, loss: Tensor) -> Any:
    return f"{loss:.3f}"


def numpy(training: Training, x: Tensor, loss: Tensor) -> Any:
    return loss.detach().numpy().sum()


def tolist(training: Training, x: Tensor, loss: Tensor) -> Any:
    return loss.tolist()


def counter(training: Training, x: Tensor, loss: Tensor) -> Any:
    training.seen["count"] = training.seen.get("count", 0) + 1
    return loss / training.seen["count"]


def replaced(training: Training, x: Tensor, loss: Tensor) -> Any:
    old = training.seen.get("mean", torch.zeros(4))
    training.seen["mean"] = 0.9 * old + 0.1 * x.mean(0)
    return training.seen["mean"].clone()


def fresh(training: Training, x: Tensor, loss: Tensor) -> Any:
    return loss * torch.tensor([loss.shape.numel(), 2.0]).sum()


def reads_after_writing(training: Training, x: Tensor, loss: Tensor) -> Any:
    return loss if training.model[0].weight.isfinite().all() else None


UNCAPTURABLE = {
    "item": (item, "reads a number"),
    "text": (text, "reads a number"),
    "numpy": (numpy, "numpy"),
    "tolist": (tolist, "tolist"),
    "a counter": (counter, "differs from step to step"),
    "replaced": (replaced, "another one in each step"),
    "made of numbers": (fresh, "another one in each step"),
    "reads after writing": (reads_after_writing, "read first, change then"),
}


@pytest.mark.parametrize("name", UNCAPTURABLE)
def test_what_cannot_be_captured_is_said_and_done(name: str) -> None:
    after, why = UNCAPTURABLE[name]
    with pytest.warns(NotCapturedWarning, match=why) as warned:
        same_bits(around(after), 20, replayed=0)
    (message,) = [str(each.message) for each in warned]
    assert f"{__file__}:" in message
    lines = after.__code__.co_firstlineno, after.__code__.co_firstlineno + 4
    number = int(message.split(f"{__file__}:")[1].split()[0])
    assert lines[0] < number <= lines[1]


def test_a_number_that_is_returned_differs() -> None:
    def counted(training: Training, x: Tensor, loss: Tensor) -> Any:
        training.seen["count"] = training.seen.get("count", 0) + 1
        return loss, training.seen["count"]

    with pytest.warns(NotCapturedWarning, match="returns or keeps other things"):
        same_bits(around(counted), 14, replayed=0)


def test_never_two_steps_in_one_call() -> None:
    built = around(item)()
    step = rm.optim.CapturedStep(built.optimizer, built.step)
    with pytest.warns(NotCapturedWarning):
        run(built, step, 12)
    assert built.seen["calls"] == step.taken == built.metric.passes == 12


def waits(model: nn.Module, metric: Any, optimizer: Any) -> Step:
    def step(x: Tensor, y: Tensor, last: bool) -> Tensor:
        with metric.record():
            outputs = model(x)
        loss = F.cross_entropy(outputs, y)
        metric.backward(loss, outputs, accumulate=not last)
        if last:
            optimizer.step()
        return loss

    return step


def test_passes_that_wait_for_another_call() -> None:
    def batch(index: int) -> tuple[Any, ...]:
        return *classes()(index), index % 2 == 1

    with pytest.warns(NotCapturedWarning):
        same_bits(training(batch=batch, make_step=waits), 40, replayed=0)


def test_passes_of_one_batch_in_one_call() -> None:
    def two(model: nn.Module, metric: Any, optimizer: Any) -> Step:
        one = waits(model, metric, optimizer)

        def step(x: Tensor, y: Tensor) -> Tensor:
            return one(x[:3], y[:3], False) + one(x[3:], y[3:], True)

        return step

    same_bits(training(make_step=two))


def test_a_step_that_steps_twice() -> None:
    def two(model: nn.Module, metric: Any, optimizer: Any) -> Step:
        one = plain_step(model, metric, optimizer)

        def step(x: Tensor, y: Tensor) -> Tensor:
            return one(x[:3], y[:3]) + one(x[3:], y[3:])

        return step

    with pytest.warns(NotCapturedWarning, match="once each|read first"):
        same_bits(training(make_step=two), 12, replayed=0)


def test_a_step_that_does_not_step() -> None:
    def none(model: nn.Module, metric: Any, optimizer: Any) -> Step:
        return lambda x, y: F.cross_entropy(model(x), y).detach()

    with pytest.warns(NotCapturedWarning, match="once each"):
        same_bits(training(make_step=none), 12, replayed=0)


def test_parameters_outside_the_model() -> None:
    def scaled(model: nn.Module, metric: Any, optimizer: Any) -> Step:
        scale = nn.Parameter(torch.ones(()))

        def step(x: Tensor, y: Tensor) -> Any:
            with metric.record():
                outputs = scale * model(x)
            loss = F.cross_entropy(outputs, y)
            metric.backward(loss, outputs)
            optimizer.step()
            return loss, scale.grad

        return step

    with pytest.warns(NotCapturedWarning, match="outside the metric's model"):
        same_bits(training(make_step=scaled), 12, replayed=0)


def test_parameters_that_another_optimizer_moves() -> None:
    def build() -> Training:
        built = training()()
        first, *_, last = built.model
        own = rm.optim.RiemannianSGD(built.metric, first.parameters())
        other = torch.optim.SGD(last.parameters(), lr=0.1)
        built.seen["other"] = other
        step = plain_step(built.model, built.metric, own)
        return Training(built.model, built.metric, own, step, built.batch, built.seen)

    def between(training: Training, index: int) -> None:
        if index:
            training.seen["other"].step()

    same_bits(build, 12, between)


def test_a_running_mean_in_place() -> None:
    def mean(training: Training, x: Tensor, loss: Tensor) -> Any:
        old = training.seen.setdefault("mean", torch.zeros(4))
        old.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return loss, old.clone()

    same_bits(around(mean))


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = chain()
        self.register_buffer("mask", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.inner(x * self.mask)
        return z


def test_a_buffer_that_is_replaced_now_and_then() -> None:
    def between(training: Training, index: int) -> None:
        if index == 8:
            training.model.mask = torch.tensor([1.0, 0.0, 1.0, 2.0])
        if index == 16:
            training.model.mask[0] = 3.0

    same_bits(training(Masked), 20, between, replayed=1 + 6)


def test_a_buffer_that_is_replaced_all_the_time() -> None:
    def between(training: Training, index: int) -> None:
        training.model.mask = training.model.mask * 1.01

    with pytest.warns(NotCapturedWarning, match="in place"):
        same_bits(training(Masked), 40, between, replayed=0)


def test_data_in_a_closure() -> None:
    def build() -> Training:
        built = training()()
        inner = built.step
        built.step = lambda: inner(*built.seen["data"])
        built.batch = lambda index: ()
        return built

    def another(training: Training, index: int) -> None:
        training.seen["data"] = classes()(index)

    def in_place(training: Training, index: int) -> None:
        data = training.seen.setdefault("data", classes()(index))
        for old, new in zip(data, classes()(index), strict=True):
            old.copy_(new)

    with pytest.warns(NotCapturedWarning, match="hand it over as an argument"):
        same_bits(build, 15, another, replayed=0)
    same_bits(build, 10, in_place)


def test_a_trained_tensor_as_an_argument() -> None:
    def build() -> Training:
        built = training()()
        inner = built.step
        built.step = lambda x, y, w: (inner(x, y), w.square().sum())
        weight, batch = built.model[0].weight, built.batch
        built.batch = lambda index: (
            *batch(index),
            weight.detach() if index < 9 else torch.ones(5, 4),
        )
        return built

    with pytest.warns(NotCapturedWarning, match="in the memory of"):
        same_bits(build, 12, replayed=0)


def test_zero_grad_and_frozen_gradients() -> None:
    def build() -> Training:
        built = training()()
        inner = built.step

        def step(x: Tensor, y: Tensor) -> Any:
            built.optimizer.zero_grad()
            return inner(x, y)

        built.step = step
        return built

    same_bits(build)


def test_only_what_can_be_captured() -> None:
    built = training()()
    with pytest.raises(TypeError, match="takes a RiemannianSGD"):
        rm.optim.CapturedStep(torch.optim.SGD(built.model.parameters()), built.step)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="pass a function"):
        rm.optim.CapturedStep(built.optimizer, None)  # type: ignore[arg-type]
    search = rm.optim.LineSearch(built.metric)
    with pytest.raises(TypeError, match="LineSearch"):
        rm.optim.CapturedStep(search, built.step)  # type: ignore[arg-type]
    moving = training(metric={"static_graph": False})()
    with pytest.raises(ValueError, match="static_graph=True"):
        rm.optim.CapturedStep(moving.optimizer, moving.step)
    fewer = training(metric={"refresh": 2})()
    with pytest.raises(ValueError, match="refresh="):
        rm.optim.CapturedStep(fewer.optimizer, fewer.step)
    built.optimizer.register_step_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="hooks"):
        rm.optim.CapturedStep(built.optimizer, built.step)


def test_it_cannot_be_copied() -> None:
    built = training()()
    step = rm.optim.CapturedStep(built.optimizer, built.step)
    with pytest.raises(TypeError, match="belongs to its metric"):
        copy.deepcopy(step)
    with pytest.raises(TypeError, match="belongs to its metric"):
        pickle.dumps(step)


def test_an_argument_that_is_no_key() -> None:
    build = around(lambda training, x, loss: loss)

    def unhashable() -> Training:
        built = build()
        inner, batch = built.step, built.batch
        built.step = lambda x, y, more: inner(x, y)
        built.batch = lambda index: (*batch(index), {1, 2})
        return built

    with pytest.warns(NotCapturedWarning, match="a set, which may hold"):
        same_bits(unhashable, replayed=0)
