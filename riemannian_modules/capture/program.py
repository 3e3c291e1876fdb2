"""The operations of a trace as one function without anything between them."""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.capture.trace import Operation, Slot, Trace, slots_in

__all__ = ["Program", "Uncapturable"]

_DETACH = torch.ops.aten.detach.default
_ELSEWHERE = (torch._C._VariableFunctions, torch._C._nn, torch._C._linalg)


class Uncapturable(Exception):
    """Why operations alone would not be the same step."""


class Program:
    """Runs the operations of a trace again.

    What nobody looks at is left out, views are made once, and each tensor is let go
    where it was used last. Whatever the host read is read again and compared, before
    anything from outside is changed: the program ends there if it would decide
    otherwise.

    Args:
        trace: the operations.
        wanted: slots of what to return.
        plain: operations to call through ``torch.ops``, which parses arguments more
            slowly than torch's own bindings.

    Attributes:
        generators: those whose random numbers it draws.
        places: which places it looks into.
        functions: the operations that it calls, in their order.
        source: what it is, in Python.

    Raises:
        Uncapturable: something is read after something was changed.
    """

    def __init__(
        self, trace: Trace, wanted: Sequence[Slot], plain: Collection[Any] = ()
    ) -> None:
        self._plain = plain
        self._names: dict[str, Any] = {"read": Tensor.item}
        self._called: dict[int, str] = {}
        for index, tensor in enumerate(trace.held):
            self._names[f"h{index}"] = tensor
        chosen, self.same = _without_doubles(trace)
        wanted = [self.same.get(slot, slot) for slot in wanted]
        chosen = _needed(trace, chosen, wanted, self.same)
        _require_order(trace, chosen)
        found = [trace.operations[index] for index in chosen]
        self.functions = [each.function for each in found]
        self.generators = trace.generators()
        self._wheres = [trace.wheres[index] for index in chosen]
        used = {self.same.get(s, s) for each in found for s in _given(each)}
        used.update(wanted)
        self.places = sorted(slot.index for slot in used if slot.kind == "p")
        arguments = sorted(slot.index for slot in used if slot.kind == "x")
        lines = ["def run(x, p):"]
        lines += [f"    x{index} = x[{index}]" for index in arguments]
        lines += [f"    p{index} = p[{at}]" for at, index in enumerate(self.places)]
        self.source = "\n".join([*lines, *self._body(found, wanted)]) + "\n"
        exec(compile(self.source, "<captured step>", "exec"), self._names)
        self._run: Callable[..., tuple[Tensor, ...] | int] = self._names["run"]

    def __call__(
        self, arguments: Sequence[Tensor], places: Sequence[Tensor]
    ) -> tuple[Tensor, ...] | str:
        """Run it.

        Args:
            arguments: like those of the trace.
            places: what is in :attr:`places` now.

        Returns:
            The tensors that were wanted; or the line of Python that would decide
            otherwise now, and then nothing was changed.
        """
        with torch.no_grad():
            found = self._run(arguments, places)
        return self._wheres[found] if isinstance(found, int) else found

    def _body(
        self, operations: Sequence[Operation], wanted: Sequence[Slot]
    ) -> Iterator[str]:
        ends = _last_uses(operations, self.same, wanted)
        for index, operation in enumerate(operations):
            for line in self._line(index, operation):
                yield f"    {line}"
            if ends[index]:
                yield "    del " + ", ".join(map(str, ends[index]))
        yield f"    return ({''.join(f'{slot}, ' for slot in wanted)})"

    def _line(self, index: int, operation: Operation) -> Iterator[str]:
        given = [self._text(each) for each in operation.args]
        given += [f"{n}={self._text(each)}" for n, each in operation.kwargs.items()]
        reads = operation.function is torch.ops.aten._local_scalar_dense.default
        call = "read" if reads else self._function(operation.function)
        call = f"{call}({', '.join(given)})"
        if operation.reads:
            if operation.decides is not None:
                call = f"{self._constant(operation.decides)}({call})"
            yield f"if {call} != {self._text(operation.value)}: return {index}"
            return
        targets = [str(slot) if slot else "_" for slot in operation.made]
        if any(operation.made):
            left = ", ".join(targets) + ("," if operation.several else "")
            yield f"{left} = {call}"
        else:
            yield call
        if operation.value is not None:
            assert isinstance(operation.value, tuple)
            for slot, shape in zip(operation.made, operation.value, strict=True):
                if slot is not None:
                    known = self._constant(shape)
                    yield f"if {slot}.shape != {known}: return {index}"

    def _function(self, function: Any) -> str:
        if id(function) not in self._called:
            name = f"f{len(self._called)}_{function.__name__.split('.')[0]}"
            self._names[name] = function if function in self._plain else _binding(function)
            self._called[id(function)] = name
        return self._called[id(function)]

    def _text(self, value: Any) -> str:
        if isinstance(value, Slot):
            return str(self.same.get(value, value))
        if type(value) is list:
            return f"[{', '.join(map(self._text, value))}]"
        if type(value) is tuple:
            return f"({''.join(f'{self._text(each)}, ' for each in value)})"
        plain = type(value) in (bool, int, str, type(None))
        if plain or (type(value) is float and math.isfinite(value)):
            return repr(value)
        return self._constant(value)

    def _constant(self, value: object) -> str:
        name = f"k{len(self._names)}"
        self._names[name] = value
        return name


def _binding(function: Any) -> Any:
    """Return what calls an operation the fastest way."""
    name = function._schema.name.removeprefix("aten::")
    written = {
        argument.name
        for argument in function._schema.arguments
        if argument.kwarg_only and argument.alias_info is not None
    }
    # Several outputs to write to have other names there.
    if function.namespace != "aten" or written - {"out"}:
        return function
    if name.endswith("_") and not name.endswith("__"):
        return getattr(Tensor, name, function)
    for where in (*_ELSEWHERE, Tensor):
        if hasattr(where, name):
            return getattr(where, name)
    return function


def _given(operation: Operation) -> Iterator[Slot]:
    return slots_in((operation.args, operation.kwargs))


def _is_view(operation: Operation) -> bool:
    alias = [argument.alias_info for argument in operation.function._schema.arguments]
    viewed = any(info is not None and not info.is_write for info in alias)
    return viewed and not operation.writes and not operation.several


def _without_doubles(trace: Trace) -> tuple[list[int], dict[Slot, Slot]]:
    """Return which operations are left, and which slots are the same as others."""
    chosen: list[int] = []
    same: dict[Slot, Slot] = {}
    known: dict[str, Slot] = {}
    for index, operation in enumerate(trace.operations):
        slot = operation.made[0] if len(operation.made) == 1 else None
        if slot is None or not _is_view(operation) or operation.reads:
            chosen.append(index)
            continue
        source = operation.args[0]
        if operation.function is _DETACH:
            same[slot] = same.get(source, source)
            continue
        # Views of the same tensor with the same arguments.
        args = [same.get(a, a) if isinstance(a, Slot) else a for a in operation.args]
        what = repr((id(operation.function), args, operation.kwargs))
        if what in known:
            same[slot] = known[what]
        else:
            known[what] = slot
            chosen.append(index)
    return chosen, same


def _needed(
    trace: Trace,
    chosen: Sequence[int],
    wanted: Sequence[Slot],
    same: Mapping[Slot, Slot],
) -> list[int]:
    """Return the operations that something depends on, in their order."""
    groups = trace.groups
    live = set(wanted)
    memory = {groups[slot] for slot in wanted} | {0}
    kept = []
    for index in reversed(chosen):
        operation = trace.operations[index]
        changes = any(groups[slot] in memory for slot in operation.writes)
        seeded = torch.Tag.nondeterministic_seeded in operation.function.tags
        if changes or seeded or operation.ends or live & {*operation.made}:
            kept.append(index)
            for slot in _given(operation):
                live.add(same.get(slot, slot))
                memory.add(groups[slot])
    return kept[::-1]


def _require_order(trace: Trace, chosen: Sequence[int]) -> None:
    changed = None
    for index in chosen:
        operation = trace.operations[index]
        if operation.ends and changed is not None:
            raise Uncapturable(
                f"{trace.wheres[index]} reads a value after {changed} has changed a "
                "tensor that outlives the step; read first, change then"
            )
        if any(trace.groups[slot] == 0 for slot in operation.writes):
            changed = trace.wheres[index]


def _last_uses(
    operations: Sequence[Operation], same: Mapping[Slot, Slot], wanted: Sequence[Slot]
) -> list[list[Slot]]:
    """Return for each operation the tensors that nobody needs after it."""
    ends: list[list[Slot]] = []
    later = set(wanted)
    for operation in reversed(operations):
        used = {same.get(s, s) for s in _given(operation)}
        used |= {slot for slot in operation.made if slot is not None}
        free = {slot for slot in used - later if slot.kind == "v"}
        ends.append(sorted(free))
        later |= used
    return ends[::-1]
