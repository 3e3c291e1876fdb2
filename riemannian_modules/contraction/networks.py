"""Rules of composition for any number of modules, from their matrix of gains."""

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from riemannian_modules.contraction.certificate import Certificate, Norm, Step
from riemannian_modules.contraction.exact import round_down
from riemannian_modules.contraction.perron import (
    abscissa,
    irreducible,
    perron_vector,
    perron_weights,
    usable,
)
from riemannian_modules.contraction.premises import Gains, Premises, Rates
from riemannian_modules.contraction.rules import (
    CONSTANT,
    EXACT,
    rate_in_weights,
    require_positive,
)
from riemannian_modules.errors import ContractionError

__all__ = ["shared_loss", "small_gain"]

Array = NDArray[np.float64]
LOSS = 0.01  # of the best rate, where a slack has to be chosen


def small_gain(
    rates: Rates,
    gains: Gains,
    *,
    norm: Norm = "2",
    slack: float | None = None,
) -> Certificate:
    """Modules that act on each other in any way, but not too strongly.

    Implements :eq:`small-gain-rate`. The weights are those of :eq:`perron-weights`,
    with which the bound is the spectral abscissa of the matrix of gains itself: no
    others are better. Where some modules do not act on others, not even through a
    third one, the weights would be zero or infinite; then ``slack`` is added to all
    gains while the weights are chosen, and what that costs is the limit ``loss``.

    Args:
        rates: of the modules.
        gains: matrix ``[target][source]``, or mapping ``{(target, source): gain}``.
        norm: ``"2"``: the metric ``blockdiag(d_i P_i)``; ``"inf"`` and ``"1"``: the
            largest, and the sum, of the weighted norms.
        slack: added to every gain to find the weights; None: nothing where every module
            acts on every other one, else as much as costs a hundredth of the rate.

    Returns:
        The certificate. "Not certified" says only that this test does not decide:
        it knows the sizes of the couplings and not their signs. Cost: eigenvectors of
        an ``n x n`` matrix, and ``n^2`` rational operations.

    Raises:
        ContractionError: the gains do not fit the modules; slack is not positive.

    >>> print(small_gain({"x": 3.0, "y": 4.0}, {("x", "y"): 1.0, ("y", "x"): 2.0}))
    Certificate: rate 2 (lower bound), by the rule 'small gain'
      metric    blockdiag(1.33333 * Euclidean[x], 0.666667 * Euclidean[y])
      region    everywhere
      distance  d(t) <= exp(-2 t) d(0); unweighted 1.41421 * exp(-2 t) (condition number 2)
    Proof
      1. x contracts with the rate 3 (given, lower bound, certified) in the Euclidean metric [given by the caller]
      2. y contracts with the rate 4 (given, lower bound, certified) in the Euclidean metric [given by the caller]
      3. y acts on x with the gain 1 (upper bound, certified) [given by the caller]
      4. x acts on y with the gain 2 (upper bound, certified) [given by the caller]
      5. the matrix of gains has the spectral abscissa -2, and the weights are its Perron vectors' u / v: the rate is 2 [Russo, di Bernardo and Sontag 2013]
      6. the number was verified in exact arithmetic and rounded down
    Assuming
      - the metric of each module is constant or depends on its own state only
    """  # noqa: E501
    premises = Premises.of(rates, gains)
    if slack is not None:
        require_positive(slack, "slack")
    if norm not in ("2", "inf", "1"):
        raise ContractionError(f"norm={norm!r}; choose '2', 'inf' or '1'")
    ones = [1.0] * len(premises.names)
    if not premises.finite:
        unknown = Step("a gain is not bounded, so nothing follows")
        return premises.conclude("small gain", -math.inf, ones, [unknown], norm=norm)
    A = premises.matrix - np.diag(premises.values)
    best = -abscissa(A)
    if slack is None:
        slack = 0.0 if irreducible(A) else _slack(premises, A, norm, best)
    weights = _weights(A, slack, norm)
    value = _rate_in(premises, weights, norm)
    if not usable(np.array(weights)):
        weights = ones
    limits = {"slack": slack, "loss": best - value} if slack else {}
    extra = f" after adding {slack:.6g} to every gain" if slack else ""
    words = {"2": "u / v", "inf": "1 / v", "1": "u"}[norm]
    reason = Step(
        f"the matrix of gains has the spectral abscissa {-best:.6g}, and the weights "
        f"are its Perron vectors' {words}{extra}: the rate is {value:.6g}",
        "Russo, di Bernardo and Sontag 2013",
        {"rate": value, "abscissa": -best, "slack": slack},
    )
    return premises.conclude(
        "small gain",
        value,
        weights,
        [reason, EXACT],
        [CONSTANT],
        norm=norm,
        limits=limits,
    )


@np.errstate(all="ignore")
def _weights(A: Array, slack: float, norm: Norm) -> list[float]:
    if len(A) == 1:
        return [1.0]
    B = A + slack * (1 - np.eye(len(A)))
    if norm == "2":
        return perron_weights(B).tolist()
    return (1 / perron_vector(B) if norm == "inf" else perron_vector(B.T)).tolist()


def _rate_in(premises: Premises, weights: Sequence[float], norm: Norm) -> float:
    """Return the proved rate in the norm with these weights.

    Implements :eq:`max-sum-rate`, exactly and rounded down.
    """
    if norm == "2":
        return rate_in_weights(premises, weights)
    if not usable(np.array(weights)):
        return -math.inf
    k = premises.matrix
    w = [Fraction(each) for each in weights]
    gains = k.tolist() if norm == "inf" else k.T.tolist()
    if norm == "1":
        w = [1 / each for each in w]
    bounds = []
    for i, rate in enumerate(premises.values):
        row = zip(gains[i], w, strict=True)
        bounds.append(
            Fraction(rate) - sum((Fraction(g) / v for g, v in row), Fraction()) * w[i]
        )
    return round_down(min(bounds))


def _slack(premises: Premises, A: Array, norm: Norm, best: float) -> float:
    """Return the largest slack, up to a factor, that costs little."""
    size = float(np.abs(A).max()) or 1.0
    allowed = LOSS * abs(best) or LOSS * size
    slack = size
    for _ in range(80):
        if best - _rate_in(premises, _weights(A, slack, norm), norm) <= allowed:
            break
        slack /= 2
    return slack


def shared_loss(rates: Rates, gains: Gains) -> Certificate:
    """Return modules that all descend one loss, each in its own metric.

    Implements :eq:`shared-loss-rate`. The modules are blocks of parameters; their
    couplings are the off-diagonal blocks of one Hessian, hence symmetric.

    Args:
        rates: smallest eigenvalues of the diagonal blocks of the Hessian, in the
            metrics of the blocks.
        gains: norms of the off-diagonal blocks between these metrics, symmetric.

    Returns:
        The certificate, with weights of one. Its limit ``at most`` is an upper bound
        on the rate if the given rates are exact.

    Raises:
        ContractionError: the gains are not symmetric.

    >>> shared_loss([3.0, 3.0], [[0, 1], [1, 0]]).value
    2.0
    """
    premises = Premises.of(rates, gains)
    k = premises.matrix
    if not np.allclose(k, k.T, rtol=1e-9, atol=0.0, equal_nan=True):
        i, j = np.argwhere(~np.isclose(k, k.T, rtol=1e-9, atol=0.0))[0]
        raise ContractionError(
            f"the gain of '{premises.names[j]}' on '{premises.names[i]}' is "
            f"{k[i, j]:.6g}, back it is {k[j, i]:.6g}; blocks of one Hessian act on "
            "each other with the same gain. For other couplings use small_gain"
        )
    ones = [1.0] * len(k)
    value = rate_in_weights(premises, ones)
    reason = Step(
        "the couplings are blocks of one Hessian, symmetric and never skew; with "
        f"weights of one the rate is {value:.6g}",
        "Simpson-Porco and Bullo 2014; Wensing and Slotine 2020",
        {"rate": value},
    )
    return premises.conclude(
        "shared loss",
        value,
        ones,
        [reason, EXACT],
        [
            "rates and gains come from the Hessian in the product of the metrics, with "
            "the derivatives of a metric by all parameters that it depends on",
            "the region is geodesically convex and no trajectory leaves it",
        ],
        limits={"at most": min(premises.values)},
    )
