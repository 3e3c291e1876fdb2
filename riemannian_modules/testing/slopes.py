"""Orders of convergence, read off a log-log plot in its straightest window.

An error curve bends at both ends: rounding below, higher orders above. A fit over the
straightest window is insensitive to both (the method of ManifoldsBase.jl).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Slope", "best_window_slope", "error_slope"]


@dataclass(frozen=True)
class Slope:
    """A slope and the steps that it was fitted to.

    Args:
        value: exponent ``a`` in ``error ~ step^a``; infinity for an exact curve.
        window: smallest and largest step of the fit, or None without one.
    """

    value: float
    window: tuple[float, float] | None


def best_window_slope(
    steps: Tensor, errors: Tensor, *, floor: float = 0.0, points: int = 6
) -> Slope:
    """Fit ``log error`` against ``log step`` on the straightest run of points.

    Args:
        steps: increasing positive numbers, ``(m,)``.
        errors: errors at these steps, ``(m,)``.
        floor: errors up to here are rounding and are left out.
        points: length of the windows that are tried.

    Returns:
        The slope of the window with the smallest residual. With fewer than ``points``
        errors above the floor the curve counts as exact, with the slope infinity; a
        NaN among the errors gives the slope NaN.

    >>> steps = torch.logspace(-3, 0, 16)
    >>> round(best_window_slope(steps, 2.0 * steps**3).value, 3)
    3.0
    """
    if not bool(torch.isfinite(errors).all()):
        return Slope(math.nan, None)
    kept = errors > floor
    if int(kept.sum()) < points:
        return Slope(math.inf, None)
    x, y = steps[kept].double().log(), errors[kept].double().log()
    x, y = x.unfold(0, points, 1), y.unfold(0, points, 1)
    x = x - x.mean(-1, keepdim=True)
    y = y - y.mean(-1, keepdim=True)
    slopes = (x * y).sum(-1) / x.square().sum(-1)
    best = int((y - slopes.unsqueeze(-1) * x).square().sum(-1).argmin())
    window = steps[kept][best : best + points]
    return Slope(float(slopes[best]), (float(window[0]), float(window[-1])))


def error_slope(
    error: Callable[[float], Tensor], dtype: torch.dtype, *, scale: float = 1.0
) -> Slope:
    """Measure the order at which ``error(t)`` vanishes as ``t`` goes to 0.

    Args:
        error: maps a step to a nonnegative number.
        dtype: the precision that ``error`` computes in; it sets the range of steps
            (1e-3 to 1e-0.5 in float64, 1e-1.5 to 1e-0.25 in float32) and the floor of
            200 eps.
        scale: size of what the error is a difference of.

    Returns:
        The best slope over 24 steps.
    """
    fine = torch.finfo(dtype).eps < 1e-12
    low, high = (-3.0, -0.5) if fine else (-1.5, -0.25)
    steps = torch.logspace(low, high, 24, dtype=torch.float64)
    errors = torch.stack([error(t).detach().double().cpu() for t in steps.tolist()])
    return best_window_slope(
        steps, errors, floor=200.0 * torch.finfo(dtype).eps * scale
    )
