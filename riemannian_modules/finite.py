"""Whether numbers are finite, as far as it can be known without waiting."""

import math

import torch
from torch import Tensor

from riemannian_modules.reading import number

__all__ = ["looks_finite"]


def looks_finite(value: Tensor) -> bool:
    """Return False if a tensor on the CPU holds NaN or infinity.

    Elsewhere the answer would wait for the device, so it is True there.

    >>> looks_finite(torch.tensor([1.0, float("nan")]))
    False
    """
    if value.device.type != "cpu":
        return True
    # One pass for the usual case; a sum may overflow without a value doing so.
    summed = number(value.sum(), math.isfinite)
    return math.isfinite(summed) or bool(torch.isfinite(value).all())
