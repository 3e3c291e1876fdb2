"""A bound on what is not measured: its premises, and what is proved."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from riemannian_modules.contraction.constants import EVERYWHERE, Constant
from riemannian_modules.contraction.result import Side, Verdict, weakest
from riemannian_modules.errors import ContractionError

__all__ = ["Bound", "Order", "conclude"]


@dataclass(frozen=True)
class Bound:
    """An upper bound on a quantity, with its premises and its verdict.

    Args:
        value: The bound; infinite where nothing is bounded.
        what: The quantity that it bounds, in words.
        verdict: What is known. Certified only if every constant is.
        side: An upper bound if all constants err on the safe side, else an estimate.
        constants: The constants it rests on.
        assumptions: What must hold besides, in words.
        source: The theorem behind it, in words.
        average: What it is an average over ("the choice of minibatches"); None: it
            holds for every outcome.
        trivial: A bound that holds anyway, if one is known; see :attr:`vacuous`.

    Raises:
        ContractionError: The value is NaN or negative, or the verdict is better than
            the side or the constants allow.

    Example:
        >>> bound = Bound(0.2, "difference of two losses", trivial=0.1)
        >>> bound.vacuous
        True
    """

    value: float
    what: str
    verdict: Verdict = Verdict.CERTIFIED
    side: Side = Side.UPPER
    constants: tuple[Constant, ...] = ()
    assumptions: tuple[str, ...] = ()
    source: str = "given by the caller"
    average: str | None = None
    trivial: float | None = None

    def __post_init__(self) -> None:
        if math.isnan(self.value) or self.value < 0:
            raise ContractionError(f"{self.what}: {self.value} is not a bound")
        if self.verdict is not Verdict.CERTIFIED:
            return
        weak = [c.symbol for c in self.constants if c.verdict is not Verdict.CERTIFIED]
        if weak or self.side not in {Side.UPPER, Side.EXACT}:
            raise ContractionError(
                f"{self.what}: a bound from constants that are not certified ({weak}) "
                f"or an {self.side} proves nothing; its verdict can be "
                f"'{Verdict.EVIDENCE}' at most"
            )

    @property
    def guarantees(self) -> bool:
        """Whether the bound is proved, finite and not vacuous."""
        finite = math.isfinite(self.value) and not self.vacuous
        return self.verdict is Verdict.CERTIFIED and finite

    @property
    def vacuous(self) -> bool:
        """Whether it says no more than what holds anyway."""
        limit = math.inf if self.trivial is None else self.trivial
        return self.value >= limit

    def __str__(self) -> str:
        size = f"{self.value:.4g} ({self.side}, {self.verdict}"
        size += ", vacuous)" if self.vacuous else ")"
        over = "" if self.average is None else f", on average over {self.average}"
        lines = [f"{self.what} <= {size}{over}"]
        lines += [f"  {constant}" for constant in self.constants]
        lines += [f"  assumes: {each}" for each in self.assumptions]
        return "\n".join([*lines, f"  source: {self.source}"])


@dataclass(frozen=True)
class Order:
    """How a quantity scales, with constants that nobody has stated. Not a bound.

    It has no verdict to set and takes part in no certificate.

    Example:
        >>> print(Order(1.2, "x^2 / n", "a sketch"))
        order x^2 / n = 1.2 (order only, not a guarantee; a sketch)
    """

    value: float
    formula: str
    source: str

    @property
    def verdict(self) -> Verdict:
        """Always "not certified"."""
        return Verdict.NOT_CERTIFIED

    def __str__(self) -> str:
        note = f"order only, not a guarantee; {self.source}"
        return f"order {self.formula} = {self.value:.4g} ({note})"


def conclude(
    value: float,
    what: str,
    constants: Sequence[Constant],
    *,
    assumptions: Sequence[str] = (),
    source: str,
    region: str | None = None,
    average: str | None = None,
) -> Bound:
    """Return a bound whose verdict follows from its constants.

    A constant that is known at some points only proves nothing about the region
    between them, so unless the caller names a region on which all of them hold, only
    constants that hold everywhere certify.

    Args:
        value: The bound.
        what: The quantity that it bounds, in words.
        constants: The constants it rests on.
        assumptions: What must hold besides.
        source: The theorem.
        region: The region on which the caller says that all constants hold.
        average: See :class:`Bound`.

    Returns:
        The bound.
    """
    verdict = weakest([Verdict.CERTIFIED, *(c.verdict for c in constants)])
    local = [c.symbol for c in constants if c.where != EVERYWHERE]
    premises = list(assumptions)
    if region is not None:
        premises.append(f"all constants hold on {region} (the caller says so)")
    elif local:
        verdict = weakest([verdict, Verdict.EVIDENCE])
        names = ", ".join(local)
        premises.append(f"{names}: also hold between the points where they were found")
    safe = all(c.is_safe for c in constants) and (region is not None or not local)
    return Bound(
        value,
        what,
        verdict,
        Side.UPPER if safe else Side.ESTIMATE,
        tuple(constants),
        tuple(premises),
        source,
        average,
    )
