r"""Polar factors: nearest matrices with orthonormal columns, nearest rotations.

The factor is smooth where singular values coincide, as all do at every point of a
manifold, but torch's derivative of the decomposition divides by their differences. So
the decomposition is taken at a constant ``X = P H``, and the change Z of the factor
that belongs to a change D of the matrix solves

    Z H + P E = D - Z E,      P^T Z + Z^T P = -Z^T Z,      E symmetric,

whose left side divides by sums of singular values only. D and Z are zero: they have
nothing but derivatives. Every round puts the last Z and E into the right side, which
makes derivatives of one more order exact.
"""

import torch
from torch import Tensor

from riemannian_modules.manifolds.differentiated import differentiated

__all__ = ["handedness", "polar", "rotation"]

_ORDERS = 3


def handedness(q: Tensor) -> Tensor:
    """Return the sign of the determinant of matrices ``(*batch, n, n)``.

    Args:
        q: square matrices.

    Returns:
        1 or -1, and 1 where the determinant is zero, ``(*batch, 1)``.
    """
    determinant = torch.linalg.det(q.to(torch.promote_types(q.dtype, torch.float32)))
    sign = torch.where(determinant < 0, -torch.ones_like(determinant), 1.0)
    return sign.unsqueeze(-1).to(q.dtype)


def polar(x: Tensor) -> Tensor:
    """Return the nearest matrix with orthonormal columns.

    Args:
        x: tall or square matrices, ``(*batch, n, k)``.

    Returns:
        Matrices of the same shape. Where x has full rank they have derivatives of up
        to third order, backward and forward; elsewhere these grow without bound.
    """
    return _differentiable(x, *torch.linalg.svd(x.detach(), full_matrices=False))


def rotation(x: Tensor) -> Tensor:
    """Return the nearest square matrix with orthonormal columns and determinant 1.

    Args:
        x: square matrices, ``(*batch, n, n)``.

    Returns:
        Rotations, with derivatives of up to third order where the nearest is unique.
    """
    u, values, vh = torch.linalg.svd(x.detach())
    sign = handedness(u @ vh)
    u = torch.cat((u[..., :-1], u[..., -1:] * sign.unsqueeze(-1)), -1)
    values = torch.cat((values[..., :-1], values[..., -1:] * sign), -1)
    return _differentiable(x, u, values, vh)


def _skew(a: Tensor) -> Tensor:
    return 0.5 * (a - a.mT)


def _differentiable(x: Tensor, u: Tensor, values: Tensor, vh: Tensor) -> Tensor:
    p = u @ vh
    if not differentiated(x):
        return p
    h = (vh.mT * values.unsqueeze(-2)) @ vh
    square = x.shape[-2] == x.shape[-1]
    # Where the factor has no derivative they are huge, and its value is what it was.
    tiny = torch.finfo(x.dtype).tiny
    inverse = (vh.mT / values.clamp_min(tiny).unsqueeze(-2)) @ vh
    sums = (values.unsqueeze(-1) + values.unsqueeze(-2)).clamp_min(tiny)
    # A skew matrix has no diagonal, where a rotation may have a sum of zero.
    shares = 1.0 / sums - torch.diag_embed(1.0 / sums.diagonal(dim1=-2, dim2=-1))
    change = x - x.detach()
    z, e = change, torch.zeros_like(h)
    for order in range(_ORDERS):
        half = -0.5 * (z.mT @ z) if order else torch.zeros_like(h)
        right = change - z @ e
        inside = p.mT @ right
        skew = 2.0 * _skew(inside - half @ h)
        k = half + vh.mT @ ((vh @ skew @ vh.mT) * shares) @ vh
        e = inside - k @ h
        z = p @ k if square else p @ k + (right - p @ inside) @ inverse
    return p + z
