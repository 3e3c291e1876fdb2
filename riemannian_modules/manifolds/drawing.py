"""Manifolds that draw points of a shape; points in the data type that is asked for."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import geoopt
import torch
from geoopt.utils import size2shape
from torch import Tensor

__all__ = ["Device", "Drawing", "Dtype", "Embedded", "Shape", "drawn"]

Shape = tuple[int, ...]
Device = torch.device | str | None
Dtype = torch.dtype | None


class Drawing(geoopt.Manifold):  # type: ignore[misc]
    """A manifold that makes ``random`` and ``origin`` of functions of a shape."""

    def random(
        self, *size: int, dtype: Dtype = None, device: Device = None
    ) -> geoopt.ManifoldTensor:
        """Draw points; the class says from which distribution.

        Args:
            *size: shape, ``(*batch, *shape)``.
            dtype: data type.
            device: device.

        Returns:
            Points of the manifold.
        """
        point = self._random(self._shape(size), dtype, device)
        return geoopt.ManifoldTensor(point, manifold=self)

    def origin(
        self,
        *size: int,
        dtype: Dtype = None,
        device: Device = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """Return the point that the class calls its origin.

        Args:
            *size: shape, ``(*batch, *shape)``.
            dtype: data type.
            device: device.
            seed: ignored; part of geoopt's interface.

        Returns:
            Points of the manifold.
        """
        point = self._origin(self._shape(size), dtype, device)
        return geoopt.ManifoldTensor(point, manifold=self)

    def _shape(self, size: tuple[int, ...]) -> Shape:
        shape: Shape = tuple(size2shape(*size)) if size else ()
        self._assert_check_shape(shape, "x")
        return shape

    @abstractmethod
    def _random(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor: ...

    @abstractmethod
    def _origin(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor: ...


class Embedded(Drawing):
    """A manifold of matrices with the Euclidean metric of the space around it.

    There covectors are vectors, and the Riesz map and its root are the projection.
    """

    ndim = 2
    reversible = False

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the Euclidean inner product, summed over all entries."""
        return (u * (u if v is None else v)).sum((-1, -2), keepdim=keepdim)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        tangent: Tensor = self.proju(x, u)
        return tangent


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
