"""Which data type is enough, and products in that of their operands."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor

from riemannian_modules.reading import number

__all__ = ["dot", "single_suffices", "wide_dot", "without_autocast"]

SINGLE_LOSS = 7e-6
# So many entries are widened at a time: a large tensor has no copy in float64.
_PIECE = 1 << 22


def dot(u: Tensor, v: Tensor) -> Tensor:
    """Return the sum of the products of all entries, a scalar, float64.

    The products leave the range of a data type long before the entries do. On the CPU
    the sum in that of the tensors tells whether they did, and then serves; elsewhere
    reading it would make the host wait, or is not possible (inside ``torch.vmap``), so
    that it is :func:`wide_dot`.

    Args:
        u: any shape.
        v: the same shape and data type.

    >>> u = torch.full((4,), 1e20)
    >>> torch.dot(u, u), dot(u, u)
    (tensor(inf), tensor(4.0000e+40, dtype=torch.float64))
    """
    if u.is_cpu and not _traced(u, v):
        own = torch.dot(u.reshape(-1), v.reshape(-1))
        least = u.numel() * _least(own.dtype)

        def tells(value: float) -> bool:
            return least <= abs(value) < math.inf

        if tells(number(own, tells)):
            return own.double()
    return wide_dot(u, v)


def _traced(*tensors: Tensor) -> bool:
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    return torch.compiler.is_compiling() or any(map(wrapped, tensors))


@cache
def _least(dtype: torch.dtype) -> float:
    # In sums below that, for each entry, what underflowed may be more than rounding.
    info = torch.finfo(dtype)
    return info.tiny / info.eps


def wide_dot(u: Tensor, v: Tensor) -> Tensor:
    """Return the sum of the products of all entries, formed in float64, a scalar.

    Args:
        u: any shape.
        v: the same shape.

    >>> wide_dot(torch.ones(2, 2), torch.ones(2, 2))
    tensor(4., dtype=torch.float64)
    """
    pieces = zip(u.reshape(-1).split(_PIECE), v.reshape(-1).split(_PIECE), strict=True)
    first, *others = (torch.dot(a.double(), b.double()) for a, b in pieces)
    return sum(others, start=first)


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
    return trace >= 0.0 and torch.finfo(torch.float32).eps * trace**0.5 <= SINGLE_LOSS


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
