"""How large a manifold is: pymanopt's trust regions start from this."""

import math
from functools import singledispatch

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds import (
    FixedRank,
    Grassmann,
    MetricProduct,
    Oblique,
    Product,
    Reshaped,
    Scaled,
    SpecialOrthogonal,
)
from riemannian_modules.manifolds.contract import MetricView
from riemannian_modules.manifolds.riesz import dimension

__all__ = ["typical_distance"]

PROBES = 4


@singledispatch
def typical_distance(manifold: geoopt.Manifold, x: Tensor) -> float:
    """Return the distance that is typical of points of a manifold.

    Where pymanopt has the manifold, too, it is the same number.

    Args:
        manifold: base manifold.
        x: a point.

    Returns:
        The root of the dimension, where nothing better is known.

    >>> typical_distance(geoopt.Euclidean(), torch.zeros(4))
    2.0
    """
    return math.sqrt(dimension(manifold, x))


@typical_distance.register(geoopt.Sphere)
def _(manifold: geoopt.Sphere, x: Tensor) -> float:
    return math.pi * math.sqrt(x.numel() / x.shape[-1])


@typical_distance.register(Oblique)
def _(manifold: Oblique, x: Tensor) -> float:
    return math.pi * math.sqrt(x.numel() / x.shape[manifold.dim])


@typical_distance.register(geoopt.Stiefel)
@typical_distance.register(Grassmann)
def _(manifold: geoopt.Manifold, x: Tensor) -> float:
    return math.sqrt(x.numel() / max(x.shape[-2:]))


@typical_distance.register(SpecialOrthogonal)
def _(manifold: SpecialOrthogonal, x: Tensor) -> float:
    return math.pi * math.sqrt(x.numel() / x.shape[-1])


@typical_distance.register(geoopt.Stereographic)
def _(manifold: geoopt.Stereographic, x: Tensor) -> float:
    return x.numel() / 8


@typical_distance.register(FixedRank)
def _(manifold: FixedRank, x: Tensor) -> float:
    return float(dimension(manifold, x))


@typical_distance.register(Scaled)
def _(manifold: Scaled, x: Tensor) -> float:
    return manifold.scale * typical_distance(manifold.base, x)


@typical_distance.register(Reshaped)
def _(manifold: Reshaped, x: Tensor) -> float:
    return typical_distance(manifold.base, manifold._in(x))


@typical_distance.register(MetricView)
def _(manifold: MetricView, x: Tensor) -> float:
    return typical_distance(manifold.base, x)


@typical_distance.register(geoopt.ProductManifold)
def _(manifold: geoopt.ProductManifold, x: Tensor) -> float:
    parts = (
        typical_distance(part, manifold.take_submanifold_value(x, i))
        for i, part in enumerate(manifold.manifolds)
    )
    return math.hypot(*parts)


@typical_distance.register(Product)
def _(manifold: Product, x: Tensor) -> float:
    total = 0.0
    for part, mass, _, (point,) in manifold._parts(x):
        weight = torch.as_tensor(mass.elementwise(point), dtype=torch.float64).mean()
        total += float(weight) * typical_distance(part, point) ** 2
    return math.sqrt(total)


@typical_distance.register(MetricProduct)
def _(manifold: MetricProduct, x: Tensor) -> float:
    # By how much the outputs lengthen random displacements of the massed base metric;
    # several of them, for one may happen to be normal to a small manifold.
    generator = torch.Generator().manual_seed(2603_03610)
    total, length = 0.0, 0.0
    for block in [block for block in manifold.blocks for _ in range(PROBES)]:
        vectors = {}
        for part in block.parts:
            z = torch.randn(part.space.point.shape, generator=generator)
            vectors[part.name] = part.space.root(z.to(part.space.point))
            own = vectors[part.name]
            length += float(part.space.inner(own, own))
        total += float(block.inner(vectors, vectors))
    base = typical_distance.dispatch(Product)(manifold, x)
    return base * math.sqrt(total / length)
