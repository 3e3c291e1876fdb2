"""Gauss-Newton steps for many outputs: conjugate gradients, the metric in front."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.block import Part
from riemannian_modules.declared import Declared
from riemannian_modules.errors import NotRecordedError, OutputMetricError
from riemannian_modules.heads import OutputLike
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.conjugate import Proximal, Truncated
from riemannian_modules.optim.kinds import refuse_scaler, require_kinds
from riemannian_modules.optim.kronecker import KroneckerInverse
from riemannian_modules.optim.linearised import Linearised, linearised
from riemannian_modules.optim.trial import Trial
from riemannian_modules.optim.trial_reports import GaussNewtonReport
from riemannian_modules.optim.weighing import WeighingOptimizer
from riemannian_modules.retractions import Retraction

__all__ = ["GaussNewton"]

_ARMIJO = 1e-4


class GaussNewton(WeighingOptimizer):
    """Steps of the exact Gauss-Newton metric where its rows are too many to factorise.

    Each step minimises the quadratic model of the loss, exact in the outputs of all
    examples and with the mass, by conjugate gradients on the tangent spaces (Martens,
    2010). They start from the step before, preconditioned by a Kronecker approximation
    of the rows that the metric recorded last
    (:class:`riemannian_modules.optim.kronecker.KroneckerInverse`): sampled rows do,
    also of some of the examples only. How many iterations pay is read off their
    progress. The mass follows the ratio of actual and predicted decrease, as in
    :class:`LevenbergMarquardt`; a step that does not lower the loss is shortened
    first. Neither a step length nor a good first mass has to be found.

    The loss must be the same function during a step, without dropout. A minibatch is
    fitted better than the rest of the data by a whole step: give ``lr`` there, and let
    it fall to zero by a scheduler of torch. ``.grad`` is not touched.

    Args:
        metric: the model's geometry, usually of ``output=Sampled(...)`` with one
            probe; a sampled output metric counts as the one that it samples.
        iterations: at most so many conjugate gradient iterations in a proposal.
        greed: 1 maximises what the model gains for the work of this one step; smaller
            numbers iterate longer.
        shrink: factor of the mass after a good match, in (0, 1].
        grow: factor of the mass after a bad match or a shortened step, and its square
            after a proposal that no length saved; at least 1.
        good: ratio of actual to predicted decrease above which a match is good.
        bad: ratio below which it is bad.
        shorten: how often a proposal may be shortened.
        trials: how many proposals to make before the step is given up.
        retraction: how a tangent step becomes a point.
        lr: part of each step that is taken, in (0, 1]: 1 for full batches, 0.5 or a
            schedule from 1 to 0 for minibatches. The mass is found for whole steps.

    Attributes:
        report: what the last step did, a :class:`GaussNewtonReport`; None before it.

    Cost: a reverse pass, then two products with the derivative of the outputs for each
    iteration, about as much as a forward and a backward pass; and a forward pass for
    each point tried. It reads the loss, so the host waits for the device.

    Raises:
        ValueError: a hyperparameter out of its range.
        TypeError: the first argument is no metric, or the retraction none.

    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Sequential(
    ...     torch.nn.Linear(1, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ... ).double()
    >>> x = torch.linspace(-2.0, 2.0, 30, dtype=torch.float64).unsqueeze(1)
    >>> output = rm.output.Sampled(rm.output.Euclidean(2.0))
    >>> metric = rm.LayerwiseMetric(model, output=output, mass=1e-2)
    >>> optimizer = GaussNewton(metric)
    >>> for _ in range(30):
    ...     with metric.record():
    ...         outputs = model(x)
    ...     metric.pull_back(outputs)
    ...     final = optimizer.step(
    ...         lambda: model(x), lambda z: torch.nn.functional.mse_loss(z, x.sin())
    ...     )
    >>> final < 1e-4
    True
    """

    def __init__(
        self,
        metric: ModelMetric,
        *,
        iterations: int = 60,
        greed: float = 0.5,
        shrink: float = 0.5,
        grow: float = 2.0,
        good: float = 0.75,
        bad: float = 0.25,
        shorten: int = 4,
        trials: int = 6,
        retraction: Retraction | None = None,
        lr: float = 1.0,
    ) -> None:
        require_kinds("GaussNewton(metric)", metric, retraction)
        _require_part(lr)
        if not (0.0 < shrink <= 1.0 <= grow and 0.0 < bad <= good):
            raise ValueError(
                f"shrink={shrink}, grow={grow}, bad={bad}, good={good}: needs "
                "0 < shrink <= 1 <= grow and 0 < bad <= good"
            )
        if not (iterations >= 1 and greed >= 0.0 and shorten >= 0 and trials >= 1):
            raise ValueError(
                f"iterations={iterations}, greed={greed}, shorten={shorten}, "
                f"trials={trials}: needs at least one iteration and one trial, and no "
                "negative numbers"
            )
        self.report: GaussNewtonReport | None = None
        defaults = {
            "lr": lr,
            "iterations": iterations,
            "greed": greed,
            "shrink": shrink,
            "grow": grow,
            "good": good,
            "bad": bad,
            "shorten": shorten,
            "trials": trials,
            "scale": 1.0,
        }
        super().__init__(metric, retraction, defaults)

    def step(  # type: ignore[override]
        self,
        outputs: Callable[[], OutputLike],
        loss: Callable[[Any], Tensor],
    ) -> float:
        """Take one step, preconditioned by what ``metric`` recorded last.

        Nothing changes if an error is raised.

        Args:
            outputs: evaluates the model on the whole batch; called once with
                gradients, and once without for each point tried.
            loss: the loss as a function of what ``outputs`` returns.

        Returns:
            The loss at the new point.

        Raises:
            DistributedError: another process that shares the metric failed.
            NotRecordedError: the metric was never pulled back, or no graph leads from
                the outputs to the parameters.
            NonFiniteError: the loss or its gradient is not finite where the step
                begins.
            OutputMetricError: an output has no metric.
            ValueError: the group's ``"lr"`` is not in [0, 1].
        """
        refuse_scaler(self)
        _require_part(self.param_groups[0]["lr"], least=True)
        metric = self.metric
        if not metric.blocks:
            raise NotRecordedError(
                "nothing was recorded yet that could precondition the step: run the "
                "model inside metric.record() and call metric.pull_back(outputs), or "
                "metric.backward(loss, outputs), first"
            )
        if isinstance(metric, LayerwiseMetric) and metric.weighted:
            raise OutputMetricError(
                "GaussNewton measures the outputs anew and knows no weights of terms; "
                "call metric.backward without weights, or take LevenbergMarquardt"
            )
        metric.require_intact()
        metric.parameters.verify()
        trial = Trial({d.name: d for d in metric.parameters}, self.retraction)
        with self._undone(), trial.undone():
            self.report = self._search(trial, outputs, loss)
        return self.report.new_loss

    def _search(
        self,
        trial: Trial,
        outputs: Callable[[], OutputLike],
        loss: Callable[[Any], Tensor],
    ) -> GaussNewtonReport:
        group, moving = self.param_groups[0], trial.moving
        inverse = self._preconditioner(moving)
        before = self._before(moving)

        def closure() -> float:
            with torch.no_grad():
                return float(loss(outputs()))

        iterations = tried = 0
        for _ in range(group["trials"]):
            # Anew after a trial that failed: it wrote what the graph had kept.
            start = linearised(self.metric, outputs, loss)
            with torch.no_grad():
                spaces = {name: d.space() for name, d in moving.items()}
                model = Proximal(start.map, spaces, start.gradient)
                found = model.minimise(
                    inverse, before, group["iterations"], group["greed"]
                )
                if self.metric.exchange is not None:
                    same = self.metric.exchange.tell(found.vectors)
                    found = replace(found, vectors=same)
                length, reached, count = self._shorten(trial, found, start, closure)
            iterations += found.iterations
            tried += count
            ratio = math.nan
            if count == 0:
                break  # the gradient is zero: more mass would not help
            if length > 0.0:
                if found.decrease > 0.0:
                    ratio = (start.loss - reached) / found.decrease
                self._remember(moving, found.vectors, length)
                if length < 1.0 or ratio < group["bad"]:
                    self._weigh_both(inverse, group["grow"])
                elif ratio > group["good"] and self._may_shrink(found):
                    self._weigh_both(inverse, group["shrink"])
                if group["lr"] < 1.0:
                    part = float(group["lr"]) * length
                    length, reached = self._part(trial, found, start, closure, part)
                break
            self._weigh_both(inverse, group["grow"] ** 2)
            before = None
        if length > 0.0:
            self._accepted()
        elif self._hopeless(found.vectors):
            self._back()
        return GaussNewtonReport(
            start.loss,
            reached,
            found.decrease,
            ratio,
            length,
            iterations,
            tried,
            group["scale"],
            length > 0.0,
        )

    def _shorten(
        self,
        trial: Trial,
        found: Truncated,
        start: Linearised,
        closure: Callable[[], float],
    ) -> tuple[float, float, int]:
        """Try the step and parts of it; back to the start if none lowers the loss."""
        loss, slope = start.loss, start.slope(found.vectors)
        if not slope < 0.0:
            return 0.0, loss, 0
        length = 1.0
        for count in range(1, self.param_groups[0]["shorten"] + 2):
            trial.move({name: length * x for name, x in found.vectors.items()})
            reached = start.map.total(trial.value(closure))
            # Where rounding hides what is asked for, any decrease will do.
            if reached < loss and reached <= loss + _ARMIJO * length * slope:
                return length, reached, count
            rise = reached - loss - length * slope
            part = -0.5 * length * slope / rise if rise > 0.0 else 0.5
            length *= min(0.5, max(0.1, part)) if math.isfinite(rise) else 0.1
        trial.restore()
        return 0.0, loss, count

    def _part(
        self,
        trial: Trial,
        found: Truncated,
        start: Linearised,
        closure: Callable[[], float],
        part: float,
    ) -> tuple[float, float]:
        """Take a part of a step that was good; where that is no point, none of it."""
        trial.move({name: part * x for name, x in found.vectors.items()})
        reached = start.map.total(trial.value(closure))
        if math.isfinite(reached):
            return part, reached
        trial.restore()
        return 0.0, start.loss

    def _preconditioner(self, moving: Mapping[str, Declared]) -> KroneckerInverse:
        factors = {
            part.name: part.factor
            for block in self.metric.blocks.values()
            for part in block.parts
        }
        return KroneckerInverse(
            Part(name, d.space(), factors.get(name)) for name, d in moving.items()
        )

    def _remember(
        self,
        moving: Mapping[str, Declared],
        vectors: Mapping[str, Tensor],
        length: float,
    ) -> None:
        for name, declared in moving.items():
            self.state[declared.tensor]["step"] = length * vectors[name]

    def _may_shrink(self, found: Truncated) -> bool:
        # Below that a mass is lost in the rounding of the largest curvature.
        eps = max(torch.finfo(d.tensor.dtype).eps for d in self.metric.parameters)
        return eps * found.stiffness <= 1.0

    def _weigh_both(self, inverse: KroneckerInverse, factor: float) -> None:
        inverse.scale_mass(self._weigh(factor))


def _require_part(lr: object, *, least: bool = False) -> None:
    if isinstance(lr, int | float | Tensor) and not isinstance(lr, bool):
        part = float(lr)
        if 0.0 < part <= 1.0 or (least and part == 0.0):
            return
    raise ValueError(
        f"lr={lr!r}; it is the part of each step that is taken, a number in (0, 1]: 1 "
        "for full batches, 0.5 or a schedule from 1 to 0 for minibatches"
    )
