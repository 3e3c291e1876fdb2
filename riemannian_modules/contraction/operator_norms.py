"""Lipschitz constants of layers that are known in closed form, rounded up."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.contraction.verified import plus_up, spectral_norm, times_up

__all__ = ["CONSTANTS", "convolution_norm"]

Constant = Callable[[Any], float]

_JUMP = 1e-8


def _double(weight: Tensor) -> Tensor:
    return weight.detach().as_subclass(Tensor).double()


def linear_norm(layer: nn.Linear) -> float:
    """Spectral norm of the weight."""
    return float(spectral_norm(_double(layer.weight)))


def convolution_norm(conv: nn.modules.conv._ConvNd) -> float:
    """Return an upper bound on the norm of a convolution with zero padding.

    The smaller of two: the kernel as one matrix, times the root of how many patches a
    pixel lies in; and the sum over the taps of the kernel, each of which is a matrix
    between shifted images (Gouk et al. 2021).

    Args:
        conv: a convolution of 1, 2 or 3 dimensions, transposed or not, with any
            stride, dilation and groups. Infinite for other kinds of padding.

    Returns:
        The bound, for inputs of any size.
    """
    if conv.padding_mode != "zeros":
        return math.inf
    weight = _double(conv.weight)
    kernel = weight.shape[2:]
    # (groups, a, b, taps); a and b are outputs and inputs of a group, or vice versa.
    first = weight.shape[0] // conv.groups
    grouped = weight.reshape(conv.groups, first, weight.shape[1], -1)
    taps = spectral_norm(grouped.permute(0, 3, 1, 2))
    by_tap = max(plus_up(*row) for row in taps.tolist())
    # A transposed convolution is the adjoint of one with this kernel.
    joint = grouped.flatten(2)
    overlap = _overlap(kernel, conv.stride, conv.dilation)
    by_patch = times_up(
        float(spectral_norm(joint).max()),
        math.nextafter(math.sqrt(overlap), math.inf),
    )
    return min(by_tap, by_patch)


def _overlap(
    kernel: Sequence[int], stride: Sequence[int], dilation: Sequence[int]
) -> int:
    """How many patches a pixel lies in, at most."""
    count = 1
    for size, step, gap in zip(kernel, stride, dilation, strict=True):
        count *= math.ceil(size * math.gcd(step, gap) / step)
    return count


def layer_norm(layer: nn.LayerNorm) -> float:
    """Largest weight over the root of eps: attained by inputs without variance."""
    weight: Tensor | None = layer.weight
    top = 1.0 if weight is None else float(_double(weight).abs().max())
    return top / math.sqrt(layer.eps) * (1 + 1e-14) if layer.eps > 0 else math.inf


def batch_norm(layer: nn.modules.batchnorm._BatchNorm) -> float:
    """Largest slope, in evaluation mode; unknown while training."""
    if layer.training or layer.running_var is None:
        return math.inf
    spread = (_double(layer.running_var) + layer.eps).sqrt()
    weight = layer.weight
    top = torch.ones_like(spread) if weight is None else _double(weight).abs()
    return float((top / spread).max()) * (1 + 1e-14)


def dropout(layer: nn.Module) -> float:
    """One in evaluation mode; unknown while training."""
    return math.inf if layer.training else 1.0


def leaky(layer: nn.LeakyReLU) -> float:
    """The steeper of both slopes; what is not finite comes first, and stays."""
    return max(abs(layer.negative_slope), 1.0)


def gelu(layer: nn.GELU) -> float:
    """Slope at the root of two, of the exact function only."""
    return 1.1289042 if layer.approximate == "none" else math.inf


def softplus(layer: nn.Softplus) -> float:
    """One, if the jump to the identity at the threshold is below 1e-8."""
    t = layer.threshold
    if not (math.isfinite(t) and math.isfinite(layer.beta)):
        return math.inf
    jump = max(-t, 0.0) + math.log1p(math.exp(-abs(t)))
    return 1.0 if jump <= _JUMP * abs(layer.beta) else math.inf


def _always(value: float) -> Constant:
    return lambda layer: value


CONSTANTS: dict[type[nn.Module], Constant] = {
    nn.Linear: linear_norm,
    nn.Conv1d: convolution_norm,
    nn.Conv2d: convolution_norm,
    nn.Conv3d: convolution_norm,
    nn.ConvTranspose1d: convolution_norm,
    nn.ConvTranspose2d: convolution_norm,
    nn.ConvTranspose3d: convolution_norm,
    nn.LayerNorm: layer_norm,
    nn.BatchNorm1d: batch_norm,
    nn.BatchNorm2d: batch_norm,
    nn.BatchNorm3d: batch_norm,
    nn.Dropout: dropout,
    nn.Identity: _always(1.0),
    nn.Flatten: _always(1.0),
    nn.Unflatten: _always(1.0),
    nn.ReLU: _always(1.0),
    nn.ReLU6: _always(1.0),
    nn.Hardtanh: _always(1.0),
    nn.Tanh: _always(1.0),
    nn.Tanhshrink: _always(1.0),
    nn.Softsign: _always(1.0),
    nn.Softplus: softplus,
    nn.LogSigmoid: _always(1.0),
    nn.Sigmoid: _always(0.25),
    nn.Hardsigmoid: _always(0.1666667),
    nn.Softmax: _always(0.5),
    nn.SiLU: _always(1.0998394),
    nn.GELU: gelu,
    nn.LeakyReLU: leaky,
    nn.ELU: lambda layer: max(abs(layer.alpha), 1.0),
}
