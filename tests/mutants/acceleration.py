"""Accelerations of geodesics with one mistake each, and the case that shows it."""

import torch

from riemannian_modules.manifolds.acceleration import geodesic_acceleration


def euclidean(manifold, x, u):
    """That of the Euclidean metric, on a manifold with another one."""
    return -x @ (u.mT @ u)


def none(manifold, x, u):
    return torch.zeros_like(u)


def right(manifold, x, u):
    return geodesic_acceleration(manifold, x, u)


def half(manifold, x, u):
    return 0.5 * right(manifold, x, u)


def twice(manifold, x, u):
    """The e-connection of probabilities instead of its mean with the m-connection."""
    return 2.0 * right(manifold, x, u)


def tangent(manifold, x, u):
    """Without its normal part, as if it had to be tangent."""
    return manifold.proju(x, right(manifold, x, u))


def drifting(manifold, x, u):
    """With a tangent part that a geodesic of the surrounding metric does not have."""
    return right(manifold, x, u) + u * (u * u).sum() ** 0.5


def flipped(manifold, x, u):
    return -right(manifold, x, u)


ACCELERATIONS = [
    ("Euclidean metric", "CanonicalStiefel, tall", euclidean),
    ("no bend", "Positive", none),
    ("half", "Sphere", half),
    ("e-geodesics", "BirkhoffPolytope", twice),
    ("no normal part", "FixedRank(2)", tangent),
    ("drift", "Stiefel, wide", drifting),
    ("wrong sign", "PoincareBall", flipped),
    ("wrong sign", "Lorentz", flipped),
    ("half", "SPD", half),
    ("twice", "LogEuclideanSPD", twice),
]
