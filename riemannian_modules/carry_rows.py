"""Rows, costate and rest on their way down, and a look at where the examples are."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.carry import Carried, between, carry, in_place
from riemannian_modules.heads import Rows
from riemannian_modules.layout import scaled_examples
from riemannian_modules.linearize import Graph
from riemannian_modules.reverse import FEW
from riemannian_modules.tape import Use

__all__ = ["Look", "carry_rows", "travels_alone"]


@dataclass(frozen=True)
class Look:
    """How to find out whether every example is still where it was.

    Attributes:
        scales: numbers that the examples have to keep on the way, ``(n,)``.
        rounding: the unit of rounding on the way.
        coins: source of randomness, on the CPU.
        apart: whether they travel in a pass of their own, so that nothing else is
            another number than without them.
    """

    scales: Tensor
    rounding: float
    coins: torch.Generator
    apart: bool


def carry_rows(
    uses: Sequence[Use],
    ends: Sequence[Tensor],
    rows: Rows,
    graph: Graph,
    below: list[Carried] | None,
    look: Look | None,
) -> list[list[Carried]] | None:
    """Carry rows, costate and rest down to the uses.

    Args:
        uses: recorded calls.
        ends: the model's outputs.
        rows: what is carried.
        graph: what is known about the graph.
        below: the costate at the uses, if it is known.
        look: how to look at the examples on the way, or None.

    Returns:
        What each pass carried; None if an example has moved.
    """
    if rows.led:
        below, stacks = None, rows.bare
    else:
        below = below if rows.rank else None
        stacks = rows.stacks if below is None else rows.others
    if look is None:
        passes, _ = carry(uses, ends, stacks, batched=graph.batched)
    else:
        found = _watched(uses, ends, stacks, max(1, rows.rank), graph, look)
        if found is None:
            return None
        passes = found
    if below is None:
        return passes
    r = rows.rank
    if len(passes) == 1 and rows.count > 2:
        passes = [between(passes[0], 0, r), between(passes[0], r, rows.count)]
        r = 1
    return [*passes[:r], below, *(passes[r:] if rows.has_rest else [])]


def _watched(
    uses: Sequence[Use],
    ends: Sequence[Tensor],
    stacks: Sequence[Tensor],
    choices: int,
    graph: Graph,
    look: Look,
) -> list[list[Carried]] | None:
    # One of those that are carried anyway, once more with other scales.
    which = int(torch.randint(choices, (), generator=look.coins))
    probes = [scaled_examples(each[which], look.scales)[None] for each in stacks]
    if look.apart:
        passes, _ = carry(uses, ends, stacks, batched=graph.batched, keep=True)
        (probe,), _ = carry(uses, ends, probes, batched=False, keep=True)
    else:
        stacks = [torch.cat(pair) for pair in zip(stacks, probes, strict=True)]
        passes, _ = carry(uses, ends, stacks, batched=graph.batched, keep=True)
        if len(passes) > 1:
            probe, passes = passes[-1], passes[:-1]
        else:
            probe, passes = passes[0], [between(passes[0], 0, -1)]
    alone = len(passes) > 1
    like = passes[which] if alone else between(passes[0], which, which + 1)
    kept = in_place(probe, like, graph.layouts, look.scales, look.rounding)
    return passes if kept else None


def travels_alone(rows: Rows, graph: Graph, *, probes: bool) -> bool:
    """Whether the costate is best carried from the loss on, and nothing with it.

    Args:
        rows: what is carried.
        graph: what is known about the graph.
        probes: whether a look at the examples travels with the rows.
    """
    others = rows.count - 1 + probes
    few = not graph.batched or others < FEW
    return rows.has_costate and rows.rank > 0 and few and not rows.led
