"""The adjoint of a fixed point: ``u = v + (df/dz)^T u``, solved for many v at once.

A backward pass may be vectorised over its cotangents, and values cannot be read in
there. Both solvers therefore read only what they compute for a cotangent of their own,
which is the same for all: the inverse, or the number of iterations.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from riemannian_modules.nn.solvers import tolerance_of
from riemannian_modules.reverse import per_example

__all__ = ["Adjoint", "AdjointSolver", "Direct", "Krylov", "LinearSystem", "probe"]


class LinearSystem(Protocol):
    """The map ``u -> u - (df/dz)^T u`` at a fixed point.

    Attributes:
        image: ``f(z)``, ``(n, *state)``, of the shape and data type of v and u.
    """

    image: Tensor

    def apply(self, u: Tensor) -> Tensor:
        """Return ``u - (df/dz)^T u`` for ``(n, *state)``, also inside of vmap."""

    def matrix(self) -> Tensor:
        """Return ``I - df/dz`` of each example, ``(n, d, d)``."""


@dataclass(frozen=True)
class Adjoint:
    """How to solve one linear system, for any number of right-hand sides.

    Attributes:
        solve: returns u for a right-hand side v; works inside of vmap. And which
            examples have converged, ``(n,)``.
        residual: ``|u - (df/dz)^T u - v| / |v|`` of each example for a cotangent of
            the solver's own, ``(n,)``.
        converged: whether it is below the tolerance, ``(n,)``.
    """

    solve: Callable[[Tensor], tuple[Tensor, Tensor]]
    residual: Tensor
    converged: Tensor


class AdjointSolver(Protocol):
    """Anything that prepares the solution of a linear system."""

    def __call__(self, system: LinearSystem) -> Adjoint:
        """Prepare.

        Args:
            system: the linear system.

        Returns:
            Its solution, for any right-hand side.
        """


@dataclass(frozen=True)
class Direct:
    """The inverse of ``I - df/dz``, example by example, with a step of refinement.

    It asks that df/dz has no entries between examples, and notices where it has.

    Args:
        tolerance: bound on the relative residual; None: the rounding unit to the power
            3/4.

    Cost for d numbers of state: one backward pass of f with d cotangents, ``n d^2``
    memory, ``n d^3`` operations, and ``2 n d^2`` for every right-hand side.
    """

    tolerance: float | None = None

    def __call__(self, system: LinearSystem) -> Adjoint:
        """Prepare the inverse; see :class:`AdjointSolver`."""
        # Linear algebra knows no half precision.
        wide = torch.promote_types(system.image.dtype, torch.float32)
        matrix = system.matrix().to(wide)
        inverse = torch.linalg.inv_ex(matrix)[0]

        def solve(v: Tensor) -> Tensor:
            right = v.reshape(len(v), 1, -1).to(wide)
            u = right @ inverse
            return (u + (right - u @ matrix) @ inverse).view(v.shape).to(v.dtype)

        residual, converged = _judged(system, solve, self.tolerance)
        return Adjoint(lambda v: (solve(v), converged), residual, converged)


@dataclass(frozen=True)
class Krylov:
    """Generalised conjugate residuals (Eisenstat, Elman & Schultz, 1983).

    One product with ``(df/dz)^T`` for each iteration; in exact arithmetic it needs at
    most d of them. It converges if the symmetric part of ``I - df/dz`` is positive
    definite, as where f contracts; else take :class:`Direct`. The number of
    iterations is found with a cotangent of its own, and then is the same for all,
    with a few more to be sure.

    Args:
        tolerance: bound on the relative residual; None: the rounding unit to the power
            3/4.
        iterations: most products.
        memory: directions that are kept; twice as many copies of the cotangents.
    """

    tolerance: float | None = None
    iterations: int = 100
    memory: int = 20

    def __call__(self, system: LinearSystem) -> Adjoint:
        """Find the number of iterations; see :class:`AdjointSolver`."""
        tolerance = tolerance_of(self.tolerance, system.image.dtype)
        v = probe(system.image)
        # Where looking would wait for the device it does all iterations.
        enough = 0.01 * tolerance if v.device.type == "cpu" else None
        most = 1 if v.is_meta else self.iterations
        needed = self._run(system, v, most, enough)[1]
        count = min(self.iterations, needed + max(3, needed // 4))

        def solve(v: Tensor) -> Tensor:
            return self._run(system, v, count)[0]

        def checked(v: Tensor) -> tuple[Tensor, Tensor]:
            # At unit size no square of a small cotangent is lost.
            size = per_example(v.abs().reshape(len(v), -1).amax(1), v)
            unit = v / torch.where(size > 0, size, torch.ones_like(size))
            u = solve(unit)
            return size * u, _residual(system, u, unit) <= 10.0 * tolerance

        residual, converged = _judged(system, solve, tolerance)
        return Adjoint(checked, residual, converged)

    def _run(
        self,
        system: LinearSystem,
        v: Tensor,
        count: int,
        enough: float | None = None,
    ) -> tuple[Tensor, int]:
        """Return u after ``count`` iterations, or where it is good enough."""
        u, r = torch.zeros_like(v), v
        eps = torch.finfo(v.dtype).eps
        kept: list[tuple[Tensor, Tensor]] = []
        for done in range(1, count + 1):
            p, image = r, system.apply(r)
            whole = _dot(image, image)
            for direction, of_it in kept:
                along = _dot(image, of_it)
                p, image = p - along * direction, image - along * of_it
            rest = _dot(image, image)
            # Where nothing but rounding is left there is no new direction.
            fresh = rest > eps**2 * 1e4 * whole
            scale = torch.where(fresh, rest, torch.ones_like(rest)).rsqrt() * fresh
            p, image = scale * p, scale * image
            step = _dot(r, image)
            u, r = u + step * p, r - step * image
            kept = [*kept, (p, image)][-self.memory :]
            if enough is not None and bool((_ratio(r, v) <= enough).all()):
                return u, done
        return u, count


def probe(image: Tensor) -> Tensor:
    """Return a cotangent without any pattern, of unit length in every example.

    Not a random one: a backward pass must not move the random state.

    Args:
        image: ``(n, *state)``.

    Returns:
        The cotangent, of the same shape.
    """
    wide = torch.promote_types(image.dtype, torch.float32)
    numbers = torch.arange(
        1, image.numel() + 1, dtype=wide, device=image.device
    ).view_as(image)
    pattern = torch.sin(numbers.square())
    return (pattern / _dot(pattern, pattern).sqrt()).to(image.dtype)


def _judged(
    system: LinearSystem,
    solve: Callable[[Tensor], Tensor],
    tolerance: float | None,
) -> tuple[Tensor, Tensor]:
    v = probe(system.image)
    residual = _residual(system, solve(v), v)
    return residual, residual <= tolerance_of(tolerance, v.dtype)


def _residual(system: LinearSystem, u: Tensor, v: Tensor) -> Tensor:
    return _ratio(v - system.apply(u), v)


def _ratio(a: Tensor, b: Tensor) -> Tensor:
    floor = torch.finfo(b.dtype).tiny
    return (_dot(a, a).sqrt() / _dot(b, b).sqrt().clamp_min(floor)).reshape(-1)


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Return the inner product of each example, with the dimensions of the state."""
    return per_example((a * b).reshape(len(a), -1).sum(1), a)
