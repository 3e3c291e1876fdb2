"""Factors that are diagonal, or block-diagonal over the positions of an output."""

import torch
from torch import Tensor

__all__ = ["ROUNDING", "block_rows", "diagonal_rows", "divide"]

# A remainder below this multiple of eps times its summands counts as rounding.
ROUNDING = 16.0


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
