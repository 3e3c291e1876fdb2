"""Factors that are diagonal, or block-diagonal over the positions of an output."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

__all__ = [
    "block_rows",
    "diagonal_rows",
    "divide",
    "rounded_to",
    "rounding",
]

# A remainder below this multiple of eps times its summands counts as rounding: of
# operations in the data type, and of a cotangent that went through half precision.
_COMPUTED = 16.0
_STORED = 4.0
_coarsest = ContextVar("coarsest", default=0.0)


@contextmanager
def rounded_to(dtype: torch.dtype) -> Iterator[None]:
    """Say what cotangents were rounded to before they were cast, inside this scope.

    Args:
        dtype: that of the outputs; only half precision makes a difference.

    >>> with rounded_to(torch.bfloat16):
    ...     rounding(torch.float32)
    0.03125
    """
    half = dtype.itemsize < 4
    token = _coarsest.set(torch.finfo(dtype).eps if half else 0.0)
    try:
        yield
    finally:
        _coarsest.reset(token)


def rounding(dtype: torch.dtype, operations: float = 1.0) -> float:
    """Return up to what a remainder is rounding, relative to its summands.

    Args:
        dtype: in which it was computed.
        operations: grows with the number of summands.
    """
    computed = _COMPUTED * operations * torch.finfo(dtype).eps
    return max(computed, _STORED * _coarsest.get())


def diagonal_rows(scale: Tensor) -> Tensor:
    """Return the factor ``diag(scale)``.

    Args:
        scale: ``(n, *output)``.

    Returns:
        ``(n, r, *output)`` with r the number of entries of one output.

    >>> diagonal_rows(torch.tensor([[2.0, 3.0]]))
    tensor([[[2., 0.],
             [0., 3.]]])
    """
    flat = scale.reshape(scale.shape[0], -1)
    return flat.diag_embed().view(*flat.shape, *scale.shape[1:])


def divide(cotangent: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Whiten by the factor ``diag(scale)``; what overflows or underflows is the rest.

    Args:
        cotangent: ``(n, *output)``.
        scale: positive, ``(n, *output)`` or broadcastable.

    Returns:
        ``y`` of shape ``(n, r)`` and ``rest`` of shape ``(n, *output)``.
    """
    quotient = cotangent / scale
    usable = quotient.isfinite() & (scale >= torch.finfo(scale.dtype).tiny)
    y = torch.where(usable, quotient, 0.0)
    return y.reshape(y.shape[0], -1), torch.where(usable, 0.0, cotangent)


def block_rows(blocks: Tensor, output: torch.Size) -> Tensor:
    """Return the factor whose rows at one position leave the other positions alone.

    Args:
        blocks: ``(n, positions, k, d)``, the rows of each position.
        output: ``(*positions, d)``, the shape of one output.

    Returns:
        ``(n, positions * k, *output)``, the rows of the first position first.
    """
    n, positions, k, d = blocks.shape
    if positions == 1:
        return blocks.reshape(n, k, *output)
    rows = blocks.new_zeros(n, positions, k, positions, d)
    rows.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
    return rows.view(n, positions * k, *output)
