"""A layer in small models, and the dense Jacobian of these.

The outputs of a model are fixed linear maps of what the layer returns, another one for
each example. The reference is a copy of the model in float64, differentiated by
autograd one output at a time.
"""

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.nested import map_tensors

__all__ = ["WIDTH", "Around", "RuleCase", "Select", "dense_rows"]

WIDTH = 3

Select = Callable[[Any], Tensor]


class Around(nn.Module):
    """A model whose outputs are linear maps of the layer's, one for each example.

    Args:
        layer: the layer.
        maps: a map ``(n, width, *output)`` for each use of the layer.
        inputs: arguments of each use.
        options: keyword arguments of all uses.
        select: takes the tensor ``(batch, *output)`` out of what the layer returns.
    """

    def __init__(
        self,
        layer: nn.Module,
        maps: list[Tensor],
        inputs: list[tuple[Tensor, ...]],
        options: Mapping[str, Any],
        select: Select,
    ) -> None:
        super().__init__()
        self.layer = layer
        self.maps, self.inputs = maps, inputs
        self.options, self.select = options, select

    def forward(self) -> Tensor:
        """Return the outputs, ``(n, width)``."""
        uses = [
            self.select(self.layer(*inputs, **self.options)) for inputs in self.inputs
        ]
        total = uses[0].new_zeros(())
        for y, weight in zip(uses, self.maps, strict=True):
            # A map over fewer examples than the layer's: several make one.
            flat = y.reshape(len(weight), 1, -1)
            total = total + (flat * weight).sum(-1)
        return total

    def wide(self) -> "Around":
        """Return the same model in float64, with a copy of the layer."""

        def double(value: Tensor) -> Tensor:
            return value.double() if value.is_floating_point() else value

        return Around(
            copy.deepcopy(self.layer).double(),
            [double(each) for each in self.maps],
            map_tensors(self.inputs, double),
            map_tensors(dict(self.options), double),
            self.select,
        )


@dataclass
class RuleCase:
    """A layer with inputs, and the metrics of the models that it was put into.

    Attributes:
        layer: the layer.
        inputs: its arguments.
        options: its keyword arguments.
        dim: the dimension of the examples.
        select: takes the tensor ``(batch, *output)`` out of what the layer returns.
        generator: source of the random numbers.
        found: the metric of each model that was linearised, by kind of model.
    """

    layer: nn.Module
    inputs: tuple[Tensor, ...]
    options: Mapping[str, Any]
    dim: int
    select: Select
    generator: torch.Generator | None
    found: dict[str, LayerwiseMetric] = field(default_factory=dict)

    @property
    def eps(self) -> float:
        """The rounding unit of the parameters."""
        return float(torch.finfo(next(self.layer.parameters()).dtype).eps)

    @property
    def exact(self) -> float:
        """Tolerance of identities, relative to the size of what is compared."""
        return 200.0 * self.eps

    def draw(self, *shape: int) -> Tensor:
        """Return normal numbers in float64."""
        return torch.randn(shape, dtype=torch.float64, generator=self.generator)

    def model(self, kind: str) -> Around:
        """Return the layer in a model of one kind.

        Args:
            kind: ``"factor"``: used once; ``"shared"``: twice, on other examples the
                second time; ``"folded"``: two rows of its batch make one example.

        Returns:
            The model.
        """
        with torch.no_grad():
            y = self.select(self.layer(*self.inputs, **self.options))
        uses = [self.inputs]
        n, rest = len(y), math.prod(y.shape[1:])
        if kind == "shared":
            uses.append(tuple(x.flip(self.dim) for x in self.inputs))
        if kind == "folded":
            n, rest = n // 2, rest * 2
        maps = [self.draw(n, WIDTH, rest).to(y) for _ in uses]
        return Around(self.layer, maps, uses, self.options, self.select)


def dense_rows(model: Around) -> dict[str, Tensor]:
    """Return ``{name: K}`` in float64, ``(width n, p)``, the example as fast index."""
    wide = model.wide()
    trainable = {n: p for n, p in wide.named_parameters() if p.requires_grad}
    z = wide()
    rows: dict[str, list[Tensor]] = {name: [] for name in trainable}
    for entry in z.mT.reshape(-1):
        gradients = torch.autograd.grad(
            entry,
            list(trainable.values()),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        for name, gradient in zip(trainable, gradients, strict=True):
            rows[name].append(gradient.reshape(-1))
    return {name: torch.stack(each) for name, each in rows.items()}
