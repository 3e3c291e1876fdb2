"""What changes between captured steps is not silently forgotten."""

import copy
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

Change = Callable[[Training], Any]
MOMENTUM: dict[str, Any] = {"lr": 0.1, "momentum": 0.5}


def at(step: int, change: Change) -> Callable[[Training, int], None]:
    def between(training: Training, index: int) -> None:
        if index == step:
            change(training)

    return between


def noisy() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.4), nn.Tanh(), nn.Linear(5, 3))


def sampled() -> rm.output.OutputMetric:
    return rm.output.Sampled(rm.output.Categorical())


def drawn() -> rm.output.OutputMetric:
    generator = torch.Generator().manual_seed(2)
    return rm.output.Sampled(rm.output.Categorical(), generator=generator)


def reload_optimizer(training: Training) -> None:
    training.optimizer.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))


def restart_optimizer(training: Training) -> None:
    # As of a state that was saved at the beginning.
    saved = training.optimizer.state_dict()
    saved["param_groups"][0] |= {"trust": None, "lowest": None}
    training.optimizer.load_state_dict({**saved, "state": {}})


def forget_state(training: Training) -> None:
    for tensor in list(training.optimizer.state):
        training.optimizer.state[tensor] = {}


def other_layout(training: Training) -> None:
    for own in training.optimizer.state.values():
        for name, value in own.items():
            own[name] = value.mT.contiguous().mT if value.ndim == 2 else value.clone()


def reload_model(training: Training) -> None:
    saved = {name: 0.9 * value for name, value in training.model.state_dict().items()}
    training.model.load_state_dict(saved)


def other_module(training: Training) -> None:
    training.model[1] = nn.ReLU()


def scaled(training: Training) -> None:
    with torch.no_grad():
        for tensor in training.model.parameters():
            tensor.mul_(0.5)


def of_group(**options: Any) -> Change:
    return lambda training: training.optimizer.param_groups[0].update(options)


def ball() -> nn.Module:
    first = rm.nn.Linear(4, 3, manifold=rm.manifolds.Sphere())
    return rm.nn.Sequential(first, nn.Tanh(), rm.nn.Linear(3, 3))


def hook(training: Training) -> None:
    def count(*_: Any) -> None:
        training.seen["hooked"] = training.seen.get("hooked", 0) + 1

    training.optimizer.register_step_post_hook(count)


def set_on_output(name: str, value: Callable[[], Any]) -> Change:
    return lambda training: setattr(training.metric.output, name, value())


# How many of 18 steps are replayed where the change is made before the ninth.
CHANGES: dict[str, tuple[Callable[[], Training], Change, int]] = {
    "state of the optimizer": (training(), reload_optimizer, 11),
    "momentum reloaded": (training(**MOMENTUM), reload_optimizer, 11),
    "state from the beginning": (training(), restart_optimizer, 10),
    "state forgotten": (training(**MOMENTUM), forget_state, 10),
    "state laid otherwise": (training(**MOMENTUM), other_layout, 6),
    "state of the model": (training(), reload_model, 11),
    "parameters in place": (training(), scaled, 11),
    "another module": (training(), other_module, 5),
    "a clip": (training(), of_group(clip=1e-2), 5),
    "a float lr": (training(lr=0.1), of_group(lr=0.2), 5),
    "an int lr": (training(lr=1.0, clip=0.1), of_group(lr=1), 5),
    "mass": (training(), lambda t: t.metric.set_mass(0.5), 5),
    "mass scaled": (training(), lambda t: t.metric.scale_mass(0.5), 5),
    "precision": (
        training(dtype=torch.float32),
        lambda t: setattr(t.metric, "precision", torch.float64),
        5,
    ),
    "probes": (training(output=sampled), set_on_output("probes", lambda: 2), 5),
    "generator": (
        training(output=drawn),
        set_on_output("generator", lambda: torch.Generator().manual_seed(3)),
        5,
    ),
    "hooks": (training(), hook, 1),
    "retraction": (
        training(ball),
        lambda t: setattr(t.optimizer, "retraction", rm.retractions.Exponential()),
        5,
    ),
    "seed": (training(noisy), lambda t: torch.manual_seed(11), 11),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_between_steps(name: str) -> None:
    build, change, replayed = CHANGES[name]
    same_bits(build, 18, at(8, change), replayed)


def test_hooks_are_called() -> None:
    built = training()()
    step = rm.optim.CapturedStep(built.optimizer, built.step)
    run(built, step, 12, at(8, hook))
    assert built.seen["hooked"] == 4


def test_smaller_batches_between() -> None:
    def batch(index: int) -> tuple[Tensor, Tensor]:
        return classes(n=4 if index % 5 == 4 else 6)(index)

    step = same_bits(training(batch=batch), 30, replayed=17)
    assert len(step._kinds) == 3


@pytest.mark.parametrize("model", [chain, noisy])
def test_modes_between(model: Callable[[], nn.Module]) -> None:
    def between(training: Training, index: int) -> None:
        training.model.train(index % 3 != 2)

    same_bits(training(model), 30, between, replayed=30 - 7 - 6)


def test_slices_of_the_same_data() -> None:
    x, y = classes(n=60)(0)

    def batch(index: int) -> tuple[Tensor, Tensor]:
        start = 5 * index % 54
        return x[start : start + 6], y[start : start + 6]

    same_bits(training(batch=batch), 12)


def paired(model: nn.Module, metric: Any, optimizer: Any) -> Callable[..., Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        with metric.record():
            outputs = model(x)
        loss = F.mse_loss(
            outputs, y.mT.contiguous().mT[:, :3] + x.mT.contiguous().mT[:, :3]
        )
        metric.backward(loss, outputs)
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize("alias", ["same", "detached", "overlapping"])
def test_arguments_in_the_same_memory(alias: str) -> None:
    data, _ = classes(n=40)(0)

    def batch(index: int) -> tuple[Tensor, Tensor]:
        x = data[index : index + 6]
        if index >= 8:
            return x, data[2 * index : 2 * index + 6]
        others = {
            "same": x,
            "detached": x.detach(),
            "overlapping": data[index + 3 :][:6],
        }
        return x, others[alias]

    build = training(output=rm.output.Euclidean, batch=batch, make_step=paired)
    same_bits(build, 12, replayed=1)


def scaled_step(model: nn.Module, metric: Any, optimizer: Any) -> Callable[..., Tensor]:
    def step(x: Tensor, y: Tensor, power: Any) -> Tensor:
        with metric.record():
            outputs = model(x)
        loss = (F.cross_entropy(outputs, y) ** power).mean() + torch.tensor(1) * power
        metric.backward(loss, outputs)
        optimizer.step()
        return loss

    return step


@pytest.mark.parametrize(("one", "other"), [(1, 1.0), (1, True), (0.0, -0.0)])
def test_numbers_that_python_takes_for_equal(one: Any, other: Any) -> None:
    def batch(index: int) -> tuple[Any, ...]:
        return *classes()(index), one if index < 8 else other

    def copied(model: nn.Module, metric: Any, optimizer: Any) -> Callable[..., Any]:
        inner = plain_step(model, metric, optimizer)

        def step(x: Tensor, y: Tensor, number: Any) -> tuple[Tensor, Tensor]:
            return inner(x, y), torch.full((), number)

        return step

    same_bits(training(batch=batch, make_step=copied), 12, replayed=1)


def test_arguments_in_containers() -> None:
    def batch(index: int) -> tuple[Any, ...]:
        x, y = classes()(index)
        return ({"x": x, "more": (y, [x])},)

    def nested(model: nn.Module, metric: Any, optimizer: Any) -> Callable[..., Any]:
        inner = plain_step(model, metric, optimizer)

        def step(given: dict[str, Any]) -> dict[str, Any]:
            loss = inner(given["x"] + given["more"][1][0], given["more"][0])
            return {"loss": loss, "n": len(given["x"]), "all": [loss, (loss * 2,)]}

        return step

    same_bits(training(batch=batch, make_step=nested))


def test_a_learning_rate_in_a_tensor() -> None:
    def build() -> Training:
        built = training(lr=torch.tensor(0.1), momentum=0.5, weight_decay=0.1)()
        built.seen["schedule"] = torch.optim.lr_scheduler.ExponentialLR(
            built.optimizer, 0.9
        )
        return built

    def between(training: Training, index: int) -> None:
        if index:
            training.seen["schedule"].step()

    same_bits(build, 14, between, replayed=7)


def test_a_learning_rate_that_is_another_number_each_time() -> None:
    def between(training: Training, index: int) -> None:
        training.optimizer.param_groups[0]["lr"] = 0.1 * 0.99**index

    with pytest.warns(NotCapturedWarning, match="Make tensors"):
        same_bits(training(lr=0.1), 40, between, replayed=0)


def test_schedules_of_masses_and_probes() -> None:
    def build() -> Training:
        built = training(output=sampled)()
        mass = rm.optim.MassSchedule(built.metric, lambda step: 0.5 ** (step // 7))
        probes = rm.optim.ProbeSchedule(built.metric, lambda step: 1 + step // 7)
        built.seen["schedules"] = mass, probes
        return built

    def between(training: Training, index: int) -> None:
        if index:
            for schedule in training.seen["schedules"]:
                schedule.step()

    same_bits(build, 21, between, replayed=0 + 1 + 1)


@pytest.mark.parametrize("to", [torch.float32, torch.float64])
def test_another_data_type(to: torch.dtype) -> None:
    first = torch.float64 if to == torch.float32 else torch.float32

    def batch(index: int) -> tuple[Tensor, Tensor]:
        return classes(dtype=first if index < 8 else to)(index)

    def change(training: Training) -> None:
        training.model.to(to)

    build = training(dtype=first, batch=batch, **MOMENTUM)
    same_bits(build, 15, at(8, change), replayed=2)
