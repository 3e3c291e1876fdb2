"""The operations of a trace as one function without anything between them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.capture.operation import Operation, Slot, same
from riemannian_modules.capture.simplify import Simple, simplified
from riemannian_modules.capture.trace import Trace

__all__ = ["Missed", "OtherWayError", "Program", "UncapturableError"]

_FILE = "<captured step>"
_ELSEWHERE = (torch._C._VariableFunctions, torch._C._nn)
# Operations in whose place torch's own bindings were seen to call another.
_PLAIN: set[Any] = set()


class UncapturableError(Exception):
    """Why operations alone would not be the same step."""


class OtherWayError(UncapturableError):
    """A step went another way than the one that was taken down."""


@dataclass(frozen=True)
class Missed:
    """How a program ended early.

    Attributes:
        where: the line of Python that would decide otherwise now, or what failed.
        part: how much of the program had been run, in (0, 1].
        way: what was read, by the operations of the trace: all that fitted, and at
            last what did not.
    """

    where: str
    part: float = 0.0
    way: Mapping[int, object] = field(default_factory=dict)


class Program:
    """Runs the operations of a trace again.

    What nobody looks at is left out, views are made once, and each tensor is let go
    where it was used last. Whatever the host read is read again and compared, before
    anything from outside is changed: the program ends there if it would decide
    otherwise.

    Args:
        trace: the operations.
        wanted: slots of what to return.

    Attributes:
        generators: those whose random numbers it draws.
        places: which places it looks into.
        operations: what it calls, in this order.
        source: what it is, in Python.
        decided: what is read, by the operations of the trace.

    Raises:
        UncapturableError: something is read after something was changed.
    """

    def __init__(self, trace: Trace, wanted: Sequence[Slot]) -> None:
        self._trace, self._simple = trace, simplified(trace, wanted)
        simple = self._simple
        _require_order(trace, simple)
        self.operations = simple.operations
        self.generators = trace.generators()
        self._wheres, self._indices = simple.wheres, simple.indices
        self.decided = {
            index: operation.value
            for index, operation in zip(simple.indices, simple.operations, strict=True)
            if operation.ends
        }
        used = {slot for each in simple.operations for slot in each.given}
        used.update(simple.wanted)
        self.places = sorted(slot.number for slot in used if slot.kind == "p")
        self._arguments = sorted(slot.number for slot in used if slot.kind == "x")
        self._write()

    def call_plainly(self, function: Any) -> None:
        """Call an operation through ``torch.ops`` from now on, in all programs.

        That parses arguments more slowly than torch's own bindings, which do not all
        call the operation of their name.

        Args:
            function: the operation.
        """
        _PLAIN.add(function)
        self._write()

    def _write(self) -> None:
        """Write the source, and compile it."""
        trace, simple, arguments = self._trace, self._simple, self._arguments
        self._names: dict[str, Any] = {"read": Tensor.item, "miss": _Miss}
        self._called: dict[int, str] = {}
        for index, tensor in enumerate(trace.held):
            self._names[f"h{index}"] = tensor
        for slot, constant in simple.constants.items():
            self._names[str(slot)] = constant
        ends, lines = _last_uses(simple), ["def run(x, p):"]
        lines += [f"    x{index} = x[{index}]" for index in arguments]
        lines += [f"    p{index} = p[{at}]" for at, index in enumerate(self.places)]
        self._safe: int | None = None
        for index, operation in enumerate(simple.operations):
            if self._safe is None and _changes(trace, operation):
                self._safe = len(lines)
            lines += [f"    {line}" for line in self._line(index, operation)]
            lines += [f"    del {', '.join(map(str, ends[index]))}"] * bool(ends[index])
        lines.append(f"    return ({''.join(f'{slot}, ' for slot in simple.wanted)})")
        self.source = "\n".join(lines) + "\n"
        exec(compile(self.source, _FILE, "exec"), self._names)
        self._run: Callable[..., tuple[Tensor, ...] | _Miss] = self._names["run"]

    def may_go(self, way: Mapping[int, object]) -> bool:
        """Whether it decides like a step of which the first decisions are known.

        Args:
            way: from a program of the same step that ended early.
        """
        own = self.decided
        return all(same(own[index], way[index]) for index in way if index in own)

    def __call__(
        self, arguments: Sequence[Tensor], places: Sequence[Tensor]
    ) -> tuple[Tensor, ...] | Missed:
        """Run it.

        Args:
            arguments: like those of the trace.
            places: what is in :attr:`places` now.

        Returns:
            The tensors that were wanted; or where it would decide otherwise now, or
            that an operation fails, and then nothing was changed.
        """
        try:
            return self.run(arguments, places)
        except Exception as error:
            trace = error.__traceback__
            while trace is not None and trace.tb_frame.f_code.co_filename != _FILE:
                trace = trace.tb_next
            changed = self._safe is not None and trace is not None
            if changed and trace is not None and trace.tb_lineno > (self._safe or 0):
                raise
            return Missed(f"an operation fails ({error})", 1.0)

    def run(
        self, arguments: Sequence[Tensor], places: Sequence[Tensor]
    ) -> tuple[Tensor, ...] | Missed:
        """Run it, and let errors of operations through."""
        with torch.no_grad():
            found = self._run(arguments, places)
        if not isinstance(found, _Miss):
            return found
        at = self._indices[found.index]
        way = {index: value for index, value in self.decided.items() if index < at}
        part = (found.index + 1) / len(self.operations)
        return Missed(self._wheres[found.index], part, {**way, at: found.value})

    def _line(self, index: int, operation: Operation) -> Iterator[str]:
        given = [self._text(each) for each in operation.args]
        given += [f"{n}={self._text(each)}" for n, each in operation.kwargs.items()]
        reads = operation.function is torch.ops.aten._local_scalar_dense.default
        call = "read" if reads else self._function(operation.function)
        call = f"{call}({', '.join(given)})"
        if operation.reads:
            if operation.decides is not None:
                call = f"{self._constant(operation.decides)}({call})"
            yield f"r = {call}"
            yield f"if r != {self._text(operation.value)}: return miss({index}, r)"
            return
        targets = [str(slot) if slot else "_" for slot in operation.made]
        if any(operation.made):
            left = ", ".join(targets) + ("," if operation.several else "")
            yield f"{left} = {call}"
        else:
            yield call
        if operation.value is not None:
            assert isinstance(operation.value, tuple)
            shapes = [f"{slot}.shape" if slot else "None" for slot in operation.made]
            yield f"r = ({', '.join(shapes)},)"
            known = self._constant(operation.value)
            yield f"if r != {known}: return miss({index}, r)"

    def _function(self, function: Any) -> str:
        if id(function) not in self._called:
            name = f"f{len(self._called)}_{function.__name__.split('.')[0]}"
            self._names[name] = function if function in _PLAIN else _binding(function)
            self._called[id(function)] = name
        return self._called[id(function)]

    def _text(self, value: Any) -> str:
        if isinstance(value, Slot):
            return str(value)
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


@dataclass
class _Miss:
    index: int
    value: object


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
    for where in (*_ELSEWHERE, torch._C.TensorBase):
        if hasattr(where, name):
            return getattr(where, name)
    return function


def _changes(trace: Trace, operation: Operation) -> bool:
    """Whether an operation writes to memory from outside."""
    return any(trace.groups[slot] < 0 for slot in operation.writes)


def _require_order(trace: Trace, simple: Simple) -> None:
    changed = None
    for operation, where in zip(simple.operations, simple.wheres, strict=True):
        if operation.ends and changed is not None:
            raise UncapturableError(
                f"{where} reads a value after {changed} has changed a tensor that "
                "outlives the step; read first, change then"
            )
        if _changes(trace, operation):
            changed = where


def _last_uses(simple: Simple) -> list[list[Slot]]:
    """Return for each operation the tensors that nobody needs after it."""
    ends: list[list[Slot]] = []
    later = {*simple.wanted, *simple.constants}
    for operation in reversed(simple.operations):
        used = {*operation.given, *(s for s in operation.made if s is not None)}
        ends.append(sorted(slot for slot in used - later if slot.kind == "v"))
        later |= used
    return ends[::-1]
