"""How long a contracting system remembers a constant perturbation; rounded up."""

import math
from fractions import Fraction

from riemannian_modules.contraction.constants import require
from riemannian_modules.contraction.exact import round_down, round_up
from riemannian_modules.contraction.verified import over_up

__all__ = ["decay", "geometric", "memory", "until"]

_LARGEST = math.log(1.7e308)
_SMALL = 1e-6
_FEW = 64
_ULPS = 4  # by which the functions of math may be off, at most


def memory(rate: float, t: float | None) -> float:
    """Return ``(1 - exp(-rate t)) / rate``, rounded up, accurate near a rate of zero.

    Args:
        rate: The rate, of any sign.
        t: The time, perhaps infinite; None: its supremum over all times.

    Returns:
        The integral of ``exp(-rate s)`` from 0 to t, perhaps infinite.

    Raises:
        ContractionError: A negative time.

    Example:
        >>> memory(0.0, 3.0), memory(0.5, None), memory(-1.0, None)
        (3.0, 2.0, inf)
    """
    if t is None or t == math.inf:
        return over_up(1.0, rate) if rate > 0 else math.inf
    require(t >= 0, f"a time of {t}")
    if t == 0.0 or rate == 0.0:
        return float(t)
    if math.isinf(rate):
        return 0.0 if rate > 0 else math.inf
    x = Fraction(rate) * Fraction(t)
    if abs(x) < _SMALL:
        # The next term of the series is negative if x is positive; else all are.
        rest = abs(x) ** 3 / 12 if x < 0 else 0
        return round_up(Fraction(t) * (1 - x / 2 + x * x / 6 + rest))
    if x > 0:
        return over_up(_up(-math.expm1(-round_up(x))), rate)
    return over_up(_expm1_up(round_up(-x)), -rate)


def geometric(q: float, steps: int | None) -> float:
    """Return ``(1 - q^steps) / (1 - q)``, rounded up, accurate near q = 1.

    Args:
        q: The factor, not negative.
        steps: Number of steps; None: the supremum over all numbers.

    Returns:
        The sum of ``q^k`` for k below ``steps``, perhaps infinite.

    Raises:
        ContractionError: A negative number of steps, or a fraction of one.

    Example:
        >>> geometric(1.0, 3), geometric(0.5, None), geometric(0.5, 2)
        (3.0, 2.0, 1.5)
    """
    gap = 1 - Fraction(q) if math.isfinite(q) else Fraction(-1)
    if steps is None:
        return round_up(1 / gap) if gap > 0 else math.inf
    whole = steps >= 0 and steps % 1 == 0
    require(whole, f"{steps} steps, where a whole number is needed")
    if gap == 0 or steps <= 1:
        return round_up(Fraction(steps))
    if math.isinf(q):
        return math.inf
    if steps <= _FEW:
        return round_up((1 - Fraction(q) ** steps) / gap)
    # log1p of the exact difference keeps the digits of a factor near one.
    if q == 0.0:
        return 1.0
    log = math.log1p(q - 1.0) if 0.5 <= q <= 2.0 else math.log(q)
    x = round_up(steps * Fraction(_up(abs(log))))
    if gap > 0:
        return min(round_up(Fraction(_up(-math.expm1(-x))) / gap), float(steps))
    top = _expm1_up(x)
    return round_up(Fraction(top) / -gap) if math.isfinite(top) else math.inf


def decay(rate: float, t: float | None) -> float:
    """Return ``exp(-rate t)``, rounded up, or its supremum over all times for None."""
    if t is None:
        return 1.0 if rate >= 0 else math.inf
    if rate == 0.0 or t == 0.0:
        return 1.0
    if math.isinf(rate) or math.isinf(t):
        return 0.0 if (rate > 0) == (t > 0) else math.inf
    x = round_down(Fraction(rate) * Fraction(t))
    return math.inf if -x > _LARGEST else _up(math.exp(-x))


def until(t: float | None) -> str:
    """Return a time in words."""
    return "at any time" if t is None else f"at time {t:.4g}"


def _expm1_up(x: float) -> float:
    return math.inf if x > _LARGEST else _up(math.expm1(x))


def _up(value: float) -> float:
    for _ in range(_ULPS):
        value = math.nextafter(value, math.inf)
    return value
