"""The tangent step between two points: the inverse of a retraction."""

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import ContractionError
from riemannian_modules.manifolds import base_of
from riemannian_modules.retractions import Default, Retraction

__all__ = ["inverse_retraction"]

_ITERATIONS = 300


def inverse_retraction(
    manifold: geoopt.Manifold,
    x: Tensor,
    y: Tensor,
    retraction: Retraction | None = None,
) -> Tensor:
    """Return the tangent vector u at x with ``R_x(u) = y``, for near points.

    Found by the iteration ``u <- u + proj_x(y - R_x(u))``, which contracts for near
    points because ``DR_x(0)`` is the identity. It needs no logarithm, works for every
    retraction, and is accurate to rounding where geoopt's ``logmap`` is not.

    Args:
        manifold: The manifold, also inside a ``MetricManifold``.
        x: A point.
        y: Another one.
        retraction: The retraction; None: ``retractions.Default()``. With
            ``retractions.Exponential()`` the result is the logarithm.

    Returns:
        A tangent vector at x. Cost: a retraction and a projection for each digit or
        two on steps of a training run; the iteration ends at rounding.

    Raises:
        ContractionError: It does not converge: the points are too far apart, or y
            is not the retraction of any tangent vector.

    Example:
        >>> sphere = geoopt.Sphere()
        >>> x = torch.tensor([1.0, 0.0], dtype=torch.float64)
        >>> u = torch.tensor([0.0, 0.5], dtype=torch.float64)
        >>> inverse_retraction(sphere, x, sphere.retr(x, u))
        tensor([0.0000, 0.5000], dtype=torch.float64)
    """
    base = base_of(manifold)
    if type(base) is geoopt.Euclidean:
        return y - x
    rule = Default() if retraction is None else retraction
    u = torch.zeros_like(x)
    eps = torch.finfo(x.dtype).eps
    scale = float(torch.maximum(x.abs().max(), y.abs().max()))
    previous = float("inf")
    for _ in range(_ITERATIONS):
        correction = base.proju(x, y - rule(base, x, u))
        size = float(correction.abs().max())
        if not size < float("inf"):
            break
        u = u + correction
        # At the level of rounding it no longer shrinks.
        if (size <= 8.0 * eps * scale and size >= 0.5 * previous) or size == 0.0:
            break
        previous = size
    missed = float((y - rule(base, x, u)).abs().max())
    if not missed <= 1e3 * eps * scale:
        distance = float((y - x).abs().max())
        raise ContractionError(
            f"no tangent vector of {base.name} leads from one point to the other by "
            f"{type(rule).__name__} (the largest entries differ by {distance:.3g}, "
            f"{missed:.3g} are left): take shorter steps, or the retraction of the run"
        )
    return u
