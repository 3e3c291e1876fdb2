"""Tensors in nested arguments, and what a module saw of them."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from torch import Tensor, nn

from riemannian_modules.place import Place

__all__ = ["map_tensors", "own_memory", "seen", "tensors_in"]


def tensors_in(value: object) -> Iterator[Tensor]:
    """Yield the tensors of nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from tensors_in(each)
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            yield from tensors_in(getattr(value, each.name, None))


def map_tensors(value: Any, change: Callable[[Tensor], Any]) -> Any:
    """Return the same nesting with every tensor changed."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: map_tensors(each, change) for key, each in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_tensors(each, change) for each in value))
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(each, change) for each in value)
    if is_dataclass(value) and not isinstance(value, type):
        # Not made anew: its class may work out, or forbid, what it is made of.
        found = copy.copy(value)
        for each in fields(value):
            if hasattr(value, each.name):
                changed = map_tensors(getattr(value, each.name), change)
                object.__setattr__(found, each.name, changed)
        return found
    return value


def seen(given: Sequence[Tensor]) -> list[Tensor]:
    """Return what a module was given, detached.

    What is a parameter, or a view of one, is copied: steps write there, and what the
    module saw would be gone.

    Args:
        given: tensors, one of them perhaps several times.
    """
    copies: dict[int, Tensor] = {}
    found = []
    for tensor in given:
        root = tensor if tensor._base is None else tensor._base
        if not (root.is_leaf and root.requires_grad and isinstance(root, nn.Parameter)):
            found.append(tensor.detach())
            continue
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone()
        found.append(copies[id(tensor)])
    return found


def own_memory(
    places: Sequence[Place], given: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[Place, ...]:
    """Return places whose inputs are copies where :func:`seen` has made some.

    Args:
        places: places inside a module.
        given: what the module was given.
        inputs: the same as :func:`seen` returned it.
    """
    pairs = zip(given, inputs, strict=True)
    copied = {_start(old) for old, new in pairs if _start(old) != _start(new)}
    return tuple(
        place._replace(input=place.input.clone())
        if _start(place.input) in copied
        else place
        for place in places
    )


def _start(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
