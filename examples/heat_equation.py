"""Solve the heat equation with a neural network in three ways, from the same start.

``u_t = u_xx / 4`` on the unit square, ``u = exp(-pi^2 t / 4) sin(pi x)``. A network
2-32-32-1 is judged by the residual of the equation at 24 x 24 points, and by its values
at 48 points on each of the two boundaries and the initial line; all residuals are in
one mean square. Three methods have the same time:

- Levenberg-Marquardt steps of this library in the exact metric of the residuals;
- L-BFGS of torch with a strong Wolfe line search;
- Adam of torch with a step length that falls to zero along a cosine.

    python examples/heat_equation.py
    python examples/heat_equation.py --seconds 8 --plot heat.png
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.func import jvp
from tqdm import tqdm

import riemannian_modules as rm

Net = Callable[[Tensor], Tensor]


def exact(z: Tensor) -> Tensor:
    """Return the solution at points ``(n, 2)`` of time and place."""
    return (-(math.pi**2) / 4.0 * z[:, 0]).exp() * (math.pi * z[:, 1]).sin()


def equation(net: Net, z: Tensor) -> Tensor:
    """Return the residual of the heat equation at one point."""
    time_axis, space_axis = torch.eye(2, dtype=z.dtype)

    def slope(at: Tensor) -> Tensor:
        return jvp(net, (at,), (space_axis,))[1]

    u_t = jvp(net, (z,), (time_axis,))[1]
    return (u_t - jvp(slope, (z,), (space_axis,))[1] / 4.0)[0]


def boundary(net: Net, z: Tensor, value: Tensor) -> Tensor:
    """Return what the network misses of a known value."""
    return net(z)[0] - value


def midpoints(count: int) -> Tensor:
    """Return the midpoints of equal cells of the unit interval."""
    return (torch.arange(count) + 0.5) / count


def grid(coordinates: Tensor) -> Tensor:
    """Return all pairs of coordinates, ``(n * n, 2)``."""
    pair = torch.meshgrid(coordinates, coordinates, indexing="ij")
    return torch.stack([each.flatten() for each in pair], 1)


class Problem:
    """Points, loss and error of the heat equation."""

    def __init__(self) -> None:
        side, zero = midpoints(48), torch.zeros(48)
        edges = [(side, zero), (side, zero + 1.0), (zero, side)]
        line = torch.cat([torch.stack(pair, 1) for pair in edges])
        self.inside = grid(midpoints(24))
        self.line = line
        self.values = exact(line)
        self.count = len(self.inside) + len(line)
        self.test = grid(torch.linspace(0.0, 1.0, 61))

    def loss(self, net: nn.Module) -> Tensor:
        """Return the mean square of all residuals, for the optimizers of torch."""
        inside = torch.func.vmap(equation, (None, 0))(net, self.inside)
        line = net(self.line)[:, 0] - self.values
        return (inside.square().sum() + line.square().sum()) / self.count

    def error(self, net: nn.Module) -> float:
        """Return the relative error of the network in the mean square."""
        with torch.no_grad():
            u = exact(self.test)
            return float((net(self.test)[:, 0] - u).norm() / u.norm())


@dataclass
class Run:
    """The curve of one method."""

    name: str
    seconds: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    note: str = ""


def layer_metric(net: nn.Module, problem: Problem) -> Callable[[float], float]:
    """Return one step of this library."""
    weights = (2.0 * len(problem.inside), 2.0 * len(problem.line))
    metric = rm.functional.FunctionalMetric(
        net,
        {"equation": equation, "boundary": boundary},
        {
            "equation": rm.output.Euclidean(weights[0] / problem.count),
            "boundary": rm.output.Euclidean(weights[1] / problem.count),
        },
    )
    optimizer = rm.optim.LevenbergMarquardt(metric)
    points = {
        "equation": problem.inside,
        "boundary": (problem.line, problem.values),
    }

    def loss(values: dict[str, Tensor]) -> Tensor:
        total = sum(each.square().sum() for each in values.values())
        return total / problem.count

    def step(_: float) -> float:
        values = metric(points)
        metric.backward(loss(values), values)
        return optimizer.step(lambda: loss(metric(points)))

    return step


def lbfgs(net: nn.Module, problem: Problem) -> Callable[[float], float]:
    """Return ten iterations of L-BFGS."""
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=10, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = problem.loss(net)
        value.backward()
        return value

    return lambda _: float(optimizer.step(closure).detach())


def adam(net: nn.Module, problem: Problem) -> Callable[[float], float]:
    """Return one step of Adam; the step length falls with the time that is gone."""
    optimizer = torch.optim.Adam(net.parameters())

    def step(gone: float) -> float:
        optimizer.param_groups[0]["lr"] = 5e-3 * (1.0 + math.cos(math.pi * gone))
        optimizer.zero_grad()
        value = problem.loss(net)
        value.backward()
        optimizer.step()
        return float(value.detach())

    return step


METHODS = {"layer metric": layer_metric, "L-BFGS": lbfgs, "Adam": adam}


def run(name: str, start: nn.Module, problem: Problem, seconds: float) -> Run:
    """Train a copy of the network for some seconds of steps."""
    net = copy.deepcopy(start)
    step, found, spent = METHODS[name](net, problem), Run(name), 0.0
    found.seconds.append(0.0)
    found.errors.append(problem.error(net))
    with tqdm(total=seconds, desc=name, unit="s", bar_format="{l_bar}{bar}") as bar:
        while spent < seconds:
            began = time.perf_counter()
            loss = step(spent / seconds)
            took = time.perf_counter() - began
            spent += took
            found.steps += 1
            found.losses.append(loss)
            found.seconds.append(spent)
            found.errors.append(problem.error(net))
            bar.update(min(took, seconds - bar.n))
    return found


def table(runs: list[Run]) -> str:
    """Return the results as a table."""
    lines = [f"{'method':<14}{'error':>10}{'loss':>11}{'steps':>8}{'seconds':>9}"]
    lines += [
        f"{each.name:<14}{each.errors[-1]:>10.1e}{each.losses[-1]:>11.1e}"
        f"{each.steps:>8}{each.seconds[-1]:>9.1f}"
        for each in runs
    ]
    return "\n".join(lines)


def plot(runs: list[Run], path: str) -> None:
    """Write the curves of the error over time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.0, 4.0))
    for each in runs:
        axes.semilogy(each.seconds, each.errors, label=each.name)
    axes.set(xlabel="seconds of steps", ylabel="relative error of u")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each method")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    net = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    problem = Problem()
    runs = [run(name, net, problem, options.seconds) for name in options.methods]
    print(table(runs))
    if options.plot:
        plot(runs, options.plot)
    return runs


if __name__ == "__main__":
    main()
