"""Chains of modules, each of which acts only on those after it."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import cast

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

    Returns:
        The certificate.

    Raises:
        ContractionError: a gain points back; not exactly one of epsilon and target; a
            target that cannot be reached.

    >>> chain = hierarchy([2.0, 3.0], 4.0, epsilon=0.3)
    >>> round(chain.value, 6), round(chain.overshoot, 4)
    (1.718975, 3.3333)
    """
    premises = _chain(rates, gains)
    if (epsilon is None) == (target is None):
        raise ContractionError("a hierarchy takes epsilon or target, one of the two")
    if epsilon is None:
        epsilon = _epsilon(premises, float(target or 0.0))
    weights = _powers(require_positive(epsilon, "epsilon"), len(premises.names))
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
        epsilon. The overshoot is its inverse for two modules.

    Raises:
        ContractionError: the target is not below the slowest rate, or there is no
            coupling, so that every epsilon will do.

    >>> round(hierarchy_epsilon([2.0, 3.0], 4.0, target=1.7), 6)
    0.31225
    """
    return _epsilon(_chain(rates, gains), target)


def _epsilon(premises: Premises, target: float) -> float:
    slowest = min(premises.values)
    if not target < slowest:
        raise ContractionError(
            f"a chain cannot reach {target:.6g}: its rate stays below that of its "
            f"slowest module, {slowest:.6g}"
        )
    k = premises.matrix
    if not premises.finite or not k.any():
        raise ContractionError(
            f"no epsilon to choose for the gains {k.tolist()}: they must be finite, "
            "and without couplings any epsilon will do"
        )
    if len(k) == 2:
        one, two = premises.values
        return 2 * math.sqrt((one - target) * (two - target)) / float(k[1, 0])
    low, high = 0.0, 1.0
    while _chain_rate(premises, high) > target:
        low, high = high, 2 * high
    while low == 0.0 or high - low > 1e-13 * high:
        middle = (low + high) / 2
        if _chain_rate(premises, middle) >= target:
            low = middle
        else:
            high = middle
    return low


def _chain_rate(premises: Premises, epsilon: float) -> float:
    return _log_norm_rate(premises, _powers(epsilon, len(premises.names)))


def _powers(epsilon: float, n: int) -> list[float]:
    return [epsilon ** (2 * index) for index in range(n)]


def _log_norm_rate(premises: Premises, weights: Sequence[float]) -> float:
    """Return the rate in the given weights as the eigen-solver has it."""
    root = np.sqrt(np.asarray(weights))
    S = premises.matrix * root[:, None] / root[None, :]
    S = (S + S.T) / 2 - np.diag(premises.values)
    return -float(np.linalg.eigvalsh(S)[-1])


def _chain(rates: Rates, gains: ChainGains) -> Premises:
    names = Premises.of(rates).names
    steps: list[GainLike] = []
    if isinstance(gains, Gain | float | int):
        steps = [gains]
    elif isinstance(gains, Sequence):
        steps = [each for each in gains if isinstance(each, Gain | float | int)]
    if isinstance(gains, Gain | float | int) or steps:
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
