r"""Conjugate gradients for ``(1 + M) d = t`` with products with M only.

``M = K sharp K^T`` is never formed.

The rule by which they stop is about the step that comes out, not about d. For the
Riesz problem ``g(x, .) = K^T y + e`` with ``b = K sharp e`` and ``t = y - b`` the
solution is ``x = sharp (e + K^T d)``, and a residual ``rho = t - S d`` changes x by
``sharp K^T S^-1 rho``, whose norm in the metric is at most that of rho::

    |dx|_g^2 = rho^T S^-1 M rho <= |rho|^2 .

The norm of x itself is known from vectors of length rank, see :meth:`Target.energy`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from riemannian_modules.reading import number

__all__ = ["ConjugateGradients", "Iterates", "Target", "conjugate_gradients"]

Map = Callable[[Tensor], Tensor]

_TOLERANCE = {torch.float64: 1e-10}
_LOOSE = 1e-5
_EVERY = {"cpu": 1, "meta": 0}
_SELDOM = 4


@dataclass(frozen=True)
class ConjugateGradients:
    """How a block is solved by conjugate gradients, as a value.

    Attributes:
        tolerance: bound of the step's relative error in the norm of the metric; None:
            1e-10 for float64 parameters, 1e-5 for all others.
        iterations: at most this many for each solve.
        pivots: columns of the small matrix in the preconditioner; None: chosen by
            cost; 0: no preconditioner.
        warm_start: begin with what the pass before ended with, where the rank is the
            same; worth it for full batches. A step then depends on the one before
            within the tolerance.
    """

    tolerance: float | None = None
    iterations: int = 500
    pivots: int | None = None
    warm_start: bool = False

    def __post_init__(self) -> None:
        fits = self.tolerance is None or 0.0 < self.tolerance < 1.0
        pivots = 0 if self.pivots is None else self.pivots
        whole = isinstance(self.iterations, int | Integral) and isinstance(
            pivots, int | Integral
        )
        if not (fits and whole) or self.iterations < 1 or pivots < 0:
            raise ValueError(
                f"{self}: the tolerance must lie between 0 and 1, there must be at "
                "least one iteration, and no negative number of pivots, both of them "
                "whole numbers"
            )

    def bound(self, dtype: torch.dtype) -> float:
        """Return the tolerance for parameters of a data type."""
        return self.tolerance or _TOLERANCE.get(dtype, _LOOSE)


@dataclass(frozen=True)
class Target:
    """The right-hand side of the dual system, with what measures the step.

    Attributes:
        y: whitened residual, ``(rank,)``.
        b: ``K sharp e``, ``(rank,)``.
        base: ``e(sharp e)``, a scalar.
    """

    y: Tensor
    b: Tensor
    base: Tensor

    def energy(self, d: Tensor, md: Tensor) -> Tensor:
        """Return ``g(x, x)`` for ``x = sharp (e + K^T d)``, for any d.

        Implements :eq:`cg-energy`. Not less than ``|K x|^2``, which has no subtraction.
        """
        image = self.b + md
        weight = self.base + d @ (self.b + image)
        return weight.clamp_min(0.0) + image @ image


@dataclass(frozen=True)
class Iterates:
    """Where conjugate gradients ended.

    Attributes:
        d: ``(rank,)``.
        md: ``M d``.
        error: bound of the step's relative error in the metric, a scalar.
        iterations: products with M.
        converged: whether the error is below the tolerance; None where it was not read.
    """

    d: Tensor
    md: Tensor
    error: Tensor
    iterations: int
    converged: bool | None


def conjugate_gradients(
    product: Map,
    target: Target,
    tolerance: float,
    limit: int,
    precondition: Map,
    start: tuple[Tensor, Tensor] | None = None,
) -> Iterates:
    """Solve ``d + M d = y - b``.

    Implements :eq:`cg-error` as its rule to stop. On the CPU the rule is read in every
    iteration, on other devices, where reading makes the host wait, in every fourth, on
    ``meta`` never. Cost: a product with M for each iteration.

    Args:
        product: multiplies by M, which is symmetric and positive semi-definite.
        target: the right-hand side.
        tolerance: bound of the step's relative error.
        limit: at most this many products.
        precondition: a positive definite approximation of ``(1 + M)^-1``.
        start: a first guess and its product with M.

    Returns:
        Where it ended; without convergence also if a number was not finite.

    >>> M = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    >>> zero = torch.zeros(2, dtype=torch.float64)
    >>> target = Target(torch.ones_like(zero), zero, zero.sum())
    >>> found = conjugate_gradients(lambda v: M @ v, target, 1e-9, 9, lambda r: r)
    >>> found.d, found.iterations
    (tensor([0.5000, 0.2500], dtype=torch.float64), 2)
    """
    t = target.y - target.b
    tiny = torch.finfo(t.dtype).tiny
    d, md = (torch.zeros_like(t), torch.zeros_like(t)) if start is None else start
    r = t - d - md
    every = _EVERY.get(t.device.type, _SELDOM)
    decides = partial(_decided, tolerance)
    z = precondition(r)
    p, rz = z, r @ z
    for used in range(limit + 1):
        # Not 0 / 0 where nothing moves at all.
        size = target.energy(d, md).clamp_min(tiny).sqrt()
        error = torch.linalg.vector_norm(r) / size
        if every and (used % every == 0 or used == limit):
            converged, finite = decides(number(error, decides))
            if converged or used == limit or not finite:
                return Iterates(d, md, error, used, converged)
        if used == limit:
            break
        mp = product(p)
        q = p + mp
        # Zero over zero once the residual is exactly zero.
        alpha = rz / (p @ q).clamp_min(tiny)
        d, md = torch.addcmul(d, alpha, p), torch.addcmul(md, alpha, mp)
        r = torch.addcmul(r, alpha, q, value=-1.0)
        z = precondition(r)
        before, rz = rz, r @ z
        p = torch.addcmul(z, rz / before.clamp_min(tiny), p)
    return Iterates(d, md, error, limit, None)


def _decided(tolerance: float, reached: float) -> tuple[bool, bool]:
    return reached <= tolerance, math.isfinite(reached)
