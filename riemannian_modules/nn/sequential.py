"""A chain of modules."""

from torch import nn

__all__ = ["Sequential"]


class Sequential(nn.Sequential):
    """Modules one after the other; the manifold is the product of theirs.

    A chain is what :class:`torch.nn.Sequential` is already, so this is that class
    under the name that the other compositions will share.

    >>> import torch
    >>> chain = Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh())
    >>> chain(torch.zeros(2, 3)).shape
    torch.Size([2, 4])
    """
