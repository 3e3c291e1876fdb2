r"""Matrices of one rank, as a manifold in the space of all matrices.

With the singular value decomposition ``X = U S V^T`` of a point, tangent vectors are
the matrices that ``(I - U U^T) . (I - V V^T)`` kills (Vandereycken, 2013). The point is
the dense matrix, so it is a weight like any other; its decomposition is computed where
it is needed, in the time that its rank takes (``low_rank.py``).

The leading singular subspaces are smooth where the singular values that are kept
coincide, and where those left out are zero, as all are on the manifold; torch's
derivative of singular vectors has poles there. So the decomposition is taken at a
constant X, and for a change D of the matrix bases ``U + P`` and ``V + Q`` of the
subspaces, with P and Q at right angles to U and V, solve

    P S - X_0 Q = B + D Q - P (A + C Q),       A = U^T D V,      B = D V - U A,
    Q S - X_0^T P = C^T + D^T P - Q (A^T + B^T P),               C = U^T D - A V^T,

less the parts of ``D Q`` and ``D^T P`` along U and V. ``X_0 = X - U S V^T`` is left
out, so the left sides divide by the gaps between the two sets of singular values only.
D, P and Q are zero and have nothing but derivatives; each round of putting P and Q into
the right sides makes those of one more order exact.
"""

import torch
from torch import Tensor

from riemannian_modules.manifolds.differentiated import differentiated
from riemannian_modules.manifolds.drawing import Device, Dtype, Embedded, Shape
from riemannian_modules.manifolds.low_rank import low_rank_svd
from riemannian_modules.manifolds.riesz import dimension
from riemannian_modules.manifolds.stiefel import _orthonormalise

__all__ = ["FixedRank", "orthographic_step"]


_ORDERS = 3


def _bases(x: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return bases of the leading singular subspaces, orthonormal and tall.

    Their projectors have derivatives of up to third order where there is a gap between
    the singular values that are kept and those that are not.
    """
    # A step from one point has twice the rank at most.
    u, values, vh = low_rank_svd(x.detach(), 2 * rank)
    left, right = u[..., :rank], vh[..., :rank, :].mT
    if not differentiated(x):
        return left, right
    left_rest, right_rest = u[..., rank:], vh[..., rank:, :].mT
    # Where there is no derivative it is huge, and the value is what it was.
    info = torch.finfo(x.dtype)
    kept = values[..., None, :rank].clamp_min(info.tiny)
    rest = values[..., rank:, None]
    ratio = rest / kept
    excess = ratio.square() / (1.0 - ratio.square()).clamp_min(info.eps)
    change = x - x.detach()
    inside = left.mT @ change @ right
    below = change @ right - left @ inside
    beside = change.mT @ left - right @ inside.mT
    p, q = torch.zeros_like(below), torch.zeros_like(beside)
    for order in range(_ORDERS):
        a, b = below, beside
        if order:
            down, across = change @ q, change.mT @ p
            a = a + down - left @ (left.mT @ down) - p @ (inside + beside.mT @ q)
            b = (
                b
                + across
                - right @ (right.mT @ across)
                - q @ (inside.mT + below.mT @ p)
            )
        a = a + left_rest @ (ratio * (right_rest.mT @ b))
        p = (a + left_rest @ (excess * (left_rest.mT @ a))) / kept
        q = (b + right_rest @ (rest * (left_rest.mT @ p))) / kept
    return _orthonormal(left, p), _orthonormal(right, q)


def _orthonormal(basis: Tensor, change: Tensor) -> Tensor:
    # Up to third order in a change that is at right angles to the basis.
    moved = basis + change
    return moved - 0.5 * moved @ (change.mT @ change)


def orthographic_step(x: Tensor, u: Tensor, rank: int) -> Tensor:
    """Return the point near ``x`` that differs from ``x + u`` by a normal vector.

    With ``Y = x + u`` and bases U, V of the columns and rows of x it is
    ``Y V (U^T Y V)^-1 U^T Y`` (Absil & Malick, 2012; Absil & Oseledets, 2015).

    Args:
        x: matrices of the rank, ``(*batch, a, b)``.
        u: tangent vectors at ``x``.
        rank: the rank.

    Returns:
        Points of the shape of ``x + u``. Agrees with the geodesics to second order.
        It grows without bound where ``U^T Y V`` becomes singular, which takes a step
        as long as the least singular value of ``x``. Cost: the decomposition of ``x``.
    """
    left, right = _bases(x, rank)
    moved = x + u
    columns, rows = moved @ right, left.mT @ moved
    core: Tensor = torch.linalg.solve_ex(rows @ right, rows)[0]
    return columns @ core


class FixedRank(Embedded):
    """Matrices of one rank, ``(*batch, m, n)``, with the Euclidean metric.

    Dimension ``rank (m + n - rank)`` (Vandereycken, 2013). The default retraction is
    the truncated singular value decomposition of ``x + u``, the nearest matrix of the
    rank; ``riemannian_modules.retractions.Orthographic`` is another. Geodesics have no
    closed form. Every method decomposes the point: O(m n rank) on the manifold and a
    step away from it, O(m n min(m, n)) where ``projx`` meets a matrix of more than
    twice the rank.

    Random points have uniform singular vectors, and singular values uniform in
    [1/2, 3/2]; the origin is the identity of the size of the rank, with zeros around.

    The manifold is not closed: a matrix of lower rank is at the end of a finite step,
    and near it the curvature is the inverse of the least singular value.

    Args:
        rank: the rank, at least 1.

    Raises:
        ValueError: the rank is not positive.

    >>> FixedRank(1).projx(torch.tensor([[3.0, 0.0], [0.0, 1.0]]))
    tensor([[3., 0.],
            [0., 0.]])
    """

    name = "FixedRank"

    def __init__(self, rank: int) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank={rank}: choose at least 1")
        self.rank = rank

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest matrix of at most this rank (Eckart & Young, 1936)."""
        left, _ = _bases(x, self.rank)
        return left @ (left.mT @ x)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the orthogonal projection of ``u`` on the tangent space at ``x``."""
        left, right = _bases(x, self.rank)
        inside = left @ (left.mT @ u)
        return inside + ((u - inside) @ right) @ right.mT

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the nearest matrix of the rank to ``x + u``; second order.

        The metric projection (Absil & Malick, 2012; Vandereycken, 2013).
        """
        return self.projx(x + u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Geodesics are not available.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(self._missing("expmap", "use retr"))

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Geodesics are not available.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(self._missing("logmap", "proju(x, y - x) is near"))

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Geodesics are not available.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(self._missing("dist", "|y - x| is a lower bound"))

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` from ``x`` to ``y`` by projection; not an isometry."""
        return self.proju(y, v)

    def _random(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        *batch, m, n = shape
        gaussian = torch.randn(*batch, m + n, self.rank, dtype=dtype, device=device)
        left = _orthonormalise(gaussian[..., :m, :])
        right = _orthonormalise(gaussian[..., m:, :])
        values = 0.5 + torch.rand_like(gaussian[..., :1, :])
        return (left * values) @ right.mT

    def _origin(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        point = torch.zeros(shape, dtype=dtype, device=device)
        point[..., : self.rank, : self.rank].diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return point

    def extra_repr(self) -> str:
        """Say the rank."""
        return f"rank={self.rank}"

    def _missing(self, verb: str, remedy: str) -> str:
        return (
            f"{verb}: the geodesics of matrices of rank {self.rank} have no closed "
            f"form; {remedy}"
        )

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if len(shape) < 2 or min(shape[-2:]) < self.rank:
            return False, (
                f"`{name}` should be matrices with at least {self.rank} rows and "
                f"columns, got shape {tuple(shape)}"
            )
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not bool(x.isfinite().all()):
            return False, "not all entries are finite"
        values = torch.linalg.svdvals(x)
        # Relative: a small matrix has a rank like any other.
        ranks = (values > (atol + rtol) * values[..., :1]).sum(-1)
        if not bool((ranks == self.rank).all()):
            found = sorted(set(ranks.reshape(-1).tolist()))
            return False, (
                f"the numerical rank is {', '.join(map(str, found))}, expected "
                f"{self.rank}, with atol={atol}, rtol={rtol}"
            )
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not torch.allclose(self.proju(x, u), u, atol=atol, rtol=rtol):
            return False, (
                f"`(I - U U^T) u (I - V V^T) != 0` with atol={atol}, rtol={rtol}"
            )
        return True, None


@dimension.register(FixedRank)
def _(manifold: FixedRank, x: Tensor) -> int:
    m, n = x.shape[-2:]
    return (x.numel() // (m * n)) * manifold.rank * (m + n - manifold.rank)
