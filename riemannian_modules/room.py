"""Whether the rows of output metrics fit into memory, and failures of the allocator."""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from riemannian_modules.errors import MemoryBoundError, ran_out
from riemannian_modules.output import OutputMetric, Sampled, Weighted

__all__ = ["enough_room", "require_room"]

_REMEDY = (
    "Use rows drawn at random, as riemannian_modules.output.Sampled(Categorical()) "
    "does, or a smaller batch"
)


def require_room(
    heads: Sequence[tuple[Tensor, OutputMetric | None]], bound: int | None
) -> None:
    """Check that the rows can be held, before they are made.

    Rows whose number an output metric does not tell are not counted.

    Args:
        heads: outputs and their metrics.
        bound: bytes that they may have, or None: those that the machine has.

    Raises:
        MemoryBoundError: they have more.
    """
    ranks = [
        0 if metric is None else metric.row_count(outputs) or 0
        for outputs, metric in heads
    ]
    # A row of one output has zeros for all others.
    rank, numbers = sum(ranks), sum(outputs.numel() for outputs, _ in heads)
    needed = rank * numbers * max(4, *(outputs.itemsize for outputs, _ in heads))
    outputs, metric = heads[ranks.index(max(ranks))]
    most = _memory_of(outputs.device) if bound is None else bound
    if most is None or needed <= most:
        return
    limit = "the machine has" if bound is None else "max_memory is"
    exact, n = _exact(metric), len(outputs)
    remedy = f"use riemannian_modules.output.Sampled({exact!r}), or a smaller batch"
    if isinstance(metric, Sampled):
        remedy = "use fewer probes, or a smaller batch"
    raise MemoryBoundError(
        f"the rows of {metric!r} do not fit: for outputs of shape "
        f"{tuple(outputs.shape)} there are {n} x {rank} rows of {numbers // n} "
        f"numbers, {_gigabytes(needed)} in all, and {limit} {_gigabytes(most)}; "
        f"{remedy}. Nothing was changed"
    )


@contextmanager
def enough_room() -> Iterator[None]:
    """Say what to do where memory runs out while rows are made.

    Raises:
        MemoryBoundError: it did.
        RuntimeError: any other error of torch, as it is.
        MemoryError: this one already.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryBoundError) or not ran_out(error):
            raise
        raise MemoryBoundError(
            "the rows of the output metric do not fit into memory; nothing was "
            f"changed. {_REMEDY} ({error})"
        ) from error


def _gigabytes(count: int) -> str:
    size = count / 1e9
    return f"{size:,.0f} GB" if size >= 100.0 else f"{size:.3g} GB"


def _exact(metric: OutputMetric | None) -> OutputMetric | None:
    """Return the metric whose rows are sampled or weighted."""
    while isinstance(metric, Sampled | Weighted):
        metric = metric.metric
    return metric


@cache
def _memory_of(device: torch.device) -> int | None:
    """Return the bytes of all memory of a device, where it tells."""
    if device.type == "cuda":
        # What is free would have to be asked for, and waited for.
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type != "cpu":
        return None
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None
