"""A model with its metric once more, in float64 and out of the user's sight.

What is worked out about rates must not touch the metric, the gradients or the views
that the user's training goes on with.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.contraction.chart import Chart
from riemannian_modules.contraction.fingerprint import fingerprint
from riemannian_modules.contraction.geometry import Geometry, Loss
from riemannian_modules.errors import ContractionError
from riemannian_modules.heads import pair
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.metric import LayerMetric
from riemannian_modules.output import OutputMetric, Sampled

__all__ = ["Replica", "is_sampled"]

Blocks = Mapping[str, LayerMetric]

_ROWS = 2048


class Replica:
    """The geometry of a model at one point, evaluated in float64.

    Args:
        metric: the model's metric; it is left alone.
        loss: function of what it returns.
        inputs: what the model is called with.
        point: other values of the parameters, by name; None: as they are.

    Attributes:
        metric: the metric of the copy, pulled back at the point.
        inputs: the inputs in float64.
        loss: the loss.
    """

    def __init__(
        self,
        metric: LayerwiseMetric,
        loss: Loss,
        inputs: Sequence[Any],
        point: Mapping[str, Tensor] | None = None,
    ) -> None:
        metric.parameters.verify()
        self.model = copy.deepcopy(metric.model).double()
        if point is not None:
            with torch.no_grad():
                for name, value in point.items():
                    self.model.get_parameter(name).copy_(value)
        self.inputs = [_wide(each) for each in inputs]
        masses = {declared.name: declared.mass for declared in metric.parameters}
        self.metric = LayerwiseMetric(
            self.model,
            metric.output,
            mass=masses,
            blocks=metric.grouping,
            reduction=metric.reduction,
            precision=torch.float64,
        )
        with self.metric.record():
            self.returned = self.model(*self.inputs)
        if metric.output is None:  # no rows, so that there must be a loss
            self.metric.backward(loss(self.returned), self.returned)
        else:
            self.metric.pull_back(self.returned)
        self.loss = loss

    @property
    def blocks(self) -> Blocks:
        """The metric of every block that the outputs depend on."""
        return self.metric.blocks

    @property
    def fingerprint(self) -> str:
        """What tells this metric from that of another model, point, mass or data."""
        model = self.model
        kinds = [
            f"{type(m).__module__}.{type(m).__qualname__}" for m in model.modules()
        ]
        masses = [
            (declared.name, mass.scalar, mass.row, mass.column, mass.diagonal)
            for declared in self.metric.parameters
            for mass in [declared.mass]
        ]
        state = [*model.named_parameters(), *model.named_buffers()]
        made = (repr(model), kinds, self.metric.reduction, self.metric.grouping)
        return fingerprint(made, masses, state, self.inputs, self.returned)

    @property
    def examples(self) -> int:
        """Number of examples."""
        return len(pair(self.metric.output, self.returned)[0][0])

    @property
    def dim(self) -> int:
        """Dimension of the product manifold of all blocks."""
        return sum(block.dim for block in self.blocks.values())

    @property
    def rank(self) -> int:
        """Number of independent directions in which the parameters move the outputs.

        Cost: eigenvalues of the Gram matrix of all rows, O(rows^3), up to 2,048 rows;
        beyond that the number of rows, which may be more.
        """
        blocks = [block for block in self.blocks.values() if block.rank]
        if not blocks or blocks[0].rank > _ROWS:
            return blocks[0].rank if blocks else 0
        grams = [block.inverse.block.gram(torch.float64).tril() for block in blocks]
        values = torch.linalg.eigvalsh(torch.stack(grams).sum(0))
        return int((values > 1e-10 * values[-1]).sum())

    def geometry(self, *, basis: bool = True, weight_decay: float = 0.0) -> Geometry:
        """Return the metric as a function of coordinates around the point.

        Args:
            basis: whether the coordinates belong to a basis of the tangent space.
            weight_decay: see :class:`Geometry`.

        Returns:
            The geometry.

        Raises:
            ContractionError: the output metric is drawn at random.
        """
        if is_sampled(self.metric.output):
            raise ContractionError(
                f"{self.metric.output} draws new rows at every call, so that it has no "
                "derivative; use the metric that it samples"
            )
        parts = [part for block in self.blocks.values() for part in block.parts]
        return Geometry(
            self.model,
            self.inputs,
            self.loss,
            self.metric.output,
            self.metric.reduction,
            Chart({part.name: part.space for part in parts}, basis=basis),
            {n: [p.name for p in b.parts] for n, b in self.blocks.items()},
            weight_decay,
        )


def is_sampled(output: Any) -> bool:
    """Return whether an output metric, or one of several, is drawn at random."""
    if output is None or isinstance(output, OutputMetric):
        return isinstance(output, Sampled)
    each = output.values() if isinstance(output, Mapping) else output
    return any(is_sampled(one) for one in each)


def _wide(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_floating_point():
        return value.detach().double()
    return value
