"""The tangent space of one parameter: base manifold, point and mass together."""

from dataclasses import dataclass, field
from functools import cached_property

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import MassError
from riemannian_modules.manifolds.riesz import (
    dimension,
    flat,
    riesz,
    root,
    root_adjoint,
)
from riemannian_modules.mass import Mass
from riemannian_modules.precision import dot

__all__ = ["TangentSpace"]

# Their proju is orthogonal entry by entry, so it serves covectors as well.
_ORTHOGONAL = (
    geoopt.Euclidean,
    geoopt.Sphere,
    geoopt.Stiefel,
    geoopt.SymmetricPositiveDefinite,
    geoopt.PoincareBall,
)


@dataclass(frozen=True)
class TangentSpace:
    """A tangent space with the massed base metric ``g0(D u, v)``.

    The layer metric adds ``K^T K`` to this. Everything takes leading batch
    dimensions and leaves its arguments alone.

    Args:
        manifold: base manifold (a geoopt manifold that keeps its contract).
        point: value of the parameter, ``shape``.
        mass: the mass D; other than scalar only on Euclidean parameters, where
            ``D^-1`` and the Riesz map commute.
        name: the parameter's name, for errors.

    Raises:
        MassError: a row, column or diagonal mass on a manifold that has no
            canonical meaning for it.

    >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(2), Mass(scalar=4.0))
    >>> space.sharp(torch.ones(2))
    tensor([0.2500, 0.2500])
    """

    manifold: geoopt.Manifold
    point: Tensor
    mass: Mass = field(default_factory=Mass)
    name: str = "parameter"

    def __post_init__(self) -> None:
        if not (self.mass.is_scalar or isinstance(self.manifold, geoopt.Euclidean)):
            raise MassError(
                f"'{self.name}' lives on {self.manifold.name}, where a mass for each "
                "row, column or entry has no canonical meaning; give it a number, or "
                "declare the parameter Euclidean"
            )

    def __repr__(self) -> str:
        return (
            f"TangentSpace({self.name}: {self.manifold.name}, shape "
            f"{tuple(self.point.shape)}, {self.mass!r})"
        )

    def sharp(self, e: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``e``."""
        return self.mass.divide(self.riesz(e))

    @property
    def divisor(self) -> float | None:
        """The mass where :meth:`sharp` is a division by it, else None."""
        flat = self.mass.is_scalar and isinstance(self.manifold, geoopt.Euclidean)
        return self.mass.scalar if flat else None

    def sharp_(self, e: Tensor) -> Tensor:
        """Return :meth:`sharp` of a covector that may be overwritten."""
        mass = self.divisor
        if mass is None:
            return self.sharp(e)
        return e if mass == 1.0 else e.div_(mass)

    def riesz(self, e: Tensor) -> Tensor:
        """Return :meth:`sharp` for mass 1."""
        return riesz(self.manifold, self.point, e)

    def flat(self, u: Tensor) -> Tensor:
        """Return a covector that represents the tangent vector ``u``."""
        return self.mass.multiply(flat(self.manifold, self.point, u))

    def inner(self, u: Tensor, v: Tensor) -> Tensor:
        """Return ``g0(D u, v)`` summed over all entries, a scalar, float64."""
        mass = self.divisor
        return dot(self.flat(u), v) if mass is None else mass * dot(u, v)

    def project(self, u: Tensor) -> Tensor:
        """Return the tangent part of an ambient vector or covector ``u``."""
        if isinstance(self.manifold, geoopt.Euclidean):
            return u
        projected: Tensor = self.manifold.proju(self.point, u)
        return projected

    def restrict(self, e: Tensor) -> Tensor:
        """Return the covector that agrees with ``e`` on tangent vectors, no more."""
        if isinstance(self.manifold, _ORTHOGONAL):
            return self.project(e)
        return flat(self.manifold, self.point, self.riesz(e))

    def root(self, z: Tensor) -> Tensor:
        """Return ``C z``, where ``C C^T`` is :meth:`sharp`."""
        return root(self.manifold, self.point, self.mass.divide_root(z))

    def root_adjoint(self, e: Tensor) -> Tensor:
        """Return ``C^T e``."""
        return self.mass.divide_root(root_adjoint(self.manifold, self.point, e))

    @cached_property
    def dim(self) -> int:
        """Dimension of the manifold."""
        if type(self.manifold) is geoopt.Euclidean:
            return self.point.numel()
        return int(dimension(self.manifold, self.point))

    def basis(self) -> Tensor:
        """Return Frobenius-orthonormal tangent vectors, ``(dim, *shape)``.

        Identity on Euclidean parameters. Cost O(p^3) elsewhere: for dense references.
        """
        p = self.point.numel()
        eye = torch.eye(p, dtype=self.point.dtype, device=self.point.device)
        if isinstance(self.manifold, geoopt.Euclidean):
            return eye.view(p, *self.point.shape)
        images = self.project(eye.view(p, *self.point.shape)).reshape(p, p)
        left, _, _ = torch.linalg.svd(images.mT)
        return left[:, : self.dim].mT.reshape(self.dim, *self.point.shape)

    def to(self, dtype: torch.dtype) -> "TangentSpace":
        """Return the same space in another data type."""
        return TangentSpace(self.manifold, self.point.to(dtype), self.mass, self.name)
