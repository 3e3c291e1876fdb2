r"""The smallest eigenvalue of a symmetric matrix relative to a metric, and its side.

    H v = lambda G v

Dense eigenvalues are exact up to a bound on rounding. A Cholesky factorisation of
``H - s G`` that succeeds proves ``lambda_min > s``. A Ritz value is never below
``lambda_min``: it can refute that a rate is positive, and never prove it.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackNoConvergence, LinearOperator, eigsh
from torch import Tensor

from riemannian_modules.contraction.result import Side

__all__ = ["Smallest", "dense", "inertia", "lanczos"]

Product = Callable[[Tensor], Tensor]
Vector = NDArray[np.float64]

_ROUNDING = 16.0
# ARPACK looks for convergence each time that it has so many vectors.
_KRYLOV = 12


@dataclass(frozen=True)
class Smallest:
    """What is known of the smallest eigenvalue.

    Attributes:
        value: the number found.
        side: exact, a lower or an upper bound of the smallest eigenvalue.
        noise: bound on rounding in the value.
        vector: coordinates of the direction, or None.
        how: the computation, in words.
    """

    value: float
    side: Side
    noise: float
    vector: Tensor | None
    how: str


def dense(H: Tensor, G: Tensor, error: float = 0.0) -> Smallest:
    """Return the smallest eigenvalue of (H, G) by LAPACK.

    Args:
        H: symmetric.
        G: symmetric positive definite.
        error: bound on the norm of an error in H.

    Returns:
        The value, exact up to ``noise``: with d rows,
        ``(16 d eps (|H| + |lambda| |G|) + error) / lambda_min(G)``, the backward error
        of the solver and of the assembly, in the norm that the metric sees.
    """
    values, vectors = scipy.linalg.eigh(H.cpu().numpy(), G.cpu().numpy())
    noise = _noise(H, G, float(np.abs(values).max()), error)
    vector = torch.from_numpy(vectors[:, 0]).to(H)
    return Smallest(float(values[0]), Side.EXACT, noise, vector, "dense eigenvalues")


def inertia(
    H: Tensor, G: Tensor, above: float, error: float = 0.0, tries: int = 30
) -> Smallest:
    """Return a proved lower bound of the smallest eigenvalue, by inertia.

    Implements :eq:`inertia`. Cheaper than eigenvalues by an order of magnitude.

    Args:
        H: symmetric.
        G: symmetric positive definite.
        above: an upper bound of the smallest eigenvalue, such as a Ritz value.
        error: bound on the norm of an error in H.
        tries: how often the distance from ``above`` is doubled, from 1e-6 of its
            size.

    Returns:
        The largest number tried for which ``H - s G`` has a Cholesky factor; minus
        infinity if there is none.
    """
    gap = 1e-6 * max(abs(above), float(torch.linalg.matrix_norm(H, "fro")) * 1e-6)
    for _ in range(tries):
        s = above - gap
        _, info = torch.linalg.cholesky_ex(H - s * G)
        if int(info) == 0:
            noise = _noise(H, G, abs(s), error)
            return Smallest(s, Side.LOWER, noise, None, "inertia of H - s G")
        gap *= 2.0
    return Smallest(-float("inf"), Side.LOWER, 0.0, None, "inertia of H - s G")


def _noise(H: Tensor, G: Tensor, largest: float, error: float) -> float:
    d, eps = len(H), torch.finfo(torch.float64).eps
    scale = torch.linalg.eigvalsh(G)
    size = float(torch.linalg.matrix_norm(H, 2)) + largest * float(scale[-1])
    return (_ROUNDING * d * eps * size + error) / float(scale[0].clamp_min(0.0))


class _ExhaustedError(Exception):
    """The number of products that was allowed is used up."""


def lanczos(
    product: Product,
    metric: Product,
    solve: Product,
    start: Tensor,
    *,
    tolerance: float = 1e-2,
    products: int = 60,
) -> Smallest:
    """Return a Ritz value of (H, G) by Lanczos' method in the metric.

    It is ARPACK's, on ``G^-1 H`` in the inner product of G. The value is the best one
    in the space of all vectors that it looked at, an upper bound whether it had
    converged when the products were used up or not.

    Args:
        product: ``v -> H v``.
        metric: ``v -> G v``.
        solve: ``e -> G^-1 e``.
        start: first vector, ``(size,)``; tangent if the coordinates are ambient.
        tolerance: relative size of the residual to stop at; the error of the value
            is of the order of its square.
        products: how many products with H are allowed.

    Returns:
        The value, an upper bound of the smallest eigenvalue.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def lift(array: Vector) -> Tensor:
        return torch.from_numpy(np.array(array).reshape(-1)).to(start)

    def multiply(array: Vector) -> Vector:
        if len(seen) >= max(products - 1, 1):  # one is for the Ritz vector
            raise _ExhaustedError
        v = lift(array)
        Hv = product(v)
        seen.append((v, Hv))
        return Hv.cpu().numpy()

    n = len(start)
    if n <= 2:
        # ARPACK wants more coordinates than eigenvalues.
        eye = torch.eye(n, dtype=start.dtype, device=start.device)
        seen += [(v, product(v)) for v in eye]
        return _ritz(seen, product, metric)
    shape = {"shape": (n, n), "dtype": np.float64}
    operators = [
        LinearOperator(matvec=lambda a: metric(lift(a)).cpu().numpy(), **shape),
        LinearOperator(matvec=lambda a: solve(lift(a)).cpu().numpy(), **shape),
    ]
    # What was seen is an upper bound, converged or not.
    with suppress(_ExhaustedError, ArpackNoConvergence):
        eigsh(
            LinearOperator(matvec=multiply, **shape),
            k=1,
            M=operators[0],
            Minv=operators[1],
            which="SA",
            v0=start.cpu().numpy(),
            ncv=min(n, _KRYLOV),
            tol=tolerance,
        )
    return _ritz(seen, product, metric)


def _ritz(
    seen: list[tuple[Tensor, Tensor]], product: Product, metric: Product
) -> Smallest:
    """Return the smallest Ritz value in the span of the vectors seen.

    It is evaluated anew at the Ritz vector, so that what the combination of nearly
    dependent vectors loses costs convergence, but not the side of the value.
    """
    V = torch.stack([v for v, _ in seen])
    HV = torch.stack([Hv for _, Hv in seen])
    GV = torch.stack([metric(v) for v, _ in seen])
    squares = (V * GV).sum(1)
    # Vectors without length: across the tangent space, or nothing but rounding.
    ratios = squares / V.square().sum(1)
    long = ratios > 1e-8 * ratios.max()
    scale = squares[long].rsqrt().unsqueeze(1)
    V, HV, GV = scale * V[long], scale * HV[long], scale * GV[long]
    H, G = V @ HV.mT, V @ GV.mT
    weights, mix = torch.linalg.eigh(0.5 * (G + G.mT))
    kept = weights > 1e-8 * weights[-1]
    T = mix[:, kept] * weights[kept].rsqrt()
    values, turns = torch.linalg.eigh(T.mT @ (0.5 * (H + H.mT)) @ T)
    vector = V.mT @ (T @ turns[:, 0])
    value = float(vector @ product(vector)) / float(vector @ metric(vector))
    noise = 1e-10 * float(values.abs().max())
    how = f"Ritz value of {len(seen)} products"
    return Smallest(value, Side.UPPER, noise, vector, how)
