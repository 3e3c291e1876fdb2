r"""Second derivatives on base manifolds: where a geodesic bends, and what that adds.

A function on a manifold is known by its values along curves. Along the geodesic from x
with velocity u its second derivative is ``D2f[u, u] + df(a)``, with the acceleration
``a`` of the geodesic in the coordinates that hold the points. Everything is about the
manifold's own metric, not a layer metric.

Both functions are :func:`functools.singledispatch` functions on the manifold's class: a
manifold of your own gets a Hessian with one ``geodesic_acceleration.register``.
"""

from collections.abc import Callable
from functools import singledispatch

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds.birkhoff import BirkhoffPolytope
from riemannian_modules.manifolds.contract import MetricView
from riemannian_modules.manifolds.fixed_rank import FixedRank
from riemannian_modules.manifolds.grassmann import Grassmann
from riemannian_modules.manifolds.log_euclidean import LogEuclideanSPD
from riemannian_modules.manifolds.lorentz import Lorentz
from riemannian_modules.manifolds.oblique import Oblique
from riemannian_modules.manifolds.positive import Positive
from riemannian_modules.manifolds.reshaped import Reshaped
from riemannian_modules.manifolds.rotations import SpecialOrthogonal
from riemannian_modules.manifolds.scaled import Scaled
from riemannian_modules.manifolds.stiefel import CanonicalStiefel, _is_wide, _upright

__all__ = ["base_hessian", "geodesic_acceleration", "hessian_correction"]


@singledispatch
def geodesic_acceleration(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    """Second derivative at 0 of the geodesic through ``x`` along ``u``.

    An ambient vector of the shape of ``u``, in the coordinates of the points, so it is
    not tangent in general; a quadratic and differentiable function of ``u``.
    Implements :eq:`geodesic-acceleration`.

    Args:
        manifold: base manifold; of a metric view, the manifold below it.
        x: points, ``(*batch, *shape)``.
        u: tangent vectors.

    Raises:
        NotImplementedError: no formula is known for this class.

    >>> x, u = torch.tensor([0.6, 0.8]), torch.tensor([-0.8, 0.6])
    >>> geodesic_acceleration(geoopt.Sphere(), x, 2.0 * u)
    tensor([-2.4000, -3.2000])
    """
    kind = type(manifold)
    raise NotImplementedError(
        f"the acceleration of geodesics is not known for {kind.__module__}."
        f"{kind.__name__}, so it has no Hessian here; use an optimizer of first order, "
        "or teach it with riemannian_modules.manifolds.acceleration."
        f"geodesic_acceleration.register({kind.__name__})"
    )


@singledispatch
def hessian_correction(
    manifold: geoopt.Manifold, x: Tensor, u: Tensor, e: Tensor
) -> Tensor:
    """Return the covector ``v -> e(a_x(u, v))`` that curvature adds to a Hessian.

    Half the derivative by u of ``<e, geodesic_acceleration(x, u)>``, which is the
    quadratic form polarised; exact. Implements the last term of :eq:`base-hessian`.

    Args:
        manifold: base manifold.
        x: point, ``(*batch, *shape)``.
        u: tangent vectors at ``x``.
        e: ambient covectors, the ordinary gradient of the function.

    Returns:
        Ambient covectors of the shape of ``u``; they count on tangent vectors only.

    Raises:
        NotImplementedError: no formula is known for this class.
    """
    with torch.enable_grad():
        velocity = u.detach().clone().requires_grad_()
        bend = geodesic_acceleration(manifold, x.detach(), velocity)
        if not bend.requires_grad:
            return torch.zeros_like(u)
        value = (e.detach() * bend).sum()
        (covector,) = torch.autograd.grad(value, velocity)
    return 0.5 * covector


def base_hessian(
    manifold: geoopt.Manifold, x: Tensor, u: Tensor, e: Tensor, second: Tensor
) -> Tensor:
    """Return the covector ``v -> Hess f(u, v)`` of the manifold's own connection.

    Implements :eq:`base-hessian`. The Hessian as a tangent vector is its image under
    the Riesz map of a metric: the manifold's own, or a layer metric, in which it
    stays the same bilinear form.

    Args:
        manifold: base manifold.
        x: point, ``(*batch, *shape)``.
        u: tangent vectors at ``x``.
        e: ordinary gradient of the function at ``x``.
        second: ordinary Hessian of the function applied to ``u``.

    Returns:
        Ambient covectors of the shape of ``u``; they count on tangent vectors only.

    Raises:
        NotImplementedError: no formula is known for this class.

    >>> x, u = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    >>> e, second = torch.tensor([3.0, 0.0]), torch.zeros(2)  # of f = 3 x_0
    >>> float(base_hessian(geoopt.Sphere(), x, u, e, second) @ u)
    -3.0
    """
    return second + hessian_correction(manifold, x, u, e)


# --- closed forms


@geodesic_acceleration.register(geoopt.Euclidean)
def _(manifold: geoopt.Euclidean, x: Tensor, u: Tensor) -> Tensor:
    return torch.zeros_like(u)


@geodesic_acceleration.register(geoopt.Sphere)
def _(manifold: geoopt.Sphere, x: Tensor, u: Tensor) -> Tensor:
    return -x * u.square().sum(-1, keepdim=True)


@geodesic_acceleration.register(Oblique)
def _(manifold: Oblique, x: Tensor, u: Tensor) -> Tensor:
    return -x * u.square().sum(manifold.dim, keepdim=True)


@geodesic_acceleration.register(geoopt.EuclideanStiefel)
@geodesic_acceleration.register(SpecialOrthogonal)
@geodesic_acceleration.register(Grassmann)
def _(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    return -(u @ u.mT) @ x if _is_wide(x) else -x @ (u.mT @ u)


def _canonical(x: Tensor, u: Tensor) -> Tensor:
    xu = x.mT @ u
    return u @ xu - x @ (u.mT @ u + xu @ xu)


@geodesic_acceleration.register(CanonicalStiefel)
def _(manifold: CanonicalStiefel, x: Tensor, u: Tensor) -> Tensor:
    return _upright(_canonical, x, u)


@geodesic_acceleration.register(FixedRank)
def _(manifold: FixedRank, x: Tensor, u: Tensor) -> Tensor:
    left, values, right = torch.linalg.svd(x, full_matrices=False)
    k = manifold.rank
    left, values, right = left[..., :k], values[..., :k], right[..., :k, :].mT
    columns = u @ right
    columns = columns - left @ (left.mT @ columns)
    rows = left.mT @ u
    rows = rows - (rows @ right) @ right.mT
    return 2.0 * (columns / values.unsqueeze(-2)) @ rows


@geodesic_acceleration.register(Positive)
def _(manifold: Positive, x: Tensor, u: Tensor) -> Tensor:
    return u.square() / x


@geodesic_acceleration.register(geoopt.SymmetricPositiveDefinite)
def _(manifold: geoopt.SymmetricPositiveDefinite, x: Tensor, u: Tensor) -> Tensor:
    return u @ torch.linalg.solve(x, u)


@geodesic_acceleration.register(LogEuclideanSPD)
def _(manifold: LogEuclideanSPD, x: Tensor, u: Tensor) -> Tensor:
    # The corner of the exponential of [[a, w, 0], [0, a, w], [0, 0, a]] is half the
    # second derivative of the exponential at a along w (Najfeld & Havel, 1995).
    origin = torch.zeros_like(x)
    a = manifold.logmap(torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), x)
    w = _log_derivative(manifold, x, u)
    a, w, origin = torch.broadcast_tensors(a, w, origin)
    rows = ((a, w, origin), (origin, a, w), (origin, origin, a))
    whole = torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)
    n = x.shape[-1]
    return 2.0 * torch.matrix_exp(whole)[..., :n, 2 * n :]


def _log_derivative(manifold: LogEuclideanSPD, x: Tensor, u: Tensor) -> Tensor:
    # Transport to the identity, where the derivative of the logarithm is the identity.
    eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
    return manifold.transp(x, eye.expand_as(x), u)


@geodesic_acceleration.register(geoopt.Stereographic)
def _(manifold: geoopt.Stereographic, x: Tensor, u: Tensor) -> Tensor:
    # The metric is lambda^2 times the Euclidean one, and grad log lambda = -k lambda x.
    gradient = -manifold.k * manifold.lambda_x(x, keepdim=True) * x
    along = (gradient * u).sum(-1, keepdim=True)
    return gradient * u.square().sum(-1, keepdim=True) - 2.0 * along * u


@geodesic_acceleration.register(Lorentz)
def _(manifold: Lorentz, x: Tensor, u: Tensor) -> Tensor:
    return x * manifold.inner(x, u, keepdim=True) / manifold.k


@geodesic_acceleration.register(BirkhoffPolytope)
def _(manifold: BirkhoffPolytope, x: Tensor, u: Tensor) -> Tensor:
    # Positive numbers in the Fisher metric bend by u^2 / (2 x); the geodesics of a
    # linear piece of them by the tangent part of that.
    return manifold.proju(x, 0.5 * u.square() / x)


# --- manifolds made of others


@geodesic_acceleration.register(Scaled)
@geodesic_acceleration.register(MetricView)
def _(manifold: Scaled | MetricView, x: Tensor, u: Tensor) -> Tensor:
    return geodesic_acceleration(manifold.base, x, u)


@hessian_correction.register(Scaled)
@hessian_correction.register(MetricView)
def _(manifold: Scaled | MetricView, x: Tensor, u: Tensor, e: Tensor) -> Tensor:
    return hessian_correction(manifold.base, x, u, e)


@geodesic_acceleration.register(Reshaped)
def _(manifold: Reshaped, x: Tensor, u: Tensor) -> Tensor:
    bend = geodesic_acceleration(manifold.base, manifold._in(x), manifold._in(u))
    return manifold._out(bend)


@hessian_correction.register(Reshaped)
def _(manifold: Reshaped, x: Tensor, u: Tensor, e: Tensor) -> Tensor:
    inside = (manifold._in(tensor) for tensor in (x, u, e))
    return manifold._out(hessian_correction(manifold.base, *inside))


@geodesic_acceleration.register(geoopt.ProductManifold)
def _(manifold: geoopt.ProductManifold, x: Tensor, u: Tensor) -> Tensor:
    return _by_part(geodesic_acceleration, manifold, x, u)


@hessian_correction.register(geoopt.ProductManifold)
def _(manifold: geoopt.ProductManifold, x: Tensor, u: Tensor, e: Tensor) -> Tensor:
    return _by_part(hessian_correction, manifold, x, u, e)


def _by_part(
    verb: Callable[..., Tensor], manifold: geoopt.ProductManifold, *flat: Tensor
) -> Tensor:
    found = []
    for i, part in enumerate(manifold.manifolds):
        value = verb(part, *(manifold.take_submanifold_value(t, i) for t in flat))
        shape = manifold.shapes[i]
        found.append(value.reshape(*value.shape[: value.ndim - len(shape)], -1))
    batch = torch.broadcast_shapes(*(part.shape[:-1] for part in found))
    return torch.cat([part.expand(*batch, part.shape[-1]) for part in found], -1)
