"""Where a Gauss-Newton step begins."""

import math
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.errors import NonFiniteError
from riemannian_modules.heads import OutputLike
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.joint_map import JointMap
from riemannian_modules.optim.kinds import require_differentiable
from riemannian_modules.optim.output_map import OutputMap
from riemannian_modules.precision import wide_dot

__all__ = ["Linearised", "linearised"]


@dataclass(frozen=True)
class Linearised:
    """The outputs and the loss to first order.

    Attributes:
        map: the derivative of the outputs.
        gradient: ambient covectors, by name of the parameter.
        loss: that of all processes.
    """

    map: OutputMap | JointMap
    gradient: Mapping[str, Tensor]
    loss: float

    def slope(self, u: Mapping[str, Tensor]) -> float:
        """Return the derivative of the loss along tangent vectors."""
        return sum(float(wide_dot(self.gradient[name], x)) for name, x in u.items())


def linearised(
    metric: ModelMetric,
    outputs: Callable[[], OutputLike],
    loss: Callable[[Any], Tensor],
) -> Linearised:
    """Return the model to first order where it is. Cost: a reverse pass.

    Args:
        metric: the model's geometry.
        outputs: evaluates the model.
        loss: the loss as a function of what ``outputs`` returns.

    Raises:
        NonFiniteError: the loss or its gradient is not finite.
        NotRecordedError: no graph leads from the outputs to the parameters.
        OutputMetricError: an output has no metric.
    """
    exchange = metric.exchange
    shared = nullcontext() if exchange is None else exchange.guard("outputs")
    with shared, torch.enable_grad():
        evaluated = outputs()
        own = OutputMap(
            {d.name: d.tensor for d in metric.parameters},
            metric.output,
            evaluated,
            metric.reduction,
        )
        found = loss(evaluated)
        require_differentiable(found)
        costates = torch.autograd.grad(
            found, own.outputs, allow_unused=True, retain_graph=True
        )
    map: OutputMap | JointMap = own
    if exchange is not None:
        share = exchange.share(own.terms, metric.reduction)
        map = JointMap(own, exchange, share)
    value = map.total(float(found.detach()))
    cotangents = [
        torch.zeros_like(z) if costate is None else costate.detach()
        for z, costate in zip(own.outputs, costates, strict=True)
    ]
    gradient = map.pull(cotangents)
    finite = all(bool(e.isfinite().all()) for e in gradient.values())
    if not (math.isfinite(value) and finite):
        raise NonFiniteError(
            f"the loss is {value} where the step begins, or its gradient is not "
            "finite; nothing was changed. Load a good state"
        )
    return Linearised(map, gradient, value)
