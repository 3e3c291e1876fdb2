r"""Positive definite matrices, measured by their logarithms.

The matrix logarithm is an isometry to the symmetric matrices with the Euclidean metric.
With ``x = Q diag(l) Q^T`` its derivative is, after Daleckii and Krein,

    D log(x)[u] = Q (G o (Q^T u Q)) Q^T,      G_ij = (log l_i - log l_j) / (l_i - l_j),

self-adjoint for the Euclidean inner product of symmetric matrices. Cost: O(n^3).
"""

import torch
from torch import Tensor

from riemannian_modules.manifolds.boundary import definite, inside, singular
from riemannian_modules.manifolds.drawing import Device, Drawing, Dtype, Shape
from riemannian_modules.manifolds.riesz import dimension, flat, root, root_adjoint

__all__ = ["LogEuclideanSPD"]


def _sym(a: Tensor) -> Tensor:
    return 0.5 * (a + a.mT)


def _made_of(values: Tensor, vectors: Tensor) -> Tensor:
    return _sym((vectors * values.unsqueeze(-2)) @ vectors.mT)


def _log(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    return _made_of(values.log(), vectors)


def _exp(a: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(a)
    return _made_of(values.exp(), vectors)


def _slopes(values: Tensor) -> Tensor:
    """Return G without its cancellation: ``(t / sinh t) / sqrt(l_i l_j)``."""
    logs = values.log()
    t = 0.5 * (logs.unsqueeze(-1) - logs.unsqueeze(-2))
    ratio = torch.where(t == 0, 1.0, t / torch.sinh(torch.where(t == 0, 1.0, t)))
    return ratio / torch.exp(0.5 * (logs.unsqueeze(-1) + logs.unsqueeze(-2)))


def _apply(x: Tensor, u: Tensor, power: int) -> Tensor:
    """Return ``D log(x)`` to the given power, applied to the symmetric part of u."""
    values, vectors = torch.linalg.eigh(x)
    turned = vectors.mT @ _sym(u) @ vectors
    return _sym(vectors @ (_slopes(values) ** power * turned) @ vectors.mT)


class LogEuclideanSPD(Drawing):
    """Symmetric positive definite matrices with the log-Euclidean metric.

    ``g(u, v) = <D log(x)[u], D log(x)[v]>`` (Arsigny, Fillard, Pennec & Ayache, 2007).
    It is flat, so geodesics, distances and the parallel transport, which does not
    depend on the path, have closed forms. Unlike the affine-invariant metric it is only
    invariant under rotations, scalings and inversion. It stands in for
    ``geoopt.SymmetricPositiveDefinite("LEM")``, which takes nothing from this metric
    but its distance. The retraction is the exponential map. The logarithms of random
    points are symmetric and normal, of spectral norm ~1.4; the origin is the identity.

    >>> x, y = torch.eye(2), torch.diag(torch.tensor([1.0, 2.718281828]))
    >>> LogEuclideanSPD().dist(x, y)
    tensor(1.)
    """

    name = "LogEuclideanSPD"
    ndim = 2
    reversible = False

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the inner product of the derivatives of the logarithm."""
        u = _apply(x, u, 1)
        v = u if v is None else _apply(x, v, 1)
        return (u * v).sum((-1, -2), keepdim=keepdim)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        return _apply(x, u, -2)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the symmetric part of ``u``."""
        return _sym(u).expand(torch.broadcast_shapes(x.shape, u.shape))

    def projx(self, x: Tensor) -> Tensor:
        """Return the symmetric part with its eigenvalues made positive, away from 0.

        They become their absolute values, as on geoopt's SPD, and those below the
        square root of the rounding unit times the largest (3.5e-4 of it in float32,
        1.5e-8 in float64) are raised to that: on the boundary the metric, which has
        squares of inverse eigenvalues, is infinite. The zero matrix stays as it is and
        is no point.
        """
        values, vectors = torch.linalg.eigh(_sym(x))
        sizes = values.abs()
        floor = torch.finfo(x.dtype).eps ** 0.5 * sizes.amax(-1, keepdim=True)
        return _made_of(sizes.maximum(floor), vectors)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Return ``exp(log x + D log(x)[u])``: follow the geodesic; exact."""
        return _exp(_log(x) + _apply(x, u, 1))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return :meth:`expmap`."""
        return self.expmap(x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at ``x`` that leads to ``y``."""
        return _apply(x, _log(y) - _log(x), -1)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return ``|log y - log x|``."""
        return torch.linalg.matrix_norm(_log(y) - _log(x), keepdim=keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the squared distance, smooth also where ``x`` is ``y``."""
        return (_log(y) - _log(x)).square().sum((-1, -2), keepdim=keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` in parallel from ``x`` to ``y``; an isometry."""
        return _apply(y, _apply(x, v, 1), -1)

    def _random(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        gaussian = torch.randn(shape, dtype=dtype, device=device)
        return _exp(_sym(gaussian) / shape[-1] ** 0.5)

    def _origin(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        eye = torch.eye(shape[-1], dtype=dtype, device=device)
        return eye.expand(shape).clone()

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 1:
            return False, f"`{name}` should be square matrices, got {tuple(shape)}"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not torch.allclose(x, x.mT, atol=atol, rtol=rtol):
            return False, f"`x != x^T` with atol={atol}, rtol={rtol}"
        problem = singular(x)
        return problem is None, problem

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not torch.allclose(u, u.mT, atol=atol, rtol=rtol):
            return False, f"`u != u^T` with atol={atol}, rtol={rtol}"
        return True, None


@inside.register(LogEuclideanSPD)
def _(manifold: LogEuclideanSPD, x: Tensor) -> Tensor | None:
    return definite(x)


@flat.register(LogEuclideanSPD)
def _(manifold: LogEuclideanSPD, x: Tensor, u: Tensor) -> Tensor:
    return _apply(x, u, 2)


@root.register(LogEuclideanSPD)
@root_adjoint.register(LogEuclideanSPD)
def _(manifold: LogEuclideanSPD, x: Tensor, z: Tensor) -> Tensor:
    return _apply(x, z, -1)


@dimension.register(LogEuclideanSPD)
def _(manifold: LogEuclideanSPD, x: Tensor) -> int:
    n = x.shape[-1]
    return (x.numel() // (n * n)) * (n * (n + 1) // 2)
