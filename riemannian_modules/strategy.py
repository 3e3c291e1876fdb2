"""Which way a block is solved: what the user asks for, or what costs least."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property, partial
from typing import Literal, NoReturn

import torch
from torch import Tensor

from riemannian_modules import woodbury
from riemannian_modules.block import Block
from riemannian_modules.conjugate import ConjugateGradients
from riemannian_modules.cost_model import (
    TYPICAL_ITERATIONS,
    Costs,
    costs,
    predicted_iterations,
)
from riemannian_modules.errors import CostWarning, MemoryBoundError
from riemannian_modules.factors.chunks import at_most
from riemannian_modules.iterative import IterativeSolver
from riemannian_modules.memory_model import Held, held
from riemannian_modules.preconditioner import Worth
from riemannian_modules.reading import number

__all__ = ["Once", "Solver", "Strategy", "require_solver"]

Solver = Literal["auto", "cholesky", "primal", "cg"] | ConjugateGradients

_NAMES = ("auto", "cholesky", "primal", "cg")
# Below this rank a direct solve is cheaper than to ask.
_FEW_ROWS = 384
# How many times dearer a direct solve may be that follows iterations in vain.
_REACH = 10.0
# How many times more iterations than are affordable may be predicted: predictions are
# rather too high, and a failure is not repeated in the passes that follow.
_HOPE = 1.6
# From this rank on, and from so many products with K and seconds on a core, a solve is
# worth a warning.
_MANY_ROWS = 4096
_DEAR, _LONG = 300.0, 3.0


class Once:
    """What is said once for all that share it.

    Attributes:
        said: whether it was said.
    """

    def __init__(self) -> None:
        self.said = False


def require_solver(solver: Solver) -> None:
    """Check that a solver is one.

    Args:
        solver: what the user gave.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(solver, ConjugateGradients) and solver not in _NAMES:
        raise ValueError(
            f"solver={solver!r}; choose one of {_NAMES} or a ConjugateGradients(...)"
        )


class Strategy:
    """How one block is solved.

    Args:
        block: the block.
        solver: ``"cholesky"`` (dual), ``"primal"``, ``"cg"`` or its settings; or
            ``"auto"``: the direct form that suits the shape, or on the CPU conjugate
            gradients where they are expected to cost less.
        small: data type of the small matrix.
        start: a first guess of conjugate gradients.
        max_memory: bytes that a solve may hold, or None.
        once: whether somebody was warned of what a solve costs.

    Attributes:
        form: inner matrix of the direct solve, ``"dual"``, ``"primal"`` or ``"base"``.
    """

    def __init__(
        self,
        block: Block,
        solver: Solver,
        small: torch.dtype,
        start: Tensor | None,
        max_memory: int | None = None,
        once: Once | None = None,
    ) -> None:
        self._max_memory = max_memory
        self._once = Once() if once is None else once
        self._expected = 0
        self._block = block
        self._solver = solver
        self._small = small
        self._start = start
        self._given_up = False
        self.form = "base"
        if block.rank and solver in ("cholesky", "primal"):
            self.form = "dual" if solver == "cholesky" else "primal"
        elif block.rank:
            self.form = woodbury.branch(block.rank, block.dim)

    @cached_property
    def costs(self) -> Costs:
        """What the ways to solve the block are expected to cost."""
        return costs(self._block, self._small, self._how.pivots)

    @property
    def _how(self) -> ConjugateGradients:
        solver = self._solver
        return solver if isinstance(solver, ConjugateGradients) else _DEFAULT

    @cached_property
    def iterative(self) -> IterativeSolver:
        """The solver by conjugate gradients, made when first needed."""
        start = self._start if self._how.warm_start else None
        worth = self._worth if self._how.pivots is None else None
        pivots = self._pivots
        return IterativeSolver(self._block, self._how, pivots, worth, start)

    def _worth(self) -> Worth:
        return partial(_doubles, self.costs, self._how.bound(self._block.dtype))

    @property
    def known(self) -> IterativeSolver | None:
        """The solver by conjugate gradients if it was needed."""
        found: IterativeSolver | None = self.__dict__.get("iterative")
        return found

    @property
    def limit(self) -> int:
        """How many iterations conjugate gradients may take; 0: they do not run."""
        return 0 if self._given_up else self._limit

    @property
    def _pivots(self) -> int:
        pivots = self.costs.pivots
        while pivots and not self._fits("cg", pivots):
            pivots //= 2
        return pivots

    def _held(self, way: str, pivots: int = 0) -> Held:
        # Float32 may turn out to be not enough.
        alone = self._block.precision if way == "dual" else self._small
        return held(self._block, way, alone, pivots)

    def _fits(self, way: str, pivots: int = 0) -> bool:
        bound = self._max_memory
        return bound is None or self._held(way, pivots).smallest <= bound

    def _refuse(self, *ways: str) -> NoReturn:
        block = self._block
        least = min(self._held(way).smallest for way in ways)
        raise MemoryBoundError(
            f"block '{block.name}' (rank {block.rank}, dim {block.dim}) cannot be "
            f"solved ({' or '.join(ways)}) within max_memory = {self._max_memory} "
            f"bytes; the smallest bound is {least} bytes ({least / 2**20:.1f} MiB)"
        )

    @contextmanager
    def bounded(self, way: str) -> Iterator[None]:
        """Form matrices in pieces that keep the bound on memory, inside this scope.

        Args:
            way: ``"dual"``, ``"primal"`` or ``"cg"``.

        Raises:
            MemoryBoundError: no size of the pieces keeps it.
        """
        bound = self._max_memory
        if bound is None:
            yield
            return
        if not self._fits(way):
            self._refuse(way)
        need = self._held(way, self._pivots if way == "cg" else 0)
        with at_most(need.entries(bound)):
            yield

    @property
    def settled(self) -> Solver:
        """The solver that saves asking again: a direct one where iterations lost."""
        asked = self._solver == "auto" and self.known is not None
        if not asked or self.limit or not self._fits(self.form):
            return self._solver
        return "primal" if self.form == "primal" else "cholesky"

    @cached_property
    def _limit(self) -> int:
        if self.form == "base" or self._solver in ("cholesky", "primal"):
            return 0
        if self._solver != "auto":
            return self._how.iterations
        block = self._block
        if not self._fits(self.form):
            if not self._fits("cg"):
                self._refuse(self.form, "cg")
            return self._how.iterations
        if not self._fits("cg"):
            return 0
        if block.rank < _FEW_ROWS or block.device.type != "cpu":
            return 0
        known = self.costs
        if known.iterative(TYPICAL_ITERATIONS) >= known.direct(self.form):
            return 0
        # Now that the preconditioner is worth making, it tells more.
        if self.iterative.too_wide:
            self.costs = costs(block, torch.float64, self._how.pivots)
            known = self.costs
        with self.bounded("cg"):
            made = self.iterative.preconditioner
        most = known.affordable(self.form)
        expects = partial(
            predicted_iterations,
            pivots=len(made.pivots),
            tolerance=self._how.bound(block.dtype),
        )
        foresees = partial(_foresees, known, most, expects)
        expected = expects(number(made.remaining, foresees))
        self._expected = min(expected, most)
        return most if _pays(expected, most) else 0

    def warn(self) -> None:
        """Warn, once, of a solve that is expected to take very long.

        Of shapes, and of the trace where conjugate gradients have read it already. The
        rates of other devices than the CPU are not known.
        """
        block = self._block
        if self._once.said or self._solver != "auto" or block.rank < _MANY_ROWS:
            return
        if block.device.type != "cpu" or not self._fits(self.form):
            return
        known, form = self.costs, self.form
        iterates = self.limit > 0
        seconds = known.iterative(self._expected) if iterates else known.direct(form)
        if not _is_long(known, seconds):
            return
        self._once.said = True
        how = "conjugate gradients" if iterates else f"the {form} form"
        warnings.warn(
            f"block '{block.name}' has the rank {block.rank} (examples times rows of "
            f"the output metric; dim {block.dim}): a solve by {how} may take as long "
            f"as {seconds / known.product:.0f} products with these rows, each of them "
            "dearer than a backward pass. Draw few rows with output.Sampled(metric), "
            "give fewer outputs or examples at a time, or bound it with "
            "solver=ConjugateGradients(iterations=...), which needs fewer of them with "
            "a larger mass",
            CostWarning,
            stacklevel=3,
        )

    def give_up(self) -> bool:
        """Say that iterations were in vain; return whether a direct solve is in reach.

        Then they do not run again.
        """
        known = self.costs
        if not self._fits(self.form):
            return False
        if known.direct(self.form) > _REACH * known.iterative(self._limit):
            return False
        self._given_up = True
        return True


def _doubles(known: Costs, tolerance: float, pivots: int, remaining: float) -> bool:
    """Whether doubling the pivots saves more iterations than it costs.

    What remains is guessed to halve.
    """
    now = predicted_iterations(remaining, pivots, tolerance)
    then = predicted_iterations(remaining / 2, 2 * pivots, tolerance)
    return (now - then) * known.product > known.pivoting(2 * pivots)


def _foresees(
    known: Costs, most: int, expects: Callable[[float], int], remaining: float
) -> tuple[bool, bool]:
    # All that is made of the number: whether they run, and whether to warn of it.
    expected = expects(remaining)
    seconds = known.iterative(min(expected, most))
    return _pays(expected, most), _is_long(known, seconds)


def _pays(expected: int, most: int) -> bool:
    return expected <= _HOPE * most


def _is_long(known: Costs, seconds: float) -> bool:
    return seconds >= max(_LONG, _DEAR * known.product)


_DEFAULT = ConjugateGradients()
