"""The layer metric at any values of a model's parameters."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.errors import NotPositiveDefiniteError
from riemannian_modules.interop.pymanopt.cost import ModelCost
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.manifolds import MetricProduct, Product

__all__ = ["Pulled", "PulledMetric"]

KEPT = 2  # conjugate gradients go back and forth between two points


@dataclass(frozen=True)
class Pulled:
    """The metric at a point and the Riemannian gradient there, flat.

    Attributes:
        point: flat point.
        manifold: the product with the layer metrics of the point.
        gradient: tangent vector.
    """

    point: Tensor
    manifold: Product
    gradient: Tensor


class PulledMetric:
    """Pulls the metric back anew at every point that is asked about.

    A line search asks about one point only, where it starts, so the metric is held
    meanwhile. The last two points are remembered.

    Args:
        metric: metric of a model whose values may be overwritten.
        product: product of the base manifolds in float64, which packs and unpacks.
        cost: the cost of the same model.
        inputs: arguments of the model.
        weight_decay: as in the cost.
    """

    def __init__(
        self,
        metric: LayerwiseMetric,
        product: Product,
        cost: ModelCost,
        inputs: Sequence[Any],
        weight_decay: float,
    ) -> None:
        self._metric = metric
        self._product = product
        self._cost = cost
        self._inputs = tuple(inputs)
        self._decay = weight_decay
        self._known: deque[Pulled] = deque(maxlen=KEPT)

    def at(self, point: Tensor) -> Pulled:
        """Return the metric at a point.

        Args:
            point: flat point.

        Returns:
            The metric with the gradient.
        """
        for known in self._known:
            if torch.equal(known.point, point):
                return known
        found = self._pull_back(point)
        self._known.append(found)
        return found

    def _pull_back(self, point: Tensor) -> Pulled:
        metric = self._metric
        values = self._cost.typed(point)
        for declared in metric.parameters:
            # In new memory: metrics of earlier points keep the values of theirs.
            declared.tensor.data = values[declared.name]
        devices = [point.device] if point.device.type == "cuda" else []
        # Sampled rows are the same at the same point, and nobody's stream moves.
        with torch.enable_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(0)
            with metric.record():
                outputs = metric.model(*self._inputs)
            metric.backward(self._cost.of_outputs(outputs), outputs)
        decay = {name: self._decay * value for name, value in values.items()}
        solutions = metric.solve(decay if self._decay else None).values()
        succeeded = metric.succeeded()
        if succeeded is not None and not bool(succeeded):
            raise NotPositiveDefiniteError(
                "the small matrix of a layer metric is not positive definite at this "
                "point; raise the mass, or start elsewhere"
            )
        manifold = self._manifold()
        vectors = {n: x for solution in solutions for n, x in solution.vectors.items()}
        for block in manifold.blocks if isinstance(manifold, MetricProduct) else ():
            own = {part.name for part in block.parts}
            if not own <= set(vectors):  # the loss does not reach it
                vectors |= block.sharp({name: decay[name] for name in own})
        gradient = self._product.pack({n: x.double() for n, x in vectors.items()})
        return Pulled(point.clone(), manifold, gradient)

    def _manifold(self) -> Product:
        found = self._metric.manifold
        product = self._product
        triples = zip(product.names, product.manifolds, product.shapes, strict=True)
        parts = {name: (manifold, shape) for name, manifold, shape in triples}
        masses = dict(zip(found.names, found.masses, strict=True))
        if not isinstance(found, MetricProduct) or all(
            block.rank == 0 for block in found.blocks
        ):
            return Product(parts, masses=masses)
        return MetricProduct(parts, found.blocks, found.version)
