"""The rule of PReLU, the activation that has a parameter."""

from typing import cast

import torch
from torch import nn

from riemannian_modules.factors import DenseFactor, MetricFactor
from riemannian_modules.rules.base import Call, register_rule
from riemannian_modules.rules.places import (
    cotangents_by_example,
    inputs_by_example,
    require_plain,
)

__all__ = ["prelu"]


def prelu(call: Call) -> dict[str, MetricFactor]:
    """Factor of the slopes of a PReLU, one or one for each channel.

    The generic rule would do, but for torch.func, whose derivative of this function is
    wrong where there are as many cotangents as examples (torch 2.13).

    Args:
        call: a call of a PReLU.

    Returns:
        The dense factor of the slopes.
    """
    module = cast("nn.PReLU", call.module)
    require_plain(call)
    negative = call.input.to(call.dtype).clamp_max(0.0)
    # Dimension 1 holds the channels, if there is a slope for each.
    kept = 0 if module.num_parameters == 1 else negative.ndim - 1
    l = cotangents_by_example(call, kept)
    x = inputs_by_example(call, negative, kept)
    shared = (1, *range(3, x.ndim))
    rows = torch.cat([(own * x).sum(shared) for own in l])
    return {"weight": DenseFactor(rows.view(len(rows), module.num_parameters))}


register_rule(nn.PReLU, prelu)
