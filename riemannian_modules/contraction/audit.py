"""A table of what is known about the stability of a trained model."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from riemannian_modules.contraction.bound import Bound, Order
from riemannian_modules.contraction.constants import (
    Constant,
    ConstantLike,
    as_rate,
)
from riemannian_modules.contraction.curvature import frozen_curvature
from riemannian_modules.contraction.data_metric import (
    metric_sampling_bound,
    stability_bound_data_metric,
)
from riemannian_modules.contraction.estimates import (
    loss_lipschitz,
    mass_constant,
    sensitivity,
)
from riemannian_modules.contraction.generalization import (
    generalization_gap,
    paper_order,
)
from riemannian_modules.contraction.stability import stability_bound
from riemannian_modules.errors import ContractionError
from riemannian_modules.heads import OutputMetricLike
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.mass import MassLike

__all__ = ["Audit", "audit"]


@dataclass(frozen=True)
class Audit:
    """Constants and bounds of one model on its data; ``print`` shows a table.

    Attributes:
        n: Number of training examples.
        constants: What the bounds rest on.
        bounds: The bounds by name.
        order: The order of the paper's abstract; None for a rate that is not positive.
    """

    n: int
    constants: tuple[Constant, ...]
    bounds: dict[str, Bound]
    order: Order | None

    def __getitem__(self, name: str) -> Bound:
        return self.bounds[name]

    def __str__(self) -> str:
        rows = [("quantity", "value", "kind", "verdict", "what")]
        for c in self.constants:
            what = f"{c.meaning}, {c.where}"
            rows.append((c.symbol, f"{c.value:.4g}", str(c.side), str(c.verdict), what))
        for name, b in self.bounds.items():
            what = b.what + ("" if not b.vacuous else " (vacuous)")
            rows.append((name, f"{b.value:.4g}", str(b.side), str(b.verdict), what))
        if self.order is not None:
            kind, verdict = "order only", str(self.order.verdict)
            number = f"{self.order.value:.4g}"
            rows.append(("order", number, kind, verdict, self.order.formula))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            "  ".join(
                [*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[4]]
            )
            for row in rows
        ]
        assumed = {each for b in self.bounds.values() for each in b.assumptions}
        notes = [f"assumes: {each}" for each in sorted(assumed)]
        title = f"Stability with n = {self.n} training examples"
        return "\n".join([title, lines[0], "-" * len(lines[0]), *lines[1:], *notes])


def audit(
    metric_or_model: LayerwiseMetric | nn.Module,
    inputs: Tensor,
    targets: Tensor,
    loss: Callable[[Tensor, Tensor], Tensor],
    *,
    output: OutputMetricLike = None,
    mass: MassLike = 1e-2,
    rate: ConstantLike | None = None,
    weight_decay: float = 0.0,
    t: float | None = None,
    loss_bound: float | None = None,
    delta: float = 0.05,
    region: str | None = None,
) -> Audit:
    """Estimate the constants of every stability bound and evaluate the bounds.

    One pass is recorded on the data, which renews the metric; ``.grad`` is put back as
    it was.

    Args:
        metric_or_model: A metric, or a model to build one for.
        inputs: Training inputs, ``(n, *input)``.
        targets: Training targets.
        loss: ``loss(outputs, targets)``: the mean over the examples.
        output: Output metric, if a model is given.
        mass: Its mass, if a model is given.
        rate: Rate of contraction; None: by :func:`frozen_curvature`, which needs a
            small model of Euclidean parameters.
        weight_decay: Decoupled weight decay of the training; adds to the rate that is
            computed here.
        t: Training time: steps times step length; None: any time.
        loss_bound: Largest value of the loss, for the gap with a probability.
        delta: Probability with which that may fail.
        region: Where the caller says that all constants hold; without it everything
            that was measured is evidence.

    Returns:
        The table.

    Raises:
        ContractionError: A model without an output metric, a sum of losses, or no rate.

    Example:
        >>> import torch, riemannian_modules as rm
        >>> _ = torch.manual_seed(0)
        >>> model = torch.nn.Linear(2, 1, dtype=torch.float64)
        >>> x = torch.randn(20, 2, dtype=torch.float64)
        >>> half_square = lambda z, y: 0.5 * (z - y).square().mean()
        >>> metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
        >>> found = audit(metric, x, x.sum(1, keepdim=True), half_square)
        >>> str(found["stability"].verdict), sorted(found.bounds)
        ('evidence', ['gap', 'sampled metric', 'stability', 'stability, data metric'])
    """
    metric = _metric(metric_or_model, output, mass)
    before = {d.name: d.tensor.grad for d in metric.parameters}
    with metric.record():
        outputs = metric.model(inputs)
    metric.backward(loss(outputs, targets), outputs)
    for declared in metric.parameters:
        declared.tensor.grad = before[declared.name]
    if rate is None:
        rate, _ = frozen_curvature(
            metric, inputs, targets, loss, weight_decay=weight_decay
        )
    speed = as_rate(rate)
    n, slope, mu = len(inputs), loss_lipschitz(metric), mass_constant(metric)
    steep = sensitivity(metric)
    whole = sensitivity(metric, norm="frobenius")
    bounds = {
        "stability": stability_bound(slope, speed, n, t, region=region),
        "stability, data metric": stability_bound_data_metric(
            slope, speed, n, kappa=steep, mu=mu, t=t, region=region
        ),
        "sampled metric": metric_sampling_bound(
            slope, speed, n, kappa=whole, mu=mu, delta=delta, region=region
        ),
    }
    beta = bounds["stability, data metric"]
    bounds["gap"] = generalization_gap(beta, n, loss_bound=loss_bound)
    if loss_bound is not None:
        bounds[f"gap, {1 - delta:.0%}"] = generalization_gap(
            beta, n, loss_bound=loss_bound, delta=delta
        )
    order = None
    if speed.value > 0 and steep.value > 0 and slope.value > 0:
        order = paper_order(steep.value, slope.value, speed.value, mu.value, n)
    return Audit(n, (slope, steep, mu, speed), bounds, order)


def _metric(
    given: LayerwiseMetric | nn.Module, output: OutputMetricLike, mass: MassLike
) -> LayerwiseMetric:
    if isinstance(given, LayerwiseMetric):
        return given
    if output is None:
        raise ContractionError("a model needs output=, the metric on its outputs")
    return LayerwiseMetric(given, output, mass=mass)
