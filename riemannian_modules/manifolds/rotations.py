r"""Rotations SO(n): square orthogonal matrices with determinant 1.

Tangent vectors at X are the matrices ``X A`` with skew A, and the metric is the
Euclidean one of these. It is invariant under rotations from both sides, so geodesics
are ``X exp(t A)`` (Edelman, Arias & Smith, 1998, section 2.1).
"""

import torch
from torch import Tensor

from riemannian_modules.manifolds.arcs import root_of_square, squared_arcs
from riemannian_modules.manifolds.drawing import Device, Dtype, Embedded, Shape
from riemannian_modules.manifolds.polar import handedness, rotation
from riemannian_modules.manifolds.riesz import dimension
from riemannian_modules.manifolds.stiefel import (
    Stiefel,
    _orthonormalise,
    _rotation,
    _skew,
    cayley_step,
)

__all__ = ["SpecialOrthogonal"]


def _arc_ratio(cosine: Tensor) -> Tensor:
    """Return ``t / sin t`` for the angle t with this cosine, 1 at ``t = 0``."""
    inside = cosine < 1.0
    c = torch.where(inside, cosine, 0.0)
    return torch.where(inside, c.acos() / ((1.0 - c) * (1.0 + c)).sqrt(), 1.0)


def _square_root(double: Tensor) -> Tensor:
    """Return the polar factor of ``1 + Q``, a right angle for every half turn in Q.

    Its singular values belong to the planes of Q, two each, and the largest to the axis
    if there is one. In a plane of half turns, where both are zero, any rotation by a
    right angle will do.
    """
    u, values, vh = torch.linalg.svd(double)
    n = double.shape[-1]
    axis, left, right = (
        u.mT[..., : n % 2, :],
        u.mT[..., n % 2 :, :],
        vh[..., n % 2 :, :],
    )
    turned = torch.stack((right[..., 1::2, :], -right[..., ::2, :]), -2).flatten(-3, -2)
    noise = 8.0 * n * torch.finfo(double.dtype).eps
    opposite = (values[..., n % 2 :: 2] < noise).repeat_interleave(2, dim=-1)
    left = torch.where(opposite.unsqueeze(-1), turned, left)
    root: Tensor = torch.cat((axis, left), dim=-2).mT @ vh
    return root


def _logarithm(turn: Tensor) -> Tensor:
    # The polar factor of 1 + Q is the square root of Q: half the angles, at most a
    # right angle each. There the logarithm is a smooth function of the symmetric part
    # times the skew part, which commute.
    eye = torch.eye(turn.shape[-1], dtype=turn.dtype, device=turn.device)
    half = _square_root(eye + turn)
    cosines, vectors = torch.linalg.eigh(0.5 * (half + half.mT))
    ratio = (vectors * _arc_ratio(cosines).unsqueeze(-2)) @ vectors.mT
    return 2.0 * _skew(ratio @ _skew(half))


class SpecialOrthogonal(Embedded):
    """Rotation matrices, ``(*batch, n, n)`` with ``n >= 2``, Euclidean metric.

    Tangent vectors are ambient matrices ``x A`` with skew A. The default retraction is
    the Cayley map ``x (I - A/2)^-1 (I + A/2)``; a product of rotations is made
    orthogonal anew at each step, so rounding does not add up. Random points are
    uniform (Haar), the origin is the identity.

    >>> quarter = torch.tensor([[0.0, -1.0], [1.0, 0.0]])
    >>> SpecialOrthogonal().logmap(torch.eye(2), quarter)
    tensor([[ 0.0000, -1.5708],
            [ 1.5708,  0.0000]])
    """

    name = "SpecialOrthogonal"

    proju = Stiefel.proju
    _origin = Stiefel._origin
    _check_vector_on_tangent = Stiefel._check_vector_on_tangent

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest rotation, from the singular vectors of ``x``."""
        return rotation(x)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the Cayley map of ``u``; second order, O(n^3)."""
        return cayley_step(x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic ``x exp(x^T u)``; exact, O(n^3)."""
        return _orthonormalise(x) @ _rotation(_skew(x.mT @ u))

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the shortest tangent vector at ``x`` that leads to ``y``.

        Unique if ``x^T y`` turns no plane by a half turn, else one of the shortest;
        accurate up to about ``eps / d``, for the least distance d of its angles from a
        half turn. Its derivatives are not available, two of :meth:`dist2` are.
        """
        return x @ _logarithm(x.mT @ y)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return ``|log(x^T y)|`` in the Frobenius norm, accurate at every angle."""
        return root_of_square(self.dist2(x, y, keepdim=keepdim))

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the squared distance, with two derivatives."""
        # The singular values are the cosines of half the angles, two for each plane.
        middle = 0.5 * (x + y)
        sines = torch.linalg.svdvals(0.5 * (y - x).detach()).flip(-1)
        halves = torch.atan2(sines, torch.linalg.svdvals(middle.detach()))
        total = 4.0 * squared_arcs(middle, halves)
        return total[..., None, None] if keepdim else total

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` from ``x`` to ``y`` by left translation ``y x^T v``.

        An isometry for any two points, but not the parallel transport.
        """
        return y @ (x.mT @ v)

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` in parallel along ``expmap(x, t u)`` to ``t = 1``; exact.

        ``x exp(A/2) (x^T v) exp(A/2)`` with ``A = x^T u``, an isometry (Edelman, Arias
        & Smith, 1998, section 2.2.3, on square matrices).
        """
        half = _rotation(0.5 * _skew(x.mT @ u))
        return x @ half @ (x.mT @ v) @ half

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return :meth:`expmap` and :meth:`transp_follow_expmap`."""
        return self.expmap(x, u), self.transp_follow_expmap(x, u, v)

    def _random(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        q = _orthonormalise(torch.randn(shape, dtype=dtype, device=device))
        sign = handedness(q).unsqueeze(-1)
        return torch.cat((q[..., :-1], q[..., -1:] * sign), -1)

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
            return False, (
                f"`{name}` should be square matrices with at least 2 rows, got shape "
                f"{tuple(shape)}"
            )
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        eye = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device)
        if not torch.allclose(x.mT @ x, eye.expand_as(x), atol=atol, rtol=rtol):
            return False, f"`X^T X != I` with atol={atol}, rtol={rtol}"
        if bool((handedness(x) < 0).any()):
            return False, "`det X = -1`: a reflection, not a rotation"
        return True, None


@dimension.register(SpecialOrthogonal)
def _(manifold: SpecialOrthogonal, x: Tensor) -> int:
    n = x.shape[-1]
    return (x.numel() // (n * n)) * (n * (n - 1) // 2)
