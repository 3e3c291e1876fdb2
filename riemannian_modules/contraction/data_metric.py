"""Stability where the metric itself is made of the data."""

import math

from riemannian_modules.contraction.bound import Bound, conclude
from riemannian_modules.contraction.constants import (
    ConstantLike,
    as_count,
    as_lipschitz,
    as_mass,
    as_rate,
    as_sensitivity,
    require,
)
from riemannian_modules.contraction.memory import memory, until
from riemannian_modules.contraction.stability import CONVEX, DIFFERENCE, SAME_START
from riemannian_modules.contraction.verified import over_up, plus_up, times_up

__all__ = ["metric_sampling_bound", "stability_bound_data_metric"]


def stability_bound_data_metric(
    L_G: ConstantLike,
    rate: ConstantLike,
    n: int,
    *,
    kappa: ConstantLike,
    mu: ConstantLike,
    t: float | None = None,
    region: str | None = None,
) -> Bound:
    """Bound the stability of the flow in a metric made of the training data.

    The layer metric ``mu g0 + (1/n) sum K_i^T K_i`` changes with every example, which
    adds the second term. At a minimum it plays no role, since minima do not depend on
    the metric; on the way there it does. Implements :eq:`stability-data-metric`.

    Args:
        L_G: As in :func:`stability_bound`, in the metrics of both data sets, and for
            the gradient of the whole training loss with its regulariser as well.
        rate: Rate in the metric of one data set.
        n: Number of training examples.
        kappa: Supremum of the norm of ``K_i`` in the base metric.
        mu: The mass.
        t: Training time; None: any time.
        region: Where the constants hold, if the caller knows.

    Returns:
        The bound.

    Raises:
        ContractionError: Numbers out of their range.

    Example:
        >>> found = stability_bound_data_metric(2.0, 0.5, 100, kappa=3.0, mu=3.0)
        >>> round(found.value, 6)
        0.4
    """
    slope, speed = as_lipschitz(L_G), as_rate(rate)
    steep, mass = as_sensitivity(kappa), as_mass(mu)
    moved = plus_up(2.0, over_up(times_up(steep.value, steep.value), mass.value))
    pushed = times_up(slope.value, slope.value, moved, memory(speed.value, t))
    return conclude(
        over_up(pushed, as_count(n)),
        f"{DIFFERENCE}, {until(t)}",
        [slope, speed, steep, mass],
        assumptions=[
            CONVEX,
            SAME_START,
            "L_G bounds the gradient of the training loss too, in both metrics",
        ],
        source="stability-bound with the change of the metric as a second perturbation",
        region=region,
    )


def metric_sampling_bound(
    L_G: ConstantLike,
    rate: ConstantLike,
    n: int,
    *,
    kappa: ConstantLike,
    mu: ConstantLike,
    delta: float = 0.05,
    region: str | None = None,
) -> Bound:
    """Bound the distance of the flows in a sampled and in the population's metric.

    Implements :eq:`stability-sampled-metric`: the same loss, but the metric of n
    independent examples instead of its mean.

    Args:
        L_G: Bound on the dual norm of the gradient of the loss, in both metrics.
        rate: Rate of the flow in the population's metric.
        n: Number of examples that the metric is made of.
        kappa: Supremum of the Hilbert-Schmidt norm of ``K_i`` in the base metric
            (``sensitivity(..., norm="frobenius")``).
        mu: The mass.
        delta: Probability with which the bound may fail.
        region: Where the constants hold, if the caller knows.

    Returns:
        The bound on the distance in the population's metric.

    Raises:
        ContractionError: Numbers out of their range.

    Example:
        >>> found = metric_sampling_bound(2.0, 0.5, 100, kappa=3.0, mu=3.0)
        >>> round(found.value, 4)
        4.1373
    """
    slope, speed = as_lipschitz(L_G), as_rate(rate)
    steep, mass = as_sensitivity(kappa), as_mass(mu)
    require(0 < delta < 1, f"delta = {delta}")
    # Room for the logarithm and the roots, of a unit or two in the last place each.
    luck = (1.0 + math.sqrt(-2.0 * math.log(delta))) * (1.0 + 1e-14)
    few = math.sqrt(as_count(n)) * (1.0 - 1e-15)
    apart = times_up(luck, steep.value, steep.value, slope.value)
    return conclude(
        over_up(times_up(apart, memory(speed.value, None)), few, mass.value),
        f"distance of the two flows, with probability {1 - delta:g}",
        [slope, speed, steep, mass],
        assumptions=[
            CONVEX,
            "the examples of the metric are independent of each other and of the loss",
            "the metrics do not depend on the parameters; otherwise the deviation is "
            "bounded at one point and not along the flow",
        ],
        source="bounded differences (McDiarmid) for the deviation of the metric",
        region=region,
    )
