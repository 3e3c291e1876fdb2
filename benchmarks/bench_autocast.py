"""What autocast costs in accuracy: the same training in three precisions.

python -m benchmarks.bench_autocast                          scikit-learn's digits
python -m benchmarks.bench_autocast --folder /usr/share/datasets/fashion-mnist
python -m pytest benchmarks -o addopts=                      checks a short run

Same data, same batches, same start for every precision; mean and standard deviation of
the accuracy on held-out data over seeds.
"""

import argparse
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F

import riemannian_modules as rm
from benchmarks.models import mlp
from examples.digits import Data, batches, load_digits, load_fashion_mnist

EXAMPLES = 64
PRECISIONS = {
    "float32": None,
    "bfloat16 autocast": torch.bfloat16,
    "float16 autocast": torch.float16,
}


def accuracy(
    data: Data, dtype: torch.dtype | None, seed: int, steps: int, sizes: tuple[int, ...]
) -> float:
    """Train, and return the accuracy on held-out data."""
    torch.manual_seed(seed)
    model = mlp((data.train_x.shape[1], *sizes, 10))
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric)
    order = batches(data, EXAMPLES, 1_000, seed)
    for _, index in zip(range(steps), order, strict=False):
        x, y = data.train_x[index], data.train_y[index]
        with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
            with metric.record():
                logits = model(x)
            loss = F.cross_entropy(logits.float(), y)
        metric.backward(loss, logits)
        optimizer.step()
    with torch.no_grad():
        right = model(data.valid_x).argmax(1) == data.valid_y
    return float(right.float().mean())


def accuracies(
    data: Data, seeds: int, steps: int, sizes: tuple[int, ...] = (256, 256)
) -> dict[str, list[float]]:
    """Return the accuracies of every precision, seed by seed."""
    return {
        name: [accuracy(data, dtype, seed, steps, sizes) for seed in range(seeds)]
        for name, dtype in PRECISIONS.items()
    }


def table(found: dict[str, list[float]]) -> str:
    """Return the results as a Markdown table."""
    plain = mean(found["float32"])
    lines = [
        "| precision | accuracy | standard deviation | difference to float32 |",
        "|---" * 4 + "|",
    ]
    for name, values in found.items():
        cells = [
            name,
            f"{100 * mean(values):.2f} %",
            f"{100 * stdev(values):.2f}",
            f"{100 * (mean(values) - plain):+.2f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_half_precision_trains_as_well() -> None:
    found = accuracies(load_digits(0).scaled(torch.float32), 3, 15, (32,))
    plain = found["float32"]
    for name, values in found.items():
        assert mean(values) > mean(plain) - max(stdev(plain), 0.01), name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, help="where Fashion-MNIST is")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 256])
    options = parser.parse_args()
    if options.folder is None:
        name, data = "digits", load_digits(0)
    else:
        name, data = "Fashion-MNIST", load_fashion_mnist(options.folder)
    found = accuracies(
        data.scaled(torch.float32), options.seeds, options.steps, tuple(options.widths)
    )
    print(
        f"{name}, {options.steps} steps of {EXAMPLES} examples, {options.seeds} seeds\n"
    )
    print(table(found))


if __name__ == "__main__":
    main()
