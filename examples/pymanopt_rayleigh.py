"""The smallest eigenvalue of a matrix by pymanopt's steepest descent, in two metrics.

The Rayleigh quotient ``x^T A x / 2`` of unit vectors is a linear layer without bias
whose weight lives on a sphere: its inputs are the rows of a root of A, its loss is half
the sum of squares of its outputs. In the sphere's own metric the condition number of
the Hessian is a fixed part of that of A, and steepest descent crawls. In the layer
metric, ``mu + A`` on tangent vectors, it is close to 1.

    python examples/pymanopt_rayleigh.py
    python examples/pymanopt_rayleigh.py --condition 1e5 --plot rayleigh.png
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from pymanopt.optimizers import SteepestDescent
from torch import Tensor

import riemannian_modules as rm
from riemannian_modules.interop.pymanopt import ModelProblem, problem

GAP = 4.0  # of the two smallest eigenvalues; the next ones are spread in logarithm


def half_of_squares(outputs: Tensor) -> Tensor:
    """Return the loss: the Rayleigh quotient, divided by 2."""
    return 0.5 * outputs.square().sum()


def make_root(dim: int, condition: float, generator: torch.Generator) -> Tensor:
    """Return a symmetric root; the eigenvalues go from 1 to ``condition``."""
    others = torch.logspace(
        np.log10(GAP), np.log10(condition), dim - 1, dtype=torch.float64
    )
    values = torch.cat((torch.ones(1, dtype=torch.float64), others))
    gaussian = torch.randn(dim, dim, dtype=torch.float64, generator=generator)
    vectors, _ = torch.linalg.qr(gaussian)
    return (vectors * values.sqrt()) @ vectors.T


@dataclass
class Run:
    """What an optimizer did.

    Attributes:
        label: the metric.
        errors: cost above the minimum at every iterate.
        norms: norm of the gradient on the sphere, in the Euclidean metric.
        iterations: iterations until the gradient's norm was below the tolerance.
        converged: whether it was.
        seconds: wall-clock time.
    """

    label: str
    errors: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    iterations: int = 0
    converged: bool = False
    seconds: float = 0.0


def descend(
    label: str, task: ModelProblem, least: float, iterations: int, tolerance: float
) -> Run:
    """Run steepest descent and note what every iterate looks like."""
    run = Run(label)
    sphere = rm.manifolds.Sphere()

    def gradient(point: np.ndarray) -> np.ndarray:
        x, e = (
            torch.from_numpy(task.manifold.unpack(array)["weight"])
            for array in (point, task.euclidean_gradient(point))
        )
        run.errors.append(task.cost(point) - least)
        run.norms.append(float(sphere.egrad2rgrad(x, e).norm()))
        return task.riemannian_gradient(point)

    traced = SimpleNamespace(
        manifold=task.manifold, cost=task.cost, riemannian_gradient=gradient
    )
    optimizer = SteepestDescent(
        max_iterations=iterations, min_gradient_norm=tolerance, verbosity=0
    )
    result = optimizer.run(traced, initial_point=task.initial_point)
    run.iterations, run.seconds = result.iterations, result.time
    run.converged = result.gradient_norm < tolerance
    task.write_back(result)
    return run


def table(runs: Sequence[Run]) -> str:
    """Return the outcome as lines of text."""
    lines = [
        f"{'metric':<24}{'iterations':>11}{'converged':>11}{'cost - min':>12}"
        f"{'|gradient|':>12}{'seconds':>9}"
    ]
    lines += [
        f"{run.label:<24}{run.iterations:>11}{'yes' if run.converged else 'no':>11}"
        f"{run.errors[-1]:>12.1e}{run.norms[-1]:>12.1e}{run.seconds:>9.2f}"
        for run in runs
    ]
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Write the costs above the minimum and the gradients' norms as curves."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for run in runs:
        left.semilogy(np.maximum(run.errors, 1e-16), label=run.label)
        right.semilogy(run.norms, label=run.label)
    left.set(xlabel="iteration", ylabel="Rayleigh quotient / 2 above its minimum")
    right.set(xlabel="iteration", ylabel="norm of the gradient (Euclidean)")
    left.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="The smallest eigenvalue by pymanopt's steepest descent, in the "
        "layer metric and in the sphere's own."
    )
    parser.add_argument("--dim", type=int, default=50)
    parser.add_argument("--condition", type=float, default=1e3)
    parser.add_argument("--mass", type=float, default=1e-3)
    parser.add_argument("--iterations", type=int, default=300)
    parser.add_argument("--tolerance", type=float, default=1e-6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="write the curves"
    )
    options = parser.parse_args(argv)
    if options.dim < 2 or options.condition <= GAP:
        parser.error(f"--dim must be at least 2 and --condition above {GAP:g}")
    return options


def compare(options: argparse.Namespace) -> list[Run]:
    """Run steepest descent in both metrics from the same start."""
    generator = torch.Generator().manual_seed(options.seed)
    root = make_root(options.dim, options.condition, generator)
    start = torch.randn(1, options.dim, dtype=torch.float64, generator=generator)
    runs = []
    for label, geometry in (("layer metric", "layer"), ("sphere's own metric", "base")):
        model = rm.nn.Linear(
            options.dim,
            1,
            bias=False,
            manifold=rm.manifolds.Sphere(),
            dtype=torch.float64,
        )
        with torch.no_grad():
            model.weight.copy_(start / start.norm())
        metric = rm.LayerwiseMetric(
            model, output=rm.output.Euclidean(), mass=options.mass, reduction="sum"
        )
        task = problem(metric, half_of_squares, root, geometry=geometry)
        runs.append(descend(label, task, 0.5, options.iterations, options.tolerance))
    return runs


def main(argv: Sequence[str] | None = None) -> int:
    """Compare the metrics, print the table.

    Args:
        argv: the command line; None: that of the process.

    Returns:
        The exit status.
    """
    options = arguments(argv)
    torch.set_num_threads(1)  # matrices this small are slower on several
    title = f"Rayleigh quotient, {options.dim} x {options.dim}, "
    title += f"condition number {options.condition:g}"
    print(f"{title}\nSteepestDescent of pymanopt, from the same start\n")
    runs = compare(options)
    print(table(runs))
    if options.plot:
        plot(runs, options.plot, title)
        print(f"\ncurves: {options.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
