"""What only some geoopt classes measure, in the metric times a mass."""

from collections.abc import Callable
from functools import partial
from typing import Any

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import MassError
from riemannian_modules.mass import Mass

__all__ = ["massed"]

_POWERS = {"dist0": 0.5, "dist2plane": 0.5, "inner0": 1.0}


def massed(manifold: geoopt.Manifold, name: str, mass: Mass) -> Callable[..., Any]:
    """Return the method of a manifold, in its metric times a mass.

    Args:
        manifold: base manifold.
        name: one of its methods.
        mass: the mass.

    Returns:
        The bound method itself if the mass is 1, or if it depends on no metric, as
        ``mobius_add`` and ``geodesic``.

    Raises:
        MassError: it depends on the metric, and the mass is no number.

    >>> ball, x = geoopt.PoincareBall(), torch.tensor([0.5, 0.0])
    >>> ball.dist0(x), massed(ball, "dist0", Mass(4.0))(x)
    (tensor(1.0986), tensor(2.1972))
    """
    method: Callable[..., Any] = getattr(manifold, name)
    if mass.is_one or name not in {*_POWERS, "geodesic_unit"}:
        return method
    if not mass.is_scalar:
        raise MassError(f"{name}: {mass} is no number; use one, or release()")
    if name == "geodesic_unit":
        return partial(_geodesic_unit, manifold, mass.scalar**0.5)
    factor = mass.scalar ** _POWERS[name]
    return lambda *arguments, **options: factor * method(*arguments, **options)


def _geodesic_unit(
    manifold: geoopt.Manifold,
    scale: float,
    t: Tensor,
    x: Tensor,
    u: Tensor,
    **options: Any,
) -> Tensor:
    # The length of u is 1 in the metric with the mass, not in the manifold's.
    length = manifold.norm(x, u, keepdim=True).clamp_min(torch.finfo(u.dtype).tiny)
    point: Tensor = manifold.geodesic_unit(t / scale, x, u / length, **options)
    return point
