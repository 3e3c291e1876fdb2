"""Terms of a loss that do not all count alike."""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from riemannian_modules.errors import OutputMetricError, ShapeError
from riemannian_modules.output.base import OutputMetric
from riemannian_modules.output.categorical import Categorical
from riemannian_modules.output.euclidean import Euclidean
from riemannian_modules.output.gaussian import Gaussian
from riemannian_modules.output.independent import Bernoulli, Poisson
from riemannian_modules.output.sampled import Sampled

__all__ = ["Weighted"]


@final
class Weighted(OutputMetric):
    """Another metric whose terms are weighted: class weights, masks, padding.

    The loss is ``sum_i w_i loss_i / sum_i w_i``, or for a sum of losses the numerator,
    and the metric ``w_i G_i`` for each term, so its rows are multiplied by the root of
    the weight. ``metric.backward(loss, outputs, weights=w)`` makes one for each batch.

    Args:
        metric: the metric.
        weights: not negative, ``(n,)``; or ``(n, *positions)`` where the metric treats
            positions apart; or of the shape of the outputs where it treats all entries
            apart (``Euclidean``, ``Bernoulli``, ``Poisson``).

    Raises:
        OutputMetricError: the weights are negative, infinite or NaN (looked at on the
            CPU only).

    >>> weighted = Weighted(Euclidean(), torch.tensor([4.0, 0.0]))
    >>> weighted.factor(torch.zeros(2, 1)).flatten()
    tensor([2., 0.])
    >>> weighted.terms(torch.zeros(2, 1))
    4.0
    """

    def __init__(self, metric: OutputMetric, weights: Tensor) -> None:
        self.metric = metric
        self.weights = weights.detach()
        self.joint, self.leads = metric.joint, metric.leads
        self._share = 1.0
        if weights.is_meta:
            return
        if weights.device.type == "cpu":
            known = bool(torch.isfinite(weights).all()) and bool((weights >= 0).all())
            if not known:
                raise OutputMetricError(
                    f"weights of shape {tuple(weights.shape)} hold negative numbers, "
                    "NaN or infinity; they are how much each term of the loss counts"
                )
        self._share = float(self.weights.double().mean()) if weights.numel() else 0.0

    @property
    def counts(self) -> bool:
        """Whether any weight is not zero."""
        return self._share > 0.0

    def _root(self, like: Tensor) -> Tensor:
        w = self.weights.to(like.device)
        root = w.to(torch.promote_types(w.dtype, like.dtype)).sqrt().to(like.dtype)
        return root.view(*w.shape, *[1] * (like.ndim - w.ndim))

    def _unweighted(self, cotangent: Tensor) -> Tensor:
        root = self._root(cotangent)
        return torch.where(root > 0.0, cotangent / root, 0.0)

    def _weighted(self, rows: Tensor, outputs: Tensor) -> Tensor:
        return rows * self._root(outputs).unsqueeze(1)

    def _rest(self, rest: Tensor, cotangent: Tensor) -> Tensor:
        root = self._root(cotangent)
        return torch.where(root > 0.0, rest * root, cotangent)

    def factor(self, outputs: Tensor) -> Tensor:
        """Return the rows, each times the root of its term's weight."""
        return self._weighted(self.metric.factor(outputs), outputs)

    def row_count(self, outputs: Tensor) -> int | None:
        """Return that of the metric."""
        return self.metric.row_count(outputs)

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return ``G_o velocity``."""
        root = self._root(outputs)
        return root * self.metric.apply(outputs, root * velocity)

    def whiten(
        self, outputs: Tensor, cotangent: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Split a cotangent as the metric does its own; see the base class."""
        self.validate_cotangent(outputs, cotangent)
        y, rest = self.metric.whiten(outputs, self._unweighted(cotangent))
        return y, self._rest(rest, cotangent)

    def split(
        self, outputs: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the rows of a backward pass as the metric does its own."""
        self.validate_cotangent(outputs, cotangent)
        rows, y, rest = self.metric.split(outputs, self._unweighted(cotangent))
        return self._weighted(rows, outputs), y, self._rest(rest, cotangent)

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw rows of the metric, weighted."""
        return self._weighted(self.metric.sample(outputs, probes, generator), outputs)

    def terms(self, outputs: Tensor) -> float:
        """Return the sum of the weights of all terms."""
        return max(self.metric.terms(outputs), self.weights.numel()) * self._share

    def validate(self, outputs: Tensor) -> None:
        """Check the outputs as the metric does, and that the weights fit them.

        Raises:
            ShapeError: they do not.
        """
        self.metric.validate(outputs)
        most, shape = _apart(self.metric)(outputs), tuple(self.weights.shape)
        if not 1 <= len(shape) <= most or shape != tuple(outputs.shape[: len(shape)]):
            fitting = " or ".join(
                str(tuple(outputs.shape[:count])) for count in range(1, most + 1)
            )
            raise ShapeError(
                f"weights of shape {shape} do not fit outputs of shape "
                f"{tuple(outputs.shape)} that {self.metric!r} measures: pass {fitting}"
            )

    def require_order(self, outputs: Tensor, cotangent: Tensor) -> None:
        """Check the order of the outputs as the metric does."""
        self.metric.require_order(outputs, cotangent)

    def extra_repr(self) -> str:
        """Return the arguments that the representation shows."""
        return f"{self.metric!r}, weights of shape {tuple(self.weights.shape)}"


def _apart(metric: OutputMetric) -> Callable[[Tensor], int]:
    """Return how many dimensions of outputs a metric treats apart."""
    while isinstance(metric, Sampled):
        metric = metric.metric
    if isinstance(metric, Euclidean | Bernoulli | Poisson):
        return lambda outputs: outputs.ndim
    if isinstance(metric, Categorical | Gaussian):
        return lambda outputs: outputs.ndim - 1
    return lambda outputs: 1
