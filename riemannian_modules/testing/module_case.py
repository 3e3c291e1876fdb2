"""A model under test, with what its laws need to be measured."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from riemannian_modules.declared import Blocks
from riemannian_modules.factors import MetricFactor
from riemannian_modules.heads import Reduction
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.mass import MassLike
from riemannian_modules.output import OutputMetric
from riemannian_modules.testing.guarded import worst
from riemannian_modules.testing.metric_probe import relative_gap
from riemannian_modules.testing.reference import sharp_values

__all__ = [
    "Loss",
    "Masses",
    "ModuleCase",
    "factors_of",
    "floor_of",
    "largest_gap",
]

Loss = Callable[[Tensor], Tensor]
Masses = MassLike | Mapping[str, MassLike]


@dataclass
class ModuleCase:
    """A model with inputs, loss and metric, and what is computed of it once."""

    model: nn.Module
    x: Tensor
    output: OutputMetric
    loss: Loss
    mass: Masses
    blocks: Blocks
    reduction: Reduction
    generator: torch.Generator | None

    def metric(self, reduction: Reduction | None = None) -> LayerwiseMetric:
        """Return a fresh metric of the model."""
        return LayerwiseMetric(
            self.model,
            self.output,
            mass=self.mass,
            blocks=self.blocks,
            reduction=reduction or self.reduction,
        )

    @cached_property
    def trainable(self) -> dict[str, nn.Parameter]:
        """The trainable parameters by name."""
        return {n: p for n, p in self.model.named_parameters() if p.requires_grad}

    @cached_property
    def linearised(self) -> tuple[LayerwiseMetric, Tensor]:
        """A metric after its backward pass, and the outputs."""
        metric = self.metric()
        with metric.record():
            outputs = self.model(self.x)
        metric.backward(self.loss(outputs), outputs)
        return metric, outputs.detach()

    @cached_property
    def eps(self) -> float:
        """The rounding unit of the parameters."""
        return float(torch.finfo(next(iter(self.trainable.values())).dtype).eps)

    @cached_property
    def exact(self) -> float:
        """Tolerance of what a reverse pass computes."""
        layers = [m for m in self.model.modules() if list(m.parameters(False))]
        return 200.0 * self.eps * max(1, len(layers))

    @cached_property
    def solved(self) -> float:
        """Tolerance of the Riemannian gradient."""
        blocks = self.linearised[0].blocks.values()
        spectra = [block.gram_spectrum() for block in blocks]
        largest = max(float(values[0]) if len(values) else 0.0 for values in spectra)
        condition = max(float(v[-1] / v[0]) for v in self.sharp_values.values())
        return self.exact + 50.0 * self.eps * (1.0 + largest + condition)

    @cached_property
    def sharp_values(self) -> dict[str, Tensor]:
        """Eigenvalues of the Riesz map of each parameter, ascending."""
        blocks = self.linearised[0].blocks.values()
        parts = [part for block in blocks for part in block.parts]
        return {part.name: sharp_values(part.space) for part in parts}

    def pulled_back(
        self, x: Tensor, reduction: Reduction | None = None
    ) -> LayerwiseMetric:
        """Return a metric that was pulled back at other inputs."""
        metric = self.metric(reduction)
        with metric.record():
            outputs = self.model(x)
        metric.pull_back(outputs)
        return metric

    def draw(self, like: Tensor) -> Tensor:
        """Return normal numbers of the shape of a tensor."""
        found = torch.randn(like.shape, dtype=torch.float64, generator=self.generator)
        return found.to(like)


def factors_of(metric: LayerwiseMetric) -> dict[str, MetricFactor]:
    """Return the factors of a metric by parameter name."""
    return {
        part.name: part.factor
        for block in metric.blocks.values()
        for part in block.parts
        if part.factor is not None
    }


def floor_of(wanted: Mapping[str, Tensor]) -> float:
    """Return the size below which a parameter's error counts as that of another."""
    return 1e-2 * max(float(v.norm()) for v in wanted.values())


def largest_gap(
    found: Mapping[str, Tensor],
    wanted: Mapping[str, Tensor],
    floors: Mapping[str, float] | None = None,
) -> float:
    """Return the largest error of a parameter, relative to its size or the average.

    Or to a size in ``floors``, if that is larger.
    """
    if set(found) != set(wanted):
        return math.inf
    own, floor = floors or {}, floor_of(wanted)
    return worst(
        relative_gap(found[n], v, max(float(v.norm()), floor, own.get(n, 0.0)))
        for n, v in wanted.items()
    )
