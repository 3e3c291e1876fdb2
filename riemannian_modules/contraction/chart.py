r"""A chart of the product of a model's manifolds: plain coordinates around one point.

    psi(u) = R_w(B u)

B is a basis of the tangent space and R any smooth map that leaves ``w`` with the right
velocity. What is invariant, such as the spectrum of the Hessian in the metric, does
not depend on R, so that one code serves Euclidean and constrained parameters.
"""

from collections.abc import Mapping
from functools import partial

import geoopt
import torch
from torch import Tensor

from riemannian_modules.contraction.autodiff import jvp, vjp
from riemannian_modules.contraction.smooth import chart_step
from riemannian_modules.errors import ContractionError
from riemannian_modules.retractions import Retraction
from riemannian_modules.tangent import TangentSpace

__all__ = ["Chart"]


class Chart:
    """Coordinates of all parameters of a model around their values.

    Implements :eq:`chart`.

    Args:
        spaces: tangent space of each parameter, by name.
        basis: whether the coordinates belong to a basis of the tangent space; else
            they are ambient tangent vectors and nothing is formed. On Euclidean
            parameters the two are the same.
        retraction: the map R; None: :func:`chart_step`, which costs least.

    Attributes:
        size: number of coordinates; with a basis the dimension of the manifold.
        slices: the coordinates of each parameter.

    Raises:
        ContractionError: R does not leave a point with the right velocity.

    Cost: none on Euclidean parameters, O(p^3) for a basis of any other with p entries.

    >>> space = TangentSpace(geoopt.Sphere(), torch.tensor([1.0, 0.0, 0.0]))
    >>> chart = Chart({"w": space})
    >>> chart.size, chart.point(torch.zeros(2))["w"].tolist()
    (2, [1.0, 0.0, 0.0])
    """

    def __init__(
        self,
        spaces: Mapping[str, TangentSpace],
        *,
        basis: bool = True,
        retraction: Retraction | None = None,
    ) -> None:
        self.spaces = dict(spaces)
        self.retraction = retraction
        self.slices: dict[str, slice] = {}
        self._bases: dict[str, Tensor] = {}
        start = 0
        for name, space in self.spaces.items():
            if basis and not self.is_flat(name):
                self._bases[name] = space.basis()
                size = space.dim
            else:
                size = space.point.numel()
            self.slices[name] = slice(start, start + size)
            start += size
        self.size = start
        self._require_right_velocity()

    def is_flat(self, name: str) -> bool:
        """Whether the parameter is Euclidean, so that its chart is ``w + u``."""
        return isinstance(self.spaces[name].manifold, geoopt.Euclidean)

    def zeros(self) -> Tensor:
        """Return the coordinates of the point itself, ``(size,)``."""
        first = next(iter(self.spaces.values())).point
        return torch.zeros(self.size, dtype=first.dtype, device=first.device)

    def embed(self, u: Tensor) -> dict[str, Tensor]:
        """Return the tangent vectors ``B u`` at the point.

        Args:
            u: coordinates, ``(size,)``.

        Returns:
            Tangent vectors by name.
        """
        return {name: self._embed(name, u[at]) for name, at in self.slices.items()}

    def move(self, name: str, u: Tensor) -> Tensor:
        """Return one parameter's value at its own coordinates.

        Args:
            name: the parameter.
            u: its coordinates.

        Returns:
            A point of its manifold.
        """
        space, step = self.spaces[name], self._embed(name, u)
        if self.retraction is None or self.is_flat(name):
            return chart_step(space.manifold, space.point, step)
        return self.retraction(space.manifold, space.point, step)

    def point(self, u: Tensor) -> dict[str, Tensor]:
        """Return the parameters at the coordinates ``u``.

        Args:
            u: coordinates, ``(size,)``.

        Returns:
            Points by name, differentiable in ``u``.
        """
        return {name: self.move(name, u[at]) for name, at in self.slices.items()}

    def coordinates(self, tangents: Mapping[str, Tensor]) -> Tensor:
        """Return the ``u`` with ``B u`` equal to these tangent vectors.

        Args:
            tangents: tangent vectors at the point, by name.

        Returns:
            Coordinates, ``(size,)``.
        """
        return torch.cat(
            [
                self._bases[name].flatten(1) @ tangents[name].reshape(-1)
                if name in self._bases
                else tangents[name].reshape(-1)
                for name in self.slices
            ]
        )

    def covectors(self, c: Tensor) -> dict[str, Tensor]:
        """Return ambient covectors that act on ``B u`` as ``c`` acts on ``u``.

        Args:
            c: covector in coordinates, ``(size,)``.

        Returns:
            Covectors by name.
        """
        found = {}
        for name, at in self.slices.items():
            shape = self.spaces[name].point.shape
            basis = self._bases.get(name)
            own = c[at] if basis is None else c[at] @ basis.flatten(1)
            found[name] = own.reshape(shape)
        return found

    def restrict(self, c: Tensor) -> Tensor:
        """Return the covector ``c`` with what acts on no tangent vector removed.

        Args:
            c: covector in coordinates, ``(size,)``.

        Returns:
            ``(size,)``; the argument itself where the coordinates have a basis.
        """
        pieces = []
        for name, at in self.slices.items():
            if name in self._bases or self.is_flat(name):
                pieces.append(c[at])
                continue
            space = self.spaces[name]
            pull = vjp(space.project, space.point)[1]
            pieces.append(pull(c[at].view_as(space.point)).reshape(-1))
        return torch.cat(pieces)

    def _embed(self, name: str, u: Tensor) -> Tensor:
        space = self.spaces[name]
        if name in self._bases:
            return (u @ self._bases[name].flatten(1)).view_as(space.point)
        return space.project(u.view_as(space.point))

    def _require_right_velocity(self) -> None:
        for name, at in self.slices.items():
            if self.is_flat(name):
                continue
            point = self.spaces[name].point
            u = torch.zeros(at.stop - at.start, dtype=point.dtype, device=point.device)
            v = torch.linspace(-1.0, 1.0, len(u), dtype=u.dtype, device=u.device)
            start, velocity = jvp(partial(self.move, name), u, v)
            wanted = self._embed(name, v)
            scale = torch.finfo(point.dtype).eps ** 0.5
            near = (start - point).norm() <= scale * (1.0 + point.norm())
            right = (velocity - wanted).norm() <= scale * (1.0 + wanted.norm())
            if not bool(near & right):
                what = self.retraction or "chart_step"
                raise ContractionError(
                    f"'{name}' on {self.spaces[name].manifold.name}: {what} leaves the "
                    f"point with a velocity that is off by "
                    f"{float((velocity - wanted).norm()):.1e}; register a smooth "
                    "chart_step for this manifold"
                )
