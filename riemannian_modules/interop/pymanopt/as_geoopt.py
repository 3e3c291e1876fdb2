"""pymanopt's manifolds as geoopt's, and what a layer metric needs of them."""

from collections.abc import Sequence

import geoopt
import numpy as np
import torch
from pymanopt import manifolds as pm
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.interop.pymanopt.pymanopt_manifold import (
    Nearest,
    PymanoptManifold,
)
from riemannian_modules.interop.pymanopt.view import Array
from riemannian_modules.manifolds import Product
from riemannian_modules.manifolds.acceleration import hessian_correction
from riemannian_modules.manifolds.riesz import dimension, flat

__all__ = ["PymanoptManifold", "as_geoopt"]


@flat.register(PymanoptManifold)
def _(manifold: PymanoptManifold, x: Tensor, u: Tensor) -> Tensor:
    # pymanopt has inner products only, so each entry is one: g(u, projection of e_i).
    p = x.numel()
    eye = torch.eye(p, dtype=x.dtype, device=x.device).view(p, *x.shape)
    basis = manifold.proju(x, eye)
    vectors = u.unsqueeze(u.ndim - x.ndim)
    return manifold.inner(x, vectors, basis).reshape(u.shape)


@dimension.register(PymanoptManifold)
def _(manifold: PymanoptManifold, x: Tensor) -> int:
    points = x.numel() // int(np.prod(manifold.shape))
    return points * int(manifold.manifold.dim)


@hessian_correction.register(PymanoptManifold)
def _(manifold: PymanoptManifold, x: Tensor, u: Tensor, e: Tensor) -> Tensor:
    inner = manifold.manifold

    def one(p: Array, a: Array, g: Array) -> Array:
        zero = np.zeros_like(a)
        found = inner.euclidean_to_riemannian_hessian(p, g, zero, manifold._in(p, a))
        return manifold._out(p, found)

    return flat(manifold, x, manifold._each(one, manifold.shape, x, u, e))


def as_geoopt(
    manifold: Manifold, projx: Nearest | Sequence[Nearest | None] | None = None
) -> geoopt.Manifold:
    """Return a pymanopt manifold as a geoopt manifold.

    It can hold a parameter, also under a layer metric, and serve geoopt's optimizers.
    The factor of such a parameter is a dense one.

    Args:
        manifold: a pymanopt manifold of real points. A pymanopt product becomes a
            :class:`riemannian_modules.manifolds.Product` of parts called "0", "1", ...,
            whose points are flat.
        projx: from an array to the point next to it, where :class:`PymanoptManifold`
            does not know it; for a product one for each part.

    Returns:
        A geoopt manifold.

    Raises:
        ManifoldContractError: points are complex or several arrays, or ``projx`` is
            missing.

    >>> sphere = as_geoopt(pm.Sphere(3))
    >>> sphere.proju(torch.tensor([1.0, 0.0, 0.0]), torch.ones(3))
    tensor([0., 1., 1.])
    """
    if isinstance(manifold, pm.Product):
        functions = [None] * len(manifold.manifolds) if projx is None else projx
        if callable(functions):
            raise ManifoldContractError(
                f"{manifold}: pass a sequence of projx, one for each part or None"
            )
        pairs = zip(manifold.manifolds, functions, strict=True)
        parts = [PymanoptManifold(part, own) for part, own in pairs]
        return Product({str(i): (part, part.shape) for i, part in enumerate(parts)})
    if projx is not None and not callable(projx):
        raise ManifoldContractError(f"{manifold}: projx must be a function of arrays")
    return PymanoptManifold(manifold, projx)
