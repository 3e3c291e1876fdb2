"""One call of an operation of torch, and the tensors between calls."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

__all__ = ["Operation", "Slot", "found_in", "same"]

T = TypeVar("T")


class Slot(NamedTuple):
    """A tensor of a trace.

    Attributes:
        kind: ``"x"`` for an argument, ``"p"`` for the content of a place, ``"h"`` for
            any other tensor from outside, ``"v"`` for what an operation made.
        number: which one of its kind.
    """

    kind: str
    number: int

    def __repr__(self) -> str:
        return f"{self.kind}{self.number}"


@dataclass(slots=True)
class Operation:
    """One call.

    Attributes:
        function: the operation.
        args: its arguments, slots in the place of tensors.
        kwargs: those with names.
        given: the slots in both.
        made: slots of the tensors that it returned, None for those known before.
        several: whether it returned a sequence.
        reads: whether it returned something that is no tensor, to the host.
        value: what, or what was decided from it; or the shapes that depend on values.
        decides: what decided.
        writes: slots of the tensors that it changes.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: tuple[Slot, ...]
    made: tuple[Slot | None, ...]
    several: bool = False
    reads: bool = False
    value: object = None
    decides: Callable[[float], object] | None = None
    writes: tuple[Slot, ...] = ()

    @property
    def ends(self) -> bool:
        """Whether a program may have to end there."""
        return self.reads or self.value is not None

    def is_like(self, other: "Operation") -> bool:
        """Whether another call is the same up to what ``decides`` is made of."""
        own = (self.function, self.made, self.several, self.reads, self.writes)
        its = (other.function, other.made, other.several, other.reads, other.writes)
        values = same(self.value, other.value)
        given = same(self.args, other.args) and same(self.kwargs, other.kwargs)
        return own == its and values and given


def found_in(value: object, kind: type[T]) -> list[T]:
    """Return what is of a kind in nested arguments."""
    found: list[T] = []
    _find(value, kind, found)
    return found


def _find(value: object, kind: type[T], found: list[T]) -> None:
    if isinstance(value, kind):
        found.append(value)
    elif isinstance(value, tuple | list):
        for each in value:
            _find(each, kind, found)
    elif isinstance(value, dict):
        for each in value.values():
            _find(each, kind, found)


def same(a: object, b: object) -> bool:
    """Whether nested arguments are equal, NaN to itself too, and of the same types."""
    if type(a) is Slot:
        return type(b) is Slot and a == b
    if isinstance(a, tuple | list) and type(a) is type(b):
        assert isinstance(b, tuple | list)
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if type(a) is not type(b):
        return False
    return bool(a == b) or (a != a and b != b)
