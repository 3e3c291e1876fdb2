"""The registry of rules: a layer type and how a call of it becomes factors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn

from riemannian_modules.factors import MetricFactor
from riemannian_modules.layout import Layout
from riemannian_modules.nested import tensors_in
from riemannian_modules.place import Finder

__all__ = ["Call", "Entry", "Inside", "Rule", "entry_of", "register_rule"]


def _nameless(_: Tensor) -> None:
    return None


@dataclass(frozen=True)
class Inside:
    """A place inside a module, such as a linear map, as it ran in a call.

    Attributes:
        input: what the map was applied to, ``(*batch, in)``.
        cotangent: that at its output, ``(r, *batch, out)``, or None.
        layout: where the examples are in both.
        shape: that of its output, ``(*batch, out)``.
        note: what the finder noted.
    """

    input: Tensor
    cotangent: Tensor | None
    layout: Layout
    shape: torch.Size
    note: Any = None


@dataclass(frozen=True)
class Call:
    """One recorded call of a module, with the cotangents at its outputs.

    Attributes:
        module: the module.
        args: positional arguments, tensors detached.
        kwargs: keyword arguments, tensors detached.
        places: which tensors of the module's outputs are differentiable.
        cotangents: for each of these ``(r, *shape)``, or None where nothing depends
            on it.
        layouts: where the examples are in each differentiable output.
        examples: number n of examples.
        wanted: the module's parameters that need a factor.
        label: the module in words for errors.
        values: the differentiable outputs, for rules that ask for them.
        memo: what the rule found out about this call before; empty in the first pass
            through a graph.
        name_of: the name in the model of a trainable parameter; None for any other
            tensor.
        inside: the linear maps that the rule's finder found in the call.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    places: tuple[int, ...]
    cotangents: tuple[Tensor | None, ...]
    layouts: tuple[Layout, ...]
    examples: int
    wanted: tuple[str, ...]
    label: str
    values: tuple[Tensor, ...] = ()
    memo: dict[str, Any] = field(default_factory=dict)
    name_of: Callable[[Tensor], str | None] = _nameless
    inside: tuple[Inside, ...] = ()

    @property
    def input(self) -> Tensor:
        """The first argument; of keywords the one of that name, or the first tensor."""
        if self.args:
            return cast("Tensor", self.args[0])
        first = next(tensors_in(dict(self.kwargs)))
        return cast("Tensor", self.kwargs.get("input", first))

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters; under autocast the calls have another one."""
        own = self.module._parameters.get(self.wanted[0])
        return (self.module.get_parameter(self.wanted[0]) if own is None else own).dtype

    def first(self, tensor: Tensor) -> Tensor:
        """Return a tensor that is laid out like the first output, examples first."""
        return self.layouts[0].front(tensor, self.examples)

    def cotangent(self) -> Tensor:
        """Return the cotangents at the first output, ``(r, n, *rest)``."""
        cotangent = self.cotangents[0]
        assert cotangent is not None
        return self.layouts[0].front(cotangent, self.examples, 1)


Rule = Callable[[Call], Mapping[str, MetricFactor]]


@dataclass(frozen=True)
class Entry:
    """A registered rule.

    Attributes:
        rule: makes one factor for each of the module's parameters, by attribute name
            (by path below the module if ``deep``). The rows are ordered by cotangent
            first, then by example. The same function makes the metric's rows and the
            ordinary gradient.
        deep: whether it explains the parameters of the module's children as well.
        compares: whether it asks for the values of the outputs.
        apart: whether it is as cheap for cotangents one by one.
        finder: finds the linear maps inside a call; where it finds some, the rule
            needs no values.
    """

    rule: Rule
    deep: bool = False
    compares: bool = False
    apart: bool = False
    finder: Finder | None = None


_ENTRIES: dict[type[nn.Module], Entry] = {}


def register_rule(
    layer: type[nn.Module],
    rule: Rule,
    *,
    deep: bool = False,
    compares: bool = False,
    apart: bool = False,
    finder: Finder | None = None,
) -> None:
    """Use ``rule`` for layers of type ``layer`` and of subclasses that compute alike.

    A subclass with a ``forward`` of its own gets no rule by this: it is treated like
    any module without one, slower and as exact.

    Args:
        layer: layer type.
        rule: ``{attribute: factor}`` for a :class:`Call`; see :class:`Entry`.
        deep: whether it explains the parameters of the layer's children as well.
        compares: whether it asks for :attr:`Call.values`.
        apart: whether it may be asked for the cotangents of one call one by one, which
            saves copying them into one tensor; its factors must then be
            LinearFactors, BiasFactors or ConvolutionFactors.
        finder: finds linear maps inside a call, for :attr:`Call.inside`, from the
            module, its arguments and its outputs; see
            :func:`riemannian_modules.rules.linear_maps`.
    """
    _ENTRIES[layer] = Entry(rule, deep, compares, apart, finder)


def entry_of(module: nn.Module) -> Entry | None:
    """Return the rule that explains a module's parameters, or None.

    Args:
        module: a layer.

    Returns:
        The rule of the nearest registered class that computes as the module does.
    """
    kind = type(module)
    for base in kind.__mro__:
        if base in _ENTRIES:
            own = getattr(kind, "forward", None) is getattr(base, "forward", None)
            return _ENTRIES[base] if own else None
    return None
