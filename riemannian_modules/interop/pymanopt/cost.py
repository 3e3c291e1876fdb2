"""The cost of a model at any values of its parameters, with two derivatives."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules.errors import NonFiniteError, ShapeError
from riemannian_modules.functional.binding import Binding
from riemannian_modules.manifolds import Product

__all__ = ["Loss", "ModelCost"]

Loss = Callable[[Any], Tensor]


@dataclass(frozen=True)
class _Graph:
    """A cost at a point with the graphs of its value and of its gradient."""

    point: Tensor
    leaves: dict[str, Tensor]
    value: Tensor
    gradient: list[Tensor]


class ModelCost:
    """``loss(model(*inputs))`` plus half the weight decay, of flat points.

    The parameters of the model are not touched and no ``.grad`` is filled: the model
    is called with other tensors in their place. Points come and go in float64, the
    model runs in its own data types.

    Args:
        model: the model.
        product: packs and unpacks points; its names are those of the parameters.
        loss: from the outputs to a scalar.
        inputs: arguments of the model.
        weight_decay: factor of half the sum of squares of all parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        product: Product,
        loss: Loss,
        inputs: Sequence[Any],
        weight_decay: float,
    ) -> None:
        self._binding = Binding(model)
        self._product = product
        self._loss = loss
        self._inputs = tuple(inputs)
        self._decay = weight_decay
        self._like = {n: p for n, p in model.named_parameters() if n in product.names}
        self._graph: _Graph | None = None

    def typed(self, point: Tensor) -> dict[str, Tensor]:
        """Return new tensors by name, in the data types of the parameters.

        Args:
            point: flat point.
        """
        return {
            name: value.to(self._like[name].device, self._like[name].dtype, copy=True)
            for name, value in self._product.unpack(point.detach()).items()
        }

    def of_outputs(self, outputs: Any) -> Tensor:
        """Return the loss of the outputs.

        Args:
            outputs: outputs of the model.

        Returns:
            A scalar tensor.

        Raises:
            ShapeError: the loss is not a scalar tensor.
        """
        value = self._loss(outputs)
        if not isinstance(value, Tensor) or value.numel() != 1:
            found = tuple(value.shape) if isinstance(value, Tensor) else type(value)
            raise ShapeError(f"loss(outputs) must be a scalar tensor, got {found}")
        return value.reshape(())

    def value(self, point: Tensor) -> float:
        """Return the cost; infinity in place of NaN, so that line searches back off.

        Args:
            point: flat point.
        """
        known = self._known(point)
        if known is not None:
            return _number(known.value)
        with torch.no_grad():
            return _number(self._at(self._leaves(point, differentiable=False)))

    def gradient(self, point: Tensor) -> Tensor:
        """Return the ordinary gradient, flat.

        Args:
            point: flat point.
        """
        graph = self._differentiated(point)
        return self._flat(graph.gradient)

    def hessian(self, point: Tensor, vector: Tensor) -> Tensor:
        """Return the ordinary Hessian times a vector, flat.

        By reverse mode twice; the first graph is kept as long as the point stays.

        Args:
            point: flat point.
            vector: flat vector.
        """
        graph = self._differentiated(point)
        along = self.typed(vector)
        pairs = [
            (g, along[name])
            for name, g in zip(graph.leaves, graph.gradient, strict=True)
            if g.requires_grad
        ]
        if not pairs:
            return torch.zeros_like(point)
        outputs, directions = zip(*pairs, strict=True)
        found = torch.autograd.grad(
            outputs,
            tuple(graph.leaves.values()),
            directions,
            retain_graph=True,
            materialize_grads=True,
        )
        return self._flat(found)

    def _leaves(self, point: Tensor, *, differentiable: bool) -> dict[str, Tensor]:
        """Return tensors that stand in for the parameters, with their manifolds."""
        found = {}
        for name, value in self.typed(point).items():
            manifold = getattr(self._like[name], "manifold", None)
            curved = manifold is not None
            leaf = geoopt.ManifoldTensor(value, manifold=manifold) if curved else value
            found[name] = leaf.requires_grad_(differentiable)
        return found

    def _at(self, values: dict[str, Tensor]) -> Tensor:
        outputs = self._binding.call(values, *self._inputs)
        total = self.of_outputs(outputs)
        if self._decay:
            squares = [value.square().sum().to(total) for value in values.values()]
            total = total + 0.5 * self._decay * torch.stack(squares).sum()
        return total

    def _known(self, point: Tensor) -> _Graph | None:
        graph = self._graph
        same = graph is not None and torch.equal(graph.point, point)
        return graph if same else None

    def _differentiated(self, point: Tensor) -> _Graph:
        graph = self._known(point)
        if graph is None:
            self._graph = None  # free the old one first
            self._graph = graph = self._linearised(point)
        return graph

    def _linearised(self, point: Tensor) -> _Graph:
        with torch.enable_grad():
            leaves = self._leaves(point, differentiable=True)
            value = self._at(leaves)
            gradient = torch.autograd.grad(
                value,
                tuple(leaves.values()),
                create_graph=True,
                materialize_grads=True,
            )
        number = float(value.detach())
        if not math.isfinite(number):
            raise NonFiniteError(
                f"the cost is {number}, so it has no gradient; start elsewhere"
            )
        return _Graph(point.clone(), leaves, value.detach(), list(gradient))

    def _flat(self, tensors: Sequence[Tensor]) -> Tensor:
        named = zip(self._like, tensors, strict=True)
        return self._product.pack({n: t.detach().double() for n, t in named})


def _number(value: Tensor) -> float:
    number = float(value)
    return number if math.isfinite(number) else math.inf
