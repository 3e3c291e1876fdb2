"""What one optimizer step did, block by block, as numbers and as a table."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from riemannian_modules.metric import LayerMetric, Solution
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.motion import Motion
from riemannian_modules.optim.plan import Plan
from riemannian_modules.optim.quadratic import spanned
from riemannian_modules.precision import dot

__all__ = ["BlockReport", "MotionReport", "StepReport", "block_reports"]


_WORDS = {
    "gradient_norm": "norm of the gradient",
    "update_norm": "norm of the step",
    "predicted_decrease": "predicted decrease",
    "residual": "residual of the solve",
    "condition": "condition",
    "contraction_rate": "rate in output space",
}
_MOTION = ("length", "carried", "share", "reach", "inflation", "norm")


@dataclass(frozen=True)
class BlockReport:
    """One block's part of a step. Numbers are computed, and read, when asked for.

    ``print`` asks for all of them. It holds the block's factors and vectors: keep
    :meth:`numbers` of past steps.

    Attributes:
        name: the block.
        metric: its metric at the point where the step began.
        solution: the solved Riesz problem.
        lr: the step length.
        moves: ``{parameter name: (factor, vector)}``, whose products are the step.
        slope: derivative of the loss along the step; None: it is found when asked for.
        whitened: y with ``K^T y`` the gradient, for steps in other directions than
            the solution's; or None.
    """

    name: str
    metric: LayerMetric
    solution: Solution
    lr: float | Tensor
    moves: dict[str, tuple[float | Tensor, Tensor]]
    slope: Tensor | None = None
    whitened: Tensor | None = None

    def __repr__(self) -> str:
        return (
            f"BlockReport({self.name}: {', '.join(self.moves)}; dim {self.dim}, rank "
            f"{self.rank}, {self.branch})"
        )

    def __str__(self) -> str:
        """Return the numbers of the table with their names, a line each."""
        numbers = self.numbers(spectrum=True)
        lines = [f"  {words:<24}{numbers[key]:.2e}" for key, words in _WORDS.items()]
        return "\n".join([repr(self), *lines])

    def numbers(self, *, spectrum: bool = False) -> dict[str, float]:
        """Return the block's numbers by name, which hold nothing of the pass.

        Args:
            spectrum: also ``condition`` and ``contraction_rate``: they cost the
                eigenvalues of a matrix, O(rank^3).

        Returns:
            ``{name: number}``; the names are those of the properties.
        """
        names = ["dim", "rank", *_WORDS][: None if spectrum else -2]
        return {name: float(getattr(self, name)) for name in names}

    @cached_property
    def steps(self) -> dict[str, Tensor]:
        """The tangent step of each parameter."""
        return {name: rate * vector for name, (rate, vector) in self.moves.items()}

    @property
    def rank(self) -> int:
        """Rows of the factor."""
        return self.metric.rank

    @property
    def dim(self) -> int:
        """Dimension of the block's manifold."""
        return self.metric.dim

    @property
    def branch(self) -> str:
        """Which form of the inverse ran."""
        return self.solution.branch

    @cached_property
    def gradient_norm(self) -> float:
        """Norm of the direction in the metric, ``sqrt(g(x, x))``."""
        return float(self.solution.squared_norm.clamp_min(0.0).sqrt())

    @cached_property
    def update_norm(self) -> float:
        """Euclidean norm of the tangent step."""
        norms = [rate * dot(u, u).sqrt() for rate, u in self.moves.values()]
        return float(torch.stack(norms).norm())

    @property
    def predicted_decrease(self) -> float:
        """First-order decrease ``-g(x, u)`` of the loss by the block's step u.

        Cost: at most one product with K.
        """
        if self.slope is not None:
            return -float(self.slope)
        if self.whitened is not None:
            return -float(dot(self.whitened, self.image.to(self.whitened)))
        x = self.solution.vectors
        if all(
            rate == -self.lr and vector is x[name]
            for name, (rate, vector) in self.moves.items()
        ):
            return float(self.lr) * self.gradient_norm**2
        u = {name: -self.lr * vector for name, vector in x.items()} | self.steps
        return -float(self.metric.inner(x, u))

    @cached_property
    def image(self) -> Tensor:
        """``K u`` of the block's step u, ``(rank,)``. Cost: one product."""
        return self.metric.image(
            {
                part.name: torch.zeros_like(part.space.point)
                if (u := self.steps.get(part.name)) is None
                else u
                for part in self.metric.parts
            }
        )

    @cached_property
    def residual(self) -> float:
        """How far ``K x`` is from what the solve says of it, relative to the larger.

        Cost: one product.
        """
        if self.rank == 0:
            return 0.0
        measured = self.metric.image(self.solution.vectors).double()
        error = (measured - self.solution.velocity).norm()
        size = torch.maximum(measured.norm(), self.solution.velocity.double().norm())
        return float(error / size.clamp_min(torch.finfo(size.dtype).tiny))

    @cached_property
    def condition(self) -> float:
        """Condition number of the inner matrix. Cost: its eigenvalues, O(rank^3)."""
        return float(self.metric.condition())

    @cached_property
    def contraction_rate(self) -> float:
        """Output-space rate ``lambda_min(M (1 + M)^-1)``. Cost: as ``condition``."""
        return float(self.metric.contraction_rate())


@dataclass(frozen=True)
class MotionReport:
    """How long a step was, and why. Numbers are read when asked for.

    Attributes:
        motion: the step before ``lr``.
        blocks: the blocks of the step.
    """

    motion: Motion
    blocks: dict[str, BlockReport]

    def __repr__(self) -> str:
        return f"MotionReport({len(self.motion.vectors)} parameters)"

    def __str__(self) -> str:
        return (
            f"length {self.length:.3g}  carried {self.carried:.3g}  share "
            f"{self.share:.3g}  reach {self.reach:.3g}  curvature "
            f"x{self.inflation:.3g}  norm {self.norm:.2e}  predicted decrease "
            f"{self.predicted_decrease:.2e}"
        )

    def numbers(self) -> dict[str, float]:
        """Return the numbers by name, which hold nothing of the pass."""
        names = (*_MOTION, "predicted_decrease")
        return {name: float(getattr(self, name)) for name in names}

    @cached_property
    def length(self) -> float:
        """Coefficient of the candidate in the step, before ``lr``."""
        return float(self.motion.along * self.motion.share)

    @cached_property
    def carried(self) -> float:
        """Coefficient of the step before, before ``lr``."""
        return float(self.motion.carried * self.motion.share)

    @cached_property
    def share(self) -> float:
        """What reach, floor of the loss, clipping and normalisation left of it."""
        return float(self.motion.share)

    @cached_property
    def reach(self) -> float:
        """The part of the share that earlier steps account for; 1 without them."""
        return 1.0 if self.motion.trust is None else float(self.motion.trust[-1])

    @cached_property
    def inflation(self) -> float:
        """By how much the curvature was corrected along the candidate."""
        return float(self.motion.inflation)

    @cached_property
    def norm(self) -> float:
        """Length of the whole step in the metric norm. Cost: one product with K."""
        weight = sum(
            float(part.space.inner(u, u))
            for b in self.blocks.values()
            for part in b.metric.parts
            if (u := b.steps.get(part.name)) is not None
        )
        return math.sqrt(weight + self._curvature)

    @cached_property
    def predicted_decrease(self) -> float:
        """By how much the quadratic model says that the loss falls.

        Cost: one product with K.
        """
        first = sum(block.predicted_decrease for block in self.blocks.values())
        return first - 0.5 * self._curvature

    @cached_property
    def _curvature(self) -> float:
        images = [b.image.double() for b in self.blocks.values() if b.rank]
        if not images:
            return 0.0
        return float(torch.stack(images).sum(0).square().sum())


@dataclass(frozen=True)
class StepReport:
    """The blocks of one step; ``print`` shows a table.

    It holds the factors and vectors of its pass, several times the model's memory. A
    log of past steps keeps :meth:`numbers` instead.

    Attributes:
        blocks: ``{block name: report}``.
        motion: how long the step was, where more than ``lr`` decides it; else None.
    """

    blocks: dict[str, BlockReport]
    motion: MotionReport | None = None

    def __repr__(self) -> str:
        return f"StepReport(blocks {', '.join(self.blocks)})"

    def __getitem__(self, name: str) -> BlockReport:
        if name not in self.blocks:
            known = ", ".join(map(repr, self.blocks))
            raise KeyError(f"no block is called {name!r}; there are {known}")
        return self.blocks[name]

    def numbers(self, *, spectrum: bool = False) -> dict[str, dict[str, float]]:
        """Return plain numbers, for a log: they hold nothing of the pass.

        Cost: one product with each block's K, and that of :class:`MotionReport`.

        Args:
            spectrum: also ``condition`` and ``contraction_rate`` (the column ``rate``),
                which are left out as they cost eigenvalues, O(rank^3).

        Returns:
            ``{block name: {name: number}}``; how long the step was, where more than
            ``lr`` decides it, is under ``"whole step"``.
        """
        whole = {} if self.motion is None else {"whole step": self.motion.numbers()}
        return whole | {b.name: b.numbers(spectrum=spectrum) for b in self}

    def __iter__(self) -> Iterator[BlockReport]:
        return iter(self.blocks.values())

    def __str__(self) -> str:
        head = ["block", "dim", "rank", "solver", "|grad|_g", "|step|", "decrease"]
        head += ["residual", "condition", "rate"]
        rows = [head]
        for b in self:
            texts = [f"{getattr(b, key):.2e}" for key in _WORDS]
            rows.append([b.name, str(b.dim), str(b.rank), b.branch, *texts])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = [] if self.motion is None else [str(self.motion)]
        lines += [
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            ).rstrip()
            for row in rows
        ]
        return "\n".join(lines)


def block_reports(
    metric: ModelMetric,
    plans: Mapping[str, Plan],
    solutions: Mapping[str, Solution],
    steps: Mapping[str, tuple[float | Tensor, Tensor]],
    motion: Motion | None,
) -> dict[str, BlockReport]:
    """Return what a step does, block by block, before it is done.

    Args:
        metric: the metric.
        plans: what moves.
        solutions: of each block.
        steps: the tangent steps, a number and a vector each.
        motion: the step before ``lr``, where more than ``lr`` decides it.

    Returns:
        The blocks that move.
    """
    reports, residual = {}, spanned(metric)
    for block, solution in solutions.items():
        own = [name for name in solution.vectors if name in plans]
        if not own:
            continue
        lr = plans[own[0]].lr
        moves = {name: steps[name] for name in own}
        slope, whitened = None, None
        # Where the direction is not the gradient's own, its norm does not tell.
        turned = motion is not None or not all(plans[n].is_gradient for n in own)
        if turned and residual is not None and solution.base.rank:
            whitened = residual
        elif turned:
            found = [rate * dot(plans[n].gradient, u) for n, (rate, u) in moves.items()]
            slope = torch.stack(found).sum()
        reports[block] = BlockReport(
            block, metric.solved[block], solution, lr, moves, slope, whitened
        )
    return reports
