"""Where tensors lie, and which are which."""

import weakref
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor

from riemannian_modules.capture.operation import Slot, found_in, same

__all__ = ["Slots", "lies_at", "memory_of", "same_numbers", "written"]


class Slots:
    """The slots of living tensors: a dictionary by identity that lets go of them."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[weakref.ref[Tensor], Slot]] = {}

    def get(self, tensor: Tensor) -> Slot | None:
        """Return the slot of a tensor, None if it has none."""
        known = self._known.get(id(tensor))
        return None if known is None else known[1]

    def put(self, tensor: Tensor, slot: Slot) -> None:
        """Know a tensor from now on."""
        key, known = id(tensor), self._known
        reference = weakref.ref(tensor, lambda _: known.pop(key, None))
        known[key] = reference, slot

    def items(self) -> Iterator[tuple[Tensor, Slot]]:
        """Yield the tensors and their slots."""
        for reference, slot in list(self._known.values()):
            tensor = reference()
            if tensor is not None:
                yield tensor, slot


def lies_at(tensor: Tensor) -> tuple[Any, ...]:
    """Return how a tensor lies in its memory."""
    where = tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
    return *where, tensor.dtype, tensor.is_conj(), tensor.is_neg()


def memory_of(tensor: Tensor) -> int:
    """Return what tells the memory of a living tensor from any other."""
    return int(tensor.untyped_storage()._cdata)


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Whether tensors are what torch makes of the same number in Python."""
    if a.ndim or b.ndim or a.dtype != b.dtype or not (a.is_cpu and b.is_cpu):
        return False
    return same(a.item(), b.item())


def written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that a call of an operation writes to."""
    found: list[Tensor] = []
    for index, name in _writes(func):
        given = args[index] if index < len(args) else kwargs.get(name)
        found += found_in(given, Tensor)
    return found


@cache
def _writes(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [
        (index, argument.name)
        for index, argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
