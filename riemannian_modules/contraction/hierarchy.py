"""Chains of modules, each of which acts only on those after it."""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, cast

import numpy as np

from riemannian_modules.contraction.certificate import Certificate, Step
from riemannian_modules.contraction.premises import GainLike, Gains, Premises, Rates
from riemannian_modules.contraction.result import Gain
from riemannian_modules.contraction.rules import (
    CONSTANT,
    EXACT,
    rate_in_weights,
    require_positive,
)
from riemannian_modules.errors import ContractionError

__all__ = ["hierarchy", "hierarchy_epsilon"]

_LARGEST = 700.0
ChainGains = Gains | Sequence[GainLike] | GainLike


def hierarchy(
    rates: Rates,
    gains: ChainGains,
    *,
    epsilon: float | None = None,
    target: float | None = None,
) -> Certificate:
    """Return a chain: every module acts only on those after it.

    Implements :eq:`hierarchy-rate`, and its extension to more than two modules with
    the metric ``blockdiag(P1, eps^2 P2, eps^4 P3, ...)``.

    Args:
        rates: of the modules, first to last.
        gains: of each module on the next one: a number for two modules, a sequence for
            more; or a matrix ``[target][source]`` or mapping ``{(target, source):
            gain}`` with entries only from earlier to later modules.
        epsilon: weight of every module against the one before it. Small: close to
            the slowest rate, and a large overshoot.
        target: instead of epsilon, the rate wanted; see :func:`hierarchy_epsilon`.
            Without couplings epsilon is one.

    Returns:
        The certificate.

    Raises:
        ContractionError: a gain points back; not exactly one of epsilon and target; a
            target that cannot be reached; weights beyond what doubles hold.

    >>> chain = hierarchy([2.0, 3.0], 4.0, epsilon=0.3)
    >>> round(chain.value, 6), round(chain.overshoot, 4)
    (1.718975, 3.3333)
    """
    premises = _chain(rates, gains)
    if (epsilon is None) == (target is None):
        raise ContractionError("a hierarchy takes epsilon or target, one of the two")
    if epsilon is None:
        epsilon = _epsilon(premises, float(target or 0.0), uncoupled=1.0)
    weights = _powers(require_positive(float(epsilon), "epsilon"), len(premises.names))
    value = rate_in_weights(premises, weights)
    reason = Step(
        f"scaled by powers of epsilon = {epsilon:.6g} the couplings forward are small: "
        f"the rate is {value:.6g}, and tends to the slowest rate, "
        f"{min(premises.values):.6g}, with epsilon",
        "Slotine 2003",
        {"rate": value, "epsilon": epsilon},
    )
    return premises.conclude(
        "hierarchy",
        value,
        weights,
        [reason, EXACT],
        ["no module acts on an earlier one", CONSTANT],
        limits={"epsilon": epsilon, "supremum": min(premises.values)},
    )


def hierarchy_epsilon(rates: Rates, gains: ChainGains, target: float) -> float:
    """Return the largest epsilon with which a chain has the rate ``target``.

    Implements :eq:`hierarchy-epsilon`; for more than two modules it is found by
    bisection.

    Args:
        rates: as in :func:`hierarchy`.
        gains: as there.
        target: a rate below the slowest one.

    Returns:
        epsilon, at most as large as doubles hold the weights. The overshoot is its
        inverse for two modules.

    Raises:
        ContractionError: the target is not below the slowest rate, or there is no
            coupling, so that every epsilon will do.

    >>> round(hierarchy_epsilon([2.0, 3.0], 4.0, target=1.7), 6)
    0.31225
    """
    return _epsilon(_chain(rates, gains), target)


def _epsilon(
    premises: Premises, target: float, uncoupled: float | None = None
) -> float:
    slowest = min(premises.values)
    if not target < slowest:
        raise ContractionError(
            f"a chain cannot reach {target:.6g}: its rate stays below that of its "
            f"slowest module, {slowest:.6g}"
        )
    k = premises.matrix
    if not k.any() and uncoupled is not None:
        return uncoupled
    if not premises.finite or not k.any():
        raise ContractionError(
            f"no epsilon to choose for the gains {k.tolist()}: they must be finite, "
            "and without couplings any epsilon will do"
        )
    # Weights must be doubles; a smaller epsilon has a larger rate.
    top = math.exp(0.99 * _LARGEST / (2 * (len(k) - 1)))
    return _verified(premises, target, min(_proposed(premises, target), top))


def _verified(premises: Premises, target: float, epsilon: float) -> float:
    """Return an epsilon with which the target is proved, some ulps below at most."""
    n, step = len(premises.names), 2.0**-53
    least = math.exp(-_LARGEST / (2 * (n - 1)))
    found = epsilon
    while least < found and step < 1e-6:
        if rate_in_weights(premises, _powers(found, n)) >= target:
            return found
        found, step = epsilon * (1 - step), 2 * step
    return epsilon


def _proposed(premises: Premises, target: float) -> float:
    """Return the largest epsilon, to rounding."""
    k = premises.matrix
    if len(k) == 2:
        one, two = premises.values
        return 2 * math.sqrt((one - target) * (two - target)) / float(k[1, 0])
    # Bisection for log(epsilon), whose powers do not leave the range of doubles.
    low, high = -1.0, 1.0
    while _chain_rate(premises, low) < target:
        low *= 2.0
    while _chain_rate(premises, high) >= target:
        high *= 2.0
    while high - low > 1e-13 * max(1.0, abs(low)):
        middle = (low + high) / 2
        if _chain_rate(premises, middle) >= target:
            low = middle
        else:
            high = middle
    return math.exp(min(low, _LARGEST))


def _powers(epsilon: float, n: int) -> list[float]:
    """Return ``eps^0, eps^2, ...``.

    Raises:
        ContractionError: doubles do not hold them.
    """
    if abs(2 * (n - 1) * math.log(epsilon)) > _LARGEST:
        power = (n - 1) * math.log10(epsilon)
        raise ContractionError(
            f"with epsilon = {epsilon:.6g} the weights of {n} modules in a chain span "
            f"powers of ten up to {2 * power:.4g}, more than doubles hold, for an "
            f"overshoot of 10^{abs(power):.4g}: give a lower target or an epsilon "
            "nearer to one, or make fewer modules of the chain"
        )
    return [epsilon ** (2 * index) for index in range(n)]


def _chain_rate(premises: Premises, log_epsilon: float) -> float:
    """Return the rate as the eigen-solver has it."""
    each = np.arange(len(premises.names))
    with np.errstate(divide="ignore", over="ignore"):
        powers = (each[:, None] - each[None, :]) * log_epsilon
        S = np.exp(np.log(premises.matrix) + powers)
    if not np.isfinite(S).all():
        return -math.inf
    S = (S + S.T) / 2 - np.diag(premises.values)
    return -float(np.linalg.eigvalsh(S)[-1])


def _chain(rates: Rates, gains: ChainGains) -> Premises:
    names = Premises.of(rates).names
    steps = _steps(gains)
    if steps:
        if len(steps) != len(names) - 1:
            raise ContractionError(
                f"a chain of {len(names)} modules has {len(names) - 1} couplings from "
                f"each to the next; got {len(steps)} gains"
            )
        couplings = zip(pairwise(names), steps, strict=True)
        gains = {(after, before): gain for (before, after), gain in couplings}
    premises = Premises.of(rates, cast("Gains", gains))
    back = np.argwhere(np.triu(premises.matrix, 1) != 0)
    if len(back):
        target, source = back[0]
        raise ContractionError(
            f"'{names[source]}' acts back on '{names[target]}', so this is no chain; "
            "use small_gain or feedback, or give the modules in order"
        )
    return premises


def _steps(gains: ChainGains) -> list[GainLike]:
    """Return the gains from each module to the next, if they are given so."""
    if isinstance(gains, Mapping):
        return []
    if _is_number(gains):
        return [_number(gains)]
    return [_number(each) for each in cast("Sequence[Any]", gains) if _is_number(each)]


def _is_number(gain: Any) -> bool:
    return isinstance(gain, Gain) or np.ndim(gain) == 0


def _number(gain: Any) -> GainLike:
    return gain if isinstance(gain, Gain) else float(gain)
