"""What tells one kind of captured step from another, and what is known of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.capture import Program, Slot, Trace, UncapturableError
from riemannian_modules.capture.memory import memory_of
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.mass import Mass
from riemannian_modules.optim.rehearsal import Before
from riemannian_modules.optim.rsgd import RiemannianSGD
from riemannian_modules.output import OutputMetric

__all__ = [
    "Ends",
    "Key",
    "Kind",
    "OneStep",
    "before",
    "exactly",
    "has_hooks",
    "looks_of",
    "require_capturable",
    "settings_of",
    "shared_memory",
]

_PLAIN = bool | int | float | str | None

Key = tuple[object, ...]


@dataclass(frozen=True)
class Ends:
    """What a step returns, and what it leaves in places.

    Attributes:
        spec: how its results are nested.
        results: their leaves, slots in the place of tensors.
        places: by index of a place, the slot of what it puts there; or None.
    """

    spec: Any
    results: tuple[object, ...]
    places: dict[int, Slot | None]

    @property
    def wanted(self) -> list[Slot]:
        """The slots among them."""
        every = [*self.results, *self.places.values()]
        return [each for each in every if isinstance(each, Slot)]


@dataclass(eq=False)
class Kind:
    """What is known of steps of one kind.

    Attributes:
        steps: how many were taken as usual.
        looks: how many of these were taken down.
        last: the last of them that was, and what it left.
        program: what runs in their place.
        ends: what to make of its results.
        contents: what the contents of the places looked like that it reads.
        misses: how often in a row it decided otherwise.
        hopeless: whether there will be none.
    """

    steps: int = 0
    looks: int = 0
    last: tuple[Trace, Ends] | None = None
    program: Program | None = None
    ends: Ends | None = None
    contents: Key = ()
    misses: int = 0
    hopeless: bool = False


def settings_of(optimizer: RiemannianSGD) -> Key:
    """Return all that steps depend on and that is no tensor.

    Args:
        optimizer: whose steps they are.
    """
    metric = optimizer.metric
    options = [
        exactly(value) if isinstance(value, _PLAIN) else type(value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    return (
        tuple(options),
        tuple([_weighs(declared.mass) for declared in metric.parameters]),
        tuple([declared.tensor.dtype for declared in metric.parameters]),
        next(iter(metric.parameters)).tensor.device,
        _Same(optimizer.state),
        metric.gradients.fills,
        metric.is_frozen,
        metric.reduction,
        metric.precision,
        metric.solver,
        metric.max_memory,
        _Same(optimizer.retraction),
        _Same(metric.output),
        # Probes, for one: a schedule changes them.
        _plain(metric.output),
    )


def _weighs(mass: Mass) -> Key:
    if mass.is_scalar:
        # A schedule makes another one of the same number.
        return (exactly(mass.scalar),)
    return (_Same(mass),)


def _plain(output: object) -> Key:
    if isinstance(output, _PLAIN):
        return (exactly(output),)
    if isinstance(output, Tensor | torch.Generator):
        return (_Same(output),)
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, OutputMetric):
        output = list(vars(output).values())
    if not isinstance(output, list | tuple):
        return ()
    return tuple([part for each in output for part in _plain(each)])


def exactly(value: object) -> object:
    """Return what only equals itself, where Python's 1, 1.0 and True are equal.

    Args:
        value: hashable.
    """
    if isinstance(value, float):
        return float, value.hex()
    return type(value), repr(value) if isinstance(value, complex) else value


def looks_of(tensor: Tensor) -> Key:
    """Return all of a tensor that operations depend on, but its numbers and its place.

    Args:
        tensor: any.
    """
    if tensor.layout is not torch.strided:
        return type(tensor), tensor.layout
    lies = tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    kind = type(tensor), tensor.dtype, tensor.device, tensor.requires_grad
    return *lies, *kind


def shared_memory(tensors: Sequence[Tensor]) -> Key:
    """Return which tensors lie in the same memory, and how far from each other.

    Args:
        tensors: any.
    """
    if len(tensors) < 2 or any(t.layout is not torch.strided for t in tensors):
        return ()
    storages = [memory_of(tensor) for tensor in tensors]
    first = [storages.index(storage) for storage in storages]
    found = []
    for at, tensor in zip(first, tensors, strict=True):
        other = tensors[at]
        apart = tensor.storage_offset() - other.storage_offset()
        found.append((at, apart, tensor is other))
    return tuple(found)


class _Same:
    """Something that is equal to itself alone, and lives as long as this does."""

    __slots__ = ("_it",)

    def __init__(self, it: object) -> None:
        self._it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._it is other._it

    def __hash__(self) -> int:
        return id(self._it)


def before(
    trace: Trace, tensors: Sequence[Tensor], contents: Sequence[Tensor | None]
) -> Before:
    """Return what a step like another one is about to change.

    Args:
        trace: the other one.
        tensors: the arguments.
        contents: what is in the places.
    """
    outside: dict[str, Sequence[Tensor | None]] = {
        "h": trace.held,
        "x": tensors,
        "p": contents,
    }
    changed = [outside[slot.kind][slot.number] for slot in sorted(trace.changed)]
    return Before([t for t in changed if t is not None], trace.generators())


def require_capturable(optimizer: RiemannianSGD) -> None:
    """Refuse what no program can do.

    Args:
        optimizer: whose steps are to be captured.

    Raises:
        ValueError: says why.
    """
    metric = optimizer.metric
    if metric.exchange is not None:
        raise ValueError(
            "the metric shares its batch with other processes, and what they send is "
            "not captured; take the step as usual"
        )
    if isinstance(metric, LayerwiseMetric) and not metric.static_graph:
        raise ValueError(
            "a captured step looks at the graph no more; promise that it stays as it "
            "is: LayerwiseMetric(..., static_graph=True)"
        )
    if not metric.fewer.is_plain:
        raise ValueError(
            "rows=, history= and refresh= make rows of those of several passes, which "
            "a captured step does not; leave them out"
        )
    if has_hooks(optimizer):
        raise ValueError("the optimizer has hooks, which a captured step does not call")


def has_hooks(optimizer: RiemannianSGD) -> bool:
    """Whether a step of the optimizer calls functions of its user.

    Args:
        optimizer: the optimizer.
    """
    return bool(
        optimizer._optimizer_step_pre_hooks or optimizer._optimizer_step_post_hooks
    )


class OneStep:
    """Looks at what a step does beside its operations.

    Args:
        optimizer: whose step it is, before it is taken.
    """

    def __init__(self, optimizer: RiemannianSGD) -> None:
        metric = optimizer.metric
        self._optimizer, self._waiting = optimizer, bool(metric.waiting)
        self._counts = metric.version + 1, metric.passes + 1

    def require(self, tensors: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Refuse a step that left something in Python that a program would not.

        Args:
            tensors: the arguments.
            others: what they must not be part of.

        Raises:
            UncapturableError: says what.
        """
        metric = self._optimizer.metric
        counts = metric.version, metric.passes
        stepped = self._optimizer._stepped == metric.passes
        if counts != self._counts or not stepped or metric.waiting or self._waiting:
            raise UncapturableError(
                "the step does not call metric.backward and then optimizer.step for "
                "one batch, once each"
            )
        if isinstance(metric, LayerwiseMetric) and metric.foreign:
            raise UncapturableError(
                "the loss depends on parameters outside the metric's model, and "
                "their .grad is filled"
            )
        own = {memory_of(other) for other in others if other.layout is torch.strided}
        if any(t.layout is torch.strided and memory_of(t) in own for t in tensors):
            raise UncapturableError(
                "an argument lies in the memory of what is trained; pass a clone()"
            )
