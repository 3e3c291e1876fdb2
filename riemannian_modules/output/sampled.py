"""Random rows in the place of all rows: cheap, unbiased, with the gradient kept."""

import math
from numbers import Integral
from typing import Literal, final

import torch
from torch import Tensor

from riemannian_modules.errors import OutputMetricError
from riemannian_modules.output.base import OutputMetric

__all__ = ["Sampled"]


@final
class Sampled(OutputMetric):
    r"""Random rows whose ``L^T L`` is that of a metric on average.

    Likelihoods give the score of a target that is drawn from the model's own
    prediction (the sampled Fisher metric: ``e_t - p`` for a softmax), the other
    metrics random combinations of their exact rows; either is divided by
    ``sqrt(probes)``.

    **The gradient keeps a row.** A loss's cotangent is no combination of random rows,
    and a solve multiplies what they leave of it by one over the mass: steps with a
    small mass diverge. So a backward pass takes the rows ``S L`` with

        ``S = [u; z_1 (1 - u u^T) / sqrt(probes); ...]``,  ``u = y / |y|``,

    where y is the whitened residual of the loss, ``L^T y = d loss``, and z are the
    whitened random rows. The first row is the cotangent divided by ``|y|``; the others
    lose what they have in common with it. Then ``E[S^T S] = 1`` as before, and the
    gradient is ``|y|`` times the first row, for the form of the solve that loses
    nothing however small the mass. Implements :eq:`sampled-rows`.

    The rank is ``probes + 1`` for each example, or for the whole batch, in the place
    of, say, ``C - 1`` for each example. The inverse of a sampled metric is larger than
    that of the exact one on average (Jensen's inequality): steps are longer, and a
    mass or a smaller learning rate has to compensate. See :doc:`rows`.

    Args:
        metric: the metric to sample.
        probes: random rows for each example (or batch), at least 1; 0 with
            ``gradient_rows``: the gradient's rows alone, the cheapest.
        generator: source of randomness on the device of the outputs; None takes
            torch's global one. Every call of :meth:`factor` draws anew.
        per: ``"example"``: every example has rows of its own, the rank grows with
            the batch. ``"batch"``: a row is the sum of one random row of every
            example, so that the rank does not depend on the batch; rows are stored,
            one number for each parameter.
        gradient_rows: whether a backward pass adds the row of the gradient.

    Raises:
        OutputMetricError: a metric that is sampled already or none at all, fewer
            rows than one, or an unknown ``per``.

    Example:
        >>> from riemannian_modules.output import Categorical
        >>> metric = Sampled(Categorical(), probes=2)
        >>> logits = torch.zeros(3, 10)
        >>> metric.factor(logits).shape
        torch.Size([3, 2, 10])
        >>> cotangent = logits.softmax(-1) - torch.eye(10)[:3]
        >>> rows, y, rest = metric.split(logits, cotangent)
        >>> rows.shape, y[0]
        (torch.Size([3, 3, 10]), tensor([3., 0., 0.]))
        >>> metric
        Sampled(Categorical(), probes=2)
    """

    def __init__(
        self,
        metric: OutputMetric,
        probes: int = 1,
        generator: torch.Generator | None = None,
        *,
        per: Literal["example", "batch"] = "example",
        gradient_rows: bool = True,
    ) -> None:
        if not isinstance(metric, OutputMetric) or isinstance(metric, Sampled):
            raise OutputMetricError(
                f"Sampled needs an exact output metric to draw rows of, got {metric!r}"
            )
        least = 0 if gradient_rows else 1
        if not isinstance(probes, int | Integral) or probes < least:
            raise OutputMetricError(
                f"Sampled({metric!r}, probes={probes}): at least one probe is needed, "
                "a whole number, or none with gradient_rows=True"
            )
        if per not in ("example", "batch"):
            raise OutputMetricError(f"per={per!r}; choose 'example' or 'batch'")
        self.metric = metric
        self.probes = probes
        self.generator = generator
        self.per = per
        self.gradient_rows = gradient_rows
        self.joint = per == "batch"
        self.leads = gradient_rows

    def factor(self, outputs: Tensor) -> Tensor:
        """Draw rows ``(n, probes, *output)``, anew at every call.

        Args:
            outputs: ``(n, *output)``.

        Returns:
            The random rows; with ``per="batch"`` their sums over the examples count.

        Raises:
            OutputMetricError: ``probes=0``, which has rows for a loss only.
        """
        if self.probes == 0:
            raise OutputMetricError(
                f"{self!r} has the row of a gradient alone, and there is none; use "
                "metric.backward(loss, outputs) and a metric that whitens its "
                "cotangent, or probes=1"
            )
        rows = self.metric.sample(outputs, self.probes, self.generator)
        return rows if self.probes == 1 else rows / math.sqrt(self.probes)

    def row_count(self, outputs: Tensor) -> int:
        """Return the number of probes; :meth:`split` may add a row."""
        return self.probes

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return ``G_o velocity`` of the metric itself, which needs no draw."""
        return self.metric.apply(outputs, velocity)

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[None, Tensor]:
        """Return None and the cotangent: random rows alone do not explain it."""
        self.validate_cotangent(outputs, cotangent)
        return None, cotangent.detach()

    def split(
        self, outputs: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Draw the rows of a backward pass; see the class.

        Args:
            outputs: ``(n, *output)``.
            cotangent: derivative of a loss, of the shape of ``outputs``.

        Returns:
            Rows ``(n, 1 + probes, *output)``, the gradient's first; ``y`` of shape
            ``(n, 1 + probes)`` (``(1 + probes,)`` for the whole batch), which is zero
            but for the gradient's row; and what the metric itself leaves of the
            cotangent. Cost: one :meth:`sharp` of the metric, or a whitening for the
            cotangent and for each probe.

        Raises:
            OutputMetricError: the metric whitens the cotangent, but not its own rows.
        """
        if not self.gradient_rows:
            return self.factor(outputs), *self.whiten(outputs, cotangent)
        v = cotangent.detach()
        w = self.metric.sharp(outputs, cotangent)
        if w is None:
            y, rest = self.metric.whiten(outputs, cotangent)
            if y is None:
                return self.factor(outputs), None, rest
            y = y.detach().double().reshape(len(y), -1)
            squares = y.square().sum(1)
        else:
            y, rest = None, torch.zeros_like(v)
            squares = (v.double() * w).flatten(1).sum(1)
        length = (squares.sum() if self.joint else squares).sqrt()
        # Of each example, or of the batch, in front of the shape of an output.
        places = [1] * (outputs.ndim - 1)
        # What is too long to be a number is no row, and the cotangent all rest.
        fits = length < torch.finfo(outputs.dtype).max ** 0.5
        length = torch.where(fits, length, 0.0)
        rest = torch.where(fits.view(-1, *places), rest, v)
        safe = torch.where(length > 0.0, length, 1.0).view(-1, *places)
        first = ((v - rest).double() / safe).unsqueeze(1)
        rows = [first]
        if self.probes:
            drawn = self.factor(outputs).double()
            if y is None:
                assert w is not None
                shared = (drawn * w.unsqueeze(1)).flatten(2).sum(2)
            else:
                shared = self._pairings(outputs, drawn, y)
            shared = shared.sum(0, keepdim=True) if self.joint else shared
            shared = torch.where(fits.view(-1, 1), shared, 0.0)
            common = shared.view(*shared.shape, *places) / safe.unsqueeze(1)
            rows.append(drawn - common * first)
        count = (1 + self.probes,) if self.joint else (len(v), 1 + self.probes)
        coordinates = outputs.new_zeros(count)
        coordinates[..., 0] = length
        return torch.cat(rows, 1).to(outputs.dtype), coordinates, rest

    def _pairings(self, outputs: Tensor, drawn: Tensor, y: Tensor) -> Tensor:
        """Return ``<z, y>`` for the whitened z of random rows, ``(n, probes)``.

        Raises:
            OutputMetricError: the metric does not whiten them.
        """
        found = []
        for row in drawn.unbind(1):
            z, _ = self.metric.whiten(outputs, row.to(outputs.dtype))
            if z is None:
                raise OutputMetricError(
                    f"{self.metric!r}.whiten explains the cotangent of the loss but "
                    "not its own random rows; return y for both, or for neither"
                )
            found.append((z.double().reshape(len(y), -1) * y).sum(1))
        return torch.stack(found, 1)

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw rows of the metric underneath; see the base class."""
        return self.metric.sample(outputs, probes, generator)

    def terms(self, outputs: Tensor) -> float:
        """Return what the metric underneath returns."""
        return self.metric.terms(outputs)

    def validate(self, outputs: Tensor) -> None:
        """Check the outputs as the metric underneath does."""
        self.metric.validate(outputs)

    def require_order(self, outputs: Tensor, cotangent: Tensor) -> None:
        """Check the order of the outputs as the metric underneath does."""
        self.metric.require_order(outputs, cotangent)

    def extra_repr(self) -> str:
        """Return the arguments that the representation shows."""
        per = "" if self.per == "example" else f", per={self.per!r}"
        rows = "" if self.gradient_rows else ", gradient_rows=False"
        return f"{self.metric!r}, probes={self.probes}{per}{rows}"
