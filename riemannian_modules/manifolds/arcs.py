r"""Squared angles whose cosines are the singular values of a matrix.

The sum f of ``arccos(s_i)^2`` is a smooth function of the matrix M where all cosines
are positive, also where they coincide or are 1. But torch's second derivative of
singular values divides by their differences. So M is expanded to second order about a
constant ``U diag(s) V^T``. With ``U^T (M - M_0) V = S + A``, symmetric and skew, and
``h = t / sin t``, as a function of the cosine, of the angles t,

    f = sum t_i^2 - 2 sum h_i S_ii - sum_ij h[s_i, s_j] S_ij^2
        - sum_ij (h_i + h_j) / (s_i + s_j) A_ij^2

Nothing cancels in the divided difference ``h[s_i, s_j]`` of the series
``h = sum_n a_n (1 - s)^n`` with ``a_n / a_{n-1} = n / (2n + 1)``.
"""

import torch
from torch import Tensor

__all__ = ["root_of_square", "squared_arcs"]

_TERMS = 56  # a_n is below 2^-n


def _differences(cosines: Tensor) -> Tensor:
    """Return ``-h[s_i, s_j]``."""
    n = torch.arange(2.0 * _TERMS - 1.0, dtype=cosines.dtype, device=cosines.device)
    series = ((n + 1.0) / (2.0 * n + 3.0)).cumprod(0).unfold(0, _TERMS, 1)
    powers = (1.0 - cosines).unsqueeze(-1) ** n[:_TERMS]
    return powers @ series @ powers.mT


def squared_arcs(m: Tensor, angles: Tensor) -> Tensor:
    """Return the sum of the squared angles, with two derivatives.

    Args:
        m: square matrices, ``(*batch, k, k)``.
        angles: the angles whose cosines are their singular values, in [0, pi / 2] and
            ascending, ``(*batch, k)``. Constants: only the caller can compute them to
            rounding, from their sines as well.

    Returns:
        ``(*batch)``. At right angles the derivatives are one-sided.
    """
    angles = angles.detach()
    u, _, vh = torch.linalg.svd(m.detach())
    change = u.mT @ (m - m.detach()) @ vh.mT
    even, odd = 0.5 * (change + change.mT), 0.5 * (change - change.mT)
    ratios, cosines = 1.0 / torch.sinc(angles / torch.pi), angles.cos()
    sums = cosines.unsqueeze(-1) + cosines.unsqueeze(-2)
    turns = (ratios.unsqueeze(-1) + ratios.unsqueeze(-2)) / sums.clamp_min(
        torch.finfo(m.dtype).eps
    )
    slope = (ratios * even.diagonal(dim1=-2, dim2=-1)).sum(-1)
    bend = _differences(cosines) * even.square() - turns * odd.square()
    return angles.square().sum(-1) - 2.0 * slope + bend.sum((-1, -2))


def root_of_square(square: Tensor) -> Tensor:
    """Return the root of a squared distance, with the slope 0 where that is 0."""
    apart = square > 0
    return torch.where(apart, torch.where(apart, square, 1.0).sqrt(), 0.0)
