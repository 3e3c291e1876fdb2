"""What all compositions share: children by role, one formula, a tree when printed."""

import torch
from torch import Tensor, nn

from riemannian_modules.errors import ShapeError
from riemannian_modules.nn.base import RiemannianModule
from riemannian_modules.nn.tree import printed

__all__ = ["Composition", "require_module", "require_same_shape"]


class Composition(RiemannianModule):
    """A module that is made of others and has no parameters of its own.

    A child is the attribute that its role is called (``gate.value``), a member of a
    list its number. Its manifold is the product of its children's
    (:meth:`RiemannianModule.declared`), nested as deep as the modules are. It needs no
    rule for its factors: the metric's recursion is reverse-mode differentiation, and
    finds every child by its own calls.
    """

    def __repr__(self) -> str:
        # torch.func.vmap asks in every call how the thing that it maps is called.
        if torch._C._functorch.maybe_current_level() is not None:
            return f"{type(self).__name__}(...)"
        return printed(self)


def require_module(child: object, role: str) -> nn.Module:
    """Return the child if it is a module.

    Args:
        child: what is to become a child.
        role: what it is for.

    Returns:
        The child.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(child, nn.Module):
        raise TypeError(
            f"{role} is a {type(child).__name__}; compositions are made of "
            "torch.nn.Module objects, so that their parameters are found: wrap a "
            "function in a module (torch.nn.Tanh() for torch.tanh)"
        )
    return child


def require_same_shape(one: Tensor, other: Tensor, what: str) -> None:
    """Refuse to add tensors of different shapes, which would broadcast.

    Args:
        one: a tensor.
        other: another one.
        what: both in words, and what to do.

    Raises:
        ShapeError: their shapes differ.
    """
    if one.shape != other.shape:
        raise ShapeError(f"shapes {tuple(one.shape)} and {tuple(other.shape)}: {what}")
