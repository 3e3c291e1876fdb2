r"""Grassmann manifolds: subspaces, held as orthonormal bases.

``X`` and ``X Q`` with orthogonal Q stand for the same point. A tangent vector at the
subspace is a matrix U with ``X^T U = 0``, the horizontal lift at X; at ``X Q`` the same
tangent vector is ``U Q``. With the thin singular value decomposition ``U = W S V^T``
the geodesic is

    X(t) = X V cos(t S) V^T + W sin(t S) V^T

(Edelman, Arias & Smith, 1998, theorem 2.3); S holds its principal angles.
"""

import torch
from torch import Tensor

from riemannian_modules.manifolds.arcs import root_of_square, squared_arcs
from riemannian_modules.manifolds.drawing import Embedded
from riemannian_modules.manifolds.polar import polar
from riemannian_modules.manifolds.riesz import dimension
from riemannian_modules.manifolds.stiefel import (
    Stiefel,
    _is_wide,
    _orthonormalise,
    _upright,
    qr_step,
)

__all__ = ["Grassmann"]


def _horizontal_part(x: Tensor, u: Tensor) -> Tensor:
    return u - x @ (x.mT @ u)


def _geodesic(x: Tensor, u: Tensor) -> Tensor:
    w, angles, vh = torch.linalg.svd(u, full_matrices=False)
    cosines, sines = angles.cos().unsqueeze(-2), angles.sin().unsqueeze(-2)
    return _orthonormalise(((x @ vh.mT) * cosines + w * sines) @ vh)


def _parallel(x: Tensor, u: Tensor, v: Tensor) -> Tensor:
    w, angles, vh = torch.linalg.svd(u, full_matrices=False)
    sines, versines = angles.sin(), 2.0 * (0.5 * angles).sin().square()
    turned = (x @ vh.mT) * sines.unsqueeze(-2) + w * versines.unsqueeze(-2)
    return v - turned @ (w.mT @ v)


def _projected(x: Tensor, y: Tensor, v: Tensor) -> Tensor:
    return _horizontal_part(y, v) @ polar(x.mT @ y)


def _log(x: Tensor, y: Tensor) -> Tensor:
    y = y @ polar(y.mT @ x)
    cosines = x.mT @ y
    w, sines, vh = torch.linalg.svd(y - x @ cosines, full_matrices=False)
    # Column norms, not singular values: these belong to the same vectors as the sines.
    angles = torch.atan2(sines, torch.linalg.vector_norm(cosines @ vh.mT, dim=-2))
    return (w * angles.unsqueeze(-2)) @ vh


class Grassmann(Embedded):
    """Subspaces: the span of the columns of a tall matrix, of the rows of a wide one.

    Points are orthonormal bases, tangent vectors are orthogonal to them, and the metric
    is the Euclidean one of these. A function of the point must depend on the subspace
    only, not on the basis, for its gradient to be one on this manifold.

    The default retraction spans ``x + u`` (QR decomposition). Distances and logarithms
    come from principal angles, whose sines and cosines are both computed, so that they
    are accurate at every size (Bjorck & Golub, 1973; Bendokat, Zimmermann & Absil,
    2024). :meth:`transp` is a projection, :meth:`transp_follow_expmap` exact. Where
    principal angles coincide, :meth:`dist2` has two derivatives, :meth:`expmap` and
    :meth:`logmap` have none. Random points are uniform (Haar), the origin is the
    leading block of the identity.

    >>> x, y = torch.eye(3, 1), torch.tensor([[0.6], [0.8], [0.0]])
    >>> Grassmann().dist(x, y), Grassmann().dist(x, -x)
    (tensor(0.9273), tensor(0.))
    """

    name = "Grassmann"

    # Its points are those of the Stiefel manifold, of which some count as one.
    projx = Stiefel.projx
    _random = Stiefel._random
    _origin = Stiefel._origin
    _check_point_on_manifold = Stiefel._check_point_on_manifold

    def invariant(self, x: Tensor) -> Tensor:
        """Return the orthogonal projector on the subspace, the same for every basis."""
        return x.mT @ x if _is_wide(x) else x @ x.mT

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the horizontal part of ``u``: ``(I - x x^T) u`` on tall matrices."""
        return _upright(_horizontal_part, x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return an orthonormal basis of the span of ``x + u``; second order.

        The basis is the QR factor. The angles to ``x`` are the arc tangents of the
        singular values of ``u`` (Absil, Mahony & Sepulchre, 2008, example 4.1.5).
        """
        return qr_step(x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic; exact, O(n k^2)."""
        return _upright(_geodesic, x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the shortest tangent vector at ``x`` that leads to the span of ``y``.

        Unique if every principal angle is below a right angle.
        """
        return _upright(_log, x, y)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the root of the sum of squared principal angles."""
        return root_of_square(self.dist2(x, y, keepdim=keepdim))

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the sum of squared principal angles, with two derivatives."""
        if _is_wide(x):
            x, y = x.mT, y.mT
        inside = x.mT @ y
        outside = (y - x @ inside).detach()
        sines = torch.linalg.svdvals(outside).flip(-1)
        angles = torch.atan2(sines, torch.linalg.svdvals(inside.detach()))
        total = squared_arcs(inside, angles)
        return total[..., None, None] if keepdim else total

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` from ``x`` to ``y`` by projection; not an isometry.

        The result belongs to the basis ``y``: it is turned by the rotation between
        the bases, so that it depends on subspaces only.
        """
        return _upright(_projected, x, y, v)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` in parallel along ``expmap(x, t u)`` to ``t = 1``; exact.

        An isometry (Edelman, Arias & Smith, 1998, theorem 2.4).
        """
        return _upright(_parallel, x, u, v)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`expmap` and :meth:`transp_follow_expmap`."""
        return self.expmap(x, u), self.transp_follow_expmap(x, u, v)

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if len(shape) < 2 or 0 in shape[-2:]:
            return False, f"`{name}` should be matrices, got shape {tuple(shape)}"
        if shape[-1] == shape[-2]:
            return False, (
                f"`{name}` of shape {tuple(shape)} is square: its only subspace is "
                "the whole space, an isolated point"
            )
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        xu = x @ u.mT if _is_wide(x) else x.mT @ u
        if not torch.allclose(xu, torch.zeros_like(xu), atol=atol, rtol=rtol):
            side = "X U^T" if _is_wide(x) else "X^T U"
            return False, f"`{side} != 0` with atol={atol}, rtol={rtol}"
        return True, None


@dimension.register(Grassmann)
def _(manifold: Grassmann, x: Tensor) -> int:
    k, n = sorted(x.shape[-2:])
    return (x.numel() // (k * n)) * k * (n - k)
