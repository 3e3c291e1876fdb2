"""From stability to generalisation, and the order that the paper's abstract names."""

import math
from typing import Literal

from riemannian_modules.contraction.bound import Bound, Order
from riemannian_modules.contraction.constants import as_count, require
from riemannian_modules.contraction.verified import plus_up, times_up
from riemannian_modules.errors import ContractionError

__all__ = ["generalization_gap", "paper_order"]

Change = Literal["replace one", "leave one out"]


def generalization_gap(
    beta: Bound | float,
    n: int | None = None,
    *,
    loss_bound: float | None = None,
    delta: float | None = None,
    change: Change = "replace one",
) -> Bound:
    """Bound the gap between the loss on new examples and on the training examples.

    Implements :eq:`generalization-gap` :cite:p:`bousquet2002`. Without ``delta`` it
    bounds the gap on average over training sets, by ``beta`` itself.

    Args:
        beta: Uniform stability, as a bound or as a number.
        n: Number of training examples; needed with ``delta``.
        loss_bound: Largest value M of the loss, whose least value is 0; needed with
            ``delta``, and makes a gap of M or more known to be vacuous.
        delta: Probability with which the bound may fail; None: on average.
        change: What ``beta`` was found for: "replace one" example (as by
            :func:`stability_bound`) or "leave one out", which costs a factor of 2.

    Returns:
        The bound on the gap.

    Raises:
        ContractionError: Numbers are missing or out of range, or ``beta`` holds only on
            average and a probability is asked for.

    Example:
        >>> round(generalization_gap(0.16, 100, loss_bound=1.0, delta=0.05).value, 4)
        4.1988
    """
    given = beta if isinstance(beta, Bound) else None
    if given is None:
        # Checked by the constructor.
        given = Bound(float(beta), "uniform stability")  # type: ignore[arg-type]
    if change not in ("replace one", "leave one out"):
        raise ContractionError(f"change={change!r}; 'replace one' or 'leave one out'")
    require(loss_bound is None or loss_bound >= 0, f"loss_bound = {loss_bound}")
    share = 1.0 if change == "replace one" else 2.0
    value, what, average = (
        times_up(share, given.value),
        "generalisation gap",
        given.average,
    )
    assumptions = [*given.assumptions, f"stability in the sense of '{change}'"]
    if delta is None:
        parts = ["training sets", *([] if average is None else [average])]
        average = " and ".join(parts)
    else:
        if n is None or loss_bound is None:
            raise ContractionError("with delta= give n= and loss_bound= as well")
        if average is not None:
            raise ContractionError(
                f"the stability holds on average over {average} only, so it says "
                "nothing about single training sets; leave delta out"
            )
        require(0 < delta < 1, f"delta = {delta}")
        # Room for the logarithm and the root, of a unit or two in the last place each.
        spread = math.sqrt(-math.log(delta) / (2.0 * as_count(n))) * (1.0 + 1e-14)
        most = plus_up(times_up(2.0, share, n, given.value), loss_bound)
        value = plus_up(value, times_up(most, spread))
        what += f" with probability {1 - delta:g}"
        assumptions.append(f"losses lie between 0 and {loss_bound:.4g}")
    assumptions.append("the examples are independent and of one distribution")
    return Bound(
        value,
        what,
        given.verdict,
        given.side,
        given.constants,
        tuple(assumptions),
        f"Bousquet & Elisseeff (2002), with beta from: {given.source}",
        average,
        loss_bound,
    )


def paper_order(kappa: float, L: float, xi: float, mu: float, n: int) -> Order:
    """Return ``kappa^2 L / (xi mu sqrt(n))``, the order in the abstract of the paper.

    Implements :eq:`stability-order` of :cite:t:`pehle2026`. The abstract states neither
    its constants nor which norms and which n are meant. The bounds of this module show
    the same pattern (:func:`metric_sampling_bound` with ``L = L_G`` and ``xi`` the
    rate), but this number is no bound and never a guarantee.

    Args:
        kappa: A Lipschitz constant of the model.
        L: A Lipschitz constant of the loss.
        xi: A rate or inverse condition number.
        mu: The scale of the mass.
        n: Number of examples.

    Returns:
        The order, which prints what it is.

    Raises:
        ContractionError: Numbers that are not positive.

    Example:
        >>> paper_order(3.0, 2.0, 0.5, 3.0, 100).value
        1.2
    """
    for name, number in (("kappa", kappa), ("L", L), ("xi", xi), ("mu", mu)):
        require(number > 0, f"{name} = {number}")
    value = kappa**2 * L / (xi * mu * math.sqrt(as_count(n)))
    source = "read off the paper's abstract, constants unknown, reading unconfirmed"
    return Order(value, "kappa^2 L / (xi mu sqrt(n))", source)
