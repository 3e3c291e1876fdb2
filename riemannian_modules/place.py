"""Places inside a module where a rule wants to know a cotangent."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge

__all__ = ["Finder", "Place"]


class Place(NamedTuple):
    """A linear map inside a module, or where a parameter meets its examples.

    Attributes:
        edge: where its output enters the autograd graph.
        input: what it was applied to, ``(*batch, in)``, detached; what a parameter is
            multiplied with, or empty.
        shape: that of its output; cotangents there may have less dimensions.
        note: what else the rule wants to know of it.
    """

    edge: GradientEdge
    input: Tensor
    shape: torch.Size
    note: Any = None


# Finds such places in a call from the module, its arguments and its outputs.
Finder = Callable[
    [nn.Module, tuple[Any, ...], dict[str, Any], Sequence[Tensor]], tuple[Place, ...]
]
