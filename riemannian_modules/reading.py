"""Numbers that the host reads from tensors, and what is decided from them."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor

__all__ = ["Listener", "heard_by", "number"]


class Listener(Protocol):
    """What wants to know why the host reads a number."""

    def expect(self, decides: Callable[[float], object] | None) -> None:
        """Take note of what the next number is read for; None: nothing is known."""


class _Local(threading.local):
    listener: Listener | None = None


_local = _Local()


def number(value: Tensor, decides: Callable[[float], object]) -> float:
    """Return the number in a tensor on the host.

    Args:
        value: of one entry.
        decides: all that is made of the number must follow from what this returns, so
            that a captured step knows whether another number would change anything.

    >>> import torch
    >>> number(torch.tensor(2.0), lambda norm: norm < 1.0)
    2.0
    """
    listener = _local.listener
    if listener is None:
        return float(value.item())
    listener.expect(decides)
    try:
        return float(value.item())
    finally:
        listener.expect(None)


@contextmanager
def heard_by(listener: Listener) -> Iterator[None]:
    """Tell a listener what numbers are read for, in this scope and thread.

    Args:
        listener: the listener.
    """
    before, _local.listener = _local.listener, listener
    try:
        yield
    finally:
        _local.listener = before
