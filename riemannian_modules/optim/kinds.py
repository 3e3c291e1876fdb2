"""What is handed to an optimizer, and what people hand to it instead."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.errors import NotRecordedError
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.retractions import Retraction

__all__ = [
    "groups_of",
    "options_of",
    "refuse_scaler",
    "require_differentiable",
    "require_kinds",
    "require_numbers",
    "require_pass",
    "require_ready",
]

_REPLACED = (
    "this step knows the last metric.backward only: another one at the same point, "
    "before it, was replaced. If both are parts of one batch, call all but the last "
    "one with accumulate=True"
)

_ANOTHER = (
    "in .grad is the gradient of another metric's backward pass, and this step is made "
    "of that: call this metric's backward last, directly before its step"
)


def require_kinds(
    call: str, metric: object, retraction: object, lr: object = None
) -> None:
    """Check the arguments that other optimizers have in other places.

    Args:
        call: how the optimizer is called, for the error.
        metric: the first argument.
        retraction: the retraction.
        lr: a learning rate, given to an optimizer that has none.

    Raises:
        TypeError: one is of another kind; says what to write instead.
    """
    if not isinstance(metric, ModelMetric):
        raise TypeError(
            f"the first argument is a {type(metric).__name__}; pass the metric, which "
            f"knows the model's parameters: {call} with metric = "
            "LayerwiseMetric(model, output=...)"
        )
    if lr is not None:
        raise TypeError(
            f"lr={lr!r}, but there is no learning rate: the loss decides how long a "
            f"step is; call {call}"
        )
    if isinstance(retraction, type) and issubclass(retraction, Retraction):
        name = retraction.__name__
        raise TypeError(f"retraction is the class {name}; call it: {name}()")
    if not (retraction is None or isinstance(retraction, Retraction)):
        raise TypeError(
            f"retraction={retraction!r}; pass an instance of a Retraction, such as "
            "riemannian_modules.retractions.Exponential()"
        )


def groups_of(metric: ModelMetric, params: object, lr: object) -> Any:
    """Return the parameters or groups that an optimizer is given.

    Args:
        metric: whose parameters they are if there are none.
        params: what was given.
        lr: the optimizer's learning rate.

    Raises:
        TypeError: a number, which is meant as learning rate.
        ValueError: all groups have an ``lr``, as if it were a step length.
    """
    if params is None:
        return [declared.tensor for declared in metric.parameters]
    if isinstance(params, Real):
        raise TypeError(
            f"the second argument is {params}; parameters or groups go there, and lr "
            f"goes by name: RiemannianSGD(metric, lr={params})"
        )
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        return params
    groups = list(params)
    each = [isinstance(group, dict) and "lr" in group for group in groups]
    if lr is None and groups and all(each):
        raise ValueError(
            "all groups have an lr and the optimizer has none, so that theirs would be "
            "factors of the length that each step finds: give the optimizer an lr, "
            "too, if they are step lengths; else leave out one that is 1"
        )
    return groups


# What torch's schedulers and users write into groups.
_NOTES = {"params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "swa_lr"}
_NOTES |= {"base_momentum", "max_momentum"}


def options_of(group: Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a parameter group; refuse those that no step looks at.

    Args:
        group: what was given.
        defaults: the optimizer's options.

    Raises:
        ValueError: there is one.
    """
    for key in group:
        if key in defaults or key in _NOTES:
            continue
        masses = 'LayerwiseMetric(model, ..., mass={"0.*": 1e3, "*": 1e-2})'
        hint = f"; masses belong to the metric: {masses}" if key == "mass" else ""
        known = ", ".join(sorted(set(defaults) - {"automatic", "trust", "lowest"}))
        raise ValueError(
            f"a group has the option {key!r}, which is unknown here{hint}; there are "
            f"{known}"
        )
    return {**defaults, **group}


def refuse_scaler(optimizer: torch.optim.Optimizer) -> None:
    """Refuse a step that a ``torch.amp.GradScaler`` asks for.

    It says so by attributes, since ``_step_supports_amp_scaling`` is set: otherwise it
    would divide ``.grad`` behind the metric's back, which knows the scaled loss.

    Args:
        optimizer: whose step it is.

    Raises:
        TypeError: it is a scaler's.
    """
    if vars(optimizer).pop("found_inf", None) is not None:
        vars(optimizer).pop("grad_scale", None)
        raise TypeError(
            "a GradScaler calls this step, but metric.backward keeps float16 from "
            "underflow itself, and the metric would belong to another loss than the "
            "scaled one: call metric.backward(loss, outputs) and optimizer.step() "
            "without a scaler. Nothing was changed"
        )


def require_differentiable(loss: object) -> None:
    """Refuse what a loss function returned if it is no loss of the outputs.

    Args:
        loss: what it returned.

    Raises:
        TypeError: no scalar tensor, or one without a graph.
    """
    if isinstance(loss, Tensor) and loss.ndim == 0 and loss.requires_grad:
        return
    what = f"a {type(loss).__name__}"
    if isinstance(loss, Tensor):
        what = f"a tensor of shape {tuple(loss.shape)}"
        what += "" if loss.requires_grad else " that does not depend on the outputs"
    raise TypeError(
        f"the loss function returned {what}; it must return the scalar tensor that it "
        "computes from the outputs, not detached: optimizer.step(lambda: model(x), "
        "lambda outputs: loss_function(outputs, y))"
    )


def require_pass(metric: ModelMetric, stepped: int, more: str = "") -> None:
    """Check that there was a backward pass since the last step.

    Args:
        metric: the metric.
        stepped: number of the pass that the last step was made of.
        more: what else to say.

    Raises:
        NotRecordedError: there was none.
    """
    if metric.passes == stepped:
        if metric.waiting:
            more = f", and passes with accumulate=True wait for one without{more}"
        raise NotRecordedError(
            "call metric.backward(loss, outputs) before every optimizer.step(); "
            f"loss.backward() alone does not renew the metric{more}"
        )


def require_ready(metric: ModelMetric, groups: Sequence[Mapping[str, Any]]) -> None:
    """Check that a step can be made of what the last backward pass left.

    Args:
        metric: the metric.
        groups: of the optimizer whose step it is.

    Raises:
        NotRecordedError: all gradients are gone.
        LostManifoldError, NotOnManifoldError, NonFiniteError, LinearizationError: a
            parameter is not what it was.
    """
    metric.parameters.verify()
    metric.parameters.require_unmoved([p for group in groups for p in group["params"]])
    if metric.gradients.use():
        warnings.warn(_REPLACED, stacklevel=4)
    if metric.gradients.another():
        warnings.warn(_ANOTHER, stacklevel=4)
    found = metric.linearization
    if found is None or not (found.gradient and metric.gradients.fills):
        return
    own = {id(tensor) for group in groups for tensor in group["params"]}
    reached = [metric.parameters[name].tensor for name in found.gradient]
    mine = [tensor for tensor in reached if id(tensor) in own]
    if mine and all(tensor.grad is None for tensor in mine):
        raise NotRecordedError(
            "every .grad is None: zero_grad() after metric.backward(loss, outputs) "
            "takes away what the step is made of. Call it before, or not at all: "
            "metric.backward sets .grad"
        )


def require_numbers(options: Mapping[str, Any]) -> None:
    """Check the hyperparameters of :class:`riemannian_modules.optim.RiemannianSGD`.

    Args:
        options: its keyword arguments.

    Raises:
        ValueError: one is out of its range, or two do not go together.
    """
    lr, momentum, spring = options["lr"], options["momentum"], options["spring"]
    weight_decay, nesterov = options["weight_decay"], options["nesterov"]
    automatic = lr is None
    decays = 0.0 <= weight_decay < math.inf
    if not ((automatic or lr >= 0.0) and decays and 0.0 <= momentum < 1.0):
        raise ValueError(
            f"lr={lr}, momentum={momentum}, weight_decay={weight_decay}: lr and "
            "weight_decay must be finite and not negative, momentum lies in [0, 1)"
        )
    if nesterov and (momentum == 0.0 or options["dampening"] != 0.0):
        raise ValueError("nesterov needs a momentum and no dampening")
    if spring is not None and not 0.0 <= spring < 1.0:
        raise ValueError(f"spring={spring}: what is kept of a step lies in [0, 1)")
    if spring and momentum:
        raise ValueError(
            f"momentum={momentum} averages gradients and spring={spring} keeps steps; "
            "choose one of the two"
        )
    clip, floor = options["clip"], options["floor"]
    if clip is not None and not 0.0 < clip < math.inf:
        raise ValueError(
            f"clip={clip} bounds the length of a step: a positive number, or None"
        )
    if floor is not None and not math.isfinite(floor):
        raise ValueError(
            f"floor={floor} is what the loss cannot fall below: a finite number, or "
            "None where nothing is known"
        )
    if automatic and (options["normalize"] or options["maximize"]):
        raise ValueError(
            "lr=None takes its length from the model of a loss that falls; "
            "normalize=True and maximize=True need an lr"
        )
