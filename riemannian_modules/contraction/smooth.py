"""What a chart and its metric need of a manifold, differentiable twice.

Functions on the manifold's class with defaults from geoopt's interface; register an
entry for a manifold of your own whose methods cannot be differentiated twice.
"""

from collections.abc import Callable
from functools import singledispatch

import geoopt
import torch
from torch import Tensor

from riemannian_modules import manifolds as rm_manifolds

__all__ = ["base_inner", "chart_step"]


@singledispatch
def chart_step(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    """Return the point of the chart around ``x`` with the coordinates ``u``.

    Twice differentiable in ``u``, at zero as well, which ``retr`` of some manifolds is
    not under automatic differentiation. A :func:`functools.singledispatch` function on
    the manifold's class; without an entry it is ``manifold.retr``.

    Args:
        manifold: base manifold.
        x: point, ``shape``.
        u: tangent vector there.

    Returns:
        The point, equal to ``x + u`` to first order.

    >>> chart_step(geoopt.Sphere(), torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.75]))
    tensor([0.8000, 0.6000])
    """
    point: Tensor = manifold.retr(x, u)
    return point


# Open subsets of a linear or an affine space.
@chart_step.register(geoopt.Euclidean)
@chart_step.register(geoopt.SymmetricPositiveDefinite)
@chart_step.register(geoopt.Stereographic)
@chart_step.register(rm_manifolds.LogEuclideanSPD)
@chart_step.register(rm_manifolds.Positive)
@chart_step.register(rm_manifolds.BirkhoffPolytope)
def _(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    return x + u


@chart_step.register(geoopt.Sphere)
@chart_step.register(rm_manifolds.Lorentz)
def _(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    point: Tensor = manifold.projx(x + u)
    return point


@chart_step.register(geoopt.Stiefel)
@chart_step.register(rm_manifolds.Grassmann)
@chart_step.register(rm_manifolds.SpecialOrthogonal)
def _(manifold: geoopt.Manifold, x: Tensor, u: Tensor) -> Tensor:
    if x.shape[-2] < x.shape[-1]:
        return _orthonormalised((x + u).mT).mT
    return _orthonormalised(x + u)


def _orthonormalised(y: Tensor) -> Tensor:
    lower = torch.linalg.cholesky(y.mT @ y)
    return torch.linalg.solve_triangular(lower, y.mT, upper=False).mT


@chart_step.register(rm_manifolds.FixedRank)
def _(manifold: rm_manifolds.FixedRank, x: Tensor, u: Tensor) -> Tensor:
    # The orthographic retraction, whose frames at x are constants.
    left, _, right = torch.linalg.svd(x.detach(), full_matrices=False)
    left, right = left[..., : manifold.rank], right[..., : manifold.rank, :].mT
    y = x + u
    # Not torch.linalg.solve: its second derivatives in forward mode are wrong.
    return y @ right @ torch.linalg.inv(left.mT @ y @ right) @ (left.mT @ y)


@chart_step.register(rm_manifolds.Scaled)
def _(manifold: rm_manifolds.Scaled, x: Tensor, u: Tensor) -> Tensor:
    return chart_step(manifold.base, x, u)


@chart_step.register(rm_manifolds.Reshaped)
def _(manifold: rm_manifolds.Reshaped, x: Tensor, u: Tensor) -> Tensor:
    moved = chart_step(manifold.base, manifold._in(x), manifold._in(u))
    return manifold._out(moved)


@chart_step.register(geoopt.ProductManifold)
def _(manifold: geoopt.ProductManifold, x: Tensor, u: Tensor) -> Tensor:
    return _by_part(chart_step, manifold, x, u)


@singledispatch
def base_inner(manifold: geoopt.Manifold, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Return ``g0(a, b)`` at ``x``, a scalar that can be differentiated twice.

    Args:
        manifold: base manifold.
        x: point.
        a: tangent vector.
        b: tangent vector.

    Returns:
        The sum of ``manifold.inner`` over all entries.
    """
    total: Tensor = manifold.inner(x, a, b, keepdim=True).sum()
    return total


@base_inner.register(geoopt.Stereographic)
def _(manifold: geoopt.Stereographic, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    # geoopt's own is scripted, and its second derivatives are wrong.
    square = x.square().sum(-1, keepdim=True)
    factor = 2.0 / (1.0 + manifold.k.detach().to(x) * square)
    return (factor.square() * a * b).sum()


@base_inner.register(rm_manifolds.Scaled)
def _(manifold: rm_manifolds.Scaled, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return manifold.scale**2 * base_inner(manifold.base, x, a, b)


@base_inner.register(rm_manifolds.Reshaped)
def _(manifold: rm_manifolds.Reshaped, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    inside = (manifold._in(x), manifold._in(a), manifold._in(b))
    return base_inner(manifold.base, *inside)


@base_inner.register(geoopt.ProductManifold)
def _(manifold: geoopt.ProductManifold, x: Tensor, a: Tensor, b: Tensor) -> Tensor:
    total = x.new_zeros(())
    for i, part in enumerate(manifold.manifolds):
        p, u, v = (manifold.take_submanifold_value(t, i) for t in (x, a, b))
        if isinstance(manifold, rm_manifolds.Product):
            u = manifold.masses[i].multiply(u)
        total = total + base_inner(part, p, u, v)
    return total


def _by_part(
    verb: Callable[[geoopt.Manifold, Tensor, Tensor], Tensor],
    manifold: geoopt.ProductManifold,
    x: Tensor,
    u: Tensor,
) -> Tensor:
    parts = [
        verb(
            part,
            manifold.take_submanifold_value(x, i),
            manifold.take_submanifold_value(u, i),
        ).reshape(-1)
        for i, part in enumerate(manifold.manifolds)
    ]
    return torch.cat(parts)
