"""Positive numbers, entry by entry, measured by their logarithms."""

import torch
from torch import Tensor

from riemannian_modules.manifolds.boundary import inside
from riemannian_modules.manifolds.drawing import Device, Drawing, Dtype, Shape
from riemannian_modules.manifolds.riesz import dimension, flat, root, root_adjoint

__all__ = ["Positive"]


def _root_ratio(x: Tensor, y: Tensor) -> Tensor:
    # y / x itself may be too large or too small for a number.
    return y.sqrt() / x.sqrt()


def _log_ratio(x: Tensor, y: Tensor) -> Tensor:
    """Return ``log(y / x)``, to all digits of the difference of near numbers."""
    near = (y > 0.5 * x) & (y < 2.0 * x)
    change = torch.where(near, y - x, 0.0) / x
    return torch.where(near, change.log1p(), 2.0 * _root_ratio(x, y).log())


class Positive(Drawing):
    """Tensors of any shape with positive entries, metric ``sum u v / x^2``.

    The logarithm is an isometry to Euclidean space, so everything has a closed form
    (Boumal, 2023, chapter 11). A step never leaves the manifold, and what counts is
    by which factor a number changes. The logarithms of random entries are standard
    normal; the origin is ones.

    Args:
        ndim: number of trailing dimensions that make up one point, as in
            ``geoopt.Euclidean``; 0: every entry has its own ``inner`` and ``dist``.

    >>> x = torch.tensor([1.0, 10.0])
    >>> Positive().egrad2rgrad(x, torch.ones(2)), Positive().retr(x, -10.0 * x)
    (tensor([  1., 100.]), tensor([ 41., 410.]))
    """

    name = "Positive"
    ndim = 0
    reversible = True

    def __init__(self, ndim: int = 0) -> None:
        super().__init__()
        self.ndim = ndim

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return ``u v / x^2``, summed over the dimensions of a point."""
        u = u / x
        return self._sum(u * (u if v is None else v / x), keepdim)

    def projx(self, x: Tensor) -> Tensor:
        """Return ``x`` with smaller entries raised to a positive floor.

        The positive numbers are open, so there is no nearest one. The floor is the
        root of the least normal number, whose square is still positive.
        """
        return x.clamp_min(torch.finfo(x.dtype).tiny ** 0.5)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return ``u``: every vector is tangent."""
        return u.expand(torch.broadcast_shapes(x.shape, u.shape))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector ``x^2 u`` that represents the covector ``u``."""
        return x * (x * u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return ``x + u + u^2 / (2 x)``, which is at least ``x / 2``; second order.

        The polynomial retraction of Jeuris, Vandebril & Vandereycken (2012).
        """
        moved = x + u
        return 0.5 * x + 0.5 * moved * (moved / x)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Return ``x exp(u / x)``; exact."""
        half = torch.exp(0.5 * u / x)
        return x * half * half

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return ``x log(y / x)``."""
        return x * _log_ratio(x, y)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return ``|log(y / x)|``, over the dimensions of a point."""
        logs = _log_ratio(x, y)
        if self.ndim == 0:
            return logs.abs()
        return torch.linalg.vector_norm(logs, dim=self._dims, keepdim=keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the squared distance, smooth also where ``x`` is ``y``."""
        return self._sum(_log_ratio(x, y).square(), keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` in parallel: ``v y / x``, an isometry."""
        half = _root_ratio(x, y)
        return v * half * half

    def _random(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        return torch.randn(shape, dtype=dtype, device=device).exp()

    def _origin(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    @property
    def _dims(self) -> tuple[int, ...]:
        return tuple(range(-self.ndim, 0))

    def _sum(self, values: Tensor, keepdim: bool) -> Tensor:
        return values.sum(self._dims, keepdim=keepdim) if self.ndim else values

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(x.isfinite().all()):
            return False, "not all entries are finite"
        if not bool((x > 0).all()):
            return False, f"`x > 0` fails, its least entry is {float(x.min())}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        return True, None


@inside.register(Positive)
def _(manifold: Positive, x: Tensor) -> Tensor | None:
    # A factor may be too small for a number.
    return (x.detach() > 0).all()


@flat.register(Positive)
def _(manifold: Positive, x: Tensor, u: Tensor) -> Tensor:
    return u / x / x


@root.register(Positive)
@root_adjoint.register(Positive)
def _(manifold: Positive, x: Tensor, z: Tensor) -> Tensor:
    return x * z


@dimension.register(Positive)
def _(manifold: Positive, x: Tensor) -> int:
    return x.numel()
