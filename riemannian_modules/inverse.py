r"""The inverse of a block's metric: factorise once, solve many times.

With the masses absorbed in ``sharp`` and ``C C^T = sharp`` the inverse of
``g0 + K^T K`` is

- dual:    ``sharp K^T S^-1 y`` for a covector ``K^T y``, and
  ``sharp (e - K^T S^-1 K sharp e)`` for any other, with ``S = 1 + K sharp K^T``;
- primal:  ``C G^-1 C^T e`` with ``G = 1 + (K C)^T (K C)``;
- cg:      ``sharp (e + K^T d)`` with ``S d = y - K sharp e``, never forming S.
"""

import math
import warnings
from collections.abc import Mapping
from dataclasses import replace
from functools import cached_property, partial

import torch
from torch import Tensor

from riemannian_modules import woodbury
from riemannian_modules.block import Block, Vectors
from riemannian_modules.coordinates import in_coordinates
from riemannian_modules.errors import NotConvergedWarning, NotPositiveDefiniteError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.precision import SINGLE_LOSS, single_suffices
from riemannian_modules.reading import number
from riemannian_modules.solution import Solution
from riemannian_modules.strategy import Once, Solver, Strategy

__all__ = ["Inverse", "Solution"]

_FALLBACK_ENTRIES = 1 << 23
_LOSS = 1e-3

Source = Mapping[str, MetricFactor] | None


class Inverse:
    """Solves ``g(x, .) = K^T y + e`` for one block, in the form that suits its shape.

    Args:
        block: the block.
        precision: data type of S; None: the block's, unless the model is in lower
            precision and float32 is accurate enough (looked up on the CPU only).
        narrow: whether float32 is worth a try.
        solver: ``"cholesky"`` (dual), ``"primal"``, ``"cg"``, or ``"auto"``: the direct
            form that suits the shape, or conjugate gradients where they are expected
            to cost less.
        max_memory: bytes that a solve may hold besides the factors; None: no bound.
        start: a first guess of conjugate gradients, :attr:`last` of another inverse.
        once: shared by all that are to warn of dear solves no more than once.

    Attributes:
        form: the inner matrix, ``"dual"`` or ``"primal"``; ``"base"`` without rows.
        too_narrow: whether float32 was tried in vain.
    """

    def __init__(
        self,
        block: Block,
        precision: torch.dtype | None = None,
        narrow: bool = True,
        solver: Solver = "auto",
        start: Tensor | None = None,
        max_memory: int | None = None,
        once: Once | None = None,
    ) -> None:
        self.block = block
        self.too_narrow = not narrow
        self._precision = precision
        small = precision or (block.dtype if narrow else torch.float64)
        self.strategy = Strategy(block, solver, small, start, max_memory, once)
        self.form = self.strategy.form
        self._trace = math.inf
        self._total: Tensor | None = None
        self._rows: Tensor | None = None
        self._told: Tensor | None = None

    @property
    def last(self) -> Tensor | None:
        """Where conjugate gradients ended last, ``(rank,)``; or None."""
        known = self.strategy.known
        return None if known is None else known.last

    @cached_property
    def factor(self) -> woodbury.CholeskyFactor:
        """Cholesky factor of S (dual) or G (primal), made when first needed."""
        with self.strategy.bounded(self.form):
            return self._factorised()

    def _factorised(self) -> woodbury.CholeskyFactor:
        if self.form == "primal":
            self._rows = self.block.all_coordinate_rows()
            matrix = self._shifted(self.block.coordinate_gram(self._rows))
        else:
            matrix = self._capacitance()
        return woodbury.cholesky(matrix, overwrite=True)

    def _capacitance(self) -> Tensor:
        wide = self._precision or self.block.precision
        narrow = self._precision is None and self.block.dtype != torch.float64
        narrow = narrow and not self.too_narrow and self.block.device.type == "cpu"
        if narrow and wide == torch.float64:
            S = self._shifted(self.block.gram(torch.float32))
            # Reading the trace is free on the CPU.
            if single_suffices(self._trace):
                return S
            self.too_narrow = True
        return self._shifted(self.block.gram(wide))

    def _shifted(self, matrix: Tensor) -> Tensor:
        diagonal = matrix.diagonal()
        # Off the CPU reading it would wait for the device.
        if diagonal.device.type == "cpu":
            self._total = diagonal.sum()
            self._trace = number(self._total, partial(_decided, self.block.dtype))
        diagonal.add_(1.0)
        return matrix

    @property
    def trace(self) -> float:
        """Trace of ``K sharp K^T``, known on the CPU after a solve only."""
        known = self.strategy.known
        return known.trace if self._trace == math.inf and known else self._trace

    @property
    def succeeded(self) -> Tensor:
        """Whether the factorisation worked, a boolean scalar on the device."""
        if self._told is not None:
            return self._told
        if self.form == "base" or self.strategy.limit:
            return torch.ones((), dtype=torch.bool, device=self.block.device)
        # LAPACK's check for NaN is not made by every library for other devices.
        return (self.factor.info == 0) & self.factor.lower.diagonal().isfinite().all()

    def adopt(self, trace: float, too_narrow: bool, succeeded: Tensor) -> None:
        """Take over what another process found out when it factorised the same block.

        Args:
            trace: its :attr:`trace`.
            too_narrow: its :attr:`too_narrow`.
            succeeded: its :attr:`succeeded`.
        """
        self._trace, self.too_narrow, self._told = trace, too_narrow, succeeded

    def solve(
        self,
        y: Tensor | None,
        e: Vectors | None,
        source: Source = None,
        refinements: int | None = None,
    ) -> Solution:
        """Solve for the covector ``K^T y + e``.

        Args:
            y: ``(rank,)`` or None for zero.
            e: ambient covectors or None for zero.
            source: factors whose row sums are e, if known; only saves time.
            refinements: refinement steps of the subtracting form; None: one, unless
                rounding costs less than 1e-3 anyway.

        Returns:
            The solution.

        Raises:
            NotPositiveDefiniteError: the factorisation failed and QR is too large or
                cannot help.
        """
        if self.form == "base" or (y is None and e is None):
            return self._base(e)
        limit = self.strategy.limit
        self.strategy.warn()
        if limit == 0:
            return self._direct(y, e, source, refinements)
        iterative = self.strategy.iterative
        with self.strategy.bounded("cg"):
            found = iterative.solve(y, e, source, limit, refinements)
        if found.converged is not False:
            return found
        if not self.strategy.give_up():
            warnings.warn(iterative.complaint(found), NotConvergedWarning, stacklevel=2)
            return found
        direct = self._direct(y, e, source, refinements)
        branch = f"cg, then {direct.branch}"
        return replace(direct, branch=branch, iterations=found.iterations)

    def logdet(self) -> Tensor:
        """Return the log-determinant of ``1 + K sharp K^T``, a scalar.

        Raises:
            NotPositiveDefiniteError: the factorisation failed and singular values are
                out of reach or cannot help.
        """
        if not self._failed:
            return self.factor.logdet()
        if self._wider is not None:
            return self._wider.logdet()
        return torch.linalg.svdvals(self._rows_of_failed()).square().log1p().sum()

    @property
    def _failed(self) -> bool:
        # Reading a flag is free on the CPU only; elsewhere `succeeded` carries it.
        info = self.factor.info
        return info.device.type == "cpu" and int(info) != 0

    @cached_property
    def _wider(self) -> "Inverse | None":
        """The same in float64; None where the matrix that failed was."""
        block, double = self.block, torch.float64
        if self.form == "primal" or self.factor.lower.dtype == double:
            return None
        return Inverse(Block(block.parts, block.name, double), double)

    def _direct(
        self,
        y: Tensor | None,
        e: Vectors | None,
        source: Source,
        refinements: int | None,
    ) -> Solution:
        if self._failed:
            wider = self._wider
            return self._qr(y, e) if wider is None else wider.solve(y, e)
        if self.form == "primal":
            return in_coordinates(
                self.block, self._rows, y, e, self.factor.solve, "primal"
            )
        if refinements is None:
            # The subtracting form loses log10 |S| digits, which the trace bounds; where
            # that is not known, or negative by rounding, refine always.
            once = _decided(self.block.dtype, self._trace)[1]
            refinements = int(e is not None and not once)
        return self._dual(y, e, source, refinements)

    def _base(self, e: Vectors | None) -> Solution:
        block = self.block
        still = torch.zeros(block.rank, dtype=block.precision, device=block.device)
        if e is None:
            x = {p.name: torch.zeros_like(p.space.point) for p in block.parts}
            return Solution(x, still, block, "base")
        return Solution(block.sharp(e), still, block, "base")

    def _dual(
        self, y: Tensor | None, e: Vectors | None, source: Source, refinements: int
    ) -> Solution:
        if y is None:
            assert e is not None
            return self._subtracting(e, source, refinements)
        pushed = self._pushing(y.to(self.block.precision))
        if e is None:
            return pushed
        rest = self._subtracting(e, source, refinements)
        return Solution(
            {name: x + rest.vectors[name] for name, x in pushed.vectors.items()},
            lambda: pushed.velocity + rest.velocity,
            self.block,
            f"{pushed.branch} + {rest.branch}",
        )

    def _pushing(self, y: Tensor) -> Solution:
        a = self._solve(y)
        x, eps = self._stepped(y, a), torch.finfo(self.factor.lower.dtype).eps

        def velocity() -> Tensor:
            found = y - a
            # Where the difference cancels, as of a y that no step can change by much.
            if y.device.type == "cpu" and bool(found.norm() < eps**0.5 * y.norm()):
                return self.block.matvec(x).to(y)
            return found

        return Solution(x, velocity, self.block, "push-through")

    def _stepped(self, y: Tensor, a: Tensor) -> dict[str, Tensor]:
        """Return ``sharp K^T a``, made in float64 where it would lose its digits else.

        Implements :eq:`cg-rounding` for a step of the squared length
        ``a (y - a) + |y - a|^2`` in the metric.
        """
        block, x = self.block, self.block.direction(a)
        narrow = block.dtype != torch.float64 and block.device.type == "cpu"
        single = self.factor.lower.dtype != torch.float64
        if not narrow or single or self._total is None:
            return x
        moved = y - a
        size = (torch.dot(a, moved) + torch.dot(moved, moved)).clamp_min(0.0).sqrt()
        root = self._total.clamp_min(0.0).sqrt()
        lost = torch.finfo(block.dtype).eps * root * a.norm()
        seen = (moved - block.matvec(x).to(moved)).norm()
        if bool(seen + lost > SINGLE_LOSS * size):
            # One factor at a time is copied, as for the small matrix.
            for part in block.parts:
                if part.factor is not None:
                    wide = Block([part], block.name, torch.float64).double()
                    x[part.name] = wide.direction(a)[part.name].to(x[part.name])
        return x

    def _solve(self, rhs: Tensor) -> Tensor:
        lower = self.factor.lower
        return self.factor.solve(rhs.to(lower.dtype))

    def _subtracting(self, e: Vectors, source: Source, refinements: int) -> Solution:
        x, c = self._woodbury(e, source)
        for _ in range(refinements):
            lowered = self.block.rmatvec(self.block.matvec(x))
            error = {
                p.name: e[p.name] - p.space.flat(x[p.name]) - lowered[p.name]
                for p in self.block.parts
            }
            correction, dc = self._woodbury(error, None)
            x = {name: x[name] + correction[name] for name in x}
            c = c + dc
        return Solution(x, c, self.block, "woodbury")

    def _woodbury(self, e: Vectors, source: Source) -> tuple[dict[str, Tensor], Tensor]:
        c = self._solve(self.block.image(e, source))
        return self.block.direction(c, e, source), c

    def _qr(self, y: Tensor | None, e: Vectors | None) -> Solution:
        KC = self._rows_of_failed()
        return in_coordinates(
            self.block, None, y, e, lambda g: woodbury.qr(KC, 1.0, g), "qr"
        )

    def _rows_of_failed(self) -> Tensor:
        # K C, where the matrix could not be factorised in float64 either.
        block = self.block
        ones = {p.name: torch.ones_like(p.space.point) for p in block.parts}
        finite = bool(block.matvec(ones).isfinite().all())
        if not finite or block.rank * block.size > _FALLBACK_ENTRIES:
            why = "the mass is too small" if finite else "its factor is not finite"
            masses = {p.name: p.space.mass.scalar for p in block.parts}
            raise NotPositiveDefiniteError(
                f"block '{block.name}': the {self.form} matrix (rank {block.rank}, dim "
                f"{block.dim}, {block.precision}) failed at pivot "
                f"{int(self.factor.info)}: {why}; masses {masses}. Raise the mass or "
                "lower the learning rate"
            )
        return torch.cat(list(block.coordinate_rows()))


def _decided(dtype: torch.dtype, trace: float) -> tuple[bool, bool]:
    # Whether float32 is enough, and one solve in this data type.
    single = dtype != torch.float64 and single_suffices(trace)
    return single, 0.0 <= torch.finfo(dtype).eps * trace <= _LOSS
