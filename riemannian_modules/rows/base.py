"""What a reduction of rows is, and what it says of the rows that it leaves out."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from numbers import Integral
from typing import final

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors import DenseFactor, MetricFactor, energies
from riemannian_modules.linearization import Linearization
from riemannian_modules.tangent import TangentSpace

__all__ = [
    "Counted",
    "Neglected",
    "RowReduction",
    "combinations",
]

Spaces = Mapping[str, TangentSpace]


@dataclass(frozen=True)
class Neglected:
    """How much of a metric a reduction of its rows left out.

    Energies are traces of ``K sharp K^T`` with the masses in ``sharp``, so that they
    are relative to the massed base metric. If the rows kept are ``S K`` with
    orthonormal rows of S, the reduced metric is between ``G / (1 + trace)`` and G:

        ``G~ <= G <= (1 + trace) G~``,

    for the block of all parameters and for every smaller one.

    Attributes:
        trace: energy of what was left out, a scalar.
        total: energy of all rows, a scalar.
        kept: number of rows that are left.
        rows: number of rows that there were.
        bounds: whether the trace bounds the difference; not for random rows.
    """

    trace: Tensor
    total: Tensor
    kept: int
    rows: int
    bounds: bool = True

    @property
    def share(self) -> Tensor:
        """Energy left out relative to that of all rows, a scalar."""
        return self.trace / self.total.clamp_min(torch.finfo(self.total.dtype).tiny)

    def rates(self, rate: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return bounds on a rate of contraction in the metric of all rows.

        Implements :eq:`rows-neglected`.

        Args:
            rate: the rate in the reduced metric, for a Hessian without negative
                eigenvalues.

        Returns:
            The least and the largest that it can be in the metric of all rows.

        Raises:
            ShapeError: random rows, which bound nothing.
        """
        if not self.bounds:
            raise ShapeError("random rows are right on average only and bound no rate")
        largest = torch.as_tensor(
            rate, dtype=self.trace.dtype, device=self.trace.device
        )
        return largest / (1.0 + self.trace), largest

    def __repr__(self) -> str:
        if self.trace.is_meta:
            return f"Neglected({self.kept} of {self.rows} rows kept)"
        return (
            f"Neglected({self.kept} of {self.rows} rows kept, energy "
            f"{float(self.trace):.3g} of {float(self.total):.3g} left out)"
        )


class RowReduction(ABC):
    """Puts fewer rows in the place of those of a pass."""

    @abstractmethod
    def reduce(
        self, found: Linearization, spaces: Spaces
    ) -> tuple[Linearization, Neglected]:
        """Return the pass with fewer rows.

        The gradient has to stay what it is: where ``found.residual`` is y, the new
        rows and the new residual give the same ``K^T y``.

        Args:
            found: a linearised pass with factors.
            spaces: the tangent space of every parameter in it.

        Returns:
            The pass, and what is left out of its metric.
        """


class Counted(RowReduction):
    """A reduction to a number of rows, besides those that keep the gradient.

    Args:
        count: the number.

    Raises:
        ShapeError: it is less than one, or no whole number.
    """

    def __init__(self, count: int) -> None:
        if not isinstance(count, int | Integral) or count < 1:
            raise ShapeError(
                f"{type(self).__name__}({count!r}): a whole number of rows, at least "
                "one row has to be kept"
            )
        self.count = count

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.count})"

    @final
    def reduce(
        self, found: Linearization, spaces: Spaces
    ) -> tuple[Linearization, Neglected]:
        """Return the pass with fewer rows, or as it is where that has no more."""
        parts = [energies(f, spaces[name]) for name, f in found.factors.items()]
        energy = torch.stack(parts).sum(0)
        more = 0 if found.residual is None else self._more(found)
        if self.count + more >= len(energy):
            zero = energy.new_zeros(())
            return found, Neglected(zero, energy.sum(), len(energy), len(energy))
        return self._reduce(found, spaces, energy)

    def _more(self, found: Linearization) -> int:
        """Return how many rows are kept for the gradient."""
        return 1

    @abstractmethod
    def _reduce(
        self, found: Linearization, spaces: Spaces, energy: Tensor
    ) -> tuple[Linearization, Neglected]:
        """Return the pass with fewer rows, given the energies of all of them."""


def combinations(
    found: Linearization, sketch: Tensor, y: Tensor | None
) -> Linearization:
    """Return the pass with rows ``S K``, which are stored.

    Args:
        found: a linearised pass.
        sketch: S, ``(k, rank)``.
        y: the residual in terms of the new rows, or None.

    Returns:
        The pass. Cost: a backward product for each row, 2 n p for a linear layer.
    """
    factors: dict[str, MetricFactor] = {
        name: DenseFactor(torch.stack([factor.rmatvec(row) for row in sketch]))
        for name, factor in found.factors.items()
    }
    return replace(found, factors=factors, residual=y, examples=1)
