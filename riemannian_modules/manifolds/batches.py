"""What a metric of one point does at many: one point after the other."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError

__all__ = ["batch_of", "drop_kept", "for_each_point"]


def batch_of(tensor: Tensor, shape: Sequence[int], remedy: str) -> tuple[int, ...]:
    """Return the leading batch dimensions of a tensor of points or vectors.

    Args:
        tensor: ``(*batch, *shape)``.
        shape: shape of one point.
        remedy: what else to do, for the message.

    Returns:
        The batch.

    Raises:
        ShapeError: the tensor does not end with the shape.

    >>> batch_of(torch.zeros(5, 2, 3), (2, 3), "pass the whole tensor")
    (5,)
    """
    batch = tensor.ndim - len(shape)
    if batch < 0 or tuple(tensor.shape[batch:]) != tuple(shape):
        raise ShapeError(
            f"this metric belongs to points of shape {tuple(shape)}, with any leading "
            f"batch dimensions, and its factor couples all their entries; got "
            f"{tuple(tensor.shape)}: {remedy}"
        )
    return tuple(tensor.shape[:batch])


def drop_kept(value: Tensor, ndim: int, keepdim: bool) -> Tensor:
    """Return what a method returned with keepdim, without these dimensions.

    geoopt's stereographic classes are only right with keepdim: without it they
    multiply the factor of every point with the products of all.

    Args:
        value: ``(*batch, 1, ..., 1)``.
        ndim: number of dimensions that were kept.
        keepdim: whether to leave them.

    Returns:
        ``(*batch)``, or the argument.

    >>> drop_kept(torch.zeros(5, 1), 1, False).shape
    torch.Size([5])
    """
    return value if keepdim else value.reshape(value.shape[: value.ndim - ndim])


def for_each_point(
    metric_at: Callable[[Tensor], Any],
    verb: Callable[..., Tensor],
    shape: Sequence[int],
    result: Sequence[int],
    x: Tensor,
    *vectors: Tensor,
    remedy: str = "pass whole points and vectors",
) -> Tensor:
    """Return ``verb(metric_at(point), *vectors)`` of every point of a batch.

    Args:
        metric_at: makes what ``verb`` needs at a point ``shape``; where all vectors
            share one point it is called once.
        verb: takes that and one vector ``shape`` for each of ``vectors``.
        shape: shape of one point.
        result: shape of what ``verb`` returns.
        x: points, ``(*batch, *shape)``.
        vectors: ``(*batch, *shape)`` each; batches broadcast.
        remedy: what to do about a wrong shape, for the message.

    Returns:
        ``(*batch, *result)`` in the data type of the first vectors.

    Raises:
        ShapeError: a tensor does not end with the shape.
    """
    batches = (batch_of(tensor, shape, remedy) for tensor in (x, *vectors))
    batch = torch.broadcast_shapes(*batches)
    single = x.ndim == len(shape)
    rows = [t.expand((*batch, *shape)).reshape(-1, *shape) for t in vectors]
    points = [x] if single else x.expand((*batch, *shape)).reshape(-1, *shape)
    metric: Any = None
    found = []
    for i in range(len(rows[0])):
        if i < len(points):
            metric = metric_at(points[i].detach())
        found.append(verb(metric, *(row[i] for row in rows)))
    if not found:
        return vectors[0].new_empty((*batch, *result))
    return torch.stack(found).to(vectors[0].dtype).reshape((*batch, *result))
