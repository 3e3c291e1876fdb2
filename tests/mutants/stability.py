"""Stability bounds, estimates and actions with one mistake each, by the broken law."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Value:
    value: float


def squared_count(L_G, rate, n, t=None):
    """Divides by n^2."""
    memory = 1.0 / rate if t is None else -math.expm1(-rate * t) / rate
    return Value(2.0 * L_G**2 * memory / n**2)


def half(L_G, rate, n, t=None):
    """Forgets that the new example pushes, too, and not only the old one."""
    memory = 1.0 / rate if t is None else -math.expm1(-rate * t) / rate
    return Value(L_G**2 * memory / n)


def backwards(L_G, rate, n, t=None):
    """Has the sign of the rate wrong in the exponent."""
    return Value(2.0 * L_G**2 * math.expm1(rate * t) / (rate * n))


def cancelling(L_G, rate, n, t=None):
    """Subtracts from one, so that small rates lose all digits."""
    return Value(2.0 * L_G**2 * (1.0 - math.exp(-rate * t)) / (rate * n))


BOUNDS = (squared_count, half)


def without_metric_change(L_G, rate, n, *, kappa, mu, t=None):
    """Takes the metric of the data for a fixed one."""
    memory = 1.0 / rate if t is None else -math.expm1(-rate * t) / rate
    return Value(2.0 * L_G**2 * memory / n)
