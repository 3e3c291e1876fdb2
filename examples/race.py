"""What the examples on equations share: optimizers that have the same time.

Not run by itself; see heat_equation.py, poisson.py and ode_fit.py.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import riemannian_modules as rm

# Takes the share of the time that is gone, returns the loss.
Step = Callable[[float], float]


@dataclass
class Run:
    """The curve of one method."""

    name: str
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps it took."""
        return len(self.losses)


def race(
    name: str,
    step: Step,
    error: Callable[[], float],
    seconds: float,
    steps: int | None = None,
) -> Run:
    """Take steps for some seconds; what the error costs does not count.

    Args:
        name: of the method.
        step: takes one step.
        error: tells how far the model is from the truth.
        seconds: of steps.
        steps: at most so many; None: no bound.

    Returns:
        The curve.
    """
    found, spent = Run(name), 0.0
    found.seconds.append(0.0)
    found.errors.append(error())
    with tqdm(total=seconds, desc=name, unit="s", bar_format="{l_bar}{bar}") as bar:
        while spent < seconds and found.steps != steps:
            began = time.perf_counter()
            loss = step(spent / seconds)
            took = time.perf_counter() - began
            spent += took
            found.losses.append(loss)
            found.seconds.append(spent)
            found.errors.append(error())
            bar.update(min(took, seconds - bar.n))
    return found


def levenberg_marquardt(
    metric: rm.functional.FunctionalMetric,
    loss: Callable[[Any], Tensor],
    *examples: Any,
    **settings: float,
) -> Step:
    """Return a step of this library.

    Args:
        metric: the metric of the residuals.
        loss: of the metric's outputs.
        *examples: what the metric is called with.
        **settings: of the optimizer.
    """
    optimizer = rm.optim.LevenbergMarquardt(metric, **settings)

    def step(_: float) -> float:
        values = metric(*examples)
        metric.backward(loss(values), values)
        return optimizer.step(lambda: loss(metric(*examples)))

    return step


def lbfgs(parameters: Iterable[Tensor], loss: Callable[[], Tensor]) -> Step:
    """Return ten iterations of L-BFGS."""
    optimizer = torch.optim.LBFGS(
        parameters, max_iter=10, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value

    return lambda _: float(optimizer.step(closure).detach())


def falling(
    optimizer: torch.optim.Optimizer, loss: Callable[[], Tensor], lr: float = 1e-2
) -> Step:
    """Return a step whose length falls to zero along a cosine.

    Args:
        optimizer: Adam of torch, or of geoopt.
        loss: the loss at the parameters' present values.
        lr: the first length.
    """

    def step(gone: float) -> float:
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * lr * (1.0 + math.cos(math.pi * gone))
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


def table(runs: Sequence[Run]) -> str:
    """Return the results as a table."""
    lines = [f"{'method':<18}{'error':>10}{'loss':>11}{'steps':>8}{'seconds':>9}"]
    lines += [
        f"{each.name:<18}{each.errors[-1]:>10.1e}{each.losses[-1]:>11.1e}"
        f"{each.steps:>8}{each.seconds[-1]:>9.1f}"
        for each in runs
    ]
    return "\n".join(lines)


def draw(axes: Any, runs: Sequence[Run], what: str) -> None:
    """Draw the errors over time."""
    for each in runs:
        axes.semilogy(each.seconds, each.errors, label=each.name)
    axes.set(xlabel="seconds of steps", ylabel=what)
    axes.legend()


def parser(description: str, methods: Iterable[str]) -> argparse.ArgumentParser:
    """Return what the command lines have in common."""
    methods = list(methods)
    found = argparse.ArgumentParser(description=description)
    found.add_argument("--seconds", type=float, default=8.0, help="for each method")
    found.add_argument("--steps", type=int, help="at most so many for each method")
    found.add_argument("--seed", type=int, default=0)
    found.add_argument("--methods", nargs="+", choices=methods, default=methods)
    found.add_argument("--threads", type=int, default=1)
    found.add_argument("--plot", metavar="FILE.png")
    return found
