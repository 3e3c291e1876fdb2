"""What is checked before a linearisation counts: nothing is changed when it fails."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import (
    LinearizationError,
    NonFiniteError,
    NotRecordedError,
)
from riemannian_modules.rules import has_rule
from riemannian_modules.tape import Tape

__all__ = [
    "compare_gradients",
    "output_costate",
    "recordable_layers",
    "require_finite",
]


def recordable_layers(
    model: nn.Module, parameters: DeclaredParameters
) -> list[tuple[str, nn.Module]]:
    layers = []
    for path, module in model.named_modules():
        own = [p for p in module.parameters(recurse=False) if parameters.name_of(p)]
        batchnorm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        if batchnorm and (module.training or not module.track_running_stats):
            raise LinearizationError(
                f"layer '{path}' ({type(module).__name__}) couples the examples of a "
                "batch in training mode, so no factor per example exists; call "
                f"model.get_submodule('{path}').eval() or use LayerNorm"
            )
        if own and not has_rule(module):
            raise LinearizationError(
                f"layer '{path}' ({type(module).__name__}) has trainable parameters "
                "and no rule makes factors of them; freeze it with "
                "requires_grad_(False) before building the metric, or register_rule"
            )
        if own:
            layers.append((path, module))
    return layers


def output_costate(loss: Tensor, outputs: Tensor) -> Tensor:
    if loss.ndim != 0:
        raise NotRecordedError(
            f"the loss has shape {tuple(loss.shape)}; it must be a scalar"
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
    return costate


def require_finite(value: Tensor, what: str, tape: Tape) -> None:
    # Off the CPU this would wait for the device; there a failed factorisation
    # leaves the parameters unchanged instead.
    if value.device.type != "cpu" or bool(torch.isfinite(value).all()):
        return
    raise NonFiniteError(
        f"{what} hold NaN or infinity ({tape.first_nonfinite()}); nothing was "
        "changed. Check the data, lower the learning rate or raise the mass"
    )


def compare_gradients(
    gradient: Mapping[str, Tensor], expected: Mapping[str, Tensor | None]
) -> None:
    """Compare the assembled gradient with autograd's."""
    known = [g for g in expected.values() if g is not None]
    if not known or known[0].device.type == "meta":
        return
    scale = max(float(g.norm()) for g in known)
    tolerance = min(0.1, 1e4 * torch.finfo(known[0].dtype).eps)
    for name, reference in expected.items():
        own = gradient.get(name)
        if reference is None and own is None:
            continue
        size = 0.0 if reference is None else float(reference.norm())
        if own is None or reference is None:
            error = size if own is None else float(own.norm())
        else:
            error = float((own - reference).norm())
        if error > tolerance * (size + 1e-2 * scale):
            raise LinearizationError(
                f"parameter '{name}': the recorded uses give a gradient that differs "
                f"from autograd's by {error:.2e} (norm {size:.2e}). It is used outside "
                "its layer or outside the recorded scope, or the loss depends on it "
                "directly (put weight decay in the optimizer)"
            )
