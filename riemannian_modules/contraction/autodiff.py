"""Derivatives of functions, with the types that torch.func leaves open."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch
from torch.jit._fuser import optimized_execution

__all__ = ["exact_derivatives", "jvp", "vjp"]

P = ParamSpec("P")
A = TypeVar("A")
B = TypeVar("B")


def exact_derivatives(function: Callable[P, B]) -> Callable[P, B]:
    """Let a function see scripted code without TorchScript's optimiser.

    Once that has optimised a function, after its first call or two, ``torch.func`` gets
    wrong second derivatives of it. Those of geoopt for the Poincare ball are scripted.

    Args:
        function: what differentiates a user's model.

    Returns:
        The same function with the optimiser switched off while it runs.
    """

    @wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> B:
        with optimized_execution(False):
            return function(*args, **kwargs)

    return run


def jvp(function: Callable[[A], B], at: A, along: A) -> tuple[B, B]:
    """Return the value of a function and its derivative, in forward mode.

    Args:
        function: from tensors to tensors, tuples or dictionaries of them.
        at: the argument.
        along: the direction, of the structure of ``at``.

    Returns:
        The value and the derivative.

    >>> jvp(lambda x: x.square(), torch.tensor(3.0), torch.tensor(1.0))
    (tensor(9.), tensor(6.))
    """
    value, derivative, *_ = torch.func.jvp(function, (at,), (along,))
    return value, derivative


def vjp(function: Callable[[A], B], at: A) -> tuple[B, Callable[[B], A]]:
    """Return the value of a function and the transpose of its derivative.

    Args:
        function: from tensors to tensors, tuples or dictionaries of them.
        at: the argument.

    Returns:
        The value, and a function from cotangents of it to cotangents of ``at``.

    >>> vjp(lambda x: x.square(), torch.tensor(3.0))[1](torch.tensor(1.0))
    tensor(6.)
    """
    value, pull, *_ = torch.func.vjp(function, at)
    return value, lambda cotangent: pull(cotangent)[0]
