"""Keeping torch.compile out of the recording."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import nn

__all__ = ["disabled", "is_compiled", "outside"]


def disabled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that graphs end at instead of tracing it.

    Args:
        function: any function.
    """
    found = torch.compiler.disable(function)
    found._torchdynamo_disable_msg = (
        "metric.record() remembers calls of layers, which a compiled graph cannot: "
        "leave out fullgraph=True"
    )
    return found


@cache
def outside() -> Callable[..., Any]:
    """Return what calls a function with arguments, and is not traced."""
    return disabled(lambda function, *arguments: function(*arguments))


def is_compiled(module: nn.Module) -> bool:
    """Whether a module is what torch.compile returned, or compiled in place.

    Args:
        module: the module, without those below it.
    """
    return "_orig_mod" in module._modules or module._compiled_call_impl is not None
