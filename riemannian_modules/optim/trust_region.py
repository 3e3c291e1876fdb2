"""Steps that stay where the quadratic model has kept its word."""

import math
from collections.abc import Callable
from typing import Any

import torch

from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.kinds import require_kinds
from riemannian_modules.optim.quadratic import QuadraticModel
from riemannian_modules.optim.trial import Trial
from riemannian_modules.optim.trial_reports import TrustRegionReport
from riemannian_modules.optim.whole_model import WholeModelOptimizer
from riemannian_modules.retractions import Retraction

__all__ = ["TrustRegion"]

_EDGE = 0.99
# A decrease that can be told from rounding of the loss, in units of that.
_SEEN = 64.0


class TrustRegion(WholeModelOptimizer):
    """Natural-gradient steps no longer in the metric than a radius that adapts.

    Implements :eq:`trust-region`. The step along the natural gradient minimises the
    quadratic model, all blocks together and with the mass, as far as its norm in the
    metric stays below the radius. The ratio of actual and predicted decrease moves the
    radius (Conn, Gould & Toint, 2000, section 6.1). The mass stays as it is; where it
    should adapt, :class:`LevenbergMarquardt` is the choice.

    Args:
        metric: the model's geometry.
        radius: bound of the first step's norm; None: ``largest`` bounds it, and its
            length is the first radius. A radius that the search has found is widened
            where no decrease of the loss could be told from rounding within it.
        largest: no step and no radius is longer.
        good: ratio above which a step that was bounded makes the radius grow.
        bad: ratio below which the radius shrinks.
        accept: ratio above which a step is taken; at least 0 and at most ``bad``.
        grow: factor of the radius after a good bounded step.
        shrink: the radius after a bad step, in lengths of that step; in (0, 1).
        trials: how many points to try before the step is given up.
        retraction: how a tangent step becomes a point.
        lr: refused: there is no learning rate.

    Attributes:
        report: what the last step did, a :class:`TrustRegionReport`; None before it.

    Cost: the solve of the metric, a product with K, and a forward pass for each point
    tried. It reads the loss, so the host waits for the device.

    Raises:
        ValueError: a hyperparameter out of its range.
        TypeError: no metric, or a retraction that is none.

    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 1)
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(2.0), mass=1e-3)
    >>> optimizer = TrustRegion(metric, radius=0.1)
    >>> x = torch.randn(20, 3)
    >>> for _ in range(20):
    ...     with metric.record():
    ...         outputs = model(x)
    ...     metric.backward((outputs - 1.0).square().mean(), outputs)
    ...     final = optimizer.step(lambda: (model(x) - 1.0).square().mean())
    >>> final < 1e-5
    True
    """

    def __init__(
        self,
        metric: ModelMetric,
        *,
        radius: float | None = None,
        largest: float = math.inf,
        good: float = 0.75,
        bad: float = 0.25,
        accept: float = 1e-4,
        grow: float = 2.0,
        shrink: float = 0.25,
        trials: int = 12,
        retraction: Retraction | None = None,
        lr: None = None,
    ) -> None:
        require_kinds("TrustRegion(metric)", metric, retraction, lr)
        if not (0.0 <= accept <= bad < good < 1.0 and trials >= 1):
            raise ValueError(
                f"accept={accept}, bad={bad}, good={good}, trials={trials}: needs "
                "0 <= accept <= bad < good < 1 and at least one trial"
            )
        if not (0.0 < shrink < 1.0 <= grow and largest > 0.0):
            raise ValueError(
                f"shrink={shrink}, grow={grow}, largest={largest}: needs "
                "0 < shrink < 1 <= grow and a positive bound"
            )
        if radius is not None and not 0.0 < radius <= largest:
            raise ValueError(
                f"radius={radius}: must be positive and at most largest={largest}"
            )
        self.report: TrustRegionReport | None = None
        defaults = {
            "radius": radius,
            "largest": largest,
            "good": good,
            "bad": bad,
            "accept": accept,
            "grow": grow,
            "shrink": shrink,
            "trials": trials,
        }
        super().__init__(metric, retraction, defaults)

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *others: object
    ) -> float:
        """Take one step from the last ``metric.backward``.

        If no step is good enough, or an error is raised, the parameters are what they
        were, bit for bit.

        Args:
            closure: returns the loss of the last backward pass at the parameters'
                present values; called without gradients, once for each trial.
            *others: refused.

        Returns:
            The loss at the new point.

        Raises:
            NotRecordedError: no ``metric.backward`` since the last step.
            NonFiniteError: the gradient, or the step that it makes, is not finite.
            NotPositiveDefiniteError: a block's small matrix could not be factorised.
            TypeError: no closure.
        """
        evaluate, loss = self._begin(closure, *others)
        trial = Trial(self._moving(), self.retraction)
        with torch.no_grad(), trial.undone():
            self.report = self._search(trial, evaluate, loss)
        self._stepped = self.metric.passes
        return self.report.new_loss

    def _search(
        self, trial: Trial, closure: Callable[[], Any], loss: float
    ) -> TrustRegionReport:
        group, moving = self.param_groups[0], trial.moving
        gradient = self._gradient(moving)
        model = QuadraticModel(self.metric, gradient)
        best = model.best([self._descent(moving)])
        slope = model.slope(best.vectors)
        # At the minimum along a line half the slope is gained, with the mass.
        whole = math.sqrt(max(0.0, -slope))
        curvature = max(0.0, -2.0 * (best.decrease + slope))
        radius = group["radius"]
        if radius is not None and radius == group.get("found") and slope < 0.0:
            # A decrease of rounding errors says nothing, so no radius is that short.
            assert self.metric.loss is not None
            eps = torch.finfo(self.metric.loss.dtype).eps
            radius = max(radius, min(1.0, _SEEN * eps * abs(loss) / -slope) * whole)
        taken, count = False, 0
        while count < group["trials"] and not taken:
            count += 1
            bound = min(math.inf if radius is None else radius, group["largest"])
            part = 1.0 if whole <= bound else bound / whole
            predicted = -part * slope - 0.5 * part * part * curvature
            step = {name: part * x for name, x in best.vectors.items()}
            trial.move(step)
            reached = self._joint(trial, closure)
            gain = loss - reached
            ratio = gain / predicted if predicted > 0.0 else math.nan
            norm = part * whole
            taken = math.isfinite(reached) and gain > 0.0 and ratio > group["accept"]
            if not (taken and ratio >= group["bad"]):
                radius = group["shrink"] * norm
            elif radius is None:
                radius = norm
            elif ratio > group["good"] and norm >= _EDGE * radius:
                radius = group["grow"] * radius
            if whole == 0.0:
                radius = group["radius"]
                break
            radius = min(radius, group["largest"])
        if taken:
            group["proved"] = radius
        else:
            trial.restore()
            if whole > 0.0 and self._hopeless(step):
                # As at the minimum: what comes next has the radius that served last.
                radius = group.get("proved", self.defaults["radius"])
        if radius != group["radius"]:
            given = radius == self.defaults["radius"]
            group["radius"], group["found"] = radius, None if given else radius
        return TrustRegionReport(
            loss,
            reached if taken else loss,
            predicted,
            ratio,
            norm,
            group["largest"] if radius is None else radius,
            part == 1.0,
            count,
            taken,
        )
