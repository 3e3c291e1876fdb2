"""Two small problems for optimizers, and an optimizer at work on one of them."""

import copy
import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.nn import Linear, Sequential

__all__ = ["Factory", "Problem", "Run", "convex", "curved", "leaves"]

Groups = list[dict[str, Any]]
Made = torch.optim.Optimizer | tuple[torch.optim.Optimizer, LayerwiseMetric]
Factory = Callable[[nn.Module, Groups], Made]


@dataclass(frozen=True)
class Problem:
    """A model with data: least squares.

    Attributes:
        model: the model at its start; it is copied for every run.
        x: inputs.
        y: targets.
        optimum: the least loss, or None where it is not known.
    """

    model: nn.Module
    x: Tensor
    y: Tensor
    optimum: float | None = None

    def loss(self, outputs: Tensor) -> Tensor:
        """Return half the mean squared distance to the targets."""
        return 0.5 * (outputs - self.y).square().sum(-1).mean()


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def _fill(model: nn.Module, generator: torch.Generator) -> nn.Module:
    with torch.no_grad():
        for parameter in model.parameters():
            value = _normal(generator, *parameter.shape)
            manifold = getattr(parameter, "manifold", None)
            value = 0.3 * value if manifold is None else manifold.projx(value)
            parameter.copy_(value)
    return model


def convex(generator: torch.Generator) -> Problem:
    """Return linear regression from 3 to 2 numbers, with an offset."""
    model = _fill(nn.Linear(3, 2, dtype=torch.float64), generator)
    x, y = _normal(generator, 12, 3), _normal(generator, 12, 2)
    wide = torch.cat([x, torch.ones(12, 1, dtype=torch.float64)], 1)
    rest = wide @ torch.linalg.lstsq(wide, y).solution - y
    return Problem(model, x, y, float(0.5 * rest.square().sum(-1).mean()))


def curved(generator: torch.Generator, manifold: geoopt.Manifold) -> Problem:
    """Return a network with its first weight, (3, 4), on a manifold."""
    model = Sequential(
        Linear(4, 3, manifold=manifold, dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(3, 2, dtype=torch.float64),
    )
    _fill(model, generator)
    return Problem(model, _normal(generator, 8, 4), _normal(generator, 8, 2))


def leaves(value: Any) -> Iterator[Any]:
    """Yield what is in nested dictionaries and sequences, keys included."""
    if isinstance(value, dict):
        for key, each in value.items():
            yield key
            yield from leaves(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from leaves(each)
    else:
        yield value


class Run:
    """An optimizer made by a factory, on a copy of a problem's model.

    Args:
        factory: makes the optimizer.
        problem: the problem.
        closures: whether every step needs a closure.
        groups: attributes of the parameters of every group, by name patterns; None:
            one group with all parameters.
    """

    def __init__(
        self,
        factory: Factory,
        problem: Problem,
        closures: bool = False,
        groups: Sequence[Sequence[str]] | None = None,
    ) -> None:
        self.problem, self.closures = problem, closures
        self.model = copy.deepcopy(problem.model)
        named = dict(self.model.named_parameters())
        names = [list(named)] if groups is None else groups
        made = factory(
            self.model, [{"params": [named[n] for n in each]} for each in names]
        )
        optimizer, metric = made if isinstance(made, tuple) else (made, None)
        own = getattr(optimizer, "metric", metric)
        self.optimizer = optimizer
        self.metric = own if isinstance(own, LayerwiseMetric) else None

    def evaluate(self, x: Tensor | None = None) -> Tensor:
        """Fill the gradients and return the loss."""
        x = self.problem.x if x is None else x
        if self.metric is None:
            self.optimizer.zero_grad()
            loss = self.problem.loss(self.model(x))
            loss.backward()
            return loss.detach()
        with self.metric.record():
            outputs = self.model(x)
        loss = self.problem.loss(outputs)
        self.metric.backward(loss, outputs)
        return loss.detach()

    def step(self, x: Tensor | None = None) -> None:
        """Take one step."""
        if self.closures:
            self.optimizer.step(lambda: float(self.evaluate(x)))
        else:
            self.evaluate(x)
            self.optimizer.step()

    def steps(self, count: int) -> "Run":
        """Take some steps and return this run."""
        for _ in range(count):
            self.step()
        return self

    def value(self) -> float:
        """Return the loss."""
        with torch.no_grad():
            return float(self.problem.loss(self.model(self.problem.x)))

    def parameters(self) -> dict[str, Tensor]:
        """Return copies of the parameters."""
        return {
            name: p.detach().as_subclass(Tensor).clone()
            for name, p in self.model.named_parameters()
        }

    def state(self) -> dict[str, Any]:
        """Return model and optimizer as they come out of a file that is safe to load.

        A file with anything but tensors, numbers and strings raises.
        """
        content = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "metric": None if self.metric is None else self.metric.state_dict(),
        }
        file = io.BytesIO()
        torch.save(content, file)
        file.seek(0)
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found

    def load(self, state: dict[str, Any]) -> "Run":
        """Take over a state and return this run."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.metric is not None:
            self.metric.load_state_dict(state["metric"])
        return self

    def same(self, other: "Run | dict[str, Any]") -> bool:
        """Return whether model and optimizer are equal bit for bit."""
        one = list(leaves(self.state()))
        two = list(leaves(other.state() if isinstance(other, Run) else other))
        return len(one) == len(two) and all(map(_equal, one, two))


def _equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and bool(torch.equal(a, b))
    return type(a) is type(b) and bool(a == b)
