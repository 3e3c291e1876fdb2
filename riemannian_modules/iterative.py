"""A block solved by conjugate gradients: the steps around the loop."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from riemannian_modules.block import Block, Vectors
from riemannian_modules.conjugate import (
    ConjugateGradients,
    Iterates,
    Target,
    conjugate_gradients,
)
from riemannian_modules.factors import MetricFactor
from riemannian_modules.precision import single_suffices
from riemannian_modules.preconditioner import PivotedPreconditioner
from riemannian_modules.solution import Solution

__all__ = ["IterativeSolver"]

_ROUNDS = 5


class IterativeSolver:
    """Conjugate gradients for ``g(x, .) = K^T y + e`` on one block.

    Args:
        block: the block.
        how: tolerance and limits.
        pivots: columns in the preconditioner, at most.
        worth: see :class:`PivotedPreconditioner`.
        start: ``d`` of an earlier solve, a first guess.
    """

    def __init__(
        self,
        block: Block,
        how: ConjugateGradients,
        pivots: int,
        worth: Callable[[float, int], bool] | None = None,
        start: Tensor | None = None,
    ) -> None:
        self.block = block
        self.how = how
        self._pivots = pivots
        self._worth = worth
        self.tolerance = how.bound(block.dtype)
        self.last: Tensor | None = None
        fits = start is not None and start.shape == (block.rank,)
        self._start = start if fits else None

    @cached_property
    def preconditioner(self) -> PivotedPreconditioner:
        """The preconditioner, made when first needed."""
        block = self.block
        return PivotedPreconditioner(
            self.diagonal, block.gram_columns, self._pivots, self._worth
        )

    @cached_property
    def diagonal(self) -> Tensor:
        """Diagonal of ``K sharp K^T``."""
        return self.block.gram_diagonal()

    @cached_property
    def trace(self) -> float:
        """Trace of ``K sharp K^T``; infinite where reading it would wait."""
        on_host = self.block.device.type == "cpu"
        return float(self.diagonal.double().sum()) if on_host else float("inf")

    @property
    def too_wide(self) -> bool:
        """Whether float32 leaves too large an error of a block in lower precision."""
        narrow = self.block.dtype != torch.float64
        return narrow and not single_suffices(self.trace)

    @cached_property
    def _wide(self) -> Block | None:
        return self.block.double() if self.too_wide else None

    def solve(
        self,
        y: Tensor | None,
        e: Vectors | None,
        source: Mapping[str, MetricFactor] | None,
        limit: int,
        refine: bool,
    ) -> Solution:
        """Solve for the covector ``K^T y + e``.

        Args:
            y: ``(rank,)`` or None for zero.
            e: ambient covectors or None for zero.
            source: factors whose row sums are e, if known.
            limit: at most this many iterations.
            refine: solve for what rounding left of e once more.

        Returns:
            The solution, converged or not.
        """
        block, start = self.block, self._start
        target = self._target(y, e, source)
        guess = None if start is None else self._scaled(start, target)
        found = self._iterate(target, guess, self.tolerance, limit)
        self.last = found.d
        x = self._vectors(found, e, source)
        velocity, used = target.b + found.md, found.iterations + (guess is not None)
        if e is not None and refine:
            # The subtraction lost digits of e: solve for the error that is left.
            lowered = block.rmatvec(block.matvec(x) - target.y)
            left = {
                p.name: e[p.name] - p.space.flat(x[p.name]) - lowered[p.name]
                for p in block.parts
            }
            more = self._target(None, left, None)
            again = self._iterate(more, None, self.tolerance**0.5, limit)
            correction = self._vectors(again, left, None)
            x = {name: x[name] + correction[name] for name in x}
            velocity = velocity + more.b + again.md
            used += again.iterations
        return Solution(x, velocity, block, "cg", used, found.converged, found.error)

    def complaint(self, found: Solution) -> str:
        """Return what to say of a solution that has not converged."""
        block = self.block
        reached = float("nan") if found.error is None else float(found.error)
        return (
            f"block '{block.name}' (rank {block.rank}, dim {block.dim}): conjugate "
            f"gradients stopped after {found.iterations} iterations with a relative "
            f"error up to {reached:.1e}, above the tolerance {self.tolerance:.1e}. "
            "Raise the mass, the number of pivots or of iterations, or the tolerance"
        )

    def _target(
        self,
        y: Tensor | None,
        e: Vectors | None,
        source: Mapping[str, MetricFactor] | None,
    ) -> Target:
        block = self.block
        zero = torch.zeros(block.rank, dtype=block.precision, device=block.device)
        y = zero if y is None else y.to(block.precision)
        if e is None:
            return Target(y, zero, zero.sum())
        base = block.pair(e, block.sharp(e)).to(block.precision)
        return Target(y, block.image(e, source).to(block.precision), base)

    def _scaled(self, start: Tensor, target: Target) -> tuple[Tensor, Tensor]:
        """Return the multiple of a guess that is best in the norm of S, and M of it."""
        start = start.to(target.y)
        ms = self.block.gram_product(start)
        tiny = torch.finfo(start.dtype).tiny
        scale = start @ (target.y - target.b) / (start @ (start + ms)).clamp_min(tiny)
        return scale * start, scale * ms

    def _iterate(
        self,
        target: Target,
        start: tuple[Tensor, Tensor] | None,
        tolerance: float,
        limit: int,
    ) -> Iterates:
        product, wide = self.block.gram_product, self._wide
        found = conjugate_gradients(
            product, target, tolerance, limit, self.preconditioner, start
        )
        if wide is None:
            return found
        used = found.iterations
        for _ in range(_ROUNDS):
            # What was reached with products in float32 is measured in float64, and
            # what is left is the next right-hand side.
            state = found.d, wide.gram_product(found.d).to(found.d)
            found = conjugate_gradients(
                product,
                target,
                tolerance,
                max(0, limit - used),
                self.preconditioner,
                state,
            )
            used += 1 + found.iterations
            if found.iterations == 0 or used >= limit:
                break
        return replace(found, iterations=used)

    def _vectors(
        self,
        found: Iterates,
        e: Vectors | None,
        source: Mapping[str, MetricFactor] | None,
    ) -> dict[str, Tensor]:
        if e is None:
            return self.block.direction(found.d)
        return self.block.direction(-found.d, e, source)
