r"""Hyperbolic space as a ball, in formulas that torch.func maps and differentiates.

With ``c`` minus the curvature, ``a(x) = 1 - c |x|^2`` and ``d = y - x``, distances and
gyrovector differences come from d, in which nothing cancels between near points:

    sinh^2(sqrt(c) dist(x, y) / 2) = c |d|^2 / (a(x) a(y))
    (-x) + y                       = (a(x) d - c |d|^2 x) / (a(x) a(y) + c |d|^2)

where + is Moebius addition (Ungar, 2005).
"""

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds.riesz import flat

__all__ = ["PoincareBall"]


def _pair(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return (a * b).sum(dim, keepdim=True)


def _ratio(function: Callable[[Tensor], Tensor], squared: Tensor) -> Tensor:
    """Return ``f(t) / t`` for ``t^2``, 1 at 0."""
    positive = squared > 0
    t = torch.where(positive, squared, 1.0).sqrt()
    return torch.where(positive, function(t) / t, 1.0)


def _artanh(t: Tensor) -> Tensor:
    # The largest number below 1: a point that rounding has put on the boundary.
    return torch.atanh(t.clamp_max(1.0 - torch.finfo(t.dtype).eps))


class PoincareBall(geoopt.PoincareBall):  # type: ignore[misc]
    """Rows x with ``c |x|^2 < 1``: the curvature is ``-c``.

    Replaces the formulas of ``geoopt.PoincareBall``, which are compiled by TorchScript:
    once they were specialised, forward mode through them is wrong and torch.func.vmap
    fails. Their ``inner`` mixes up the points of a batch, and small distances lose
    their digits, all of them near the boundary. Random points, midpoints and the
    stereographic projections are geoopt's. The retraction is ``x + u``, pulled back
    into the ball; ``project=False`` leaves results of other methods where they are.

    Args:
        c: minus the curvature, positive.
        learnable: whether it is a parameter; a metric refuses such a ball.

    >>> ball = PoincareBall()
    >>> ball.dist(torch.tensor([0.0, 0.5]), torch.zeros(2))
    tensor(1.0986)
    """

    # --- the metric

    def lambda_x(self, x: Tensor, *, dim: int = -1, keepdim: bool = False) -> Tensor:
        """Return the conformal factor ``2 / (1 - c |x|^2)``."""
        factor = 2.0 / self._gap(x, dim)
        return factor if keepdim else factor.squeeze(dim)

    def inner(
        self,
        x: Tensor,
        u: Tensor,
        v: Tensor | None = None,
        *,
        keepdim: bool = False,
        dim: int = -1,
    ) -> Tensor:
        """Return the inner product of tangent vectors."""
        product = _pair(u, u if v is None else v, dim)
        product = self.lambda_x(x, dim=dim, keepdim=True).square() * product
        return product if keepdim else product.squeeze(dim)

    def norm(
        self, x: Tensor, u: Tensor, *, keepdim: bool = False, dim: int = -1
    ) -> Tensor:
        """Return the norm of tangent vectors."""
        length = torch.linalg.vector_norm(u, dim=dim, keepdim=keepdim)
        return self.lambda_x(x, dim=dim, keepdim=keepdim) * length

    def egrad2rgrad(self, x: Tensor, u: Tensor, *, dim: int = -1) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        return u / self.lambda_x(x, dim=dim, keepdim=True).square()

    # --- points

    def projx(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return the point, or the nearest one that is not too near the boundary."""
        margin = 4e-3 if x.dtype == torch.float32 else 1e-5
        most = (1.0 - margin) / self._c(x).sqrt()
        length = torch.linalg.vector_norm(x, dim=dim, keepdim=True)
        outside = length > most
        return torch.where(outside, x * (most / torch.where(outside, length, 1.0)), x)

    def retr(self, x: Tensor, u: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``x + u``, pulled back into the ball; first order."""
        return self.projx(x + u, dim=dim)

    def dist(
        self, x: Tensor, y: Tensor, *, keepdim: bool = False, dim: int = -1
    ) -> Tensor:
        """Return the length of the geodesic between ``x`` and ``y``."""
        root = self._c(x).sqrt()
        length = torch.linalg.vector_norm(y - x, dim=dim, keepdim=True)
        sinh = root * length / (self._gap(x, dim) * self._gap(y, dim)).sqrt()
        distance = 2.0 / root * torch.asinh(sinh)
        return distance if keepdim else distance.squeeze(dim)

    def dist2(
        self, x: Tensor, y: Tensor, *, keepdim: bool = False, dim: int = -1
    ) -> Tensor:
        """Return the squared distance, with two derivatives where ``x`` is ``y``."""
        q = self._haversine(x, y, dim)
        square = 4.0 / self._c(x) * q * _ratio(torch.asinh, q).square()
        return square if keepdim else square.squeeze(dim)

    def dist0(self, x: Tensor, *, dim: int = -1, keepdim: bool = False) -> Tensor:
        """Return the distance from the origin."""
        return self.dist(torch.zeros_like(x), x, dim=dim, keepdim=keepdim)

    def dist2plane(
        self,
        x: Tensor,
        p: Tensor,
        a: Tensor,
        *,
        dim: int = -1,
        keepdim: bool = False,
        signed: bool = False,
        scaled: bool = False,
    ) -> Tensor:
        """Return the distance to the plane of geodesics through ``p`` normal to ``a``.

        Args:
            x: points.
            p: a point of the plane.
            a: its normal.
            dim: dimension of the coordinates.
            keepdim: whether to keep it.
            signed: whether it is negative on the other side.
            scaled: whether to multiply it by the Euclidean norm of ``a``.
        """
        root = self._c(x).sqrt()
        ahead = self._between(p, x, dim)
        size = torch.linalg.vector_norm(a, dim=dim, keepdim=True)
        unit = a / size.clamp_min(torch.finfo(a.dtype).tiny)
        along = 2.0 * _pair(ahead, unit, dim) / self._gap(ahead, dim)
        distance = torch.asinh(root * (along if signed else along.abs())) / root
        distance = distance * size if scaled else distance
        return distance if keepdim else distance.squeeze(dim)

    # --- geodesics

    def expmap(
        self, x: Tensor, u: Tensor, *, project: bool = True, dim: int = -1
    ) -> Tensor:
        """Follow the geodesic; exact."""
        half = u / self._gap(x, dim)
        return self._kept(self._add(x, self._bent(half, dim), dim), project, dim)

    def expmap0(self, u: Tensor, *, dim: int = -1, project: bool = True) -> Tensor:
        """Return :meth:`expmap` at the origin."""
        return self._kept(self._bent(u, dim), project, dim)

    def logmap(self, x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
        """Return the tangent vector at ``x`` that leads to ``y``."""
        q = self._haversine(x, y, dim)
        straight = _ratio(torch.asinh, q) * (1.0 + q).sqrt()
        return self._gap(x, dim) * straight * self._between(x, y, dim)

    def logmap0(self, x: Tensor, *, dim: int = -1) -> Tensor:
        """Return :meth:`logmap` from the origin to ``x``."""
        return x * _ratio(_artanh, self._c(x) * _pair(x, x, dim))

    def geodesic(self, t: Tensor, x: Tensor, y: Tensor, *, dim: int = -1) -> Tensor:
        """Return the point at the time ``t`` of the geodesic, x at 0 and y at 1."""
        return self.expmap(x, t * self.logmap(x, y, dim=dim), project=False, dim=dim)

    def geodesic_unit(
        self, t: Tensor, x: Tensor, u: Tensor, *, dim: int = -1, project: bool = True
    ) -> Tensor:
        """Follow the geodesic in the direction ``u`` with unit speed for ``t``."""
        size = self.norm(x, u, keepdim=True, dim=dim)
        unit = u / size.clamp_min(torch.finfo(u.dtype).tiny)
        return self.expmap(x, t * unit, project=project, dim=dim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor, *, dim: int = -1) -> Tensor:
        """Transport ``v`` in parallel along the geodesic from ``x`` to ``y``; exact.

        The gyration of y and -x, in terms of their difference.
        """
        c, gap, other, d = self._c(x), self._gap(x, dim), self._gap(y, dim), y - x
        square, ahead, along = _pair(d, d, dim), _pair(d, v, dim), _pair(x, v, dim)
        by_x = c * gap * ahead - c * c * along * square
        by_d = 2.0 * c * c * _pair(d, x, dim) * along
        by_d = by_d - c * gap * along - c * c * _pair(x, x, dim) * ahead
        turned = v + 2.0 * (by_x * x + by_d * d) / (gap * other + c * square)
        return turned * (other / gap)

    def transp0(self, y: Tensor, u: Tensor, *, dim: int = -1) -> Tensor:
        """Return :meth:`transp` from the origin to ``y``."""
        return u * self._gap(y, dim)

    def transp0back(self, y: Tensor, u: Tensor, *, dim: int = -1) -> Tensor:
        """Return :meth:`transp` from ``y`` to the origin."""
        return u / self._gap(y, dim)

    # --- gyrovectors

    def mobius_add(
        self, x: Tensor, y: Tensor, *, dim: int = -1, project: bool = True
    ) -> Tensor:
        """Return the Moebius sum, ``expmap`` of a transported vector from 0 to y."""
        return self._kept(self._add(x, y, dim), project, dim)

    def mobius_sub(
        self, x: Tensor, y: Tensor, *, dim: int = -1, project: bool = True
    ) -> Tensor:
        """Return the Moebius sum of ``x`` and ``-y``."""
        return self.mobius_add(x, -y, dim=dim, project=project)

    def mobius_coadd(
        self, x: Tensor, y: Tensor, *, dim: int = -1, project: bool = True
    ) -> Tensor:
        """Return the Moebius coaddition, which commutes."""
        c, gap, other = self._c(x), self._gap(x, dim), self._gap(y, dim)
        below = gap + c * _pair(x, x, dim) * other
        return self._kept((other * x + gap * y) / below, project, dim)

    def mobius_cosub(
        self, x: Tensor, y: Tensor, *, dim: int = -1, project: bool = True
    ) -> Tensor:
        """Return the Moebius coaddition of ``x`` and ``-y``."""
        return self.mobius_coadd(x, -y, dim=dim, project=project)

    def gyration(self, x: Tensor, y: Tensor, z: Tensor, *, dim: int = -1) -> Tensor:
        """Return ``z`` turned by the gyration of ``x`` and ``y``."""
        # Parallel transport from -y to x without its change of scale.
        turned = self.transp(-y, x, z, dim=dim)
        return turned * (self._gap(y, dim) / self._gap(x, dim))

    def mobius_fn_apply(
        self,
        fn: Callable[..., Tensor],
        x: Tensor,
        *args: Any,
        dim: int = -1,
        project: bool = True,
        **kwargs: Any,
    ) -> Tensor:
        """Apply a function to the tangent vector at the origin that leads to ``x``."""
        ends = fn(self.logmap0(x, dim=dim), *args, **kwargs)
        return self.expmap0(ends, dim=dim, project=project)

    def mobius_fn_apply_chain(
        self,
        x: Tensor,
        *fns: Callable[..., Tensor],
        project: bool = True,
        dim: int = -1,
    ) -> Tensor:
        """Apply functions one after the other as :meth:`mobius_fn_apply` does one."""

        def chain(u: Tensor) -> Tensor:
            for fn in fns:
                u = fn(u)
            return u

        return self.mobius_fn_apply(chain, x, dim=dim, project=project)

    def mobius_scalar_mul(
        self, r: Tensor, x: Tensor, *, dim: int = -1, project: bool = True
    ) -> Tensor:
        """Return the point ``r`` times as far from the origin."""
        return self.mobius_fn_apply(lambda u: r * u, x, dim=dim, project=project)

    mobius_pointwise_mul = mobius_scalar_mul

    def mobius_matvec(
        self, m: Tensor, x: Tensor, *, dim: int = -1, project: bool = True
    ) -> Tensor:
        """Apply a matrix, or one for each point, at the origin."""

        def product(u: Tensor) -> Tensor:
            rows = u.movedim(dim, -1).unsqueeze(-2)
            return (rows @ m.mT).squeeze(-2).movedim(-1, dim)

        return self.mobius_fn_apply(product, x, dim=dim, project=project)

    # --- what these are made of

    def _c(self, x: Tensor) -> Tensor:
        # Before any root of it, which would be rounded to c's own data type.
        c: Tensor = self.c
        return c.to(x.dtype)

    def _gap(self, x: Tensor, dim: int) -> Tensor:
        """Return ``1 - c |x|^2``, never less than rounding makes it."""
        gap = 1.0 - self._c(x) * _pair(x, x, dim)
        return gap.clamp_min(torch.finfo(x.dtype).eps)

    def _haversine(self, x: Tensor, y: Tensor, dim: int) -> Tensor:
        """Return ``sinh^2`` of half the distance in units of the radius."""
        d = y - x
        return self._c(x) * _pair(d, d, dim) / (self._gap(x, dim) * self._gap(y, dim))

    def _between(self, x: Tensor, y: Tensor, dim: int) -> Tensor:
        """Return the Moebius sum of ``-x`` and ``y``."""
        gap, d = self._gap(x, dim), y - x
        square = self._c(x) * _pair(d, d, dim)
        return (gap * d - square * x) / (gap * self._gap(y, dim) + square)

    def _add(self, x: Tensor, y: Tensor, dim: int) -> Tensor:
        return self._between(-x, y, dim)

    def _bent(self, half: Tensor, dim: int) -> Tensor:
        """Return the point at the end of the geodesic from the origin."""
        return half * _ratio(torch.tanh, self._c(half) * _pair(half, half, dim))

    def _kept(self, x: Tensor, project: bool, dim: int) -> Tensor:
        return self.projx(x, dim=dim) if project else x


# The metric is geoopt's, and so are the closed forms; named, so that subclasses that
# have another metric are told apart by their own formulas.
flat.register(PoincareBall, flat.dispatch(geoopt.PoincareBall))
