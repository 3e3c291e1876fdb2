"""What pymanopt's manifolds lack and geoopt's need: the point next to an array."""

from functools import singledispatch

import numpy as np
from numpy.typing import NDArray
from pymanopt import manifolds as pm
from pymanopt.manifolds.manifold import Manifold

__all__ = ["Array", "nearest_point"]

Array = NDArray[np.float64]


@singledispatch
def nearest_point(manifold: Manifold, array: Array) -> Array:
    """Return a point of a pymanopt manifold next to an array.

    Args:
        manifold: pymanopt manifold.
        array: an array of the shape of its points.

    Returns:
        The nearest point, or on open manifolds one inside by a small margin.

    Raises:
        NotImplementedError: it is not known for this class.
    """
    raise NotImplementedError(
        f"pymanopt's {type(manifold).__name__} does not say which of its points is "
        "next to an array, and geoopt needs that; pass as_geoopt(manifold, "
        "projx=function) with a function from arrays to points"
    )


def _polar(array: Array) -> Array:
    u, _, vh = np.linalg.svd(array, full_matrices=False)
    return u @ vh


def _transposed(array: Array) -> Array:
    return np.swapaxes(array, -1, -2)


@nearest_point.register(pm.Euclidean)
def _(manifold: pm.Euclidean, array: Array) -> Array:
    return array


@nearest_point.register(pm.Symmetric)
@nearest_point.register(pm.SkewSymmetric)
def _(manifold: Manifold, array: Array) -> Array:
    return manifold.projection(array, array)


@nearest_point.register(pm.Sphere)
def _(manifold: pm.Sphere, array: Array) -> Array:
    return array / np.linalg.norm(array)


@nearest_point.register(pm.Oblique)
def _(manifold: pm.Oblique, array: Array) -> Array:
    return array / np.linalg.norm(array, axis=0)


@nearest_point.register(pm.Stiefel)
@nearest_point.register(pm.Grassmann)
def _(manifold: Manifold, array: Array) -> Array:
    return _polar(array)


@nearest_point.register(pm.SpecialOrthogonalGroup)
def _(manifold: pm.SpecialOrthogonalGroup, array: Array) -> Array:
    u, _, vh = np.linalg.svd(array)
    sign = np.sign(np.linalg.det(u @ vh))
    last = u[..., -1:] * sign[..., None, None]
    return np.concatenate((u[..., :-1], last), -1) @ vh


@nearest_point.register(pm.SymmetricPositiveDefinite)
def _(manifold: pm.SymmetricPositiveDefinite, array: Array) -> Array:
    values, vectors = np.linalg.eigh(0.5 * (array + _transposed(array)))
    floor = np.finfo(np.float64).eps * np.abs(values).max(-1, keepdims=True)
    values = np.maximum(values, np.maximum(floor, np.finfo(np.float64).tiny))
    return (vectors * values[..., None, :]) @ _transposed(vectors)


@nearest_point.register(pm.Positive)
def _(manifold: pm.Positive, array: Array) -> Array:
    return np.maximum(array, np.finfo(np.float64).tiny ** 0.5)


@nearest_point.register(pm.PoincareBall)
def _(manifold: pm.PoincareBall, array: Array) -> Array:
    norm = np.linalg.norm(array, axis=-1, keepdims=True)
    return array * np.minimum(1.0, (1.0 - 1e-5) / np.maximum(norm, 1e-5))
