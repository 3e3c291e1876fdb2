"""Which tokens of a batch are the same."""

from collections.abc import Iterator

import torch
from torch import Tensor

from riemannian_modules.factors.slabs import pieces

__all__ = ["equal_pairs", "occurring", "slots_at_most"]


def occurring(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Number the tokens that occur; for tensors on the CPU.

    Args:
        tokens: ``(N,)``.

    Returns:
        A table of the tokens that occur, and the place of every token in it, ``(N,)``.
    """
    table, slot = torch.unique(tokens, return_inverse=True)
    return table, slot


def slots_at_most(tokens: Tensor, vocabulary: int) -> tuple[Tensor, Tensor]:
    """Number the tokens that occur without learning how many there are.

    So that nothing waits for the device that they are on.

    Args:
        tokens: ``(N,)``.
        vocabulary: how many tokens there are.

    Returns:
        A table of as many tokens as can occur, zero where there are none, and the place
        of every token in it, ``(N,)``.

    >>> slots_at_most(torch.tensor([7, 3, 7]), 9)
    (tensor([3, 7, 0]), tensor([1, 0, 1]))
    """
    if vocabulary <= len(tokens):
        return torch.arange(vocabulary, device=tokens.device), tokens
    ordered, order = tokens.sort()
    new = torch.zeros_like(ordered)
    new[1:] = ordered[1:] != ordered[:-1]
    number = new.cumsum(0)
    slot = torch.empty_like(order).scatter_(0, order, number)
    return torch.zeros_like(ordered).scatter_(0, number, ordered), slot


def equal_pairs(tokens: Tensor, each: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield all pairs of equal tokens, in bounded pieces; for tensors on the CPU.

    Args:
        tokens: ``(N,)``.
        each: entries that the caller makes for a pair.

    Yields:
        Indices of the first and of the second of each pair; every token makes a pair
        with itself.
    """
    order = tokens.argsort()
    _, counts = torch.unique_consecutive(tokens[order], return_counts=True)
    begin = (counts.cumsum(0) - counts).repeat_interleave(counts)
    partners = counts.repeat_interleave(counts)
    ends = partners.cumsum(0)
    for some in pieces(int(ends[-1]) if len(ends) else 0, each):
        pair = torch.arange(some.start, some.stop)
        one = torch.searchsorted(ends, pair, right=True)
        other = begin[one] + pair - (ends[one] - partners[one])
        yield order[one], order[other]
