"""Steps of a length, and in a metric of a mass, that the loss itself decides."""

import math
from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor

from riemannian_modules.declared import Declared
from riemannian_modules.functional import FunctionalMetric
from riemannian_modules.metric import LayerMetric
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.kinds import require_kinds
from riemannian_modules.optim.quadratic import QuadraticModel, Step
from riemannian_modules.optim.trial import Trial
from riemannian_modules.optim.trial_reports import TrialReport
from riemannian_modules.optim.weighing import WeighingOptimizer
from riemannian_modules.retractions import Retraction

__all__ = ["LevenbergMarquardt"]

_ROUNDING = 1e-3
# Of the differences that the second derivative along a step is taken from: what is left
# of a correction that is one per cent off is a correction (Transtrum & Sethna, 2012).
_SPACING = 0.1


class LevenbergMarquardt(WeighingOptimizer):
    """Gauss-Newton or natural-gradient steps without a learning rate.

    Each step asks the quadratic model of the last pass how far to go along the natural
    gradient and along the step before (Martens & Grosse, 2015, section 7), tries the
    point, and compares the decrease of the loss with what the model said. A good match
    lowers the mass, a bad one raises it, and a step that raises the loss is taken back
    and tried anew with more mass (Levenberg, 1944; Marquardt, 1963; Moré, 1978). So
    neither a step length nor a good first mass has to be found.

    The loss must be the same function in the step as in the backward pass before it:
    the same batch, no dropout. Meant for full batches and large ones.

    Args:
        metric: the model's geometry; with ``blocks="model"`` and exact rows the steps
            are those of Levenberg and Marquardt.
        momentum: whether the step before is a second direction; None: where there are
            several blocks. One block of exact rows leaves it nothing to improve.
        bend: whether to correct the step by the acceleration of the outputs (Transtrum
            & Sethna, 2012); None: where it can be had, with a
            :class:`riemannian_modules.functional.FunctionalMetric` of Euclidean
            parameters. It costs three evaluations and one more solve.
        shrink: factor of the mass after a good match, in (0, 1].
        grow: factor of the mass after a bad match, and its square after a step that
            raised the loss; at least 1.
        good: ratio of actual to predicted decrease above which a match is good.
        bad: ratio below which it is bad.
        trials: how many points to try before the step is given up.
        retraction: how a tangent step becomes a point.
        lr: refused: there is no learning rate.

    Attributes:
        report: what the last step did, a :class:`TrialReport`; None before the first.

    Cost: the solve of the metric, two products with K, and a forward pass for each
    point tried. It reads the loss, so the host waits for the device.

    Raises:
        ValueError: a hyperparameter out of its range.
        TypeError: the first argument is no metric, or the retraction none.

    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ... ).double()
    >>> x = torch.linspace(-2.0, 2.0, 30, dtype=torch.float64).unsqueeze(1)
    >>> metric = rm.LayerwiseMetric(
    ...     model, output=rm.output.Euclidean(2.0), mass=1.0, blocks="model"
    ... )
    >>> optimizer = LevenbergMarquardt(metric)
    >>> def loss():
    ...     return torch.nn.functional.mse_loss(model(x), x.sin())
    >>> for _ in range(30):
    ...     with metric.record():
    ...         outputs = model(x)
    ...     metric.backward(torch.nn.functional.mse_loss(outputs, x.sin()), outputs)
    ...     final = optimizer.step(loss)
    >>> final < 1e-4
    True
    """

    def __init__(
        self,
        metric: ModelMetric,
        *,
        momentum: bool | None = None,
        bend: bool | None = None,
        shrink: float = 1.0 / 3.0,
        grow: float = 2.0,
        good: float = 0.75,
        bad: float = 0.25,
        trials: int = 12,
        retraction: Retraction | None = None,
        lr: None = None,
    ) -> None:
        require_kinds("LevenbergMarquardt(metric)", metric, retraction, lr)
        if not (0.0 < shrink <= 1.0 <= grow and 0.0 < bad <= good and trials >= 1):
            raise ValueError(
                f"shrink={shrink}, grow={grow}, bad={bad}, good={good}, "
                f"trials={trials}: needs 0 < shrink <= 1 <= grow, 0 < bad <= good and "
                "at least one trial"
            )
        flat = all(
            isinstance(declared.manifold, geoopt.Euclidean)
            for declared in metric.parameters
        )
        bending = metric if isinstance(metric, FunctionalMetric) and flat else None
        if bend and bending is None:
            raise ValueError(
                "bend=True needs a FunctionalMetric and Euclidean parameters only: a "
                "straight line means nothing on a manifold, and a LayerwiseMetric "
                "does not know its inputs; leave bend=None"
            )
        self.report: TrialReport | None = None
        self._bending = None if bend is False else bending
        defaults = {
            "momentum": metric.several_blocks if momentum is None else momentum,
            "shrink": shrink,
            "grow": grow,
            "good": good,
            "bad": bad,
            "trials": trials,
            "scale": 1.0,
        }
        super().__init__(metric, retraction, defaults)

    def step(  # type: ignore[override]
        self, closure: Callable[[], Any] | None = None, *others: object
    ) -> float:
        """Take one step from the last ``metric.backward``.

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
        points = Trial(self._moving(), self.retraction)
        with torch.no_grad(), self._undone(), points.undone():
            self.report = self._search(points, evaluate, loss)
        self._stepped = self.metric.passes
        return self.report.new_loss

    def _search(
        self, points: Trial, closure: Callable[[], Any], loss: float
    ) -> TrialReport:
        group, moving = self.param_groups[0], points.moving
        gradient = self._gradient(moving)
        before = self._before(moving) if group["momentum"] else None
        for trial in range(1, group["trials"] + 1):
            model = QuadraticModel(self.metric, gradient)
            step, bent = self._propose(model, moving, before)
            points.move(step.vectors)
            reached = self._joint(points, closure)
            gain = loss - reached
            ratio = gain / step.decrease if step.decrease > 0.0 else math.nan
            if math.isfinite(reached) and gain > 0.0:
                self._remember(moving, step.vectors)
                if ratio > group["good"] and self._may_shrink(group["shrink"]):
                    self._weigh(group["shrink"])
                elif ratio < group["bad"]:
                    self._weigh(group["grow"])
                self._accepted()
                return TrialReport(
                    loss,
                    reached,
                    step.decrease,
                    ratio,
                    step.coefficients,
                    bent,
                    trial,
                    group["scale"],
                    True,
                )
            points.restore()
            self._weigh(group["grow"] ** 2)
            before = None
        if self._hopeless(step.vectors):
            self._back()
        return TrialReport(
            loss, loss, step.decrease, math.nan, [], False, trial, group["scale"], False
        )

    def _propose(
        self,
        model: QuadraticModel,
        moving: dict[str, Declared],
        before: dict[str, Tensor] | None,
    ) -> tuple[Step, bool]:
        down = self._descent(moving)
        step = model.best([down] if before is None else [down, before])
        if self._bending is None:
            return step, False
        bend = self._bending.bend(step.vectors, _SPACING)
        found = {
            name: -0.5 * x
            for block in self.metric.solved.values()
            for name, x in block.solve(residual=bend).vectors.items()
        }
        # Beyond this the series that the correction comes from is not to be trusted.
        long = model.mass(step.vectors, step.vectors)
        if 16.0 * model.mass(found, found) > 0.75**2 * long:
            return step, False
        corrected = {name: u + found[name] for name, u in step.vectors.items()}
        return Step(step.coefficients, corrected, step.decrease), True

    def _remember(
        self, moving: dict[str, Declared], vectors: dict[str, Tensor]
    ) -> None:
        if self.param_groups[0]["momentum"]:
            for name, declared in moving.items():
                self.state[declared.tensor]["step"] = vectors[name]

    def _may_shrink(self, factor: float) -> bool:
        # Below this mass rounding of the small matrix decides the step.
        return all(
            _rounding(block) <= _ROUNDING * factor
            for block in self.metric.blocks.values()
        )


def _rounding(block: LayerMetric) -> float:
    """Return the relative error that rounding leaves in the solve of a block."""
    inverse = block.inverse
    if inverse.form == "base":
        return 0.0
    trace = inverse.trace
    if inverse.strategy.limit:
        # Nothing is factorised, and must not be for this.
        return max(torch.finfo(inverse.block.precision).eps * trace, -trace)
    lower = inverse.factor.lower
    if not math.isfinite(trace):
        # Not read on this device. The trace of L L^T is |L|^2, and the host waits for
        # the loss anyway.
        trace = float(lower.tril().double().square().sum()) - len(lower)
    # What is in float32 now goes over to the block's precision when it has to.
    widest = torch.promote_types(lower.dtype, inverse.block.precision)
    # A trace below zero is rounding itself.
    return max(torch.finfo(widest).eps * trace, -trace)
