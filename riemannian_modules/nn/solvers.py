"""Solvers of fixed point equations ``z = f(z)``, passed as values.

Each example of a batch is a problem of its own: it stops by itself and mixes only its
own iterates, so that its solution does not depend on what else is in the batch.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, Protocol

import torch
from torch import Tensor

from riemannian_modules.errors import NotConvergedError, NotConvergedWarning
from riemannian_modules.reverse import per_example

__all__ = [
    "Anderson",
    "OnFailure",
    "Picard",
    "Solved",
    "Solver",
    "gap",
    "settle",
    "told",
    "tolerance_of",
]

Step = Callable[[Tensor], Tensor]
OnFailure = Literal["raise", "warn", "ignore"]


@dataclass(frozen=True)
class Solved:
    """What a solver returns.

    Attributes:
        value: the last iterate, ``(n, *state)``.
        converged: which examples have converged, ``(n,)``.
        iterations: number of evaluations of the map.
    """

    value: Tensor
    converged: Tensor
    iterations: int


class Solver(Protocol):
    """Anything that solves ``z = step(z)`` from a start, example by example."""

    def __call__(self, step: Step, start: Tensor) -> Solved:
        """Solve.

        Args:
            step: the map, from and to ``(n, *state)``; called without autograd.
            start: first iterate.

        Returns:
            The solution, as far as it got.
        """


@dataclass(frozen=True)
class Picard:
    """Picard iteration, ``z <- f(z)``: linear convergence at the rate of f.

    Args:
        tolerance: bound on ``|f(z) - z| / |f(z)|`` of each example; None: the rounding
            unit to the power 3/4, 2e-12 in float64 and 6e-6 in float32.
        iterations: most evaluations of f.
        every: off the CPU, where each look at the residual waits for the device, the
            evaluations between two looks; 0: none, all iterations run.

    >>> found = Picard()(lambda z: 0.5 * z + 1.0, torch.zeros(3, 1))
    >>> bool(found.converged.all()), found.value.round().flatten().tolist()
    (True, [2.0, 2.0, 2.0])
    """

    tolerance: float | None = None
    iterations: int = 200
    every: int = 1

    def __call__(self, step: Step, start: Tensor) -> Solved:
        """Solve ``z = step(z)``; see :class:`Solver`."""
        return _iterate(self, step, start, lambda z, after: after)


@dataclass(frozen=True)
class Anderson:
    """Anderson acceleration: mix the last iterates so that their residuals cancel.

    Every example has a least-squares problem of its own in the span of its last
    ``memory`` differences (Walker & Ni, 2011, type II). On an affine map it is
    GMRES as long as the memory lasts, so it also converges where f contracts hardly
    or not at all.

    Args:
        tolerance: as in :class:`Picard`.
        iterations: most evaluations of f.
        every: as in :class:`Picard`.
        memory: number of differences, at least 1. The iteration keeps twice as many
            copies of the state.

    >>> slow = lambda z: 0.99 * z + 0.01
    >>> Anderson()(slow, torch.zeros(1, 1, dtype=torch.float64)).iterations < 10
    True
    """

    tolerance: float | None = None
    iterations: int = 100
    every: int = 1
    memory: int = 5

    def __call__(self, step: Step, start: Tensor) -> Solved:
        """Solve ``z = step(z)``; see :class:`Solver`."""
        history: list[tuple[Tensor, Tensor]] = []

        def mix(z: Tensor, after: Tensor) -> Tensor:
            history.append((_wide(_flat(after)), _wide(_flat(after - z))))
            del history[: -self.memory - 1]
            return _mixed(history).view_as(z).to(after.dtype)

        return _iterate(self, step, start, mix)


def _iterate(
    solver: Picard | Anderson,
    step: Step,
    start: Tensor,
    update: Callable[[Tensor, Tensor], Tensor],
) -> Solved:
    z = start
    converged = torch.zeros(len(start), dtype=torch.bool, device=start.device)
    count = 0
    while count < solver.iterations:
        count += 1
        after = step(z)
        # Under autocast the map may be less precise than its start.
        closed = gap(after, z) <= tolerance_of(solver.tolerance, after.dtype)
        # What has converged takes the plain step, then it rests.
        following = torch.where(per_example(closed, z), after, update(z, after))
        z = torch.where(per_example(converged, z), z, following)
        converged = converged | closed
        if start.is_meta:
            break
        look = solver.every > 0 and count % solver.every == 0
        if (look or start.device.type == "cpu") and told(converged.all()):
            break
    return Solved(z, converged, count)


def _mixed(history: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the next iterate from ``(f(z), f(z) - z)`` of the last ones."""
    value, residual = history[-1]
    if len(history) == 1:
        return value
    pairs = list(pairwise(history))
    values = torch.stack([b[0] - a[0] for a, b in pairs], -1)
    changes = torch.stack([b[1] - a[1] for a, b in pairs], -1)
    # Differences shrink from step to step: at unit length they weigh the same.
    length = changes.norm(dim=-2, keepdim=True)
    length = torch.where(length > 0, length, torch.ones_like(length))
    values, changes = values / length, changes / length
    # No matrix products: autocast would make them in half precision.
    gram = (changes.unsqueeze(-1) * changes.unsqueeze(-2)).sum(-3)
    right = (changes * residual.unsqueeze(-1)).sum(-2)
    eps = torch.finfo(value.dtype).eps
    eye = torch.eye(len(pairs), dtype=value.dtype, device=value.device)
    weights = torch.linalg.solve_ex(gram + 100.0 * eps * eye, right)[0]
    return value - (values * weights.unsqueeze(-2)).sum(-1)


def _flat(z: Tensor) -> Tensor:
    return z.reshape(len(z), -1)


def _wide(z: Tensor) -> Tensor:
    # Linear algebra knows no half precision.
    return z.to(torch.promote_types(z.dtype, torch.float32))


def gap(after: Tensor, before: Tensor) -> Tensor:
    """Return ``|after - before| / |after|`` of each example, ``(n,)``."""
    floor = torch.finfo(after.dtype).eps
    size = _flat(after).norm(dim=1).clamp_min(floor)
    return _flat(after - before).norm(dim=1) / size


def tolerance_of(tolerance: float | None, dtype: torch.dtype) -> float:
    """Return the tolerance, by default what the data type allows."""
    return float(torch.finfo(dtype).eps) ** 0.75 if tolerance is None else tolerance


def told(flag: Tensor) -> bool | None:
    """Return the value of a boolean, or None where it has none: inside of vmap."""
    try:
        return bool(flag)
    except RuntimeError:
        return None


def settle(
    value: Tensor, converged: Tensor, on_failure: OnFailure, message: str
) -> Tensor:
    """Return the value of an iteration; refuse or mark what has not converged.

    Args:
        value: what it found, ``(n, *state)``.
        converged: which examples have converged, ``(n,)``.
        on_failure: what to do if not all have.
        message: what has not converged, and what to do.

    Returns:
        The value. With ``"raise"``, where reading the outcome is impossible (inside of
        vmap) or would wait for a device: NaN in the examples that have not converged.

    Raises:
        NotConvergedError: an example has not converged.
    """
    if on_failure == "ignore" or value.is_meta:
        return value
    outcome = told(converged.all()) if value.device.type == "cpu" else None
    if outcome:
        return value
    if on_failure == "raise" and outcome is None:
        return torch.where(per_example(converged, value), value, torch.nan)
    if on_failure == "raise":
        raise NotConvergedError(message)
    if outcome is not None:
        warnings.warn(message, NotConvergedWarning, stacklevel=3)
    return value
