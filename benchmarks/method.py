"""What a training method has to say, so that it can be raced on every problem."""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from benchmarks.problem import Batch, Problem

Settings = dict[str, float]
# Takes a batch and the share of the time that is gone.
Step = Callable[[Batch, float], None]
Family = Literal["ours", "torch", "geoopt", "peer"]


@dataclass(frozen=True)
class Method:
    """One method of training.

    Attributes:
        name: for the command line and the files.
        family: whose it is.
        about: one line: what it is and what is not in the settings.
        grid: the settings to choose from on a problem, at most six.
        build: ``build(problem, model, settings)`` returns a step.
        suits: ``suits(problem)`` says why not, or nothing.
        needs: the packages that it imports.
    """

    name: str
    family: Family
    about: str
    grid: Callable[[Problem], Sequence[Settings]]
    build: Callable[[Problem, nn.Module, Settings], Step]
    suits: Callable[[Problem], str]
    needs: tuple[str, ...] = ()

    def refusal(self, problem: Problem) -> str:
        """Return why the method cannot run on a problem, "" if it can."""
        absent = [name for name in self.needs if importlib.util.find_spec(name) is None]
        if absent:
            return f"not installed: {', '.join(absent)} (benchmarks/peers.txt)"
        return self.suits(problem)


def unconstrained(problem: Problem) -> str:
    """Say why an optimizer that knows no manifolds does not suit."""
    if problem.kind == "manifold":
        return "its parameters live on manifolds, which this method leaves"
    return ""


def full_batch(problem: Problem) -> str:
    """Say why an optimizer that compares losses does not suit."""
    return "" if problem.full_batch else "the loss changes from step to step"


def ordinary(
    problem: Problem, model: nn.Module, optimizers: Sequence[torch.optim.Optimizer]
) -> Step:
    """Return a step of optimizers that take a gradient and have a learning rate."""
    first = [[group["lr"] for group in each.param_groups] for each in optimizers]

    def step(batch: Batch, gone: float) -> None:
        factor = problem.schedule(gone)
        for optimizer, rates in zip(optimizers, first, strict=True):
            optimizer.zero_grad()
            for group, lr in zip(optimizer.param_groups, rates, strict=True):
                group["lr"] = factor * lr
        problem.loss(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()

    return step
