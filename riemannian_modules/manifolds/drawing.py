"""Points that a manifold draws, in the data type that is asked for."""

from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from torch import Tensor

__all__ = ["drawn"]


def drawn(
    manifold: geoopt.Manifold,
    verb: str,
    size: Sequence[Any],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    **options: Any,
) -> Tensor:
    """Return ``manifold.random`` or ``manifold.origin`` as a plain tensor.

    geoopt's classes with a curvature, or any other tensor of their own, refuse every
    data type and device but that tensor's: there the point is converted.

    Args:
        manifold: any manifold.
        verb: ``"random"`` or ``"origin"``.
        size: shape, ``(*batch, *shape)``, or a sequence that holds it.
        dtype: data type; None: what the manifold takes.
        device: device.
        **options: what else the method takes.

    >>> drawn(geoopt.PoincareBall(), "random", (2,), dtype=torch.float64).dtype
    torch.float64
    """
    draw = getattr(manifold, verb)
    foreign = type(manifold).random.__module__.startswith("geoopt.")
    if manifold.dtype is None or not foreign:
        options |= {"dtype": dtype, "device": device}
    point: Tensor = draw(*(size or ((),)), **options)
    return point.detach().as_subclass(Tensor).to(device=device, dtype=dtype)
