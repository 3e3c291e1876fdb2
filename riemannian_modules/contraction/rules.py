"""Rules of composition for modules side by side and for two in a loop."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from riemannian_modules.contraction.certificate import Certificate, Step
from riemannian_modules.contraction.exact import round_down, verified_rate
from riemannian_modules.contraction.perron import usable, witness
from riemannian_modules.contraction.premises import (
    GainLike,
    Premises,
    Rates,
    as_gain,
    one_metric,
)
from riemannian_modules.errors import ContractionError

__all__ = [
    "feedback",
    "min_max",
    "parallel",
    "product",
    "rate_in_weights",
    "require_positive",
    "skew_feedback",
]

EXACT = Step("the number was verified in exact arithmetic and rounded down")
CONSTANT = "the metric of each module is constant or depends on its own state only"


def rate_in_weights(premises: Premises, weights: Sequence[float]) -> float:
    """Return a proved rate in ``blockdiag(d_i P_i)``, minus infinity if none is finite.

    Args:
        premises: rates and gains.
        weights: ``d_i``.

    Returns:
        The sharpest rate that follows from the gains alone, rounded down; minus
        infinity where doubles do not hold the weights.
    """
    if not premises.finite:
        return -math.inf
    k, root = premises.matrix, np.sqrt(np.asarray(weights, dtype=float))
    if not usable(root):
        return -math.inf
    # In these coordinates the form is symmetric, and its vector has moderate entries
    # even where the weights are far apart.
    with np.errstate(over="ignore", invalid="ignore"):
        scaled = k * root[:, None] / root[None, :]
        form = (scaled + scaled.T) / 2 - np.diag(premises.values)
    if not np.isfinite(form).all():
        return -math.inf
    x = witness(form) / root
    if not usable(x):
        return -math.inf
    return verified_rate(premises.values, k.tolist(), weights, x.tolist())


def require_positive(value: float, what: str) -> float:
    """Return the number if it is positive and finite.

    Args:
        value: a number.
        what: what it is.

    Returns:
        The number.

    Raises:
        ContractionError: it is not.
    """
    if not 0 < value < math.inf:
        raise ContractionError(f"{what} is {value}; it must be positive and finite")
    return float(value)


def parallel(
    rates: Rates, scales: Sequence[float] | Mapping[str, float] | None = None
) -> Certificate:
    """Several vector fields on one state: ``x' = sum_i a_i(t) f_i(x)``.

    Implements :eq:`parallel-rate`.

    Args:
        rates: of the ``f_i``, all in one metric; a number is a rate in the Euclidean
            one.
        scales: ``a_i >= 0``; None: one. For an ``a_i`` that varies in time its least
            value if the rate is positive, its largest if it is negative.

    Returns:
        The certificate, in the common metric.

    Raises:
        ContractionError: the metrics differ; a scale is negative.

    >>> print(parallel([2.0, 3.0], scales=[1.0, 0.5]).value)
    3.5
    """
    premises = Premises.of(rates)
    metric = one_metric(premises.rates)
    if isinstance(scales, Mapping):
        scales = [scales[name] for name in premises.names]
    a = [1.0] * len(premises.names) if scales is None else [float(s) for s in scales]
    if len(a) != len(premises.names) or not all(0 <= each < math.inf for each in a):
        raise ContractionError(
            f"scales {a} for {len(premises.names)} modules: give one number >= 0 each"
        )
    value = -math.inf
    if premises.finite:
        terms = zip(a, premises.values, strict=True)
        value = round_down(
            sum((Fraction(s) * Fraction(r) for s, r in terms), Fraction())
        )
    told = ", ".join(f"{each:.6g}" for each in a)
    reason = Step(
        f"in one metric rates add up, with the scales {told}: {value:.6g}",
        "Slotine 2003",
        {"rate": value},
    )
    like = next(iter(premises.proofs.values()), None)
    return premises.conclude(
        "parallel",
        value,
        [],
        [reason, EXACT],
        [
            "all modules act on the same state",
            "scales that vary in time stay on the safe side of the given ones",
        ],
        like=metric if like is None else like,
    )


def product(rates: Rates) -> Certificate:
    """Modules that do not act on each other.

    Implements :eq:`product-rate`.

    Args:
        rates: of the modules.

    Returns:
        The certificate, with weights of one; it holds for any others too.

    >>> product({"a": 2.0, "b": 0.5}).value
    0.5
    """
    premises = Premises.of(rates)
    value = min(premises.values)
    slowest = premises.names[premises.values.index(value)]
    reason = Step(
        f"without couplings the slowest module decides, {slowest}: {value:.6g}",
        "Slotine 2003",
        {"rate": value},
    )
    ones = [1.0] * len(premises.names)
    return premises.conclude(
        "product", value, ones, [reason], ["no module acts on another one"]
    )


def skew_feedback(rates: Rates, gamma: float = 1.0) -> Certificate:
    """Two modules in negative feedback: ``P1 J12 = -gamma J21^T P2`` everywhere.

    Implements :eq:`skew-feedback-rate`.

    Args:
        rates: of the two modules.
        gamma: how much stronger one direction is than the other.

    Returns:
        The certificate: the slower rate, whatever the size of the coupling.

    Raises:
        ContractionError: not two modules; gamma is not positive.

    >>> skew_feedback([2.0, 3.0]).value
    2.0
    """
    premises = _two(rates)
    weights = [1.0, require_positive(gamma, "gamma")]
    value = min(premises.values)
    reason = Step(
        f"in blockdiag(P1, {gamma:.6g} P2) the couplings cancel, the slower module "
        f"decides: {value:.6g}",
        "Slotine 2003",
        {"rate": value, "gamma": gamma},
    )
    return premises.conclude(
        "negative feedback",
        value,
        weights,
        [reason],
        [f"P1 J12 = -{gamma:.6g} J21^T P2 on the whole region", CONSTANT],
    )


def min_max(rates: Rates) -> Certificate:
    """Descent in one player's variables and ascent in the other's.

    Implements :eq:`min-max-rate`. For ``f(x, y)`` with the flow ``x' = -grad_x f``,
    ``y' = +grad_y f``, gradients in the players' own metrics: the couplings are
    negative feedback.

    Args:
        rates: strong convexity in x and strong concavity in y, in these metrics.

    Returns:
        The certificate.

    Raises:
        ContractionError: not two players.

    >>> min_max({"generator": 0.5, "critic": 2.0}).value
    0.5
    """
    premises = _two(rates)
    value = min(premises.values)
    reason = Step(
        "the mixed second derivatives enter with opposite signs and cancel: "
        f"{value:.6g}",
        "Slotine 2003",
        {"rate": value},
    )
    return premises.conclude(
        "min-max",
        value,
        [1.0, 1.0],
        [reason],
        [
            "each rate holds for every state of the other player",
            "both players follow the gradients of one function, with equal speeds",
            CONSTANT,
        ],
    )


def feedback(
    rates: Rates,
    gain: GainLike,
    gamma: float = 1.0,
) -> Certificate:
    """Two modules in a loop, from the symmetric part of the coupling.

    Implements :eq:`feedback-rate`.

    Args:
        rates: of the two modules.
        gain: ``s >= |P1^(1/2) J12 P2^(-1/2) + gamma P1^(-1/2) J21^T P2^(1/2)|
            / (2 sqrt(gamma))`` on the region: what negative feedback leaves over.
        gamma: weight of the second module.

    Returns:
        The certificate. Its limit ``largest gain`` is the s at which the rate is zero.

    Raises:
        ContractionError: not two modules; gamma is not positive.

    >>> loop = feedback([2.0, 3.0], gain=1.0)
    >>> round(loop.value, 6), round(loop.limits["largest gain"], 6)
    (1.381966, 2.44949)
    """
    given = _two(rates)
    s = as_gain(gain)
    none = as_gain(None)
    premises = Premises(given.names, given.rates, ((none, s), (s, none)), given.proofs)
    gamma = require_positive(gamma, "gamma")
    # In the coordinates of both metrics the quadratic form has weights of one.
    value = rate_in_weights(premises, [1.0, 1.0])
    one, two = premises.values
    margin = math.sqrt(one * two) if min(one, two) > 0 else 0.0
    reason = Step(
        f"the symmetric part of the loop has the gain {s.value:.6g}; the form with "
        f"{one:.6g}, {two:.6g} and this gain has the smallest eigenvalue {value:.6g}",
        "Slotine 2003",
        {"rate": value, "gain": s.value, "gamma": gamma},
    )
    return premises.conclude(
        "feedback",
        value,
        [1.0, gamma],
        [reason, EXACT],
        [CONSTANT],
        limits={"largest gain": margin},
    )


def _two(rates: Rates) -> Premises:
    premises = Premises.of(rates)
    if len(premises.names) != 2:
        raise ContractionError(
            f"a loop of two modules, got {len(premises.names)}: small_gain takes any "
            "number"
        )
    return premises
