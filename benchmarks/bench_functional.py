"""Differential operators: structured factors against stored rows.

python -m benchmarks.bench_functional        prints the table
python -m pytest benchmarks -o addopts=      checks the ratios against the bounds
"""

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

import riemannian_modules as rm
from riemannian_modules.functional import DifferentialOperator, FunctionalMetric

EQUATIONS: dict[str, tuple[Callable, int, int]] = {
    "heat": (lambda u, z: u.d(0) - u.d(1, 1) / 4.0, 576, 144),
    "Poisson": (lambda u, z: u.laplacian() + z.sum(), 900, 120),
}
# Time of stored rows over that of structured factors.
BOUNDS = {32: 1.2, 128: 3.0}


def training_step(
    equation: str, width: int, *, structured: bool
) -> Callable[[], list[float]]:
    """Return a step; it returns the seconds of evaluation, pass and solve."""
    function, inside, outside = EQUATIONS[equation]
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(2, width),
        nn.Tanh(),
        nn.Linear(width, width),
        nn.Tanh(),
        nn.Linear(width, 1),
    ).double()
    functions = {"in": function, "on": lambda u, z: u.value - 1.0}
    metric = FunctionalMetric(
        net,
        {
            name: DifferentialOperator(each, structured=structured)
            for name, each in functions.items()
        },
        {name: rm.output.Euclidean(2.0) for name in functions},
    )
    points = {
        "in": torch.rand(inside, 2, dtype=torch.float64),
        "on": torch.rand(outside, 2, dtype=torch.float64),
    }

    def step() -> list[float]:
        times = [time.process_time()]
        values = metric(points)
        times.append(time.process_time())
        loss = torch.stack([each.square().mean() for each in values.values()]).sum()
        metric.backward(loss, values)
        times.append(time.process_time())
        metric.natural_gradient()
        times.append(time.process_time())
        return [b - a for a, b in pairwise(times)]

    return step


def compare(equation: str, width: int, rounds: int) -> tuple[list[float], list[float]]:
    """Return the median seconds of each part, structured and stored."""
    steps = [training_step(equation, width, structured=s) for s in (True, False)]
    found: list[list[list[float]]] = [[], []]
    for step in steps:
        step()
    for _ in range(rounds):
        for each, step in zip(found, steps, strict=True):
            each.append(step())
    first, second = (
        [statistics.median(part) for part in zip(*each, strict=True)] for each in found
    )
    return first, second


@pytest.mark.parametrize("width", BOUNDS)
def test_structured_factors_are_cheaper(width: int) -> None:
    structured, stored = compare("Poisson", width, 3)
    assert sum(stored) >= BOUNDS[width] * sum(structured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--widths", type=int, nargs="+", default=[32, 64, 128])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("milliseconds of evaluation + pass + solve, float64, one thread\n")
    print("| equation, network | structured | stored rows | ratio |\n|---|---|---|---|")
    for equation in EQUATIONS:
        for width in options.widths:
            parts = compare(equation, width, options.rounds)
            cells = [
                f"{1e3 * sum(each):.0f} ("
                + " + ".join(f"{1e3 * part:.0f}" for part in each)
                + ")"
                for each in parts
            ]
            ratio = sum(parts[1]) / sum(parts[0])
            name = f"{equation}, 2-{width}-{width}-1"
            print(f"| {name} | {cells[0]} | {cells[1]} | {ratio:.1f} |", flush=True)


if __name__ == "__main__":
    main()
