"""How far the whitened outputs move for a unit step of one parameter."""

import math
from dataclasses import replace

import torch
from torch import Tensor

from riemannian_modules.mass import Mass
from riemannian_modules.metric import Part

__all__ = ["sensitivity"]

_STEPS = 64
_TOLERANCE = 1e-3


@torch.no_grad()
def sensitivity(part: Part) -> float:
    """Return ``max |K u|`` over tangent vectors u of unit length in g0.

    It is the root of the largest eigenvalue of ``K riesz K^T``, by Lanczos' iteration
    with full orthogonalisation: a lower bound, good to three digits. Cost: two products
    with K in each of at most 64 steps, typically of ten.

    Args:
        part: a parameter with its tangent space and its factor.

    Returns:
        The operator norm of the factor; 0 without one; NaN where it is not finite.
    """
    factor, space = part.factor, replace(part.space, mass=Mass())
    if factor is None or factor.rank == 0 or space.point.numel() == 0:
        return 0.0
    # Always the same start: printing draws no random numbers.
    start = torch.Generator().manual_seed(0)
    v = torch.randn(factor.rank, generator=start, dtype=torch.float64)
    basis: list[Tensor] = []
    diagonal: list[float] = []
    beside: list[float] = []
    largest, size = 0.0, float(v.norm())
    for _ in range(min(factor.rank, _STEPS)):
        v = v / size
        basis.append(v)
        u = space.riesz(factor.rmatvec(v.to(factor.device, factor.dtype)))
        w = factor.matvec(u).to(v)
        diagonal.append(float(w @ v))
        if not math.isfinite(diagonal[-1]):
            return math.nan
        known = torch.stack(basis)
        for _ in range(2):
            w = w - known.mT @ (known @ w)
        size = float(w.norm())
        matrix = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
        if beside:
            off = torch.tensor(beside, dtype=torch.float64)
            matrix = matrix + torch.diag(off, 1) + torch.diag(off, -1)
        values, vectors = torch.linalg.eigh(matrix)
        largest = float(values[-1])
        if size * abs(float(vectors[-1, -1])) <= _TOLERANCE * largest or size == 0.0:
            break
        beside.append(size)
        v = w
    return math.sqrt(max(largest, 0.0))
