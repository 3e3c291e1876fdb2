"""The Poisson equation by a physics-informed network, in exact metrics and without.

``-lap u = f`` with known values of u on the boundary,

- on the unit square, with ``u = sin(pi x) sin(pi y)``: a network 2-32-32-1, 30 x 30
  points inside and 30 on each edge;
- on the unit interval (``--dimension 1``), with ``u = sin(2 pi x) + 0.1 sin(12 pi x)``,
  two scales at once: a network 1-32-32-1, 200 points inside and the two ends.

The loss is the mean square of the residuals inside plus a hundred times the mean square
of what is missed on the boundary: the residuals hold two derivatives, so an error of u
inside counts some hundred times as much. Three methods have the same time:

- Levenberg-Marquardt steps of this library in the exact metric of the residuals;
- L-BFGS of torch with a strong Wolfe line search;
- Adam of torch with a step length that falls to zero along a cosine.

    python examples/poisson.py
    python examples/poisson.py --dimension 1 --seconds 8 --plot poisson.png
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

# Of the mean squares in the loss.
WEIGHTS = {"equation": 1.0, "boundary": 100.0}
# The residuals bend so much that few steps keep the model's word to 75 per cent.
SETTINGS = {"good": 0.5, "bad": 0.1, "shrink": 0.2, "grow": 1.4}


def square(z: Tensor) -> Tensor:
    """Return the solution at points ``(n, 2)``."""
    return (math.pi * z).sin().prod(-1)


def square_source(z: Tensor) -> Tensor:
    """Return ``-lap u``."""
    return 2.0 * math.pi**2 * square(z)


def interval(z: Tensor) -> Tensor:
    """Return the solution at points ``(n, 1)``."""
    x = math.pi * z[:, 0]
    return (2.0 * x).sin() + 0.1 * (12.0 * x).sin()


def interval_source(z: Tensor) -> Tensor:
    """Return ``-u''``."""
    x = math.pi * z[:, 0]
    return math.pi**2 * (4.0 * (2.0 * x).sin() + 14.4 * (12.0 * x).sin())


def equation(u: Jet, z: Tensor, source: Tensor) -> Tensor:
    """Return the residual at one point."""
    return -u.laplacian() - source


def boundary(u: Jet, z: Tensor, known: Tensor) -> Tensor:
    """Return what the network misses of a known value."""
    return u.value - known


def midpoints(count: int) -> Tensor:
    """Return the midpoints of equal cells of the unit interval."""
    return (torch.arange(count) + 0.5) / count


def grid(x: Tensor) -> Tensor:
    """Return all pairs of coordinates, ``(n * n, 2)``."""
    return torch.cartesian_prod(x, x)


class Problem:
    """Points, operators, loss and error.

    Args:
        dimension: 1 or 2.
        side: points along each side.
    """

    def __init__(self, dimension: int, side: int) -> None:
        x = midpoints(side)
        if dimension == 1:
            self.solution: Callable[[Tensor], Tensor] = interval
            source, inside = interval_source, x.unsqueeze(1)
            edge = torch.tensor([[0.0], [1.0]])
            self.test = torch.linspace(0.0, 1.0, 1001).unsqueeze(1)
        else:
            self.solution, source, inside = square, square_source, grid(x)
            along = [torch.stack([x, torch.full_like(x, at)], 1) for at in (0.0, 1.0)]
            edge = torch.cat([*along, *(each.flip(1) for each in along)])
            self.test = grid(torch.linspace(0.0, 1.0, 101))
        self.operators = {
            "equation": DifferentialOperator(equation),
            "boundary": DifferentialOperator(boundary),
        }
        self.points = {
            "equation": (inside, source(inside).unsqueeze(1)),
            "boundary": (edge, self.solution(edge).unsqueeze(1)),
        }

    def loss(self, values: dict[str, Tensor]) -> Tensor:
        """Return the weighed sum of the mean squares of the residuals."""
        means = [WEIGHTS[name] * each.square().mean() for name, each in values.items()]
        return torch.stack(means).sum()

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
            u = self.solution(self.test)
            return float((net(self.test)[:, 0] - u).norm() / u.norm())


def network(dimension: int, width: int = 32) -> nn.Module:
    """Return the network."""
    return nn.Sequential(
        nn.Linear(dimension, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 1),
    )


def layer_metric(net: nn.Module, problem: Problem) -> Step:
    """Return a step of this library."""
    metric = rm.functional.FunctionalMetric(
        net,
        problem.operators,
        {name: rm.output.Euclidean(2.0 * weight) for name, weight in WEIGHTS.items()},
    )
    return levenberg_marquardt(metric, problem.loss, problem.points, **SETTINGS)


METHODS: dict[str, Callable[[nn.Module, Problem], Step]] = {
    "layer metric": layer_metric,
    "L-BFGS": lambda net, problem: lbfgs(
        net.parameters(), lambda: problem.loss_of(net)
    ),
    "Adam": lambda net, problem: falling(
        torch.optim.Adam(net.parameters()), lambda: problem.loss_of(net)
    ),
}


def plot(runs: list[Run], net: nn.Module, problem: Problem, path: str) -> None:
    """Write the errors over time, the solution and its error."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12.0, 3.6))
    draw(left, runs, "relative error of u")
    with torch.no_grad():
        u = net(problem.test)[:, 0]
    error = u - problem.solution(problem.test)
    for axes, values, title in ((middle, u, "u"), (right, error, "error of u")):
        axes.set_title(title)
        if problem.test.shape[1] == 1:
            axes.plot(problem.test[:, 0], values)
            axes.set(xlabel="x")
            continue
        side = math.isqrt(len(values))
        image = axes.imshow(
            values.view(side, side).T, origin="lower", extent=(0, 1, 0, 1)
        )
        axes.set(xlabel="x", ylabel="y")
        figure.colorbar(image, ax=axes)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the methods and print the table."""
    command = parser(__doc__.splitlines()[0], METHODS)
    command.add_argument("--dimension", type=int, choices=(1, 2), default=2)
    options = command.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    start = network(options.dimension)
    problem = Problem(options.dimension, 200 if options.dimension == 1 else 30)
    runs, nets = [], []
    for name in options.methods:
        net = copy.deepcopy(start)
        step = METHODS[name](net, problem)
        error = lambda net=net: problem.error(net)  # noqa: E731
        runs.append(race(name, step, error, options.seconds, options.steps))
        nets.append(net)
    print(table(runs))
    if options.plot:
        best = min(range(len(runs)), key=lambda i: runs[i].errors[-1])
        plot(runs, nets[best], problem, options.plot)
    return runs


if __name__ == "__main__":
    main()
