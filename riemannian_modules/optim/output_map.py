"""The derivative of a model's outputs by its parameters, as products both ways."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from riemannian_modules.errors import (
    LinearizationError,
    NotRecordedError,
    OutputMetricError,
)
from riemannian_modules.heads import (
    OutputLike,
    OutputMetricLike,
    Reduction,
    pair,
)
from riemannian_modules.output import OutputMetric
from riemannian_modules.precision import wide_dot

__all__ = ["OutputMap"]

Velocities = list[Tensor]


class OutputMap:
    """The linear map J of an evaluated model, and the exact output metric H.

    The graph of the outputs is differentiated once, by reverse mode twice, and then
    serves any number of products. J itself is never formed, so that the outputs may
    have any number of entries. Everything is without the weights of a loss but H,
    which holds ``1/n`` where the loss is a mean.

    Args:
        tensors: the parameters, by name.
        output: the output metric; of a sampled one the metric that it samples.
        outputs: what the model gave, with their graph.
        reduction: how the loss sums over examples.

    Cost: one reverse pass here; about two forward passes' products for ``J u`` and two
    for ``J^T v``. The operations of the model must be twice differentiable.

    Raises:
        NotRecordedError: no graph leads from the outputs to any parameter.
        OutputMetricError: an output has no metric.

    >>> from riemannian_modules.output import Euclidean
    >>> x, w = torch.tensor([[1.0, 2.0]]), torch.ones(1, 2, requires_grad=True)
    >>> map = OutputMap({"w": w}, Euclidean(2.0), x @ w.mT, "mean")
    >>> map.push({"w": torch.ones(1, 2)})
    [tensor([[3.]])]
    >>> map.pull([torch.ones(1, 1)])
    {'w': tensor([[1., 2.]])}
    """

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        output: OutputMetricLike,
        outputs: OutputLike,
        reduction: Reduction,
    ) -> None:
        self._tensors = {name: t for name, t in tensors.items() if t.requires_grad}
        heads = pair(output, outputs)
        self._metrics = [_required(metric) for _, metric in heads]
        self.outputs = [z for z, _ in heads]
        self._values = [z.detach() for z in self.outputs]
        self._weights = [
            1.0 / metric.terms(z) if reduction == "mean" else 1.0
            for z, metric in zip(self._values, self._metrics, strict=True)
        ]
        if not any(z.requires_grad for z in self.outputs):
            raise _unreachable()
        with torch.enable_grad():
            # J^T s is linear in s, so its derivative by s is J, whatever s.
            self._seeds = [torch.zeros_like(z).requires_grad_() for z in self._values]
            with _differentiable_twice():
                pulled = self._transposed(self._seeds, create_graph=True)
        self._pulled = {n: g for n, g in pulled.items() if g is not None}
        if not self._pulled:
            raise _unreachable()

    def _transposed(
        self, v: Sequence[Tensor], *, create_graph: bool
    ) -> dict[str, Tensor | None]:
        reached = [i for i, z in enumerate(self.outputs) if z.requires_grad]
        found = torch.autograd.grad(
            [self.outputs[i] for i in reached],
            list(self._tensors.values()),
            [v[i] for i in reached],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
        return dict(zip(self._tensors, found, strict=True))

    def pull(self, v: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the covectors ``J^T v`` of all parameters.

        Args:
            v: a cotangent for each output.
        """
        with torch.enable_grad():
            found = self._transposed(v, create_graph=False)
        return {
            name: torch.zeros_like(self._tensors[name]).as_subclass(Tensor)
            if covector is None
            else covector.as_subclass(Tensor)
            for name, covector in found.items()
        }

    def push(self, u: Mapping[str, Tensor]) -> Velocities:
        """Return ``J u``, the velocity of each output.

        Args:
            u: tangent vectors by parameter name.
        """
        linear = [n for n, g in self._pulled.items() if g.requires_grad]
        if not linear:
            return [torch.zeros_like(z) for z in self._values]
        with torch.enable_grad(), _differentiable_twice():
            found = torch.autograd.grad(
                [self._pulled[name] for name in linear],
                self._seeds,
                [u[name] for name in linear],
                retain_graph=True,
                allow_unused=True,
            )
        return [
            torch.zeros_like(z) if velocity is None else velocity.detach()
            for z, velocity in zip(self._values, found, strict=True)
        ]

    def lower(self, velocities: Sequence[Tensor]) -> Velocities:
        """Return ``H v``, the cotangent of each output's velocity."""
        with torch.no_grad():
            return [
                metric.apply(z, v).mul(weight)
                for z, v, metric, weight in zip(
                    self._values,
                    velocities,
                    self._metrics,
                    self._weights,
                    strict=True,
                )
            ]

    def pairing(self, velocities: Sequence[Tensor], lowered: Sequence[Tensor]) -> float:
        """Return ``v^T w``, in float64, for velocities v and cotangents w."""
        pairs = zip(velocities, lowered, strict=True)
        return sum(float(wide_dot(a, b)) for a, b in pairs)

    def total(self, value: float) -> float:
        """Return what a number of these examples is for all: the same."""
        return value

    @property
    def terms(self) -> list[float]:
        """Number of terms of each output's loss."""
        pairs = zip(self._values, self._metrics, strict=True)
        return [metric.terms(value) for value, metric in pairs]


@contextmanager
def _differentiable_twice() -> Iterator[None]:
    """Say in words of this library that an operation has no second derivative.

    Raises:
        LinearizationError: it has none.
        RuntimeError: any other error of torch, as it is.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError) as error:
        if "derivative for" not in str(error):
            raise
        raise LinearizationError(
            f"an operation of the model has no second derivative ({error}); for "
            "attention evaluate the model inside "
            "torch.nn.attention.sdpa_kernel(SDPBackend.MATH)"
        ) from error


def _required(metric: OutputMetric | None) -> OutputMetric:
    if metric is None:
        raise OutputMetricError(
            "an output has no metric, so that the quadratic model of the loss has no "
            "second-order term; give the model's metric an output metric"
        )
    return metric


def _unreachable() -> NotRecordedError:
    return NotRecordedError(
        "no graph leads from these outputs to a parameter: hand on a function that "
        "evaluates the model, without torch.no_grad() and without detach(); values of "
        "a FunctionalMetric have no graph"
    )
