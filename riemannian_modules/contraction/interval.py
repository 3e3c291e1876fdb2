"""Arithmetic with intervals of numbers, rounded outward."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.errors import ContractionError

__all__ = ["Interval"]

ULPS = 4  # by how much torch's elementary functions may be wrong


@dataclass(frozen=True)
class Interval:
    """All numbers between two bounds, entry by entry.

    An operation returns an interval that contains every result for numbers of its
    arguments, rounding included: sums, products and quotients are widened by one unit
    in the last place, exp, tanh, sin and cos by four. A variable that occurs twice is
    treated as two: write ``x.square()``, not ``x * x``, and divide boxes where the
    bounds are too wide (Moore, Kearfott and Cloud 2009).

    Args:
        lower: lower bounds, float64, any shape.
        upper: upper bounds.

    Raises:
        ContractionError: a lower bound exceeds its upper bound, or one is NaN.

    >>> x = Interval.of(-1.0, 2.0)
    >>> print(x.square() + 1)
    [1, 5]
    """

    lower: Tensor
    upper: Tensor

    def __post_init__(self) -> None:
        if not bool((self.lower <= self.upper).all()):
            raise ContractionError(
                f"an interval from {self.lower} to {self.upper} is empty or NaN"
            )

    @classmethod
    def of(
        cls, lower: float | Tensor, upper: float | Tensor | None = None
    ) -> "Interval":
        """Return the interval between two numbers; of one number, exactly it."""
        low = torch.as_tensor(lower, dtype=torch.float64)
        high = low if upper is None else torch.as_tensor(upper, dtype=torch.float64)
        return cls(low, high)

    def __str__(self) -> str:
        if self.lower.ndim == 0:
            return f"[{float(self.lower):.6g}, {float(self.upper):.6g}]"
        return f"[{self.lower}, {self.upper}]"

    def __getitem__(self, index: object) -> "Interval":
        return Interval(self.lower[index], self.upper[index])  # type: ignore[index]

    def __neg__(self) -> "Interval":
        return Interval(-self.upper, -self.lower)

    def __add__(self, other: "Interval | float") -> "Interval":
        right = _interval(other)
        return _wider(self.lower + right.lower, self.upper + right.upper)

    __radd__ = __add__

    def __sub__(self, other: "Interval | float") -> "Interval":
        return self + (-_interval(other))

    def __rsub__(self, other: "Interval | float") -> "Interval":
        return _interval(other) + (-self)

    def __mul__(self, other: "Interval | float") -> "Interval":
        right = _interval(other)
        products = torch.stack(
            torch.broadcast_tensors(
                self.lower * right.lower,
                self.lower * right.upper,
                self.upper * right.lower,
                self.upper * right.upper,
            )
        )
        return _wider(products.amin(0), products.amax(0))

    __rmul__ = __mul__

    def __truediv__(self, other: "Interval | float") -> "Interval":
        return self * _interval(other).reciprocal()

    def __rtruediv__(self, other: "Interval | float") -> "Interval":
        return _interval(other) * self.reciprocal()

    def reciprocal(self) -> "Interval":
        """Return one over the interval.

        Raises:
            ContractionError: zero lies in it.
        """
        if bool(((self.lower <= 0) & (self.upper >= 0)).any()):
            raise ContractionError(f"division by the interval {self}, which contains 0")
        return _wider(1 / self.upper, 1 / self.lower)

    def square(self) -> "Interval":
        """Return the squares, which are not negative."""
        return self**2

    def __pow__(self, exponent: int) -> "Interval":
        if exponent < 0:
            return (self**-exponent).reciprocal()
        if exponent == 0:
            return Interval.of(torch.ones_like(self.lower))
        if exponent % 2:
            return _repeated(self, exponent)
        # Even powers depend on the size alone, and grow with it.
        high = torch.maximum(self.lower.abs(), self.upper.abs())
        both = (self.lower <= 0) & (self.upper >= 0)
        small = torch.minimum(self.lower.abs(), self.upper.abs())
        low = torch.where(both, torch.zeros_like(high), small)
        return _nonnegative(_repeated(Interval(low, high), exponent))

    def exp(self) -> "Interval":
        """Return the exponentials."""
        return _nonnegative(self._monotone(torch.exp))

    def tanh(self) -> "Interval":
        """Return the hyperbolic tangents."""
        wide = self._monotone(torch.tanh)
        return Interval(wide.lower.clamp_min(-1.0), wide.upper.clamp_max(1.0))

    def sigmoid(self) -> "Interval":
        """Return ``1 / (1 + exp(-x))``."""
        wide = self._monotone(torch.sigmoid)
        # 1 / (1 + exp(-x)) overflows below -709, where exp(x) is as sharp a bound.
        high = torch.where(self.upper < -700.0, self.exp().upper, wide.upper)
        return Interval(wide.lower.clamp_min(0.0), high.clamp_max(1.0))

    def cos(self) -> "Interval":
        """Return the cosines."""
        ends = torch.stack([self.lower.cos(), self.upper.cos()])
        wide = _wider(ends.amin(0), ends.amax(0), ULPS)
        low, high = wide.lower.clamp_min(-1.0), wide.upper.clamp_max(1.0)
        # A turning point inside, or too close to tell, makes the bound one.
        low = torch.where(self._holds(math.pi), -torch.ones_like(low), low)
        high = torch.where(self._holds(0.0), torch.ones_like(high), high)
        return Interval(low, high)

    def sin(self) -> "Interval":
        """Return the sines."""
        return (self - Interval.of(math.pi / 2 - 1e-15, math.pi / 2 + 1e-15)).cos()

    def _holds(self, phase: float) -> Tensor:
        """Whether ``phase + 2 pi k`` lies inside for a whole k, or nearly."""
        margin = 1e-12 * (1 + torch.maximum(self.lower.abs(), self.upper.abs()))
        first = ((self.lower - margin - phase) / (2 * math.pi)).ceil()
        return phase + 2 * math.pi * first <= self.upper + margin

    def _monotone(self, function: Callable[[Tensor], Tensor]) -> "Interval":
        return _wider(function(self.lower), function(self.upper), ULPS)


def _interval(value: "Interval | float") -> Interval:
    return value if isinstance(value, Interval) else Interval.of(value)


def _wider(lower: Tensor, upper: Tensor, ulps: int = 1) -> Interval:
    inf = torch.full((), math.inf, dtype=torch.float64)
    for _ in range(ulps):
        lower = torch.nextafter(lower, -inf)
        upper = torch.nextafter(upper, inf)
    return Interval(lower, upper)


def _nonnegative(wide: Interval) -> Interval:
    return Interval(wide.lower.clamp_min(0.0), wide.upper)


def _repeated(base: Interval, exponent: int) -> Interval:
    """Return an odd power, or a power of what is not negative: both are monotone."""
    low, high = Interval.of(base.lower), Interval.of(base.upper)
    bottom, top = low, high
    for _ in range(exponent - 1):
        bottom, top = bottom * low, top * high
    return Interval(bottom.lower, top.upper)
