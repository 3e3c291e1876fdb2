"""Random rows in the place of all rows: cheap, unbiased, without exact residual."""

import math
from typing import final

import torch
from torch import Tensor

from riemannian_modules.errors import OutputMetricError
from riemannian_modules.output.base import OutputMetric

__all__ = ["Sampled"]


@final
class Sampled(OutputMetric):
    """Random rows for each example whose ``L^T L`` is that of a metric on average.

    Likelihoods give the score of a target that is drawn from the model's own
    prediction (the sampled Fisher metric: ``e_t - p`` for a softmax), the other
    metrics random combinations of their exact rows; either is divided by
    ``sqrt(probes)``. Every example has its own independent probes. The rank is
    ``probes`` in the place of, say, ``C - 1``.

    A loss's cotangent is no combination of random rows, so :meth:`whiten` returns
    None and the cotangent. The inverse of a sampled metric is larger than that
    of the exact one on average (Jensen's inequality): steps are longer, and a mass or
    a smaller learning rate has to compensate.

    Args:
        metric: the metric to sample.
        probes: rows for each example, at least 1.
        generator: source of randomness on the device of the outputs; None takes
            torch's global one. Every call of :meth:`factor` draws anew.

    Raises:
        OutputMetricError: a metric that is sampled already or none at all, or fewer
            than one probe.

    Example:
        >>> from riemannian_modules.output import Categorical
        >>> metric = Sampled(Categorical(), probes=2)
        >>> metric.factor(torch.zeros(3, 10)).shape
        torch.Size([3, 2, 10])
        >>> metric
        Sampled(Categorical(), probes=2)
    """

    def __init__(
        self,
        metric: OutputMetric,
        probes: int = 1,
        generator: torch.Generator | None = None,
    ) -> None:
        if not isinstance(metric, OutputMetric) or isinstance(metric, Sampled):
            raise OutputMetricError(
                f"Sampled needs an exact output metric to draw rows of, got {metric!r}"
            )
        if probes < 1:
            raise OutputMetricError(
                f"Sampled({metric!r}, probes={probes}): at least one probe is needed"
            )
        self.metric = metric
        self.probes = probes
        self.generator = generator

    def factor(self, outputs: Tensor) -> Tensor:
        """Draw rows ``(n, probes, *output)``, anew at every call."""
        rows = self.metric.sample(outputs, self.probes, self.generator)
        return rows if self.probes == 1 else rows / math.sqrt(self.probes)

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[None, Tensor]:
        """Return None and the cotangent; see the class."""
        self.validate_cotangent(outputs, cotangent)
        return None, cotangent.detach()

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw rows of the metric underneath; see the base class."""
        return self.metric.sample(outputs, probes, generator)

    def terms(self, outputs: Tensor) -> int:
        """Return what the metric underneath returns."""
        return self.metric.terms(outputs)

    def validate(self, outputs: Tensor) -> None:
        """Check the outputs as the metric underneath does."""
        self.metric.validate(outputs)

    def extra_repr(self) -> str:
        """Return the arguments that the representation shows."""
        return f"{self.metric!r}, probes={self.probes}"
