"""How many entries a tensor that is formed a piece at a time may have."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["MOST_ENTRIES", "at_most", "is_bounded", "most_entries"]

MOST_ENTRIES = 1 << 22
_entries: ContextVar[int | None] = ContextVar("entries", default=None)


def most_entries() -> int:
    """Return the bound of this scope, 2^22 outside of :func:`at_most`."""
    bound = _entries.get()
    return MOST_ENTRIES if bound is None else min(bound, MOST_ENTRIES)


def is_bounded() -> bool:
    """Whether this is inside of :func:`at_most`."""
    return _entries.get() is not None


@contextmanager
def at_most(entries: int) -> Iterator[None]:
    """Lower the bound inside this scope, in this thread.

    Args:
        entries: the bound; more than that of the scope around it changes nothing.

    >>> with at_most(1000):
    ...     most_entries()
    1000
    """
    token = _entries.set(max(1, min(entries, most_entries())))
    try:
        yield
    finally:
        _entries.reset(token)
