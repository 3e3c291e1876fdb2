"""Products in the precision of their operands, whatever autocast says."""

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = ["without_autocast"]


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
