r"""Gram matrices ``K sharp K^T`` of a linear layer's weight without forming K.

With rows ``l_i x_i^T`` the Gram matrix in the Frobenius product is the entrywise
product ``(L L^T) o (X X^T)``; every base manifold adds a low-rank correction. Here
``W`` is the weight, ``p = W x``, ``q = W^T l``, ``U`` has entries ``l_i . p_j`` and
rows that belong to the same example share its x:

==================  ===========================================================
Euclidean           (L L^T) o (X X^T)
Poincare rows       the same, with l divided by the conformal factor of each row
scaled              that of the base, divided by scale^2
Stiefel, wide       (L L^T) o (X X^T - P P^T / 2) - (U o U^T) / 2
Stiefel, tall       (L L^T - Q Q^T / 2) o (X X^T) - (U o U^T) / 2
canonical Stiefel   (L L^T) o (X X^T) - U o U^T
Grassmann, wide     (L L^T) o (X X^T - P P^T)
Grassmann, tall     (L L^T - Q Q^T) o (X X^T)
unit rows           (L L^T) o (X X^T) - (L o P)(L o P)^T
unit columns        (L L^T) o (X X^T) - (Q o X)(Q o X)^T
SPD                 ((L W L^T) o (X W X^T) + U o U^T) / 2
==================  ===========================================================

Each is ``<k_i, sharp k_j>`` multiplied out. With several positions the sum runs
over pairs of them, unless forming the rows is cheaper.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import singledispatch
from itertools import product

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds.grassmann import Grassmann
from riemannian_modules.manifolds.oblique import Oblique
from riemannian_modules.manifolds.scaled import Scaled
from riemannian_modules.manifolds.stiefel import CanonicalStiefel
from riemannian_modules.mass import Mass

__all__ = ["absorbs_bias", "forms_rows", "has_terms", "linear_gram"]

_BLOCK_ROWS = 384
_HADAMARD = 16


def forms_rows(r: int, n: int, positions: int, out: int, width: int) -> bool:
    """Whether forming the rows is cheaper than all pairs of positions.

    Counted are multiplications: for each pair of positions a product of the cotangents,
    one of the inputs, and the entrywise product (which waits for the memory, and so
    counts as 16); on the other side forming the rows and multiplying them. The curved
    manifolds multiply both alike.

    Args:
        r: cotangents for each example.
        n: number of examples.
        positions: number of positions.
        out: width of a cotangent.
        width: width of an input.

    Returns:
        Whether rows are to be formed; never for one position.
    """
    rank = r * n
    pairs = positions**2 * (rank**2 * (out + _HADAMARD) + n**2 * width)
    return positions > 1 and rank * out * width * (positions + rank) < pairs


def absorbs_bias(manifold: geoopt.Manifold, mass: Mass) -> bool:
    """Whether the bias' Gram matrix is a constant added to ``X X^T``."""
    if isinstance(manifold, Scaled):
        return absorbs_bias(manifold.base, mass)
    flat = (geoopt.Euclidean, geoopt.EuclideanStiefel, CanonicalStiefel)
    kinds = (*flat, geoopt.Sphere, Oblique)
    return mass.is_scalar and isinstance(manifold, kinds) and has_terms(manifold)


def _add_hadamard(
    out: Tensor, left: Tensor, right: Tensor, kernel: Tensor, *, first: bool
) -> None:
    # Lower block triangle only: the factorisation never reads the rest.
    n = kernel.shape[0]
    if first and len(out) == n:
        torch.mm(left, right.mT, out=out)
        out.mul_(kernel)
        return
    step = n * max(1, _BLOCK_ROWS // n)
    for start in range(0, out.shape[0], step):
        stop = min(start + step, out.shape[0])
        block = out[start:stop, :stop]
        tiles = block.unflatten(0, (-1, n)).unflatten(2, (-1, n))
        weights = kernel.view(1, n, 1, n)
        if first:
            torch.mm(left[start:stop], right[:stop].mT, out=block)
            tiles.mul_(weights)
        else:
            other = (left[start:stop] @ right[:stop].mT).view(tiles.shape)
            tiles.addcmul_(other, weights)


def _add_crossed(out: Tensor, u: Tensor, v: Tensor, alpha: float) -> None:
    # out[(a, i), (b, j)] += alpha u[a, i, j] v[b, j, i]
    n = u.shape[-1]
    left = u.view(-1, n, 1, n)
    right = v.view(-1, n, n).permute(2, 0, 1).unsqueeze(0)
    out.view(left.shape[0], n, -1, n).addcmul_(left, right, value=alpha)


@dataclass(frozen=True)
class _Rows:
    """Rows ``sum_t l_t x_t^T`` of a weight, the masses absorbed in them.

    Attributes:
        W: the weight, ``(out, in)``.
        x: inputs, ``(n, positions, in)``.
        l: cotangents, ``(r, n, positions, out)``.
        scale: factor of every product of inputs.
        bias: constant added to ``X X^T`` for the layer's bias.
        known: ``scale X X^T + shift`` by scale and shift, or None.
    """

    W: Tensor
    x: Tensor
    l: Tensor
    scale: float
    bias: float
    known: Callable[[float, float], Tensor] | None

    def kernel(self, s: int, t: int, shift: float = 0.0) -> Tensor:
        """Return ``scale X_s X_t^T + shift``, to be left unchanged."""
        if self.known is not None and self.x.shape[1] == 1:
            return self.known(self.scale, shift)
        constant = torch.full((1,), shift, dtype=self.x.dtype, device=self.x.device)
        return torch.addmm(constant, self.x[:, s], self.x[:, t].mT, alpha=self.scale)

    def by_position(self, l: Tensor) -> list[Tensor]:
        """Return ``(r n, width)`` of each position for ``(r, n, positions, width)``."""
        return list(l.flatten(0, 1).unbind(1))


def linear_gram(
    manifold: geoopt.Manifold,
    W: Tensor,
    x: Tensor,
    l: Tensor,
    mass: Mass,
    bias: float,
    known: Callable[[float, float], Tensor] | None = None,
    onto: Tensor | None = None,
) -> Tensor:
    """Return the Gram matrix of the rows ``sum_t l_t x_t^T``, lower triangle valid.

    Args:
        manifold: base manifold of the weight.
        W: the weight, ``(out, in)``.
        x: inputs, ``(n, positions, in)``.
        l: cotangents, ``(r, n, positions, out)``.
        mass: scalar or rank-one mass of the weight.
        bias: constant added to ``X X^T``; only where :func:`absorbs_bias`.
        known: returns ``scale X X^T + shift`` for inputs at one position.
        onto: a matrix to add to, in place; None: a fresh one.

    Returns:
        ``(r n, r n)`` in the data type of the arguments, with the mass absorbed.
    """
    if isinstance(manifold, Scaled):
        mass = replace(mass, scalar=mass.scalar * manifold.scale**2)
        return linear_gram(manifold.base, W, x, l, mass, bias, known, onto)
    r, n, positions, _ = l.shape
    if not positions:
        return l.new_zeros(r * n, r * n) if onto is None else onto
    out = l.new_empty(r * n, r * n) if onto is None else onto
    if (
        type(manifold) is geoopt.Euclidean
        and mass.is_scalar
        and known
        and positions == 1
    ):
        rows, kernel = l.flatten(0, 2), known(1.0 / mass.scalar, bias)
        _add_hadamard(out, rows, rows, kernel, first=onto is None)
        return out
    scale = 1.0
    if mass.row is not None and mass.column is not None:
        l = l / (mass.scalar * mass.row).sqrt().to(l)
        x, known = x / mass.column.sqrt().to(x), None
    elif isinstance(manifold, geoopt.Euclidean):
        scale = 1.0 / mass.scalar
    elif mass.scalar != 1.0:
        l, bias = l / mass.scalar**0.5, bias * mass.scalar
    add = _terms(manifold, _Rows(W, x, l, scale, bias, known))
    for index, (s, t) in enumerate(product(range(positions), repeat=2)):
        add(out, s, t, index == 0 and onto is None)
    return out


Terms = Callable[[Tensor, int, int, bool], None]


@singledispatch
def _terms(manifold: geoopt.Manifold, rows: _Rows) -> Terms:
    raise NotImplementedError(f"no Gram matrix over pairs of positions on {manifold}")


def has_terms(manifold: geoopt.Manifold) -> bool:
    """Whether :func:`linear_gram` knows this manifold."""
    if type(manifold) is geoopt.Euclidean:
        return True
    if isinstance(manifold, Scaled):
        return has_terms(manifold.base)
    # A sphere within a subspace has other tangent vectors.
    whole = getattr(manifold, "projector", None) is None
    return whole and _terms.dispatch(type(manifold)) is not _NO_TERMS


_NO_TERMS = _terms.dispatch(object)


@_terms.register(geoopt.Euclidean)
def _(manifold: geoopt.Euclidean, rows: _Rows) -> Terms:
    ls = rows.by_position(rows.l)

    def add(out: Tensor, s: int, t: int, first: bool) -> None:
        _add_hadamard(out, ls[s], ls[t], rows.kernel(s, t, rows.bias), first=first)

    return add


@_terms.register(geoopt.PoincareBall)
def _(manifold: geoopt.PoincareBall, rows: _Rows) -> Terms:
    flattened = replace(rows, l=rows.l / manifold.lambda_x(rows.W))
    return _terms(geoopt.Euclidean(), flattened)


def _unit_vectors(rows: _Rows, radial: Tensor) -> Terms:
    euclidean = _terms(geoopt.Euclidean(), rows)
    radial = radial.sum(2).flatten(0, 1)

    def add(out: Tensor, s: int, t: int, first: bool) -> None:
        euclidean(out, s, t, first)
        if s == t == 0:
            out.addmm_(radial, radial.mT, alpha=-1.0)

    return add


@_terms.register(geoopt.Sphere)
def _(manifold: geoopt.Sphere, rows: _Rows) -> Terms:
    return _unit_vectors(rows, rows.l * (rows.x @ rows.W.mT))


@_terms.register(Oblique)
def _(manifold: Oblique, rows: _Rows) -> Terms:
    if manifold.unit == "columns":
        return _unit_vectors(rows, (rows.l @ rows.W) * rows.x)
    return _terms(geoopt.Sphere(), rows)


@_terms.register(Grassmann)
def _(manifold: Grassmann, rows: _Rows) -> Terms:
    wide = rows.W.shape[-2] < rows.W.shape[-1]
    lines = rows.W if wide else rows.W.mT
    x, ls = rows.x.unbind(1), rows.by_position(rows.l)
    # One factor of each product loses its normal part: as exact as projecting rows.
    y = rows.x - (rows.x @ lines.mT) @ lines if wide else rows.x
    m = rows.l if wide else rows.l - (rows.l @ lines.mT) @ lines
    ys, ms = y.unbind(1), rows.by_position(m)

    def add(out: Tensor, s: int, t: int, first: bool) -> None:
        _add_hadamard(out, ls[s], ms[t], x[s] @ ys[t].mT, first=first)

    return add


@_terms.register(geoopt.EuclideanStiefel)
def _(manifold: geoopt.EuclideanStiefel, rows: _Rows) -> Terms:
    ls, qs = rows.by_position(rows.l), rows.by_position(rows.l @ rows.W)
    ps = (rows.x @ rows.W.mT).unbind(1)
    wide = rows.W.shape[-2] < rows.W.shape[-1]

    def add(out: Tensor, s: int, t: int, first: bool) -> None:
        kernel = rows.kernel(s, t, rows.bias)
        if wide:
            inner = torch.addmm(kernel, ps[s], ps[t].mT, alpha=-0.5)
            _add_hadamard(out, ls[s], ls[t], inner, first=first)
        else:
            _add_hadamard(out, ls[s], ls[t], kernel, first=first)
            _add_hadamard(out, qs[s], qs[t], -0.5 * rows.kernel(s, t), first=False)
        _add_crossed(out, ls[s] @ ps[t].mT, ls[t] @ ps[s].mT, -0.5)

    return add


@_terms.register(CanonicalStiefel)
def _(manifold: CanonicalStiefel, rows: _Rows) -> Terms:
    euclidean = _terms(geoopt.Euclidean(), rows)
    ls, ps = rows.by_position(rows.l), (rows.x @ rows.W.mT).unbind(1)

    def add(out: Tensor, s: int, t: int, first: bool) -> None:
        euclidean(out, s, t, first)
        _add_crossed(out, ls[s] @ ps[t].mT, ls[t] @ ps[s].mT, -1.0)

    return add


@_terms.register(geoopt.SymmetricPositiveDefinite)
def _(manifold: geoopt.SymmetricPositiveDefinite, rows: _Rows) -> Terms:
    ls, qs = rows.by_position(rows.l), rows.by_position(rows.l @ rows.W)
    xs, ps = rows.x.unbind(1), (rows.x @ rows.W).unbind(1)

    def add(out: Tensor, s: int, t: int, first: bool) -> None:
        _add_hadamard(out, qs[s], ls[t], 0.5 * ps[s] @ xs[t].mT, first=first)
        _add_crossed(out, ls[s] @ ps[t].mT, ls[t] @ ps[s].mT, 0.5)

    return add
