r"""The inverse of ``D + K^T K``, four ways, in the letters of the theory.

``K`` is ``(r, p)``, ``D`` a positive diagonal of shape ``(p,)`` (a float stands
for a multiple of the identity). Which form is right depends on the data:

=============  ==================  ==========================  ====================
form           inner matrix        accurate for                use when
=============  ==================  ==========================  ====================
push-through   ``S``, (r, r)       every mass (*)              the covector is K^T y
woodbury       ``S``, (r, r)       loses ``|S|`` digits        other covectors, r < p
primal         ``G``, (p, p)       every mass                  r >= p
qr             ``[K; sqrt(D)]``    every mass                  fallback and oracle
=============  ==================  ==========================  ====================

(*) While the rows of K are independent: the relative error is about eps times
``|K| (|y - K x| / |x| + 1)``, see the math page.

Nothing here knows about manifolds. :mod:`riemannian_modules.inverse` has the same forms
with products in place of the matrix K and a Riesz map in place of ``1/D``; it takes the
branch rule, the factorisation and the fallback from here.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "CholeskyFactor",
    "branch",
    "capacitance",
    "cholesky",
    "primal",
    "push_through",
    "qr",
    "woodbury",
]


@dataclass(frozen=True)
class CholeskyFactor:
    """A lower Cholesky factor with what is known about how it went.

    Attributes:
        lower: ``(m, m)`` triangular factor.
        info: integer tensor, 0 if the matrix was positive definite, else the
            order of the leading minor that was not. Never read on the host here.
    """

    lower: Tensor
    info: Tensor

    def solve(self, rhs: Tensor) -> Tensor:
        """Solve for one right-hand side of shape ``(m,)``. Cost O(m^2)."""
        # Not cholesky_solve, which copies the factor.
        half = torch.linalg.solve_triangular(self.lower, rhs.unsqueeze(-1), upper=False)
        whole = torch.linalg.solve_triangular(self.lower.mT, half, upper=True)
        return whole.squeeze(-1)

    def logdet(self) -> Tensor:
        """Return the log-determinant of the factorised matrix. Cost O(m)."""
        return 2.0 * self.lower.diagonal().log().sum()


def cholesky(matrix: Tensor, *, overwrite: bool = False) -> CholeskyFactor:
    """Factorise a symmetric matrix of which only the lower triangle is read.

    There is no jitter: whether it worked is in ``info``. Cost O(m^3 / 3).

    Args:
        matrix: ``(m, m)``.
        overwrite: whether the factor may take the memory of the matrix.

    Returns:
        The factor.

    >>> cholesky(torch.tensor([[4.0, 7.0], [2.0, 2.0]])).lower
    tensor([[2., 0.],
            [1., 1.]])
    """
    # LAPACK reads columns, to which rows are those of the transpose: without a copy.
    columns = matrix.mT
    if not overwrite:
        upper, info = torch.linalg.cholesky_ex(columns, upper=True)
        return CholeskyFactor(upper.mT, info)
    info = torch.empty((), dtype=torch.int32, device=matrix.device)
    torch.linalg.cholesky_ex(columns, upper=True, out=(columns, info))
    return CholeskyFactor(columns.mT, info)


def branch(rank: int, dim: int) -> str:
    """Choose the form by the shape of K: ``"dual"`` if r < p, else ``"primal"``.

    With r >= p the dual matrix is singular up to the mass, and the part of y
    that no parameter can move is divided by the mass before K^T cancels it.
    """
    return "dual" if rank < dim else "primal"


def capacitance(K: Tensor, D: Tensor | float) -> Tensor:
    """Return ``S = I + K D^-1 K^T``, shape ``(r, r)``. Cost O(r^2 p).

    Implements :eq:`woodbury` (its inner matrix).
    """
    S = (K / D) @ K.mT
    S.diagonal().add_(1.0)
    return S


def push_through(K: Tensor, D: Tensor | float, y: Tensor) -> Tensor:
    """Return ``(D + K^T K)^-1 K^T y = D^-1 K^T S^-1 y``, shape ``(p,)``.

    Implements :eq:`push-through`. There is no subtraction, so with independent rows
    the error is of the order of the rounding unit for every mass. Cost O(r^2 p + r^3).

    >>> K = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    >>> D = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    >>> x = push_through(K, D, torch.tensor([1.0, -2.0], dtype=torch.float64))
    >>> (31 * x).round(decimals=12)
    tensor([ 18., -19.,  -5.], dtype=torch.float64)
    """
    a = cholesky(capacitance(K, D)).solve(y)
    return (K.mT @ a) / D


def woodbury(
    K: Tensor, D: Tensor | float, g: Tensor, *, refinements: int = 1
) -> Tensor:
    """Return ``(D + K^T K)^-1 g = D^-1 (g - K^T c)``, ``S c = K D^-1 g``.

    Implements :eq:`woodbury`. The subtraction cancels: the relative error is
    about ``eps * |K D^-1 K^T|`` before refinement. Cost O(r^2 p + r^3).

    Args:
        K: factor, ``(r, p)``.
        D: diagonal mass, ``(p,)`` or a float.
        g: covector, ``(p,)``.
        refinements: steps of iterative refinement in the working precision.

    >>> K = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]], dtype=torch.float64)
    >>> D = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    >>> x = woodbury(K, D, torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64))
    >>> (31 * x).round(decimals=12)
    tensor([10., 17., 11.], dtype=torch.float64)
    """
    S = cholesky(capacitance(K, D))

    def solve(e: Tensor) -> Tensor:
        c = S.solve(K @ (e / D))
        return (e - K.mT @ c) / D

    x = solve(g)
    for _ in range(refinements):
        x = x + solve(g - D * x - K.mT @ (K @ x))
    return x


def primal(K: Tensor, D: Tensor | float, g: Tensor) -> Tensor:
    """Return ``G^-1 g`` from the Cholesky factor of ``G = D + K^T K``.

    Implements :eq:`primal`. Cost O(r p^2 + p^3): right when r >= p.

    >>> K = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> primal(K, 1.0, torch.tensor([6.0], dtype=torch.float64)).round(decimals=12)
    tensor([1.], dtype=torch.float64)
    """
    G = K.mT @ K
    G.diagonal().add_(D)
    return cholesky(G).solve(g)


def qr(K: Tensor, D: Tensor | float, g: Tensor) -> Tensor:
    """Return ``(D + K^T K)^-1 g`` from ``Q R = [K; sqrt(D)]``, with ``G = R^T R``.

    It never squares the condition number of K while factorising: the oracle of
    the other three and the fallback where a Cholesky factorisation fails.
    Cost O((r + p) p^2).

    >>> K = torch.tensor([[1.0], [2.0]], dtype=torch.float64)
    >>> qr(K, 1.0, torch.tensor([6.0], dtype=torch.float64)).round(decimals=12)
    tensor([1.], dtype=torch.float64)
    """
    p = K.shape[-1]
    if isinstance(D, Tensor):
        root = torch.diag(D.sqrt())
    else:
        root = math.sqrt(D) * torch.eye(p, dtype=K.dtype, device=K.device)
    _, R = torch.linalg.qr(torch.cat([K, root]), mode="r")
    z = torch.linalg.solve_triangular(R.mT, g.unsqueeze(-1), upper=False)
    return torch.linalg.solve_triangular(R, z, upper=True).squeeze(-1)
