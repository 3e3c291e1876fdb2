"""What a recorded forward pass remembers: every use of every watched module."""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge
from torch.utils.hooks import RemovableHandle

from riemannian_modules.errors import LinearizationError, NonFiniteError
from riemannian_modules.finite import looks_finite
from riemannian_modules.nested import map_tensors, own_memory, seen, tensors_in
from riemannian_modules.place import Finder, Place
from riemannian_modules.untraced import disabled, outside

__all__ = ["Tape", "Use", "Watched"]


_PLAIN = (bool, int, float, str, tuple, type(None))
_CONTAINERS = (dict, OrderedDict, set)


def _settings(attributes: dict[str, object]) -> list[tuple[str, object]]:
    """Return the plain attributes of a module, such as a stride or a padding."""
    return [
        item
        for item in attributes.items()
        # Most are the containers that every module has: told apart the fast way.
        if type(item[1]) not in _CONTAINERS and isinstance(item[1], _PLAIN)
    ]


@dataclass(frozen=True, eq=False, slots=True)
class Watched:
    """A module to record.

    Attributes:
        name: its qualified name in the model.
        module: the module.
        keep: whether to keep the values of its outputs.
        held: the parameters that belong in it: who holds them, as what.
        finder: finds linear maps inside it, or None.
        replays: whether to keep values where it finds nothing.
    """

    name: str
    module: nn.Module
    keep: bool
    held: tuple[tuple[nn.Module, str, Tensor], ...]
    finder: Finder | None = None
    replays: bool = False

    def holds_its_own(self) -> bool:
        """Whether nothing is in the place of a parameter now."""
        return all(
            owner._parameters.get(attribute) is tensor
            for owner, attribute, tensor in self.held
        )

    def own_names(self) -> Iterator[str]:
        """Yield the names in the model of the parameters that it holds itself."""
        for owner, attribute, _ in self.held:
            if owner is self.module:
                yield f"{self.name}.{attribute}" if self.name else attribute


@dataclass(eq=False, slots=True)
class Use:
    """One call of a module.

    An output is kept as an edge of the autograd graph, not as a tensor: an in-place
    operation on it afterwards moves the tensor, not the edge.

    Attributes:
        name: qualified name of the module in the model.
        module: the module.
        args: positional arguments, tensors detached.
        kwargs: keyword arguments, tensors detached.
        inputs: the tensors among these.
        edges: where its differentiable outputs enter the autograd graph, and then
            those of the linear maps inside it.
        places: which of its outputs' tensors these are.
        shapes: shape at each edge.
        versions: version counters of the arguments' tensors when it was called.
        dtype: data type of its first output, lower than the parameters' under
            autocast.
        origins: the nodes of the autograd graph that made the arguments.
        plain: whether it ran the ``forward`` of its class.
        own: whether it held its own parameters, and nothing in their place.
        attributes: what it was made of when it was called.
        values: its differentiable outputs, where they are to be compared later.
        inside: the linear maps, and other places, that were found inside it.
        inner_versions: version counters of what these hold.
        sought: what these were looked for with, by identity.
    """

    name: str
    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    inputs: list[Tensor]
    edges: tuple[GradientEdge, ...]
    places: tuple[int, ...]
    shapes: tuple[torch.Size, ...]
    versions: list[int]
    dtype: torch.dtype
    origins: tuple[Node, ...]
    plain: bool
    own: bool
    attributes: dict[str, object]
    values: tuple[Tensor, ...]
    inside: tuple[Place, ...]
    inner_versions: list[int]
    sought: tuple[int, ...] = ()

    def look(self, inside: tuple[Place, ...], sought: tuple[int, ...]) -> None:
        """Put other places inside it into the place of those that it has.

        Args:
            inside: the places.
            sought: what they were looked for with.
        """
        count = len(self.places)
        self.inside, self.sought = inside, sought
        self.inner_versions = [place.input._version for place in inside]
        self.edges = (*self.edges[:count], *(each.edge for each in inside))
        self.shapes = (*self.shapes[:count], *(each.shape for each in inside))

    def keeps_settings(self) -> bool:
        """Whether its plain attributes, such as a stride, are as they were."""
        now, before = vars(self.module), self.attributes
        # The very same objects, as a rule; the plain ones do not change themselves.
        same = len(now) == len(before) and all(map(is_, now.values(), before.values()))
        return same or _settings(now) == _settings(before)

    @property
    def label(self) -> str:
        """The module in words for an error."""
        return _label(self.name)

    def pattern(self, examples: int) -> tuple[object, ...]:
        """Return what is equal in passes in which the examples lie alike."""
        sizes = tuple(
            (size == examples, size % examples == 0)
            for shape in self.shapes
            for size in shape
        )
        return (
            self.name,
            self.plain,
            self.own,
            tuple(t.ndim for t in self.inputs),
            self.places,
            sizes,
        )


def _label(name: str) -> str:
    return f"layer '{name}'" if name else "the model"


@dataclass
class Tape:
    """What happened in one recorded scope.

    Attributes:
        uses: calls of watched modules, in the order in which they ended.
        hidden: parameters of modules that ran in a function transform of torch.func,
            which leaves no graph behind at their outputs.
        opaque: of modules that returned nothing in which tensors are found, the name of
            the class that they returned.
        compiled: whether some of the modules are compiled.
        partial: whether only modules were watched that had to explain something.
        read: of calls that are gone: a label, what they read, and its versions.
    """

    uses: list[Use] = field(default_factory=list)
    hidden: set[str] = field(default_factory=set)
    opaque: dict[str, str] = field(default_factory=dict)
    compiled: bool = False
    partial: bool = False
    read: list[tuple[str, list[Tensor], list[int]]] = field(default_factory=list)

    @property
    def saw_nothing(self) -> bool:
        """Whether nothing was called that it watched, though not all was watched."""
        return self.partial and not self.uses and not self.hidden

    def watch(self, modules: Iterable[Watched]) -> list[RemovableHandle]:
        """Append a use to the tape at every call of one of ``modules``.

        Args:
            modules: what to watch.

        Returns:
            Handles that end the recording.
        """
        return [
            each.module.register_forward_hook(self._hook(each), with_kwargs=True)
            for each in modules
        ]

    def _hook(self, watched: Watched):  # type: ignore[no-untyped-def]
        apart = outside()

        def remember(
            module: nn.Module,
            args: tuple[Any, ...],
            kwargs: dict[str, Any],
            output: object,
        ) -> None:
            # What torch.compile returned for this model, or one around it, is called.
            if torch.compiler.is_compiling():
                apart(remember, module, args, kwargs, output)
                return
            # A copy of the module, made meanwhile, has a copy of this hook.
            if module is not watched.module:
                return
            every = [output] if isinstance(output, Tensor) else [*tensors_in(output)]
            outputs = [t for t in every if t.requires_grad]
            if any(map(torch._C._functorch.is_functorch_wrapped_tensor, every)):
                # Gone when the function that is transformed returns.
                self.hidden.update(watched.own_names())
                return
            # Under no_grad a view of a parameter asks for a gradient without a graph.
            if not outputs or not torch.is_grad_enabled():
                if not every and output is not None:
                    self.opaque[watched.name] = type(output).__name__
                return
            called = kwargs
            if not kwargs and len(args) == 1 and isinstance(args[0], Tensor):
                given, inputs = [args[0]], seen(args)
                own: tuple[Any, ...] = (inputs[0],)
            else:
                given = [*tensors_in(args), *tensors_in(kwargs)]
                inputs = seen(given)
                pieces = iter(inputs)
                own = map_tensors(args, lambda _: next(pieces))
                kwargs = map_tensors(kwargs, lambda _: next(pieces))
            origins = [t.grad_fn for t in given]
            inside: tuple[Place, ...] = ()
            if watched.finder is not None:
                inside = watched.finder(module, args, called, outputs)
                inside = own_memory(inside, given, inputs)
            keep = watched.keep or (watched.replays and not inside)
            self.uses.append(
                Use(
                    watched.name,
                    module,
                    own,
                    kwargs,
                    inputs,
                    tuple(
                        [get_gradient_edge(t) for t in outputs]
                        + [each.edge for each in inside]
                    ),
                    tuple([i for i, t in enumerate(every) if t.requires_grad]),
                    tuple([t.shape for t in outputs] + [e.shape for e in inside]),
                    [t._version for t in inputs],
                    outputs[0].dtype,
                    tuple([node for node in origins if node is not None]),
                    "forward" not in vars(module),
                    watched.holds_its_own(),
                    vars(module).copy(),
                    tuple([t.detach().clone() for t in outputs]) if keep else (),
                    inside,
                    [place.input._version for place in inside],
                )
            )

        # Traced, it would break graphs in many places, and in every pass anew.
        return disabled(remember) if self.compiled else remember

    def says_nothing(self, path: str) -> str | None:
        """Return why a module's outputs show nothing, for an error, or None."""
        if path not in self.opaque:
            return None
        return (
            f"{_label(path)} returned an object of class {self.opaque[path]}, in which "
            "no tensors are looked for; return a tensor, tuple, dict or dataclass"
        )

    @property
    def rounding(self) -> float:
        """The unit of rounding of the least precise module."""
        return max(torch.finfo(use.dtype).eps for use in self.uses)

    def require_intact(self) -> None:
        """Check that the modules' arguments still hold what the modules saw.

        Raises:
            LinearizationError: one was changed in place; names the layer.
        """
        for label, tensors, versions in [*self.read, *map(_read, self.uses)]:
            if [t._version for t in tensors] != versions:
                raise LinearizationError(
                    f"the input of {label} was changed in place after the layer "
                    "had used it, so its factor is lost; use the out-of-place operation"
                )

    def release(self) -> None:
        """Let go of autograd's graph and keep what :meth:`require_intact` needs."""
        self.read, self.uses = [*map(_read, self.uses)], []

    def check_inputs(self) -> None:
        """Check that the recorded arguments are intact and finite.

        Raises:
            LinearizationError: an input was changed in place; names the layer.
            NonFiniteError: an input holds NaN or infinity (looked at on the CPU only,
                where it costs no synchronisation).
        """
        self.require_intact()
        for use in self.uses:
            # An attention mask may well hold infinities: only the first counts.
            if not all(map(_finite, use.inputs[:1])):
                raise NonFiniteError(
                    f"NaN or infinity in the layer inputs ({self.first_nonfinite()}); "
                    "nothing was changed. Check the data, lower the learning rate or "
                    "raise the mass"
                )

    def first_nonfinite(self) -> str:
        """Return where NaN or infinity entered, in words for an error."""
        for use in self.uses:
            for parameter, value in use.module.named_parameters(recurse=False):
                if not looks_finite(value):
                    name = f"{use.name}.{parameter}" if use.name else parameter
                    return f"parameter '{name}' is not finite"
            if not all(map(_finite, use.inputs[:1])):
                return f"the input of {use.label} is the first not finite"
        return "every recorded layer input is finite, so it arose behind the last layer"


def _read(use: Use) -> tuple[str, list[Tensor], list[int]]:
    """Return what a call has read, and the version counters of then."""
    tensors = [*use.inputs, *(place.input for place in use.inside)]
    return use.label, tensors, [*use.versions, *use.inner_versions]


def _finite(value: Tensor) -> bool:
    return not value.is_floating_point() or looks_finite(value)
