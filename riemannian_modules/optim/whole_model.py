"""What optimizers share that move all parameters together and try points."""

from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.declared import Declared
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.kinds import refuse_scaler, require_pass, require_ready
from riemannian_modules.optim.trial import Trial
from riemannian_modules.precision import dot
from riemannian_modules.retractions import Default, Retraction

__all__ = ["WholeModelOptimizer"]

_EVALUATES = (
    "step() takes a function that only evaluates the loss: "
    "optimizer.step(lambda: loss_function(model(x), y)); record and go backward before "
    "it"
)


class WholeModelOptimizer(torch.optim.Optimizer):
    """An optimizer with one group, all parameters of its metric.

    Args:
        metric: the metric.
        retraction: how a tangent step becomes a point; None: the default one.
        defaults: hyperparameters and state of the group.
    """

    # As in RiemannianSGD.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        metric: ModelMetric,
        retraction: Retraction | None,
        defaults: dict[str, Any],
    ) -> None:
        self.metric = metric
        self.retraction = Default() if retraction is None else retraction
        self._stepped = 0
        super().__init__([d.tensor for d in metric.parameters], defaults)

    def __reduce_ex__(self, protocol: object) -> str:
        raise TypeError(
            "the optimizer belongs to its metric and cannot be copied or pickled; use "
            "state_dict() and load_state_dict() on an optimizer built anew"
        )

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Refuse a second group: a step moves the whole model.

        Args:
            param_group: as in torch.optim.Optimizer.

        Raises:
            ValueError: there is a group already.
        """
        if self.param_groups:
            raise ValueError(
                f"{type(self).__name__} moves all parameters of its metric together; "
                "it has no further groups"
            )
        super().add_param_group(param_group)

    def _begin(
        self, closure: Callable[[], Any] | None, *others: object
    ) -> tuple[Callable[[], Any], float]:
        """Return the closure and the loss of the last backward pass, to step from.

        Raises:
            TypeError: no closure, or more than that.
            NotRecordedError: no ``metric.backward`` since the last step.
        """
        refuse_scaler(self)
        if closure is None:
            raise TypeError(f"step() needs a function, to try points. {_EVALUATES}")
        if others:
            raise TypeError(f"step() got {1 + len(others)} arguments. {_EVALUATES}")
        metric = self.metric
        require_pass(metric, self._stepped, f". {_EVALUATES}")
        require_ready(metric, self.param_groups)
        assert metric.loss is not None
        return partial(_number, closure, metric), float(metric.loss)

    def _joint(self, trial: Trial, closure: Callable[[], Any]) -> float:
        """Return the loss of all processes; the error of one is that of all."""
        return float(self.metric.joint_loss(lambda: trial.value(closure)))

    def _moving(self) -> dict[str, Declared]:
        """Return the parameters that have a gradient."""
        return self.metric.gradients.moving()

    def _gradient(self, moving: Mapping[str, Declared]) -> dict[str, Tensor]:
        """Return what steps are made of: ``.grad``, or what the last pass found."""
        found = {name: self.metric.gradients.of(name) for name in moving}
        return {name: g for name, g in found.items() if g is not None}

    def _descent(self, moving: Mapping[str, Declared]) -> dict[str, Tensor]:
        """Return the natural direction of descent for what is in ``.grad`` now.

        Args:
            moving: the parameters that have a gradient.

        Returns:
            Tangent vectors by name.
        """
        metric = self.metric
        reached = [p.name for block in metric.blocks.values() for p in block.parts]
        # Parameters without a gradient stand still: they must not steer the others.
        only = None if set(reached) <= set(moving) else set(moving)
        if metric.gradients.untouched(only):
            solutions = metric.solve(only=only).values()
        else:
            # Changed gradients are covectors like any other.
            solutions = metric.solve(
                self._gradient(moving), gradient=0.0, only=only
            ).values()
        found = {n: x for each in solutions for n, x in each.vectors.items()}
        return {name: -found[name] for name in moving}

    def _hopeless(self, step: Mapping[str, Tensor]) -> bool:
        """Whether a step is less than rounding of the parameters: nothing helps."""
        parameters = self.metric.parameters
        eps = max(torch.finfo(u.dtype).eps for u in step.values())
        moved = sum(float(dot(u, u)) for u in step.values())
        points = [parameters[name].tensor.detach() for name in step]
        size = sum(float(dot(w, w)) for w in points)
        return moved <= eps**2 * size


def _number(closure: Callable[[], Any], metric: ModelMetric) -> Any:
    """Return what a closure says, if it is a number and nothing but evaluates.

    Raises:
        TypeError: it is none, or the closure goes backward.
        RuntimeError: any other error of torch, as it is.
    """

    def refuse(*_: object) -> None:
        raise TypeError(_EVALUATES)

    # Before autograd adds to .grad, and before the metric takes another pass.
    tensors = [d.tensor for d in metric.parameters if d.tensor.requires_grad]
    hooks = [tensor.register_hook(refuse) for tensor in tensors]
    metric.refusal = _EVALUATES
    try:
        value = closure()
    except RuntimeError as error:
        if "does not require grad" not in str(error):
            raise
        raise TypeError(_EVALUATES) from error
    finally:
        metric.refusal = None
        for hook in hooks:
            hook.remove()
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.reshape(())
        what = f"a tensor of shape {tuple(value.shape)} and data type {value.dtype}"
    elif isinstance(value, Real):
        return value
    else:
        what = f"a {type(value).__name__}"
    raise TypeError(
        f"the closure returned {what}; return the loss, a scalar tensor or a number: "
        "optimizer.step(lambda: loss_function(model(x), y))"
    )
