"""Steps to a training loss on the digits, without a learning rate.

An MLP 64-256-256-10 with ReLU on scikit-learn's digits, 1437 to train on and 360 for
validation. Counts steps, not seconds.

    python benchmarks/bench_digits_steps.py --batch-size 128 --masses 1e-3 1e-2 1e-1
    python benchmarks/bench_digits_steps.py --batch-size 1437 --steps 15
"""

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm

TARGETS = (0.05, 1e-3)


@dataclass(frozen=True)
class Data:
    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor


def load(seed: int) -> Data:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    x, y = torch.from_numpy(images)[order].float(), torch.from_numpy(labels)[order]
    mean = x[360:].mean(0)
    x = (x - mean) / (x[360:] - mean).std()
    return Data(x[360:], y[360:].long(), x[:360], y[:360].long())


def make_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(64, 256),
        nn.ReLU(),
        nn.Linear(256, 256),
        nn.ReLU(),
        nn.Linear(256, 10),
    )


def batches(count: int, size: int, seed: int) -> Iterator[Tensor]:
    """Yield indices of full batches, for ever."""
    generator = torch.Generator().manual_seed(100 + seed)
    while True:
        order = torch.randperm(count, generator=generator)
        yield from order.split(min(size, count))[: max(1, count // size)]


@dataclass(frozen=True)
class Run:
    reached: tuple[int | None, ...]
    loss: float
    accuracy: float


def train(
    seed: int,
    *,
    batch_size: int,
    steps: int,
    blocks: str,
    mass: float,
    probes: int,
    spring: float | None = None,
) -> Run:
    """Train once; the step at which each target was reached, or None."""
    data, model = load(seed), make_model(seed)
    output: rm.output.OutputMetric = rm.output.Categorical()
    if probes:
        output = rm.output.Sampled(output, probes=probes)
    metric = rm.LayerwiseMetric(model, output, mass=mass, blocks=blocks)
    optimizer = rm.optim.RiemannianSGD(metric, spring=spring)
    order = batches(len(data.train_x), batch_size, seed)
    losses = []
    for _ in range(steps):
        chosen = next(order)
        with metric.record():
            logits = model(data.train_x[chosen])
        metric.backward(F.cross_entropy(logits, data.train_y[chosen]), logits)
        optimizer.step()
        with torch.no_grad():
            losses.append(float(F.cross_entropy(model(data.train_x), data.train_y)))
    with torch.no_grad():
        right = model(data.valid_x).argmax(1) == data.valid_y
    reached = tuple(
        next((i for i, loss in enumerate(losses, 1) if loss <= target), None)
        for target in TARGETS
    )
    return Run(reached, losses[-1], float(right.double().mean()))


def middle(steps: Sequence[int | None]) -> str:
    """Return the median step; a dash if more than half never got there."""
    known = [float("inf") if step is None else float(step) for step in steps]
    found = median(known)
    return "-" if found == float("inf") else f"{found:g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--blocks", nargs="+", default=["layer", "model"])
    parser.add_argument("--masses", nargs="+", type=float, default=[1e-3, 1e-2, 1e-1])
    parser.add_argument(
        "--probes", nargs="+", type=int, default=[0], help="rows drawn; 0: all rows"
    )
    parser.add_argument("--spring", type=float, help="default: the optimizer's")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    options = parser.parse_args(argv)
    print(f"batch {options.batch_size}, {options.steps} steps, seeds {options.seeds}")
    head = (
        "| rows | blocks | mass | steps to 0.05 | steps to 1e-3 | loss | validation |"
    )
    print(head)
    print("|---" * 7 + "|")
    for probes in options.probes:
        for blocks in options.blocks:
            for mass in options.masses:
                runs = [
                    train(
                        seed,
                        batch_size=options.batch_size,
                        steps=options.steps,
                        blocks=blocks,
                        mass=mass,
                        probes=probes,
                        spring=options.spring,
                    )
                    for seed in options.seeds
                ]
                firsts, seconds = zip(*(run.reached for run in runs), strict=True)
                every = ", ".join(str(step or "-") for step in firsts)
                print(
                    f"| {probes or 'all'} | {blocks} | {mass:g} "
                    f"| {middle(firsts)} ({every}) | {middle(seconds)} "
                    f"| {median(run.loss for run in runs):.1e} "
                    f"| {100 * median(run.accuracy for run in runs):.1f} % |",
                    flush=True,
                )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
