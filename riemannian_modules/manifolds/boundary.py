"""Where open manifolds end: no metric is finite there, and steps may lead past it."""

from functools import singledispatch

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds.scaled import Scaled

__all__ = ["definite", "inside", "on_boundary", "singular"]


def singular(x: Tensor) -> str | None:
    """Return why symmetric matrices are not numerically positive definite, or None.

    Their least eigenvalue must exceed ``4 sqrt(n)`` rounding units of the largest:
    below that rounding decides its sign.

    Args:
        x: ``(*batch, n, n)``.

    >>> singular(torch.eye(2)), singular(torch.diag(torch.tensor([1.0, 0.0])))
    (None, 'a matrix is not positive definite: its eigenvalues begin at 0.0e+00, \
the largest is 1.0e+00')
    """
    if not bool(x.isfinite().all()):
        return "not all entries are finite"
    wide = _wide(x)
    values = torch.linalg.eigvalsh(wide)
    least, largest = values[..., 0], values[..., -1]
    floor = _floor(wide)
    # Written so that NaN is refused, too.
    bad = ~(least > floor * largest.clamp_min(torch.finfo(wide.dtype).tiny))
    if not bool(bad.any()):
        return None
    return (
        f"a matrix is not positive definite: its eigenvalues begin at "
        f"{float(least[bad].min()):.1e}, the largest is {float(largest[bad].max()):.1e}"
    )


def definite(x: Tensor) -> Tensor:
    """Return whether symmetric matrices are safely positive definite.

    What it lets pass, :func:`singular` does, too; near the boundary it is up to
    ``2 sqrt(n)`` times stricter. Cost: one Cholesky factorisation, and no waiting.

    Args:
        x: ``(*batch, n, n)``.

    Returns:
        A boolean scalar on the device.
    """
    wide = _wide(x)
    # Twice the floor: the factorisation itself rounds.
    shift = 2.0 * _floor(wide) * torch.linalg.matrix_norm(wide)
    eye = torch.eye(x.shape[-1], dtype=wide.dtype, device=wide.device)
    lower, info = torch.linalg.cholesky_ex(wide - shift[..., None, None] * eye)
    # LAPACK's check for NaN is not made by every library for other devices.
    return (info == 0).all() & lower.diagonal(dim1=-2, dim2=-1).isfinite().all()


def _wide(x: Tensor) -> Tensor:
    return x.detach().to(torch.promote_types(x.dtype, torch.float32))


def _floor(x: Tensor) -> float:
    return 4.0 * x.shape[-1] ** 0.5 * torch.finfo(x.dtype).eps


@singledispatch
def inside(manifold: geoopt.Manifold, x: Tensor) -> Tensor | None:
    """Return whether the finite end point of a step is safely inside a manifold.

    Register your manifold's class here if it is open and rounding, or a long step, can
    lead out of it. Neither happens on the open manifolds here that are not
    registered: the ball projects, and the others compute points from coordinates that
    have no bounds.

    Args:
        manifold: base manifold.
        x: the end point.

    Returns:
        A boolean scalar on the device, made without waiting for it; None: no step
        leads out. Where it is False, the manifold's check has the last word if it can
        be waited for.
    """
    return None


@inside.register(geoopt.SymmetricPositiveDefinite)
def _(manifold: geoopt.SymmetricPositiveDefinite, x: Tensor) -> Tensor | None:
    return definite(x)


@inside.register(Scaled)
def _(manifold: Scaled, x: Tensor) -> Tensor | None:
    return inside(manifold.base, x)


@inside.register(geoopt.ProductManifold)
def _(manifold: geoopt.ProductManifold, x: Tensor) -> Tensor | None:
    parts = zip(manifold.manifolds, manifold.unpack_tensor(x), strict=True)
    flags = [inside(part, piece) for part, piece in parts]
    known = [flag for flag in flags if flag is not None]
    return torch.stack(known).all() if known else None


@singledispatch
def on_boundary(manifold: geoopt.Manifold, x: Tensor) -> str | None:
    """Return why a value is on the boundary of a manifold, or None.

    Register your manifold's class here if its ``check_point_on_manifold`` accepts
    points where its metric is infinite.

    Args:
        manifold: base manifold.
        x: a value that the manifold's own check accepts.
    """
    return None


@on_boundary.register(geoopt.SymmetricPositiveDefinite)
def _(manifold: geoopt.SymmetricPositiveDefinite, x: Tensor) -> str | None:
    return singular(x)


@on_boundary.register(Scaled)
def _(manifold: Scaled, x: Tensor) -> str | None:
    return on_boundary(manifold.base, x)


@on_boundary.register(geoopt.ProductManifold)
def _(manifold: geoopt.ProductManifold, x: Tensor) -> str | None:
    parts = zip(manifold.manifolds, manifold.unpack_tensor(x), strict=True)
    problems = (on_boundary(part, piece) for part, piece in parts)
    return next((problem for problem in problems if problem is not None), None)
