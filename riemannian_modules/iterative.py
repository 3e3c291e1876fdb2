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
from riemannian_modules.preconditioner import PivotedPreconditioner, Worth
from riemannian_modules.reading import number
from riemannian_modules.solution import Solution

__all__ = ["IterativeSolver"]

_ROUNDS = 5

Source = Mapping[str, MetricFactor] | None


class IterativeSolver:
    """Conjugate gradients for ``g(x, .) = K^T y + e`` on one block.

    Args:
        block: the block.
        how: tolerance and limits.
        pivots: columns in the preconditioner, at most.
        worth: returns that of :class:`PivotedPreconditioner`, when it is made.
        start: ``d`` of an earlier solve, a first guess.
    """

    def __init__(
        self,
        block: Block,
        how: ConjugateGradients,
        pivots: int,
        worth: Callable[[], Worth] | None = None,
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
        worth = None if self._worth is None else self._worth()
        return PivotedPreconditioner(
            self.diagonal, self.block.gram_columns, self._pivots, worth
        )

    @cached_property
    def diagonal(self) -> Tensor:
        """Diagonal of ``K sharp K^T``."""
        return self.block.gram_diagonal()

    @cached_property
    def trace(self) -> float:
        """Trace of ``K sharp K^T``; infinite where reading it would wait."""
        if self.block.device.type != "cpu":
            return float("inf")
        return number(self.diagonal.double().sum(), single_suffices)

    @cached_property
    def _root_trace(self) -> Tensor:
        return self.diagonal.double().sum().clamp_min(0.0).sqrt()

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
        source: Source,
        limit: int,
        refinements: int | None,
    ) -> Solution:
        """Solve for the covector ``K^T y + e``.

        Implements :eq:`cg-rounding` as the error that it reports.

        Args:
            y: ``(rank,)`` or None for zero.
            e: ambient covectors or None for zero.
            source: factors whose row sums are e, if known.
            limit: at most this many iterations.
            refinements: how often to solve for what rounding left of the covector;
                None: as often as the tolerance asks for.

        Returns:
            The solution, converged or not.
        """
        start, block = self._start, self._wide or self.block
        target = self._target(block, y, *self._cast(block, e, source))
        guess = None if start is None else self._scaled(start, target)
        found = self._iterate(target, guess, 0.5 * self.tolerance, limit)
        self.last = found.d
        block = self._exact_enough(target, found)
        e, source = self._cast(block, e, source)
        x = self._vectors(block, found, e, source)
        image = self._image(block, x)
        left = (target.y - found.d - image).norm()
        velocity, used = target.b + found.md, found.iterations + (guess is not None)
        least, most = refinements or 0, _ROUNDS if refinements is None else refinements
        done = 0
        while True:
            rounding, size = self._rounding(block, target, x, image)
            error = (left + rounding) / size
            converged = found.converged and bool(error <= self.tolerance)
            if done == most or (done >= least and (not found.converged or converged)):
                break
            # What rounding left of the covector, K^T times what it left of y with it.
            lowered = block.rmatvec(image - target.y)
            rest = {
                p.name: (0.0 if e is None else e[p.name])
                - p.space.flat(x[p.name])
                - lowered[p.name]
                for p in block.parts
            }
            more = self._target(block, None, rest, None)
            again = self._iterate(more, None, self.tolerance**0.5, limit)
            correction = self._vectors(block, again, rest, None)
            moved = self._image(block, correction)
            own, _ = self._rounding(block, more, correction, moved)
            left = (again.d + moved).norm() + own
            x = {name: x[name] + correction[name] for name in x}
            image, velocity = image + moved, velocity + more.b + again.md
            used, done = used + again.iterations, done + 1
        x = {p.name: x[p.name].to(p.space.point) for p in self.block.parts}
        return Solution(x, velocity, self.block, "cg", used, converged, error)

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
        self, block: Block, y: Tensor | None, e: Vectors | None, source: Source
    ) -> Target:
        own = self.block
        zero = torch.zeros(own.rank, dtype=own.precision, device=own.device)
        y = zero if y is None else y.to(zero)
        if e is None:
            return Target(y, zero, zero.sum())
        base = block.pair(e, block.sharp(e)).to(zero)
        return Target(y, block.image(e, source).to(zero), base)

    def _cast(
        self, block: Block, e: Vectors | None, source: Source
    ) -> tuple[Vectors | None, Source]:
        """Return covectors, and what they are sums of, in the precision of a block."""
        if e is None or block.dtype == self.block.dtype:
            return e, source
        if source is not None:
            source = {name: factor.double() for name, factor in source.items()}
        return {name: covector.double() for name, covector in e.items()}, source

    def _exact_enough(self, target: Target, found: Iterates) -> Block:
        """Return the block, in float64 where the step would lose its digits else."""
        block = self._wide or self.block
        if block.dtype == torch.float64 or block.device.type != "cpu":
            return block
        lost = torch.finfo(block.dtype).eps * self._root_trace * found.d.norm()
        allowed = 0.25 * self.tolerance * target.energy(found.d, found.md).sqrt()
        return block.double() if bool(lost > allowed) else block

    def _image(self, block: Block, x: Vectors) -> Tensor:
        return block.matvec(x).to(self.block.precision)

    def _rounding(
        self, block: Block, target: Target, x: Vectors, image: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return what rounding of ``K^T`` times a vector does to x, and the norm of x.

        Both are norms in the metric.
        """
        flat = {p.name: p.space.flat(x[p.name]) for p in block.parts}
        own = block.pair(flat, x).clamp_min(0.0)
        size = (own + image.square().sum()).sqrt()
        summed = (target.y - image).norm() + own.sqrt()
        noise = target.base.clamp_min(0.0).sqrt() + self._root_trace * summed
        tiny = torch.finfo(size.dtype).tiny
        return torch.finfo(block.dtype).eps * noise, size.clamp_min(tiny)

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
        self, block: Block, found: Iterates, e: Vectors | None, source: Source
    ) -> dict[str, Tensor]:
        d = found.d.to(block.precision)
        return block.direction(d) if e is None else block.direction(-d, e, source)
