"""A manifold in other units: all distances times a number."""

import math
from collections.abc import Callable

import geoopt
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError, MassError
from riemannian_modules.manifolds.batches import drop_kept
from riemannian_modules.manifolds.contract import base_of, ensure_contract
from riemannian_modules.manifolds.delegating import Delegating
from riemannian_modules.manifolds.no_points import possibly_empty
from riemannian_modules.manifolds.quotient import Quotient
from riemannian_modules.manifolds.riesz import (
    dimension,
    flat,
    require_own_formulas,
    riesz,
    root,
    root_adjoint,
)

__all__ = ["Scaled"]


@possibly_empty
class Scaled(Delegating):
    """The points of a manifold with the metric ``scale^2 g0``.

    Points, tangent vectors, geodesics, retractions and transports are those of the
    manifold inside, ``base``. Inner products are ``scale^2`` times larger, distances
    ``scale`` times; gradients are ``scale^2`` times shorter. A layer metric with the
    mass mu on ``Scaled(M, s)`` is the one with the mass ``mu s^2`` on M, so for a
    single parameter a mass says the same in fewer words. This class is for manifolds
    that carry a unit of their own: parts of a product, outputs, distances.

    Replaces ``geoopt.Scaled``, which divides steps by the scale and leaves the metric
    as it is. The scale is a fixed number.

    Args:
        manifold: a manifold that keeps its contract.
        scale: a positive number.

    Raises:
        ManifoldContractError: the manifold cannot carry a layer metric, or it is a
            MetricManifold.
        MassError: the scale is not a positive number.

    >>> import torch
    >>> circle, x = Scaled(geoopt.Sphere(), 2.0), torch.tensor([1.0, 0.0])
    >>> circle.egrad2rgrad(x, torch.tensor([5.0, 8.0])), circle.dist(x, x.flip(0))
    (tensor([0., 2.]), tensor(3.1416))
    """

    invariant: Callable[[Tensor], Tensor]

    def __init__(self, manifold: geoopt.Manifold, scale: float = 1.0) -> None:
        super().__init__()
        ensure_contract(manifold, "Scaled")
        if base_of(manifold) is not manifold:
            raise ManifoldContractError(
                "Scaled: a MetricManifold holds one metric; scale its .base instead"
            )
        require_own_formulas(manifold, "Scaled")
        self.base = manifold
        self.scale = float(scale)
        if not 0.0 < self.scale < math.inf:
            raise MassError(f"Scaled: the scale must be positive, got {scale}")
        self.name = f"Scaled({manifold.name})"
        self.ndim = manifold.ndim
        self.reversible = manifold.reversible
        if isinstance(manifold, Quotient):
            self.invariant = manifold.invariant

    def _at(self, x: Tensor) -> geoopt.Manifold:
        return self.base

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return ``scale^2 g0(u, v)``."""
        value = self.scale**2 * self.base.inner(x, u, v, keepdim=True)
        return drop_kept(value, self.ndim, keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return ``scale^2`` times that of the base."""
        return self.scale**2 * self.base.component_inner(x, u, v)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        return riesz(self.base, x, u) / self.scale**2

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base's logarithm."""
        return self.base.logmap(x, y)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return ``scale`` times the distance of the base."""
        return self.scale * self.base.dist(x, y, keepdim=keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return ``scale^2`` times the squared distance of the base."""
        return self.scale**2 * self.base.dist2(x, y, keepdim=keepdim)

    def extra_repr(self) -> str:
        """Return the scale."""
        return f"scale={self.scale:g}"

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        return self.base._check_shape(shape, name)


@flat.register(Scaled)
def _(manifold: Scaled, x: Tensor, u: Tensor) -> Tensor:
    return manifold.scale**2 * flat(manifold.base, x, u)


@root.register(Scaled)
def _(manifold: Scaled, x: Tensor, z: Tensor) -> Tensor:
    return root(manifold.base, x, z) / manifold.scale


@root_adjoint.register(Scaled)
def _(manifold: Scaled, x: Tensor, e: Tensor) -> Tensor:
    return root_adjoint(manifold.base, x, e) / manifold.scale


@dimension.register(Scaled)
def _(manifold: Scaled, x: Tensor) -> int:
    return int(dimension(manifold.base, x))
