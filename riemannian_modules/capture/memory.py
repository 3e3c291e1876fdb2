"""Where tensors lie."""

from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor

from riemannian_modules.capture.operation import same

__all__ = ["lies_at", "memory_of", "same_numbers", "tensors_in", "written"]


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested arguments."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from tensors_in(each)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


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


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """Yield the tensors that a call of an operation writes to."""
    for index, name in _writes(func):
        yield from tensors_in(args[index] if index < len(args) else kwargs.get(name))


@cache
def _writes(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [
        (index, argument.name)
        for index, argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
