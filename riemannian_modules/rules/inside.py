"""Linear maps inside a module, found in autograd's graph of one of its calls.

A module that calls ``torch.nn.functional.linear`` on its parameters has them there as
products with a transposed leaf. The cotangent at such a product and what it was applied
to are all that a factor needs; nothing has to run again, not even what is random.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from riemannian_modules.place import Place

__all__ = ["is_packed", "linear_maps", "saved", "saved_as_they_are"]

# A product, by the name of its node, and what it remembers of its left side.
_PRODUCTS = {"AddmmBackward0": "_saved_mat1", "MmBackward0": "_saved_self"}
# What may lie between a product and the weight: its transpose, and autocast.
_VIEWS = ("TBackward0", "TransposeBackward0", "ToCopyBackward0")
_SPLITS = ("SplitBackward0", "SplitWithSizesBackward0")


def linear_maps(
    outputs: Iterable[Tensor],
    given: Iterable[Tensor],
    weights: Sequence[Tensor],
    shapes: Sequence[Sequence[int]],
) -> tuple[Place, ...]:
    """Return where in a call each weight multiplies something; or nothing.

    Args:
        outputs: what the call returned.
        given: what it was given; the search ends there.
        weights: leaves, ``(out, in)`` each. One that occurs several times is split into
            as many parts, in this order.
        shapes: the leading dimensions of what each of them multiplies.

    Returns:
        A place for each weight; empty if one was not found, or cannot be looked at.
    """
    if not saved_as_they_are():
        return ()
    names = [id(weight) for weight in weights]
    wanted = [(name, names[:i].count(name)) for i, name in enumerate(names)]
    nodes = _products(outputs, given, set(wanted))
    places = []
    for key, shape in zip(wanted, shapes, strict=True):
        node: Any = nodes.get(key)
        x = None if node is None else saved(node, _PRODUCTS[type(node).__name__])
        if x is None:
            return ()
        rows, size = node._input_metadata[0].shape
        if rows != torch.Size(shape).numel():
            return ()
        x = x.view(*shape, x.shape[-1])
        places.append(Place(GradientEdge(node, 0), x, torch.Size((*shape, size))))
    return tuple(places)


def saved_as_they_are() -> bool:
    """Whether what autograd saves can be looked at.

    Hooks on saved tensors, as of a checkpoint, compute them anew, and only once.
    """
    top = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
    return top is not None and top(True) is None


def saved(node: Node, name: str) -> Tensor | None:
    """Return a tensor that a node keeps, detached; None if there is none.

    Args:
        node: the node.
        name: its attribute.
    """
    try:
        found = getattr(node, name)
    except RuntimeError:
        # Changed in place: autograd will say so.
        return None
    return found.detach() if isinstance(found, Tensor) else None


def is_packed(node: Node, name: str) -> bool:
    """Whether looking at what a node keeps would compute it anew, as of a checkpoint.

    Args:
        node: the node.
        name: its attribute, of a tensor or several.
    """
    raw = getattr(node, f"_raw{name}", None)
    every = raw if isinstance(raw, tuple) else (raw,)
    return any(getattr(each, "unpack_hook", None) is not None for each in every)


def _products(
    outputs: Iterable[Tensor], given: Iterable[Tensor], wanted: set[tuple[int, int]]
) -> dict[tuple[int, int], Node]:
    """Return the products with leaves that are met on the way to the arguments.

    Args:
        outputs: where to begin.
        given: where to end.
        wanted: leaves by identity, and which part of them.
    """
    found: dict[tuple[int, int], Node] = {}
    seen: set[Node | None] = {None, *(tensor.grad_fn for tensor in given)}
    waiting = [tensor.grad_fn for tensor in outputs]
    while waiting and len(found) < len(wanted):
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        following = node.next_functions
        if type(node).__name__ in _PRODUCTS:
            key = _leaf(following[-1][0])
            if key in wanted:
                found[key] = node
        waiting += [each for each, _ in following]
    return found


def _leaf(node: Node | None) -> tuple[int, int]:
    """Return the leaf that a node is a transpose of, and which part of it."""
    part = 0
    while node is not None and type(node).__name__ in (*_VIEWS, *_SPLITS):
        node, number = node.next_functions[0]
        if type(node).__name__ in _SPLITS:
            part = number
    return id(getattr(node, "variable", None)), part
