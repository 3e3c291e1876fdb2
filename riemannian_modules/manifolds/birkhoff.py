r"""Doubly stochastic matrices: positive, with rows and columns that sum to 1.

Tangent vectors have zero row and column sums. In the metric ``sum u v / (n x)`` they
are at right angles to ``x o (a_i + b_j)`` for all a and b. To project onto them, or
onto the manifold by scaling rows and columns, one asks for the multipliers a and b that
give this matrix the row sums p and the column sums q:

    [ diag(x 1)   x           ] [a]   [p]
    [ x^T         diag(x^T 1) ] [b] = [q] .

Here b is eliminated; the null vector (1, -1) does no harm and is filled.
"""

import math

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds.differentiated import any_of, differentiated
from riemannian_modules.manifolds.drawing import Device, Drawing, Dtype, Shape
from riemannian_modules.manifolds.riesz import dimension, flat, root, root_adjoint

__all__ = ["BirkhoffPolytope"]


def _multipliers(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Return ``a_i + b_j`` such that ``x o (a_i + b_j)`` has row sums p, columns q."""
    rows, columns = x.sum(-1), x.sum(-2, keepdim=True)
    shares = x / columns
    matrix = torch.diag_embed(rows) - shares @ x.mT + 1.0 / x.shape[-1]
    right = p.unsqueeze(-1) - shares @ q.unsqueeze(-1)
    # The _ex form does not wait for the device; entries have a floor, so it is regular.
    a = torch.linalg.solve_ex(matrix.expand(*right.shape[:-2], -1, -1), right)[0]
    return a + (q.unsqueeze(-2) - a.mT @ x) / columns


def _tangent_part(x: Tensor, u: Tensor) -> Tensor:
    # Twice: near the boundary one pass leaves sums of more than rounding.
    for _ in range(2):
        u = u - x * _multipliers(x, u.sum(-1), u.sum(-2))
    return u


def _log_normalised(logs: Tensor) -> Tensor:
    logs = logs - logs.logsumexp(-1, keepdim=True)
    return logs - logs.logsumexp(-2, keepdim=True)


def _residuals(x: Tensor) -> tuple[Tensor, Tensor]:
    return 1.0 - x.sum(-1), 1.0 - x.sum(-2)


def _solved(logs: Tensor, steps: int) -> Tensor:
    """Return logarithms whose matrix has rows and columns that sum to 1.

    Two rounds of Sinkhorn and Knopp (1967), then Newton's method on the convex
    function whose stationarity they are, ``sum exp(logs + a + b) - sum a - sum b``. It
    is self-concordant in the sense of Bach (2010), so the steps are shortened to
    ``log(1 + t) / t`` for the largest change t of a logarithm.
    """
    eps, tiny = torch.finfo(logs.dtype).eps, torch.finfo(logs.dtype).tiny
    logs = _log_normalised(_log_normalised(logs))
    for _ in range(steps):
        x = logs.exp()
        p, q = _residuals(x)
        off = torch.maximum(p.abs().amax(-1), q.abs().amax(-1))[..., None, None]
        moving = off > 16.0 * eps
        # On the CPU looking costs nothing; elsewhere it would wait for the device.
        if x.device.type == "cpu" and not any_of(moving):
            break
        change = _multipliers(x, p, q)
        largest = change.abs().amax((-1, -2), keepdim=True).clamp_min(tiny)
        change = change * (torch.log1p(largest) / largest)
        logs = _log_normalised(logs + torch.where(moving, change, 0.0))
    return logs


def _scaled(logs: Tensor, steps: int) -> Tensor:
    """Scale rows and columns of ``exp(logs)`` to sums of 1.

    The derivatives are not those of the steps, which end at once on the manifold: the
    solution is taken as a constant, to which Newton steps add nothing but derivatives,
    the first one those of first order, the second one those of up to third.
    """
    # Below this floor, which only means anything where the scales of rows and columns
    # are taken out, the system of the multipliers is singular to rounding.
    floor = math.log(32.0 * torch.finfo(logs.dtype).eps)
    logs = _log_normalised(logs).clamp_min(floor)
    found = _solved(logs.detach(), steps)
    if not differentiated(logs):
        return found.exp()
    rows, columns = found.exp().sum(-1), found.exp().sum(-2)
    logs = found + (logs - logs.detach())
    for _ in range(2):
        x = logs.exp()
        logs = logs + _multipliers(x, rows - x.sum(-1), columns - x.sum(-2))
    return logs.exp()


class BirkhoffPolytope(Drawing, geoopt.BirkhoffPolytope):  # type: ignore[misc]
    """Doubly stochastic ``n x n`` matrices, metric ``sum u v / (n x)``.

    The Fisher metric of the entries as probabilities (Douik & Hassibi, 2019). Replaces
    ``geoopt.BirkhoffPolytope``, whose ``egrad2rgrad`` lacks the factor n, whose
    ``proju`` is not a projection, whose points are only good to 1e-5, whose ``expmap``
    does not follow geodesics and whose ``origin`` lies on the boundary. Geodesics have
    no closed form, so ``expmap``, ``logmap`` and ``dist`` raise NotImplementedError.
    The retraction ``x o exp(u / x)``, scaled back, is of first order. Random points
    are matrices of absolute values of normal numbers, scaled; the origin is the centre,
    all entries ``1 / n``.

    Args:
        max_iter: the most Newton steps that a projection takes. 3 are usual, 20 near
            permutation matrices.

    >>> x = BirkhoffPolytope().origin(2, 2)
    >>> BirkhoffPolytope().egrad2rgrad(x, torch.tensor([[4.0, 0.0], [0.0, 0.0]]))
    tensor([[ 1., -1.],
            [-1.,  1.]])
    """

    reversible = False

    def __init__(self, max_iter: int = 40) -> None:
        super().__init__(max_iter=max_iter)

    def projx(self, x: Tensor) -> Tensor:
        """Return the doubly stochastic ``diag(a) x diag(b)``, with ``x`` kept positive.

        The nearest one in relative entropy; cost O(n^3) for each Newton step.
        """
        floor = torch.finfo(x.dtype).tiny
        return _scaled(x.clamp_min(floor).log(), self.max_iter)

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the orthogonal projection of ``u`` in the metric."""
        return _tangent_part(x, u)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        return x.shape[-1] * _tangent_part(x, x * u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Return ``x o exp(u / x)`` with its rows and columns scaled; first order."""
        return _scaled(x.log() + u / x, self.max_iter)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` from ``x`` to ``y`` by projection; not an isometry."""
        return self.proju(y, v)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Raise: the geodesics have no closed form.

        Args:
            x: points.
            u: tangent vectors.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("BirkhoffPolytope has no expmap; use retr")

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Raise, as :meth:`expmap` does."""
        return self.expmap(x, u), v

    def _random(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        return self.projx(torch.randn(shape, dtype=dtype, device=device).abs())

    random_naive = Drawing.random

    def _origin(self, shape: Shape, dtype: Dtype, device: Device) -> Tensor:
        return torch.full(shape, 1.0 / shape[-1], dtype=dtype, device=device)

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if len(shape) < 2 or shape[-1] != shape[-2] or shape[-1] < 2:
            return False, f"`{name}` should be square matrices, got {tuple(shape)}"
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not x.numel():
            return True, None
        least = float(x.detach().min())
        if not least > 0.0:
            return False, f"not all entries are positive, the least is {least}"
        off = max(float(sums.abs().max()) for sums in _residuals(x.detach()))
        if off > atol + rtol:
            return False, f"a row or column sum is off 1 by {off}"
        return True, None


@flat.register(BirkhoffPolytope)
def _(manifold: BirkhoffPolytope, x: Tensor, u: Tensor) -> Tensor:
    return u / (x.shape[-1] * x)


@root.register(BirkhoffPolytope)
def _(manifold: BirkhoffPolytope, x: Tensor, z: Tensor) -> Tensor:
    return math.sqrt(x.shape[-1]) * _tangent_part(x, x.sqrt() * z)


@root_adjoint.register(BirkhoffPolytope)
def _(manifold: BirkhoffPolytope, x: Tensor, e: Tensor) -> Tensor:
    return (math.sqrt(x.shape[-1]) / x.sqrt()) * _tangent_part(x, x * e)


@dimension.register(BirkhoffPolytope)
def _(manifold: BirkhoffPolytope, x: Tensor) -> int:
    n = x.shape[-1]
    return (x.numel() // (n * n)) * (n - 1) ** 2
