"""Batches without points, whose sizes geoopt's product manifold cannot tell."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import geoopt
import torch

__all__ = ["PossiblyEmpty"]


def _unless_empty(method: Callable[..., Any], count: int = 1) -> Callable[..., Any]:
    """Return a method that takes and returns tensors ``(*batch, size)``.

    Args:
        method: takes a manifold and such tensors by position.
        count: the number of tensors that it returns; 0: a verdict on them.
    """

    @wraps(method)
    def guarded(manifold: Any, *tensors: torch.Tensor, **options: Any) -> Any:
        batch = torch.broadcast_shapes(*(tensor.shape[:-1] for tensor in tensors))
        if 0 not in batch:
            return method(manifold, *tensors, **options)
        nothing = tensors[0].new_empty((*batch, manifold.n_elements))
        return {0: (True, None), 1: nothing}.get(count, (nothing,) * count)

    return guarded


class PossiblyEmpty(geoopt.ProductManifold):  # type: ignore[misc]
    """geoopt's product manifold, also for no points at all."""

    proju = _unless_empty(geoopt.ProductManifold.proju)
    retr = _unless_empty(geoopt.ProductManifold.retr)
    expmap = _unless_empty(geoopt.ProductManifold.expmap)
    logmap = _unless_empty(geoopt.ProductManifold.logmap)
    transp = _unless_empty(geoopt.ProductManifold.transp)
    retr_transp = _unless_empty(geoopt.ProductManifold.retr_transp, 2)
    expmap_transp = _unless_empty(geoopt.ProductManifold.expmap_transp, 2)
    transp_follow_retr = _unless_empty(geoopt.ProductManifold.transp_follow_retr)
    transp_follow_expmap = _unless_empty(geoopt.ProductManifold.transp_follow_expmap)
    _check_point_on_manifold = _unless_empty(
        geoopt.ProductManifold._check_point_on_manifold, 0
    )
    _check_vector_on_tangent = _unless_empty(
        geoopt.ProductManifold._check_vector_on_tangent, 0
    )
