"""Which data type is enough, and products in that of their operands."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["single_suffices", "without_autocast"]

_SINGLE_LOSS = 7e-6


def single_suffices(trace: float) -> bool:
    """Whether ``1 + K sharp K^T`` may be in float32 where the model is.

    The push-through form loses the square root of ``|K sharp K^T|`` in precision, which
    the trace bounds. A negative one is nothing but rounding: rows are nearly normal to
    a manifold, and projecting them cancelled.

    Args:
        trace: of ``K sharp K^T``.

    >>> single_suffices(1.0), single_suffices(1e6), single_suffices(-1e-6)
    (True, False, False)
    """
    return trace >= 0.0 and torch.finfo(torch.float32).eps * trace**0.5 <= _SINGLE_LOSS


def without_autocast(kind: str) -> AbstractContextManager[object]:
    """Switch autocast off inside this scope: it is for the forward pass only.

    Args:
        kind: of device, such as ``"cuda"``.

    >>> with torch.autocast("cpu", torch.bfloat16), without_autocast("cpu"):
    ...     (torch.ones(2, 2) @ torch.ones(2, 2)).dtype
    torch.float32
    """
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()
