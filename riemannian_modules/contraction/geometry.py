r"""The metric of a model as a differentiable function of its parameters.

A :class:`riemannian_modules.LayerMetric` belongs to one point. What the derivative of
the metric needs is the map ``u -> G(u) v`` in the coordinates of a chart:

    z(u)     = model(psi(u))                    outputs, by functional_call
    K_a v    = L_o(z) J_a v                     jvp, block by block
    G(u) v   = base part + sum_a J_a^T L_o^T K_a v    vjp

``L_o(z(u))`` is differentiated like all the rest. Passes through the model are counted
in ``cost``.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.contraction.autodiff import jvp, vjp
from riemannian_modules.contraction.chart import Chart
from riemannian_modules.contraction.smooth import base_inner
from riemannian_modules.heads import Head, OutputLike, OutputMetricLike, Reduction, pair
from riemannian_modules.output import OutputMetric
from riemannian_modules.twice import DifferentiableTwice

__all__ = ["Geometry", "Loss"]

Loss = Callable[[Any], Tensor]
Tensors = tuple[Tensor, ...]


class Geometry:
    """A model, its loss and its metric in the coordinates of a chart.

    Args:
        model: the model.
        inputs: what it is called with.
        loss: scalar function of what it returns.
        output: output metrics, as in :class:`riemannian_modules.LayerwiseMetric`.
        reduction: how the loss sums over examples.
        chart: coordinates of the parameters.
        groups: ``{block name: parameter names}``.
        weight_decay: adds half of it times the sum of squares of all parameters to
            the loss.

    Attributes:
        cost: number of passes through the model: ``"gradients"`` counts a forward with
            a reverse pass, or any derivative of one, as one each.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Sequence[Any],
        loss: Loss,
        output: OutputMetricLike,
        reduction: Reduction,
        chart: Chart,
        groups: Mapping[str, Sequence[str]],
        weight_decay: float = 0.0,
    ) -> None:
        self.chart = chart
        self.groups = {name: list(members) for name, members in groups.items()}
        self.cost: Counter[str] = Counter()
        self._model = model
        self._inputs = tuple(inputs)
        self._loss = loss
        self._output = output
        self._reduction = reduction
        self._decay = weight_decay
        self.masks = {name: self._mask(members) for name, members in groups.items()}
        self.origin = chart.zeros()

    @property
    def curved(self) -> bool:
        """Whether the base metric changes with the coordinates."""
        return not all(self.chart.is_flat(name) for name in self.chart.slices)

    @property
    def has_decay(self) -> bool:
        """Whether weight decay is part of the loss."""
        return self._decay > 0.0

    # --- the model in coordinates

    def outputs(self, u: Tensor) -> Tensors:
        """Return the outputs of all heads at the coordinates ``u``."""
        return tuple(tensor for tensor, _ in self._heads(self._run(u)))

    def loss(self, u: Tensor) -> Tensor:
        """Return the loss at the coordinates ``u``, weight decay included."""
        return self._loss(self._run(u)) + self.decay(u)

    def loss_of(self, z: Tensors) -> Tensor:
        """Return the loss of the heads' outputs, without weight decay."""
        if isinstance(self._output, Mapping):
            return self._loss(dict(zip(self._output, z, strict=True)))
        return self._loss(tuple(z) if isinstance(self._output, Sequence) else z[0])

    def decay(self, u: Tensor) -> Tensor:
        """Return what weight decay adds to the loss."""
        if not self._decay:
            return u.new_zeros(())
        point = self.chart.point(u)
        squares = [value.square().sum() for value in point.values()]
        return 0.5 * self._decay * torch.stack(squares).sum()

    # --- the output metric

    def measure(self, z: Tensors, dz: Tensors) -> Tensors:
        """Return the covectors ``G_o(z) dz``, weighted as the loss weighs examples.

        Args:
            z: outputs of all heads.
            dz: a velocity of each.

        Returns:
            A cotangent of each; differentiable in both arguments.
        """
        found = []
        for (outputs, metric), velocity in zip(self._like(z), dz, strict=True):
            if metric is None:
                found.append(torch.zeros_like(velocity))
                continue
            weight = self._weight(outputs, metric)
            found.append(weight * metric.apply(outputs, velocity))
        return tuple(found)

    def weight(self, z: Tensors) -> float:
        """Return the largest weight that the loss gives to a term of a head."""
        heads = [(outputs, m) for outputs, m in self._like(z) if m is not None]
        return max((self._weight(*head) for head in heads), default=0.0)

    # --- the metric

    def images(self, u: Tensor, v: Tensor) -> dict[str, Tensors]:
        """Return for every block the velocity of the outputs when it moves alone.

        Args:
            u: coordinates.
            v: velocity of the coordinates.

        Returns:
            ``{block: velocities of all heads}``. Cost: one jvp for each block.
        """
        self.cost["gradients"] += len(self.masks)
        return {
            name: jvp(self.outputs, u, v * mask)[1] for name, mask in self.masks.items()
        }

    def pullback(self, u: Tensor, v: Tensor) -> Tensor:
        """Return ``sum_a K_a^T K_a v``, the part of the metric that the outputs make.

        Args:
            u: coordinates.
            v: velocity of the coordinates.

        Returns:
            A covector, ``(size,)``. Cost: a jvp and a vjp for each block.
        """
        z, pull = vjp(self.outputs, u)
        images = self.images(u, v)
        self.cost["gradients"] += len(images)
        covectors = [
            mask * pull(self.measure(z, images[name]))
            for name, mask in self.masks.items()
        ]
        return torch.stack(covectors).sum(0)

    def pullback_form(self, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return ``sum_a <K_a a, K_a b>``, a scalar."""
        z = self.outputs(u)
        left, right = self.images(u, a), self.images(u, b)
        return sum(
            (dot(self.measure(z, left[name]), right[name]) for name in self.masks),
            start=u.new_zeros(()),
        )

    def base_form(self, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """Return ``g0(D a, b)`` of the massed base metric, a scalar."""
        total = u.new_zeros(())
        for name, at in self.chart.slices.items():
            space = self.chart.spaces[name]
            if self.chart.is_flat(name):
                shape = space.point.shape
                massed = space.mass.multiply(a[at].view(shape))
                total = total + (massed * b[at].view(shape)).sum()
                continue

            def move(w: Tensor, name: str = name) -> Tensor:
                return self.chart.move(name, w)

            point, da = jvp(move, u[at], a[at])
            db = jvp(move, u[at], b[at])[1]
            inner = base_inner(space.manifold, point, da, db)
            total = total + space.mass.scalar * inner
        return total

    def base(self, u: Tensor, v: Tensor) -> Tensor:
        """Return the covector ``g0(D v, .)`` of the massed base metric."""
        return torch.func.grad(lambda a: self.base_form(u, a, v))(torch.zeros_like(v))

    def product(self, u: Tensor, v: Tensor) -> Tensor:
        """Return ``G(u) v``. Implements :eq:`layer-metric` in coordinates.

        Args:
            u: coordinates.
            v: velocity of the coordinates.

        Returns:
            A covector, ``(size,)``, differentiable in both arguments.
        """
        return self.base(u, v) + self.pullback(u, v)

    # --- private

    def _weight(self, outputs: Tensor, metric: OutputMetric) -> float:
        return 1.0 / metric.terms(outputs) if self._reduction == "mean" else 1.0

    def _run(self, u: Tensor) -> OutputLike:
        values = self.chart.point(u)
        with DifferentiableTwice():
            found: OutputLike = torch.func.functional_call(
                self._model, values, self._inputs
            )
        return found

    def _heads(self, outputs: OutputLike) -> list[Head]:
        return pair(self._output, outputs)

    def _like(self, z: Tensors) -> list[Head]:
        if isinstance(self._output, Mapping):
            return self._heads(dict(zip(self._output, z, strict=True)))
        return self._heads(z if isinstance(self._output, Sequence) else z[0])

    def _mask(self, members: Sequence[str]) -> Tensor:
        mask = self.chart.zeros()
        for name in members:
            mask[self.chart.slices[name]] = 1.0
        return mask


def dot(a: Tensors, b: Tensors) -> Tensor:
    """Return the sum over all heads of ``<a, b>``."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
