"""Rates and gains of matrices whose entries are only known to lie in intervals."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.contraction.verified import (
    UNIT,
    spectral_norm,
    upper_eigenvalue,
)
from riemannian_modules.errors import ContractionError

__all__ = ["MetricRoot", "interval_feedback", "interval_gain", "interval_rate"]


@dataclass(frozen=True)
class MetricRoot:
    """A constant metric with numerical roots, and how wrong they are.

    Args:
        P: the metric, ``(n, n)``.
        F: about ``P^(-1/2)``.
        H: about ``P^(1/2)``.
        delta: ``|F^T P F - I|`` at most.
        e: ``|P - H^T H|`` at most.
    """

    P: Tensor
    F: Tensor
    H: Tensor
    delta: float
    e: float

    @classmethod
    def of(cls, P: Tensor) -> "MetricRoot":
        """Find the roots of a metric.

        Args:
            P: symmetric and positive definite, ``(n, n)``.

        Returns:
            The roots; exact for multiples of the identity by powers of four.

        Raises:
            ContractionError: P is not symmetric, or not positive definite.
        """
        P = P.detach().double()
        n = P.shape[-1]
        if P.shape != (n, n) or not torch.equal(P, P.mT):
            raise ContractionError(
                f"a metric of shape {tuple(P.shape)} that is not a symmetric matrix; "
                "symmetrise it: (P + P.T) / 2"
            )
        eye = torch.eye(n, dtype=torch.float64)
        if torch.equal(P, eye):
            return cls(P, eye, eye, 0.0, 0.0)
        values, V = torch.linalg.eigh(P)
        if not float(values[0]) > n * 4e-16 * float(values[-1]):
            raise ContractionError(
                f"a metric with the eigenvalues {values.tolist()} is not positive "
                "definite, or too ill-conditioned to compute with"
            )
        F = V / values.sqrt() @ V.mT
        H = V * values.sqrt() @ V.mT
        gap = _product(_product(_exact(F.mT), _exact(P)), _exact(F))
        delta = float(_size(gap[0] - eye) + _size(gap[1])) * (1 + 1e-12)
        square = _product(_exact(H.mT), _exact(H))
        e = float(_size(P - square[0]) + _size(square[1])) * (1 + 1e-12)
        if not delta < 0.5:
            raise ContractionError(
                f"a metric of condition {float(values[-1] / values[0]):.1e} is too "
                "ill-conditioned to compute with"
            )
        return cls(P, F, H, delta + 4 * n * UNIT, e + 4 * n * UNIT * float(values[-1]))


Ball = tuple[Tensor, Tensor]  # a matrix and the largest error of each entry


def _exact(X: Tensor) -> Ball:
    return X, torch.zeros_like(X)


def _product(left: Ball, right: Ball) -> Ball:
    """Return a product of matrices with errors, and its own rounding."""
    A, a = left
    B, b = right
    n = A.shape[-1] + 8
    gamma = n * UNIT / (1 - n * UNIT)
    big = A.abs() @ B.abs()
    error = a @ B.abs() + A.abs() @ b + a @ b + gamma * big
    return A @ B, error * (1 + 4 * n * UNIT)


def _size(X: Tensor) -> Tensor:
    return torch.linalg.matrix_norm(X) * (1 + 4 * X.shape[-1] ** 2 * UNIT)


def _ball(lower: Tensor, upper: Tensor) -> Ball:
    point = lower == upper
    centre = torch.where(point, lower, lower / 2 + upper / 2)
    radius = torch.maximum(upper - centre, centre - lower)
    wide = radius * (1 + 4 * UNIT) + torch.finfo(torch.float64).tiny
    return centre, torch.where(point, torch.zeros_like(wide), wide)


def interval_rate(lower: Tensor, upper: Tensor, root: MetricRoot) -> Tensor:
    """Return lower bounds on the rates of all Jacobians between two bounds.

    Implements :eq:`interval-rate`.

    Args:
        lower: ``(..., n, n)``, lower bounds of the entries, float64.
        upper: upper bounds.
        root: the metric.

    Returns:
        ``(...)``; minus infinity where a bound is infinite. Cost: an eigenvalue
        decomposition and a singular value decomposition for each.

    >>> J = torch.tensor([[-2.0, 1.0], [-1.0, -3.0]], dtype=torch.float64)
    >>> eye = MetricRoot.of(torch.eye(2, dtype=torch.float64))
    >>> bound = interval_rate(J - 0.1, J + 0.1, eye)
    >>> round(float(bound), 6)
    1.8
    """
    J = _ball(lower, upper)
    if root.delta:
        FP = _product(_exact(root.F.mT), _exact(root.P))
        J = _product(_product(FP, J), _exact(root.F))
    C, R = J
    # Each entry of the sum is rounded once.
    symmetric = C / 2 + C.mT / 2
    radius = (R / 2 + R.mT / 2) * (1 + 4 * UNIT) + symmetric.abs() * 2 * UNIT
    # The largest eigenvalue grows with the diagonal: take its upper end.
    own = radius.diagonal(dim1=-2, dim2=-1)
    top = symmetric.diagonal(dim1=-2, dim2=-1) + own
    top = top + top.abs() * 2 * UNIT
    highest = symmetric.diagonal_scatter(top, dim1=-2, dim2=-1)
    others = radius.diagonal_scatter(torch.zeros_like(own), dim1=-2, dim2=-1)
    w = upper_eigenvalue(highest) + spectral_norm(others)
    w = w + w.abs() * 4 * UNIT
    scale = torch.where(w >= 0, 1 - root.delta, 1 + root.delta)
    rate = -(w / scale)
    return rate - rate.abs() * 4 * UNIT


def interval_gain(
    lower: Tensor, upper: Tensor, target: MetricRoot, source: MetricRoot
) -> Tensor:
    """Return upper bounds on the gains of all couplings between two bounds.

    Implements :eq:`interval-gain`.

    Args:
        lower: ``(..., m, n)``, lower bounds of the entries, float64.
        upper: upper bounds.
        target: metric of the rows.
        source: metric of the columns.

    Returns:
        ``(...)``; infinite where a bound is.
    """
    J = _ball(lower, upper)
    JF = _product(J, _exact(source.F)) if source.delta else J
    HJF = _product(_exact(target.H), JF) if target.delta else JF
    largest = spectral_norm(HJF[0]) + spectral_norm(HJF[1])
    plain = spectral_norm(JF[0]) + spectral_norm(JF[1])
    if not source.delta and not target.delta:
        return largest * (1 + 4 * UNIT)
    squared = (largest.square() + target.e * plain.square()) / (1 - source.delta)
    return torch.where(
        torch.isfinite(squared), squared.sqrt() * (1 + 8 * UNIT), math.inf
    )


def interval_feedback(
    forth: tuple[Tensor, Tensor],
    back: tuple[Tensor, Tensor],
    one: MetricRoot,
    two: MetricRoot,
    gamma: float,
) -> Tensor:
    """Return upper bounds on the gain that :eq:`feedback-rate` asks for.

    ``|F1^T (P1 J12 + gamma J21^T P2) F2| / (2 sqrt(gamma))``, divided by the root of
    ``(1 - delta_1) (1 - delta_2)``.

    Args:
        forth: bounds on ``J12``, ``(..., m, n)`` each.
        back: bounds on ``J21``, ``(..., n, m)`` each.
        one: metric of the first module.
        two: metric of the second module.
        gamma: weight of the second module.

    Returns:
        ``(...)``; infinite where a bound is.
    """
    left = _product(_exact(one.P), _ball(*forth))
    centre, radius = _ball(*back)
    right = _product((centre.mT, radius.mT), _exact(two.P))
    total = left[0] + gamma * right[0]
    slip = 4 * UNIT * (left[0].abs() + gamma * right[0].abs())
    error = (left[1] + gamma * right[1] + slip) * (1 + 8 * UNIT)
    found = _product(_product(_exact(one.F.mT), (total, error)), _exact(two.F))
    size = spectral_norm(found[0]) + spectral_norm(found[1])
    room = 2 * math.sqrt(gamma * (1 - one.delta) * (1 - two.delta))
    return size / room * (1 + 16 * UNIT)
