"""What a member of a batch says about its part before anything is put together."""

from collections.abc import Sequence
from dataclasses import dataclass

from riemannian_modules.errors import EmptyBatchError, ShapeError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.heads import Head, Reduction
from riemannian_modules.joining.forms import Form, Pieces, form_of
from riemannian_modules.joining.plan import Offer
from riemannian_modules.linearization import Linearization

__all__ = ["SOURCE", "Header", "Size", "header_of", "shares", "size_of"]

# Before the names of the factors that a rest is summed from.
SOURCE = "source of "


@dataclass(frozen=True)
class Size:
    """How much of a batch somebody has.

    Attributes:
        examples: number of examples.
        terms: number of terms of each output's loss.
    """

    examples: int
    terms: tuple[float, ...]


def size_of(heads: Sequence[Head]) -> Size:
    """Return the size of a pass.

    Args:
        heads: outputs and what measures them.
    """
    terms = [
        len(outputs) if metric is None else metric.terms(outputs)
        for outputs, metric in heads
    ]
    return Size(len(heads[0][0]), tuple(terms))


@dataclass(frozen=True)
class Header:
    """What a member says about its linearisation.

    Attributes:
        offer: its factors; the share is not known yet.
        terms: number of terms of each output's loss.
        gradient: names of the parameters that have a gradient.
        exact: whether there is a residual.
        rest: whether there is a rest.
        source: whether there are factors that the rest is summed from.
    """

    offer: Offer
    terms: tuple[float, ...]
    gradient: list[str]
    exact: bool
    rest: bool
    source: bool


def header_of(
    found: Linearization, size: Size
) -> tuple[Header, dict[str, MetricFactor], Pieces]:
    """Describe a linearisation.

    Args:
        found: the linearisation.
        size: how much of the batch it is.

    Returns:
        The description, the factors to send, and the tensors that they are made of.
    """
    # Not those of the size: rows of several sets of points are an example each.
    examples = found.examples
    rank = max((factor.rank for factor in found.factors.values()), default=0)
    rows = rank // examples
    pieces = Pieces()
    factors: dict[str, MetricFactor] = dict(found.factors)
    forms: dict[str, Form] = {
        name: form_of(factor, rows, 0.5, pieces) for name, factor in factors.items()
    }
    for name, factor in (found.source or {}).items():
        forms[SOURCE + name] = form_of(factor, 1, 1.0, pieces)
        factors[SOURCE + name] = factor
    header = Header(
        Offer(forms, pieces.specs, examples, rows, 1.0),
        size.terms,
        list(found.gradient),
        found.residual is not None,
        found.rest is not None,
        found.source is not None,
    )
    return header, factors, pieces


def shares(terms: Sequence[Sequence[float]], reduction: Reduction) -> list[float]:
    """Return the share of every member, the weights of :eq:`joint-batch`.

    Args:
        terms: for each member, the number of terms of each output's loss.
        reduction: how the loss sums over examples.

    Returns:
        The shares, which add up to 1 for a mean.

    Raises:
        ShapeError: the outputs disagree on them.
        EmptyBatchError: there are no terms.

    >>> shares([[3], [1]], "mean")
    [0.75, 0.25]
    """
    if reduction == "sum":
        return [1.0] * len(terms)
    totals = [sum(each) for each in zip(*terms, strict=True)]
    if not any(totals):
        raise EmptyBatchError("all weights of the batch are zero: nothing counts in it")
    found = [
        {count / total for count, total in zip(own, totals, strict=True) if total}
        for own in terms
    ]
    if any(max(own) - min(own) > 1e-12 for own in found):
        raise ShapeError(
            "the outputs are divided among the ranks or passes of a batch in different "
            "proportions (terms of each output in each of them: "
            f"{[list(own) for own in terms]}), so a mean over each output is no mean "
            "of their losses; give all of them the same part of every set of examples"
        )
    return [own.pop() for own in found]
