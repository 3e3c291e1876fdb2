"""Train a deep autoencoder in three ways, from the same start.

Layers of 64-128-64-32-16-32-64-128-64 with tanh between them, all 1,797 digits of
scikit-learn as one batch, the mean squared error. The outputs have 115,008 entries:
too many rows for an exact metric to be factorised. Three methods have the same time:

- Gauss-Newton steps of this library: conjugate gradients on the exact rows,
  preconditioned by one sampled row for each example;
- Adam of torch with a step length that falls to zero along a cosine;
- L-BFGS of torch with a strong Wolfe line search.

    python examples/autoencoder.py
    python examples/autoencoder.py --seconds 15 --threads 2 --plot autoencoder.png
    python examples/autoencoder.py --methods gauss-newton --mass 1e-4
"""

import argparse
import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn
from tqdm import tqdm

import riemannian_modules as rm

WIDTHS = (64, 128, 64, 32, 16, 32, 64, 128, 64)

Step = Callable[[float], float]


def autoencoder() -> nn.Sequential:
    """Return the network."""
    layers: list[nn.Module] = []
    for before, after in pairwise(WIDTHS):
        layers += [nn.Linear(before, after), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


@dataclass
class Run:
    """The curve of one method."""

    name: str
    seconds: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    steps: int = 0
    note: str = ""


def gauss_newton(net: nn.Module, x: Tensor, mass: float, run: Run) -> Step:
    """Return one step of this library."""
    output = rm.output.Sampled(rm.output.Euclidean(2.0 / x.shape[1]))
    metric = rm.LayerwiseMetric(net, output=output, mass=mass)
    optimizer = rm.optim.GaussNewton(metric)

    def step(_: float) -> float:
        with metric.record():
            sampled = net(x)
        metric.pull_back(sampled)
        loss = optimizer.step(lambda: net(x), lambda z: F.mse_loss(z, x))
        run.note = str(optimizer.report)
        return loss

    return step


def adam(net: nn.Module, x: Tensor, mass: float, run: Run) -> Step:
    """Return one step of Adam; the step length falls with the time that is gone."""
    optimizer = torch.optim.Adam(net.parameters())

    def step(gone: float) -> float:
        optimizer.param_groups[0]["lr"] = 5e-3 * (1.0 + math.cos(math.pi * gone))
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), x)
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return step


def lbfgs(net: nn.Module, x: Tensor, mass: float, run: Run) -> Step:
    """Return ten iterations of L-BFGS."""
    optimizer = torch.optim.LBFGS(
        net.parameters(), max_iter=10, history_size=50, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), x)
        loss.backward()
        return loss

    return lambda _: float(optimizer.step(closure).detach())


METHODS = {"gauss-newton": gauss_newton, "adam": adam, "l-bfgs": lbfgs}


def train(name: str, start: nn.Module, x: Tensor, mass: float, seconds: float) -> Run:
    """Train a copy of the network for some seconds of steps."""
    net, found, spent = copy.deepcopy(start), Run(name), 0.0
    step = METHODS[name](net, x, mass, found)
    with tqdm(total=seconds, desc=name, unit="s", bar_format="{l_bar}{bar}") as bar:
        while spent < seconds:
            began = time.perf_counter()
            step(spent / seconds)
            took = time.perf_counter() - began
            spent += took
            found.steps += 1
            with torch.no_grad():
                found.losses.append(float(F.mse_loss(net(x), x)))
            found.seconds.append(spent)
            bar.update(min(took, seconds - bar.n))
    return found


def table(runs: list[Run]) -> str:
    """Return the results as a table."""
    lines = [f"{'method':<14}{'loss':>10}{'steps':>8}{'seconds':>9}"]
    lines += [
        f"{each.name:<14}{each.losses[-1]:>10.2e}{each.steps:>8}"
        f"{each.seconds[-1]:>9.1f}"
        for each in runs
    ]
    return "\n".join(lines)


def plot(runs: list[Run], path: str) -> None:
    """Write the curves of the loss over time."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.0, 4.0))
    for each in runs:
        axes.semilogy(each.seconds, each.losses, label=each.name)
    axes.set(xlabel="seconds of steps", ylabel="mean squared error")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main(arguments: list[str] | None = None) -> list[Run]:
    """Run the methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=8.0, help="for each method")
    parser.add_argument("--mass", type=float, default=1e-3, help="the first one")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--plot", metavar="FILE.png")
    options = parser.parse_args(arguments)
    torch.set_default_dtype(torch.float32)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    net = autoencoder()
    x = torch.tensor(load_digits().data / 16.0, dtype=torch.float32)
    runs = [
        train(name, net, x, options.mass, options.seconds) for name in options.methods
    ]
    print(table(runs))
    for each in runs:
        if each.note:
            print(f"{each.name}: {each.note}")
    if options.plot:
        plot(runs, options.plot)
    return runs


if __name__ == "__main__":
    main()
