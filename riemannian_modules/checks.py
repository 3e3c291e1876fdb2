"""What is checked before a linearisation counts: nothing is changed when it fails."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd.graph import GradientEdge, Node

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import (
    LinearizationError,
    NonFiniteError,
    NotRecordedError,
    ShapeError,
)
from riemannian_modules.factors import MetricFactor
from riemannian_modules.finite import looks_finite
from riemannian_modules.leaves import leaves_of
from riemannian_modules.reverse import loss_scale, scaled_grad
from riemannian_modules.tape import Tape

__all__ = [
    "autograd_gradient",
    "batch_norms",
    "check_values",
    "disagreements",
    "embeddings",
    "output_costates",
    "parameters_reached",
    "recorded_tape",
    "refuse_coupling",
    "refuse_direct_terms",
    "refuse_scaled_gradients",
    "require_finite",
]


def batch_norms(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the BatchNorm layers of a model with their qualified names."""
    kind = nn.modules.batchnorm._BatchNorm
    return [(path, m) for path, m in model.named_modules() if isinstance(m, kind)]


def refuse_coupling(layers: list[tuple[str, nn.Module]]) -> None:
    """Refuse BatchNorm layers that normalise with the statistics of the batch.

    Args:
        layers: the model's BatchNorm layers.

    Raises:
        LinearizationError: some are in training mode or keep no running statistics.
    """
    coupled = [
        _label(path, module)
        for path, module in layers
        if module.training or not module.track_running_stats
    ]
    if coupled:
        raise LinearizationError(
            f"{', '.join(coupled)}: BatchNorm in training mode couples the examples of "
            "a batch, so no factor per example exists. Use GroupNorm (convolutions) or "
            "LayerNorm instead; or, with pretrained statistics, run after every "
            "model.train(): [m.eval() for m in model.modules() if isinstance(m, "
            "torch.nn.modules.batchnorm._BatchNorm)]"
        )


def embeddings(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the embedding layers of a model with their qualified names."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return [(path, m) for path, m in model.named_modules() if isinstance(m, kinds)]


def refuse_scaled_gradients(layers: list[tuple[str, nn.Module]]) -> None:
    """Refuse embeddings whose gradient is not the derivative of the loss.

    Args:
        layers: the model's embeddings.

    Raises:
        LinearizationError: one divides its gradient by counts in the batch.
    """
    for path, module in layers:
        if getattr(module, "scale_grad_by_freq", False):
            raise LinearizationError(
                f"{_label(path, module)} divides its gradient by counts in the batch, "
                "so it is no gradient of the loss; use scale_grad_by_freq=False"
            )


def _label(path: str, module: nn.Module) -> str:
    return f"{f'layer {path!r}' if path else 'the model'} ({type(module).__name__})"


def recorded_tape(tape: Tape | None, outputs: Sequence[Tensor]) -> Tape:
    """Return the tape if it can be linearised at these outputs.

    Args:
        tape: the last recorded pass, or None.
        outputs: model outputs, ``(n, *output)`` each.

    Returns:
        The tape.

    Raises:
        NotRecordedError: nothing was recorded, or without gradients.
        LinearizationError: everything ran inside a function transform, or returned
            objects in which no tensors are found.
    """
    if tape is not None and tape.hidden and not tape.uses:
        names = ", ".join(f"'{name}'" for name in sorted(tape.hidden))
        raise LinearizationError(
            f"the layers of {names} ran inside a function transform of torch.func "
            "(vmap, grad, jacrev, jvp, ...) only, which leaves nothing to linearise: "
            "put the transform into the forward of a module, build the metric from "
            "that module, and call it inside metric.record()"
        )
    if tape is not None and not tape.uses and tape.opaque:
        raise LinearizationError(str(tape.says_nothing(min(tape.opaque))))
    if tape is None or not tape.uses or not any(z.requires_grad for z in outputs):
        unheard = (
            tape is not None and not tape.uses and any(z.requires_grad for z in outputs)
        )
        compiled = (
            ". If what you run is compiled and ran before, its graph calls no layer: "
            "build the metric from the model that torch.compile returned"
        )
        raise NotRecordedError(
            "no recorded forward pass leads to these outputs: run the model inside "
            "'with metric.record():', with gradients enabled, before every "
            "metric.backward or metric.pull_back" + (compiled if unheard else "")
        )
    return tape


def check_values(tape: Tape, outputs: Sequence[Tensor], *, inputs: bool) -> None:
    """Check that a pass is as it was, and finite.

    Args:
        tape: the recorded pass.
        outputs: model outputs.
        inputs: whether the inputs of layers must be finite, too.

    Raises:
        LinearizationError, NonFiniteError: it is not.
    """
    (tape.check_inputs if inputs else tape.require_intact)()
    for output in outputs:
        require_finite(output, "the outputs", tape)


def autograd_gradient(
    loss: Tensor, parameters: DeclaredParameters, scale: float = 1.0
) -> dict[str, Tensor | None]:
    """Return autograd's own gradient by name; the graph is kept.

    Args:
        loss: scalar.
        parameters: the model's parameters.
        scale: see :func:`riemannian_modules.reverse.scaled_grad`.
    """
    declared = list(parameters)
    grads = scaled_grad(loss, [d.tensor for d in declared], scale)
    return {
        d.name: g.to_dense() if g is not None and g.is_sparse else g
        for d, g in zip(declared, grads, strict=True)
    }


def parameters_reached(
    starts: Iterable[Node | None],
    stops: Iterable[Node | None],
    parameters: DeclaredParameters,
) -> set[str]:
    """Return the parameters that a graph reaches without passing a known node.

    Args:
        starts: where to begin: the loss; or the outputs and the layers' inputs.
        stops: where to end: the outputs; or the recorded layers' outputs.
        parameters: the model's parameters.

    Returns:
        Their names.
    """
    names = map(parameters.name_of, leaves_of(starts, stops))
    return {name for name in names if name is not None}


def refuse_direct_terms(
    loss: Tensor, outputs: Sequence[Tensor], parameters: DeclaredParameters
) -> None:
    """Refuse a loss that depends on parameters other than through the outputs.

    Args:
        loss: scalar.
        outputs: model outputs.
        parameters: the model's parameters.

    Raises:
        LinearizationError: it does; names a parameter.
    """
    ends = [output.grad_fn for output in outputs]
    found = sorted(parameters_reached([loss.grad_fn], ends, parameters))
    if found:
        names = ", ".join(f"'{name}'" for name in found)
        raise LinearizationError(
            f"the loss depends on {names} other than through the outputs: it has a "
            "term of them (put weight decay in the optimizer), or sees hidden values"
        )


def output_costates(
    loss: Tensor,
    outputs: Sequence[Tensor],
    places: Sequence[Tensor | GradientEdge] = (),
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return d loss/d outputs, each of the shape of its output; the graph is kept.

    Args:
        loss: scalar.
        outputs: model outputs.
        places: more places in the graph where the derivative is wanted.

    Returns:
        The costates at the outputs, zero at those that the loss does not depend on; and
        those at the places, None there.

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
    active = [output for output in outputs if output.requires_grad]
    grads: Sequence[Tensor | None] = (None,) * (len(active) + len(places))
    if loss.requires_grad:
        grads = scaled_grad(loss, [*active, *places], loss_scale(outputs))
    pairs = iter(grads)
    found = [next(pairs) if output.requires_grad else None for output in outputs]
    if all(costate is None for costate in found):
        kinds = {type(output.grad_fn).__name__ for output in outputs}
        put_together = (
            ". Of several calls: call the model once on torch.cat of the inputs, and "
            "compute the loss from slices of its output"
            if kinds & {"CatBackward0", "StackBackward0"}
            else ""
        )
        raise NotRecordedError(
            "the loss does not depend on these outputs; hand metric.backward the very "
            "tensor that the model returned and the loss was computed from"
            + put_together
        )
    costates = [
        torch.zeros_like(output) if costate is None else costate
        for costate, output in zip(found, outputs, strict=True)
    ]
    for costate in costates:
        if not looks_finite(costate):
            raise NonFiniteError(
                "the derivative of the loss by the outputs, of shape "
                f"{tuple(costate.shape)}, holds NaN or infinity while the loss does "
                "not; nothing was changed. Check the loss for roots, norms and "
                "logarithms of 0"
            )
    return costates, list(grads[len(active) :])


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


def disagreements(
    gradient: Mapping[str, Tensor],
    expected: Mapping[str, Tensor | None],
    costates: Mapping[str, MetricFactor],
    rounding: float,
) -> dict[str, str]:
    """Compare the assembled gradient with autograd's.

    Args:
        gradient: assembled from the recorded uses.
        expected: autograd's, None for parameters that the loss does not depend on.
        costates: the factors that the gradient is summed from; their magnitude is
            what rounding is relative to.
        rounding: unit of rounding of the arithmetic that both went through.

    Returns:
        ``{parameter name: what is wrong}`` where they differ.

    Raises:
        NonFiniteError: the assembled gradient is not finite; names the parameter.
    """
    known = [g for g in expected.values() if g is not None]
    if not known or known[0].device.type == "meta":
        return {}
    for name, value in gradient.items():
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(
                f"the gradient of parameter '{name}' holds NaN or infinity while the "
                "loss and the outputs do not; nothing was changed. Check the model for "
                "roots, norms and logarithms of zero behind that layer"
            )
    wrong = {}
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
        small = max(1e-2 * tolerance, min(1e4 * rounding, 1e-5))
        if error > tolerance * size + small * scale + rounding * floor:
            wrong[name] = (
                f"the recorded uses give a gradient that differs from autograd's by "
                f"{error:.2e} (norm {size:.2e})"
            )
    return wrong
