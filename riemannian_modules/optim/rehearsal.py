"""A program is run once beside the usual step, and must leave the same bits."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from riemannian_modules.capture import (
    Missed,
    OtherWayError,
    Program,
    Slot,
    Trace,
    UncapturableError,
)
from riemannian_modules.capture.operation import same

__all__ = ["Before", "rehearsed"]

Contents = Sequence[Tensor | None]
Call = tuple[Any, tuple[Any, ...], dict[str, Any]]

# Arguments that torch's bindings write out, or leave out where they are the default.
_MAKING = {"dtype", "layout", "device", "pin_memory", "memory_format"}


class Before:
    """What a step is about to change.

    Args:
        changed: the tensors that it writes.
        generators: those that it draws from.
    """

    def __init__(
        self, changed: Sequence[Tensor], generators: Sequence[torch.Generator]
    ) -> None:
        self._tensors = changed
        self._values = [tensor.detach().clone() for tensor in changed]
        self._generators = generators
        self._states = [generator.get_state() for generator in generators]

    @property
    def values(self) -> list[Tensor]:
        """The values of the tensors."""
        return self._values

    def ends_like(self, other: "Before") -> bool:
        """Whether the same numbers were drawn.

        Args:
            other: at another moment.
        """
        return all(map(torch.equal, self._states, other._states))

    def restore(self) -> None:
        """Put everything back."""
        with torch.no_grad():
            for tensor, value in zip(self._tensors, self._values, strict=True):
                tensor.copy_(value)
        for generator, state in zip(self._generators, self._states, strict=True):
            generator.set_state(state)

    def now(self) -> "Before":
        """Return the same at this moment."""
        return Before(self._tensors, self._generators)

    @contextmanager
    def again(self) -> Iterator[None]:
        """Be back there in this scope."""
        now = self.now()
        self.restore()
        try:
            yield
        finally:
            now.restore()


def rehearsed(
    trace: Trace,
    wanted: Sequence[Slot],
    before: Before,
    arguments: Sequence[Tensor],
    places: Contents,
    results: Sequence[Tensor],
) -> Program:
    """Return a program of a step that was just taken.

    Args:
        trace: the step.
        wanted: slots of its results.
        before: what it changed, as it was.
        arguments: what it was called with.
        places: what was in the places.
        results: what it left, for each of the slots.

    Returns:
        The program, which was run once. Nothing is changed.

    Raises:
        UncapturableError: it does something else.
        OtherWayError: the step went another way than the trace.
    """
    after, plain = before.now(), set[Any]()
    program = Program(trace, wanted)
    given = [places[index] for index in program.places]
    if any(tensor is None for tensor in given):
        raise UncapturableError("the step looks into a place that was empty before")
    known = [tensor for tensor in given if tensor is not None]
    while True:
        with before.again():
            calls, found = _run(program, arguments, known)
            ends = before.now()
        wrong = _bound_wrongly(program, calls, failed=isinstance(found, Exception))
        if wrong is not None and wrong not in plain:
            plain.add(wrong)
            program.call_plainly(wrong)
        elif isinstance(found, Exception):
            raise UncapturableError(f"an operation fails outside of the step: {found}")
        elif isinstance(found, Missed):
            raise OtherWayError(f"{found.where} decides otherwise when it is run again")
        elif not ends.ends_like(after):
            raise UncapturableError("the step sets the state of a random generator")
        elif not all(map(_equal, [*found, *ends.values], [*results, *after.values])):
            raise UncapturableError("the operations alone do not give the same numbers")
        else:
            return program


def _run(
    program: Program, arguments: Sequence[Tensor], places: Sequence[Tensor]
) -> tuple[list[Call], tuple[Tensor, ...] | Missed | Exception]:
    """Run a program, and return the operations that were called, and what it left."""
    calls = _Calls()
    found: tuple[Tensor, ...] | Missed | Exception
    with calls:
        try:
            found = program.run(arguments, places)
        except Exception as error:
            found = error
    return calls.made, found


class _Calls(TorchDispatchMode):
    """Lists the operations that are called; a trace would refuse to go on at times."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.made: list[Call] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Else every operation goes through the compiler, whose import takes seconds.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = {} if kwargs is None else kwargs
        if func.namespace != "profiler":
            self.made.append((func, args, kwargs))
        return func(*args, **kwargs)


def _bound_wrongly(program: Program, calls: Sequence[Call], *, failed: bool) -> Any:
    """Return the first operation in whose place torch's binding called another.

    Or the same with other defaults, as of ``torch._C._nn.mse_loss``.
    """
    for own, (function, *given) in zip(program.operations, calls, strict=False):
        known = _settings(own.args), _settings(own.kwargs)
        if own.function is not function or not same(known, _settings(tuple(given))):
            return own.function
    if failed and len(calls) < len(program.operations):
        return program.operations[len(calls)].function
    return None


def _settings(value: Any) -> Any:
    """Return nested arguments without tensors, and without what makes new ones."""
    if isinstance(value, Tensor | Slot):
        return None
    if isinstance(value, tuple | list):
        return tuple(map(_settings, value))
    if isinstance(value, dict):
        return {n: _settings(each) for n, each in value.items() if n not in _MAKING}
    return value


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.is_meta or b.is_meta:
        return a.shape == b.shape and a.dtype == b.dtype
    same = a.shape == b.shape and a.dtype == b.dtype
    if a.device.type == "cpu":
        nan = a.is_floating_point() and same
        b = b.detach()
        return same and (
            torch.equal(a, b)
            or (nan and torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True))
        )
    # Sums of unordered parts differ from run to run there.
    return same and torch.allclose(a, b.detach(), rtol=1e-3, atol=1e-6)
