"""What a model must be before anything is declared about its parameters."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from riemannian_modules.errors import LinearizationError, LostManifoldError

__all__ = ["require_manifolds", "require_module", "require_own_memory"]


def require_module(model: object) -> None:
    """Check that calls of the model can be recorded.

    Args:
        model: what was given as the model.

    Raises:
        TypeError: it is no module, or one compiled by torch.jit.
        LinearizationError: a lazy layer does not know its shape yet.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"the model is a {type(model).__name__}; pass a torch.nn.Module, whose "
            "calls can be recorded: wrap a function in one"
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise TypeError(
            "the model, or a part of it, is compiled by torch.jit, which hides its "
            "calls; pass the module that it was made from (torch.compile is fine)"
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, nn.parameter.UninitializedParameter):
            raise LinearizationError(
                f"parameter '{name}' of a lazy layer has no shape yet: call the model "
                "once with a batch before the metric is built"
            )


def require_own_memory(named: Mapping[str, Tensor]) -> None:
    """Check that parameters are whole, and that no two share their memory.

    Args:
        named: parameters by name.

    Raises:
        LinearizationError: one is a part of a tensor, or two share their memory.
    """
    found: dict[tuple[torch.device, int], str] = {}
    for name, tensor in named.items():
        # A DTensor, without importing what makes them.
        if hasattr(tensor, "device_mesh"):
            raise LinearizationError(
                f"parameter '{name}' is a {type(tensor).__name__}, divided among "
                "processes as FSDP does it, but the Riesz map, the retraction and the "
                "Gram matrix need all of it; keep whole parameters on every rank, with "
                "riemannian_modules.distributed.data_parallel(metric)"
            )
        if tensor.is_meta or tensor.numel() == 0:
            continue
        other = found.setdefault((tensor.device, tensor.data_ptr()), name)
        if other != name:
            raise LinearizationError(
                f"'{other}' and '{name}' are two parameters in the same memory: each "
                "would move with the step of the other. load_state_dict(assign=True) "
                "does that to a shared parameter; give both modules the same object "
                "again (a.weight = b.weight), or the second one a clone"
            )


def require_manifolds(now: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Check that parameters are on the manifolds that they were saved on.

    Args:
        now: names of manifolds by parameter.
        before: the same when the state was saved, of some parameters at least.

    Raises:
        LostManifoldError: one is on another.
    """
    for name, manifold in now.items():
        if before.get(name, manifold) != manifold:
            raise LostManifoldError(
                f"parameter '{name}' is on {manifold}, and was on {before[name]} when "
                "the metric's state was saved; a model's own state holds no manifolds, "
                "so declare them as before (riemannian_modules.geometrize) and build "
                'the metric anew, or, to go on without, take "manifolds" out of the '
                "state. Nothing was changed"
            )
