"""How many entries a tensor that is formed a piece at a time may have."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["at_most", "is_bounded", "most_entries"]

_DEFAULT = 1 << 22
_entries: ContextVar[int] = ContextVar("entries", default=_DEFAULT)


def most_entries() -> int:
    """Return the bound of this scope, 2^22 outside of :func:`at_most`."""
    return _entries.get()


def is_bounded() -> bool:
    """Whether this scope asks for less than what is usual."""
    return _entries.get() < _DEFAULT


@contextmanager
def at_most(entries: int | None) -> Iterator[None]:
    """Lower the bound inside this scope, in this thread.

    Args:
        entries: the bound; None, or more than usual: nothing changes.

    >>> with at_most(1000):
    ...     most_entries()
    1000
    """
    bound = most_entries() if entries is None else min(entries, most_entries())
    token = _entries.set(max(1, bound))
    try:
        yield
    finally:
        _entries.reset(token)
