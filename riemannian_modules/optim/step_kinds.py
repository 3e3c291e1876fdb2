"""What tells one kind of captured step from another, and what is known of it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from riemannian_modules.capture import Program, Slot, Trace
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.optim.rehearsal import Before
from riemannian_modules.optim.rsgd import RiemannianSGD
from riemannian_modules.output import OutputMetric

__all__ = ["Ends", "Key", "Kind", "before", "require_capturable", "settings_of"]

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
        misses: how often in a row it decided otherwise.
        hopeless: whether there will be none.
    """

    steps: int = 0
    looks: int = 0
    last: tuple[Trace, Ends] | None = None
    program: Program | None = None
    ends: Ends | None = None
    misses: int = 0
    hopeless: bool = False


def settings_of(optimizer: RiemannianSGD) -> Key:
    """Return all that steps depend on and that is no tensor.

    Args:
        optimizer: whose steps they are.
    """
    metric = optimizer.metric
    options = [
        value if isinstance(value, _PLAIN) else type(value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    return (
        tuple(options),
        tuple([_Same(declared.mass) for declared in metric.parameters]),
        tuple([declared.tensor.dtype for declared in metric.parameters]),
        next(iter(metric.parameters)).tensor.device,
        _Same(optimizer.state),
        metric.gradients.fills,
        metric.is_frozen,
        _Same(metric.output),
        # Probes, for one: a schedule changes them.
        _plain(metric.output),
    )


def _plain(output: object) -> Key:
    if isinstance(output, _PLAIN):
        return (output,)
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, OutputMetric):
        output = list(vars(output).values())
    if not isinstance(output, list | tuple):
        return ()
    return tuple([part for each in output for part in _plain(each)])


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
    hooks = optimizer._optimizer_step_pre_hooks, optimizer._optimizer_step_post_hooks
    if any(hooks):
        raise ValueError("the optimizer has hooks, which a captured step does not call")
