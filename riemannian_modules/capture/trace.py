"""Which operations of torch a piece of Python calls, and how they are wired."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from riemannian_modules import reading
from riemannian_modules.capture import unseen
from riemannian_modules.capture.memory import (
    Slots,
    lies_at,
    memory_of,
    same_numbers,
    written,
)
from riemannian_modules.capture.operation import Operation, Slot, found_in

__all__ = ["Trace"]

aten = torch.ops.aten

_READ = aten._local_scalar_dense.default
# What changes the shape of a tensor in place, and is a view otherwise.
_BENDS = {
    aten.squeeze_.default: aten.squeeze.default,
    aten.squeeze_.dim: aten.squeeze.dim,
    aten.squeeze_.dims: aten.squeeze.dims,
    aten.unsqueeze_.default: aten.unsqueeze.default,
    aten.t_.default: aten.t.default,
    aten.transpose_.default: aten.transpose.int,
}
# Operations that read lengths on the host as they are called.
_LENGTHS = "aten::_pack_padded_sequence"
_OWN = (__file__, unseen.__file__, reading.__file__, torch.__path__[0])


class Trace(TorchDispatchMode):
    """Takes down every operation inside its scope, which all are executed as usual.

    Args:
        arguments: tensors that will be others the next time.
        places: what is in places that hold another tensor every time.

    Attributes:
        operations: the calls.
        wheres: for each, the line of Python that it comes from.
        held: other tensors from outside, by the index of their slots.
        groups: of each slot, the memory that it lies in; negative: from outside.
        layouts: of each slot, how it lies there.
        changed: slots of the tensors from outside whose memory is written.
        reason: why operations alone would not be the same, or None.
    """

    def __init__(
        self, arguments: Sequence[Tensor], places: Sequence[Tensor | None]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.wheres: list[str] = []
        self.held: list[Tensor] = []
        self.groups: dict[Slot, int] = {}
        self.layouts: dict[Slot, tuple[object, ...]] = {}
        self.changed: set[Slot] = set()
        self.reason: str | None = None
        self._firsts: list[str] = []
        self._outside: dict[int, list[Slot]] = {}
        self._moving: set[int] = set()
        self._slots = Slots()
        self._count = 0
        self._decides: Callable[[float], object] | None = None
        for kind, tensors in (("p", places), ("x", arguments)):
            for index, tensor in enumerate(tensors):
                if tensor is not None and not self._is_sparse(tensor):
                    self._enter(tensor, Slot(kind, index))
        self._moving = {self.groups[s] for s in self.groups if s.kind == "x"}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else every operation goes through the compiler, whose import takes seconds.
        return False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Trace what happens in this scope."""
        with ExitStack() as stack:
            stack.enter_context(reading.heard_by(self))
            stack.enter_context(unseen.Unseen(self.refuse))
            stack.enter_context(self)
            yield

    def expect(self, decides: Callable[[float], object] | None) -> None:
        """Take note of what the next number is read for."""
        self._decides = decides

    def slot_of(self, tensor: Tensor) -> Slot:
        """Return the slot of a tensor, a new one of kind ``"h"`` if it has none."""
        known = self._slots.get(tensor)
        return self._hold(tensor) if known is None else known

    def generators(self) -> list[torch.Generator]:
        """Return those that random numbers are drawn from, each once."""
        found: dict[int, torch.Generator] = {}
        for each in self.operations:
            if torch.Tag.nondeterministic_seeded in each.function.tags:
                given = [*each.args, *each.kwargs.values()]
                own = [one for one in given if isinstance(one, torch.Generator)]
                drawn = own[0] if own else torch.default_generator
                found[id(drawn)] = drawn
        return list(found.values())

    def unread(self, arguments: Sequence[Tensor]) -> bool:
        """Whether no operation takes an integer argument, such as lengths.

        Args:
            arguments: those of the trace.
        """
        taken = {slot for each in self.operations for slot in each.given}
        slots = (Slot("x", index) for index in range(len(arguments)))
        return any(
            tensor.numel() > 0 and not tensor.is_floating_point() and slot not in taken
            for tensor, slot in zip(arguments, slots, strict=True)
        )

    def differs(self, other: "Trace") -> str | None:
        """Return where another trace differs, None where both are one program.

        Args:
            other: of the same step, at another time.
        """
        for mine, its, where in zip(
            self.operations, other.operations, self.wheres, strict=False
        ):
            if not mine.is_like(its):
                return f"{where} ({mine.function}) differs from step to step"
        if len(self.operations) != len(other.operations):
            return "the number of operations differs from step to step"
        pairs = zip(self.held, other.held, self._firsts, strict=True)
        for tensor, another, where in pairs:
            if tensor is not another and not same_numbers(tensor, another):
                return (
                    f"{where} reads a tensor of shape {tuple(tensor.shape)} that is "
                    "another one in each step; hand it over as an argument"
                )
        return None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        tensors = found_in((args, kwargs), Tensor)
        if func.namespace == "profiler" or self._refuses(func, tensors):
            return _called(func, args, kwargs, written(func, args, kwargs))
        where = _where()
        wired, named = self._wired(args), self._wired(kwargs)
        given = tuple(map(self.slot_of, tensors))
        if _is_absolute(func, args) and self.groups[wired[0]] in self._moving:
            self.refuse("asks where in its memory an argument lies: use slices")
        if torch.Tag.inplace_view in _tags(func):
            return self._reshaped(func, wired, args, kwargs, where)
        changed = written(func, args, kwargs)
        if self.reason is not None:
            return _called(func, args, kwargs, changed)
        before = {
            memory_of(tensor): self.groups[slot]
            for tensor, slot in zip(tensors, given, strict=True)
        }
        returned = _called(func, args, kwargs, changed)
        if not (before or isinstance(returned, Tensor | tuple | list)):
            # Nothing of a tensor, such as a common data type.
            return returned
        several = isinstance(returned, tuple | list)
        flat = list(returned) if several else [returned]
        reads, value, decides = False, None, None
        if not all(t is None or isinstance(t, Tensor) for t in flat):
            if any(isinstance(t, Tensor) for t in flat):
                self.refuse(f"gets tensors and numbers from one operation: {func}")
                return returned
            reads, decides = True, self._decides
            value = self._decided(returned)
        made = tuple(self._made(t, before) for t in flat)
        if torch.Tag.dynamic_output_shape in _tags(func):
            value = tuple(t.shape if isinstance(t, Tensor) else None for t in flat)
        for tensor in changed:
            self.changed.update(self._outside.get(memory_of(tensor), ()))
        writes = tuple(map(self.slot_of, changed))
        known = func, wired, named, given, made, several, reads, value, decides
        self._add(Operation(*known, writes), where)
        return returned

    def refuse(self, why: str) -> None:
        """Take note of why this is no program; all goes on as usual."""
        self.reason = self.reason or f"{_where()} {why}"

    def _refuses(self, func: Any, tensors: Sequence[Tensor]) -> bool:
        if func.namespace in ("c10d", "_c10d_functional"):
            self.refuse("speaks with other processes")
        if func._schema.name == _LENGTHS:
            self.refuse("packs sequences, whose lengths are read unseen: pad them")
        for tensor in tensors:
            if type(tensor).__torch_dispatch__ is not Tensor.__torch_dispatch__:
                self.refuse(f"works on a {type(tensor).__name__}")
            else:
                self._is_sparse(tensor)
        return self.reason is not None

    def _is_sparse(self, tensor: Tensor) -> bool:
        if tensor.layout is torch.strided:
            return False
        self.refuse("works on a sparse tensor")
        return True

    def _reshaped(
        self, func: Any, wired: Any, args: Any, kwargs: Any, where: str
    ) -> Any:
        """Take down a view in place as a view, which the tensor is from then on."""
        returned, tensor, slot = func(*args, **kwargs), args[0], wired[0]
        if slot.kind != "v" or func not in _BENDS:
            self.refuse(f"changes the shape of a tensor in place: {func}")
            return returned
        view = Slot("v", self._count)
        self._count += 1
        self._know(tensor, view, self.groups[slot])
        self._add(Operation(_BENDS[func], wired, kwargs, (slot,), (view,)), where)
        return returned

    def _decided(self, returned: Any) -> object:
        if self._decides is not None:
            return self._decides(returned)
        if isinstance(returned, float | complex):
            self.refuse(
                f"reads a number ({returned:.3g}), which will be another one in the "
                "next step: leave it in its tensor"
            )
        return returned

    def _made(self, tensor: object, before: dict[int, int]) -> Slot | None:
        if not isinstance(tensor, Tensor) or self._slots.get(tensor) is not None:
            return None
        if self._is_sparse(tensor):
            return None
        storage, slot = memory_of(tensor), Slot("v", self._count)
        self._count += 1
        self._know(tensor, slot, before.get(storage, self._count))
        return slot

    def _know(self, tensor: Tensor, slot: Slot, group: int) -> None:
        self._slots.put(tensor, slot)
        self.groups[slot] = group
        self.layouts[slot] = lies_at(tensor)

    def _enter(self, tensor: Tensor, slot: Slot) -> None:
        """Know a tensor from outside."""
        known = self._outside.setdefault(memory_of(tensor), [])
        known.append(slot)
        first = known[0]
        group = self.groups[first] if first in self.groups else -1 - len(self._outside)
        self._know(tensor, slot, group)

    def _hold(self, tensor: Tensor) -> Slot:
        """Return the slot of a tensor that no operation was seen to make."""
        slot = Slot("h", len(self.held))
        if self._is_sparse(tensor):
            return slot
        known = self._beside(tensor)
        if known is not None:
            return known
        self.held.append(tensor)
        self._firsts.append(_where())
        self._enter(tensor, slot)
        return slot

    def _beside(self, tensor: Tensor) -> Slot | None:
        """Return the slot of a tensor in memory that is known, as of ``.data``."""
        storage = memory_of(tensor)
        beside = [
            slot
            for other, slot in self._slots.items()
            if memory_of(other) == storage and other.dtype == tensor.dtype
        ]
        if not beside:
            return None
        if self.groups[beside[0]] in self._moving:
            self.refuse("uses a tensor in the memory of an argument, made before")
        for slot in beside:
            if lies_at(tensor) == self.layouts[slot]:
                self._slots.put(tensor, slot)
                return slot
        slot = beside[0]
        lies = (*map(list, lies_at(tensor)[:2]), tensor.storage_offset())
        view = Slot("v", self._count)
        self._count += 1
        self._know(tensor, view, self.groups[slot])
        strided = aten.as_strided.default
        call = Operation(strided, (slot, *lies), {}, (slot,), (view,))
        self._add(call, _where())
        return view

    def _add(self, operation: Operation, where: str) -> None:
        self.operations.append(operation)
        self.wheres.append(where)

    def _wired(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            return self.slot_of(value)
        if isinstance(value, tuple | list):
            return type(value)(map(self._wired, value))
        if isinstance(value, dict):
            return {name: self._wired(each) for name, each in value.items()}
        return value


@cache
def _tags(func: Any) -> frozenset[torch.Tag]:
    # Torch makes the list anew each time.
    return frozenset(func.tags)


def _called(func: Any, args: Any, kwargs: Any, changed: Sequence[Tensor]) -> Any:
    changed = [tensor for tensor in changed if not tensor.is_inference()]
    versions = [tensor._version for tensor in changed]
    returned = func(*args, **kwargs)
    for tensor, version in zip(changed, versions, strict=True):
        # In lists, as of clip_grad_norm_, torch forgets to count inside of a mode.
        if tensor._version == version:
            torch.autograd.graph.increment_version(tensor)
    return returned


def _is_absolute(func: Any, args: Sequence[Any]) -> bool:
    # The next batch may be another slice of the same memory.
    strided = func._schema.name.startswith("aten::as_strided")
    return strided and any(isinstance(each, int) for each in args)


def _where() -> str:
    """Return the line of Python, outside of torch, that calls."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_OWN):
        frame = frame.f_back
    return f"{frame.f_code.co_filename}:{frame.f_lineno}"
