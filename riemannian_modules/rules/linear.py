"""The rule of linear layers."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from riemannian_modules.factors import BiasFactor, LinearFactor, MetricFactor
from riemannian_modules.rules.base import Rule, register_rule

__all__ = ["LinearRule"]


class LinearRule(Rule):
    """``y = W x + b`` with any number of leading dimensions, the first the examples."""

    def factors(
        self, module: nn.Module, inputs: Sequence[Tensor], cotangents: Sequence[Tensor]
    ) -> dict[str, MetricFactor]:
        """Return the structured factors of weight and bias.

        Several uses are further positions: their factors add up, not their Gram
        matrices.
        """
        # Autocast computes the layer in another data type than its parameters'.
        dtype = module.get_parameter("weight").dtype
        x = _join([_positions(each, 1).to(dtype) for each in inputs], 1)
        l = _join([_positions(each, 2).to(dtype) for each in cotangents], 2)
        factors: dict[str, MetricFactor] = {"weight": LinearFactor(x, l)}
        if module.bias is not None:
            factors["bias"] = BiasFactor(l)
        return factors


def _positions(tensor: Tensor, leading: int) -> Tensor:
    if tensor.ndim == leading + 1:
        return tensor.unsqueeze(leading)
    return tensor.flatten(leading, -2)


def _join(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


register_rule(nn.Linear, LinearRule())
