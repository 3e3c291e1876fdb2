"""Fewer rows: what a step costs, and how many steps a network needs.

python -m benchmarks.bench_rows                       prints both tables
python -m benchmarks.bench_rows --masses 0.1 --seeds 1 --only gradient exact
python -m pytest benchmarks/bench_rows.py -o addopts= checks the order of the costs

The network is 64-256-256-10 on scikit-learn's digits, batch 128; steps have no learning
rate. The first table says in how many steps the loss on the 1,437 training images falls
to 0.05 and to 0.001.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from benchmarks.models import BATCH, SIZES, Step, batch, mlp, training_step
from riemannian_modules.output import Categorical, OutputMetric, Sampled
from riemannian_modules.rows import History, Largest, Pivoted

TARGETS = (0.05, 0.001)
FAILED = (rm.errors.NonFiniteError, rm.errors.NotPositiveDefiniteError)


@dataclass(frozen=True)
class Rows:
    """A way to make rows."""

    output: Callable[[], OutputMetric]
    options: dict[str, Any] = field(default_factory=dict)


def probes(count: int, **options: Any) -> Callable[[], OutputMetric]:
    return lambda: Sampled(Categorical(), count, **options)


WAYS = {
    "exact": Rows(Categorical),
    "random": Rows(probes(1, gradient_rows=False)),
    "gradient": Rows(probes(0)),
    "gradient + 1": Rows(probes(1)),
    "gradient + 3": Rows(probes(3)),
    "gradient, 2 past": Rows(probes(0), {"history": History(2)}),
    "gradient, 4 past": Rows(probes(0), {"history": History(4)}),
    "gradient + 1, 2 past": Rows(probes(1), {"history": History(2)}),
    "gradient, every 2nd": Rows(probes(0), {"refresh": 2}),
    "gradient, every 5th": Rows(probes(0), {"refresh": 5}),
    "8 of the batch": Rows(probes(8, per="batch")),
    "64 of the batch": Rows(probes(64, per="batch")),
    "largest 128": Rows(Categorical, {"rows": Largest(128)}),
    "pivoted 64": Rows(Categorical, {"rows": Pivoted(64)}),
}


def digits() -> tuple[Tensor, Tensor]:
    """Return 1,437 images, centred and scaled, and their labels."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = torch.from_numpy(images)[order][360:]
    x = (x - x.mean(0)) / (x - x.mean(0)).std()
    return x.float(), torch.from_numpy(labels).long()[order][360:]


def metric_of(way: Rows, model: nn.Module, mass: float) -> rm.LayerwiseMetric:
    return rm.LayerwiseMetric(
        model, way.output(), mass=mass, blocks="model", **way.options
    )


def steps_needed(
    way: Rows, mass: float, seed: int, data: tuple[Tensor, Tensor], most: int
) -> list[float]:
    """Return after how many steps the loss is below each target, at most ``most``."""
    torch.manual_seed(seed)
    x, y = data
    model = mlp(SIZES["small"])
    metric = metric_of(way, model, mass)
    optimizer = rm.optim.RiemannianSGD(metric)
    needed = [math.inf] * len(TARGETS)
    order = x.new_empty(0).long()
    for step in range(1, most + 1):
        if len(order) < BATCH:
            order = torch.randperm(len(x))
        chosen, order = order[:BATCH], order[BATCH:]
        try:
            with metric.record():
                logits = model(x[chosen])
            metric.backward(F.cross_entropy(logits, y[chosen]), logits)
            optimizer.step()
        except FAILED:
            break
        with torch.no_grad():
            loss = float(F.cross_entropy(model(x), y))
        if not loss < 100.0:
            break
        for index, target in enumerate(TARGETS):
            if loss <= target:
                needed[index] = min(needed[index], step)
        if math.isfinite(needed[-1]):
            break
    return needed


def step_of(way: Rows, network: str) -> Step:
    """Return a training step on random data; its length is what it would be."""
    torch.manual_seed(0)
    sizes = SIZES[network]
    model = mlp(sizes)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    x, y = batch(sizes[:1], sizes[-1], BATCH, "cpu")
    metric = metric_of(way, model, 0.1)
    optimizer = rm.optim.RiemannianSGD(metric)

    def step() -> None:
        with metric.record():
            logits = model(x)
        loss = F.cross_entropy(logits, y)
        if float(loss.detach()) < 0.1:
            model.load_state_dict(start)
            return step()
        metric.backward(loss, logits)
        optimizer.step()
        return None

    return step


def costs(network: str, names: list[str], rounds: int) -> dict[str, float]:
    """Return the ratio of a step to one of Adam, for each way, in processor time.

    That of other processes does not count; torch has to run on one thread.
    """
    steps = {"adam": training_step("adam", SIZES[network])}
    steps |= {name: step_of(WAYS[name], network) for name in names}
    taken: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 5):
        for name, step in steps.items():
            start = process_time()
            step()
            if index >= 5:
                taken[name].append(process_time() - start)
    seconds = {name: median(values) for name, values in taken.items()}
    return {name: seconds[name] / seconds["adam"] for name in names}


def test_fewer_rows_cost_less() -> None:
    torch.set_num_threads(1)
    names = ["exact", "gradient", "gradient + 1", "gradient, every 5th"]
    ratio = costs("small", names, 20)
    assert ratio["gradient, every 5th"] < ratio["gradient"] < ratio["gradient + 1"]
    assert ratio["gradient + 1"] < 0.5 * ratio["exact"]


def shown(needed: list[list[float]], index: int) -> str:
    each = [run[index] for run in needed]
    return ", ".join("-" if math.isinf(n) else str(int(n)) for n in each)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument(
        "--masses", nargs="*", type=float, default=[0.001, 0.01, 0.1, 1]
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--networks", nargs="*", choices=list(SIZES), default=["small"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    data = digits()
    heads = [f"mass {mass:g}" for mass in options.masses]
    print(f"steps to {TARGETS[0]} / {TARGETS[1]}, {options.seeds} seeds\n")
    print("| rows | " + " | ".join(heads) + " |")
    print("|---" * (len(heads) + 1) + "|")
    for name in options.only:
        cells = []
        for mass in options.masses:
            needed = [
                steps_needed(WAYS[name], mass, seed, data, options.steps)
                for seed in range(options.seeds)
            ]
            cells.append(f"{shown(needed, 0)} / {shown(needed, 1)}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)
    for network in options.networks:
        print(f"\ncost of a step on {SIZES[network]}, ratio to Adam, one thread\n")
        for name, ratio in costs(network, options.only, options.rounds).items():
            print(f"| {name} | {ratio:.1f} |")


if __name__ == "__main__":
    main()
