"""A network with a Stiefel layer, trained to the last digit by pymanopt.

Two layers on all of scikit-learn's digits, full batch, with weight decay. TrustRegions
of pymanopt minimises the loss to a gradient of norm 1e-8: in the layer metric, in the
manifolds' own metrics with the layer metric as a preconditioner, and without one. It is
a Newton method with the exact Hessian, which takes fewer products with the Hessian, the
better the metric resembles it; the layer metric itself costs time at each new point.

    python examples/pymanopt_digits.py
    python examples/pymanopt_digits.py --plot digits.png
    python examples/pymanopt_digits.py --quick
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torch.nn.functional as F
from pymanopt.optimizers import TrustRegions
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.interop.pymanopt import ModelProblem, problem

SCALE = 0.5  # of the inputs: tanh stays in its bend, neither linear nor saturated


def load(limit: int | None) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's digits, centred and scaled, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.from_numpy(images)[:limit].double()
    x = x - x.mean(0)
    return SCALE * x / x.std(), torch.from_numpy(labels)[:limit].long()


def make_model(width: int, seed: int) -> nn.Module:
    """Return 64 pixels, ``width`` orthonormal filters, tanh, 10 logits."""
    torch.manual_seed(seed)
    return nn.Sequential(
        rm.nn.Linear(64, width, manifold=rm.manifolds.Stiefel(), dtype=torch.float64),
        nn.Tanh(),
        nn.Linear(width, 10, dtype=torch.float64),
    )


@dataclass
class Run:
    """What the optimizer did.

    Attributes:
        label: metric.
        costs: cost at every new iterate.
        norms: norm of the gradient there, in the metric of the run.
        times: seconds since the start.
        products: number of products with the Hessian.
        iterations: outer iterations.
    """

    label: str
    costs: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    products: int = 0
    iterations: int = 0


def minimise(
    label: str, task: ModelProblem, iterations: int, tolerance: float, seconds: float
) -> Run:
    """Run TrustRegions, write the result into the model, return the curves."""
    run = Run(label)
    began = time.perf_counter()
    manifold = task.manifold
    gradient_of, hessian_of = task.riemannian_gradient, task.riemannian_hessian

    def gradient(point: np.ndarray) -> np.ndarray:
        found = gradient_of(point)
        run.costs.append(task.cost(point))
        run.norms.append(manifold.norm(point, found))
        run.times.append(time.perf_counter() - began)
        print(
            f"\r  {label}: cost {run.costs[-1]:.8f}, |gradient| {run.norms[-1]:.1e}  ",
            end="",
            flush=True,
        )
        return found

    def hessian(point: np.ndarray, vector: np.ndarray) -> np.ndarray:
        run.products += 1
        return hessian_of(point, vector)

    traced = SimpleNamespace(
        manifold=manifold,
        cost=task.cost,
        riemannian_gradient=gradient,
        riemannian_hessian=hessian,
        preconditioner=task.preconditioner,
    )
    optimizer = TrustRegions(
        max_iterations=iterations,
        min_gradient_norm=tolerance,
        max_time=seconds,
        verbosity=0,
    )
    result = optimizer.run(traced, initial_point=task.initial_point)
    print()
    run.iterations = result.iterations
    task.write_back(result)
    return run


def table(runs: Sequence[Run], errors: Sequence[float]) -> str:
    """Return the outcome as lines of text."""
    lines = [
        f"{'metric':<24}{'iterations':>11}{'Hessians':>10}{'seconds':>9}"
        f"{'cost':>14}{'|gradient|':>12}{'errors':>8}"
    ]
    lines += [
        f"{run.label:<24}{run.iterations:>11}{run.products:>10}{run.times[-1]:>9.1f}"
        f"{run.costs[-1]:>14.9f}{run.norms[-1]:>12.1e}{wrong:>8.1%}"
        for run, wrong in zip(runs, errors, strict=True)
    ]
    return "\n".join(lines)


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Write the norms of the gradients against iterations and seconds."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for run in runs:
        left.semilogy(run.norms, label=run.label)
        right.semilogy(run.times, run.norms, label=run.label)
    left.set(xlabel="accepted step", ylabel="norm of the gradient in the metric")
    right.set(xlabel="seconds")
    left.legend()
    figure.suptitle(title)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    """Return a reader of positive numbers for argparse."""

    def parse(text: str) -> float:
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    parse.__name__ = kind.__name__
    return parse


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a network with a Stiefel layer to a gradient of norm 1e-8 "
        "with pymanopt's TrustRegions, in the layer metric and in the base metric."
    )
    parser.add_argument("--width", type=positive(int), default=10)
    parser.add_argument("--mass", type=positive(float), default=1e-2)
    parser.add_argument("--weight-decay", type=positive(float), default=1e-2)
    parser.add_argument("--iterations", type=positive(int), default=100)
    parser.add_argument("--tolerance", type=positive(float), default=1e-8)
    parser.add_argument(
        "--seconds", type=positive(float), default=300.0, help="limit of each run"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--threads",
        type=positive(int),
        default=1,
        help="of torch; more than there are idle cores make it many times slower",
    )
    parser.add_argument(
        "--quick", action="store_true", help="300 images, 5 filters, layer metric only"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="write the curves"
    )
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    """Minimise in each metric from the same start, print the table.

    Args:
        argv: the command line; None: that of the process.

    Returns:
        The exit status.
    """
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    width = 5 if options.quick else options.width
    x, y = load(300 if options.quick else None)
    settings: list[tuple[str, str, str | None]] = [("layer metric", "layer", None)]
    if not options.quick:
        settings += [
            ("base, preconditioned", "base", "layer"),
            ("base metric", "base", None),
        ]
    print(
        f"{len(x)} digits, {width} orthonormal filters, weight decay "
        f"{options.weight_decay:g}; TrustRegions of pymanopt\n"
    )
    runs, errors = [], []
    for label, geometry, preconditioner in settings:
        model = make_model(width, options.seed)
        metric = rm.LayerwiseMetric(
            model, output=rm.output.Categorical(), mass=options.mass
        )
        task = problem(
            metric,
            lambda logits: F.cross_entropy(logits, y),
            x,
            geometry=geometry,
            preconditioner=preconditioner,
            weight_decay=options.weight_decay,
            retraction=rm.retractions.Projection(),
        )
        runs.append(
            minimise(
                label, task, options.iterations, options.tolerance, options.seconds
            )
        )
        with torch.no_grad():
            errors.append(float((model(x).argmax(-1) != y).double().mean()))
    print(f"\n{table(runs, errors)}")
    if options.plot:
        plot(runs, options.plot, f"{len(x)} digits, a Stiefel layer, TrustRegions")
        print(f"\ncurves: {options.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
