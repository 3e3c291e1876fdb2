"""Rules of composition with one mistake each, which the search must find."""

import math
from dataclasses import replace

import numpy as np

from riemannian_modules import contraction
from riemannian_modules.contraction import Certificate, Rate
from riemannian_modules.contraction.perron import perron_weights


def claims(like: Certificate, value: float, weights=None) -> Certificate:
    weights = like.weights if weights is None else dict(zip(like.weights, weights))  # noqa: B905
    verdict = contraction.Verdict.EVIDENCE
    return replace(like, value=value, weights=weights, verdict=verdict)


def adds_too_much(given: dict) -> Certificate:
    """Forgets the scales of a parallel composition."""
    right = contraction.parallel(**given)
    return claims(right, sum(given["rates"]))


def fastest(given: dict) -> Certificate:
    """Lets the fastest module decide."""
    right = contraction.product(**given)
    return claims(right, max(given["rates"]))


def mean_rate(given: dict) -> Certificate:
    """Takes the mean of two rates in negative feedback."""
    right = contraction.skew_feedback(given["rates"], given["gamma"])
    return claims(right, sum(given["rates"]) / 2)


def forgets_gamma(given: dict) -> Certificate:
    """Returns weights of one for asymmetric negative feedback."""
    right = contraction.skew_feedback(given["rates"], given["gamma"])
    return claims(right, right.value, [1.0, 1.0])


def unsquared(given: dict) -> Certificate:
    """Puts epsilon, not its square, into the metric."""
    right = contraction.hierarchy(**given)
    return claims(right, right.value, [1.0, given["epsilon"]])


def free_cascade(given: dict) -> Certificate:
    """Believes that a cascade has the slowest rate in the metric of its modules."""
    right = contraction.hierarchy(**given)
    return claims(right, min(given["rates"]), [1.0] * len(given["rates"]))


def half_gain(given: dict) -> Certificate:
    """Halves the gain of a loop a second time."""
    return contraction.feedback(given["rates"], given["s"] / 2, given["gamma"])


def swapped(given: dict) -> Certificate:
    """Weighs with v / u instead of u / v."""
    right = contraction.small_gain(**given)
    A = np.asarray(given["gains"]) - np.diag(given["rates"])
    return claims(right, right.value, (1 / perron_weights(A)).tolist())


def rooted(given: dict) -> Certificate:
    """Weighs with the square roots of u / v."""
    right = contraction.small_gain(**given)
    roots = [math.sqrt(weight) for weight in right.weights.values()]
    return claims(right, right.value, roots)


def skewed(given: dict) -> Certificate:
    """Takes the couplings of one loss for negative feedback."""
    right = contraction.shared_loss(**given)
    return claims(right, min(given["rates"]))


def ignores_slack(given: dict) -> Certificate:
    """Returns the abscissa of a reducible matrix, with the weights of a slack."""
    right = contraction.small_gain(**given)
    return claims(right, right.value + right.limits["loss"])


def still_manifold(given: dict) -> Certificate:
    """Forgets that the slow manifold moves."""
    return contraction.two_time_scales(**(given | {"lipschitz": 0.0}))


def follows_at_once(given: dict) -> Certificate:
    """Forgets that g away from the slow manifold may depend on x."""
    return contraction.two_time_scales(**(given | {"mismatch": 0.0}))


def unscaled_mismatch(given: dict) -> Certificate:
    """Does not divide the mismatch by epsilon."""
    both = given["drift"] + given["mismatch"]
    return contraction.two_time_scales(**(given | {"drift": both, "mismatch": 0.0}))


def largest_factor(given: dict) -> Certificate:
    """Takes the largest factor of the maps for that of all."""
    return claims(contraction.discrete(**given), max(given["factors"]))


def unweighted(given: dict) -> Certificate:
    """Returns the spectral radius without the metric that has it as a norm."""
    right = contraction.discrete(**given)
    return claims(right, right.value, [1.0] * 3)


MUTANTS = {
    "parallel": [adds_too_much],
    "product": [fastest],
    "hierarchy": [unsquared, free_cascade],
    "long hierarchy": [free_cascade],
    "skew feedback": [mean_rate, forgets_gamma],
    "min-max": [mean_rate],
    "feedback": [half_gain],
    "small gain": [swapped, rooted],
    "reducible": [ignores_slack],
    "shared loss": [skewed],
    "two time scales": [still_manifold, follows_at_once, unscaled_mismatch],
    "discrete": [largest_factor, unweighted],
}


def parallel_in_any_metric(rates: list[Rate]) -> float:
    """Adds rates up without looking at their metrics."""
    return sum(rate.value for rate in rates)
