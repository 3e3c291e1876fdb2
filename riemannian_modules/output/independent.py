"""Likelihoods whose entries are independent and have one natural parameter each."""

from typing import final

import torch
import torch.nn.functional as F
from torch import Tensor

from riemannian_modules.output.base import OutputMetric
from riemannian_modules.output.rows import diagonal_rows, divide

__all__ = ["Bernoulli", "Poisson"]


@final
class Bernoulli(OutputMetric):
    """Fisher metric ``diag(p (1 - p))`` of independent coins, for logits of any shape.

    The whitened residual of the log loss is ``(p - t) / sqrt(p (1 - p))``. The factor
    is computed in the log domain: ``sqrt(p (1 - p))`` is exact where p itself rounds
    to 0 or 1. Where it underflows (logits beyond 174 in float32, 1416 in float64)
    the cotangent is in the rest.

    :meth:`terms` counts every entry, because
    ``F.binary_cross_entropy_with_logits(..., reduction="mean")`` divides by that.
    The factor has as many rows as an output has entries.

    Example:
        >>> logits = torch.zeros(1, 2)
        >>> Bernoulli().factor(logits)
        tensor([[[0.5000, 0.0000],
                 [0.0000, 0.5000]]])
        >>> Bernoulli().whiten(logits, torch.tensor([[0.5, -0.5]]))[0]
        tensor([[ 1., -1.]])
    """

    def factor(self, outputs: Tensor) -> Tensor:
        """Return ``diag(sqrt(p (1 - p)))``, ``(n, d, *output)``; see the base class."""
        self.validate(outputs)
        return diagonal_rows(_coin_deviation(outputs.detach()))

    def row_count(self, outputs: Tensor) -> int:
        """Return the number of entries of an output."""
        return outputs.shape[1:].numel()

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return ``p (1 - p) velocity``; see the base class."""
        self.validate(outputs)
        return _coin_deviation(outputs).square() * velocity

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``cotangent / sqrt(p (1 - p))`` and the rest; see the base class."""
        self.validate_cotangent(outputs, cotangent)
        return divide(cotangent.detach(), _coin_deviation(outputs.detach()))

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw scores ``t - p`` with ``t ~ Bernoulli(p)``; see the base class."""
        self.validate(outputs)
        p = _repeat(outputs.detach().sigmoid(), probes)
        return torch.bernoulli(p, generator=generator) - p

    def terms(self, outputs: Tensor) -> int:
        """Return the number of all entries."""
        return outputs.numel()


@final
class Poisson(OutputMetric):
    """Fisher metric ``diag(e^z)`` of independent counts, for log rates z of any shape.

    The whitened residual of the negative log-likelihood ``e^z - t z`` is
    ``e^(z/2) - t e^(-z/2)``. The factor leaves the range of its dtype after the
    likelihood does: it is finite up to z = 177 in float32 and 1419 in float64.

    :meth:`terms` counts every entry, because ``F.poisson_nll_loss(z, t,
    log_input=True, reduction="mean")`` divides by that. The factor has as many rows
    as an output has entries.

    Example:
        >>> log_rates = torch.tensor([[0.0, 4.0]]).exp().log()
        >>> Poisson().factor(log_rates).diagonal(dim1=1, dim2=2)
        tensor([[1.0000, 7.3891]])
    """

    def factor(self, outputs: Tensor) -> Tensor:
        """Return ``diag(e^(z/2))``, ``(n, d, *output)``; see the base class."""
        self.validate(outputs)
        return diagonal_rows((0.5 * outputs.detach()).exp())

    def row_count(self, outputs: Tensor) -> int:
        """Return the number of entries of an output."""
        return outputs.shape[1:].numel()

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return ``e^z velocity``; see the base class."""
        self.validate(outputs)
        return outputs.exp() * velocity

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``cotangent / e^(z/2)`` and the rest; see the base class."""
        self.validate_cotangent(outputs, cotangent)
        return divide(cotangent.detach(), (0.5 * outputs.detach()).exp())

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw scores ``t - e^z`` with ``t ~ Poisson(e^z)``; see the base class.

        Above a rate of 1e6 the count is drawn from the normal of the same variance,
        which keeps the rows unbiased and the difference ``t - e^z`` accurate.
        """
        self.validate(outputs)
        rate = _repeat(outputs.detach().exp(), probes)
        small = torch.poisson(rate.clamp(max=1e6), generator=generator) - rate
        normal = torch.empty_like(rate).normal_(generator=generator)
        large = normal * _repeat((0.5 * outputs.detach()).exp(), probes)
        return torch.where(rate <= 1e6, small, large)

    def terms(self, outputs: Tensor) -> int:
        """Return the number of all entries."""
        return outputs.numel()


def _coin_deviation(logits: Tensor) -> Tensor:
    """Return ``sqrt(p (1 - p))`` for any logits that are finite."""
    magnitude = logits.abs()
    return (-0.5 * magnitude - F.softplus(-magnitude)).exp()


def _repeat(values: Tensor, probes: int) -> Tensor:
    shape = (values.shape[0], probes, *values.shape[1:])
    return values.unsqueeze(1).expand(shape).contiguous()
