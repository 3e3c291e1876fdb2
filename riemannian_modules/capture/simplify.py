"""Fewer operations that leave the same."""

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.capture.operation import Operation, Slot
from riemannian_modules.capture.trace import Trace

__all__ = ["Simple", "simplified"]

# A constant of more entries is made anew each time.
_SMALL = 1 << 12
_EMPTY = ("aten::empty", "aten::new_empty")


@dataclass
class Simple:
    """What is left of a trace.

    Attributes:
        operations: the calls, in their order.
        wheres: the lines of Python that they come from.
        indices: which of the trace's operations they are.
        wanted: the slots of what to return.
        constants: slots whose tensors are made once.
    """

    operations: list[Operation] = field(default_factory=list)
    wheres: list[str] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    wanted: list[Slot] = field(default_factory=list)
    constants: dict[Slot, Tensor] = field(default_factory=dict)


def simplified(trace: Trace, wanted: Sequence[Slot]) -> Simple:
    """Leave out what is made twice, and what nobody looks at.

    Two views are one if they lie alike in the same memory. Results of operations are
    one if these were given the same and nothing was written to it in between. Random
    numbers are drawn in any case, so that those after them stay the same.

    Args:
        trace: the operations.
        wanted: slots of what is needed after them, whose memory others may write to.
    """
    walk = _Walk(trace, {trace.groups[slot] for slot in wanted})
    for index in range(len(trace.operations)):
        walk.take(index)
    ends = [walk.same.get(slot, slot) for slot in wanted]
    kept = _needed(walk.chosen, trace.groups, ends)
    found = Simple(wanted=ends, constants=walk.constants)
    for index, operation in kept:
        found.operations.append(operation)
        found.wheres.append(trace.wheres[index])
        found.indices.append(index)
    return found


class _Walk:
    """One way through the operations, from first to last."""

    def __init__(self, trace: Trace, given_away: Collection[int]) -> None:
        self.same: dict[Slot, Slot] = {}
        self.chosen: list[tuple[int, Operation]] = []
        self.constants: dict[Slot, Tensor] = {}
        self._trace = trace
        # Tensors from outside may well be one that another one's layout describes.
        self._lying = {
            (group, trace.layouts[slot]): slot
            for slot, group in trace.groups.items()
            if slot.kind != "v"
        }
        self._known: dict[str, tuple[int, Slot]] = {}
        self._written: dict[int, list[int]] = defaultdict(list)
        for index, operation in enumerate(trace.operations):
            for slot in operation.writes:
                self._written[trace.groups[slot]].append(index)
        self._changing = {*self._written, *given_away}

    def take(self, index: int) -> None:
        """Take the next operation, or something else in its place."""
        now, groups = self._trace.operations[index], self._trace.groups
        if any(slot in self.same for slot in now.given):
            now = replace(
                now,
                args=self._renamed(now.args),
                kwargs=self._renamed(now.kwargs),
                given=self._renamed(now.given),
                writes=self._renamed(now.writes),
            )
        slot = now.made[0] if len(now.made) == 1 and not now.several else None
        if slot is None or now.ends or now.writes:
            self._keep(index, now)
            return
        inputs = {groups[each] for each in now.given}
        if groups[slot] in inputs:
            lies = groups[slot], self._trace.layouts[slot]
            if lies in self._lying:
                self.same[slot] = self._lying[lies]
                return
        elif not self._changing & {groups[slot]} and not _is_random(now):
            what = repr((id(now.function), now.args, now.kwargs))
            before, other = self._known.get(what, (index, slot))
            between = range(before, index)
            if other != slot and not any(
                at in between for group in inputs for at in self._written[group]
            ):
                self.same[slot] = other
                return
            self._known[what] = index, slot
            if not inputs and self._fold(now, slot):
                return
        self._keep(index, now)

    def _keep(self, index: int, operation: Operation) -> None:
        self.chosen.append((index, operation))
        for slot in operation.made:
            if slot is not None:
                lies = self._trace.groups[slot], self._trace.layouts[slot]
                self._lying.setdefault(lies, slot)

    def _fold(self, operation: Operation, slot: Slot) -> bool:
        if operation.function._schema.name.startswith(_EMPTY):
            return False
        value = operation.function(*operation.args, **operation.kwargs)
        if value.numel() > _SMALL:
            return False
        self.constants[slot] = value
        self._lying[self._trace.groups[slot], self._trace.layouts[slot]] = slot
        return True

    def _renamed(self, value: Any) -> Any:
        if isinstance(value, Slot):
            return self.same.get(value, value)
        if type(value) in (tuple, list):
            return type(value)(map(self._renamed, value))
        if isinstance(value, dict):
            return {name: self._renamed(each) for name, each in value.items()}
        return value


def _is_random(operation: Operation) -> bool:
    return torch.Tag.nondeterministic_seeded in operation.function.tags


def _needed(
    chosen: Sequence[tuple[int, Operation]],
    groups: Mapping[Slot, int],
    wanted: Sequence[Slot],
) -> list[tuple[int, Operation]]:
    """Return the operations that something depends on, in their order."""
    live = set(wanted)
    memory = {groups[slot] for slot in wanted}
    kept = []
    for index, operation in reversed(chosen):
        written = {groups[slot] for slot in operation.writes}
        changes = bool(written & memory) or any(group < 0 for group in written)
        needed = changes or operation.ends or _is_random(operation)
        if needed or live & {*operation.made}:
            kept.append((index, operation))
            for slot in operation.given:
                live.add(slot)
                memory.add(groups[slot])
    return kept[::-1]
