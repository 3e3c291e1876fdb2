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

import copy
import math
from collections.abc import Callable

import torch
from race import (
    Run,
    Step,
    draw,
    falling,
    lbfgs,
    levenberg_marquardt,
    parser,
    race,
    table,
)
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.functional import DifferentialOperator, Jet


def exact(z: Tensor) -> Tensor:
    """Return the solution at points ``(n, 2)`` of time and place."""
    return (-(math.pi**2) / 4.0 * z[:, 0]).exp() * (math.pi * z[:, 1]).sin()


def equation(u: Jet, z: Tensor) -> Tensor:
    """Return the residual of the heat equation at one point of time and place."""
    return u.d(0) - u.d(1, 1) / 4.0


def boundary(u: Jet, z: Tensor, known: Tensor) -> Tensor:
    """Return what the network misses of a known value."""
    return u.value - known


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
        self.operators = {
            "equation": DifferentialOperator(equation),
            "boundary": DifferentialOperator(boundary),
        }
        self.points = {
            "equation": (grid(midpoints(24)),),
            "boundary": (line, exact(line).unsqueeze(1)),
        }
        self.count = sum(len(each[0]) for each in self.points.values())
        self.test = grid(torch.linspace(0.0, 1.0, 61))

    def loss(self, values: dict[str, Tensor]) -> Tensor:
        """Return the mean square of all residuals."""
        return (
            torch.stack([e.square().sum() for e in values.values()]).sum() / self.count
        )

    def loss_of(self, net: nn.Module) -> Tensor:
        """Return the loss, for the optimizers of torch."""
        return self.loss(
            {
                name: operator.residuals(net, *self.points[name])
                for name, operator in self.operators.items()
            }
        )

    def error(self, net: nn.Module) -> float:
        """Return the relative error of the network in the mean square."""
        with torch.no_grad():
            u = exact(self.test)
            return float((net(self.test)[:, 0] - u).norm() / u.norm())


def layer_metric(net: nn.Module, problem: Problem) -> Step:
    """Return a step of this library."""
    metrics = {
        name: rm.output.Euclidean(2.0 * len(points[0]) / problem.count)
        for name, points in problem.points.items()
    }
    metric = rm.functional.FunctionalMetric(net, problem.operators, metrics)
    return levenberg_marquardt(metric, problem.loss, problem.points)


METHODS: dict[str, Callable[[nn.Module, Problem], Step]] = {
    "layer metric": layer_metric,
    "L-BFGS": lambda net, problem: lbfgs(
        net.parameters(), lambda: problem.loss_of(net)
    ),
    "Adam": lambda net, problem: falling(
        torch.optim.Adam(net.parameters()), lambda: problem.loss_of(net)
    ),
}


def plot(runs: list[Run], path: str) -> None:
    """Write the curves of the error over time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.0, 4.0))
    draw(axes, runs, "relative error of u")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the methods and print the table."""
    options = parser(__doc__.splitlines()[0], METHODS).parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start = nn.Sequential(
        nn.Linear(2, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 1)
    )
    problem, runs = Problem(), []
    for name in options.methods:
        net = copy.deepcopy(start)
        step = METHODS[name](net, problem)
        error = lambda net=net: problem.error(net)  # noqa: E731
        runs.append(race(name, step, error, options.seconds, options.steps))
    print(table(runs))
    if options.plot:
        plot(runs, options.plot)
    return runs


if __name__ == "__main__":
    main()
