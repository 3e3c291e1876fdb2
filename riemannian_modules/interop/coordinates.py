"""A block's vectors as columns of numbers, for libraries of linear algebra."""

from collections.abc import Mapping
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from riemannian_modules.metric import LayerMetric

__all__ = ["Coordinates", "Kind"]

Kind = Literal["tangent", "ambient"]


class Coordinates:
    """A metric as a symmetric matrix that is never formed.

    Args:
        metric: the metric of a block.
        kind: ``"tangent"``: numbers are coefficients in orthonormal tangent vectors, of
            which there are as many as dimensions; the matrix is positive definite, and
            making the basis costs O(p^3) on curved manifolds. ``"ambient"``: numbers
            are the entries of the tensors; the matrix vanishes on what is not tangent.

    Raises:
        ValueError: another kind.

    >>> import geoopt
    >>> from riemannian_modules import Part, TangentSpace
    >>> space = TangentSpace(geoopt.Sphere(), torch.tensor([1.0, 0.0]))
    >>> Coordinates(LayerMetric([Part("w", space)]), "ambient").apply(torch.ones(2))
    tensor([0., 1.])
    """

    def __init__(self, metric: LayerMetric, kind: Kind = "tangent") -> None:
        if kind not in ("tangent", "ambient"):
            raise ValueError(f"coordinates={kind!r}; choose 'tangent' or 'ambient'")
        self.metric, self.kind = metric, kind
        self.spaces = {part.name: part.space for part in metric.parts}
        points = [space.point for space in self.spaces.values()]
        self.dtype, self.device = points[0].dtype, points[0].device
        self.size = metric.dim if kind == "tangent" else sum(p.numel() for p in points)

    @cached_property
    def _bases(self) -> dict[str, Tensor]:
        return {
            name: space.basis().reshape(-1, space.point.numel())
            for name, space in self.spaces.items()
        }

    def _sizes(self) -> list[int]:
        if self.kind == "tangent":
            return [len(basis) for basis in self._bases.values()]
        return [space.point.numel() for space in self.spaces.values()]

    def vectors(self, numbers: Tensor) -> dict[str, Tensor]:
        """Return the vectors with these numbers, tangent ones.

        Args:
            numbers: ``(size,)``.

        Returns:
            ``{name: tensor}``.
        """
        parts = zip(self.spaces.items(), numbers.split(self._sizes()), strict=True)
        if self.kind == "tangent":
            return {
                name: (part @ self._bases[name]).view_as(space.point)
                for (name, space), part in parts
            }
        return {
            name: space.project(part.view_as(space.point))
            for (name, space), part in parts
        }

    def numbers(self, covectors: Mapping[str, Tensor]) -> Tensor:
        """Return the numbers of covectors: the transpose of :meth:`vectors`.

        Args:
            covectors: ``{name: tensor}``.

        Returns:
            ``(size,)``.
        """
        found = []
        for name, space in self.spaces.items():
            e = covectors[name]
            if self.kind == "tangent":
                found.append(self._bases[name] @ e.flatten())
            else:
                with torch.enable_grad():
                    u = torch.zeros_like(space.point, requires_grad=True)
                    (e,) = torch.autograd.grad(space.project(u), u, e)
                found.append(e.flatten())
        return torch.cat(found)

    def apply(self, numbers: Tensor) -> Tensor:
        """Return the metric times a column of numbers, ``(size,)``."""
        return self.numbers(self.metric.flat(self.vectors(numbers)))

    def solve(self, numbers: Tensor) -> Tensor:
        """Return the inverse metric times a column of numbers, ``(size,)``.

        In ambient coordinates the inverse on the tangent space.
        """
        parts = zip(self.spaces.items(), numbers.split(self._sizes()), strict=True)
        covectors = {
            name: (
                part @ self._bases[name] if self.kind == "tangent" else part
            ).view_as(space.point)
            for (name, space), part in parts
        }
        found = self.metric.sharp(covectors)
        if self.kind == "tangent":
            return self.numbers(found)
        return torch.cat([vector.flatten() for vector in found.values()])
