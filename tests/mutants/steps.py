"""Steps with one mistake each: what replaces which function of ``proposal``."""

from dataclasses import replace

import torch

from riemannian_modules.optim import motion, proposal


def off_centre(numbers, spring):
    """Damps towards no step at all instead of a part of the last one."""
    return motion.best_pair(numbers, 0.0)


def apart(numbers, spring):
    """Takes the two directions for orthogonal."""
    damped = numbers.damped.diagonal()
    right = -numbers.slopes
    if len(right) > 1:
        right = right + spring * numbers.weight[:, 1]
    return right / damped


def undamped(numbers, spring):
    """Forgets the mass."""
    return motion.best_pair(replace(numbers, weight=0.0 * numbers.weight), spring)


def linear(slope, curvature, gap):
    """Goes on until the tangent, not the model, has reached the floor."""
    return motion.credible_share(slope, 0.0 * curvature, gap)


def far_root(slope, curvature, gap):
    """Takes the second point where the model passes the floor."""
    inside = (slope.square() - 2.0 * gap * curvature).clamp_min(0.0).sqrt()
    return torch.clamp((inside - slope) / curvature, max=1.0)


def squared(bound, length):
    """Compares the bound with the square of the length."""
    return motion.within(bound, length.square())


def unbounded(bound, length):
    """Does not shorten."""
    return torch.ones_like(length)


def unshifted(metric, plans, shift):
    """Solves as if the last step were not taken again."""
    return proposal._solve(metric, plans, None)


def backward(metric, plans, shift):
    """Shifts the residual the wrong way."""
    return proposal._solve(metric, plans, None if shift is None else -shift)


MUTANTS = {
    "off-centre": ("best_pair", off_centre),
    "apart": ("best_pair", apart),
    "undamped": ("best_pair", undamped),
    "linear": ("credible_share", linear),
    "far-root": ("credible_share", far_root),
    "squared": ("within", squared),
    "unbounded": ("within", unbounded),
    "unshifted": ("_solve", unshifted),
    "backward": ("_solve", backward),
}
