"""Tables in which every example looks up its own rows, found in autograd's graph."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from riemannian_modules.factors import EmbeddingFactor, MetricFactor, ViewedFactor
from riemannian_modules.place import Place
from riemannian_modules.rules.base import Call, Inside
from riemannian_modules.rules.inside import is_packed, saved, saved_as_they_are
from riemannian_modules.rules.meeting import kind_of
from riemannian_modules.rules.products import (
    Dims,
    by_example,
    dimension,
    shape_of,
    signed,
)

__all__ = ["LOOKUPS", "Lookup", "looks_up_apart", "lookup_factor", "lookup_place"]

# Operations that look up, by the kind of their node.
LOOKUPS = ("Embedding", "Index", "IndexSelect")


class Lookup(NamedTuple):
    """A look-up in a parameter.

    Attributes:
        leaf: the parameter.
        node: the look-up in the graph.
        padding: the index at which there is no derivative, or None.
        shared: whether other places explain it where all examples look up the same.
    """

    leaf: Tensor
    node: Node
    padding: int | None
    shared: bool


def lookup_place(leaf: Tensor, node: Node, dims: Dims | None) -> Place | None:
    """Return the place of a look-up in the first dimension of a parameter, or None.

    Args:
        leaf: the parameter.
        node: what uses it, or a copy of it.
        dims: where the parameter's dimensions are in that.
    """
    known: Any = node
    kind, padding = kind_of(node), None
    if dims != tuple(range(leaf.ndim)) or leaf.ndim not in (1, 2):
        return None
    names = {"Embedding": "_saved_indices", "Index": "_saved_indices"}
    name = names.get(kind, "_saved_index")
    if not saved_as_they_are() or is_packed(node, name):
        return None
    tokens: Tensor | None = None
    if kind == "Embedding" and not known._saved_scale_grad_by_freq:
        tokens = saved(node, name)
        padding = signed(known._saved_padding_idx)
    elif kind == "IndexSelect" and dimension(known, "_saved_dim", leaf.ndim) == 0:
        tokens = saved(node, name)
    elif kind == "Index":
        tokens = _first_index(node)
    if tokens is None or tokens.dtype not in (torch.int32, torch.int64):
        return None
    if kind == "IndexSelect" and tokens.ndim == 0:
        tokens = tokens.view(1)
    after = shape_of(node)
    if tuple(after) != (*tokens.shape, *leaf.shape[1:]) or not tokens.ndim:
        return None
    note = Lookup(leaf, node, None if padding == -1 else padding, False)
    return Place(GradientEdge(node, 0), tokens, after, note)


def _first_index(node: Any) -> Tensor | None:
    """Return what indexes the first dimension, where nothing indexes another."""
    try:
        first, *others = node._saved_indices
    except (RuntimeError, ValueError):
        return None
    alone = isinstance(first, Tensor) and all(each is None for each in others)
    return first.detach() if alone else None


def looks_up_apart(call: Call, place: Inside) -> bool:
    """Whether the examples look up values of their own.

    Args:
        call: a call of a module.
        place: the look-up.
    """
    return call.examples == 1 or 0 <= place.layout.dim < place.input.ndim


def lookup_factor(call: Call, place: Inside) -> MetricFactor:
    """Return the factor of a parameter at one look-up.

    Args:
        call: a call of a module.
        place: the look-up, with a cotangent.

    Raises:
        LinearizationError: the examples are not among what is looked up.
    """
    note: Lookup = place.note
    assert place.cotangent is not None
    l = place.cotangent.to(call.dtype)
    if note.leaf.ndim == 1:
        l = l.unsqueeze(-1)
    size = len(note.leaf)
    # An index may count from the end.
    tokens = place.input.to(l.device).long().remainder(size)
    if note.padding is not None:
        l = l * (tokens != note.padding).unsqueeze(-1)
    l = by_example(call, l, place.layout, 1)
    index = by_example(call, tokens.unsqueeze(-1), place.layout, 0)
    factor = EmbeddingFactor(index.flatten(), l, size)
    return ViewedFactor(factor) if note.leaf.ndim == 1 else factor
