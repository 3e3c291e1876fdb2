"""Where parameters live: geoopt's manifolds, repaired where they need it."""

import geoopt
from geoopt import Euclidean, Sphere

from riemannian_modules.manifolds.birkhoff import BirkhoffPolytope
from riemannian_modules.manifolds.contract import base_of, ensure_contract
from riemannian_modules.manifolds.fixed_rank import FixedRank
from riemannian_modules.manifolds.grassmann import Grassmann
from riemannian_modules.manifolds.log_euclidean import LogEuclideanSPD
from riemannian_modules.manifolds.lorentz import Lorentz
from riemannian_modules.manifolds.metric_manifold import MetricManifold
from riemannian_modules.manifolds.metric_product import MetricProduct
from riemannian_modules.manifolds.oblique import Oblique
from riemannian_modules.manifolds.poincare import PoincareBall
from riemannian_modules.manifolds.positive import Positive
from riemannian_modules.manifolds.product import Product
from riemannian_modules.manifolds.quotient import Quotient
from riemannian_modules.manifolds.reshaped import Reshaped
from riemannian_modules.manifolds.rotations import SpecialOrthogonal
from riemannian_modules.manifolds.scaled import Scaled
from riemannian_modules.manifolds.stiefel import CanonicalStiefel, Stiefel

__all__ = [
    "SPD",
    "BirkhoffPolytope",
    "CanonicalStiefel",
    "Euclidean",
    "FixedRank",
    "Grassmann",
    "LogEuclideanSPD",
    "Lorentz",
    "MetricManifold",
    "MetricProduct",
    "Oblique",
    "PoincareBall",
    "Positive",
    "Product",
    "Quotient",
    "Reshaped",
    "Scaled",
    "SpecialOrthogonal",
    "Sphere",
    "Stiefel",
    "base_of",
    "ensure_contract",
]

SPD = geoopt.SymmetricPositiveDefinite
