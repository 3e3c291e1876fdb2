"""Trainings that are run with captured and with ordinary steps, and compared."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from conftest import seed_torch
from torch import Tensor, nn

import riemannian_modules as rm

Outputs = Callable[[], rm.output.OutputMetric]
Loss = Callable[[Tensor, Tensor], Tensor]


def bits(value: Any) -> Any:
    """Return nested tensors as something that == compares bit for bit."""
    if isinstance(value, Tensor):
        flat = value.detach().contiguous().reshape(-1)
        raw = flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
        return value.dtype, tuple(value.shape), raw
    if isinstance(value, dict):
        return {key: bits(each) for key, each in value.items()}
    if isinstance(value, tuple | list):
        return [bits(each) for each in value]
    return value


@dataclass
class Training:
    """A model that is trained, and its ordinary step."""

    model: nn.Module
    metric: Any
    optimizer: rm.optim.RiemannianSGD
    step: Callable[..., Any]
    batch: Callable[[int], tuple[Any, ...]]
    seen: dict[str, Any] = field(default_factory=dict)

    def state(self) -> dict[str, Any]:
        """Return all that training is made of, in bits."""
        saved = self.optimizer.state_dict()
        return {
            "model": bits(dict(self.model.state_dict())),
            "grads": bits([p.grad for p in self.model.parameters()]),
            "optimizer": bits(saved),
            "loss": bits(self.metric.loss),
            "passes": (self.metric.version, self.metric.passes),
            "random": bits(torch.get_rng_state()),
        }


Between = Callable[[Training, int], Any]


def run(
    training: Training,
    step: Callable[..., Any],
    steps: int,
    between: Between | None = None,
    check: list[Any] | None = None,
) -> list[Any]:
    """Train, and return what was there after each step; compare with ``check``."""
    seed_torch(7)
    history = []
    for index in range(steps):
        if between is not None:
            between(training, index)
        returned = bits(step(*training.batch(index)))
        history.append((returned, training.state()))
        if check is not None:
            what = f"step {index}"
            assert returned == check[index][0], f"{what} returns something else"
            for name, value in training.state().items():
                assert value == check[index][1][name], f"{what}: other {name}"
    return history


def same_bits(
    build: Callable[[], Training],
    steps: int = 10,
    between: Between | None = None,
    replayed: int | None = None,
) -> rm.optim.CapturedStep:
    """Train with ordinary and with captured steps; all must be equal after each."""
    seed_torch(0)
    training = build()
    history = run(training, training.step, steps, between)
    seed_torch(0)
    training = build()
    captured = rm.optim.CapturedStep(training.optimizer, training.step)
    training.seen["captured"] = captured
    run(training, captured, steps, between, history)
    assert captured.taken == steps
    if replayed == -1:  # Whatever it is.
        return captured
    if replayed is None:
        assert captured.replayed == steps - 7
    else:
        assert captured.replayed == replayed
    return captured


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def plain_step(
    model: nn.Module,
    metric: Any,
    optimizer: torch.optim.Optimizer,
    loss: Loss = F.cross_entropy,
) -> Callable[[Tensor, Tensor], Tensor]:
    def step(x: Tensor, y: Tensor) -> Tensor:
        with metric.record():
            outputs = model(x)
        value = loss(outputs, y)
        metric.backward(value, outputs)
        optimizer.step()
        return value

    return step


def classes(
    shape: tuple[int, ...] = (4,), n: int = 6, k: int = 3, dtype: Any = None
) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Return batches of a classification, another one for every step."""

    def batch(index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(100 + index)
        x = torch.randn(n, *shape, generator=generator, dtype=torch.float64)
        y = torch.randint(k, (n,), generator=generator)
        return x.to(dtype or torch.get_default_dtype()), y

    return batch


def training(
    model: Callable[[], nn.Module] = chain,
    output: Outputs = rm.output.Categorical,
    *,
    loss: Loss = F.cross_entropy,
    batch: Callable[[int], tuple[Any, ...]] | None = None,
    dtype: torch.dtype = torch.float64,
    metric: dict[str, Any] | None = None,
    make_step: Callable[..., Any] = plain_step,
    **options: Any,
) -> Callable[[], Training]:
    """Return what builds a training of a model, from torch's random state."""

    def build() -> Training:
        built = model().to(dtype)
        settings = {"mass": 0.1, "static_graph": True, **(metric or {})}
        own = rm.LayerwiseMetric(built, output(), **settings)
        optimizer = rm.optim.RiemannianSGD(own, **options)
        given = [] if make_step is not plain_step else [loss]
        step = make_step(built, own, optimizer, *given)
        return Training(built, own, optimizer, step, batch or classes(dtype=dtype))

    return build
