"""The rules of normalisations with an affine part: ``y = normalised(x) w + b``."""

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import DenseFactor, MetricFactor
from riemannian_modules.rules.base import Call, register_rule
from riemannian_modules.rules.places import (
    cotangents_by_example,
    inputs_by_example,
    require_plain,
)

__all__ = ["batch_norm", "group_norm", "instance_norm", "layer_norm", "rms_norm"]


def layer_norm(call: Call) -> dict[str, MetricFactor]:
    """Factors of a LayerNorm, whose statistics are those of each position.

    Args:
        call: a call of a LayerNorm.

    Returns:
        Dense factors of weight and bias.
    """
    module = cast("nn.LayerNorm", call.module)
    require_plain(call)
    normalised = F.layer_norm(
        call.input.to(call.dtype), module.normalized_shape, eps=module.eps
    )
    return _affine(call, normalised, len(module.normalized_shape))


def rms_norm(call: Call) -> dict[str, MetricFactor]:
    """Factor of an RMSNorm.

    Args:
        call: a call of an RMSNorm.

    Returns:
        The dense factor of the weight.
    """
    module = cast("nn.RMSNorm", call.module)
    require_plain(call)
    normalised = F.rms_norm(
        call.input.to(call.dtype), list(module.normalized_shape), eps=module.eps
    )
    return _affine(call, normalised, len(module.normalized_shape))


def group_norm(call: Call) -> dict[str, MetricFactor]:
    """Factors of a GroupNorm, whose statistics are those of each example.

    Args:
        call: a call of a GroupNorm.

    Returns:
        Dense factors of weight and bias.
    """
    module = cast("nn.GroupNorm", call.module)
    require_plain(call)
    x = call.input.to(call.dtype)
    return _channels(call, F.group_norm(x, module.num_groups, eps=module.eps))


def instance_norm(call: Call) -> dict[str, MetricFactor]:
    """Factors of an InstanceNorm with an affine part.

    Args:
        call: a call of an InstanceNorm.

    Returns:
        Dense factors of weight and bias.
    """
    module = cast("_InstanceNorm", call.module)
    require_plain(call, "_apply_instance_norm")
    x = call.input.to(call.dtype)
    if x.ndim == module._get_no_batch_dim():
        x = x.unsqueeze(0)
    own = module.training or not module.track_running_stats
    normalised = F.instance_norm(
        x,
        None if own else module.running_mean,
        None if own else module.running_var,
        use_input_stats=own,
        eps=module.eps,
    )
    return _channels(call, normalised)


def batch_norm(call: Call) -> dict[str, MetricFactor]:
    """Factors of a BatchNorm in eval mode, which normalises by its running statistics.

    Args:
        call: a call of a BatchNorm.

    Returns:
        Dense factors of weight and bias.

    Raises:
        LinearizationError: it normalises by the statistics of the batch.
    """
    module = cast("_BatchNorm", call.module)
    require_plain(call)
    if module.training or module.running_mean is None:
        raise LinearizationError(
            f"{call.label} normalises by the statistics of the batch, so its examples "
            "interact; call its .eval(), with running statistics, or use GroupNorm"
        )
    normalised = F.batch_norm(
        call.input.to(call.dtype),
        module.running_mean,
        module.running_var,
        training=False,
        eps=module.eps,
    )
    return _channels(call, normalised)


def _channels(call: Call, normalised: Tensor) -> dict[str, MetricFactor]:
    return _affine(call, normalised, normalised.ndim - 1, normalised.ndim - 2)


def _affine(
    call: Call, normalised: Tensor, kept: int, positions: int = 0
) -> dict[str, MetricFactor]:
    """Return the factors of ``w`` and ``b`` in ``y = normalised w + b``.

    Args:
        call: the call.
        normalised: what the weight is multiplied with, shaped like the output.
        kept: number of its last dimensions that belong together.
        positions: how many of these share the entries of the weight.
    """
    l = cotangents_by_example(call, kept)
    shared = (1, *range(2 + kept - positions, 2 + kept))
    factors: dict[str, MetricFactor] = {}
    # One cotangent at a time: all products at once are r times the layer's output.
    if "weight" in call.wanted:
        x = inputs_by_example(call, normalised, kept)
        rows = [(own * x).sum(shared) for own in l]
        factors["weight"] = DenseFactor(torch.cat(rows))
    if "bias" in call.wanted:
        factors["bias"] = DenseFactor(torch.cat([own.sum(shared) for own in l]))
    return factors


register_rule(nn.BatchNorm1d, batch_norm)
register_rule(nn.BatchNorm2d, batch_norm)
register_rule(nn.BatchNorm3d, batch_norm)
register_rule(nn.InstanceNorm1d, instance_norm)
register_rule(nn.InstanceNorm2d, instance_norm)
register_rule(nn.InstanceNorm3d, instance_norm)
register_rule(nn.LayerNorm, layer_norm)
register_rule(nn.RMSNorm, rms_norm)
register_rule(nn.GroupNorm, group_norm)
