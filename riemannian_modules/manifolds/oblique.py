"""Oblique manifolds: matrices with unit columns or unit rows, products of spheres."""

from typing import Literal

import torch
from torch import Tensor

from riemannian_modules.manifolds.drawing import Device, Dtype, Embedded, Shape
from riemannian_modules.manifolds.riesz import dimension

__all__ = ["Oblique"]


class Oblique(Embedded):
    """Matrices whose columns, or whose rows, have Euclidean norm 1; Euclidean metric.

    One point is the whole matrix: ``inner`` and ``dist`` are those of the product of
    spheres (Absil & Gallivan, 2006). On the weight ``(out, in)`` of a linear layer,
    unit rows are unit filters. The default retraction normalises ``x + u``. Random
    points are uniform; the vectors of the origin are all the first unit vector.

    Args:
        unit: ``"columns"`` or ``"rows"``.

    Raises:
        ValueError: ``unit`` is something else.

    >>> Oblique("rows").projx(torch.tensor([[3.0, 4.0], [0.0, 2.0]]))
    tensor([[0.6000, 0.8000],
            [0.0000, 1.0000]])
    """

    name = "Oblique"

    def __init__(self, unit: Literal["columns", "rows"] = "columns") -> None:
        super().__init__()
        if unit not in {"columns", "rows"}:
            raise ValueError(f"unit={unit!r}: choose 'columns' or 'rows'")
        self.unit = unit

    @property
    def dim(self) -> int:
        """The dimension along which vectors have norm 1: -2 or -1."""
        return -2 if self.unit == "columns" else -1

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest point: every vector divided by its norm."""
        return x / torch.linalg.vector_norm(x, dim=self.dim, keepdim=True)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the orthogonal projection of ``u`` on the tangent space at ``x``."""
        return u - x * self._dot(x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return ``x + u`` with every vector divided by its norm; second order."""
        return self.projx(x + u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow great circles; exact."""
        angle = torch.linalg.vector_norm(u, dim=self.dim, keepdim=True)
        return self.projx(x * angle.cos() + u * torch.sinc(angle / torch.pi))

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the shortest tangent vector at ``x`` that leads to ``y``.

        Unique unless a vector of ``y`` is the opposite of that of ``x``.
        """
        across = self.proju(x, y - x)
        square, cosine = self._dot(across, across), self._dot(x, y)
        # Nearby the ratio of angle and sine has lost the digits of its derivatives.
        near = (square < torch.finfo(x.dtype).eps ** 0.5) & (cosine > 0)
        sine = torch.where(near | (square == 0), 1.0, square).sqrt()
        series = 1.0 + square / 6.0 + 3.0 / 40.0 * square.square()
        return across * torch.where(near, series, torch.atan2(sine, cosine) / sine)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the root of the sum of the squared angles between the vectors."""
        return torch.linalg.vector_norm(
            self._angles(x, y), dim=(-1, -2), keepdim=keepdim
        )

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the squared distance, with two derivatives where ``x`` is ``y``."""
        # Of every order away from there; the second ones are those of the chord.
        chord = (y - x).square().sum(self.dim, keepdim=True)
        square = torch.where(chord > 0, self._angles(x, y).square(), chord)
        return square.sum((-1, -2), keepdim=keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` in parallel along the great circles from ``x`` to ``y``.

        An isometry: the reflection of ``v`` that exchanges ``x`` and ``-y``.
        """
        tiny = torch.finfo(x.dtype).tiny
        middle = torch.nn.functional.normalize(x + y, dim=self.dim, eps=tiny)
        return v - 2.0 * middle * self._dot(middle, v)

    def _random(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        return self.projx(torch.randn(shape, dtype=dtype, device=device))

    def _origin(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        point = torch.zeros(shape, dtype=dtype, device=device)
        point.narrow(self.dim, 0, 1).fill_(1.0)
        return point

    def extra_repr(self) -> str:
        """Say which vectors have norm 1."""
        return f"unit={self.unit}"

    def _dot(self, u: Tensor, v: Tensor) -> Tensor:
        return (u * v).sum(self.dim, keepdim=True)

    def _angles(self, x: Tensor, y: Tensor) -> Tensor:
        # Accurate at every angle, unlike the arc cosine (Kahan).
        chord = (y - x).square().sum(self.dim, keepdim=True)
        apart = chord > 0
        sine = torch.where(apart, chord, 1.0).sqrt()
        cosine = torch.linalg.vector_norm(y + x, dim=self.dim, keepdim=True)
        return torch.where(apart, 2.0 * torch.atan2(sine, cosine), 0.0)

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if len(shape) < 2 or shape[self.dim] < 2:
            return False, (
                f"`{name}` should be matrices whose {self.unit} have at least 2 "
                f"entries, got shape {tuple(shape)}"
            )
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        norm = torch.linalg.vector_norm(x, dim=self.dim)
        if not torch.allclose(norm, torch.ones_like(norm), atol=atol, rtol=rtol):
            return False, f"`{self.unit}` of norm != 1 with atol={atol}, rtol={rtol}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        radial = self._dot(x, u)
        if not torch.allclose(radial, torch.zeros_like(radial), atol=atol, rtol=rtol):
            return False, (
                f"`<x, u> != 0` for some of the {self.unit} with atol={atol}, "
                f"rtol={rtol}"
            )
        return True, None


@dimension.register(Oblique)
def _(manifold: Oblique, x: Tensor) -> int:
    return x.numel() - x.numel() // x.shape[manifold.dim]
