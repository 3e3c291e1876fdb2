"""The Euclidean output metric: least squares."""

import math
from typing import final

import torch
from torch import Tensor

from riemannian_modules.errors import OutputMetricError
from riemannian_modules.output.base import OutputMetric
from riemannian_modules.output.rows import divide

__all__ = ["Euclidean"]


@final
class Euclidean(OutputMetric):
    """The metric ``scale * I`` on outputs of any shape ``(n, *output)``.

    It is the Gauss-Newton matrix of ``scale * |z - t|^2 / 2`` for each example, and
    its whitened residual is ``sqrt(scale) (z - t)``. :meth:`terms` is n. The Gauss-
    Newton matrix of a torch loss, for outputs with d entries an example:

    - ``((z - t) ** 2).flatten(1).sum(1).mean() / 2``: ``scale=1``;
    - ``F.mse_loss(z, t, reduction="mean")``, which divides by ``n * d`` and has no
      half: ``scale=2 / d``;
    - ``F.mse_loss(z, t, reduction="sum")``: ``scale=2``.

    The factor has rank d and is an expanded view. The rest of :meth:`whiten` is zero.

    Args:
        scale: weight of the squared distance, positive and finite.

    Raises:
        OutputMetricError: a scale that is not positive and finite.

    Example:
        >>> metric = Euclidean(scale=4.0)
        >>> metric.factor(torch.zeros(1, 2))
        tensor([[[2., 0.],
                 [0., 2.]]])
        >>> metric.whiten(torch.zeros(1, 2), torch.tensor([[4.0, 8.0]]))[0]
        tensor([[2., 4.]])
    """

    def __init__(self, scale: float = 1.0) -> None:
        if not 0.0 < scale < math.inf:
            raise OutputMetricError(
                f"Euclidean(scale={scale}): the scale must be positive and finite"
            )
        self.scale = float(scale)

    def factor(self, outputs: Tensor) -> Tensor:
        """Return ``sqrt(scale) I``, ``(n, d, *output)``; see the base class."""
        self.validate(outputs)
        n, output = outputs.shape[0], outputs.shape[1:]
        d = output.numel()
        root = torch.eye(d, dtype=outputs.dtype, device=outputs.device)
        root = root if self.scale == 1.0 else root * math.sqrt(self.scale)
        return root.view(d, *output).expand(n, d, *output)

    def row_count(self, outputs: Tensor) -> int:
        """Return the number of entries of an output."""
        return outputs.shape[1:].numel()

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return ``scale * velocity``; see the base class."""
        self.validate(outputs)
        return self.scale * velocity

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``cotangent / sqrt(scale)`` and zero; see the base class."""
        self.validate_cotangent(outputs, cotangent)
        return divide(cotangent.detach(), outputs.new_full((), math.sqrt(self.scale)))

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw rows ``+-sqrt(scale)``, ``(n, probes, *output)``; see the base class."""
        self.validate(outputs)
        signs = torch.empty(
            outputs.shape[0],
            probes,
            *outputs.shape[1:],
            dtype=outputs.dtype,
            device=outputs.device,
        ).bernoulli_(0.5, generator=generator)
        return (2.0 * signs - 1.0) * math.sqrt(self.scale)

    def extra_repr(self) -> str:
        """Return the arguments that the representation shows."""
        return f"scale={self.scale:g}"
