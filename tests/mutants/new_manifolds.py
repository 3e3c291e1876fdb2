"""Grassmann, SO(n), oblique, positive and fixed-rank manifolds with one mistake each.

By the law that the mistake breaks; a law of ``check_base_manifold`` for MANIFOLDS, of
``check_retraction`` for RETRACTIONS, of ``test_new_manifolds`` for GEODESICS.
"""

from collections.abc import Callable
from dataclasses import dataclass

import geoopt
import torch
from torch import Tensor

from riemannian_modules import manifolds as m
from riemannian_modules.manifolds.stiefel import qr_step
from riemannian_modules.retractions import Retraction

Case = tuple[str, Callable[[], geoopt.Manifold], tuple[int, ...]]


# ---- Grassmann -------------------------------------------------------------------


class VerticalProjection(m.Grassmann):
    """The tangent projection of the Stiefel manifold: it turns the basis, too."""

    proju = m.Stiefel.proju


class VerticalRiesz(m.Grassmann):
    def egrad2rgrad(self, x, u):
        return m.Stiefel.proju(self, x, u)


class CanonicalMetric(m.Grassmann):
    """Half the metric on horizontal vectors, with the Riesz map of the whole."""

    def inner(self, x, u, v=None, *, keepdim=False):
        return 0.5 * super().inner(x, u, v, keepdim=keepdim)


class StraightGeodesic(m.Grassmann):
    def expmap(self, x, u):
        return self.retr(x, u)


class ChordalDistance(m.Grassmann):
    def dist(self, x, y, *, keepdim=False):
        chord = torch.linalg.matrix_norm(self.invariant(x) - self.invariant(y))
        return chord[..., None, None] / 2**0.5 if keepdim else chord / 2**0.5


class CosineDistance(m.Grassmann):
    """Right, but blind to angles below the root of the rounding unit."""

    def dist(self, x, y, *, keepdim=False):
        cosines = torch.linalg.svdvals(x.mT @ y).clamp(-1.0, 1.0)
        total = cosines.acos().norm(dim=-1)
        return total[..., None, None] if keepdim else total


class UnturnedTransport(m.Grassmann):
    """The projection alone: the result belongs to another basis of y."""

    def transp(self, x, y, v):
        return self.proju(y, v)


class UnalignedLog(m.Grassmann):
    def logmap(self, x, y):
        return self.proju(x, y - x)


# ---- rotations -------------------------------------------------------------------


class DoubleSpeed(m.SpecialOrthogonal):
    def retr(self, x, u):
        return super().retr(x, 2.0 * u)


class UnhalvedRiesz(m.SpecialOrthogonal):
    def egrad2rgrad(self, x, u):
        return 2.0 * super().egrad2rgrad(x, u)


class RightTranslation(m.SpecialOrthogonal):
    """Takes the tangent vector x A for A x."""

    def expmap(self, x, u):
        return torch.matrix_exp(x.mT @ u) @ x


class Reflections(m.SpecialOrthogonal):
    def random(self, *size, dtype=None, device=None):
        return super().random(*size, dtype=dtype, device=device).flip(-1)


class ProjectedTransport(m.SpecialOrthogonal):
    def transp(self, x, y, v):
        return self.proju(y, v)


class TruncatedLog(m.SpecialOrthogonal):
    """The first term of the series of the logarithm."""

    def logmap(self, x, y):
        return self.proju(x, y)


# ---- oblique ---------------------------------------------------------------------


class OtherSide(m.Oblique):
    def proju(self, x, u):
        return u - x * (x * u).sum(-1, keepdim=True)


class AmbientRiesz(m.Oblique):
    def egrad2rgrad(self, x, u):
        return u


class OneSphere(m.Oblique):
    """A great circle of the sphere that the whole matrix lies on."""

    def expmap(self, x, u):
        angle = torch.linalg.matrix_norm(u, keepdim=True)
        return x * angle.cos() + u * torch.sinc(angle / torch.pi)


class SummedAngles(m.Oblique):
    def dist(self, x, y, *, keepdim=False):
        return self._angles(x, y).sum((-1, -2), keepdim=keepdim)


class ObliqueProjection(m.Oblique):
    def transp(self, x, y, v):
        return self.proju(y, v)


# ---- positive --------------------------------------------------------------------


class EuclideanRiesz(m.Positive):
    def egrad2rgrad(self, x, u):
        return u


class HalfLog(m.Positive):
    """The metric of the square root."""

    def inner(self, x, u, v=None, *, keepdim=False):
        return u * (u if v is None else v) / x


class PolynomialGeodesic(m.Positive):
    def expmap(self, x, u):
        return self.retr(x, u)


class EuclideanDistance(m.Positive):
    def dist(self, x, y, *, keepdim=False):
        return (x - y).abs()


class UnscaledTransport(m.Positive):
    def transp(self, x, y, v):
        return v


class Lifted(m.Positive):
    """Adds the floor, so that projecting twice goes on."""

    def projx(self, x):
        return x.clamp_min(0.0) + 1e-6


# ---- fixed rank ------------------------------------------------------------------


class OneSided(m.FixedRank):
    """Forgets the vectors that change the row space."""

    def proju(self, x, u):
        left = torch.linalg.svd(x, full_matrices=False)[0][..., : self.rank]
        return left @ (left.mT @ u)


class CountedTwice(m.FixedRank):
    """Forgets to take off what both terms have in common."""

    def proju(self, x, u):
        left, _, right = torch.linalg.svd(x, full_matrices=False)
        left, right = left[..., : self.rank], right[..., : self.rank, :]
        return left @ (left.mT @ u) + (u @ right.mT) @ right


class FixedRankAmbient(m.FixedRank):
    def egrad2rgrad(self, x, u):
        return u


class Shrunk(m.FixedRank):
    """Keeps a part of what it cuts off."""

    def projx(self, x):
        nearest = super().projx(x)
        return nearest + 1e-3 * (x - nearest)


class FullRankRandom(m.FixedRank):
    def random(self, *size, dtype=None, device=None):
        return torch.randn(*size, dtype=dtype, device=device)


def fixed(kind: type[m.FixedRank]) -> Callable[[], geoopt.Manifold]:
    return lambda: kind(2)


MANIFOLDS: list[Case] = [
    ("projection_tangent", VerticalProjection, (5, 2)),
    ("riesz_tangent", VerticalProjection, (2, 5)),
    ("riesz_tangent", VerticalRiesz, (5, 2)),
    ("riesz", CanonicalMetric, (5, 2)),
    ("expmap_geodesic", StraightGeodesic, (5, 2)),
    ("distance", ChordalDistance, (4, 2)),
    ("retraction_derivative", DoubleSpeed, (3, 3)),
    ("riesz", UnhalvedRiesz, (3, 3)),
    ("expmap_derivative", RightTranslation, (3, 3)),
    ("random_on_manifold", Reflections, (2, 2)),
    ("projection_tangent", OtherSide, (3, 4)),
    ("riesz_tangent", AmbientRiesz, (3, 4)),
    ("riesz_normal", AmbientRiesz, (3, 4)),
    ("expmap_geodesic", OneSphere, (3, 4)),
    ("distance", SummedAngles, (3, 4)),
    ("riesz", EuclideanRiesz, (2, 3)),
    ("riesz", HalfLog, (2, 3)),
    ("expmap_geodesic", PolynomialGeodesic, (2, 3)),
    ("distance", EuclideanDistance, (2, 3)),
    ("projx_idempotent", Lifted, (2, 3)),
    ("projection_complete", fixed(OneSided), (4, 5)),
    ("projection_idempotent", fixed(CountedTwice), (4, 5)),
    ("riesz_normal", fixed(FixedRankAmbient), (4, 5)),
    ("projx_idempotent", fixed(Shrunk), (4, 5)),
    ("random_on_manifold", fixed(FullRankRandom), (4, 5)),
]


# ---- retractions -----------------------------------------------------------------


@dataclass(frozen=True)
class Claimed(Retraction):
    claim: int = 2

    def order(self, manifold: geoopt.Manifold) -> int:
        return self.claim


@dataclass(frozen=True)
class Straight(Claimed):
    claim: int = 1

    def __call__(self, manifold, point, tangent) -> Tensor:
        return point + tangent


@dataclass(frozen=True)
class StraightAsSecond(Straight):
    claim: int = 2


@dataclass(frozen=True)
class QRAsSecond(Claimed):
    def __call__(self, manifold, point, tangent) -> Tensor:
        return qr_step(point, tangent)


@dataclass(frozen=True)
class Accelerated(Claimed):
    """Right direction, growing speed."""

    def __call__(self, manifold, point, tangent) -> Tensor:
        return manifold.retr(point, tangent * (1.0 + torch.linalg.norm(tangent)))


@dataclass(frozen=True)
class Uninverted(Claimed):
    """The orthographic step without its small inverse."""

    def __call__(self, manifold, point, tangent) -> Tensor:
        u, _, vh = torch.linalg.svd(point, full_matrices=False)
        left, right = u[..., : manifold.rank], vh[..., : manifold.rank, :]
        moved = point + tangent
        return moved @ right.mT @ (left.mT @ moved)


RETRACTIONS: list[tuple[str, Retraction, Callable[[], geoopt.Manifold]]] = [
    ("retraction_on_manifold", Straight(), m.Grassmann),
    ("retraction_on_manifold", Straight(), m.SpecialOrthogonal),
    ("retraction_on_manifold", Straight(), m.Oblique),
    ("retraction_on_manifold", Straight(), fixed(m.FixedRank)),
    ("retraction_order", StraightAsSecond(), m.Positive),
    ("retraction_order", QRAsSecond(), m.SpecialOrthogonal),
    ("retraction_order", Accelerated(), m.Grassmann),
    ("retraction_order", Accelerated(), m.Oblique),
    ("retraction_zero", Uninverted(), fixed(m.FixedRank)),
    ("acceleration", Accelerated(), fixed(m.FixedRank)),
]


# ---- logarithms, distances and transports ----------------------------------------

GEODESICS: list[Case] = [
    ("logmap", UnalignedLog, (5, 2)),
    ("logmap", TruncatedLog, (3, 3)),
    ("small_distance", CosineDistance, (5, 2)),
    ("distance_gradient", ChordalDistance, (5, 2)),
    ("distance_gradient", EuclideanDistance, (2, 3)),
    ("basis", UnturnedTransport, (5, 2)),
    ("isometry", ProjectedTransport, (3, 3)),
    ("isometry", ObliqueProjection, (3, 4)),
    ("isometry", UnscaledTransport, (2, 3)),
]
