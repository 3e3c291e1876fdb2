"""What a number about convergence says: its value, its metric, and what is proved."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal

from riemannian_modules.errors import ContractionError

__all__ = ["SMALL", "Gain", "Norm", "Rate", "Side", "Verdict", "weakest"]

Norm = Literal["2", "inf", "1"]

# Up to this share of the value a bound on rounding leaves it "exact".
SMALL = 1e-3


class Verdict(Enum):
    """How much is known of a statement; nothing combined is better than its parts."""

    CERTIFIED = "certified"
    """Proved on the region that the result names, under its stated assumptions."""
    EVIDENCE = "evidence"
    """Seen at the points that the result names; nothing is proved beyond them."""
    NOT_CERTIFIED = "not certified"
    """Neither proved nor disproved."""
    REFUTED = "refuted"
    """Disproved at the named point and in the named metric, perhaps not in others."""

    def __str__(self) -> str:
        return self.value


class Side(Enum):
    """On which side of the truth a value lies."""

    EXACT = "exact"
    LOWER = "lower bound"
    UPPER = "upper bound"
    ESTIMATE = "estimate"

    def __str__(self) -> str:
        return self.value


_ORDER = (
    Verdict.CERTIFIED,
    Verdict.EVIDENCE,
    Verdict.NOT_CERTIFIED,
    Verdict.REFUTED,
)


def weakest(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict of a conclusion that needs all of its premises.

    A refuted premise does not refute the conclusion, it leaves it unproved.

    Raises:
        ContractionError: There is no verdict.

    Example:
        >>> str(weakest([Verdict.CERTIFIED, Verdict.EVIDENCE]))
        'evidence'
        >>> str(weakest([Verdict.EVIDENCE, Verdict.REFUTED]))
        'not certified'
    """
    found = list(verdicts)
    if not found:
        raise ContractionError("a conclusion needs at least one premise")
    worst = max(found, key=_ORDER.index)
    return Verdict.NOT_CERTIFIED if worst is Verdict.REFUTED else worst


@dataclass(frozen=True)
class Rate:
    """A rate of contraction, with its metric, its region and how it was obtained.

    Trajectories approach each other like ``exp(-value * t)`` in the named metric; a
    negative value is a bound on how fast they may part.

    Args:
        value: The rate, in one over the unit of time of the flow (a step of length
            ``eta`` is a time of ``eta``).
        kind: What was measured: "true", "frozen", "output", or the user's word.
        metric: The metric in which distances shrink, in words that no other metric
            has; the library's own end in digits of what the metric is made of.
        where: The point, the points or the region for which it holds, in words.
        side: On which side of the true rate the value lies.
        verdict: What is known. A certified rate is exact or a lower bound.
        source: The theorem or the computation behind it, in words.
        cost: What was spent to find it: number of evaluations by name.
        norm: How the norms of several modules are combined: "2" where the metric is an
            inner product, see :class:`Certificate`.

    Raises:
        ContractionError: The value is NaN, or is called certified though it is an
            upper bound or an estimate.

    Example:
        >>> rate = Rate(0.5, kind="given", metric="Euclidean", where="everywhere")
        >>> print(rate)
        0.5 (given, lower bound, certified) in the Euclidean metric, everywhere
        >>> rate.contracts
        True
    """

    value: float
    kind: str = "given"
    metric: str = "Euclidean"
    where: str = "everywhere"
    side: Side = Side.LOWER
    verdict: Verdict = Verdict.CERTIFIED
    source: str = "given by the caller"
    cost: dict[str, int] = field(default_factory=dict, compare=False)
    norm: Norm = "2"

    def __post_init__(self) -> None:
        _check(self.value, self.verdict, self.side, Side.UPPER, "rate")

    @property
    def contracts(self) -> bool:
        """Whether contraction is proved: certified, and positive.

        A rate of the kind "output" is about the residual and never about two
        trajectories, so it proves none.
        """
        about_states = self.kind != "output"
        return about_states and self.verdict is Verdict.CERTIFIED and self.value > 0

    def __str__(self) -> str:
        what = f"{self.kind}, {self.side}, {self.verdict}"
        return f"{self.value:.6g} ({what}) in the {self.metric} metric, {self.where}"


def require_trajectories(rate: Rate) -> Rate:
    """Return the rate.

    Raises:
        ContractionError: It is one in output space, which says nothing about two
            trajectories.
    """
    if rate.kind == "output":
        raise ContractionError(
            "a rate in output space says how fast a loss falls, not how trajectories "
            "approach each other: it does not compose and bounds no distance; take a "
            "'true' or 'frozen' rate"
        )
    return rate


@dataclass(frozen=True)
class Gain:
    """How strongly one module acts on another: a bound on a Jacobian's norm.

    Args:
        value: Supremum over the region of the norm of the coupling's Jacobian,
            from the metric of the source to the metric of the target. Not negative.
        where: The points or the region, in words.
        side: On which side of the supremum the value lies.
        verdict: What is known. A certified gain is exact or an upper bound.
        source: The theorem or the computation behind it, in words.

    Raises:
        ContractionError: The value is negative or NaN, or is called certified though
            it is a lower bound or an estimate.

    Example:
        >>> print(Gain(2.0))
        2 (upper bound, certified), everywhere
    """

    value: float
    where: str = "everywhere"
    side: Side = Side.UPPER
    verdict: Verdict = Verdict.CERTIFIED
    source: str = "given by the caller"

    def __post_init__(self) -> None:
        _check(self.value, self.verdict, self.side, Side.LOWER, "gain")
        if self.value < 0:
            raise ContractionError(f"a gain is a norm, got {self.value}")

    def __str__(self) -> str:
        return f"{self.value:.6g} ({self.side}, {self.verdict}), {self.where}"


def _check(value: float, verdict: Verdict, side: Side, wrong: Side, what: str) -> None:
    if math.isnan(value):
        raise ContractionError(
            f"the {what} is NaN: look for NaN in the parameters, the data or the loss"
        )
    if verdict is Verdict.CERTIFIED and side in {wrong, Side.ESTIMATE}:
        raise ContractionError(
            f"a {what} that is an {side} proves nothing: its verdict can be "
            f"'{Verdict.EVIDENCE}' or '{Verdict.NOT_CERTIFIED}', not '{verdict}'"
        )
