"""The ways of parameters through autograd's graph, to where they meet the examples."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from riemannian_modules.nested import tensors_in
from riemannian_modules.place import Place
from riemannian_modules.rules.lookups import LOOKUPS, lookup_place
from riemannian_modules.rules.meeting import TIMES, kind_of, multiplier, no_more
from riemannian_modules.rules.products import Dims, Parents, product_places, viewed

__all__ = ["Share", "find_shared", "shared_places"]

# What may be done to parameters on the way: one differentiable argument, and no other
# that could hold examples.
_ALONE = (
    *("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Slice", "Select"),
    *("Transpose", "T", "Permute", "Alias", "Clone", "ToCopy"),
    *("Neg", "Exp", "Tanh", "Sigmoid", "Softplus", "Softmax", "Relu"),
)
_REPEATS = ("Expand", "Repeat")
_MEETS = ("Add", "Sub", *TIMES)
# On the way from something else that a parameter meets.
_ASIDE = (*_ALONE, *_MEETS, "Embedding")


class Share(NamedTuple):
    """How a parameter comes to a place.

    Attributes:
        leaf: the parameter.
        edge: where T enters the graph.
        shape: that of T.
        sign: what T is multiplied with in the sum.
        times: whether T is multiplied with the place's input.
        at: the node of the place.
        below: those of places on the way from the parameter.
        on: whether there are places above that do in its stead, where what T meets
            here is the same for all examples.
        lookup: the look-up on the way that explains the parameter by itself where the
            examples look up values of their own; or None.
    """

    leaf: Tensor
    edge: GradientEdge
    shape: torch.Size
    sign: float
    times: bool
    at: Node
    below: frozenset[Node]
    on: bool
    lookup: Node | None = None


def find_shared(
    leaves: Sequence[Tensor],
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[Tensor],
) -> tuple[Place, ...]:
    """Return where in a call the examples meet each of some parameters.

    Args:
        leaves: the parameters.
        module: what was called.
        args: its arguments.
        kwargs: its keyword arguments.
        outputs: what it returned.

    Returns:
        As :func:`shared_places`.
    """
    starts = [t.grad_fn for t in outputs]
    return shared_places(
        leaves, starts, [t.grad_fn for t in tensors_in((args, kwargs))]
    )


def shared_places(
    leaves: Sequence[Tensor],
    starts: Iterable[Node | None],
    ends: Iterable[Node | None],
) -> tuple[Place, ...]:
    """Return where the examples meet each of some parameters.

    Args:
        leaves: the parameters.
        starts: nodes of what a call returned.
        ends: nodes of what it was given.

    Returns:
        All places of those parameters whose every use is understood.
    """
    above, found = _parents(starts, ends), []
    nodes = {id(node.variable): node for node in above if hasattr(node, "variable")}
    for leaf in leaves:
        node = nodes.get(id(leaf))
        if node is not None:
            places = _places(leaf, node, above, {}, tuple(range(leaf.ndim)))
            found += [] if None in places else places
    # Steps write into parameters, and what they were multiplied with would be gone.
    owned = {node.variable.untyped_storage().data_ptr() for node in nodes.values()}
    return tuple(
        place._replace(input=place.input.clone())
        if place.input.untyped_storage().data_ptr() in owned
        else place
        for place in found
        if place is not None
    )


def _parents(starts: Iterable[Node | None], ends: Iterable[Node | None]) -> Parents:
    """Return what uses each node, as which argument, and which of its outputs."""
    found: Parents = {}
    stops = set(ends)
    waiting = [node for node in starts if node is not None]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if node in stops:
            continue
        for position, (following, number) in enumerate(node.next_functions):
            if following is None:
                continue
            found.setdefault(following, []).append((node, position, number))
            if following not in seen:
                seen.add(following)
                waiting.append(following)
    return found


def _places(
    leaf: Tensor,
    node: Node,
    above: Parents,
    known: dict[Node, bool],
    dims: Dims | None,
    below: frozenset[Node] = frozenset(),
) -> list[Place | None]:
    """Return the places that a node comes to; None where that is not understood.

    Where it meets what holds no more than parameters and constants, as far as the graph
    shows, examples may come in there (an input, a mask) or further up: both are places,
    and where the examples are tells which counts.

    Args:
        leaf: the parameter.
        node: the node.
        above: what uses each node.
        known: whether nodes that were looked at are understood; changed.
        dims: where the parameter's dimensions are there; None: it is no view of it.
        below: nodes of places on the way to it.
    """
    if node in known:
        # Two ways from the parameter meet here: one derivative is that of both.
        return [] if known[node] else [None]
    users = above.get(node, [])
    found: list[Place | None] = [] if users else [None]
    for parent, position, number in users:
        kind, shape = kind_of(parent), _shape_of(leaf, node, number)
        products = product_places(leaf, shape, (parent, position), above, dims)
        if products is not None:
            found += products
            continue
        if kind in LOOKUPS:
            found += _looked_up(leaf, parent, above, known, dims, below)
            continue
        if kind in _ALONE:
            after = viewed(parent, shape, dims)
            found += _places(leaf, parent, above, known, after, below)
            continue
        saw: Any = parent
        sign, other = 1.0, None
        if kind in ("Add", "Sub") and position < 2:
            if position == 1:
                sign = float(saw._saved_alpha) * (1.0 if kind == "Add" else -1.0)
        elif kind == "Addmm" and position == 0:
            sign = float(saw._saved_beta)
        elif kind in TIMES:
            other = multiplier(parent, kind, position, leaf.dtype)
            if other is None:
                found.append(None)
                continue
        elif kind not in _REPEATS:
            found.append(None)
            continue
        further: list[Place | None] = [None]
        tried = dict(known)
        if kind in _MEETS and no_more(parent, position, _ASIDE):
            further = _places(leaf, parent, above, tried, None, below | {parent})
        on = None not in further
        # Of a way that leads nowhere only what is not understood is known.
        known |= {each: told for each, told in tried.items() if on or not told}
        found += further if on else []
        edge, times = GradientEdge(node, number), other is not None
        share = Share(leaf, edge, shape, sign, times, parent, below, on)
        size = torch.Size(saw._input_metadata[0].shape)
        other = leaf.new_empty(0) if other is None else other
        found.append(Place(GradientEdge(parent, 0), other, size, share))
    known[node] = None not in found
    return found


def _shape_of(leaf: Tensor, node: Any, number: int) -> torch.Size:
    if hasattr(node, "variable"):
        return leaf.shape
    return torch.Size(node._input_metadata[number].shape)


def _looked_up(
    leaf: Tensor,
    node: Node,
    above: Parents,
    known: dict[Node, bool],
    dims: Dims | None,
    below: frozenset[Node],
) -> list[Place | None]:
    """Return the place of a look-up, and what it comes to if all look up the same."""
    place = lookup_place(leaf, node, dims)
    if place is None and kind_of(node) != "Embedding":
        return [None]
    others = _places(leaf, node, above, known, None, below)
    if place is None:
        return others
    whole = [other for other in others if other is not None]
    shared = len(whole) == len(others)
    # What this look-up explains where it is not shared by all examples.
    marked = [other._replace(note=other.note._replace(lookup=node)) for other in whole]
    note = place.note._replace(shared=shared)
    return [place._replace(note=note), *(marked if shared else [])]
