"""What one optimizer step did, block by block, as numbers and as a table."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from riemannian_modules.metric import LayerMetric, Solution

__all__ = ["BlockReport", "StepReport"]


@dataclass(frozen=True)
class BlockReport:
    """One block's part of a step. Numbers are computed, and read, when asked for.

    ``print`` asks for all of them.

    Attributes:
        name: the block.
        metric: its metric at the point where the step began.
        solution: the solved Riesz problem.
        lr: the step length.
        steps: ``{parameter name: tangent step}``, None where it is ``-lr`` times the
            solution's vector.
    """

    name: str
    metric: LayerMetric
    solution: Solution
    lr: float
    steps: dict[str, Tensor | None]

    def __repr__(self) -> str:
        return (
            f"BlockReport({self.name}: {', '.join(self.steps)}; dim {self.dim}, rank "
            f"{self.rank}, {self.branch})"
        )

    def __str__(self) -> str:
        """Return the numbers of the table with their names, a line each."""
        lines = [f"  {words:<24}{value:.2e}" for words, value in self._numbers()]
        return "\n".join([repr(self), *lines])

    def _numbers(self) -> list[tuple[str, float]]:
        return [
            ("norm of the gradient", self.gradient_norm),
            ("norm of the step", self.update_norm),
            ("predicted decrease", self.predicted_decrease),
            ("residual of the solve", self.residual),
            ("condition", self.condition),
            ("rate in output space", self.contraction_rate),
        ]

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
        norms = [
            abs(self.lr) * self.solution.vectors[name].norm()
            if step is None
            else step.norm()
            for name, step in self.steps.items()
        ]
        return float(torch.stack(norms).norm())

    @property
    def predicted_decrease(self) -> float:
        """First-order decrease ``-g(x, u)`` of the loss by a plain gradient step u."""
        if all(step is None for step in self.steps.values()):
            return self.lr * self.gradient_norm**2
        x = self.solution.vectors
        u = {name: -self.lr * vector for name, vector in x.items()}
        u |= {name: step for name, step in self.steps.items() if step is not None}
        return -float(self.metric.inner(x, u))

    @cached_property
    def residual(self) -> float:
        """Relative residual of the solve, measured on ``K x``. Cost: one product."""
        if self.rank == 0:
            return 0.0
        measured = self.metric.image(self.solution.vectors)
        error = (measured - self.solution.velocity).norm()
        size = self.solution.velocity.norm()
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
class StepReport:
    """The blocks of one step; ``print`` shows a table."""

    blocks: dict[str, BlockReport]

    def __repr__(self) -> str:
        return f"StepReport(blocks {', '.join(self.blocks)})"

    def __getitem__(self, name: str) -> BlockReport:
        return self.blocks[name]

    def __iter__(self) -> Iterator[BlockReport]:
        return iter(self.blocks.values())

    def __str__(self) -> str:
        head = ["block", "dim", "rank", "solver", "|grad|_g", "|step|", "decrease"]
        head += ["residual", "condition", "rate"]
        rows = [head]
        for b in self:
            texts = [f"{number:.2e}" for _, number in b._numbers()]
            rows.append([b.name, str(b.dim), str(b.rank), b.branch, *texts])
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        return "\n".join(
            "  ".join(
                cell.ljust(width) for cell, width in zip(row, widths, strict=True)
            ).rstrip()
            for row in rows
        )
