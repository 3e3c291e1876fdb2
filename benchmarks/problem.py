"""What a training problem has to say, so that every method can be raced on it."""

import importlib
import math
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.model_metric import ModelMetric

Blocks = Literal["tensor", "layer", "model"]
Batch = Any
# Measures of which more is better; of all others less is.
RISING = ("accuracy", "map")
EXAMPLES = Path(__file__).parents[1] / "examples"


class UnavailableError(Exception):
    """The problem's data or the method's package is not here; the message says what."""


def example(name: str) -> ModuleType:
    """Return a module of the folder ``examples``, whose files import each other."""
    if str(EXAMPLES) not in sys.path:
        sys.path.append(str(EXAMPLES))
    return importlib.import_module(name)


@contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Make a data type torch's default for a while."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@dataclass(frozen=True)
class Target:
    """A value of a measure that a method is to reach."""

    measure: str
    value: float

    def reached(self, values: Mapping[str, float]) -> bool:
        found = values[self.measure]
        return found >= self.value if self.measure in RISING else found <= self.value

    def __str__(self) -> str:
        sign = ">=" if self.measure in RISING else "<="
        return f"{self.measure} {sign} {self.value:g}"


@dataclass(frozen=True)
class Geometry:
    """A metric on the model, how to renew it from a batch, and the bare loss."""

    metric: ModelMetric
    backward: Callable[[Batch], Tensor]
    loss: Callable[[Batch], Tensor]


class Problem(ABC):
    """Data, model, loss and measures.

    Attributes:
        name: for the command line and the files.
        title: one line for the tables.
        seconds: of optimizer work that every method gets in a final run.
        kind: "network" (a forward pass and a loss), "functions" (derivatives of the
            network in the loss) or "manifold" (constrained parameters).
        full_batch: whether the loss is the same function in every step.
        measure: what the methods are compared by in the end.
        tune_on: ``"measure"``, its final value; ``"target"``, the seconds to the first
            target.
        targets: whose first step and second are recorded.
        masses: three masses for the grids.
        dense: after each of so many first steps the model is looked at.
        growth: then after every such share of more steps.
        adam_epochs: where the seconds are those of so many epochs of Adam, else 0.
        steps_per_epoch: of which each has so many steps.
    """

    name: str
    title: str
    seconds: float
    kind: Literal["network", "functions", "manifold"]
    full_batch: bool
    measure: str = "loss"
    tune_on: Literal["measure", "target"] = "measure"
    targets: tuple[Target, ...] = ()
    masses: tuple[float, float, float] = (1e-3, 1e-2, 1e-1)
    dense: int = 64
    growth: float = 1 / 16
    adam_epochs: int = 0
    steps_per_epoch: int = 1

    @abstractmethod
    def model(self, seed: int) -> nn.Module:
        """Return the model at the start that belongs to a seed."""

    @abstractmethod
    def batches(self, seed: int) -> Iterator[Batch]:
        """Yield batches without end, the same for the same seed."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the loss of a batch, for optimizers that take a gradient."""

    @abstractmethod
    def geometry(
        self,
        model: nn.Module,
        *,
        blocks: Blocks,
        mass: float,
        probes: int | None = None,
    ) -> Geometry:
        """Return the metric; ``probes`` random rows and the gradient's; None: all."""

    @property
    @abstractmethod
    def rows(self) -> int:
        """Return the rank of the exact factor: examples times outputs."""

    @abstractmethod
    def look(self, model: nn.Module) -> dict[str, float]:
        """Return the measures, "loss" among them."""

    def schedule(self, gone: float) -> float:
        """Return the factor of every method's step length after a share of the time."""
        return 0.5 * (1.0 + math.cos(math.pi * min(gone, 1.0)))

    def score(self, values: Mapping[str, float]) -> float:
        """Return the value of the measure, with the sign that makes less better."""
        value = values[self.measure]
        return -value if self.measure in RISING else value

    def loss_module(self) -> nn.Module | None:
        """Return the loss as a module of torch, for peers that need its kind."""
        return None

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a batch, where it has them.

        Raises:
            TypeError: it has not.
        """
        raise TypeError(f"{self.name} has no pairs of inputs and targets")


class NetworkProblem(Problem):
    """A loss that compares the outputs of one forward pass with targets.

    Attributes:
        outputs: how many the model has for each example.
    """

    outputs: int

    def __init__(self, x: Tensor, y: Tensor, batch: int | None) -> None:
        self.x, self.y = x, y
        self.batch = batch
        self.full_batch = batch is None

    @abstractmethod
    def criterion(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Return the mean loss."""

    @abstractmethod
    def output(self) -> rm.output.OutputMetric:
        """Return the output metric that is the Hessian of the loss by the outputs."""

    def batches(self, seed: int) -> Iterator[Batch]:
        generator = torch.Generator().manual_seed(seed)
        while self.batch is None:
            yield self.x, self.y
        while True:
            order = torch.randperm(len(self.x), generator=generator)
            for chosen in order.split(self.batch)[: len(order) // self.batch]:
                yield self.x[chosen], self.y[chosen]

    def inputs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = batch
        return x, y

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        x, y = batch
        return self.criterion(model(x), y)

    @property
    def rows(self) -> int:
        return (self.batch or len(self.x)) * self.outputs

    def geometry(
        self,
        model: nn.Module,
        *,
        blocks: Blocks,
        mass: float,
        probes: int | None = None,
        refresh: int = 1,
    ) -> Geometry:
        output = self.output()
        if probes is not None:
            output = rm.output.Sampled(output, probes=probes)
        metric = rm.LayerwiseMetric(
            model,
            output=output,
            mass=mass,
            blocks=blocks,
            static_graph=True,
            # Passes between make gradients alone.
            fill_grad=refresh > 1,
            refresh=refresh,
        )

        def backward(batch: Batch) -> Tensor:
            x, y = batch
            with metric.record():
                outputs = model(x)
            loss = self.criterion(outputs, y)
            metric.backward(loss, outputs)
            return loss

        return Geometry(metric, backward, lambda batch: self.loss(model, batch))
