r"""The smallest eigenvalue of a symmetric matrix relative to a metric, and its side.

    H v = lambda G v

Dense eigenvalues are exact up to a bound on rounding. A Cholesky factorisation of
``H - s G`` that succeeds proves ``lambda_min > s``. A Ritz value is never below
``lambda_min``: it can refute that a rate is positive, and never prove it.
"""

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import scipy.linalg
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh
from torch import Tensor

from riemannian_modules.contraction.result import Side
from riemannian_modules.errors import ContractionError

__all__ = ["ROUNDING", "Smallest", "dense", "inertia", "lanczos"]

Product = Callable[[Tensor], Tensor]
Vector = NDArray[np.float64]

ROUNDING = 16.0 * float(np.finfo(np.float64).eps)
_SINGULAR = (
    "Lanczos' method saw no vector with a length: the metric is singular in float64; "
    "raise the mass, or ask for method='dense'"
)
# ARPACK looks for convergence each time that it has so many vectors.
_KRYLOV = 12


@dataclass(frozen=True)
class Smallest:
    """What is known of the smallest eigenvalue.

    Attributes:
        value: the number found.
        side: exact, a lower or an upper bound of the smallest eigenvalue.
        noise: bound on rounding in the value, downward: the truth is not below the
            value by more, unless the value is an upper bound.
        above: how far the value may lie below its own vector's quotient
            ``v^T H v / v^T G v``, and so below an upper bound.
        how: the computation, in words.
    """

    value: float
    side: Side
    noise: float
    above: float
    how: str


def dense(H: Tensor, G: Tensor, error: float = 0.0) -> Smallest:
    """Return the smallest eigenvalue of (H, G) by LAPACK.

    Args:
        H: symmetric.
        G: symmetric positive definite.
        error: bound on the norm of an error in H.

    Returns:
        The value, exact up to ``noise``: with d rows and ``u = 16 d eps``,
        ``(u (|H| + |lambda| |G|) + error) / (lambda_min(G) - u |G|)``, the backward
        error of the solver and of the assembly, in the norm that the metric sees
        (Anderson et al. 1999, section 4.10).

    Raises:
        ContractionError: G is not positive definite in float64.
    """
    try:
        values, vectors = scipy.linalg.eigh(H.cpu().numpy(), G.cpu().numpy())
    except np.linalg.LinAlgError as error_:
        raise ContractionError(
            "the metric is not positive definite in float64: its smallest mass is lost "
            "against its rows; raise the mass"
        ) from error_
    value, vector = float(values[0]), torch.from_numpy(vectors[:, 0]).to(H)
    length = float(vector @ (G @ vector) / vector.square().sum())
    noise, above = _noise(H, G, value, error), _noise(H, G, value, error, length)
    return Smallest(value, Side.EXACT, noise, above, "dense eigenvalues")


def inertia(H: Tensor, G: Tensor, above: float, error: float = 0.0) -> Smallest:
    """Return a proved lower bound of the smallest eigenvalue, by inertia.

    Implements :eq:`inertia`. Cheaper than eigenvalues by an order of magnitude. The
    distance from ``above`` is doubled up to 30 times, from 1e-6 of its size.

    Args:
        H: symmetric.
        G: symmetric positive definite.
        above: an upper bound of the smallest eigenvalue, such as a Ritz value.
        error: bound on the norm of an error in H.

    Returns:
        The largest number tried for which ``H - s G`` has a Cholesky factor; minus
        infinity if there is none.
    """
    gap = 1e-6 * max(abs(above), float(torch.linalg.matrix_norm(H, "fro")) * 1e-6)
    for _ in range(30):
        s = above - gap
        _, info = torch.linalg.cholesky_ex(H - s * G)
        if int(info) == 0:
            noise = _noise(H, G, s, error)
            return Smallest(s, Side.LOWER, noise, math.inf, "inertia of H - s G")
        gap *= 2.0
    how = "inertia of H - s G"
    return Smallest(-math.inf, Side.LOWER, 0.0, math.inf, how)


def _noise(
    H: Tensor, G: Tensor, value: float, error: float, length: float | None = None
) -> float:
    scale = torch.linalg.eigvalsh(G)
    least = float(scale[0]) if length is None else length
    size = float(torch.linalg.matrix_norm(H, 2))
    return _slip(len(H), size, float(scale[-1]), value, error, least)


def _slip(
    d: int, H: float, G: float, value: float, error: float, least: float
) -> float:
    """Return the error of a quotient ``v^T H v / v^T G v`` with ``v^T G v`` at least.

    Args:
        d: number of rows.
        H: norm of H.
        G: norm of G.
        value: the quotient.
        error: norm of another error in H.
        least: ``v^T G v`` for v of length one.
    """
    unit = ROUNDING * d
    room = least - unit * G
    if not room > 0.0:
        return math.inf
    return (unit * (H + abs(value) * G) + error) / room


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
    error: float = 0.0,
    known: tuple[Tensor, Tensor] | None = None,
    project: Product | None = None,
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
        error: bound on the norm of an error in H.
        known: a vector and its product, which counts as one of them.
        project: onto the tangent space, if the coordinates are ambient.

    Returns:
        The value, an upper bound of the smallest eigenvalue but for ``above``.

    Raises:
        ContractionError: no vector that it saw has a length in G.
    """
    seen = [] if known is None else [known]
    left = max(products - 1, 1) - len(seen)  # one is for the Ritz vector

    def lift(array: Vector) -> Tensor:
        return torch.from_numpy(np.array(array).reshape(-1)).to(start)

    def multiply(array: Vector) -> Vector:
        nonlocal left
        if left <= 0:
            raise _ExhaustedError
        left -= 1
        v = lift(array)
        inside = v if project is None else project(v)
        Hv = product(inside)
        # Else the vector is across the tangent space, nothing but rounding.
        if float(inside.norm()) > 1e-8 * float(v.norm()):
            seen.append((inside, Hv))
        return Hv.cpu().numpy()

    n = len(start)
    if n <= 2:
        # ARPACK wants more coordinates than eigenvalues.
        eye = torch.eye(n, dtype=start.dtype, device=start.device)
        seen += [(v, product(v)) for v in eye]
        return _ritz(seen, product, metric, error)
    shape = {"shape": (n, n), "dtype": np.float64}
    operators = [
        LinearOperator(matvec=lambda a: metric(lift(a)).cpu().numpy(), **shape),
        LinearOperator(matvec=lambda a: solve(lift(a)).cpu().numpy(), **shape),
    ]
    # What was seen is an upper bound, converged or not.
    with suppress(_ExhaustedError, ArpackError):
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
    return _ritz(seen, product, metric, error)


def _ritz(
    seen: list[tuple[Tensor, Tensor]],
    product: Product,
    metric: Product,
    error: float,
) -> Smallest:
    """Return the smallest Ritz value in the span of the vectors seen.

    It is evaluated anew at the Ritz vector, so that what the combination of nearly
    dependent vectors loses costs convergence, but not the side of the value.

    Raises:
        ContractionError: no vector has a length in the metric.
    """
    if not seen:
        raise ContractionError(_SINGULAR)
    V = torch.stack([v for v, _ in seen])
    HV = torch.stack([Hv for _, Hv in seen])
    GV = torch.stack([metric(v) for v, _ in seen])
    squares = (V * GV).sum(1)
    # Vectors without length are nothing but rounding.
    ratios = squares / V.square().sum(1)
    size = float((GV.norm(dim=1) / V.norm(dim=1)).max())
    long = ratios > ROUNDING * size
    if not bool(long.any()):
        raise ContractionError(_SINGULAR)
    sizes = float((HV.norm(dim=1) / V.norm(dim=1)).max()), size
    scale = squares[long].rsqrt().unsqueeze(1)
    V, HV, GV = scale * V[long], scale * HV[long], scale * GV[long]
    H, G = V @ HV.mT, V @ GV.mT
    weights, mix = torch.linalg.eigh(0.5 * (G + G.mT))
    kept = weights > 1e-8 * weights[-1]
    T = mix[:, kept] * weights[kept].rsqrt()
    _, turns = torch.linalg.eigh(T.mT @ (0.5 * (H + H.mT)) @ T)
    vector = V.mT @ (T @ turns[:, 0])
    vector = vector / vector.norm()
    square = float(vector @ metric(vector))
    value = float(vector @ product(vector)) / square
    above = _slip(len(vector), *sizes, value, error, square)
    how = f"Ritz value of {len(seen)} products"
    return Smallest(value, Side.UPPER, above, above, how)
