"""Rules of composition across clocks: two time scales, and discrete time."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from riemannian_modules.contraction.certificate import Certificate, Step
from riemannian_modules.contraction.exact import (
    round_down,
    round_up,
    verified_factor,
)
from riemannian_modules.contraction.networks import LOSS, small_gain
from riemannian_modules.contraction.perron import (
    irreducible,
    perron_vector,
    perron_weights,
    usable,
)
from riemannian_modules.contraction.premises import (
    GainLike,
    Gains,
    Premises,
    RateLike,
    as_gain,
    as_rate,
)
from riemannian_modules.contraction.result import Gain, Rate, Side, Verdict, weakest
from riemannian_modules.contraction.rules import require_positive

__all__ = ["discrete", "two_time_scales"]


def two_time_scales(
    slow: RateLike,
    fast: RateLike,
    *,
    gain: GainLike,
    lipschitz: GainLike,
    drift: GainLike,
    mismatch: GainLike = 0.0,
    epsilon: float | None = None,
) -> Certificate:
    """Return a slow module with a fast one: ``x' = f(x, z)``, ``eps z' = g(x, z)``.

    Implements :eq:`two-time-scales`, in the coordinates ``(x, zeta)`` with
    ``zeta = z - z*(x)``, where ``g(x, z*(x)) = 0``. All bounds hold for all x and zeta
    of the region.

    Args:
        slow: rate of ``x' = f(x, z*(x) + zeta)`` for every fixed zeta.
        fast: rate of ``z' = g(x, z)`` for every fixed x, in the fast time.
        gain: of z on x, ``|df/dz|``.
        lipschitz: Lipschitz constant of ``z*``.
        drift: of ``x -> Dz*(x) f(x, z*(x) + zeta)``, for every fixed zeta.
        mismatch: ``|dg/dx + dg/dz Dz*|`` at ``(x, z*(x) + zeta)``. It is zero on
            ``zeta = 0``, and everywhere if g depends on x through zeta only; otherwise
            it is divided by epsilon and decides how fast z can follow.
        epsilon: ratio of the time scales; None: half of the largest one.

    Returns:
        The certificate. Its limit ``largest epsilon`` is where the rate reaches zero;
        it is zero if no epsilon will do, and infinite if every one does.

    Raises:
        ContractionError: epsilon is not positive.

    >>> two = two_time_scales(1.0, 2.0, gain=1.5, lipschitz=0.25, drift=0.5)
    >>> round(two.limits["largest epsilon"], 6), two.contracts
    (1.777778, True)
    """
    l_red, l_z = as_rate(slow), as_rate(fast)
    k_xz, ell, b, e = map(as_gain, (gain, lipschitz, drift, mismatch))
    largest = _largest_epsilon(l_red, l_z, k_xz, ell, b, e)
    if epsilon is None:
        epsilon = largest / 2 if 0 < largest < math.inf else 1.0
    eps = Fraction(require_positive(epsilon, "epsilon"))
    bounded = all(map(math.isfinite, (l_z.value, k_xz.value, ell.value)))
    follows = (
        round_down(
            Fraction(l_z.value) / eps - Fraction(ell.value) * Fraction(k_xz.value)
        )
        if bounded
        else -math.inf
    )
    told = f"{l_z.value:.6g} / {epsilon:.6g} - {ell.value:.6g} * {k_xz.value:.6g}"
    zeta_rate = _derived_rate(follows, l_z, (k_xz, ell), f"fast rate / eps: {told}")
    pulls = (
        round_up(Fraction(b.value) + Fraction(e.value) / eps)
        if math.isfinite(b.value) and math.isfinite(e.value)
        else math.inf
    )
    told = f"drift + mismatch / eps: {b.value:.6g} + {e.value:.6g} / {epsilon:.6g}"
    zeta_gain = _derived_gain(pulls, (b, e), told)
    modules: dict[str, RateLike] = {"x": slow, "zeta": zeta_rate}
    found = small_gain(modules, {("x", "zeta"): k_xz, ("zeta", "x"): zeta_gain})
    reason = Step(
        f"with this gain, drift and movement of z*(x) the two contract for every "
        f"epsilon below {largest:.6g}",
        "Del Vecchio and Slotine 2013",
        {"largest epsilon": largest, "epsilon": epsilon},
    )
    return replace(
        found,
        rule="two time scales",
        steps=(*found.steps, reason),
        assumptions=(
            "zeta = z - z*(x), with g(x, z*(x)) = 0 and z* differentiable",
            "all rates and gains hold for all x and zeta of the region",
            *found.assumptions,
        ),
        limits={**found.limits, "epsilon": epsilon, "largest epsilon": largest},
    )


def _largest_epsilon(
    slow: Rate, fast: Rate, gain: Gain, lipschitz: Gain, drift: Gain, mismatch: Gain
) -> float:
    values = [each.value for each in (slow, fast, gain, lipschitz, drift, mismatch)]
    if not all(map(math.isfinite, values)):
        return 0.0
    l_red, l_z, k, ell, b, e = map(Fraction, values)
    room = l_z * l_red - k * e
    if l_red <= 0 or l_z <= 0 or room <= 0:
        return 0.0
    cost = k * b + ell * k * l_red
    return round_down(room / cost) if cost > 0 else math.inf


def _derived_rate(value: float, rate: Rate, gains: Sequence[Gain], how: str) -> Rate:
    safe = rate.side in {Side.EXACT, Side.LOWER} and all(map(_safe, gains))
    return Rate(
        value,
        kind="derived",
        metric=rate.metric,
        where=rate.where,
        side=Side.LOWER if safe else Side.ESTIMATE,
        verdict=_verdict([rate, *gains]),
        source=how,
    )


def _derived_gain(value: float, gains: Sequence[Gain], how: str) -> Gain:
    return Gain(
        value,
        where=" and ".join(dict.fromkeys(each.where for each in gains)),
        side=Side.UPPER if all(map(_safe, gains)) else Side.ESTIMATE,
        verdict=_verdict(gains),
        source=how,
    )


def _safe(gain: Gain) -> bool:
    return gain.side in {Side.EXACT, Side.UPPER}


def _verdict(premises: Sequence[Rate | Gain]) -> Verdict:
    return weakest(each.verdict for each in premises)


def discrete(
    factors: Mapping[str, GainLike | Certificate] | Sequence[GainLike | Certificate],
    gains: Gains | None = None,
    *,
    slack: float | None = None,
) -> Certificate:
    """Return maps that act on each other: ``x_i <- f_i(x_1, ..., x_n)``.

    Implements :eq:`composed-factor`. All modules take their steps at once.

    Args:
        factors: Lipschitz constants ``q_i`` of the modules in their own states, each
            in its own constant metric.
        gains: as in :func:`small_gain`, Lipschitz constants in the others' states.
        slack: as there.

    Returns:
        The certificate, in discrete time: ``value`` is the contraction factor, and it
        is certified only below one.

    Raises:
        ContractionError: the gains do not fit the modules.

    >>> pair = discrete([0.5, 0.4], [[0, 0.3], [0.1, 0]])
    >>> round(pair.value, 6)
    0.630278
    """
    premises = Premises.discrete(factors, gains)
    if slack is not None:
        require_positive(slack, "slack")
    N = premises.matrix
    ones = [1.0] * len(N)
    if not premises.finite:
        reason = Step("a factor or a gain is not bounded, so nothing follows")
        return premises.conclude(
            "discrete time", math.inf, ones, [reason], clock="discrete"
        )
    rho = float(np.abs(np.linalg.eigvals(N)).max())
    if slack is None:
        slack = 0.0 if irreducible(N) else _slack(N, rho)
    weights, value = _factor(N, slack)
    if not usable(np.array(weights)):
        weights = ones
    extra = f" after adding {slack:.6g} to every gain" if slack else ""
    reason = Step(
        f"the matrix of factors and gains has the spectral radius {rho:.6g}, and the "
        f"weights are its Perron vectors' u / v{extra}: its norm is {value:.6g}",
        "Russo, di Bernardo and Sontag 2013",
        {"factor": value, "radius": rho, "slack": slack},
    )
    return premises.conclude(
        "discrete time",
        value,
        weights,
        [reason, Step("the number was verified in exact arithmetic and rounded up")],
        ["every module has a constant metric", "all modules step at the same time"],
        clock="discrete",
        limits={"slack": slack, "loss": value - rho} if slack else {},
    )


def _factor(N: NDArray[np.float64], slack: float) -> tuple[list[float], float]:
    """Return the weights and the factor in them."""
    if len(N) == 1:
        return [1.0], float(N[0, 0])
    B = N + slack * (1 - np.eye(len(N)))
    weights = perron_weights(B).tolist()
    x = perron_vector(B)
    if not (usable(np.array(weights)) and usable(x)):
        return weights, math.inf
    return weights, verified_factor(N.tolist(), weights, x.tolist())


def _slack(N: NDArray[np.float64], rho: float) -> float:
    size = float(N.max()) or 1.0
    allowed = LOSS * (abs(1 - rho) or size)
    slack = size
    for _ in range(80):
        if _factor(N, slack)[1] - rho <= allowed:
            break
        slack /= 2
    return slack
