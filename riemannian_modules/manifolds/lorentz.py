r"""Hyperbolic space as a hyperboloid, accurate at small distances and far out.

A point is ``(x_0, s)`` with ``x_0 = sqrt(k + |s|^2)``, a tangent vector ``(u_0, w)``
with ``u_0 = <s, w> / x_0``. The spatial parts s and w determine both, and the Minkowski
form of tangent vectors is

    -u_0 v_0 + <w, w'> = <w_perp, w'_perp> + (k / x_0^2) w_rad w'_rad

with the parts of w along s and at right angles to it. The left side subtracts numbers
that are ``x_0^2 / k`` times larger than the result; everything here uses the right.
"""

import geoopt
import torch
from geoopt.utils import size2shape
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds.riesz import dimension, flat, root, root_adjoint

__all__ = ["Lorentz"]


def _pair(a: Tensor, b: Tensor) -> Tensor:
    return (a * b).sum(-1, keepdim=True)


def _sinhc(squared: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``cosh t`` and ``sinh(t) / t`` for ``t^2``, smooth at 0."""
    positive = squared > 0
    t = torch.where(positive, squared, 1.0).sqrt()
    return (
        torch.where(positive, torch.cosh(t), 1.0),
        torch.where(positive, torch.sinh(t) / t, 1.0),
    )


def _half_angle(q: Tensor) -> Tensor:
    """Return t with ``sinh^2(t / 2) = q``; its slope at 0 is taken as 0."""
    positive = q > 0
    half = torch.asinh(torch.where(positive, q, 1.0).sqrt())
    return torch.where(positive, 2.0 * half, 0.0)


class Lorentz(geoopt.Lorentz):  # type: ignore[misc]
    """Rows x with ``<x, x>_L = -k`` and ``x_0 > 0``: the curvature is ``-1 / k``.

    Replaces ``geoopt.Lorentz``, whose ``egrad2rgrad`` overwrites its argument, whose
    ``retr(x, 0)`` is not ``x``, and whose ``logmap`` and ``transp`` are wrong between
    points closer than 1e-4. The retraction is the exponential map, :meth:`transp` is
    the parallel transport, an isometry.

    Args:
        k: minus the reciprocal of the curvature; fixed.

    Raises:
        ManifoldContractError: ``k`` is not positive.

    >>> x = torch.tensor([1.25, 0.75])
    >>> Lorentz().egrad2rgrad(x, torch.tensor([0.0, 1.0]))
    tensor([0.9375, 1.5625])
    """

    reversible = False

    def __init__(self, k: float | Tensor = 1.0) -> None:
        if not float(k) > 0.0:
            raise ManifoldContractError(
                f"Lorentz(k={float(k)}): k must be positive, the curvature is -1 / k"
            )
        super().__init__(k)

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the Minkowski form of tangent vectors, from their spatial parts."""
        direction, time = self._frame(x)
        u = u[..., 1:]
        v = u if v is None else v[..., 1:]
        along, other = _pair(direction, u), _pair(direction, v)
        across = _pair(u - along * direction, v - other * direction)
        total = across + (self._k(x) / time.square()) * along * other
        return total if keepdim else total.squeeze(-1)

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the norm of tangent vectors."""
        return self.inner(x, u, keepdim=keepdim).sqrt()

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        return self._tangent(x, u[..., 1:] + x[..., 1:] * (_pair(x, u) / self._k(x)))

    def proju(self, x: Tensor, v: Tensor) -> Tensor:
        """Return the part of ``v`` that is Minkowski-orthogonal to ``x``.

        The projection magnifies the normal part by ``x_0^2 / k``, so what is left of
        it by rounding is taken as none: far from the origin, too, tangent vectors are
        left alone.
        """
        space, time = _pair(x[..., 1:], v[..., 1:]), x[..., :1] * v[..., :1]
        sizes = _pair(x.abs(), v.abs())
        normal = space - time
        noise = 4.0 * torch.finfo(v.dtype).eps * sizes
        rounding = torch.where(normal.abs() <= noise, normal, 0.0)
        normal = normal - rounding.detach()  # whose derivative is no rounding
        return self._tangent(x, v[..., 1:] + x[..., 1:] * (normal / self._k(x)))

    def projx(self, x: Tensor) -> Tensor:
        """Return the point with the spatial part of ``x``."""
        return self._point(x[..., 1:])

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic; exact."""
        cosh, sinhc = _sinhc(self.inner(x, u, keepdim=True) / self._k(x))
        return self._point(cosh * x[..., 1:] + sinhc * u[..., 1:])

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return :meth:`expmap`."""
        return self.expmap(x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at ``x`` that leads to ``y``."""
        q = self._haversine(x, y)
        sinhc = _sinhc(_half_angle(q).square())[1]
        ahead = (y - x)[..., 1:] - 2.0 * q * x[..., 1:]
        return self._tangent(x, ahead / sinhc)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the length of the geodesic between ``x`` and ``y``.

        From ``sinh^2(d / 2) = sinh^2((a - b) / 2) + sinh(a) sinh(b) sin^2(phi / 2)``,
        the haversine formula for k = 1, distances a and b from the origin and the
        angle phi there, in which nothing cancels.
        """
        distance: Tensor = self._k(x).sqrt() * _half_angle(self._haversine(x, y))
        return distance if keepdim else distance.squeeze(-1)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the squared distance, with two derivatives where ``x`` is ``y``.

        Where a point is the origin of the space its second ones are not available.
        """
        q = self._haversine(x, y)
        square = torch.where(q > 0, _half_angle(q).square(), 4.0 * q) * self._k(x)
        return square if keepdim else square.squeeze(-1)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` in parallel along the geodesic from ``x`` to ``y``; exact."""
        share = self._form(x, y, v) / (2.0 * self._k(x) * (1.0 + self._haversine(x, y)))
        return self._tangent(y, v[..., 1:] + share * (x + y)[..., 1:])

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` in parallel along ``expmap(x, t u)`` to ``t = 1``."""
        return self.transp(x, self.expmap(x, u), v)

    def geodesic_unit(self, t: Tensor, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic with the unit tangent vector ``u`` for the time ``t``."""
        return self.expmap(x, t * u)

    def dist0(self, x: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the distance from the origin."""
        return self.dist(self._zero(x), x, keepdim=keepdim)

    def expmap0(self, u: Tensor) -> Tensor:
        """Return :meth:`expmap` at the origin."""
        return self.expmap(self._zero(u), u)

    def logmap0(self, y: Tensor) -> Tensor:
        """Return :meth:`logmap` from the origin to ``y``."""
        return self.logmap(self._zero(y), y)

    def logmap0back(self, x: Tensor) -> Tensor:
        """Return :meth:`logmap` from ``x`` to the origin."""
        return self.logmap(x, self._zero(x))

    def transp0(self, y: Tensor, u: Tensor) -> Tensor:
        """Return :meth:`transp` from the origin to ``y``."""
        return self.transp(self._zero(y), y, u)

    def transp0back(self, x: Tensor, u: Tensor) -> Tensor:
        """Return :meth:`transp` from ``x`` to the origin."""
        return self.transp(x, self._zero(x), u)

    def random_normal(
        self,
        *size: int,
        mean: float = 0.0,
        std: float = 1.0,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> geoopt.ManifoldTensor:
        """Draw normal tangent vectors at the origin and follow their geodesics.

        Args:
            *size: shape.
            mean: mean of each spatial entry of the tangent vectors.
            std: standard deviation of each.
            dtype: data type.
            device: device.

        Returns:
            Points of the manifold.
        """
        self._assert_check_shape(size2shape(*size), "x")
        tangent = mean + std * torch.randn(*size, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(self.expmap0(tangent), manifold=self)

    def random(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> geoopt.ManifoldTensor:
        """Draw points about ``sqrt(k)`` from the origin, in every dimension.

        Args:
            *size: shape.
            dtype: data type.
            device: device.

        Returns:
            :meth:`random_normal` with the standard deviation ``sqrt(k / d)``.
        """
        self._assert_check_shape(shape := size2shape(*size), "x")
        std = (float(self.k) / (shape[-1] - 1)) ** 0.5
        return self.random_normal(*size, std=std, dtype=dtype, device=device)

    def _k(self, x: Tensor) -> Tensor:
        # Before any root of it, which would be rounded to k's own data type.
        return self.k.to(x.dtype)

    def _zero(self, x: Tensor) -> Tensor:
        return self._point(torch.zeros_like(x[..., 1:]))

    def _time(self, space: Tensor) -> Tensor:
        return (self._k(space) + space.square().sum(-1, keepdim=True)).sqrt()

    def _point(self, space: Tensor) -> Tensor:
        return torch.cat((self._time(space), space), dim=-1)

    def _tangent(self, x: Tensor, space: Tensor) -> Tensor:
        s = x[..., 1:]
        return torch.cat((_pair(s, space) / self._time(s), space), dim=-1)

    def _frame(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the direction of the spatial part (0 at the origin) and ``x_0``."""
        s = x[..., 1:]
        radius = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        return s / radius.clamp_min(torch.finfo(s.dtype).tiny), self._time(s)

    def _form(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Return the Minkowski form of ``y`` and a tangent vector at ``x``.

        From the radii and directions of the points, in which nothing cancels.
        """
        (n, time), (m, _), w = self._frame(x), self._frame(y), v[..., 1:]
        a = torch.linalg.vector_norm(x[..., 1:], dim=-1, keepdim=True)
        b = torch.linalg.vector_norm(y[..., 1:], dim=-1, keepdim=True)
        k, turn, along = self._k(x), m - n, _pair(n, w)
        outward = torch.sinh(torch.asinh(b / k.sqrt()) - torch.asinh(a / k.sqrt()))
        radial = k * outward / time - 0.5 * b * turn.square().sum(-1, keepdim=True)
        form = along * radial + b * _pair(turn, w - along * n)
        # As in the haversine: at the origin there is no direction.
        ahead = y - x
        plain = _pair(ahead[..., 1:], w) - ahead[..., :1] * v[..., :1]
        return torch.where((a > 0) & (b > 0), form, plain)

    def _haversine(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``sinh^2(d / 2 sqrt(k))`` for the distance d."""
        s, t = x[..., 1:], y[..., 1:]
        a = torch.linalg.vector_norm(s, dim=-1, keepdim=True)
        b = torch.linalg.vector_norm(t, dim=-1, keepdim=True)
        unit = torch.finfo(s.dtype).tiny
        turn = s / a.clamp_min(unit) - t / b.clamp_min(unit)
        # At the origin there is no direction; there the plain form has the slope.
        angle = torch.where(
            (a > 0) & (b > 0), 0.5 * a * b * turn.square().sum(-1, True), -_pair(s, t)
        )
        scale = self._k(x).sqrt()
        radial = torch.sinh(0.5 * (torch.asinh(a / scale) - torch.asinh(b / scale)))
        return radial.square() + angle / (2.0 * self._k(x))

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if len(shape) < 1 or shape[-1] < 2:
            return False, f"`{name}` should have rows of 2 entries or more: {shape}"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(x.isfinite().all()):
            return False, "not all entries are finite"
        # Not the form <x, x>, in which a far point has lost all its digits.
        if not torch.allclose(x[..., :1], self._time(x[..., 1:]), atol=atol, rtol=rtol):
            return False, f"`x_0 != sqrt(k + |x_1:|^2)` with atol={atol}, rtol={rtol}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        time = self._tangent(x, u[..., 1:])[..., :1]
        if not torch.allclose(u[..., :1], time, atol=atol, rtol=rtol):
            return False, f"`<x, u>_L != 0` with atol={atol}, rtol={rtol}"
        return True, None


@flat.register(Lorentz)
def _(manifold: Lorentz, x: Tensor, u: Tensor) -> Tensor:
    direction, time = manifold._frame(x)
    along = _pair(direction, u[..., 1:])
    across = u[..., 1:] - along * direction
    space = across + (manifold._k(x) / time.square()) * along * direction
    return torch.cat((torch.zeros_like(along), space), dim=-1)


@root.register(Lorentz)
def _(manifold: Lorentz, x: Tensor, z: Tensor) -> Tensor:
    # The boost that moves the origin to x, applied to tangent vectors there.
    scale, s = manifold._k(x).sqrt(), x[..., 1:]
    along = _pair(s, z[..., 1:]) / scale
    space = z[..., 1:] + s * (along / (scale + manifold._time(s)))
    return torch.cat((along, space), dim=-1)


@root_adjoint.register(Lorentz)
def _(manifold: Lorentz, x: Tensor, e: Tensor) -> Tensor:
    scale, s = manifold._k(x).sqrt(), x[..., 1:]
    share = _pair(s, e[..., 1:]) / (scale + manifold._time(s)) + e[..., :1]
    space = e[..., 1:] + s * (share / scale)
    return torch.cat((torch.zeros_like(share), space), dim=-1)


@dimension.register(Lorentz)
def _(manifold: Lorentz, x: Tensor) -> int:
    return x.numel() - x.numel() // x.shape[-1]
