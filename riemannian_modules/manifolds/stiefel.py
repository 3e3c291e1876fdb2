r"""Stiefel manifolds in the orientation that fits: orthonormal columns or rows.

Both metrics share one description of a tangent vector. With ``Q`` an orthonormal
completion of ``X`` in the span of ``[X, U]``,

    U = X A + Q B,        A = X^T U skew,        B = Q^T U,

and geodesics and the Cayley map are a function of a small matrix made of A and B
(Edelman, Arias & Smith, 1998; Wen & Yin, 2013; Hueper, Markina & Silva Leite, 2021),
so their cost is O(n k^2), not O(n^3).
"""

import math
from collections.abc import Callable

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds.drawing import Device, Drawing, Dtype, Shape
from riemannian_modules.manifolds.polar import polar

__all__ = ["CanonicalStiefel", "Stiefel", "cayley_step", "qr_step"]


def _is_wide(x: Tensor) -> bool:
    return x.shape[-2] < x.shape[-1]


def _upright(kernel: Callable[..., Tensor], x: Tensor, *vectors: Tensor) -> Tensor:
    """Run a kernel for tall matrices on either orientation."""
    if _is_wide(x):
        return kernel(x.mT, *(v.mT for v in vectors)).mT
    return kernel(x, *vectors)


def _skew(a: Tensor) -> Tensor:
    return 0.5 * (a - a.mT)


def _orthonormalise(a: Tensor) -> Tensor:
    """Return the Q of the QR decomposition whose R has a positive diagonal."""
    # There is no QR in half precision.
    q, r = torch.linalg.qr(a.to(torch.promote_types(a.dtype, torch.float32)))
    signed: Tensor = (q * _signs(r).unsqueeze(-2)).to(a.dtype)
    return signed


def _signs(r: Tensor) -> Tensor:
    diagonal = r.diagonal(dim1=-2, dim2=-1)
    return torch.where(diagonal < 0, -torch.ones_like(diagonal), 1.0)


def _tangent_part(x: Tensor, u: Tensor) -> Tensor:
    xu = x.mT @ u
    return u - 0.5 * x @ (xu + xu.mT)


def _canonical_riesz(x: Tensor, e: Tensor) -> Tensor:
    return e - x @ (e.mT @ x)


def _qr_step(x: Tensor, u: Tensor) -> Tensor:
    return _orthonormalise(x + u)


def _coordinates(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``[X Q]``, A and B.

    The completion comes from a QR of ``[X, U]`` as a whole: a QR of the normal part
    alone is not orthogonal to X where that part is rank deficient. It also cleans X
    of the rounding of earlier steps.
    """
    k = x.shape[-1]
    normal = u - x @ (x.mT @ u)
    frame, r = torch.linalg.qr(torch.cat((x.expand_as(normal), normal), dim=-1))
    x = frame[..., :k] * _signs(r[..., :k, :k]).unsqueeze(-2)
    q = frame[..., k:]
    return torch.cat((x, q), dim=-1), _skew(x.mT @ u), q.mT @ u


def _small_generator(a: Tensor, b: Tensor) -> Tensor:
    corner = b.new_zeros(*b.shape[:-2], b.shape[-2], b.shape[-2])
    top = torch.cat((a, -b.mT), dim=-1)
    return torch.cat((top, torch.cat((b, corner), dim=-1)), dim=-2)


def _rotation(skew: Tensor) -> Tensor:
    """Return the exponential of a skew matrix, orthogonal to rounding.

    torch.matrix_exp loses the norm of its argument times the rounding unit, so it
    always works in float64: float32 results are orthogonal to rounding up to norms of
    1e6 and more, float64 ones to 2e-15 times the norm. The shift by the identity keeps
    it (2.13) away from norms of 0.03 to 0.05, where it is only good to 1e-11.
    """
    wide = skew.to(torch.float64)
    eye = torch.eye(skew.shape[-1], dtype=wide.dtype, device=skew.device)
    return (torch.matrix_exp(wide + eye) / math.e).to(skew.dtype)


def _cayley_step(x: Tensor, u: Tensor) -> Tensor:
    frame, a, b = _coordinates(x, u)
    half = 0.5 * _small_generator(a, b)
    eye = torch.eye(half.shape[-1], dtype=half.dtype, device=half.device)
    k = x.shape[-1]
    moved: Tensor = frame @ torch.linalg.solve(eye - half, (eye + half)[..., :k])
    return moved


def _canonical_geodesic(x: Tensor, u: Tensor) -> Tensor:
    frame, a, b = _coordinates(x, u)
    rotation = _rotation(_small_generator(a, b))
    return frame @ rotation[..., : x.shape[-1]]


def _euclidean_geodesic(x: Tensor, u: Tensor) -> Tensor:
    frame, a, b = _coordinates(x, u)
    rotation = _rotation(_small_generator(2.0 * a, b))
    return frame @ rotation[..., : x.shape[-1]] @ _rotation(-a)


def qr_step(x: Tensor, u: Tensor) -> Tensor:
    """Return the orthonormal factor of ``x + u``, with the signs that continue ``x``.

    Args:
        x: points of a Stiefel manifold, ``(*batch, a, b)``, either orientation.
        u: tangent vectors at ``x``.

    Returns:
        Points of the shape of ``x + u``. Agrees with the geodesics to first order.
        Cost: O(n k^2) for n the larger and k the smaller side.
    """
    return _upright(_qr_step, x, u)


def cayley_step(x: Tensor, u: Tensor) -> Tensor:
    """Return ``(I - W/2)^-1 (I + W/2) x`` for the skew W that generates ``u``.

    ``W = P u x^T - x u^T P`` with ``P = I - x x^T / 2`` (Wen & Yin, 2013), reduced to
    a solve in the span of x and u.

    Args:
        x: points of a Stiefel manifold, ``(*batch, a, b)``, either orientation.
        u: tangent vectors at ``x``.

    Returns:
        Points of the shape of ``x + u``. Agrees to second order with the geodesics of
        the canonical metric, to first order with those of the Euclidean metric. Cost:
        O(n k^2) for n the larger and k the smaller side.
    """
    return _upright(_cayley_step, x, u)


class _EitherOrientation(Drawing, geoopt.Stiefel):  # type: ignore[misc]
    """What does not depend on the metric: points, tangent vectors, projections."""

    reversible = False

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest point of the manifold: the polar factor of ``x``."""
        return _upright(polar, x)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the orthogonal projection of ``u`` on the tangent space at ``x``."""
        return _upright(_tangent_part, x, u)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` from ``x`` to ``y`` by projection; not an isometry."""
        return self.proju(y, v)

    def _random(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        gaussian = torch.randn(shape, dtype=dtype, device=device)
        return _upright(_orthonormalise, gaussian)

    random_naive = Drawing.random

    def _origin(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        eye = torch.eye(*shape[-2:], dtype=dtype, device=device)
        return eye.expand(shape).clone()

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if len(shape) < 2 or 0 in shape[-2:]:
            return False, f"`{name}` should be matrices, got shape {tuple(shape)}"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        gram = x @ x.mT if _is_wide(x) else x.mT @ x
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        if not torch.allclose(gram, eye.expand_as(gram), atol=atol, rtol=rtol):
            side = "X X^T" if _is_wide(x) else "X^T X"
            return False, f"`{side} != I` with atol={atol}, rtol={rtol}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        xu = x @ u.mT if _is_wide(x) else x.mT @ u
        if not torch.allclose(xu, -xu.mT, atol=atol, rtol=rtol):
            side = "X U^T" if _is_wide(x) else "X^T U"
            return False, f"`{side}` is not skew with atol={atol}, rtol={rtol}"
        return True, None


class Stiefel(_EitherOrientation, geoopt.EuclideanStiefel):  # type: ignore[misc]
    """Matrices with orthonormal columns (tall) or rows (wide), Euclidean metric.

    ``geoopt.EuclideanStiefel`` for both orientations: a weight of shape ``(32, 64)``
    has orthonormal rows. The default retraction is the QR decomposition with positive
    diagonal (Absil, Mahony & Sepulchre, 2008, example 4.1.3). Random points are
    uniform (Haar), the origin is the leading block of the identity.

    >>> point = Stiefel().random(2, 3, dtype=torch.float64)
    >>> torch.allclose(point @ point.mT, torch.eye(2, dtype=torch.float64))
    True
    """

    name = "Stiefel"

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        return self.proju(x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return :func:`qr_step`; first order."""
        return qr_step(x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic of the Euclidean metric; exact, O(n k^2)."""
        return _upright(_euclidean_geodesic, x, u)


class CanonicalStiefel(_EitherOrientation):
    """Matrices with orthonormal columns (tall) or rows (wide), canonical metric.

    ``g(u, v) = tr u^T (I - x x^T / 2) v`` on tall matrices (Edelman, Arias & Smith,
    1998). Replaces ``geoopt.CanonicalStiefel``, whose ``retr`` and ``expmap`` move
    with twice the speed in the directions ``x A`` and whose ``proju`` is not a
    projection. The default retraction is the Cayley map. Random points are uniform
    (Haar), the origin is the leading block of the identity.

    >>> x = torch.eye(3, 2)
    >>> CanonicalStiefel().egrad2rgrad(x, torch.ones(3, 2))
    tensor([[0., 0.],
            [0., 0.],
            [1., 1.]])
    """

    name = "CanonicalStiefel"

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the canonical inner product of tangent vectors."""
        if _is_wide(x):
            x, u, v = x.mT, u.mT, None if v is None else v.mT
        xu = x.mT @ u
        v, xv = (u, xu) if v is None else (v, x.mT @ v)
        ambient = (u * v).sum((-1, -2), keepdim=keepdim)
        return ambient - 0.5 * (xu * xv).sum((-1, -2), keepdim=keepdim)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        return _upright(_canonical_riesz, x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return :func:`cayley_step`; second order."""
        return cayley_step(x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic of the canonical metric; exact, O(n k^2)."""
        return _upright(_canonical_geodesic, x, u)
