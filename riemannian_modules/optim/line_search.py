"""Natural-gradient steps whose length the loss decides."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.errors import NonFiniteError, NotRecordedError
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.kinds import require_kinds
from riemannian_modules.optim.line_rules import Armijo, LineRule
from riemannian_modules.optim.quadratic import refuse_unmeasurable
from riemannian_modules.optim.trial import Trial
from riemannian_modules.optim.trial_reports import LineSearchReport
from riemannian_modules.optim.whole_model import WholeModelOptimizer
from riemannian_modules.precision import dot
from riemannian_modules.retractions import Retraction

__all__ = ["LineSearch"]


class LineSearch(WholeModelOptimizer):
    """Steps ``w <- R_w(-t x)`` along the natural gradient x, of a searched length t.

    The metric stays that of the last backward pass during the search. The slope along
    the retracted curve is exact, by differentiating the retraction. The loss must be
    the same function in the search as in the backward pass.

    Args:
        metric: the model's geometry.
        rule: :class:`Armijo` or :class:`StrongWolfe`; None: Armijo's.
        lr: the length that is tried first; 1 is the full Gauss-Newton step of
            ``blocks="model"``. Later steps begin with at most twice the last length.
        retraction: how a tangent step becomes a point.

    Attributes:
        report: what the last step did, a :class:`LineSearchReport`; None before it.

    Cost: the solve of the metric and a forward pass for each point tried, with
    :class:`StrongWolfe` a backward pass too. The host waits for the device.

    Raises:
        ValueError: a length that is not positive.
        TypeError: no metric, no rule, or a retraction that is none.

    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> model = torch.nn.Linear(3, 1)
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=1e-3)
    >>> optimizer = LineSearch(metric)
    >>> x = torch.randn(20, 3)
    >>> def loss():
    ...     return (model(x) - x.sum(1, keepdim=True)).square().mean()
    >>> for _ in range(10):
    ...     with metric.record():
    ...         outputs = model(x)
    ...     value = (outputs - x.sum(1, keepdim=True)).square().mean()
    ...     metric.backward(value, outputs)
    ...     final = optimizer.step(loss)
    >>> final < 1e-4
    True
    """

    def __init__(
        self,
        metric: ModelMetric,
        rule: LineRule | None = None,
        *,
        lr: float = 1.0,
        retraction: Retraction | None = None,
    ) -> None:
        require_kinds("LineSearch(metric)", metric, retraction)
        if isinstance(rule, type) or not (rule is None or isinstance(rule, LineRule)):
            raise TypeError(
                f"rule={rule!r}; pass an instance, such as "
                "riemannian_modules.optim.StrongWolfe()"
            )
        if not (lr > 0.0 and math.isfinite(lr)):
            raise ValueError(f"lr={lr}: the first length must be positive and finite")
        self.rule = Armijo() if rule is None else rule
        self.report: LineSearchReport | None = None
        defaults = {"lr": lr, "length": lr}
        super().__init__(metric, retraction, defaults)

    def step(self, closure: Callable[[], Any] | None = None) -> float:  # type: ignore[override]
        """Take one step from the last ``metric.backward``.

        If no point is good enough, or an error is raised, the parameters are what they
        were, bit for bit.

        Args:
            closure: evaluates the loss of the last backward pass at the parameters'
                present values and returns it, with its graph; no backward pass.

        Returns:
            The loss at the new point.

        Raises:
            NotRecordedError: no ``metric.backward`` since the last step.
            NonFiniteError: the gradient is not finite, or the loss was NaN or infinite
                at every point.
            NotPositiveDefiniteError: a block's small matrix could not be factorised.
            TypeError: no closure.
        """
        evaluate, loss = self._begin(closure)
        trial = Trial(self._moving(), self.retraction)
        with self.metric.frozen(), trial.undone():
            self.report = self._search(trial, evaluate, loss)
        self._stepped = self.metric.passes
        return self.report.new_loss

    def _search(
        self, trial: Trial, closure: Callable[[], Any], loss: float
    ) -> LineSearchReport:
        group, moving = self.param_groups[0], trial.moving
        with torch.no_grad():
            down = self._descent(moving)
            gradient = self._gradient(moving)
            slope = sum(float(dot(g, down[name])) for name, g in gradient.items())
        if not math.isfinite(slope):
            refuse_unmeasurable(gradient)
        if not slope < 0.0:
            return LineSearchReport(loss, loss, slope, 0.0, 0, False, False)
        first = min(group["lr"], 2.0 * group["length"])
        curve = RetractedCurve(trial, down, closure, self.metric.joint_loss)
        end = self.rule.search(curve, loss, slope, first)
        if end.length == 0.0:
            trial.restore()
            if not end.finite:
                raise NonFiniteError(
                    "the loss is NaN or infinite, or a manifold left, at all "
                    f"{end.trials} points of the search, down to {first:.1e} times a "
                    "small power of ten of the natural gradient; nothing was changed. "
                    "Lower lr or raise the mass"
                )
        else:
            group["length"] = end.length
            if curve.at != end.length:
                trial.move({n: end.length * x for n, x in down.items()})
        return LineSearchReport(
            loss,
            end.value,
            slope,
            end.length,
            end.trials,
            end.satisfied,
            end.length > 0.0,
        )


class RetractedCurve:
    """The loss along ``t -> R_w(t d)``, with its exact slope.

    Implements :eq:`curve-slope`.

    Args:
        trial: the parameters.
        direction: the tangent vector d, by parameter name.
        closure: returns the loss, with its graph where a slope is asked for.
        joined: makes the value of all processes of a function that returns that of one.

    Attributes:
        at: the last t at which the loss was asked for; 0 before.
    """

    def __init__(
        self,
        trial: Trial,
        direction: Mapping[str, Tensor],
        closure: Callable[[], Any],
        joined: Callable[[Callable[[], Any]], Any] = lambda value: value(),
    ) -> None:
        self._joined = joined
        self._trial = trial
        self._direction = direction
        self._closure = closure
        self._loss: Any = None
        self.at = 0.0

    def value(self, t: float) -> float:
        """Return the loss at ``t``, where the parameters are then."""
        self._loss = None  # its graph holds the parameters that are written now
        self._trial.move({name: t * d for name, d in self._direction.items()})
        self.at = t
        return self._of_all(self._value)

    def slope(self, t: float) -> float:
        """Return the derivative of the loss at ``t``, the point asked for last."""
        return self._of_all(lambda: self._slope(t))

    def _of_all(self, value: Callable[[], Any]) -> float:
        def own() -> Tensor:
            found = value()
            if isinstance(found, Tensor):
                return found.detach()
            return torch.tensor(float(found), dtype=torch.float64)

        return float(self._joined(own))

    def _value(self) -> Any:
        self._loss = self._trial.value(self._closure)
        return self._loss

    def _slope(self, t: float) -> float:
        names = list(self._direction)
        tensors = [self._trial.moving[name].tensor for name in names]
        with torch.enable_grad():
            if not (isinstance(self._loss, Tensor) and self._loss.requires_grad):
                raise NotRecordedError(
                    "the slope of the loss is needed, but the closure returns a value "
                    "without a graph; return the tensor itself, outside of "
                    "torch.no_grad(), before .item(), or use the rule Armijo()"
                )
            covectors = torch.autograd.grad(
                self._loss, tensors, allow_unused=True, retain_graph=True
            )
            total = 0.0
            for name, covector in zip(names, covectors, strict=True):
                if covector is not None:
                    total += self._part(name, covector.as_subclass(Tensor), t)
        return total

    def _part(self, name: str, covector: Tensor, t: float) -> float:
        # <e, d/dt R_w(t d)>: one reverse pass through the retraction.
        direction = self._direction[name]
        step = (t * direction).requires_grad_()
        point = self._trial.along(name, step)
        (pulled,) = torch.autograd.grad(point, step, covector)
        return float(dot(pulled, direction))
