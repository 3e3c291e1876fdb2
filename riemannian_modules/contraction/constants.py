"""The constants that a bound rests on: how each was found, and how it errs."""

import math
from dataclasses import dataclass
from typing import Literal

from riemannian_modules.contraction.result import (
    Gain,
    Rate,
    Side,
    Verdict,
    require_trajectories,
    weakest,
)
from riemannian_modules.errors import ContractionError

__all__ = [
    "EVERYWHERE",
    "Constant",
    "ConstantLike",
    "Safe",
    "as_constant",
    "as_count",
    "as_lipschitz",
    "as_mass",
    "as_rate",
    "as_sensitivity",
    "as_size",
    "require",
]

Safe = Literal["upper", "lower", "exact"]
_SAFE_SIDES: dict[str, Side] = {"upper": Side.UPPER, "lower": Side.LOWER}
EVERYWHERE = "everywhere"


@dataclass(frozen=True)
class Constant:
    """A constant that a bound rests on: how it was found and on which side it errs.

    Args:
        symbol: Its letter, as in the documentation.
        value: The number.
        meaning: What it bounds, in words.
        side: On which side of the true constant the value lies.
        verdict: What is known of it.
        where: The points or the region, in words.
        source: The computation behind it, in words.
        safe: Which side makes the bound larger: "upper" for a supremum (a Lipschitz
            constant), "lower" for an infimum (a rate, a mass), "exact" for neither.

    Raises:
        ContractionError: The value is NaN, or is called certified though it lies on
            the side that makes the bound too small.

    Example:
        >>> print(Constant("kappa", 3.0, "sensitivity", safe="upper"))
        kappa = 3 (upper bound, certified), everywhere: sensitivity
    """

    symbol: str
    value: float
    meaning: str
    side: Side = Side.UPPER
    verdict: Verdict = Verdict.CERTIFIED
    where: str = EVERYWHERE
    source: str = "given by the caller"
    safe: Safe = "upper"

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise ContractionError(
                f"{self.symbol} is NaN: look for NaN in the parameters, the data or "
                "the loss"
            )
        if self.verdict is Verdict.CERTIFIED and not self.is_safe:
            raise ContractionError(
                f"{self.symbol} = {self.value:.6g} is called certified, but a bound "
                f"needs it {self.safe} and it is an {self.side}: its verdict can be "
                f"'{Verdict.EVIDENCE}' at most"
            )

    @property
    def is_safe(self) -> bool:
        """Whether the value errs, if at all, on the side that keeps a bound true."""
        return self.side in {Side.EXACT, _SAFE_SIDES.get(self.safe, Side.EXACT)}

    def __str__(self) -> str:
        what = f"{self.symbol} = {self.value:.6g} ({self.side}, {self.verdict})"
        return f"{what}, {self.where}: {self.meaning}"


ConstantLike = float | Constant | Gain | Rate


def as_constant(given: ConstantLike, symbol: str, meaning: str, safe: Safe) -> Constant:
    """Return a constant of a number, a gain, a rate or another constant.

    A bare number is taken at its word: certified, with the caller as its source.

    Args:
        given: The number or result.
        symbol: Its letter in the bound.
        meaning: What it bounds, in words.
        safe: See :class:`Constant`.

    Returns:
        The constant. A verdict better than its side allows is lowered to evidence.

    Raises:
        ContractionError: It is NaN.
    """
    if isinstance(given, Constant):
        side, verdict = given.side, given.verdict
        where, source, value = given.where, given.source, given.value
        meaning = given.meaning
    elif isinstance(given, Gain | Rate):
        side, verdict = given.side, given.verdict
        where, source, value = given.where, given.source, given.value
        if isinstance(given, Rate):
            meaning = f"{meaning} ({given.kind}, {given.metric} metric)"
    else:
        side = _SAFE_SIDES.get(safe, Side.EXACT)
        return Constant(symbol, float(given), meaning, side=side, safe=safe)
    safe_sides = {Side.EXACT, _SAFE_SIDES.get(safe, Side.EXACT)}
    if side not in safe_sides:
        verdict = weakest([verdict, Verdict.EVIDENCE])
    return Constant(symbol, value, meaning, side, verdict, where, source, safe)


def as_lipschitz(given: ConstantLike) -> Constant:
    """Return the Lipschitz constant of the loss of one example."""
    return as_size(given, "L_G", "Lipschitz constant of one loss in the metric")


def as_sensitivity(given: ConstantLike) -> Constant:
    """Return the supremum of the norm of one example's factor."""
    return as_size(given, "kappa", "sensitivity of one output to the parameters")


def as_rate(given: ConstantLike) -> Constant:
    """Return a rate of contraction, of any sign.

    Raises:
        ContractionError: It is a rate in output space.
    """
    if isinstance(given, Rate):
        require_trajectories(given)
    return as_constant(given, "lambda", "rate of contraction", "lower")


def as_size(given: ConstantLike, symbol: str, meaning: str) -> Constant:
    """Return a supremum of a norm.

    Raises:
        ContractionError: It is negative.
    """
    found = as_constant(given, symbol, meaning, "upper")
    require(found.value >= 0, f"{symbol} = {found.value}")
    return found


def as_mass(given: ConstantLike) -> Constant:
    """Return a mass.

    Raises:
        ContractionError: It is not positive.
    """
    mass = as_constant(given, "mu", "mass of the base metric", "lower")
    require(mass.value > 0, f"a mass of {mass.value}")
    return mass


def as_count(n: int) -> int:
    """Return a number of examples.

    Raises:
        ContractionError: It is not positive, or no whole number.
    """
    require(n >= 1 and n % 1 == 0, f"n = {n} examples, where a whole number is needed")
    return n


def require(holds: bool, what: str) -> None:
    """Check a number.

    Args:
        holds: Whether it is in its range.
        what: The number, in words.

    Raises:
        ContractionError: It is not.
    """
    if not holds:
        raise ContractionError(f"{what}: out of the range in which a bound exists")
