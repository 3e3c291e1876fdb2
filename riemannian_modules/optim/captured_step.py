"""A training step whose operations are run again without the Python between them."""

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from riemannian_modules.capture import (
    Missed,
    OtherWayError,
    Slot,
    Trace,
    UncapturableError,
)
from riemannian_modules.errors import NotCapturedWarning, RiemannianModulesError
from riemannian_modules.optim.places import Place, gradient_places, memory_places
from riemannian_modules.optim.rehearsal import rehearsed
from riemannian_modules.optim.rsgd import RiemannianSGD
from riemannian_modules.optim.step_kinds import (
    Held,
    OneStep,
    before,
    ends_of,
    has_hooks,
    laid,
    require_capturable,
)
from riemannian_modules.optim.step_settings import (
    PLAIN,
    Key,
    copied,
    key_of,
    settings_of,
    written_back,
)
from riemannian_modules.optim.step_ways import Kind, Known
from riemannian_modules.precision import without_autocast

__all__ = ["CapturedStep"]

# Steps that find out about the graph, before one is worth looking at.
_FIRST = 3
# So often a kind of step is looked at for its first program.
_LOOKS = 4
_KINDS = 32


class CapturedStep:
    """A training step that is run as the list of its operations of torch.

    The first steps of a kind are taken as usual; two of them are taken down and
    compared. If they are the same operations, wired in the same way, these are run once
    beside a third, and must leave the same bits. Later steps run them and nothing else:
    no hooks, no autograd, no walk through graphs, and of the checks those that
    something depends on. It pays where a step's time is
    spent in Python: for small models, and on GPUs. See :doc:`/captured`.

    Other shapes, data types or modes are other kinds of steps, and so are other
    settings of the optimizer and other masses. Where the step would decide otherwise
    than it did (a matrix asks for float64, something is not finite), it is taken as
    usual, with its own errors, and nothing was changed before; ways that it goes often
    have a program each, up to four. What is promised is that
    the step is a function of its arguments, the parameters and the optimizer's state:
    what Python makes of anything else (a global variable, a counter, a hook that
    prints) stays as it was.

    Args:
        optimizer: of a metric with ``static_graph=True``, or of a FunctionalMetric.
        step: ``step(*args)`` runs the model inside ``metric.record()``, calls
            ``metric.backward`` and ``optimizer.step``, and returns tensors, such as the
            loss. Data comes in as arguments.

    Attributes:
        taken: how many steps there were.
        replayed: how many of them were replayed.
        reason: why some kind of step is not captured; None: all is well so far.

    Cost: of a replay, its operations and some microseconds each; it leaves no report
    and no blocks. The first six steps of a kind are usual ones, three of them at four
    to ten times the cost, the last with a copy of the parameters.

    Raises:
        TypeError: another optimizer, or no function.
        ValueError: a metric that promises nothing, that shares its batch with other
            processes, or that makes rows of those of several passes.

    Warns:
        NotCapturedWarning: steps cannot be captured, and are taken as usual; says why.

    >>> import torch
    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(4, 3)
    >>> metric = rm.LayerwiseMetric(
    ...     model, rm.output.Categorical(), mass=0.1, static_graph=True
    ... )
    >>> optimizer = rm.optim.RiemannianSGD(metric)
    >>> def step(x, y):
    ...     with metric.record():
    ...         logits = model(x)
    ...     loss = torch.nn.functional.cross_entropy(logits, y)
    ...     metric.backward(loss, logits)
    ...     optimizer.step()
    ...     return loss
    >>> step = CapturedStep(optimizer, step)
    >>> x, y = torch.randn(8, 4), torch.arange(8) % 3
    >>> losses = [step(x, y) for _ in range(20)]
    >>> bool(losses[-1] < losses[0]), step
    (True, CapturedStep(step, 13 of 20 replayed))
    """

    def __init__(self, optimizer: RiemannianSGD, step: Callable[..., Any]) -> None:
        if not isinstance(optimizer, RiemannianSGD):
            raise TypeError(
                f"CapturedStep(optimizer, step) got a {type(optimizer).__name__} for "
                "the optimizer; it takes a RiemannianSGD: line searches and trust "
                "regions decide in Python what to do next"
            )
        if not callable(step):
            raise TypeError(
                f"step={step!r}; pass a function of the data that runs the model, "
                "metric.backward and optimizer.step"
            )
        self.taken = self.replayed = 0
        self._optimizer, self._metric = optimizer, optimizer.metric
        self._step = step
        self._kinds: dict[Key, Kind] = {}
        self._settings: Key = ()
        self._memory: list[Place] = []
        self._places: list[Place] = []
        self.reason: str | None = None
        self._held, self._models = Held(self._metric), 0
        self._device = next(iter(self._metric.parameters)).tensor.device.type
        require_capturable(optimizer)

    def __repr__(self) -> str:
        name = getattr(self._step, "__name__", type(self._step).__name__)
        return f"CapturedStep({name}, {self.replayed} of {self.taken} replayed)"

    def ordinary(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step as usual, which leaves a report, and blocks in the metric.

        Args:
            *args: of the step.
            **kwargs: of the step.

        Returns:
            What the step returns.
        """
        found = self._step(*args, **kwargs)
        self.taken += 1
        return found

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Take one step: replay it where it is known.

        Args:
            *args: of the step, nested as torch.utils.data collates them; what is no
                tensor is part of what tells one kind of step from another.
            **kwargs: the same.

        Returns:
            What the step returns; without a graph where it was replayed.
        """
        try:
            # As metric.record() does; where it fails, that will tell.
            self._metric.parameters.verify()
        except RiemannianModulesError:
            return self.ordinary(*args, **kwargs)
        if has_hooks(self._optimizer):
            return self.ordinary(*args, **kwargs)
        flat, spec = tree_flatten((args, kwargs))
        tensors = [each for each in flat if isinstance(each, Tensor)]
        kind = self._kind_of(flat, spec)
        if kind is None or kind.hopeless:
            return self.ordinary(*args, **kwargs)
        if kind.known:
            found = self._replayed(kind, tensors)
            if found is not None:
                return found[0]
            if not kind.seeks:
                return self.ordinary(*args, **kwargs)
        kind.steps += 1
        if kind.steps <= _FIRST:
            return self.ordinary(*args, **kwargs)
        look = self._rehearse if kind.agreed else self._look
        return look(kind, tensors, args, kwargs)

    def _kind_of(self, flat: Sequence[Any], spec: Any) -> Kind | None:
        """Return what is known of steps like this one; None: nothing ever will be."""
        self._renew()
        if self._models > _KINDS:
            self._warn(
                "the modules of the model, or their buffers, are others all the time; "
                "write to buffers in place: buffer.copy_(...)"
            )
            return None
        strange = [each for each in flat if not isinstance(each, (Tensor, *PLAIN))]
        if strange:
            self._warn(
                f"an argument is a {type(strange[0]).__name__}, which may hold "
                "anything: pass tensors in tuples, lists or dictionaries"
            )
            return None
        key = (
            *key_of(flat, spec, self._device),
            tuple([place.read() is None for place in self._memory]),
            tuple([module.training for module in self._held.modules]),
            self._settings,
        )
        found = self._kinds.get(key)
        if found is None:
            if len(self._kinds) == _KINDS:
                self._warn(
                    f"there are {_KINDS} kinds of steps already: shapes, arguments "
                    "that are no tensors, settings of the optimizer or masses change "
                    "all the time. Make tensors of numbers that change, also of a "
                    "learning rate that a scheduler changes, lr=torch.tensor(0.1)"
                )
                return None
            found = self._kinds[key] = Kind()
        return found

    def _renew(self) -> None:
        """Find all anew where the optimizer, the metric or the model was changed."""
        settings = settings_of(self._optimizer)
        if settings != self._settings:
            self._settings = settings
            self._memory = memory_places(self._optimizer)
            self._places = [*self._memory, *gradient_places(self._optimizer)]
        if self._held.changed():
            self._models += 1
            self._kinds.clear()

    def forget(self) -> None:
        """Forget all programs, where something has changed that no key tells.

        Such as the ``p`` of a dropout layer, or a number that the step takes from
        somewhere else.
        """
        self._kinds.clear()
        self.reason, self._models = None, 0

    def _look(
        self, kind: Kind, tensors: Sequence[Tensor], args: Any, kwargs: Any
    ) -> Any:
        """Take a step as usual, and take it down."""
        contents, given = [place.read() for place in self._places], tensors
        if kind.last is not None:
            # What the step knows from elsewhere, too, then shows: it is another one.
            tensors, args, kwargs = copied(tensors, args, kwargs)
        trace, one = Trace(tensors, contents), OneStep(self._optimizer)
        last, kind.last, kind.looks = kind.last, None, kind.looks + 1
        try:
            with trace.listening():
                result = self.ordinary(*args, **kwargs)
        finally:
            written_back(given, tensors)
        try:
            ends = ends_of(trace, self._places, contents, result)
            own = [*self._metric.model.parameters(), *self._held.buffers, *contents]
            one.require(trace, tensors, [each for each in own if each is not None])
        except UncapturableError as error:
            self._give_up(kind, str(error))
            return result
        differs = None if last is None else last[0].differs(trace)
        if differs is None and last is not None and last[1] != ends:
            differs = "the step returns or keeps other things in each step"
        if differs is not None and kind.looks >= _LOOKS:
            self._give_up(kind, differs)
            return result
        kind.last, kind.agreed = (trace, ends), last is not None and differs is None
        return result

    def _rehearse(
        self, kind: Kind, tensors: Sequence[Tensor], args: Any, kwargs: Any
    ) -> Any:
        """Take a step as usual, unseen, and run the program beside it."""
        assert kind.last is not None
        (trace, ends), kind.last, kind.agreed = kind.last, None, False
        contents = [place.read() for place in self._places]
        start = before(trace, tensors, contents)
        result = self.ordinary(*args, **kwargs)
        leaves = [t for t in tree_flatten(result)[0] if isinstance(t, Tensor)]
        filled = [self._places[at].read() for at, to in ends.places.items() if to]
        left = [*leaves, *(each for each in filled if each is not None)]
        try:
            with without_autocast(self._device):
                program = rehearsed(trace, ends.wanted, start, tensors, contents, left)
        except OtherWayError as error:
            kind.looks += 1
            kind.last, kind.agreed = (trace, ends), True
            if kind.looks >= 2 * _LOOKS:
                self._give_up(kind, str(error))
            return result
        except UncapturableError as error:
            self._give_up(kind, str(error))
            return result
        places = [contents[index] for index in program.places]
        kind.learns(Known(program, ends, laid(places)))
        return result

    def _replayed(self, kind: Kind, tensors: Sequence[Tensor]) -> tuple[Any] | None:
        """Run a program that fits; None where none does, and nothing was changed."""
        found = kind.through(lambda known: self._replay(known, tensors))
        if not isinstance(found, Missed):
            return found
        if kind.wasteful:
            why = f"{found.where} decides otherwise again and again"
            self._give_up(kind, why, all=True)
        return None

    def _replay(self, known: Known, tensors: Sequence[Tensor]) -> tuple[Any] | Missed:
        """Run a program; where it decides otherwise, then nothing was changed."""
        program, ends = known.program, known.ends
        contents = [self._places[index].read() for index in program.places]
        states = [generator.get_state() for generator in program.generators]
        found: tuple[Tensor, ...] | Missed = Missed("a tensor is of another kind")
        if laid(contents) == known.contents:
            with without_autocast(self._device):
                found = program(tensors, [c for c in contents if c is not None])
        if isinstance(found, Missed):
            for generator, state in zip(program.generators, states, strict=True):
                generator.set_state(state)
            return found
        values = iter(found)
        leaves = [next(values) if isinstance(e, Slot) else e for e in ends.results]
        for index, slot in ends.places.items():
            self._places[index].write(None if slot is None else next(values))
        self._optimizer.replayed()
        for declared in self._metric.parameters:
            declared.verified = declared.tensor._version
        self.taken, self.replayed = self.taken + 1, self.replayed + 1
        return (tree_unflatten(leaves, ends.spec),)

    def _give_up(self, kind: Kind, why: str, *, all: bool = False) -> None:
        if kind.stop(all=all):
            self._warn(why)

    def _warn(self, why: str) -> None:
        if why != self.reason:
            self.reason = why
            warnings.warn(
                f"steps are taken as usual: {why}", NotCapturedWarning, stacklevel=4
            )
