"""Points that a manifold's own check lets pass although no metric is finite there."""

from functools import singledispatch

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds.scaled import Scaled

__all__ = ["on_boundary", "singular"]


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
    wide = x.detach().to(torch.promote_types(x.dtype, torch.float32))
    values = torch.linalg.eigvalsh(wide)
    least, largest = values[..., 0], values[..., -1]
    floor = 4.0 * x.shape[-1] ** 0.5 * torch.finfo(wide.dtype).eps
    # Written so that NaN is refused, too.
    bad = ~(least > floor * largest.clamp_min(torch.finfo(wide.dtype).tiny))
    if not bool(bad.any()):
        return None
    return (
        f"a matrix is not positive definite: its eigenvalues begin at "
        f"{float(least[bad].min()):.1e}, the largest is {float(largest[bad].max()):.1e}"
    )


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
