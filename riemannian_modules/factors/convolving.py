"""What a convolution does besides multiplying with its weight."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Convolution"]


@dataclass(frozen=True)
class Convolution:
    """What a convolution does besides multiplying with its weight.

    Attributes:
        kernel: size of the kernel.
        stride: stride.
        padding: zeros on both sides.
        dilation: dilation.
        groups: number of groups.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed convolution.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    output_padding: tuple[int, ...] = ()

    @property
    def _arguments(self) -> tuple[object, ...]:
        return (
            self.stride,
            self.padding,
            self.dilation,
            self.transposed,
            self.output_padding or (0,) * len(self.kernel),
            self.groups,
        )

    def apply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return the convolution of ``x``, ``(batch, channels, *size)``."""
        result: Tensor = torch.convolution(x, weight, None, *self._arguments)  # type: ignore[arg-type]
        return result

    def pull(self, cotangent: Tensor, x: Tensor, shape: Sequence[int]) -> Tensor:
        """Return the weight's gradient, of ``shape``."""
        # Only the shape of the weight is looked at.
        weight = x.new_empty(tuple(shape))
        gradients = torch.ops.aten.convolution_backward(
            cotangent, x, weight, None, *self._arguments, (False, True, False)
        )
        result: Tensor = gradients[1]
        return result

    def patches(self, x: Tensor, positions: Sequence[int]) -> Tensor:
        """Return what the kernel sees, in one copy.

        Args:
            x: ``(n, uses, channels, *size)``.
            positions: numbers of positions along each dimension.

        Returns:
            ``(n, channels * kernel, uses * positions)``.
        """
        if any(self.padding):
            x = F.pad(x, [p for p in reversed(self.padding) for _ in range(2)])
        n, uses, channels, *_ = x.shape
        batch, use, channel, *steps = x.stride()
        kernel = [d * s for d, s in zip(self.dilation, steps, strict=True)]
        step = [d * s for d, s in zip(self.stride, steps, strict=True)]
        windows = x.as_strided(
            (n, channels, *self.kernel, uses, *positions),
            (batch, channel, *kernel, use, *step),
        )
        return windows.reshape(n, channels * math.prod(self.kernel), -1)
