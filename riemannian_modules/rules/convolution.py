"""The rules of convolutions and transposed convolutions."""

from typing import Any, cast

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from riemannian_modules.factors import (
    BiasFactor,
    Convolution,
    ConvolutionFactor,
    MetricFactor,
)
from riemannian_modules.rules.base import Call, register_rule
from riemannian_modules.rules.places import (
    cotangents_by_example,
    inputs_by_example,
    require_plain,
)

__all__ = ["convolution"]


def convolution(call: Call) -> dict[str, MetricFactor]:
    """Factors of a convolution with any stride, padding, dilation and groups.

    Args:
        call: a call of a convolution.

    Returns:
        The structured factors of weight and bias.
    """
    module = cast("_ConvNd", call.module)
    require_plain(call, *([] if module.transposed else ["_conv_forward"]))
    kept = 1 + len(module.kernel_size)
    l = cotangents_by_example(call, kept)
    x = inputs_by_example(call, call.input.to(call.dtype), kept)
    x, padding = _padded(module, x)
    convolution = Convolution(
        kernel=module.kernel_size,
        stride=module.stride,
        padding=padding,
        dilation=module.dilation,
        groups=module.groups,
        transposed=module.transposed,
        output_padding=_output_padding(module, x, l) if module.transposed else (),
    )
    out, channels = module.out_channels, module.in_channels
    rows, columns = (channels, out) if module.transposed else (out, channels)
    shape = (rows, columns // module.groups, *module.kernel_size)
    factors: dict[str, MetricFactor] = {
        "weight": ConvolutionFactor(convolution, x, l, shape)
    }
    if "bias" in call.wanted:
        # All positions add the same bias.
        sums = l.flatten(4).sum(-1).sum(2, keepdim=True)
        factors["bias"] = BiasFactor(sums)
    return factors


def _padded(module: _ConvNd, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Return the input as the kernel sees it, and how much of zeros is left to add."""
    sides: list[int] = module._reversed_padding_repeated_twice
    before, after = sides[-2::-2], sides[::-2]
    zeros = module.padding_mode == "zeros"
    if zeros and before == after:
        return x, tuple(before)
    mode: Any = "constant" if zeros else module.padding_mode
    padded = F.pad(x.flatten(0, 1), sides, mode=mode)
    return padded.unflatten(0, x.shape[:2]), (0,) * len(module.kernel_size)


def _output_padding(module: _ConvNd, x: Tensor, l: Tensor) -> tuple[int, ...]:
    # An output_size in the call decides it, and the output's size shows it.
    return tuple(
        out - ((size - 1) * stride - 2 * padding + dilation * (kernel - 1) + 1)
        for out, size, stride, padding, dilation, kernel in zip(
            l.shape[4:],
            x.shape[3:],
            module.stride,
            cast("tuple[int, ...]", module.padding),
            module.dilation,
            module.kernel_size,
            strict=True,
        )
    )


for _layer in (
    nn.Conv1d,
    nn.Conv2d,
    nn.Conv3d,
    nn.ConvTranspose1d,
    nn.ConvTranspose2d,
    nn.ConvTranspose3d,
):
    register_rule(_layer, convolution, apart=True)
