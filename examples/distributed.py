"""Train one classifier with several processes, each with its part of every batch.

The steps are those of one process with the whole batch, so the last line does not
depend on the number of processes, but for rounding.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py
    torchrun --nproc-per-node 4 examples/distributed.py --steps 50
"""

import argparse
import os
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import riemannian_modules as rm


def start() -> None:
    """Join the other processes, or be alone."""
    late = timedelta(minutes=2)
    if "RANK" in os.environ:
        dist.init_process_group("gloo", timeout=late)
    else:
        store = dist.HashStore()
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def spirals(examples: int) -> tuple[Tensor, Tensor]:
    """Return points on three spirals and which of them each is on."""
    generator = torch.Generator().manual_seed(0)
    label = torch.arange(examples) % 3
    radius = torch.rand(examples, generator=generator, dtype=torch.float64)
    angle = 4.0 * radius + 2.0 * torch.pi / 3.0 * label
    angle += 0.1 * torch.randn(examples, generator=generator, dtype=torch.float64)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 1), label


def train(steps: int, examples: int) -> tuple[float, float]:
    """Train on parts of the batch; return its loss and accuracy."""
    torch.manual_seed(dist.get_rank())  # data_parallel takes rank 0's parameters
    f64, stiefel = torch.float64, rm.manifolds.Stiefel()
    model = rm.nn.Sequential(
        rm.nn.Linear(2, 16, dtype=f64),
        torch.nn.Tanh(),
        rm.nn.Linear(16, 16, manifold=stiefel, dtype=f64),
        torch.nn.Tanh(),
        rm.nn.Linear(16, 3, dtype=f64),
    )
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=1e-2)
    rm.distributed.data_parallel(metric)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.3)
    x, y = spirals(examples)
    mine = slice(dist.get_rank(), None, dist.get_world_size())
    for _ in range(steps):
        with metric.record():
            logits = model(x[mine])
        metric.backward(F.cross_entropy(logits, y[mine]), logits)
        optimizer.step()
    with torch.no_grad():
        logits = model(x)
    accuracy = (logits.argmax(1) == y).double().mean()
    return float(F.cross_entropy(logits, y)), float(accuracy)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; return the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--examples", type=int, default=99)
    options = parser.parse_args(argv)
    start()
    try:
        loss, accuracy = train(options.steps, options.examples)
        if dist.get_rank() == 0:
            print(f"{dist.get_world_size()} processes, {options.steps} steps")
            print(f"loss {loss:.10f}, accuracy {100 * accuracy:.1f} %")
    finally:
        dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
