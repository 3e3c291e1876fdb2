"""Manifolds and retractions with one mistake each, by the law that it breaks."""

from collections.abc import Callable
from dataclasses import dataclass

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds import CanonicalStiefel, Stiefel
from riemannian_modules.manifolds.stiefel import qr_step
from riemannian_modules.retractions import Retraction


class UnscaledRiesz(geoopt.PoincareBall):
    def egrad2rgrad(self, x, u):
        return u


class AmbientRiesz(geoopt.Sphere):
    def egrad2rgrad(self, x, u):
        return u


class NormalisedRiesz(geoopt.Sphere):
    def egrad2rgrad(self, x, u):
        tangent = self.proju(x, u)
        return tangent / tangent.norm(dim=-1, keepdim=True)


class MutatingRiesz(geoopt.Sphere):
    def egrad2rgrad(self, x, u):
        return u.sub_((x * u).sum(-1, keepdim=True) * x)


class SkewedMetric(geoopt.Euclidean):
    def inner(self, x, u, v=None, *, keepdim=False):
        v = u if v is None else v
        return u * v + 0.1 * (u * v.roll(1, -1) - v * u.roll(1, -1))


class IndefiniteMetric(geoopt.Euclidean):
    def inner(self, x, u, v=None, *, keepdim=False):
        return -super().inner(x, u, v)


class DoublingProjection(Stiefel):
    def proju(self, x, u):
        return 2.0 * super().proju(x, u)


class AmbientProjection(Stiefel):
    def proju(self, x, u):
        return u


class ZeroProjection(Stiefel):
    def proju(self, x, u):
        return 0.0 * u


class MutatingRetraction(geoopt.Sphere):
    def retr(self, x, u):
        return self.projx(x + u.mul_(1.0 + 1e-3))


class DoubleSpeed(geoopt.Sphere):
    def retr(self, x, u):
        return self.projx(x + 2.0 * u)


class HalfProjection(geoopt.Sphere):
    def projx(self, x):
        return 0.5 * (x + super().projx(x))


class UnnormalisedRandom(geoopt.Sphere):
    def random(self, *size, dtype=None, device=None):
        return torch.randn(*size, dtype=dtype, device=device)


class FastGeodesic(geoopt.Sphere):
    def expmap(self, x, u):
        return super().expmap(x, 1.5 * u)


class OtherGeodesic(Stiefel):
    """Right speed, wrong curve: the geodesic of the other metric."""

    def expmap(self, x, u):
        return CanonicalStiefel().expmap(x, u)


class DoubleDistance(geoopt.Sphere):
    def dist(self, x, y, *, keepdim=False):
        return 2.0 * super().dist(x, y, keepdim=keepdim)


MANIFOLDS: dict[str, tuple[Callable[[], geoopt.Manifold], tuple[int, ...]]] = {
    "riesz": (UnscaledRiesz, (3,)),
    "riesz_tangent": (AmbientRiesz, (2, 3)),
    "riesz_normal": (AmbientRiesz, (4,)),
    "riesz_linear": (NormalisedRiesz, (4,)),
    "riesz_pure": (MutatingRiesz, (4,)),
    "metric_symmetric": (SkewedMetric, (2, 3)),
    "metric_positive": (IndefiniteMetric, (2, 3)),
    "projection_idempotent": (DoublingProjection, (4, 2)),
    "projection_tangent": (AmbientProjection, (4, 2)),
    "projection_complete": (ZeroProjection, (4, 2)),
    "pure": (MutatingRetraction, (4,)),
    "retraction_derivative": (DoubleSpeed, (4,)),
    "projx_idempotent": (HalfProjection, (4,)),
    "random_on_manifold": (UnnormalisedRandom, (4,)),
    "expmap_derivative": (FastGeodesic, (4,)),
    "expmap_geodesic": (OtherGeodesic, (5, 3)),
    "distance": (DoubleDistance, (4,)),
}


class FirstOrder(Retraction):
    def order(self, manifold: geoopt.Manifold) -> int:
        return 1


@dataclass(frozen=True)
class Doubled(FirstOrder):
    def __call__(self, manifold, point, tangent) -> Tensor:
        return manifold.retr(point, 2.0 * tangent)


@dataclass(frozen=True)
class Straight(FirstOrder):
    def __call__(self, manifold, point, tangent) -> Tensor:
        return point + tangent


@dataclass(frozen=True)
class Shifted(FirstOrder):
    def __call__(self, manifold, point, tangent) -> Tensor:
        return manifold.projx(point + tangent + 1e-6)


@dataclass(frozen=True)
class InPlace(FirstOrder):
    def __call__(self, manifold, point, tangent) -> Tensor:
        return manifold.projx(tangent.add_(point))


@dataclass(frozen=True)
class Overclaimed(Retraction):
    def __call__(self, manifold, point, tangent) -> Tensor:
        return qr_step(point, tangent)

    def order(self, manifold: geoopt.Manifold) -> int:
        return 2


RETRACTIONS: dict[str, Retraction] = {
    "retraction_zero": Shifted(),
    "retraction_on_manifold": Straight(),
    "retraction_derivative": Doubled(),
    "retraction_pure": InPlace(),
    "retraction_order": Overclaimed(),
}
