"""Keeping torch.compile out of the recording."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch

__all__ = ["disabled", "outside"]


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
