"""Parametrizations that move what they hold when they run, such as ``spectral_norm``.

While it trains, each use of a weight with a spectral norm is a step of the power
method, and a layer that runs again would have another weight than in the recorded
pass. In evaluation mode it takes the vectors that this pass has left, which are those
that the pass itself has used, and leaves them alone.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

__all__ = ["advice", "held_still", "in_training"]


def in_training(module: nn.Module) -> list[nn.Module]:
    """Return the parametrizations in training mode of a module and those below it.

    Of the older ``torch.nn.utils.spectral_norm``, the layers that have it.

    Args:
        module: any module.
    """
    found: dict[nn.Module, None] = {}
    for each in module.modules():
        if isinstance(each, ParametrizationList):
            found.update((own, None) for own in each.modules() if own.training)
        hooks = each._forward_pre_hooks.values()
        if each.training and any(isinstance(hook, SpectralNorm) for hook in hooks):
            found[each] = None
    return list(found)


def advice(module: nn.Module) -> str:
    """Return what to do about parametrizations, for the error of a failed replay.

    Args:
        module: what holds the parameter.

    Returns:
        A sentence with a blank in front; empty where there are none that may move.
    """
    still = (nn.ModuleDict, ParametrizationList, _WeightNorm)
    kinds = [type(e).__name__ for e in in_training(module) if not isinstance(e, still)]
    if not kinds:
        return ""
    names = ", ".join(dict.fromkeys(kinds))
    return (
        f" Its weight is computed by {names}, which may compute another one at every "
        "use while it trains: keep it in evaluation mode, by layer.parametrizations"
        ".eval() after every model.train()."
    )


@contextmanager
def held_still(module: nn.Module) -> Iterator[None]:
    """Put parametrizations into evaluation mode inside this scope, and then back.

    Args:
        module: what holds them, itself or below.
    """
    moving = in_training(module)
    for each in moving:
        each.training = False
    try:
        yield
    finally:
        for each in moving:
            each.training = True
