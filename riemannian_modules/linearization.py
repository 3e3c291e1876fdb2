"""What a pass is once it is differentiated: factors, gradient, residual."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from riemannian_modules.factors import MetricFactor

__all__ = ["Linearization"]


@dataclass(frozen=True)
class Linearization:
    """A recorded pass, differentiated.

    Attributes:
        names: parameters that the outputs depend on.
        factors: ``{name: K}``; empty without an output metric.
        gradient: ``{name: d loss}``; empty without a loss.
        residual: y with ``d loss = K^T y + rest``, ``(rank,)``; None: no exact one.
        rest: ``{name: covector}``; None: zero.
        source: ``{name: factor}`` whose row sums are the rest; None with the rest.
        costates: ``{name: factor}`` whose row sums are the gradient.
        examples: how many rows in succession are of different examples; 1 if rows
            are of the whole batch.
        foreign: parameters that are not the model's, and their gradients.
    """

    names: list[str]
    factors: dict[str, MetricFactor]
    gradient: Mapping[str, Tensor]
    residual: Tensor | None
    rest: Mapping[str, Tensor] | None
    source: dict[str, MetricFactor] | None
    costates: dict[str, MetricFactor]
    examples: int = 1
    foreign: tuple[tuple[Tensor, Tensor], ...] = ()
