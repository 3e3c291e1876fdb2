"""The cost of a step on a convnet and a transformer block, as a ratio to Adam's.

python -m benchmarks.bench_networks           prints the table
python -m pytest benchmarks -o addopts=       checks the ratios against the bounds
"""

import argparse

import pytest
import torch

from benchmarks.models import BATCH, INPUTS, THREADS, interleaved, network_step

METHODS = (
    "adam",
    "sampled",
    "sampled, static graph",
    "sampled, captured",
    "sampled, captured, no .grad",
    "sampled, gradient kept",
    "sampled, gradient kept, captured",
    "sampled, gradient alone",
    "sampled, gradient alone, captured",
    "sampled, gradient alone, captured, no .grad",
    "exact layer",
    "kfac, rows held",
    "kfac, rows renewed",
)

# Ratios to Adam that a step must stay below.
BOUNDS = {
    "convnet": {"sampled, captured": 1.7, "exact layer": 12.0},
    "transformer": {"sampled, captured": 2.5},
}


def ratios(
    network: str, rounds: int, device: str = "cpu"
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the median seconds of every method, and their ratios to Adam's."""
    methods = [m for m in METHODS if m in BOUNDS[network] or not m.startswith("exact")]
    steps = {name: network_step(name, network, device) for name in methods}
    seconds = interleaved(steps, rounds)
    return seconds, {name: seconds[name] / seconds["adam"] for name in methods}


@pytest.mark.parametrize("network", INPUTS)
def test_ratio(network: str, benchmark) -> None:
    _, ratio = ratios(network, 8)
    benchmark.extra_info.update(ratio)
    benchmark.pedantic(network_step("sampled", network), rounds=5, warmup_rounds=1)
    for method, bound in BOUNDS[network].items():
        assert ratio[method] <= bound, (method, ratio)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument(
        "--networks", nargs="+", choices=list(INPUTS), default=[*INPUTS]
    )
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    where = f"{THREADS} threads" if options.device == "cpu" else options.device
    print(f"batch {BATCH}, float32, {where}, medians of {options.rounds}\n")
    print("| network | step | ratio to Adam | ms |\n|---|---|---|---|")
    for network in options.networks:
        seconds, ratio = ratios(network, options.rounds, options.device)
        for name, value in ratio.items():
            print(f"| {network} | {name} | {value:.2f} | {1e3 * seconds[name]:.1f} |")


if __name__ == "__main__":
    main()
