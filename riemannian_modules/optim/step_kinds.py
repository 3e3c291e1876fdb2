"""What tells one kind of captured step from another, and what is known of it."""

from collections.abc import Sequence
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from riemannian_modules.capture import Slot, Trace, UncapturableError
from riemannian_modules.capture.memory import memory_of
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.places import Place
from riemannian_modules.optim.rehearsal import Before
from riemannian_modules.optim.rsgd import RiemannianSGD
from riemannian_modules.optim.step_settings import PLAIN, Key, looks_of
from riemannian_modules.optim.step_ways import Ends

__all__ = [
    "Held",
    "OneStep",
    "before",
    "ends_of",
    "has_hooks",
    "laid",
    "require_capturable",
]


def laid(contents: Sequence[Tensor | None]) -> Key:
    """Return how tensors look, and where in their memory they begin."""
    # An operation may ask for that.
    return tuple(
        () if each is None else (*looks_of(each), each.storage_offset())
        for each in contents
    )


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


def ends_of(
    trace: Trace,
    places: Sequence[Place],
    contents: Sequence[Tensor | None],
    result: Any,
) -> Ends:
    """Return what a step has left, in slots.

    Args:
        trace: the step.
        places: where it may have put tensors.
        contents: what was there before.
        result: what it returned.

    Raises:
        UncapturableError: operations alone would not leave this; says why.
    """
    leaves, spec = tree_flatten(result)
    strange = [each for each in leaves if not isinstance(each, (Tensor, *PLAIN))]
    if strange:
        raise UncapturableError(
            f"the step returns a {type(strange[0]).__name__}; return tensors"
        )
    results = [trace.slot_of(t) if isinstance(t, Tensor) else t for t in leaves]
    filled: dict[int, Slot | None] = {}
    for index, (place, old) in enumerate(zip(places, contents, strict=True)):
        new = place.read()
        if new is None:
            filled[index] = None
        elif new is not old:
            filled[index] = trace.slot_of(new)
    if trace.reason is not None:
        raise UncapturableError(trace.reason)
    return Ends(spec, tuple(results), filled)


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


class Held:
    """What programs hold of a model beside its parameters.

    Args:
        metric: of the model.

    Attributes:
        modules: its modules.
        buffers: their buffers.
    """

    def __init__(self, metric: ModelMetric) -> None:
        self._metric = metric
        self._tree: object = None
        self.modules: list[nn.Module] = []
        self.buffers: list[Tensor | None] = []

    def changed(self) -> bool:
        """Whether there are others than the last time."""
        tree, before = self._metric.parameters.tree, self.buffers
        same = tree is self._tree
        if not same:
            self._tree, self.modules = tree, list(self._metric.model.modules())
        self.buffers = [b for m in self.modules for b in m._buffers.values()]
        same = same and len(before) == len(self.buffers)
        return not (same and all(map(is_, before, self.buffers)))


class OneStep:
    """Looks at what a step does beside its operations.

    Args:
        optimizer: whose step it is, before it is taken.
    """

    def __init__(self, optimizer: RiemannianSGD) -> None:
        metric = optimizer.metric
        self._optimizer, self._waiting = optimizer, bool(metric.waiting)
        self._counts = metric.version + 1, metric.passes + 1

    def require(
        self, trace: Trace, tensors: Sequence[Tensor], others: Sequence[Tensor]
    ) -> None:
        """Refuse a step that left something in Python that a program would not.

        Args:
            trace: the step.
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
        if trace.unread(tensors):
            raise UncapturableError(
                "no operation reads an integer argument: lengths are read unseen; if "
                "it is not needed, leave it out"
            )
        own = {memory_of(other) for other in others if other.layout is torch.strided}
        if any(t.layout is torch.strided and memory_of(t) in own for t in tensors):
            raise UncapturableError(
                "an argument lies in the memory of what is trained; pass a clone()"
            )
