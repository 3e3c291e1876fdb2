"""Parameters that all examples share: learned positions, class tokens, scales.

What a module adds to its examples, repeats for each of them or multiplies them with, is
a function T of parameters and constants alone. The cotangent of an example at the sum,
added up over what was broadcast, is that example's cotangent of T, and autograd carries
it on to the parameters. The module does not run again, so that anything may be random
in it.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import DenseFactor, MetricFactor, joined
from riemannian_modules.nested import tensors_in
from riemannian_modules.place import Place
from riemannian_modules.rules.base import Call, Entry, Inside
from riemannian_modules.rules.job import UnexplainedError
from riemannian_modules.rules.meeting import TIMES, kind_of, multiplier, no_more

__all__ = ["SHARED", "find_shared", "shared", "shared_places"]

# What may be done to parameters on the way: one differentiable argument, and no other
# that could hold examples.
_ALONE = (
    *("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Slice", "Select"),
    *("Transpose", "T", "Permute", "Alias", "Clone", "ToCopy", "Embedding"),
    *("Neg", "Exp", "Tanh", "Sigmoid", "Softplus", "Softmax", "Relu"),
)
_REPEATS = ("Expand", "Repeat")
_MEETS = ("Add", "Sub", *TIMES)


class _Share(NamedTuple):
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
    """

    leaf: Tensor
    edge: GradientEdge
    shape: torch.Size
    sign: float
    times: bool
    at: Node
    below: frozenset[Node]
    on: bool


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
            places = _places(leaf, node, above, {})
            found += [] if None in places else places
    return tuple(place for place in found if place is not None)


Parents = dict[Node, list[tuple[Node, int, int]]]


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
        below: nodes of places on the way to it.
    """
    if node in known:
        # Two ways from the parameter meet here: one derivative is that of both.
        return [] if known[node] else [None]
    users = above.get(node, [])
    found: list[Place | None] = [] if users else [None]
    for parent, position, number in users:
        kind = kind_of(parent)
        if kind in _ALONE:
            found += _places(leaf, parent, above, known, below)
            continue
        saw: Any = parent
        sign, other = 1.0, None
        if kind in ("Add", "Sub") and position < 2:
            if position == 1:
                sign = float(saw._saved_alpha) * (1.0 if kind == "Add" else -1.0)
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
        if kind in _MEETS and no_more(parent, position, (*_ALONE, *_MEETS)):
            further = _places(leaf, parent, above, tried, below | {parent})
        on = None not in further
        # Of a way that leads nowhere only what is not understood is known.
        known |= {each: told for each, told in tried.items() if on or not told}
        found += further if on else []
        meta: Any = node
        shape = leaf.shape
        if not hasattr(node, "variable"):
            shape = meta._input_metadata[number].shape
        edge, times = GradientEdge(node, number), other is not None
        share = _Share(leaf, edge, torch.Size(shape), sign, times, parent, below, on)
        size = torch.Size(saw._input_metadata[0].shape)
        other = leaf.new_empty(0) if other is None else other
        found.append(Place(GradientEdge(parent, 0), other, size, share))
    known[node] = None not in found
    return found


def _where_they_meet(places: Sequence[Inside], examples: int) -> list[Inside]:
    """Return the places where the examples come in, the first ones on each way."""
    apart = {place.note.at for place in places if _is_shared(place, examples)}
    return [
        place
        for place in places
        if not place.note.below & apart
        and (place.note.at in apart or not place.note.on)
    ]


def _full(place: Inside) -> tuple[int, ...]:
    """Return the shape of T with as many dimensions as the place has."""
    missing = len(place.shape) - len(place.note.shape)
    return (*[1] * missing, *place.note.shape)


def _is_shared(place: Inside, examples: int) -> bool:
    """Whether the examples are apart at a place, and T is the same for all of them."""
    dim, full = place.layout.dim, _full(place)
    alike = all(own in (1, all_) for own, all_ in zip(full, place.shape, strict=True))
    return alike and (examples == 1 or (dim >= 0 and full[dim] == 1))


def _rows(call: Call, place: Inside) -> Tensor:
    """Return the rows of a parameter at one place, ``(r n, *shape)``.

    Raises:
        LinearizationError: what it comes to is not the same for all examples.
    """
    share: _Share = place.note
    cotangent, n = place.cotangent, call.examples
    assert cotangent is not None
    cotangent = cotangent.to(call.dtype) * share.sign
    if share.times:
        cotangent = cotangent * place.input.to(call.dtype)
    size, dim, full = place.shape, place.layout.dim, _full(place)
    if not _is_shared(place, n):
        reason = (
            f"at {call.label} a parameter is not the same for all examples, or what it "
            "is added to is shared by them"
        )
        raise LinearizationError(reason)
    if n == 1:
        rows, kept = cotangent.unsqueeze(1), full
    else:
        # Where examples are folded with something else, that stays in their place.
        kept = full if size[dim] != n else (*full[:dim], *full[dim + 1 :])
        rows = place.layout.front(cotangent, n, 1)
    over = [i + 2 for i, each in enumerate(kept) if each == 1 != rows.shape[i + 2]]
    rows = rows.sum(over) if over else rows
    rows = rows.reshape(-1, *share.shape)
    if hasattr(share.edge.node, "variable"):
        return rows
    with warnings.catch_warnings():
        # torch says so of operations that it carries one by one.
        warnings.filterwarnings("ignore", "There is a performance drop")
        (found,) = torch.autograd.grad(
            [share.edge],
            [share.leaf],
            [rows.to(share.leaf.dtype)],
            is_grads_batched=True,
            retain_graph=True,
        )
    return found.as_subclass(Tensor)


def shared(call: Call) -> dict[str, MetricFactor]:
    """Factors of parameters that examples meet in sums, products and repetitions.

    Cost: that of the rows, which are stored.

    Args:
        call: a call of a module that has no rule.

    Returns:
        The factors.

    Raises:
        UnexplainedError: some parameters are used in another way.
    """
    places: dict[int, list[Inside]] = {}
    for place in call.inside:
        if isinstance(place.note, _Share):
            places.setdefault(id(place.note.leaf), []).append(place)
    found: dict[str, MetricFactor] = {}
    missing = []
    for path in call.wanted:
        leaf = call.module.get_parameter(path)
        own = [p for p in places.get(id(leaf), []) if p.cotangent is not None]
        try:
            met = _where_they_meet(own, call.examples)
            rows = [DenseFactor(_rows(call, place)) for place in met]
        except LinearizationError:
            rows = []
        if rows:
            found[path] = joined(rows)
        else:
            missing.append(path)
    if missing:
        names = [call.name_of(call.module.get_parameter(path)) for path in missing]
        raise UnexplainedError(
            [name for name in names if name is not None],
            f"{call.label} uses it in another way than in sums with its examples; a "
            "layer would explain it (nn.Linear for products, nn.Embedding for tables)",
        )
    return found


SHARED = Entry(shared, deep=True, compares=True)
