"""Where parameters live: geoopt's manifolds, repaired where they need it."""

import geoopt
from geoopt import Euclidean, PoincareBall, Sphere

from riemannian_modules.manifolds.contract import base_of, ensure_contract
from riemannian_modules.manifolds.metric_manifold import MetricManifold
from riemannian_modules.manifolds.stiefel import CanonicalStiefel, Stiefel

__all__ = [
    "SPD",
    "CanonicalStiefel",
    "Euclidean",
    "MetricManifold",
    "PoincareBall",
    "Sphere",
    "Stiefel",
    "base_of",
    "ensure_contract",
]

SPD = geoopt.SymmetricPositiveDefinite
