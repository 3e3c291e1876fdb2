"""The cost of a step as a ratio to a step of Adam.

python -m benchmarks.bench_step              prints the table
python -m pytest benchmarks -o addopts=      checks the ratios against the bounds
"""

import argparse

import pytest
import torch

from benchmarks.models import (
    BATCH,
    METHODS,
    SIZES,
    THREADS,
    interleaved,
    training_step,
)

# Ratios to Adam that a step must stay below.
BOUNDS = {
    "small": {"sampled, captured": 2.2, "exact layer": 20.0},
    "large": {"sampled, captured": 1.7, "exact layer": 8.0},
}


def ratios(
    network: str, rounds: int, device: str = "cpu", together: int = 1
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of every method, and their ratios to Adam's."""
    steps = {
        name: training_step(name, SIZES[network], device=device) for name in METHODS
    }
    seconds = interleaved(steps, rounds, together)
    return seconds, {name: seconds[name] / seconds["adam"] for name in METHODS}


def table(results: dict[str, tuple[dict[str, float], dict[str, float]]]) -> str:
    """Return the results as a Markdown table."""
    names = ["-".join(map(str, SIZES[network])) for network in results]
    lines = ["| step | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    for method in METHODS:
        cells = [
            f"{ratio[method]:.2f} ({1e3 * seconds[method]:.1f} ms)"
            for seconds, ratio in results.values()
        ]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


@pytest.mark.parametrize("network", SIZES)
def test_ratio(network: str, benchmark) -> None:
    rounds = 20 if network == "small" else 8
    _, ratio = ratios(network, rounds)
    benchmark.extra_info.update(ratio)
    step = training_step("exact layer", SIZES[network])
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    for method, bound in BOUNDS[network].items():
        assert ratio[method] <= bound, (method, ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument(
        "--networks", nargs="+", choices=list(SIZES), default=list(SIZES)
    )
    parser.add_argument("--together", type=int, default=1, metavar="STEPS")
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    where = f"{THREADS} threads" if options.device == "cpu" else options.device
    print(f"batch {BATCH}, float32, {where}, medians of {options.rounds}\n")
    print(
        table(
            {
                name: ratios(name, options.rounds, options.device, options.together)
                for name in options.networks
            }
        )
    )


if __name__ == "__main__":
    main()
