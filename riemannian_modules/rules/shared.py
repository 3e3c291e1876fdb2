"""Parameters that all examples share: learned positions, class tokens, scales.

What a module adds to its examples, repeats for each of them or multiplies them with, is
a function T of parameters alone. The cotangent of an example at the sum, added up over
what was broadcast, is that example's cotangent of T, and autograd carries it on to the
parameters. The module does not run again, so that anything may be random in it.
"""

import warnings
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import DenseFactor, MetricFactor, joined
from riemannian_modules.nested import tensors_in
from riemannian_modules.place import Place
from riemannian_modules.rules.base import Call, Entry, Inside
from riemannian_modules.rules.inside import saved, saved_as_they_are
from riemannian_modules.rules.job import UnexplainedError
from riemannian_modules.rules.lookups import (
    LOOKUPS,
    Lookup,
    looks_up_apart,
    lookup_factor,
    lookup_place,
)
from riemannian_modules.rules.products import (
    Dims,
    Parents,
    Product,
    kind_of,
    product_factor,
    product_places,
    viewed,
)

__all__ = ["SHARED", "find_shared", "shared", "shared_places"]

# What may be done to parameters on the way: one differentiable argument, and no other
# that could hold examples.
_ALONE = (
    *("View", "UnsafeView", "ReshapeAlias", "Unsqueeze", "Squeeze", "Slice", "Select"),
    *("Transpose", "T", "Permute", "Alias", "Clone", "ToCopy"),
    *("Neg", "Exp", "Tanh", "Sigmoid", "Softplus", "Softmax", "Relu"),
)
_REPEATS = ("Expand", "Repeat")


class _Share(NamedTuple):
    """How a parameter comes to a place.

    Attributes:
        leaf: the parameter.
        edge: where T enters the graph.
        shape: that of T.
        sign: what T is multiplied with in the sum.
        times: whether T is multiplied with the place's input.
        lookup: the look-up on the way that explains the parameter by itself where the
            examples look up values of their own; or None.
    """

    leaf: Tensor
    edge: GradientEdge
    shape: torch.Size
    sign: float
    times: bool
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
            places = list(_places(leaf, node, above, tuple(range(leaf.ndim))))
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
    leaf: Tensor, node: Node, above: Parents, dims: Dims | None
) -> Iterator[Place | None]:
    """Yield the places that a node comes to; None where that is not understood."""
    users = above.get(node, [])
    if not users:
        yield None
    for parent, position, number in users:
        meta: Any = node
        shape = leaf.shape
        if not hasattr(node, "variable"):
            shape = torch.Size(meta._input_metadata[number].shape)
        products = product_places(leaf, shape, (parent, position), above, dims)
        if products is not None:
            yield from products
            continue
        kind = kind_of(parent)
        if kind in LOOKUPS:
            yield from _looked_up(leaf, parent, above, dims)
            continue
        if kind in _ALONE:
            yield from _places(leaf, parent, above, viewed(parent, shape, dims))
            continue
        known: Any = parent
        sign, other = 1.0, None
        if kind in ("Add", "Sub") and position < 2:
            if position == 1:
                sign = float(known._saved_alpha) * (1.0 if kind == "Add" else -1.0)
        elif kind == "Addmm" and position == 0:
            sign = float(known._saved_beta)
        elif kind == "Mul" and position < 2 and saved_as_they_are():
            other = saved(parent, ("_saved_other", "_saved_self")[position])
            if other is None:
                yield None
                continue
        elif kind not in _REPEATS:
            yield None
            continue
        edge, times = GradientEdge(node, number), other is not None
        share = _Share(leaf, edge, shape, sign, times)
        size = torch.Size(known._input_metadata[0].shape)
        other = leaf.new_empty(0) if other is None else other
        yield Place(GradientEdge(parent, 0), other, size, share)


def _looked_up(
    leaf: Tensor, node: Node, above: Parents, dims: Dims | None
) -> Iterator[Place | None]:
    """Yield the place of a look-up, and what it comes to if all look up the same."""
    place = lookup_place(leaf, node, dims)
    if place is None and kind_of(node) != "Embedding":
        yield None
        return
    others = list(_places(leaf, node, above, None))
    if place is None:
        yield from others
        return
    shared = None not in others
    yield place._replace(note=place.note._replace(shared=shared))
    for other in others:
        if shared and other is not None:
            yield other._replace(note=other.note._replace(lookup=node))


def _factors(call: Call, places: Sequence[Inside]) -> Iterator[MetricFactor]:
    """Yield the factor of a parameter at each of its places.

    Raises:
        LinearizationError: its examples are not where they should be.
    """
    lookups = [place for place in places if isinstance(place.note, Lookup)]
    apart = {p.note.node for p in lookups if looks_up_apart(call, p)}
    for place in places:
        note = place.note
        if isinstance(note, Product):
            yield product_factor(call, place)
        elif isinstance(note, Lookup):
            if note.node in apart or not note.shared:
                yield lookup_factor(call, place)
        elif note.lookup not in apart:
            yield DenseFactor(_rows(call, place))


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
    size, dim = place.shape, place.layout.dim
    full = (*[1] * (len(size) - len(share.shape)), *share.shape)
    alike = all(own in (1, all_) for own, all_ in zip(full, size, strict=True))
    if not alike or (n > 1 and full[dim] != 1):
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
    """Factors of parameters that examples meet in sums, products and look-ups.

    Cost: that of the rows, which are stored; of matrix products that of a linear layer,
    and of look-ups that of an embedding.

    Args:
        call: a call of a module that has no rule.

    Returns:
        The factors.

    Raises:
        UnexplainedError: some parameters are used in another way.
    """
    places: dict[int, list[Inside]] = {}
    for place in call.inside:
        if isinstance(place.note, _Share | Product | Lookup):
            places.setdefault(id(place.note.leaf), []).append(place)
    found: dict[str, MetricFactor] = {}
    missing = []
    for path in call.wanted:
        leaf = call.module.get_parameter(path)
        own = [p for p in places.get(id(leaf), []) if p.cotangent is not None]
        try:
            factors = [*_factors(call, own)]
        except LinearizationError:
            factors = []
        if factors:
            found[path] = joined(factors)
        else:
            missing.append(path)
    if missing:
        names = [call.name_of(call.module.get_parameter(path)) for path in missing]
        raise UnexplainedError(
            [name for name in names if name is not None],
            f"{call.label} uses it in another way than in sums and products with its "
            "examples, or look-ups; a layer of torch.nn would explain it",
        )
    return found


SHARED = Entry(shared, deep=True, compares=True)
