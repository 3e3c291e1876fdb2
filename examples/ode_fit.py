"""Rates and axes of a damped rotation, fitted to trajectories.

A point in space spirals down about an unknown axis:

    x' = R A R^T x,   A = [[-a, -w, 0], [w, -a, 0], [0, 0, -b]]

with positive rates ``a, b, w`` and a rotation ``R``. Twelve noise-free trajectories are
known at twenty times; the model integrates the equation from the same starts by a
Runge-Kutta method of fixed step. The parameters are no network: they are a dictionary
that the function of the residuals gets, and live on their manifolds. Two methods have
the same time:

- Levenberg-Marquardt steps of this library in the exact metric of the residuals;
- Riemannian Adam of geoopt with a step length that falls to zero along a cosine.

    python examples/ode_fit.py
    python examples/ode_fit.py --seconds 5 --plot ode.png
"""

from collections.abc import Callable, Mapping

import geoopt
import torch
from race import Run, Step, draw, falling, levenberg_marquardt, parser, race, table
from torch import Tensor

import riemannian_modules as rm
from riemannian_modules.functional import FunctionalMetric, Parameters, of_batch

TIMES = 20
SUBSTEPS = 2
STEP = 0.1


def generator(p: Mapping[str, Tensor]) -> Tensor:
    """Return ``R A R^T``."""
    a, b, w = p["rates"]
    zero = torch.zeros_like(a)
    inner = torch.stack([-a, -w, zero, w, -a, zero, zero, zero, -b]).view(3, 3)
    return p["rotation"] @ inner @ p["rotation"].mT


def trajectory(p: Mapping[str, Tensor], starts: Tensor) -> Tensor:
    """Return where points are at the later times, ``(n, times, 3)``."""
    flow = generator(p).mT
    x, found, h = starts, [], STEP / SUBSTEPS
    for _ in range(TIMES):
        for _ in range(SUBSTEPS):
            k1 = x @ flow
            k2 = (x + 0.5 * h * k1) @ flow
            k3 = (x + 0.5 * h * k2) @ flow
            k4 = (x + h * k3) @ flow
            x = x + h / 6.0 * (k1 + 2.0 * k2 + 2.0 * k3 + k4)
        found.append(x)
    return torch.stack(found, 1)


def misfit(p: Mapping[str, Tensor], starts: Tensor, seen: Tensor) -> Tensor:
    """Return the residuals of a batch, ``(n, times, 3)``."""
    return trajectory(p, starts) - seen


def truth() -> dict[str, Tensor]:
    """Return the parameters that the data come from."""
    turn = torch.tensor([[0.0, -0.9, 0.4], [0.9, 0.0, -0.6], [-0.4, 0.6, 0.0]])
    return {
        "rates": torch.tensor([0.3, 0.8, 3.0]),
        "rotation": torch.linalg.matrix_exp(turn),
    }


def model() -> Parameters:
    """Return the parameters where the fit begins."""
    return Parameters(
        rates=geoopt.ManifoldParameter(torch.ones(3), rm.manifolds.Positive()),
        rotation=geoopt.ManifoldParameter(
            torch.eye(3), rm.manifolds.SpecialOrthogonal()
        ),
    )


class Problem:
    """Starts, data and error.

    Args:
        count: number of trajectories.
    """

    def __init__(self, count: int = 12) -> None:
        self.starts = torch.randn(count, 3)
        self.seen = trajectory(truth(), self.starts)

    def loss_of(self, fit: Parameters) -> Tensor:
        """Return the mean square of all residuals."""
        return misfit(fit(), self.starts, self.seen).square().mean()

    def error(self, fit: Parameters) -> float:
        """Return the relative error of ``R A R^T``, of which R alone is not known."""
        with torch.no_grad():
            exact = generator(truth())
            return float((generator(fit()) - exact).norm() / exact.norm())


def layer_metric(fit: Parameters, problem: Problem) -> Step:
    """Return a step of this library."""
    entries = problem.seen[0].numel()
    metric = FunctionalMetric(fit, of_batch(misfit), rm.output.Euclidean(2.0 / entries))
    loss: Callable[[Tensor], Tensor] = lambda values: values.square().mean()  # noqa: E731
    return levenberg_marquardt(metric, loss, problem.starts, problem.seen)


def adam(fit: Parameters, problem: Problem) -> Step:
    """Return a step of Riemannian Adam."""
    optimizer = geoopt.optim.RiemannianAdam(fit.parameters())
    return falling(optimizer, lambda: problem.loss_of(fit), lr=3e-2)


METHODS = {"layer metric": layer_metric, "Riemannian Adam": adam}


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the methods and print the table."""
    command = parser(__doc__.splitlines()[0], METHODS)
    command.set_defaults(seconds=5.0)
    options = command.parse_args(arguments)
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    problem, runs = Problem(), []
    for name in options.methods:
        fit = model()
        step = METHODS[name](fit, problem)
        error = lambda fit=fit: problem.error(fit)  # noqa: E731
        runs.append(race(name, step, error, options.seconds, options.steps))
        rates = ", ".join(f"{rate:.6f}" for rate in fit["rates"].tolist())
        print(f"{name}: rates {rates}")
    print(table(runs))
    if options.plot:
        import matplotlib.pyplot as plt

        figure, axes = plt.subplots(figsize=(6.0, 4.0))
        draw(axes, runs, "relative error of the generator")
        figure.tight_layout()
        figure.savefig(options.plot, dpi=150)
    return runs


if __name__ == "__main__":
    main()
