"""The time of a step of one process and of two, each with its part of the batch.

python -m benchmarks.bench_distributed              prints the table
python -m pytest benchmarks -o addopts=             checks that the steps are the same

Every process has one thread. The ideal is the time of one process divided by the
number of processes; what is above it is what the processes do more than once, wait for
and send to each other.
"""

import argparse
import copy
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import riemannian_modules as rm
from benchmarks.models import BATCH, SIZES, batch, mlp

BLOCKS = ("layer", "model")
Timed = dict[str, list[float]]


def work(rank: int, size: int, options: dict[str, object], folder: str) -> None:
    """Time the steps of one process, and write what it found."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting{size}", rank=rank, world_size=size
    )
    found: Timed = {"wall": [], "busy": [], "backward": [], "points": []}
    sizes = SIZES[str(options["network"])]
    torch.manual_seed(0)
    model = mlp(sizes).to(options["dtype"])
    x, y = batch(sizes[:1], sizes[-1], int(str(options["examples"])), "cpu")
    x, y = x.to(options["dtype"]).chunk(size)[rank], y.chunk(size)[rank]
    metric = rm.LayerwiseMetric(
        model,
        output=rm.output.Categorical(),
        mass=1e-2,
        blocks=options["blocks"],  # type: ignore[arg-type]
    )
    if size > 1:
        rm.distributed.data_parallel(metric)
    optimizer = rm.optim.RiemannianSGD(metric, lr=float(str(options["lr"])))
    for _ in range(2 + int(str(options["rounds"]))):
        dist.barrier()
        wall, busy = perf_counter(), process_time()
        with metric.record():
            logits = model(x)
        metric.backward(F.cross_entropy(logits, y), logits)
        found["backward"].append(perf_counter() - wall)
        optimizer.step()
        found["wall"].append(perf_counter() - wall)
        found["busy"].append(process_time() - busy)
    found["points"] = torch.cat([p.detach().flatten() for p in model.parameters()])  # type: ignore[assignment]
    torch.save(found, Path(folder) / f"{size}-{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def timed(sizes: list[int], **options: object) -> dict[int, list[Timed]]:
    """Return what every process of every number of processes found."""
    options = {"dtype": torch.float32, "lr": 1e-6, "examples": BATCH, **options}
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for size in sizes:
            mp.spawn(work, (size, copy.copy(options), folder), nprocs=size)
            paths = [Path(folder) / f"{size}-{rank}.pt" for rank in range(size)]
            found[size] = [torch.load(path) for path in paths]
    return found


def middle(ranks: list[Timed], what: str) -> float:
    """Return the median over steps, of the slowest process."""
    return max(median(each[what][2:]) for each in ranks)


def table(found: dict[int, list[Timed]]) -> str:
    """Return the results as a Markdown table."""
    lines = [
        "| processes | step, ms | of it until backward returns | CPU time of a process "
        "| ideal | overhead |",
        "|---" * 6 + "|",
    ]
    alone = middle(found[1], "wall")
    for size, ranks in found.items():
        wall, ideal = middle(ranks, "wall"), alone / size
        cells = [
            str(size),
            f"{1e3 * wall:.1f}",
            f"{1e3 * middle(ranks, 'backward'):.1f}",
            f"{1e3 * middle(ranks, 'busy'):.1f} ms",
            f"{1e3 * ideal:.1f} ms",
            f"{100 * (wall / ideal - 1):.0f} %",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_two_processes_take_the_same_steps() -> None:
    found = timed(
        [1, 2],
        network="small",
        blocks="layer",
        rounds=1,
        dtype=torch.float64,
        lr=0.1,
        examples=32,
    )
    alone = found[1][0]["points"]
    for each in found[2]:
        error = (each["points"] - alone).abs().max()  # type: ignore[operator]
        assert error <= 1e-10 * alone.abs().max()  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--networks", nargs="+", choices=list(SIZES), default=list(SIZES)
    )
    options = parser.parse_args()
    print(f"batch {BATCH} in all, float32, one thread each, medians\n")
    for network in options.networks:
        for blocks in BLOCKS:
            sizes = sorted({1, *options.processes})
            found = timed(sizes, network=network, blocks=blocks, rounds=options.rounds)
            print(f"{'-'.join(map(str, SIZES[network]))}, blocks={blocks!r}\n")
            print(table(found) + "\n")


if __name__ == "__main__":
    main()
