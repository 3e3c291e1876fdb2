"""Eigenvalues and norms of matrices as bounds that hold in spite of rounding."""

import math
from fractions import Fraction

import torch
from torch import Tensor

from riemannian_modules.contraction.exact import root_up, round_up

__all__ = [
    "hypot_up",
    "over_up",
    "plus_up",
    "spectral_norm",
    "sqrt_up",
    "times_up",
    "upper_eigenvalue",
]

UNIT = 2.0**-53


def times_up(*factors: float) -> float:
    """Return a double not below the product of numbers that are not negative.

    Zero times infinity is zero: nothing is never amplified.

    >>> times_up(0.0, math.inf), times_up(0.5, 3.0)
    (0.0, 1.5)
    """
    product = 1.0
    for factor in factors:
        if factor == 0:
            return 0.0
        product *= factor
    if not math.isfinite(product):
        return product
    return round_up(math.prod(map(Fraction, factors), start=Fraction(1)))


def plus_up(*terms: float) -> float:
    """Return a double not below the sum."""
    total = math.fsum(terms) if all(map(math.isfinite, terms)) else sum(terms)
    return (
        round_up(sum(map(Fraction, terms), Fraction()))
        if math.isfinite(total)
        else total
    )


def over_up(top: float, *factors: float) -> float:
    """Return a double not below a quotient of numbers that are not negative.

    >>> over_up(1.0, 2.0), over_up(1.0, 0.0), over_up(1.0, math.inf)
    (0.5, inf, 0.0)
    """
    if not math.isfinite(top) or 0.0 in factors:
        return math.inf
    if math.inf in factors:
        return 0.0
    return round_up(Fraction(top) / math.prod(map(Fraction, factors)))


def sqrt_up(value: float) -> float:
    """Return a double not below the root of a number that is not negative.

    >>> sqrt_up(4.0), sqrt_up(math.inf)
    (2.0, inf)
    """
    return root_up(Fraction(value)) if math.isfinite(value) else value


def hypot_up(*values: float) -> float:
    """Return a double not below the root of the sum of squares.

    >>> hypot_up(3.0, 4.0)
    5.0
    """
    squares = sum((Fraction(v) ** 2 for v in values if math.isfinite(v)), Fraction())
    return root_up(squares) if all(map(math.isfinite, values)) else math.inf


def upper_eigenvalue(S: Tensor) -> Tensor:
    """Return upper bounds on the largest eigenvalues of symmetric matrices.

    The eigen-solver proposes ``S = V diag(l) V^T``; how wrong that is, the residual and
    the loss of orthogonality, is bounded in floating point and added (Rump 2010).

    Args:
        S: ``(..., n, n)``, exactly symmetric, in float64.

    Returns:
        ``(...)``; infinite where S is not finite. Cost: one eigendecomposition and
        two products of matrices.

    >>> S = torch.tensor([[2.0, 1.0], [1.0, 2.0]], dtype=torch.float64)
    >>> bound = float(upper_eigenvalue(S))
    >>> 3.0 <= bound < 3.0 + 1e-13
    True
    """
    good = torch.isfinite(S).all(-1).all(-1)
    S = torch.where(good[..., None, None], S, torch.zeros_like(S))
    values, V = torch.linalg.eigh(S)
    top = values[..., -1]
    size = values.abs().amax(-1)
    defect = _defect(V)
    scaled = V * values[..., None, :]
    residual = _norm(S - scaled @ V.mT)
    rounding = _gamma(V) * (_norm(V) ** 2 * size + _norm(S))
    error = residual + rounding + defect * top.abs() + 4 * UNIT * size
    bound = top + error * (1 + 1e-10)
    return torch.where(good, bound, torch.full_like(bound, math.inf))


def spectral_norm(W: Tensor) -> Tensor:
    """Return upper bounds on the largest singular values of matrices.

    As :func:`upper_eigenvalue`, from a singular value decomposition.

    Args:
        W: ``(..., m, n)`` in float64.

    Returns:
        ``(...)``; infinite where W is not finite.

    >>> bound = float(spectral_norm(torch.tensor([[3.0, 4.0]], dtype=torch.float64)))
    >>> 5.0 <= bound < 5.0 + 1e-13
    True
    """
    if not W.shape[-1] or not W.shape[-2]:
        return W.new_zeros(W.shape[:-2])
    good = torch.isfinite(W).all(-1).all(-1)
    W = torch.where(good[..., None, None], W, torch.zeros_like(W))
    U, s, Vh = torch.linalg.svd(W, full_matrices=False)
    top = s[..., 0]
    residual = _norm(W - (U * s[..., None, :]) @ Vh)
    size = _norm(U) * _norm(Vh) * top + _norm(W)
    error = residual + _gamma(U) * size + (_defect(U) + _defect(Vh.mT)) * top
    bound = top + (error + 4 * UNIT * top) * (1 + 1e-10)
    return torch.where(good, bound, torch.full_like(bound, math.inf))


def _norm(X: Tensor) -> Tensor:
    """Frobenius norm, rounded up."""
    return torch.linalg.matrix_norm(X) * (1 + (X.shape[-1] * X.shape[-2] + 4) * UNIT)


def _gamma(V: Tensor) -> float:
    """Relative rounding of a product of matrices, with room for a few operations."""
    n = max(V.shape[-1], V.shape[-2]) + 8
    return n * UNIT / (1 - n * UNIT)


def _defect(V: Tensor) -> Tensor:
    """Bound on ``|V^T V - I|``, for V with at most as many columns as rows."""
    eye = torch.eye(V.shape[-1], dtype=V.dtype, device=V.device)
    return _norm(V.mT @ V - eye) + _gamma(V) * (_norm(V) ** 2 + 1)
