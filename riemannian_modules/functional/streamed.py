"""Differential operators on networks of linear layers, with structured factors."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, get_gradient_edge

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import (
    BiasFactor,
    DenseFactor,
    LinearFactor,
    MetricFactor,
    joined,
)
from riemannian_modules.functional.binding import Binding
from riemannian_modules.functional.operator import (
    Beside,
    DifferentialOperator,
    network_of,
)
from riemannian_modules.functional.parameters import Parameters
from riemannian_modules.functional.pointset import Point, PointSet, refuse_others
from riemannian_modules.functional.pointwise import Function, Pointwise, finished
from riemannian_modules.functional.streams import Streams
from riemannian_modules.heads import Rows
from riemannian_modules.linearization import Linearization
from riemannian_modules.reverse import reverse_pass

__all__ = ["Streamed", "point_set"]


@dataclass(frozen=True)
class _Use:
    """A product of streams with a weight.

    Attributes:
        weight: name of the weight, None if it is frozen.
        bias: name of the bias, None if it is frozen or there is none.
        inputs: ``(n, streams, in)``.
        edge: where the product enters the graph.
    """

    weight: str | None
    bias: str | None
    inputs: Tensor
    edge: GradientEdge


class _Uses:
    """Remembers the products of streams with the parameters of a point."""

    def __init__(self, point: Point) -> None:
        self._names = {id(value): name for name, value in point.items()}
        self.all: list[_Use] = []
        # Where tensors beside the network enter the graph, one for each example.
        self.beside: list[tuple[str, GradientEdge]] = []

    def remember(
        self, weight: Tensor, bias: Tensor | None, inputs: Tensor, outputs: Tensor
    ) -> None:
        """Remember ``outputs = inputs W^T + b``.

        Raises:
            LinearizationError: W or b is computed from parameters.
        """
        for each in (weight, bias):
            if each is not None and each.requires_grad and id(each) not in self._names:
                raise LinearizationError(
                    "a linear layer computes its weight or bias from parameters (a "
                    "parametrization); give the DifferentialOperator structured=False, "
                    "which differentiates any network"
                )
        if outputs.requires_grad:
            names = self._names.get(id(weight)), self._names.get(id(bias))
            self.all.append(_Use(*names, inputs.detach(), get_gradient_edge(outputs)))

    def handed_on(self, tensor: Tensor, n: int) -> Tensor:
        """Return a tensor beside the network for each example, and remember it."""
        each = tensor.expand(n, *tensor.shape)
        if each.requires_grad and id(tensor) in self._names:
            edge = get_gradient_edge(each)
            self.beside.append((self._names[id(tensor)], edge))
        return each


@final
class Streamed(PointSet):
    """A differential operator on a network, whose K is not formed.

    Args:
        model: the network.
        operator: the operator.
        label: what errors call it.
    """

    def __init__(
        self, model: nn.Module, operator: DifferentialOperator, label: str
    ) -> None:
        self._model = model
        self._binding = Binding(model)
        self._operator = operator
        # The arguments before the streams: which member of Parameters is called.
        self._network = [network_of(model())] if isinstance(model, Parameters) else []
        self._checked: set[tuple[object, ...]] = set()
        self.label = label

    def values(self, point: Point, examples: Sequence[Tensor]) -> Tensor:
        """Return the residuals at all points, ``(n, *output)``."""
        return self._evaluate(point, examples)[0]

    def _evaluate(
        self, point: Point, examples: Sequence[Tensor], *, recording: bool = False
    ) -> tuple[Tensor, _Uses]:
        uses, beside = _Uses(point), None
        for network in self._network:
            members = self._binding.call(point)
            del members[network]
            n = len(examples[0])
            tensors = {name: uses.handed_on(each, n) for name, each in members.items()}
            beside = Beside(network, tensors)

        def through(start: Streams) -> Any:
            uses.all.clear()
            return self._through(point, start)

        record = uses.remember if recording else None
        return self._operator.evaluate(through, examples, record, beside), uses

    def _through(self, point: Point, start: Streams) -> Any:
        try:
            end = self._binding.call(point, *self._network, start)
        except (LinearizationError, AttributeError, TypeError) as error:
            where = self._innermost(point, start)
            raise LinearizationError(f"{self.label}, in {where}: {error}") from error
        return end

    def _innermost(self, point: Point, start: Streams) -> str:
        """Return the module in which the pass through the network fails, in words."""
        running: list[str] = []
        handles = []
        for name, module in self._model.named_modules():
            kind = type(module).__name__
            label = f"layer '{name}' ({kind})" if name else f"the model ({kind})"
            handles += [
                module.register_forward_pre_hook(
                    lambda *_, label=label: running.append(label)
                ),
                module.register_forward_hook(lambda *_: running.pop() and None),
            ]
        try:
            self._binding.call(point, *self._network, start)
        except (LinearizationError, AttributeError, TypeError):
            return running[-1] if running else "the model"
        finally:
            for handle in handles:
                handle.remove()
        return "the model"

    def linearize(
        self, point: Point, examples: Sequence[Tensor], rows: Rows
    ) -> Linearization:
        """Pull the rows back to the products with weights. Implements :eq:`jet-factor`.

        Raises:
            LinearizationError: the network or the function uses parameters elsewhere
                than in linear layers.
        """
        y = None if rows.has_rest else rows.residual
        stack = rows.stacks[0] if y is None else rows.stacks[0][: rows.rank]
        leaves = {
            name: value.detach().requires_grad_() for name, value in point.items()
        }
        with torch.enable_grad():
            outputs, found = self._evaluate(leaves, examples, recording=True)
        uses = found.all
        # The graph may be another one in every pass: the function may have branches.
        refuse_others(outputs, leaves.values(), self._model, self.label)
        graph = tuple((use.weight, use.bias, *use.inputs.shape[1:]) for use in uses)
        count, truth = len(stack), None
        if graph not in self._checked:
            stack = torch.cat([stack, _probe(outputs.detach())])
            truth = self._truth(outputs, leaves, stack[-1])
        edges = [use.edge for use in uses] + [edge for _, edge in found.beside]
        carried: Sequence[Tensor | None] = [None] * len(edges)
        if edges and outputs.requires_grad:
            carried, _ = reverse_pass([outputs], edges, [stack], batched=True)
        whole = _factors(found, carried, point, len(stack) * len(outputs))
        if truth is not None:
            n = len(outputs)
            last = {m: f.narrow(count * n, (count + 1) * n) for m, f in whole.items()}
            self._compare({m: f.row_sum() for m, f in last.items()}, truth)
            whole = {m: f.narrow(0, count * n) for m, f in whole.items()}
            self._checked.add(graph)
        return finished(whole, rows, y, len(outputs))

    def _truth(
        self, outputs: Tensor, leaves: Point, cotangent: Tensor
    ) -> dict[str, Tensor]:
        """Return autograd's derivative of all parameters for one cotangent."""
        if not outputs.requires_grad:
            return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
        grads = torch.autograd.grad(
            outputs,
            list(leaves.values()),
            cotangent,
            retain_graph=True,
            allow_unused=True,
        )
        return {
            name: torch.zeros_like(leaf) if grad is None else grad
            for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
        }

    def _compare(self, found: Point, truth: Point) -> None:
        for name, expected in truth.items():
            if expected.is_meta:
                continue
            error, size = (found[name] - expected).norm(), expected.norm()
            if not error <= torch.finfo(expected.dtype).eps ** 0.5 * (size + 1e-30):
                raise LinearizationError(
                    f"{self.label}: parameter '{name}' is used elsewhere than in a "
                    f"linear layer (derivatives differ by {float(error):.1e} of "
                    f"{float(size):.1e}); give the DifferentialOperator "
                    "structured=False, which differentiates any network"
                )


def point_set(
    model: nn.Module, function: Function, name: str, chunk_size: int | None
) -> PointSet:
    """Return what evaluates and differentiates a function.

    Args:
        model: the model.
        function: a function of the model and one example, or a DifferentialOperator.
        name: its name among several; empty: there is only one.
        chunk_size: examples at a time, where rows are stored; None: all.
    """
    label = f"function '{name}'" if name else "the function"
    if isinstance(function, DifferentialOperator) and function.structured:
        return Streamed(model, function, label)
    return Pointwise(model, function, label, chunk_size)


def _factors(
    uses: _Uses,
    carried: Sequence[Tensor | None],
    point: Point,
    rank: int,
) -> dict[str, MetricFactor]:
    found: dict[str, list[MetricFactor]] = {name: [] for name in point}
    for (name, _), rows in zip(uses.beside, carried[len(uses.all) :], strict=True):
        if rows is not None:
            found[name].append(DenseFactor(rows.flatten(0, 1)))
    for use, rows in zip(uses.all, carried, strict=False):
        if rows is None:
            continue
        if use.weight is not None:
            found[use.weight].append(LinearFactor(use.inputs, rows))
        if use.bias is not None:
            # The bias moves the value alone.
            value = rows if rows.shape[2] == 1 else rows[:, :, :1]
            found[use.bias].append(BiasFactor(value))
    return {
        name: joined(factors)
        if factors
        else DenseFactor(point[name].new_zeros(1).expand(rank, *point[name].shape))
        for name, factors in found.items()
    }


def _probe(outputs: Tensor) -> Tensor:
    """Return one cotangent without symmetries, ``(1, n, *output)``."""
    count = torch.arange(1, outputs.numel() + 1, device=outputs.device)
    share = torch.frac(count.to(torch.float32) * 0.61803398875)
    return (1.0 + share).to(outputs.dtype).view_as(outputs).unsqueeze(0)
