r"""One linearisation of the examples of all processes.

With a share ``s_p`` of the terms of a mean loss on process p,

    K = [sqrt(s_1) K_1; sqrt(s_2) K_2; ...],   y = [sqrt(s_1) y_1; ...],
    d loss = sum_p s_p d loss_p,               e = sum_p s_p e_p ,

where each process has divided by the number of its own terms already. For a sum of
losses every share is 1.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.distributed.forms import Form, Pieces, form_of
from riemannian_modules.distributed.gathering import Offer, cat_padded, gather_factors
from riemannian_modules.distributed.ranks import Ranks
from riemannian_modules.errors import DistributedError
from riemannian_modules.factors import DenseFactor, MetricFactor
from riemannian_modules.heads import Head, Reduction
from riemannian_modules.linearize import Linearization

__all__ = ["Header", "header_of", "join_linearizations", "shares", "summed"]

_SOURCE = "source of "


@dataclass(frozen=True)
class Header:
    """What a process says about its linearisation before anything is sent.

    Attributes:
        offer: its factors; the share is not known yet.
        terms: number of terms of each output's loss.
        gradient: names of the parameters that have a gradient.
        exact: whether there is a residual.
        rest: whether there is a rest.
        source: whether there are factors that the rest is summed from.
        apart: whether its rows are of one example each, all of them in turn.
    """

    offer: Offer
    terms: list[int]
    gradient: list[str]
    exact: bool
    rest: bool
    source: bool
    apart: bool


def header_of(
    found: Linearization, heads: Sequence[Head]
) -> tuple[Header, dict[str, MetricFactor], Pieces]:
    """Describe a linearisation.

    Args:
        found: the linearisation.
        heads: outputs and what measures them.

    Returns:
        The description, the factors to send, and the tensors that they are made of.
    """
    examples = len(heads[0][0])
    rank = max((factor.rank for factor in found.factors.values()), default=0)
    rows = rank // examples
    apart = any(type(factor) is not DenseFactor for factor in found.factors.values())
    if not apart:
        # Perhaps of several sets of examples: one long list of rows.
        rows, examples = min(rank, 1), max(rank, 1)
    pieces = Pieces()
    factors: dict[str, MetricFactor] = dict(found.factors)
    forms: dict[str, Form] = {
        name: form_of(factor, rows, 0.5, pieces) for name, factor in factors.items()
    }
    for name, factor in (found.source or {}).items():
        forms[_SOURCE + name] = form_of(factor, 1, 1.0, pieces)
        factors[_SOURCE + name] = factor
    terms = [
        len(outputs) if metric is None else metric.terms(outputs)
        for outputs, metric in heads
    ]
    header = Header(
        Offer(forms, pieces.specs, examples, rows, 1.0),
        terms,
        list(found.gradient),
        found.residual is not None,
        found.rest is not None,
        found.source is not None,
        apart,
    )
    return header, factors, pieces


def shares(terms: Sequence[Sequence[int]], reduction: Reduction) -> list[float]:
    """Return the share of every process, the weights of :eq:`joint-batch`.

    Args:
        terms: for each process, the number of terms of each output's loss.
        reduction: how the loss sums over examples.

    Returns:
        The shares, which add up to 1 for a mean.

    Raises:
        DistributedError: the outputs disagree on them.

    >>> shares([[3], [1]], "mean")
    [0.75, 0.25]
    """
    if reduction == "sum":
        return [1.0] * len(terms)
    totals = [sum(each) for each in zip(*terms, strict=True)]
    found = [
        {count / total for count, total in zip(own, totals, strict=True)}
        for own in terms
    ]
    if any(max(own) - min(own) > 1e-12 for own in found):
        raise DistributedError(
            "the outputs are divided among the ranks in different proportions (terms "
            f"of each output on each rank: {[list(own) for own in terms]}), so a mean "
            "over each of them is no mean of the ranks' losses; give every rank the "
            "same part of every set of examples"
        )
    return [own.pop() for own in found]


def join_linearizations(
    ranks: Ranks,
    headers: Sequence[Header],
    weights: Sequence[float],
    found: Linearization,
    factors: Mapping[str, MetricFactor],
    pieces: Pieces,
    like: Mapping[str, Tensor],
) -> Linearization:
    """Return the linearisation of all examples. Implements :eq:`joint-batch`.

    Args:
        ranks: the processes.
        headers: what each of them has.
        weights: the share of each.
        found: the linearisation of this one.
        factors: the factors to send, as in :func:`header_of`.
        pieces: the tensors that they are made of.
        like: the model's parameters by name, in the order of the gradients.

    Returns:
        The linearisation, the same on all processes.
    """
    share = weights[ranks.rank]
    exact = any(header.exact for header in headers)
    rest = exact and any(h.rest or not h.exact for h in headers if h.gradient)
    offers = [
        Offer(o.forms, o.specs, o.examples, o.rows, weight)
        for o, weight in zip((h.offer for h in headers), weights, strict=True)
    ]
    device = next(iter(like.values())).device
    gathered = gather_factors(ranks, offers, factors, pieces, device)
    source = {
        name.removeprefix(_SOURCE): factor
        for name, factor in gathered.items()
        if name.startswith(_SOURCE)
    }
    names = {name for h in headers for name in h.offer.forms} | {
        name for h in headers for name in h.gradient
    }
    names = {name.removeprefix(_SOURCE) for name in names}
    ordered = [name for name in like if name in names]
    covectors = [name for name in like if any(name in h.gradient for h in headers)]
    own_rest = found.rest if found.residual is not None else found.gradient
    wanted = [found.gradient] + ([own_rest or {}] if rest else [])
    sums = summed(ranks, wanted, covectors, like, share)
    residual = None
    if exact:
        rows = max((f.rank for f in found.factors.values()), default=0)
        y = found.residual
        if y is None:
            y = next(iter(like.values())).new_zeros(rows)
        residual = join_rows(ranks, offers, share**0.5 * y)
    covector = None
    if covectors:
        covector = sums[1] if rest else (None if exact else sums[0])
    complete = covector is not None and set(source) == set(covectors)
    whole = all(header.source for header in headers)
    apart = all(header.apart for header in headers if header.offer.rows)
    examples = sum(header.offer.examples for header in headers) if apart else 1
    return Linearization(
        ordered,
        {name: f for name, f in gathered.items() if not name.startswith(_SOURCE)},
        sums[0],
        residual,
        covector,
        source if complete and whole else None,
        source if complete and whole and not exact else {},
        examples,
    )


def join_rows(ranks: Ranks, offers: Sequence[Offer], own: Tensor) -> Tensor:
    """Return a vector with one entry for each row of K, of all processes.

    Args:
        ranks: the processes.
        offers: what each of them has; the order of rows is that of their factors.
        own: the entries of this process.

    Returns:
        ``(total rank,)``.
    """
    sizes = [offer.rows * offer.examples for offer in offers]
    received = ranks.gather_bytes(
        own.contiguous().view(torch.uint8), [own.itemsize * size for size in sizes]
    )
    parts = [
        each.view(own.dtype).view(offer.rows, offer.examples)
        for each, offer in zip(received, offers, strict=True)
    ]
    return cat_padded(parts, 1).reshape(-1)


def summed(
    ranks: Ranks,
    wanted: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    like: Mapping[str, Tensor],
    share: float,
) -> list[dict[str, Tensor]]:
    """Return weighted sums over the processes, zero where a process has nothing.

    Args:
        ranks: the processes.
        wanted: what this one has, by name; several at a time.
        names: what any of them has.
        like: tensors of the same shapes, by name.
        share: weight of this process.

    Returns:
        The sums, the same bits on all processes.
    """
    found: list[dict[str, Tensor]] = [{} for _ in wanted]
    kinds: dict[torch.dtype, list[tuple[int, str]]] = {}
    for index in range(len(wanted)):
        for name in names:
            kinds.setdefault(like[name].dtype, []).append((index, name))
    for dtype, places in kinds.items():
        # Sums of numbers in half precision would lose what the shares are about.
        wide = torch.promote_types(dtype, torch.float32)
        flat = torch.cat(
            [
                _or_zero(wanted[index].get(name), like[name]).to(wide).reshape(-1)
                for index, name in places
            ]
        )
        ranks.sum_(flat.mul_(share))
        sizes = [like[name].numel() for _, name in places]
        for (index, name), part in zip(places, flat.split(sizes), strict=True):
            value = part.to(dtype).view(like[name].shape)
            # Of its own memory: optimizers change gradients in place.
            found[index][name] = value.clone()
    return found


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value
