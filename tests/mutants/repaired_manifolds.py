"""The repaired manifolds with one mistake each, by the law that it breaks.

MANIFOLDS: laws of ``check_base_manifold``; RETRACTIONS: of ``check_retraction`` for the
manifold's own ``retr``; TRANSPORTS, ROUND_TRIPS: of ``test_repaired_manifolds``.
"""

from collections.abc import Callable

import geoopt
import torch
from torch import Tensor

from riemannian_modules import manifolds as m
from riemannian_modules.manifolds import birkhoff
from riemannian_modules.manifolds.log_euclidean import _apply

Case = tuple[str, Callable[[], geoopt.Manifold], tuple[int, ...]]


# ---- Lorentz ---------------------------------------------------------------------


class Overwriting(m.Lorentz):
    def egrad2rgrad(self, x, u):
        u[..., :1].mul_(-1.0)
        return self.proju(x, u)


class UnflippedRiesz(m.Lorentz):
    """Forgets that the time entry of a covector changes its sign."""

    def egrad2rgrad(self, x, u):
        return self.proju(x, u)


class UnitRiesz(m.Lorentz):
    """Right for k = 1 only."""

    def egrad2rgrad(self, x, u):
        share = (x * u).sum(-1, keepdim=True)
        return self._tangent(x, u[..., 1:] + x[..., 1:] * share)


class EuclideanInner(m.Lorentz):
    def inner(self, x, u, v=None, *, keepdim=False):
        return (u * (u if v is None else v)).sum(-1, keepdim=keepdim)


class EuclideanProjection(m.Lorentz):
    def proju(self, x, v):
        normal = torch.cat((-x[..., :1], x[..., 1:]), dim=-1)
        share = (normal * v).sum(-1, True) / normal.square().sum(-1, True)
        return v - 2.0 * share * normal


class ClampedLength(m.Lorentz):
    """geoopt's smallest length, 1e-4."""

    def expmap(self, x, u):
        n = (self.inner(x, u, keepdim=True) / self.k).clamp_min(1e-8).sqrt()
        cosh, sinhc = torch.cosh(n), torch.sinh(n) / n
        return self._point(cosh * x[..., 1:] + sinhc * u[..., 1:])


class FlatStep(m.Lorentz):
    def expmap(self, x, u):
        return self._point(x[..., 1:] + u[..., 1:])


class UnitDistance(m.Lorentz):
    def dist(self, x, y, *, keepdim=False):
        return super().dist(x, y, keepdim=keepdim) / self.k.sqrt()


# ---- Birkhoff --------------------------------------------------------------------


class WithoutN(m.BirkhoffPolytope):
    def egrad2rgrad(self, x, u):
        return self.proju(x, x * u)


class AmbientRiesz(m.BirkhoffPolytope):
    def egrad2rgrad(self, x, u):
        return x.shape[-1] * x * u


class ProductProjection(m.BirkhoffPolytope):
    """geoopt's: multiplies by x first."""

    def proju(self, x, u):
        return super().proju(x, x * u)


class CentredProjection(m.BirkhoffPolytope):
    """Right sums, at right angles in the wrong metric."""

    def proju(self, x, u):
        return u - u.mean(-1, True) - u.mean(-2, True) + u.mean((-1, -2), True)


class ImpatientSinkhorn(m.BirkhoffPolytope):
    def projx(self, x):
        logs = x.clamp_min(1e-300).log()
        for _ in range(3):
            logs = birkhoff._log_normalised(logs)
        return logs.exp()


class UnscaledStep(m.BirkhoffPolytope):
    def retr(self, x, u):
        return x * torch.exp(u / x)


class StepAsGeodesic(m.BirkhoffPolytope):
    def expmap(self, x, u):
        return self.retr(x, u)


class RowsOnly(m.BirkhoffPolytope):
    def retr(self, x, u):
        return torch.softmax(x.log() + u / x, dim=-1)


# ---- Scaled ----------------------------------------------------------------------


class DividedStep(m.Scaled):
    """geoopt's."""

    def retr(self, x, u):
        return self.base.retr(x, u / self.scale)


class UnscaledRiesz(m.Scaled):
    def egrad2rgrad(self, x, u):
        return self.base.egrad2rgrad(x, u)


class OnceScaled(m.Scaled):
    def inner(self, x, u, v=None, *, keepdim=False):
        return self.scale * self.base.inner(x, u, v, keepdim=keepdim)


class UnscaledDistance(m.Scaled):
    def dist(self, x, y, *, keepdim=False):
        return self.base.dist(x, y, keepdim=keepdim)


class DividedGeodesic(m.Scaled):
    def expmap(self, x, u):
        return self.base.expmap(x, u / self.scale)


def scaled(kind: type[m.Scaled]) -> Callable[[], geoopt.Manifold]:
    return lambda: kind(m.Sphere(), 2.0)


# ---- log-Euclidean ---------------------------------------------------------------


class AffineRiesz(m.LogEuclideanSPD):
    def egrad2rgrad(self, x, u):
        return x @ (0.5 * (u + u.mT)) @ x


class OnceRiesz(m.LogEuclideanSPD):
    def egrad2rgrad(self, x, u):
        return _apply(x, u, -1)


class AffineGeodesic(m.LogEuclideanSPD):
    def expmap(self, x, u):
        return m.SPD().expmap(x, u)


class AffineDistance(m.LogEuclideanSPD):
    def dist(self, x, y, *, keepdim=False):
        return m.SPD().dist(x, 3.0 * y, keepdim=keepdim)


class UnsymmetricRiesz(m.LogEuclideanSPD):
    def egrad2rgrad(self, x, u):
        return super().egrad2rgrad(x, u) + 0.5 * (u - u.mT)


def curved(kind: type[m.Lorentz]) -> Callable[[], geoopt.Manifold]:
    return lambda: kind(0.5)


MANIFOLDS: list[Case] = [
    ("riesz_pure", Overwriting, (2, 4)),
    ("riesz", UnflippedRiesz, (4,)),
    ("riesz_normal", UnflippedRiesz, (4,)),
    ("riesz", curved(UnitRiesz), (4,)),
    ("riesz", EuclideanInner, (4,)),
    ("projection_idempotent", EuclideanProjection, (4,)),
    ("expmap_geodesic", FlatStep, (4,)),
    ("distance", curved(UnitDistance), (4,)),
    ("riesz", WithoutN, (4, 4)),
    ("riesz_tangent", AmbientRiesz, (4, 4)),
    ("projection_idempotent", ProductProjection, (4, 4)),
    ("projection_complete", ProductProjection, (4, 4)),
    ("projx_idempotent", ImpatientSinkhorn, (4, 4)),
    ("random_on_manifold", ImpatientSinkhorn, (4, 4)),
    ("expmap_geodesic", StepAsGeodesic, (4, 4)),
    ("retraction_derivative", scaled(DividedStep), (4,)),
    ("riesz", scaled(UnscaledRiesz), (4,)),
    ("riesz", scaled(OnceScaled), (4,)),
    ("distance", scaled(UnscaledDistance), (4,)),
    ("expmap_derivative", scaled(DividedGeodesic), (4,)),
    ("riesz", AffineRiesz, (3, 3)),
    ("riesz", OnceRiesz, (3, 3)),
    ("expmap_geodesic", AffineGeodesic, (3, 3)),
    ("distance", AffineDistance, (3, 3)),
    ("riesz_tangent", UnsymmetricRiesz, (3, 3)),
]

RETRACTIONS: list[Case] = [
    ("retraction_zero", ClampedLength, (4,)),
    ("retraction_derivative", scaled(DividedStep), (4,)),
    ("retraction_on_manifold", UnscaledStep, (4, 4)),
    ("retraction_on_manifold", RowsOnly, (4, 4)),
]


# ---- transports and geodesics ----------------------------------------------------


class ProjectedTransport(m.Lorentz):
    def transp(self, x, y, v):
        return self.proju(y, v)


class StaleTransport(m.LogEuclideanSPD):
    def transp(self, x, y, v):
        return v


class AffineTransport(m.LogEuclideanSPD):
    def transp(self, x, y, v):
        return m.SPD().transp(x, y, v)


class ClampedLog(m.Lorentz):
    def logmap(self, x, y):
        u = super().logmap(x, y)
        return u * (self.norm(x, u, keepdim=True) / 1e-4).clamp_max(1.0)


class CoshDistance(m.Lorentz):
    def dist(self, x, y, *, keepdim=False):
        form = x[..., :1] * y[..., :1] - (x * y)[..., 1:].sum(-1, True)
        return self.k.sqrt() * torch.acosh((form / self.k).clamp_min(1.0)).squeeze(-1)


class BackwardLog(m.LogEuclideanSPD):
    def logmap(self, x, y):
        return self.proju(x, y - x)


def unrefined(x: Tensor, u: Tensor) -> Tensor:
    """One pass of the projection, with row sums taken as exactly 1."""
    n = x.shape[-1]
    eye = torch.eye(n, dtype=x.dtype)
    matrix = eye - x @ x.mT + 1.0 / n
    right = u.sum(-1, keepdim=True) - x @ u.sum(-2).unsqueeze(-1)
    a = torch.linalg.solve(matrix, right)
    b = u.sum(-2, keepdim=True) - a.mT @ x
    return u - x * (a + b)


TRANSPORTS: list[Case] = [
    ("isometric", ProjectedTransport, (4,)),
    ("isometric", StaleTransport, (3, 3)),
    ("isometric", AffineTransport, (3, 3)),
]

ROUND_TRIPS: list[Case] = [
    ("logmap", ClampedLog, (4,)),
    ("logmap", BackwardLog, (3, 3)),
    ("dist", CoshDistance, (4,)),
]
