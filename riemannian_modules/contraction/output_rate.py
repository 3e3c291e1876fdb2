r"""The rate of the residual: exact, and without second derivatives.

    d/dt 1/2 |y|^2 = -y^T Theta y,   Theta = sum_a M_a (1 + M_a)^-1

for the whitened residual y of a squared error along the flow; for a likelihood
``-y^T Theta y`` is the speed of the loss. ``M_a = K_a sharp K_a^T``, masses absorbed.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from riemannian_modules.contraction.result import SMALL, Rate, Side, Verdict
from riemannian_modules.metric import LayerMetric

__all__ = ["LazyRates", "block_output_rate", "output_rate", "theta"]

RESIDUAL = "output (of the residual, not of parameters)"
EXPLAINED = "the whitened residual shrinks at this rate; two trajectories need not meet"
UNEXPLAINED = "the loss's cotangent is not in the span of the rows, so y is not its own"

_ROUNDING = 16.0


def theta(block: LayerMetric) -> tuple[Tensor, float]:
    """Return ``M (1 + M)^-1`` of one block and a bound on rounding in its eigenvalues.

    Args:
        block: the block's metric; a factorisation that it has is used.

    Returns:
        ``(rank, rank)`` in float64, and the bound. Cost O(rank^3).
    """
    inverse, rank = block.inverse, block.rank
    lower = inverse.factor.lower
    largest = float(lower.diagonal().square().sum())
    noise = _ROUNDING * torch.finfo(lower.dtype).eps * rank * largest
    if inverse.form == "primal":
        rows = torch.cat(list(inverse.block.coordinate_rows()))
        half = torch.linalg.solve_triangular(
            lower.tril().double(), rows.mT, upper=False
        )
        return half.mT @ half, noise
    eye = torch.eye(rank, dtype=torch.float64, device=lower.device)
    return eye - torch.cholesky_inverse(lower.tril().double()), noise


def output_rate(
    blocks: Sequence[LayerMetric], *, where: str, explained: bool = True
) -> Rate:
    """Return the rate of the residual when all blocks move together.

    Implements :eq:`total-output-rate`.

    Args:
        blocks: the metrics of all blocks, whose rows are those of one output factor.
        where: the point, in words.
        explained: whether the loss's cotangent is a combination of the rows.

    Returns:
        The rate, less a bound on rounding; zero where the outputs have more directions
        than the parameters. Cost O(rank^3) for each block.
    """
    ranks = [block.rank for block in blocks if block.rank]
    if not ranks or ranks[0] > sum(block.dim for block in blocks):
        return _rate(0.0, 0.0, where, explained)
    # The smallest eigenvalue of a sum of one is cheaper from S itself.
    if len(ranks) == 1:
        return block_output_rate(
            next(b for b in blocks if b.rank), where=where, explained=explained
        )
    pieces = [theta(block) for block in blocks if block.rank]
    total = torch.stack([matrix for matrix, _ in pieces]).sum(0)
    value = float(torch.linalg.eigvalsh(total)[0])
    return _rate(value, sum(noise for _, noise in pieces), where, explained)


def block_output_rate(
    block: LayerMetric, *, where: str, explained: bool = True
) -> Rate:
    """Return the rate of the residual when one block moves alone.

    Implements :eq:`output-rate`.

    Args:
        block: the block's metric; a factorisation that it has is used.
        where: the point, in words.
        explained: whether the loss's cotangent is a combination of the rows.

    Returns:
        The rate, less a bound on rounding. Cost: the eigenvalues of the matrix that
        the solve has factorised, O(rank^3).
    """
    if block.rank == 0 or block.rank > block.dim:
        return _rate(0.0, 0.0, where, explained)
    if block.inverse.form == "primal":
        matrix, noise = theta(block)
        return _rate(float(torch.linalg.eigvalsh(matrix)[0]), noise, where, explained)
    lower = block.inverse.factor.lower
    factor = lower.tril().double()
    values = torch.linalg.eigvalsh(factor @ factor.mT)
    smallest, largest = float(values[0]), float(values[-1])
    # d(1 - 1/s) = ds / s^2, and s is at least 1.
    noise = _ROUNDING * torch.finfo(lower.dtype).eps * block.rank * largest
    return _rate(1.0 - 1.0 / max(smallest, 1.0), noise, where, explained)


def _rate(value: float, noise: float, where: str, explained: bool) -> Rate:
    safe = max(value - noise, 0.0)
    side = Side.EXACT if noise <= SMALL * value else Side.LOWER
    return Rate(
        safe,
        kind="output",
        metric=RESIDUAL,
        where=where,
        side=side if explained else Side.ESTIMATE,
        verdict=Verdict.CERTIFIED if explained else Verdict.NOT_CERTIFIED,
        source=EXPLAINED if explained else UNEXPLAINED,
    )


class LazyRates(Mapping[str, Rate]):
    """Rates by block, each worked out when it is first read.

    Args:
        makers: for each block a function that returns its rate.
    """

    def __init__(self, makers: Mapping[str, Callable[[], Rate]]) -> None:
        self._makers = dict(makers)
        self._known: dict[str, Rate] = {}

    def __getitem__(self, name: str) -> Rate:
        if name not in self._known:
            self._known[name] = self._makers[name]()
        return self._known[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __repr__(self) -> str:
        return f"LazyRates({', '.join(self._makers)})"
