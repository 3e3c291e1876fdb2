"""One call of an operation of torch, and the tensors between calls."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

__all__ = ["Operation", "Slot", "same", "slots_in"]


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


def slots_in(value: object) -> Iterator[Slot]:
    """Yield the slots in nested arguments."""
    if isinstance(value, Slot):
        yield value
    elif isinstance(value, tuple | list):
        for each in value:
            yield from slots_in(each)
    elif isinstance(value, dict):
        yield from slots_in(list(value.values()))


def same(a: object, b: object) -> bool:
    """Whether nested arguments are equal, NaN to itself too, and of the same types."""
    if isinstance(a, tuple | list) and type(a) is type(b):
        assert isinstance(b, tuple | list)
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if type(a) is not type(b):
        return False
    return bool(a == b) or (a != a and b != b)
