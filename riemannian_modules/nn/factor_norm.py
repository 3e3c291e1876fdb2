"""How far the whitened outputs move for a unit step of one parameter."""

import math
from dataclasses import replace

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, eigsh

from riemannian_modules.mass import Mass
from riemannian_modules.metric import Part

__all__ = ["factor_norm"]

_DENSE = 8
_TOLERANCE = 1e-3


@torch.no_grad()
def factor_norm(part: Part) -> float:
    """Return ``max |K u|`` over tangent vectors u of unit length in g0.

    It is the root of the largest eigenvalue of ``K riesz K^T``, by Lanczos' iteration:
    a lower bound, good to three digits. Cost: two products with K in each of typically
    twenty steps.

    Args:
        part: a parameter with its tangent space and its factor.

    Returns:
        The operator norm of the factor; 0 without one; NaN where it is not finite.
    """
    factor, space = part.factor, replace(part.space, mass=Mass())
    if factor is None or factor.rank == 0 or space.point.numel() == 0:
        return 0.0
    rank, device, dtype = factor.rank, factor.device, factor.dtype

    def squared(v: np.ndarray) -> np.ndarray:
        lifted = torch.from_numpy(np.ascontiguousarray(v.reshape(-1)))
        u = space.riesz(factor.rmatvec(lifted.to(device, dtype)))
        found: np.ndarray = factor.matvec(u).double().cpu().numpy()
        return found

    # Always the same start: printing draws no random numbers.
    start = np.random.default_rng(0).standard_normal(rank)
    first = squared(start)
    if not np.isfinite(first).all():
        return math.nan
    if not first.any():
        return 0.0
    if rank <= _DENSE:
        matrix = np.stack([squared(column) for column in np.eye(rank)])
        largest = np.linalg.eigvalsh(0.5 * (matrix + matrix.T))[-1]
    else:
        operator = LinearOperator((rank, rank), matvec=squared, dtype=np.float64)
        (largest,) = eigsh(
            operator, k=1, tol=_TOLERANCE, v0=start, return_eigenvectors=False
        )
    return math.sqrt(max(float(largest), 0.0))
