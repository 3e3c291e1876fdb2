"""What is checked before a linearisation counts: nothing is changed when it fails."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.graph import Node

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import (
    EmptyBatchError,
    LinearizationError,
    NonFiniteError,
    NotRecordedError,
    ShapeError,
)
from riemannian_modules.factors import MetricFactor
from riemannian_modules.finite import looks_finite
from riemannian_modules.rules import has_rule
from riemannian_modules.tape import Tape

__all__ = [
    "autograd_gradient",
    "batch_norms",
    "compare_gradients",
    "output_costate",
    "recordable_layers",
    "recorded_tape",
    "refuse_coupling",
    "refuse_other_paths",
    "refuse_unrecorded_uses",
    "require_finite",
]


def recordable_layers(
    model: nn.Module, parameters: DeclaredParameters
) -> list[tuple[str, nn.Module]]:
    """Return the layers whose uses are recorded: those with trainable parameters.

    Args:
        model: the model.
        parameters: its trainable parameters.

    Returns:
        Qualified names and layers.

    Raises:
        LinearizationError: a layer has no rule.
    """
    layers = []
    for path, module in model.named_modules():
        if any(parameters.name_of(p) for p in module.parameters(recurse=False)):
            if not has_rule(module):
                raise LinearizationError(
                    f"{_label(path, module)} has trainable parameters and no rule "
                    "makes factors of them; freeze it with requires_grad_(False) "
                    "before building the metric, or register_rule"
                )
            layers.append((path, module))
    return layers


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the BatchNorm layers of a model with their qualified names."""
    kind = nn.modules.batchnorm._BatchNorm
    return [(path, m) for path, m in model.named_modules() if isinstance(m, kind)]


def refuse_coupling(layers: list[tuple[str, nn.Module]]) -> None:
    """Refuse BatchNorm layers that normalise with the statistics of the batch.

    Args:
        layers: the model's BatchNorm layers.

    Raises:
        LinearizationError: one is in training mode or keeps no running statistics.
    """
    for path, module in layers:
        if module.training or not module.track_running_stats:
            raise LinearizationError(
                f"{_label(path, module)} couples the examples of a batch in training "
                "mode, so no factor per example exists; call "
                f"model.get_submodule({path!r}).eval() or use LayerNorm"
            )


def _label(path: str, module: nn.Module) -> str:
    return f"{f'layer {path!r}' if path else 'the model'} ({type(module).__name__})"


def recorded_tape(tape: Tape | None, outputs: Tensor) -> Tape:
    """Return the tape if it can be linearised at these outputs.

    Args:
        tape: the last recorded pass, or None.
        outputs: model outputs, ``(n, *output)``.

    Returns:
        The tape.

    Raises:
        ShapeError: the outputs are not one tensor.
        EmptyBatchError: no examples.
        NotRecordedError: nothing was recorded, or without gradients.
    """
    if not isinstance(outputs, Tensor):
        raise ShapeError(
            f"outputs are a {type(outputs).__name__}; hand on the one tensor that the "
            "output metric measures (a model with several outputs needs one metric "
            "for what its loss is computed from)"
        )
    if outputs.ndim == 0 or outputs.shape[0] == 0:
        raise EmptyBatchError(
            f"outputs have shape {tuple(outputs.shape)}: a batch needs at least "
            "one example in its first dimension; skip empty batches"
        )
    if tape is None or not tape.uses or not outputs.requires_grad:
        raise NotRecordedError(
            "no recorded forward pass leads to these outputs: run the model inside "
            "'with metric.record():', with gradients enabled, before every "
            "metric.backward or metric.pull_back"
        )
    tape.check_inputs(outputs.shape[0])
    require_finite(outputs, "the outputs", tape)
    return tape


def autograd_gradient(
    loss: Tensor, parameters: DeclaredParameters
) -> dict[str, Tensor | None]:
    """Return autograd's own gradient by name; the graph is kept."""
    declared = list(parameters)
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        loss, [d.tensor for d in declared], retain_graph=True, allow_unused=True
    )
    return {d.name: g for d, g in zip(declared, grads, strict=True)}


def refuse_other_paths(
    starts: Iterable[Node | None],
    stops: Iterable[Node | None],
    parameters: DeclaredParameters,
) -> None:
    """Refuse a graph that reaches a parameter without passing a known node.

    Args:
        starts: where to begin: the loss; or the outputs and the layers' inputs.
        stops: where to end: the outputs; or the recorded layers' outputs.
        parameters: the model's parameters.

    Raises:
        LinearizationError: a parameter is reached; names it.
    """
    seen, waiting = set(stops), list(starts)
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        name = None if leaf is None else parameters.name_of(leaf)
        if name is not None:
            raise LinearizationError(
                f"parameter '{name}' is reached other than through its recorded layer: "
                "it is used outside its layer or outside the recorded scope, or the "
                "loss has a term of it (put weight decay in the optimizer)"
            )
        waiting += [following for following, _ in node.next_functions]


def refuse_unrecorded_uses(
    tape: Tape, outputs: Tensor, parameters: DeclaredParameters
) -> None:
    """Refuse a pass in which a parameter acts other than in its recorded layer.

    Comparing gradients does not see a use that happens to contribute zero.

    Args:
        tape: the recorded pass.
        outputs: its outputs.
        parameters: the model's parameters.

    Raises:
        LinearizationError: a parameter does; names it.
    """
    starts = [outputs.grad_fn, *(use.origin for use in tape.uses)]
    refuse_other_paths(starts, [use.edge.node for use in tape.uses], parameters)


def output_costate(loss: Tensor, outputs: Tensor) -> Tensor:
    """Return d loss/d outputs, of the shape of the outputs; the graph is kept.

    Args:
        loss: scalar.
        outputs: model outputs.

    Returns:
        The costate at the outputs.

    Raises:
        NotRecordedError: the loss does not depend on the outputs.
        ShapeError: the loss is not a scalar.
        NonFiniteError: its derivative is not finite.
    """
    if loss.ndim != 0:
        raise ShapeError(
            f"the loss has shape {tuple(loss.shape)}; it must be a scalar: call "
            "loss.mean() (reduction='mean') or loss.sum() (reduction='sum')"
        )
    costate = None
    if loss.requires_grad:
        (costate,) = torch.autograd.grad(
            loss, outputs, retain_graph=True, allow_unused=True
        )
    if costate is None:
        raise NotRecordedError(
            "the loss does not depend on these outputs; hand metric.backward the very "
            "tensor that the model returned and the loss was computed from"
        )
    if not looks_finite(costate):
        raise NonFiniteError(
            "the derivative of the loss by the outputs, of shape "
            f"{tuple(costate.shape)}, holds NaN or infinity while the loss does not; "
            "nothing was changed. Check the loss for roots, norms and logarithms of 0"
        )
    return costate


def require_finite(value: Tensor, what: str, tape: Tape) -> None:
    """Refuse NaN and infinity, and say where they entered.

    Args:
        value: loss or outputs.
        what: its name in the message.
        tape: the recorded pass.

    Raises:
        NonFiniteError: a value is not finite.
    """
    # Off the CPU this would wait for the device; there a failed factorisation
    # leaves the parameters unchanged instead.
    if looks_finite(value):
        return
    raise NonFiniteError(
        f"NaN or infinity in {what} of shape {tuple(value.shape)} "
        f"({tape.first_nonfinite()}); nothing was changed. Check the data, lower the "
        "learning rate or raise the mass"
    )


def compare_gradients(
    gradient: Mapping[str, Tensor],
    expected: Mapping[str, Tensor | None],
    costates: Mapping[str, MetricFactor],
    rounding: float,
) -> None:
    """Compare the assembled gradient with autograd's.

    Args:
        gradient: assembled from the recorded uses.
        expected: autograd's, None for parameters that the loss does not depend on.
        costates: the factors that the gradient is summed from; their magnitude is
            what rounding is relative to.
        rounding: unit of rounding of the arithmetic that both went through.

    Raises:
        LinearizationError: they differ; names the parameter.
        NonFiniteError: the assembled gradient is not finite; names the parameter.
    """
    known = [g for g in expected.values() if g is not None]
    if not known or known[0].device.type == "meta":
        return
    for name, value in gradient.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"the gradient of parameter '{name}' holds NaN or infinity while the "
                "loss and the outputs do not; nothing was changed. Check the model for "
                "roots, norms and logarithms of zero behind that layer"
            )
    scale = max(float(g.norm()) for g in known)
    tolerance = min(0.1, 1e4 * rounding)
    for name, reference in expected.items():
        own = gradient.get(name)
        if reference is None and own is None:
            continue
        size = 0.0 if reference is None else float(reference.norm())
        if own is None or reference is None:
            error = size if own is None else float(own.norm())
        else:
            error = float((own - reference).norm())
        floor = 0.0 if own is None else 16.0 * float(costates[name].magnitude())
        if error > tolerance * (size + 1e-2 * scale) + rounding * floor:
            raise LinearizationError(
                f"parameter '{name}': the recorded uses give a gradient that differs "
                f"from autograd's by {error:.2e} (norm {size:.2e}). It is used outside "
                "its layer or outside the recorded scope, or the loss depends on it "
                "directly (put weight decay in the optimizer)"
            )
