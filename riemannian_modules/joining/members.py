r"""One linearisation of the parts that the members of a batch have.

With a share ``s_p`` of the terms of a mean loss with member p,

    K = [sqrt(s_1) K_1; sqrt(s_2) K_2; ...],   y = [sqrt(s_1) y_1; ...],
    d loss = sum_p s_p d loss_p,               e = sum_p s_p e_p ,

where each member has divided by the number of its own terms already. For a sum of
losses every share is 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from riemannian_modules.factors import MetricFactor
from riemannian_modules.joining.headers import SOURCE, Header
from riemannian_modules.joining.plan import Offer
from riemannian_modules.linearization import Linearization

__all__ = ["Members", "join", "own_residual", "own_sums"]


class Members(ABC):
    """How the parts of a batch come together: between processes, or in one."""

    @abstractmethod
    def factors(self, offers: Sequence[Offer]) -> dict[str, MetricFactor]:
        """Return the factors of all examples, weighted, by name.

        Args:
            offers: what each member has.
        """

    @abstractmethod
    def sums(self, names: Sequence[str], *, rest: bool) -> list[dict[str, Tensor]]:
        """Return the weighted sums of what :func:`own_sums` says.

        Args:
            names: the parameters that any member has a gradient of.
            rest: whether the rests are wanted, too.
        """

    @abstractmethod
    def residual(self, offers: Sequence[Offer]) -> Tensor:
        """Return the residual of all examples, ``(total rank,)``, weighted.

        Args:
            offers: what each member has; the order of rows is that of their factors.
        """


def own_sums(found: Linearization, *, rest: bool) -> list[Mapping[str, Tensor]]:
    """Return what a member adds to the gradient, and to the rest.

    Args:
        found: its linearisation.
        rest: whether the rest is wanted, too.
    """
    if not rest:
        return [found.gradient]
    own = found.rest if found.residual is not None else found.gradient
    return [found.gradient, own or {}]


def own_residual(found: Linearization, share: float, like: Tensor) -> Tensor:
    """Return the weighted residual of a member, zero where it has none.

    Args:
        found: its linearisation.
        share: its share of the batch.
        like: a tensor of its data type and device.
    """
    y = found.residual
    if y is None:
        y = like.new_zeros(max((f.rank for f in found.factors.values()), default=0))
    return share**0.5 * y


def join(
    headers: Sequence[Header],
    weights: Sequence[float],
    members: Members,
    order: Sequence[str],
) -> Linearization:
    """Return the linearisation of all examples. Implements :eq:`joint-batch`.

    Args:
        headers: what each member has.
        weights: the share of each.
        members: bring their parts together.
        order: names of the model's parameters, in their order.

    Returns:
        The linearisation.
    """
    exact = any(header.exact for header in headers)
    rest = exact and any(h.rest or not h.exact for h in headers if h.gradient)
    offers = [
        replace(header.offer, share=weight)
        for header, weight in zip(headers, weights, strict=True)
    ]
    gathered = members.factors(offers)
    source = {
        name.removeprefix(SOURCE): factor
        for name, factor in gathered.items()
        if name.startswith(SOURCE)
    }
    names = {name for h in headers for name in [*h.offer.forms, *h.gradient]}
    names = {name.removeprefix(SOURCE) for name in names}
    covectors = [name for name in order if any(name in h.gradient for h in headers)]
    sums = members.sums(covectors, rest=rest)
    residual = members.residual(offers) if exact else None
    covector = None
    if covectors:
        covector = sums[1] if rest else (None if exact else sums[0])
    complete = covector is not None and set(source) == set(covectors)
    whole = all(header.source for header in headers)
    return Linearization(
        [name for name in order if name in names],
        {name: f for name, f in gathered.items() if not name.startswith(SOURCE)},
        sums[0],
        residual,
        covector,
        source if complete and whole else None,
        source if complete and whole and not exact else {},
        sum(header.offer.examples for header in headers),
    )
