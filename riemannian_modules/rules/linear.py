"""The rule of linear layers."""

from torch import Tensor, nn

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import BiasFactor, LinearFactor, MetricFactor
from riemannian_modules.rules.base import Call, register_rule

__all__ = ["linear"]


def linear(call: Call) -> dict[str, MetricFactor]:
    """Factors of ``y = W x + b`` with any number of leading dimensions.

    Args:
        call: a call of a linear layer.

    Returns:
        The structured factors of weight and bias.

    Raises:
        LinearizationError: the input has no batch dimension.
    """
    x, l = call.input, call.cotangents[0]
    assert l is not None
    if x.shape[:-1] != l.shape[1:-1] or call.layouts[0].dim >= x.ndim - 1:
        raise LinearizationError(
            f"{call.label} saw an input of shape {tuple(x.shape)} in a batch of "
            f"{call.examples} outputs; give it a batch dimension with unsqueeze(0)"
        )
    dtype = call.dtype
    x = _positions(call.first(call.input), 1).to(dtype)
    l = _positions(call.cotangent(), 2).to(dtype)
    return {"weight": LinearFactor(x, l), "bias": BiasFactor(l)}


def _positions(tensor: Tensor, leading: int) -> Tensor:
    if tensor.ndim == leading + 1:
        return tensor.unsqueeze(leading)
    return tensor.flatten(leading, -2)


register_rule(nn.Linear, linear, apart=True)
