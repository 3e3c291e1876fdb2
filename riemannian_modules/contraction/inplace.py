"""Modules that write over what they are called with."""

from torch import nn

from riemannian_modules.contraction.operator_norms import CONSTANTS

__all__ = ["writes_input"]

# What these return may be the input itself, seen in another way.
_VIEWS = (nn.Identity, nn.Flatten, nn.Unflatten, nn.Dropout)


def writes_input(module: nn.Module) -> bool:
    """Return whether a call may change the input, for all who read it later.

    Args:
        module: the module; what follows a layer that returns a new tensor is harmless.

    >>> relu = nn.ReLU(inplace=True)
    >>> writes_input(relu), writes_input(nn.Sequential(nn.Linear(2, 2), relu))
    (True, False)
    """
    if not isinstance(module, nn.Sequential):
        return any(getattr(each, "inplace", False) for each in module.modules())
    for child in module:
        if writes_input(child):
            return True
        if _is_new(child):
            return False
    return False


def _is_new(module: nn.Module) -> bool:
    """Whether what it returns is a tensor of its own for sure."""
    if isinstance(module, nn.Sequential):
        return any(map(_is_new, module))
    return isinstance(module, tuple(CONSTANTS)) and not isinstance(module, _VIEWS)
