"""Every manifold that geoopt and this library ship, with a shape and a point to test.

Made when asked for, in the default data type of torch at that time.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import geoopt
import torch
from torch import Tensor

from riemannian_modules import Mass, manifolds

Shape = tuple[int, ...]
Make = Callable[[], geoopt.Manifold]


@dataclass(frozen=True)
class Case:
    """A manifold, the shape of its points and how to draw one."""

    name: str
    make: Make
    shape: Shape
    random: Callable[[geoopt.Manifold, Shape], Tensor] | None = None

    def draw(self, manifold: geoopt.Manifold, batch: Shape = ()) -> Tensor:
        """Return a random point, ``(*batch, *shape)``."""
        shape = (*batch, *self.shape)
        if self.random is not None:
            return self.random(manifold, shape)
        return draw(manifold, shape)


def draw(manifold: geoopt.Manifold, shape: Shape) -> Tensor:
    """Return what ``random`` returns, as a plain tensor; part by part on products."""
    if isinstance(manifold, geoopt.ProductManifold):
        blocks = [
            draw(part, (*shape[:-1], *size))
            for part, size in zip(manifold.manifolds, manifold.shapes, strict=True)
        ]
        return manifold.pack_point(*blocks)
    if type(manifold) is geoopt.Lorentz:
        return manifold.random_normal(*shape).data
    if isinstance(manifold, geoopt.UpperHalf | geoopt.BoundedDomain):
        wide = torch.promote_types(torch.get_default_dtype(), torch.complex32)
        return manifold.random(*shape, dtype=wide)
    return manifold.random(*shape).data


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / (1e-300 + b.norm()))


def assert_two_derivatives(
    call: Callable[..., Tensor], arguments: tuple[Tensor, ...], *, batched: bool = False
) -> None:
    """Check first and second derivatives, forward and reverse, in random directions.

    Every entry of the Jacobians would take ten times as long and find no more.
    """
    gradcheck, twice = torch.autograd.gradcheck, torch.autograd.gradgradcheck
    assert gradcheck(
        call,
        arguments,
        fast_mode=True,
        check_undefined_grad=False,
        check_forward_ad=True,
        check_batched_grad=batched,
        check_batched_forward_grad=batched,
    )
    assert twice(
        call,
        arguments,
        fast_mode=True,
        check_undefined_grad=False,
        check_fwd_over_rev=True,
    )


def near_zero(manifold: geoopt.Manifold, shape: Shape) -> Tensor:
    """A chart of the sphere misses its pole, which lies at infinity."""
    return 0.3 * torch.randn(shape)


def plane() -> Tensor:
    """A plane in 4 dimensions."""
    return torch.eye(4)[:, :2] + 0.3 * torch.ones(4, 2)


def spd(metric: str) -> geoopt.Manifold:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return geoopt.SymmetricPositiveDefinite(metric)


def product() -> geoopt.Manifold:
    return geoopt.ProductManifold(
        (geoopt.Sphere(), 3), (geoopt.EuclideanStiefel(), (3, 2)), (spd("AIM"), (2, 2))
    )


def own_product() -> geoopt.Manifold:
    return geoopt.ProductManifold(
        (manifolds.Lorentz(), 3),
        (manifolds.Oblique(), (2, 2)),
        (manifolds.Scaled(manifolds.LogEuclideanSPD(), 0.7), (2, 2)),
    )


def named_product() -> geoopt.Manifold:
    return manifolds.Product(
        {
            "filters": (manifolds.Stiefel(), (2, 3)),
            "bias": (manifolds.Euclidean(), (2,)),
            "rows": (manifolds.Lorentz(), (2, 3)),
        },
        masses={"rows": Mass(scalar=0.3)},
    )


def reshaped() -> geoopt.Manifold:
    return manifolds.Reshaped(manifolds.Sphere(), (3, 2, 2), (3, 4))


def curved_product() -> geoopt.Manifold:
    return geoopt.StereographicProductManifold(
        (geoopt.PoincareBall(), 3), (geoopt.Stereographic(k=0.3), 2)
    )


GEOOPT = [
    Case("Euclidean", geoopt.Euclidean, (3, 2)),
    Case("Stiefel (canonical)", geoopt.CanonicalStiefel, (5, 3)),
    Case("EuclideanStiefel", geoopt.EuclideanStiefel, (5, 3)),
    Case("EuclideanStiefelExact", geoopt.EuclideanStiefelExact, (5, 3)),
    Case("Sphere", geoopt.Sphere, (4,)),
    Case("Sphere (intersection)", lambda: geoopt.Sphere(plane()), (4,)),
    Case("Sphere (complement)", lambda: geoopt.Sphere(complement=plane()), (4,)),
    Case("SphereExact", geoopt.SphereExact, (4,)),
    Case("BirkhoffPolytope", geoopt.BirkhoffPolytope, (4, 4)),
    Case("SymmetricPositiveDefinite", lambda: spd("AIM"), (3, 3)),
    Case("SymmetricPositiveDefinite(SM)", lambda: spd("SM"), (3, 3)),
    Case("SymmetricPositiveDefinite(LEM)", lambda: spd("LEM"), (3, 3)),
    Case("UpperHalf", geoopt.UpperHalf, (3, 3)),
    Case("BoundedDomain", geoopt.BoundedDomain, (3, 3)),
    Case("PoincareBall", lambda: geoopt.PoincareBall(c=0.5), (3,)),
    Case("PoincareBallExact", geoopt.PoincareBallExact, (3,)),
    Case("PoincareBall (learnable)", lambda: geoopt.PoincareBall(learnable=True), (3,)),
    Case("Stereographic(k > 0)", lambda: geoopt.Stereographic(k=0.3), (3,)),
    Case("Stereographic(k = 0)", lambda: geoopt.Stereographic(k=0.0), (3,)),
    Case("Stereographic(k < 0)", lambda: geoopt.Stereographic(k=-0.7), (3,)),
    Case(
        "Stereographic (learnable)",
        lambda: geoopt.Stereographic(k=-0.7, learnable=True),
        (3,),
    ),
    Case("StereographicExact", lambda: geoopt.StereographicExact(k=-0.7), (3,)),
    Case("SphereProjection", geoopt.SphereProjection, (3,), near_zero),
    Case("SphereProjectionExact", geoopt.SphereProjectionExact, (3,), near_zero),
    Case("Lorentz", geoopt.Lorentz, (4,)),
    Case("Scaled", lambda: geoopt.Scaled(geoopt.Sphere(), 2.0), (4,)),
    Case("ProductManifold", product, (13,)),
    Case("StereographicProductManifold", curved_product, (5,)),
]

OURS = [
    Case("Euclidean", manifolds.Euclidean, (3, 2)),
    Case("Stiefel, tall", manifolds.Stiefel, (5, 3)),
    Case("Stiefel, wide", manifolds.Stiefel, (3, 5)),
    Case("CanonicalStiefel, tall", manifolds.CanonicalStiefel, (5, 3)),
    Case("CanonicalStiefel, wide", manifolds.CanonicalStiefel, (3, 5)),
    Case("Grassmann, tall", manifolds.Grassmann, (5, 2)),
    Case("Grassmann, wide", manifolds.Grassmann, (2, 5)),
    Case("SpecialOrthogonal", manifolds.SpecialOrthogonal, (3, 3)),
    Case("Sphere", manifolds.Sphere, (4,)),
    Case("Oblique, columns", manifolds.Oblique, (3, 4)),
    Case("Oblique, rows", lambda: manifolds.Oblique("rows"), (3, 4)),
    Case("PoincareBall", manifolds.PoincareBall, (3,)),
    Case("Lorentz", manifolds.Lorentz, (4,)),
    Case("Lorentz(k = 0.3)", lambda: manifolds.Lorentz(0.3), (4,)),
    Case("SPD", manifolds.SPD, (3, 3)),
    Case("LogEuclideanSPD", manifolds.LogEuclideanSPD, (3, 3)),
    Case("Positive", manifolds.Positive, (3, 2)),
    Case("BirkhoffPolytope", manifolds.BirkhoffPolytope, (4, 4)),
    Case("FixedRank(2)", lambda: manifolds.FixedRank(2), (5, 4)),
    Case("Scaled(Sphere)", lambda: manifolds.Scaled(manifolds.Sphere(), 2.0), (4,)),
    Case(
        "Scaled(CanonicalStiefel)",
        lambda: manifolds.Scaled(manifolds.CanonicalStiefel(), 0.5),
        (5, 3),
    ),
    Case(
        "Scaled(BirkhoffPolytope)",
        lambda: manifolds.Scaled(manifolds.BirkhoffPolytope(), 3.0),
        (3, 3),
    ),
    Case("Reshaped(Sphere)", reshaped, (3, 2, 2)),
    Case("Product", named_product, (14,)),
    Case("ProductManifold of these", own_product, (11,)),
]
