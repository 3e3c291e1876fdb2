"""Outputs that are points of a geoopt manifold, in that manifold's own metric."""

from typing import final

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError, ShapeError
from riemannian_modules.manifolds.contract import ensure_contract
from riemannian_modules.output.base import OutputMetric
from riemannian_modules.output.rows import divide, rounding

__all__ = ["OnManifold"]

_EMBEDDED = (geoopt.Euclidean, geoopt.Sphere, geoopt.EuclideanStiefel)


@final
class OnManifold(OutputMetric):
    """The metric of a geoopt manifold on outputs that are points of it.

    Outputs have the shape ``(n, *point)``. The metric is extended to ambient vectors
    through the tangent projection: ``G_o(u, v) = g(Pu, Pv)``, so it does not see
    normal motion, and the normal part of a cotangent is in the rest.

    - Euclidean, Sphere, EuclideanStiefel: the rows of the projection (one for each
      entry of the output);
    - PoincareBall and the other stereographic models: the conformal factor;
    - SPD, affine-invariant: ``u -> X^-1/2 u X^-1/2`` in an orthonormal basis of the
      symmetric matrices (``d (d + 1) / 2`` rows);
    - any other manifold: a root of the ambient matrix of ``inner`` on projected unit
      vectors, O(D^3) for each example with D entries.

    :meth:`terms` is n. For a Gauss-Newton metric of a mean of squared distances
    ``d(z, t)^2`` multiply the loss by 1/2; the metric is exact where z = t.

    Args:
        manifold: a geoopt manifold.

    Raises:
        ManifoldContractError: the argument is not a geoopt manifold, or it is
            geoopt's CanonicalStiefel, whose ``proju`` is not a projection.

    Example:
        >>> north = torch.tensor([[0.0, 0.0, 1.0]])
        >>> OnManifold(geoopt.Sphere()).factor(north)[0]
        tensor([[1., 0., 0.],
                [0., 1., 0.],
                [0., 0., 0.]])
        >>> OnManifold(geoopt.PoincareBall()).factor(torch.zeros(1, 2))[0]
        tensor([[2., 0.],
                [0., 2.]])
    """

    def __init__(self, manifold: geoopt.Manifold) -> None:
        if not isinstance(manifold, geoopt.Manifold):
            raise ManifoldContractError(
                f"OnManifold needs an instance of geoopt.Manifold, got {manifold!r}; "
                "did you pass the class, without calling it?"
            )
        self.manifold = ensure_contract(manifold, "OnManifold")

    def factor(self, outputs: Tensor) -> Tensor:
        """Return ``(n, r, *point)``; see the class for r."""
        self.validate(outputs)
        x = outputs.detach()
        if isinstance(self.manifold, geoopt.SymmetricPositiveDefinite) and x.ndim == 3:
            inverse = _spd_roots(x)[1].unsqueeze(1)
            return inverse @ _symmetric_basis(x) @ inverse
        unit = _unit_vectors(x)
        if isinstance(self.manifold, geoopt.Stereographic):
            return unit * _conformal(self.manifold, x).unsqueeze(1)
        if isinstance(self.manifold, _EMBEDDED):
            return self._project(x.unsqueeze(1), unit)
        return self._numeric(x)

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return ``g(P velocity, P .)`` in closed form; see the base class."""
        self.validate(outputs)
        manifold = self.manifold
        if isinstance(manifold, geoopt.Stereographic):
            # geoopt's conformal factor is scripted: its second derivative is wrong.
            square = outputs.square().sum(-1, keepdim=True)
            k = manifold.k.detach().to(outputs)
            return (2.0 / (1.0 + k * square)).square() * velocity
        if isinstance(manifold, geoopt.SymmetricPositiveDefinite) and outputs.ndim == 3:
            inverse = torch.linalg.inv(outputs)
            return inverse @ (0.5 * (velocity + velocity.mT)) @ inverse
        if isinstance(manifold, _EMBEDDED):
            return self._project(outputs, velocity)

        def half_square(v: Tensor) -> Tensor:
            tangent = self._project(outputs, v)
            total: Tensor = manifold.inner(outputs, tangent, tangent, keepdim=True)
            return 0.5 * total.sum()

        return torch.func.grad(half_square)(velocity)

    def whiten(
        self, outputs: Tensor, cotangent: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Return the residual ``(n, r)`` and the rest; see the base class."""
        self.validate_cotangent(outputs, cotangent)
        x, v = outputs.detach(), cotangent.detach()
        if isinstance(self.manifold, geoopt.Stereographic):
            return divide(v, _conformal(self.manifold, x).expand_as(v))
        if isinstance(self.manifold, _EMBEDDED):
            tangent = self._project(x, v)
            return tangent.reshape(len(v), -1), _remainder(v, tangent)
        if isinstance(self.manifold, geoopt.SymmetricPositiveDefinite) and v.ndim == 3:
            root, _ = _spd_roots(x)
            tangent = 0.5 * (v + v.mT)
            y = (root @ tangent @ root).flatten(1) @ _symmetric_basis(x).flatten(1).mT
            return y, _remainder(v, tangent)
        return super().whiten(outputs, cotangent)

    def validate(self, outputs: Tensor) -> None:
        """Check the outputs as the base class does, and the shape of a point.

        Raises:
            ShapeError: ``*point`` is not the shape of a point of the manifold.
        """
        super().validate(outputs)
        point = outputs.shape[1:]
        fits, reason = self.manifold._check_shape(point, "a point")
        if not fits:
            raise ShapeError(
                f"{self!r} got outputs of shape {tuple(outputs.shape)}, which are not "
                f"(n, *point): {reason}"
            )

    def extra_repr(self) -> str:
        """Return the arguments that the representation shows."""
        return str(self.manifold)

    def _project(self, x: Tensor, u: Tensor) -> Tensor:
        if isinstance(self.manifold, geoopt.Euclidean):
            return u + torch.zeros_like(x)
        projected: Tensor = self.manifold.proju(x, u)
        return projected

    def _numeric(self, x: Tensor) -> Tensor:
        points = x.double().unsqueeze(1)
        tangents = self._project(points, _unit_vectors(points[:, 0]))
        tangents = tangents.expand(len(x), *tangents.shape[1:])
        with torch.enable_grad():
            v = torch.zeros_like(tangents, requires_grad=True)
            # Without keepdim, PoincareBall.inner of geoopt 0.5.1 mixes up points.
            value = self.manifold.inner(points, tangents, v, keepdim=True).sum()
            (covectors,) = torch.autograd.grad(value, v)
        matrix = covectors.flatten(2) @ tangents.flatten(2).mT
        values, vectors = torch.linalg.eigh(0.5 * (matrix + matrix.mT))
        rows: Tensor = values.clamp_min(0.0).sqrt().unsqueeze(-1) * vectors.mT
        return rows.to(x.dtype).reshape(*rows.shape[:2], *x.shape[1:])


def _unit_vectors(x: Tensor) -> Tensor:
    """Return all unit vectors of the ambient space, ``(1, D, *point)``."""
    d = x[0].numel()
    return torch.eye(d, dtype=x.dtype, device=x.device).view(1, d, *x.shape[1:])


def _conformal(manifold: geoopt.Stereographic, x: Tensor) -> Tensor:
    factor: Tensor = manifold.lambda_x(x, keepdim=True)
    return factor


def _spd_roots(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``X^1/2`` and ``X^-1/2``, computed in float64."""
    values, vectors = torch.linalg.eigh(x.double())
    root = values.sqrt().unsqueeze(-2)
    both = (vectors * root) @ vectors.mT, (vectors / root) @ vectors.mT
    return both[0].to(x.dtype), both[1].to(x.dtype)


def _symmetric_basis(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the symmetric matrices, ``(d(d+1)/2, d, d)``."""
    d = x.shape[-1]
    rows, columns = torch.triu_indices(d, d, device=x.device)
    eye = torch.eye(d, dtype=x.dtype, device=x.device)
    outer = eye[rows].unsqueeze(-1) * eye[columns].unsqueeze(-2)
    # Of two numbers torch.where makes the default data type.
    weight = torch.where(rows == columns, 0.5, x.new_full((), 0.5**0.5))
    return (outer + outer.mT) * weight.view(-1, 1, 1)


def _remainder(v: Tensor, part: Tensor) -> Tensor:
    """Return ``v - part`` with entries at the level of rounding set to zero."""
    rest = v - part
    size = v.abs().flatten(1).amax(1).view(-1, *[1] * (v.ndim - 1))
    noise = rounding(v.dtype) * size
    return torch.where(rest.abs() <= noise, 0.0, rest)
