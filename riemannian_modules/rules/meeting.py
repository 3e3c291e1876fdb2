"""Operations of autograd's graph in which a parameter meets something else."""

from collections.abc import Collection

import torch
from torch import Tensor
from torch.autograd.graph import Node

from riemannian_modules.rules.inside import saved, saved_as_they_are

__all__ = ["TIMES", "kind_of", "multiplier", "no_more"]

# Products with something, or with a mask.
TIMES = ("Mul", "Where", "MaskedFill")


def kind_of(node: Node) -> str:
    """Return the name of an operation.

    Args:
        node: the operation.
    """
    name = type(node).__name__.removesuffix("0").removesuffix("1")
    return name.removesuffix("Backward")


def multiplier(
    node: Node, kind: str, position: int, dtype: torch.dtype
) -> Tensor | None:
    """Return what an operation multiplies an argument with; None if that is unknown.

    Args:
        node: the operation.
        kind: its name, one of ``TIMES``.
        position: which argument.
        dtype: what a mask is to be.
    """
    if not saved_as_they_are():
        return None
    if kind == "Mul":
        return saved(node, ("_saved_other", "_saved_self")[position])
    mask = saved(node, "_saved_condition" if kind == "Where" else "_saved_mask")
    if mask is None or (kind == "MaskedFill" and position > 0):
        return None
    return (mask if kind == "Where" and position == 0 else ~mask).to(dtype)


def no_more(node: Node, besides: int, kinds: Collection[str]) -> bool:
    """Whether a graph shows no more than parameters, and constants that they met.

    Args:
        node: an operation.
        besides: which of its arguments does not matter.
        kinds: the operations that may be on the way from the others.
    """
    waiting = [each for each, _ in node.next_functions]
    del waiting[besides]
    seen: set[Node | None] = set()
    while waiting:
        each = waiting.pop()
        if each is None or each in seen or hasattr(each, "variable"):
            continue
        if kind_of(each) not in kinds:
            return False
        seen.add(each)
        waiting += [following for following, _ in each.next_functions]
    return True
