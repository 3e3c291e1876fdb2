"""What geoopt 0.5.1 is known to get wrong, law by law.

Names of the findings of ``check_geoopt_manifold`` with the reason. Everything in here
must fail: a defect that is mended upstream is to be taken off this list.
"""

import geoopt
from geoopt.manifolds.siegel.siegel import SiegelManifold

import riemannian_modules as rm

Failures = dict[str, str]

CLAMPED = {"dist_zero": "acos is clamped: every point is 4e-4 away from itself"}
KEEPDIM = {
    "inner_shape": "without keepdim the factors of all points meet the products of all"
}
UNTAGGED_ORIGIN = {"origin_carries_the_manifold": "origin returns a plain tensor"}
UNTAGGED = {
    **UNTAGGED_ORIGIN,
    "random_carries_the_manifold": "random returns a plain tensor",
}
SCALAR = {"rejects": "a tensor without dimensions raises IndexError"}
TWICE = "the speed in the directions x A is doubled"
WRONG_SLOPE = ("directional_derivative", "gradient_slope", "descent_slope")


def because(reason: str, *laws: str) -> Failures:
    return dict.fromkeys(laws, reason)


CANONICAL = because(
    TWICE,
    "retraction_derivative",
    "expmap_derivative",
    "expmap_geodesic",
    "projection_idempotent",
    "projection_complete",
    *WRONG_SLOPE,
)
BIRKHOFF = {
    **because("egrad2rgrad is off by the size of the matrix", "riesz", *WRONG_SLOPE),
    **because(
        "proju is not idempotent",
        "projection_idempotent",
        "projection_complete",
        "transp_tangent",
        "transp_identity",
        "transp_continuous",
        "retr_transp_tangent",
        "expmap_transp_tangent",
    ),
}
SINKHORN = (
    "riesz_tangent",
    "riesz_normal",
    "projection_tangent",
    "retraction_derivative",
    "point_on_manifold",
    "projx_idempotent",
    "random_on_manifold",
    "expmap_derivative",
    "expmap_geodesic",
    "retraction_zero",
    "retraction_on_manifold",
    "batch_retr",
    "batch_expmap",
    "batch_transp_follow_retr",
    "batch_transp_follow_expmap",
)
SIEGEL = {
    **because(
        "proju is egrad2rgrad",
        "projection_idempotent",
        "projection_complete",
        "transp_tangent",
        "retr_transp_tangent",
    ),
    **because("inner ignores keepdim", "inner_keepdim", "component_inner"),
}
BOUNDED = {
    **SIEGEL,
    **because("egrad2rgrad is no Riesz map", "riesz", "riesz_normal", *WRONG_SLOPE),
    **UNTAGGED_ORIGIN,
}
UPPER = {
    **SIEGEL,
    **because(
        "torch.eye is given three sizes",
        "origin_points",
        "origin_carries_the_manifold",
        "origin_deterministic",
    ),
}
SCALED = {
    **because(
        "steps are divided by the scale, inner is not",
        "retraction_derivative",
        "expmap_derivative",
        *WRONG_SLOPE,
    ),
    **UNTAGGED_ORIGIN,
    **CLAMPED,
    "copies": "a copy loses the methods that are made for every instance",
}
LORENTZ = {
    "riesz_pure": "egrad2rgrad writes into its argument",
    "retraction_zero": "norms are clamped at 1e-8",
    "norm": "norm takes no point",
}
OTHER_DISTANCE = because(
    "only dist changes with the metric", "distance", "logmap_length"
)
PRODUCT = {
    **SCALAR,
    **because(
        "a size is passed on as one tuple",
        "origin_points",
        "origin_carries_the_manifold",
        "origin_deterministic",
    ),
}


def defects(name: str, manifold: geoopt.Manifold) -> Failures:
    """The failures of one of ``manifold_cases.GEOOPT``, by its name there."""
    match manifold:
        case geoopt.CanonicalStiefel():
            return CANONICAL
        case geoopt.Scaled():
            return SCALED
        case geoopt.Sphere():
            return CLAMPED
        case geoopt.BirkhoffPolytope():
            return BIRKHOFF
        case geoopt.SymmetricPositiveDefinite():
            other = OTHER_DISTANCE if "(" in name else {}
            return UNTAGGED_ORIGIN | other
        case geoopt.BoundedDomain():
            return BOUNDED
        case geoopt.UpperHalf():
            return UPPER
        case SiegelManifold():
            return SIEGEL
        case geoopt.StereographicProductManifold():
            return SCALAR
        case geoopt.ProductManifold():
            return PRODUCT
        case rm.manifolds.PoincareBall():
            return {}
        case geoopt.Stereographic():
            return KEEPDIM
        case geoopt.Lorentz():
            return LORENTZ
    return {}
