"""Parameters that all examples share: learned positions, class tokens, scales.

What a module adds to its examples, repeats for each of them or multiplies them with, is
a function T of parameters and constants alone. The cotangent of an example at the sum,
added up over what was broadcast, is that example's cotangent of T, and autograd carries
it on to the parameters. The module does not run again, so that anything may be random
in it.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import DenseFactor, MetricFactor, joined
from riemannian_modules.rules.base import Call, Entry, Inside
from riemannian_modules.rules.job import UnexplainedError
from riemannian_modules.rules.lookups import Lookup, looks_up_apart, lookup_factor
from riemannian_modules.rules.products import Product, product_factor
from riemannian_modules.rules.ways import Share

__all__ = ["SHARED", "shared"]


def _factors(call: Call, places: Sequence[Inside]) -> list[MetricFactor]:
    """Return the factor of a parameter at each of its places.

    Raises:
        LinearizationError: its examples are not where they should be.
    """
    lookups = [place for place in places if isinstance(place.note, Lookup)]
    apart = {p.note.node for p in lookups if looks_up_apart(call, p)}
    found = [
        lookup_factor(call, place)
        for place in lookups
        if place.note.node in apart or not place.note.shared
    ]
    found += [
        product_factor(call, place)
        for place in places
        if isinstance(place.note, Product)
    ]
    sums = [
        place
        for place in places
        if isinstance(place.note, Share) and place.note.lookup not in apart
    ]
    met = _where_they_meet(sums, call.examples)
    return [*found, *(DenseFactor(_rows(call, place)) for place in met)]


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
    share: Share = place.note
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
        if isinstance(place.note, Share | Product | Lookup):
            places.setdefault(id(place.note.leaf), []).append(place)
    found: dict[str, MetricFactor] = {}
    missing = []
    for path in call.wanted:
        leaf = call.module.get_parameter(path)
        own = [p for p in places.get(id(leaf), []) if p.cotangent is not None]
        try:
            factors = _factors(call, own)
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
