"""Batches without points, whose sizes several of geoopt's classes cannot tell."""

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import geoopt
import torch
from torch import Tensor

__all__ = ["possibly_empty"]

Kind = TypeVar("Kind", bound=type[geoopt.Manifold])

_NUMBERS = ("inner", "norm", "dist", "dist2")
_VECTORS = (
    "component_inner",
    "egrad2rgrad",
    "proju",
    "projx",
    "retr",
    "expmap",
    "logmap",
    "transp",
    "transp_follow_retr",
    "transp_follow_expmap",
)
_PAIRS = ("retr_transp", "expmap_transp")
_VERDICTS = ("_check_point_on_manifold", "_check_vector_on_tangent")


def _nothing(manifold: geoopt.Manifold, name: str, given: Any, keepdim: bool) -> Any:
    if name in _VERDICTS:
        return True, None
    nothing = given[0].new_zeros(torch.broadcast_shapes(*(t.shape for t in given)))
    if name in _PAIRS:
        return nothing, nothing
    if name in _VECTORS:
        return nothing
    points = nothing.ndim - manifold.ndim
    kept = (1,) * manifold.ndim if keepdim else ()
    return nothing.new_zeros((*nothing.shape[:points], *kept))


def possibly_empty(kind: Kind) -> Kind:
    """Return a class of manifolds whose methods also take no points at all.

    Args:
        kind: its methods take tensors ``(*batch, *shape)`` by position.
    """

    def guarded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(method)
        def run(manifold: Any, *tensors: Tensor | None, **options: Any) -> Any:
            given = [tensor for tensor in tensors if tensor is not None]
            if all(tensor.numel() for tensor in given):
                return method(manifold, *tensors, **options)
            return _nothing(manifold, name, given, options.get("keepdim", False))

        return run

    for name in _NUMBERS + _VECTORS + _PAIRS + _VERDICTS:
        setattr(kind, name, guarded(name, getattr(kind, name)))
    return kind
