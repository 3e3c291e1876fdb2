"""Blocks shared out among processes: each is solved once, on one of them."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.distributed.ranks import Ranks
from riemannian_modules.factors import MetricFactor
from riemannian_modules.metric import LayerMetric, Solution

__all__ = ["owners", "solve_shared"]


def owners(blocks: Mapping[str, LayerMetric], size: int) -> dict[str, int]:
    """Return which process solves which block.

    The dearest block goes first, each to the process that has the least to do. The cost
    is counted in multiplications: ``r^2`` for each output of a layer, and ``m^3 / 3``
    for the small matrix.

    Args:
        blocks: metrics by block.
        size: number of processes.

    Returns:
        ``{block name: rank}``, the same on every process.
    """
    costs = {name: _cost(block) for name, block in blocks.items()}
    busy = [0.0] * size
    found = {}
    for name in sorted(costs, key=lambda name: -costs[name]):
        rank = min(range(size), key=busy.__getitem__)
        found[name], busy[rank] = rank, busy[rank] + costs[name]
    return found


def _cost(block: LayerMetric) -> float:
    r, p = block.rank, sum(part.space.point.numel() for part in block.parts)
    if r >= p:
        return r * p**2 + p**3 / 3
    # A bias travels with its weight.
    points = [part.space.point for part in block.parts]
    outputs = sum(point.shape[0] for point in points if point.ndim > 1)
    return r**2 * (outputs + 1) + r**3 / 3


@dataclass(frozen=True)
class _Outcome:
    """How the solve of a block went, without its numbers."""

    branch: str
    trace: float
    too_narrow: bool
    velocity: torch.dtype


def solve_shared(
    ranks: Ranks,
    blocks: Mapping[str, LayerMetric],
    residual: Tensor | None,
    covector: Mapping[str, Tensor] | None,
    source: Mapping[str, MetricFactor] | None,
) -> dict[str, Solution]:
    """Solve every block on its owner, and tell the others.

    Args:
        ranks: the processes.
        blocks: metrics by block, the same on every process.
        residual: see :meth:`riemannian_modules.LayerMetric.solve`.
        covector: see there.
        source: see there.

    Returns:
        ``{block name: solution}``, bit for bit the same on every process.

    Raises:
        DistributedError: the solve of another process failed.
        NotPositiveDefiniteError: a small matrix of this one could not be factorised.
    """
    whose = owners(blocks, ranks.size)
    own: dict[str, Solution] = {}
    failed: Exception | None = None
    try:
        for name, block in blocks.items():
            if whose[name] == ranks.rank:
                own[name] = block.solve(
                    residual=residual, covector=covector, source=source
                )
    except Exception as error:
        # Raised by `agree`, after the others have heard of it.
        failed = error
    outcomes = {
        name: _Outcome(
            solution.branch,
            blocks[name].inverse.trace,
            blocks[name].too_narrow,
            solution.velocity.dtype,
        )
        for name, solution in own.items()
    }
    notes = ranks.agree("solve", outcomes, failed)
    found: dict[str, Solution] = {}
    for rank in range(ranks.size):
        names = [name for name in blocks if whose[name] == rank]
        if names:
            mine = [own[name] for name in names] if rank == ranks.rank else None
            parts = [(blocks[name], notes[rank][name]) for name in names]
            received = _broadcast(ranks, rank, parts, mine)
            found.update(zip(names, received, strict=True))
    return {name: found[name] for name in blocks}


def _broadcast(
    ranks: Ranks,
    owner: int,
    parts: Sequence[tuple[LayerMetric, _Outcome]],
    mine: Sequence[Solution] | None,
) -> list[Solution]:
    """Send solutions, or receive them."""
    first = parts[0][0].parts[0].space.point
    size = sum(t.nbytes for block, outcome in parts for t in _blank(block, outcome))
    flat = torch.empty(size, dtype=torch.uint8, device=first.device)
    if mine is not None:
        pieces = [
            piece.contiguous().reshape(-1).view(torch.uint8)
            for (block, _), solution in zip(parts, mine, strict=True)
            for piece in _numbers(block, solution)
        ]
        torch.cat(pieces, out=flat)
    ranks.broadcast_(flat, owner)
    if mine is not None:
        return list(mine)
    found, start = [], 0
    for block, outcome in parts:
        tensors = []
        for blank in _blank(block, outcome):
            some = flat[start : start + blank.nbytes].clone()
            tensors.append(some.view(blank.dtype).view(blank.shape))
            start += blank.nbytes
        *vectors, velocity, succeeded = tensors
        block.inverse.adopt(outcome.trace, outcome.too_narrow, succeeded)
        named = zip((part.name for part in block.parts), vectors, strict=True)
        found.append(
            Solution(dict(named), velocity, block.inverse.block, outcome.branch)
        )
    return found


def _numbers(block: LayerMetric, solution: Solution) -> Iterator[Tensor]:
    yield from (solution.vectors[part.name] for part in block.parts)
    yield solution.velocity
    # Off the CPU nobody has read it yet; there a failure was an error already.
    cpu = solution.velocity.device.type == "cpu"
    yield torch.ones((), dtype=torch.bool) if cpu else block.inverse.succeeded


def _blank(block: LayerMetric, outcome: _Outcome) -> Iterator[Tensor]:
    point = block.parts[0].space.point
    yield from (part.space.point for part in block.parts)
    yield torch.empty(block.rank, dtype=outcome.velocity, device=point.device)
    yield torch.empty((), dtype=torch.bool, device=point.device)
