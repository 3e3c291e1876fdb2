"""What torch's transformations leave to be known of a tensor."""

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = ["any_of", "differentiated"]


def differentiated(x: Tensor) -> bool:
    """Return whether derivatives by ``x`` may be asked for; True if that is unknown.

    Decompositions whose derivatives cost as much again need not prepare for them where
    nobody can take any, as in projections between steps.

    >>> differentiated(torch.ones(2)), differentiated(torch.ones(2, requires_grad=True))
    (False, True)
    """
    if x.requires_grad and torch.is_grad_enabled():
        return True
    return (
        torch._C._functorch.is_functorch_wrapped_tensor(x)
        or forward_ad._current_level >= 0
        or torch.compiler.is_compiling()
    )


def any_of(flags: Tensor) -> bool:
    """Return whether a flag is set; inside of ``vmap``, one of the whole batch.

    >>> any_of(torch.tensor([False, True]))
    True
    """
    while torch._C._functorch.is_functorch_wrapped_tensor(flags):
        flags = torch._C._functorch.get_unwrapped(flags)
    return bool(flags.any())
