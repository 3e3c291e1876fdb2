"""Names with dots as dictionaries in dictionaries, and back."""

from collections.abc import Iterator, Mapping
from typing import Any, Union

from torch import Tensor

__all__ = ["Nested", "flattened", "nested"]

Nested = Mapping[str, Union[Tensor, "Nested"]]


def flattened(values: Nested, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries with their keys joined by dots.

    Args:
        values: tensors, in dictionaries nested as deep as you like.
        prefix: what comes before every name.

    Yields:
        Name and tensor.

    >>> import torch
    >>> [name for name, _ in flattened({"a.b": {"c": torch.zeros(1)}})]
    ['a.b.c']
    """
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flattened(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def nested(named: Mapping[str, Any]) -> dict[str, Any]:
    """Return values with their names split at the dots, as nested dictionaries.

    Args:
        named: values by name; no name starts with another one and a dot.

    Returns:
        Dictionaries in dictionaries.

    >>> nested({"0.weight": 1, "0.bias": 2, "scale": 3})
    {'0': {'weight': 1, 'bias': 2}, 'scale': 3}
    """
    found: dict[str, Any] = {}
    for name, value in named.items():
        *path, last = name.split(".")
        inner = found
        for step in path:
            inner = inner.setdefault(step, {})
        inner[last] = value
    return found
