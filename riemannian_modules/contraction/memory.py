"""How long a contracting system remembers a constant perturbation."""

import math

from riemannian_modules.contraction.constants import require

__all__ = ["decay", "geometric", "memory", "times", "until"]

_LARGEST = math.log(1.7e308)
_SMALL = 1e-6


def memory(rate: float, t: float | None) -> float:
    """Return ``(1 - exp(-rate t)) / rate``, accurate near a rate of zero.

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
        return 1.0 / rate if rate > 0 else math.inf
    require(t >= 0, f"a time of {t}")
    x = rate * t
    if abs(x) < _SMALL:
        return t * (1.0 - x / 2.0 + x * x / 6.0)
    return -_expm1(-x) / rate


def geometric(q: float, steps: int | None) -> float:
    """Return ``(1 - q^steps) / (1 - q)``, accurate near q = 1.

    Args:
        q: The factor, not negative.
        steps: Number of steps; None: the supremum over all numbers.

    Returns:
        The sum of ``q^k`` for k below ``steps``, perhaps infinite.

    Raises:
        ContractionError: A negative number of steps.

    Example:
        >>> geometric(1.0, 3), geometric(0.5, None), geometric(0.5, 2)
        (3.0, 2.0, 1.5)
    """
    if steps is None:
        return 1.0 / (1.0 - q) if q < 1 else math.inf
    require(steps >= 0, f"{steps} steps")
    if q == 1.0 or steps == 0:
        return float(steps)
    if q < 0.5:
        return (1.0 - q**steps) / (1.0 - q)
    # log1p of the exact difference keeps the digits of a factor near one.
    return _expm1(steps * math.log1p(q - 1.0)) / (q - 1.0)


def decay(rate: float, t: float | None) -> float:
    """Return ``exp(-rate t)``, or its supremum over all times for None."""
    if t is None:
        return 1.0 if rate >= 0 else math.inf
    if rate == 0.0:
        return 1.0
    return math.inf if -rate * t > _LARGEST else math.exp(-rate * t)


def times(a: float, b: float) -> float:
    """Return ``a b`` with zero times infinity zero: nothing is never amplified."""
    return 0.0 if 0.0 in (a, b) else a * b


def until(t: float | None) -> str:
    """Return a time in words."""
    return "at any time" if t is None else f"at time {t:.4g}"


def _expm1(x: float) -> float:
    return math.inf if x > _LARGEST else math.expm1(x)
