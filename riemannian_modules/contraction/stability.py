"""How much a trained model depends on one of its examples: uniform stability.

Two data sets differ in one of n examples; both are trained from the same start. How far
apart do the two models end, and by how much do their losses differ? Every function
returns a :class:`Bound` with its constants, and constants that are not certified never
make a certified bound. Values are rounded up, so that they are true in floating point.
"""

import math
from fractions import Fraction

from riemannian_modules.contraction.bound import Bound, conclude
from riemannian_modules.contraction.constants import (
    EVERYWHERE,
    Constant,
    ConstantLike,
    as_constant,
    as_count,
    as_lipschitz,
    as_rate,
    as_size,
    require,
)
from riemannian_modules.contraction.exact import round_up
from riemannian_modules.contraction.memory import (
    decay,
    geometric,
    memory,
    until,
)
from riemannian_modules.contraction.result import Side, weakest
from riemannian_modules.contraction.verified import over_up, plus_up, times_up
from riemannian_modules.errors import ContractionError

__all__ = [
    "CONVEX",
    "DIFFERENCE",
    "SAME_START",
    "distance_bound",
    "stability_bound",
    "stability_bound_discrete",
    "step_factor",
]

SAME_START = "both runs start at the same point and the loss is a mean over n examples"
CONVEX = (
    "a geodesically convex region that contains both trajectories, on which the "
    "constants hold, all of them in the same metric"
)
_FIXED = "a metric that does not depend on the data (it may depend on the parameters)"
DIFFERENCE = "difference of the losses of one example after one of n was replaced"


def distance_bound(
    perturbation: ConstantLike,
    rate: ConstantLike,
    t: float | None = None,
    *,
    start: float = 0.0,
    region: str | None = None,
) -> Bound:
    """Bound the distance of two flows, one of which contracts.

    Implements :eq:`stability-distance`. A rate of any sign is allowed; the formula is
    accurate near zero.

    Args:
        perturbation: Supremum of the distance of the two velocities, in the metric.
        rate: Rate at which one of the two flows contracts, in this metric.
        t: Time; None: any time, also in the limit.
        start: Distance at time zero.
        region: Where the constants hold, if the caller knows; see :func:`conclude`.

    Returns:
        The bound on the distance in the metric; infinite if nothing is bounded.

    Raises:
        ContractionError: A negative time, distance or perturbation.

    Example:
        >>> distance_bound(1.0, 0.5).value
        2.0
        >>> distance_bound(1.0, 0.0, t=3.0).value
        3.0
    """
    force = as_size(perturbation, "e", "perturbation of the flow")
    speed = as_rate(rate)
    require(start >= 0, f"the distance at the start is {start}")
    require(t is None or t >= 0, f"a time of {t}")
    kept = times_up(start, decay(speed.value, t))
    return conclude(
        plus_up(kept, times_up(force.value, memory(speed.value, t))),
        f"distance of two flows {until(t)}",
        [force, speed],
        assumptions=[CONVEX, _FIXED],
        source="first variation of length and Gronwall's lemma",
        region=region,
    )


def stability_bound(
    L_G: ConstantLike,
    rate: ConstantLike,
    n: int,
    t: float | None = None,
    *,
    lr: float | None = None,
    steps: int | None = None,
    smoothness: ConstantLike | None = None,
    batch_size: int | None = None,
    region: str | None = None,
) -> Bound:
    """Bound the replace-one uniform stability of training in a fixed metric.

    Implements :eq:`stability-bound` for the gradient flow. With a step length it is
    :func:`stability_bound_discrete` with the factor of :func:`step_factor`.

    Args:
        L_G: Lipschitz constant of the loss of a single example in the metric,
            supremum of its dual norm ``|dl|`` over parameters and examples. The
            regulariser of the training loss does not count.
        rate: Rate at which the training flow contracts in the metric, of any sign.
        n: Number of training examples.
        t: Training time; None: any time, also in the limit.
        lr: Step length of gradient descent; None: the flow.
        steps: Number of steps; None: any number.
        smoothness: Largest eigenvalue of the Hessian in the metric; needed with
            ``lr``. With ``batch_size`` rate and smoothness are those of the losses
            of single minibatches.
        batch_size: Examples in a minibatch of SGD; None: all n in every step.
        region: Where the constants hold, if the caller knows.

    Returns:
        The bound on ``|loss(w_S, z) - loss(w_S', z)|`` for every example z.

    Raises:
        ContractionError: ``lr`` without ``smoothness``, ``t`` with ``lr``, or numbers
            out of their range.

    Example:
        >>> round(stability_bound(2.0, 0.5, 100).value, 6)
        0.16
        >>> round(stability_bound(2.0, 0.0, 100, t=10.0).value, 6)
        0.8
    """
    if lr is not None:
        if t is not None or smoothness is None:
            raise ContractionError(
                "gradient descent with lr needs smoothness= (the largest eigenvalue of "
                "the Hessian in the metric) and steps= instead of t="
            )
        factor = step_factor(rate, smoothness, lr)
        return stability_bound_discrete(
            L_G, factor, n, lr, steps, batch_size=batch_size, region=region
        )
    if steps is not None or batch_size is not None or smoothness is not None:
        raise ContractionError(
            "steps, batch_size and smoothness belong to gradient descent: give lr="
        )
    slope, speed = as_lipschitz(L_G), as_rate(rate)
    pushed = times_up(2.0, slope.value, slope.value, memory(speed.value, t))
    return conclude(
        over_up(pushed, as_count(n)),
        f"{DIFFERENCE}, {until(t)}",
        [slope, speed],
        assumptions=[CONVEX, _FIXED, SAME_START],
        source="contraction of the flow in the metric, first variation of length",
        region=region,
    )


def step_factor(rate: ConstantLike, smoothness: ConstantLike, lr: float) -> Constant:
    """Bound how much one gradient step stretches distances in a constant metric.

    Implements :eq:`stability-step-factor`. It is attained by quadratic functions.

    Args:
        rate: Smallest eigenvalue of the Hessian in the metric, over the region.
        smoothness: Largest one.
        lr: Step length.

    Returns:
        The factor q; smaller than one if the step contracts.

    Raises:
        ContractionError: A step length that is not positive, or a largest eigenvalue
            below the smallest.

    Example:
        >>> step_factor(0.5, 2.0, lr=0.5).value
        0.75
    """
    require(lr > 0, f"a step length of {lr}")
    low, high = as_rate(rate), as_constant(smoothness, "Lambda", "smoothness", "upper")
    require(
        high.value >= low.value,
        f"smoothness {high.value} below the rate {low.value}",
    )
    value = math.inf
    if all(map(math.isfinite, (lr, low.value, high.value))):
        ends = [1 - Fraction(lr) * Fraction(each.value) for each in (low, high)]
        value = round_up(max(map(abs, ends)))
    local = [c.where for c in (low, high) if c.where != EVERYWHERE]
    safe = low.is_safe and high.is_safe
    return Constant(
        "q",
        value,
        f"factor of one step of length {lr:.4g} in a constant metric",
        Side.UPPER if safe else Side.ESTIMATE,
        weakest([low.verdict, high.verdict]),
        local[0] if local else EVERYWHERE,
        f"lambda: {low.source}; Lambda: {high.source}",
    )


def stability_bound_discrete(
    L_G: ConstantLike,
    factor: ConstantLike,
    n: int,
    lr: float,
    steps: int | None = None,
    *,
    batch_size: int | None = None,
    region: str | None = None,
) -> Bound:
    """Bound the replace-one stability of gradient descent or of SGD.

    Implements :eq:`stability-discrete`. The step length cancels where the factor is
    ``1 - lr * rate``: gradient descent is then as stable as the flow. A minibatch of b
    of n examples holds the replaced one with probability b / n and then feels it
    n / b times as much, so SGD has the same bound on average, if every minibatch step
    contracts by the factor.

    Args:
        L_G: See :func:`stability_bound`.
        factor: Lipschitz constant q of one step in the metric; see
            :func:`step_factor`. 1 and more are allowed.
        n: Number of training examples.
        lr: Step length, positive.
        steps: Number of steps; None: any number.
        batch_size: Examples in a minibatch of SGD; None: all n in every step.
        region: Where the constants hold, if the caller knows.

    Returns:
        The bound; with minibatches one on the average over their choice.

    Raises:
        ContractionError: Numbers out of their range.

    Example:
        >>> round(stability_bound_discrete(2.0, 0.95, 100, lr=0.1).value, 6)
        0.16
    """
    slope = as_lipschitz(L_G)
    q = as_size(factor, "q", "factor of one step")
    require(lr > 0, f"a step length of {lr}")
    require(
        batch_size is None or (1 <= batch_size <= n and batch_size % 1 == 0),
        f"minibatches of {batch_size} of {n}",
    )
    grown = geometric(q.value, steps)
    pushed = times_up(2.0, lr, slope.value, slope.value, grown)
    assumptions = [CONVEX, "a constant metric", SAME_START]
    average = None
    if batch_size is not None:
        average = "the choice of minibatches"
        assumptions.append("every minibatch step has this factor")
        assumptions.append("each example is in a minibatch with the same probability")
    when = "after any number of steps" if steps is None else f"after {steps} steps"
    return conclude(
        over_up(pushed, as_count(n)),
        f"{DIFFERENCE}, {when}",
        [slope, q],
        assumptions=assumptions,
        source="one-step perturbation and a geometric series",
        region=region,
        average=average,
    )
