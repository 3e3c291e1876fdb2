"""How far to go along a curve: Armijo's rule and the strong Wolfe conditions."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

__all__ = ["Armijo", "Curve", "Found", "LineRule", "StrongWolfe"]


class Curve(Protocol):
    """The loss along a curve, as a function of one number."""

    def value(self, t: float) -> float:
        """Return the loss at ``t``."""

    def slope(self, t: float) -> float:
        """Return its derivative at ``t``, where the value was asked for last."""


@dataclass(frozen=True)
class Found:
    """Where a search ended.

    Attributes:
        length: how far to go; 0 where no point was good.
        value: the loss there.
        trials: how often the loss was asked for.
        satisfied: whether the conditions of the rule hold there.
        finite: whether any trial had a finite loss.
    """

    length: float
    value: float
    trials: int
    satisfied: bool
    finite: bool


class LineRule(ABC):
    """A rule that chooses the length of a step along a descending curve."""

    @abstractmethod
    def search(self, curve: Curve, value: float, slope: float, first: float) -> Found:
        """Return a length.

        Args:
            curve: the loss along the curve.
            value: the loss at 0.
            slope: its derivative at 0, negative.
            first: the length that is tried first.
        """


def _require(sufficient: float, upper: float, trials: int, what: str) -> None:
    if not (0.0 < sufficient < upper and trials >= 1):
        raise ValueError(
            f"sufficient={sufficient}, trials={trials}: needs {what} and at least one "
            "trial"
        )


def _parabola(a: float, fa: float, sa: float, b: float, fb: float) -> float:
    """Return the minimum of the parabola with value and slope at a and value at b."""
    width = b - a
    bend = fb - fa - sa * width
    if not (math.isfinite(bend) and bend > 0.0):
        return math.nan
    return a - 0.5 * sa * width * width / bend


def _cubic(a: float, fa: float, sa: float, b: float, fb: float, sb: float) -> float:
    """Return the minimum of the cubic with values and slopes at a and b."""
    d = sa + sb - 3.0 * (fa - fb) / (a - b)
    radicand = d * d - sa * sb
    if not radicand >= 0.0:
        return math.nan
    root = math.copysign(math.sqrt(radicand), b - a)
    below = sb - sa + 2.0 * root
    return b - (b - a) * (sb + root - d) / below if below != 0.0 else math.nan


def _inside(t: float, a: float, b: float) -> float:
    """Return t, kept away from both ends of an interval; its middle for NaN."""
    if not math.isfinite(t):
        return 0.5 * (a + b)
    low, high = sorted((a + 0.1 * (b - a), b - 0.1 * (b - a)))
    return min(max(t, low), high)


@dataclass(frozen=True)
class Armijo(LineRule):
    """Backtrack until ``f(t) <= f(0) + sufficient t f'(0)``.

    Implements :eq:`armijo`. Each shorter length minimises the parabola through what is
    known, between a tenth and a half of the last. Losses that are not finite count as
    infinite.

    Args:
        sufficient: part of the predicted decrease that is asked for, in (0, 1/2]. With
            much less than a tenth steps are taken that go almost twice too far, and
            gain nothing.
        trials: how many points to try.

    Raises:
        ValueError: a number out of its range.

    >>> class Square:
    ...     def value(self, t):
    ...         return (t - 1.0) ** 2
    >>> Armijo().search(Square(), 1.0, -2.0, 4.0).length
    1.0
    """

    sufficient: float = 0.1
    trials: int = 20

    def __post_init__(self) -> None:
        _require(self.sufficient, 0.5 + 1e-9, self.trials, "0 < sufficient <= 1/2")

    def search(self, curve: Curve, value: float, slope: float, first: float) -> Found:
        """Return a length; see :class:`LineRule`."""
        t, finite = first, False
        for trial in range(1, self.trials + 1):
            reached = curve.value(t)
            finite = finite or math.isfinite(reached)
            if reached <= value + self.sufficient * t * slope and reached < value:
                return Found(t, reached, trial, True, True)
            wanted = _parabola(0.0, value, slope, t, reached)
            if not math.isfinite(reached):
                wanted = 0.1 * t
            t = min(max(wanted if math.isfinite(wanted) else 0.0, 0.1 * t), 0.5 * t)
        return Found(0.0, value, self.trials, False, finite)


@dataclass
class _End:
    t: float
    value: float
    slope: float  # NaN where it was not asked for


@dataclass(frozen=True)
class StrongWolfe(LineRule):
    """Also ask that the curve is flat enough, ``|f'(t)| <= curvature |f'(0)|``.

    Implements :eq:`wolfe`. Algorithms 3.5 and 3.6 of Nocedal & Wright (2006): the
    length doubles until an interval must hold a good point, then the interval shrinks
    by cubic interpolation. If the trials run out, the best point with a sufficient
    decrease is taken and reported as not satisfying the conditions.

    Args:
        sufficient: part of the predicted decrease that is asked for.
        curvature: part of the first slope that may be left, in (sufficient, 1).
        trials: how many points to try.

    Raises:
        ValueError: a number out of its range.

    >>> class Square:
    ...     def value(self, t):
    ...         return (t - 1.0) ** 2
    ...
    ...     def slope(self, t):
    ...         return 2.0 * (t - 1.0)
    >>> StrongWolfe(curvature=0.1).search(Square(), 1.0, -2.0, 4.0).length
    1.0
    """

    sufficient: float = 1e-4
    curvature: float = 0.9
    trials: int = 30

    def __post_init__(self) -> None:
        _require(
            self.sufficient, self.curvature, self.trials, "0 < sufficient < curvature"
        )
        if not self.curvature < 1.0:
            raise ValueError(f"curvature={self.curvature}: must be below 1")

    def search(self, curve: Curve, value: float, slope: float, first: float) -> Found:
        """Return a length; see :class:`LineRule`."""
        low = _End(0.0, value, slope)
        high: _End | None = None
        t, finite = first, False
        for trial in range(1, self.trials + 1):
            reached = curve.value(t)
            finite = finite or math.isfinite(reached)
            enough = reached <= value + self.sufficient * t * slope
            if not (math.isfinite(reached) and enough and reached < low.value):
                high = _End(t, reached, math.nan)
            elif not math.isfinite(there := curve.slope(t)):
                high = _End(t, math.inf, math.nan)  # as bad as no value
            else:
                if abs(there) <= -self.curvature * slope:
                    return Found(t, reached, trial, True, True)
                # The good points lie downhill from here.
                if high is None:
                    high = low if there > 0.0 else None
                elif there * (high.t - low.t) >= 0.0:
                    high = low
                low = _End(t, reached, there)
            if high is None:
                t *= 2.0
                continue
            t = self._next(low, high)
            if t in (low.t, high.t):
                break
        return Found(low.t, low.value, trial, False, finite)

    @staticmethod
    def _next(low: _End, high: _End) -> float:
        if not math.isfinite(high.value):
            return low.t + 0.1 * (high.t - low.t)
        ends = (low.t, low.value, low.slope, high.t, high.value)
        if math.isfinite(high.slope):
            return _inside(_cubic(*ends, high.slope), low.t, high.t)
        return _inside(_parabola(*ends), low.t, high.t)
