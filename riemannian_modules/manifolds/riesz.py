r"""What the layer metric needs of a base manifold besides geoopt's interface.

geoopt's ``egrad2rgrad`` is the Riesz map ``sharp``: ambient covector to tangent
vector. Here are its companions, for a point ``x`` and vectors with any leading
batch dimensions:

- :func:`flat`, a covector that represents ``g0(u, .)``;
- :func:`root` and :func:`root_adjoint`, a linear map C with ``C C^T = sharp``,
  which turns the metric into ``I + (K C)^T (K C)`` in plain coordinates;
- :func:`dimension` of the manifold.

All are :func:`functools.singledispatch` functions on the manifold's class, so a
manifold of your own gets a closed form with one ``flat.register``; without it a
numerical root of the Riesz map is used, at O(p^3) for p entries.
"""

import math
from functools import singledispatch

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds.drawing import Embedded
from riemannian_modules.manifolds.stiefel import CanonicalStiefel, Stiefel

__all__ = [
    "dimension",
    "flat",
    "require_own_formulas",
    "riesz",
    "root",
    "root_adjoint",
]


def riesz(manifold: geoopt.Manifold, x: Tensor, e: Tensor) -> Tensor:
    """Return the tangent vector that represents the covector ``e`` in g0.

    The manifold works on a copy, because some geoopt classes write into the
    argument of ``egrad2rgrad``.

    Args:
        manifold: base manifold.
        x: point, ``shape``.
        e: covectors, ``(*batch, *shape)``.

    Returns:
        Tangent vectors of the shape of ``e``.
    """
    if isinstance(manifold, geoopt.Euclidean):
        return e
    result: Tensor = manifold.egrad2rgrad(x, e.clone())
    return result


def require_own_formulas(manifold: geoopt.Manifold, name: str) -> None:
    """Refuse a subclass with a metric of its own that would get its parent's formulas.

    Args:
        manifold: where a parameter is to live.
        name: the parameter's name, for the message.

    Raises:
        ManifoldContractError: its class overrides the metric of a class that has
            closed forms here.
    """
    kind = type(manifold)
    parent = next((base for base in kind.__mro__ if base in flat.registry), object)
    if parent is object or kind is parent or kind in _SAME_METRIC:
        return
    for method in ("inner", "egrad2rgrad"):
        own = getattr(parent, method)
        if getattr(kind, method) is not own:
            owner = next(k for k in kind.__mro__ if getattr(k, method, None) is own)
            raise ManifoldContractError(
                f"{name}: {kind.__name__} changes {method} of {owner.__name__}, whose "
                "formulas it would get here; derive it from geoopt.Manifold instead"
            )


def _sym(a: Tensor) -> Tensor:
    return 0.5 * (a + a.mT)


def _spd_root(x: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(x)
    return (vectors * values.sqrt().unsqueeze(-2)) @ vectors.mT


def _riesz_matrix_root(manifold: geoopt.Manifold, x: Tensor) -> Tensor:
    p = x.numel()
    eye = torch.eye(p, dtype=x.dtype, device=x.device).view(p, *x.shape)
    values, vectors = torch.linalg.eigh(_sym(riesz(manifold, x, eye).reshape(p, p)))
    return vectors * values.clamp_min(0.0).sqrt()


@singledispatch
def flat(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    """Return a covector ``e`` with ``<e, v> = g0(u, v)`` for every tangent ``v``.

    Args:
        manifold: base manifold.
        x: point, ``shape``.
        u: tangent vectors, ``(*batch, *shape)``.

    Returns:
        Covectors of the shape of ``u``. Without a registered closed form: the
        derivative of ``inner`` by automatic differentiation.
    """
    with torch.enable_grad():
        v = torch.zeros_like(u, requires_grad=True)
        # keepdim: without it geoopt's stereographic classes mix up the points.
        value = manifold.inner(x.detach(), u.detach(), v, keepdim=True).sum()
        (covector,) = torch.autograd.grad(value, v)
    return covector


@flat.register(geoopt.Euclidean)
@flat.register(geoopt.Sphere)
@flat.register(geoopt.EuclideanStiefel)
@flat.register(Embedded)
def _(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    return u


@flat.register(CanonicalStiefel)
def _(manifold: CanonicalStiefel, x: Tensor, u: Tensor) -> Tensor:
    if x.shape[-2] < x.shape[-1]:
        return u - 0.5 * (u @ x.mT) @ x
    return u - 0.5 * x @ (x.mT @ u)


@flat.register(geoopt.PoincareBall)
def _(manifold: geoopt.PoincareBall, x: Tensor, u: Tensor) -> Tensor:
    return u * manifold.lambda_x(x, keepdim=True) ** 2


@flat.register(geoopt.SymmetricPositiveDefinite)
def _(manifold: geoopt.SymmetricPositiveDefinite, x: Tensor, u: Tensor) -> Tensor:
    inverse = torch.linalg.inv(x)
    return inverse @ u @ inverse


@singledispatch
def root(manifold: geoopt.Manifold, x: Tensor, z: Tensor) -> Tensor:
    """Return ``C z``, where ``C C^T`` is the Riesz map at ``x``.

    Args:
        manifold: base manifold.
        x: point, ``shape``.
        z: coordinates, ``(*batch, *shape)``.

    Returns:
        Tangent vectors of the shape of ``z``.
    """
    C = _riesz_matrix_root(manifold, x)
    return (z.reshape(-1, x.numel()) @ C.mT).view_as(z)


@singledispatch
def root_adjoint(manifold: geoopt.Manifold, x: Tensor, e: Tensor) -> Tensor:
    """Return ``C^T e`` for the map C of :func:`root`.

    Args:
        manifold: base manifold.
        x: point, ``shape``.
        e: covectors, ``(*batch, *shape)``.

    Returns:
        Coordinates of the shape of ``e``.
    """
    C = _riesz_matrix_root(manifold, x)
    return (e.reshape(-1, x.numel()) @ C).view_as(e)


@root.register(geoopt.Euclidean)
@root_adjoint.register(geoopt.Euclidean)
def _(manifold: geoopt.Euclidean, x: Tensor, z: Tensor) -> Tensor:
    return z


@root.register(geoopt.Sphere)
@root_adjoint.register(geoopt.Sphere)
@root.register(geoopt.EuclideanStiefel)
@root_adjoint.register(geoopt.EuclideanStiefel)
@root.register(Embedded)
@root_adjoint.register(Embedded)
def _(manifold: geoopt.Manifold, x: Tensor, z: Tensor) -> Tensor:
    projected: Tensor = manifold.proju(x, z)
    return projected


@root.register(CanonicalStiefel)
@root_adjoint.register(CanonicalStiefel)
def _(manifold: CanonicalStiefel, x: Tensor, z: Tensor) -> Tensor:
    if x.shape[-2] < x.shape[-1]:
        x, z = x.mT, z.mT
        return _canonical_root(x, z).mT
    return _canonical_root(x, z)


def _canonical_root(x: Tensor, z: Tensor) -> Tensor:
    xz = x.mT @ z
    return z + x @ ((xz - xz.mT) / math.sqrt(2.0) - xz)


@root.register(geoopt.PoincareBall)
@root_adjoint.register(geoopt.PoincareBall)
def _(manifold: geoopt.PoincareBall, x: Tensor, z: Tensor) -> Tensor:
    return z / manifold.lambda_x(x, keepdim=True)


@root.register(geoopt.SymmetricPositiveDefinite)
def _(manifold: geoopt.SymmetricPositiveDefinite, x: Tensor, z: Tensor) -> Tensor:
    s = _spd_root(x)
    return s @ _sym(z) @ s


@root_adjoint.register(geoopt.SymmetricPositiveDefinite)
def _(manifold: geoopt.SymmetricPositiveDefinite, x: Tensor, e: Tensor) -> Tensor:
    s = _spd_root(x)
    return _sym(s @ e @ s)


_SAME_METRIC = {Stiefel}


@singledispatch
def dimension(manifold: geoopt.Manifold, x: Tensor) -> int:
    """Return the dimension of the manifold that ``x`` is a point of.

    Without a registered closed form it is the rank of the Riesz map, O(p^3).

    >>> dimension(geoopt.Sphere(), torch.eye(2, 3))
    4
    """
    p = x.numel()
    eye = torch.eye(p, dtype=x.dtype, device=x.device).view(p, *x.shape)
    return int(torch.linalg.matrix_rank(riesz(manifold, x, eye).reshape(p, p)))


@dimension.register(geoopt.Euclidean)
@dimension.register(geoopt.PoincareBall)
def _(manifold: geoopt.Manifold, x: Tensor) -> int:
    return x.numel()


@dimension.register(geoopt.Stiefel)
def _(manifold: geoopt.Stiefel, x: Tensor) -> int:
    k = min(x.shape[-2:])
    matrices = x.numel() // (x.shape[-1] * x.shape[-2])
    return x.numel() - matrices * (k * (k + 1) // 2)


@dimension.register(geoopt.SymmetricPositiveDefinite)
def _(manifold: geoopt.SymmetricPositiveDefinite, x: Tensor) -> int:
    n = x.shape[-1]
    return (x.numel() // (n * n)) * (n * (n + 1) // 2)


@dimension.register(geoopt.Sphere)
def _(manifold: geoopt.Sphere, x: Tensor) -> int:
    if manifold.projector is not None:
        return int(dimension.dispatch(object)(manifold, x))
    return x.numel() - x.numel() // x.shape[-1]
