r"""Gram matrices of factors whose rows are formed a piece at a time, in bounded memory.

A *slab* of K is what its rows say about some rows of the parameter. Where the Riesz
map acts on each row of the parameter alone,

    K sharp K^T = sum over slabs of  K_slab sharp_slab K_slab^T,

so no more than one slab exists at a time. On other manifolds whole rows are needed,
and a few of them exist at a time.
"""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from functools import singledispatch

import geoopt
import torch
from torch import Tensor

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.chunks import is_bounded, most_entries
from riemannian_modules.manifolds.grassmann import Grassmann
from riemannian_modules.manifolds.log_euclidean import LogEuclideanSPD
from riemannian_modules.manifolds.oblique import Oblique
from riemannian_modules.manifolds.positive import Positive
from riemannian_modules.manifolds.reshaped import Reshaped
from riemannian_modules.manifolds.scaled import Scaled
from riemannian_modules.tangent import TangentSpace

__all__ = [
    "Slab",
    "SlabFactor",
    "SparseFactor",
    "acts_by_row",
    "add_lower",
    "coupled_dims",
    "gram_of_whole_rows",
    "pieces",
    "restricted",
    "row_blocks",
    "slab_gram",
]

# The lower triangle is made in bands of so many rows, and in at least so many bands
# where a product of that many columns takes longer than a call, but none with fewer.
_BLOCK_ROWS = 128
_BANDS = 4
_WIDE = 1024
_MOST_SHARES = 8
_FEWEST_IN_BAND = 64
# So many whole rows are formed at once, whatever the bound on memory.
_FEWEST_ROWS = 16

Slab = slice | Tensor


@singledispatch
def coupled_dims(manifold: geoopt.Manifold) -> int | None:
    """Return how many trailing dimensions of a tensor the Riesz map mixes.

    0: every entry has its own; 1: every row of a matrix; None: unknown, all of them.
    Register your manifold's class here if its Riesz map acts on rows alone, and tall
    parameters such as embeddings cost only what occurs in the batch.

    >>> coupled_dims(geoopt.Sphere()), coupled_dims(geoopt.Stiefel())
    (1, 2)
    """
    return None


@coupled_dims.register(geoopt.Euclidean)
@coupled_dims.register(Positive)
def _(manifold: geoopt.Manifold) -> int:
    return 0


@coupled_dims.register(geoopt.Sphere)
@coupled_dims.register(geoopt.Stereographic)
@coupled_dims.register(geoopt.Lorentz)
def _(manifold: geoopt.Manifold) -> int:
    return 1


@coupled_dims.register(geoopt.Stiefel)
@coupled_dims.register(geoopt.SymmetricPositiveDefinite)
@coupled_dims.register(Grassmann)
@coupled_dims.register(LogEuclideanSPD)
def _(manifold: geoopt.Manifold) -> int:
    return 2


@coupled_dims.register(Oblique)
def _(manifold: Oblique) -> int:
    return -manifold.dim


@coupled_dims.register(Scaled)
def _(manifold: Scaled) -> int | None:
    return coupled_dims(manifold.base)


@coupled_dims.register(Reshaped)
def _(manifold: Reshaped) -> int | None:
    coupled = coupled_dims(manifold.base)
    rows = manifold.view[0] == manifold.shape[0]
    apart = coupled is not None and coupled < len(manifold.view)
    return len(manifold.shape) - 1 if rows and apart else None


def acts_by_row(space: TangentSpace) -> bool:
    """Whether the Riesz map acts on each index of the first dimension alone."""
    coupled = coupled_dims(space.manifold)
    return coupled is not None and coupled < space.point.ndim


def restricted(space: TangentSpace, index: Slab) -> TangentSpace:
    """Return the tangent space of some rows of a parameter.

    Args:
        space: tangent space where :func:`acts_by_row`.
        index: rows, possibly repeated.

    Returns:
        Their tangent space.
    """
    mass = space.mass
    if mass.diagonal is not None:
        mass = replace(mass, diagonal=mass.diagonal[index])
    elif mass.row is not None:
        mass = replace(mass, row=mass.row[index])
    point, manifold = space.point[index], space.manifold
    if isinstance(manifold, Reshaped):
        size = len(point)
        shape, view = (size, *manifold.shape[1:]), (size, *manifold.view[1:])
        manifold = Reshaped(manifold.base, shape, view)
    return TangentSpace(manifold, point, mass, space.name)


def pieces(size: int, each: int, unit: int = 1) -> Iterator[slice]:
    """Yield slices of a dimension that keep within the memory bound.

    Args:
        size: size of the dimension.
        each: entries that one index of it costs.
        unit: the slices begin at multiples of this.

    Yields:
        Slices.
    """
    step = max(1, most_entries() // (max(1, each) * unit)) * unit
    for start in range(0, size, step):
        yield slice(start, min(start + step, size))


def add_lower(out: Tensor, left: Tensor, right: Tensor, *, first: bool) -> None:
    """Add ``left right^T``, of which only the lower triangle is wanted.

    Args:
        out: ``(rank, rank)``.
        left: ``(rank, k)``.
        right: ``(rank, k)``.
        first: overwrite instead.
    """
    rank, step, shares = len(out), _BLOCK_ROWS, 1
    if out.device.type == "cpu" and left.shape[1] >= _WIDE:
        step = min(step, max(_FEWEST_IN_BAND, -(-rank // _BANDS)))
        if not is_bounded():
            threads = min(torch.get_num_threads(), _MOST_SHARES)
            shares = max(1, min(threads, left.shape[1] // _WIDE))
    # A product of few rows and many columns keeps one thread busy: each takes some.
    each = left.shape[1] // shares
    a, b = _shared(left, shares, each), _shared(right, shares, each)
    for start in range(0, rank, step):
        stop = min(start + step, rank)
        block = out[start:stop, :stop]
        if shares > 1:
            found = torch.bmm(a[:, start:stop], b[:, :stop].mT)
            if first:
                torch.sum(found, 0, out=block)
            else:
                block.add_(found.sum(0))
            if rest := left.shape[1] - shares * each:
                block.addmm_(left[start:stop, -rest:], right[:stop, -rest:].mT)
        elif first:
            torch.mm(left[start:stop], right[:stop].mT, out=block)
        else:
            block.addmm_(left[start:stop], right[:stop].mT)


def _shared(matrix: Tensor, shares: int, each: int) -> Tensor:
    """Return columns in shares of equal size, ``(shares, rows, each)``, a view."""
    return matrix[:, : shares * each].unflatten(1, (shares, each)).transpose(0, 1)


class SlabFactor(MetricFactor):
    """A factor that can form its rows for some rows of the parameter at a time.

    Attributes:
        unit: slabs of whole multiples of this many rows cost the least.
        whole: all rows, ``(rank, *shape)``, kept from the Gram matrix where they were
            formed at once; products with them are cheaper then.
        keeps_wider: whether these may be of a wider data type than the factor.
    """

    unit: int = 1
    keeps_wider: bool = False
    whole: Tensor | None = None

    def times_whole(self, u: Tensor) -> Tensor:
        """Return ``K u`` from the rows that were kept."""
        assert self.whole is not None
        image = self.whole.reshape(self.rank, -1) @ u.to(self.whole.dtype).reshape(-1)
        return image.to(self.dtype)

    def whole_times(self, a: Tensor) -> Tensor:
        """Return ``K^T a`` from the rows that were kept."""
        assert self.whole is not None
        flat = a.to(self.whole.dtype) @ self.whole.reshape(self.rank, -1)
        return flat.view(self.shape).to(self.dtype)

    @abstractmethod
    def slab(self, index: Slab) -> Tensor:
        """Return the rows of K at some rows of the parameter, ``(rank, k, *rest)``."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> "SlabFactor":
        """Return the same factor in another data type."""

    def double(self) -> "SlabFactor":
        """Return the same factor in float64."""
        return self.to(torch.float64)

    def gram(self, space: TangentSpace, dtype: torch.dtype) -> Tensor:
        """Return ``K sharp K^T`` from slabs. Cost O(rank^2 p), bounded memory."""
        return slab_gram(self, space, dtype)


class SparseFactor(SlabFactor):
    """A factor that is zero at most rows of the parameter."""

    @property
    @abstractmethod
    def table(self) -> Tensor:
        """The rows of the parameter at which it is not, ``(m,)``.

        Its entries count as slots: a slot whose slab is zero may name any row.
        """

    @abstractmethod
    def slot_slab(self, slots: slice) -> Tensor:
        """Return the rows of K at ``table[slots]``, ``(rank, k, *rest)``."""


def slab_gram(factor: SlabFactor, space: TangentSpace, dtype: torch.dtype) -> Tensor:
    """Return ``K sharp K^T`` by forming rows, a slab at a time.

    Args:
        factor: the factor.
        space: tangent space of the parameter.
        dtype: data type in which the matrix is formed.

    Returns:
        ``(rank, rank)``, lower triangle valid.
    """
    origin, factor, space = factor, factor.to(dtype), space.to(dtype)
    if not (acts_by_row(space) and len(space.point)):
        return gram_of_whole_rows(factor, space)
    rank, out = factor.rank, space.point.shape[0]
    flat = isinstance(space.manifold, geoopt.Euclidean) and space.mass.is_scalar
    each = rank * (space.point.numel() // out)
    total = torch.empty(rank, rank, dtype=dtype, device=factor.device)
    for index in pieces(out, each, factor.unit):
        rows = factor.slab(index)
        images = rows if flat else restricted(space, index).sharp(rows)
        first = index.start == 0
        alike = dtype == origin.dtype or origin.keeps_wider
        if first and index.stop == out and alike:
            origin.whole = rows
        add_lower(total, rows.flatten(1), images.flatten(1), first=first)
    return total.div_(space.mass.scalar) if flat and space.mass.scalar != 1.0 else total


def gram_of_whole_rows(factor: MetricFactor, space: TangentSpace) -> Tensor:
    """Return ``K sharp K^T``, lower triangle valid, from some whole rows at a time."""
    rank = factor.rank
    step = max(_FEWEST_ROWS, most_entries() // max(1, space.point.numel()))
    total = torch.empty(rank, rank, dtype=factor.dtype, device=factor.device)
    for start in range(0, rank, step):
        stop = min(start + step, rank)
        rows = factor.rows(start, stop)
        images = space.sharp(rows).flatten(1)
        add_lower(total[start:stop, start:stop], images, rows.flatten(1), first=True)
        for before in range(0, start, step):
            others = factor.rows(before, before + step).flatten(1)
            part = total[start:stop, before : before + step]
            torch.mm(images, others.mT, out=part)
    return total


def row_blocks(start: int, stop: int, n: int) -> Iterator[tuple[slice, slice, slice]]:
    """Yield rows ``start:stop`` of a factor as blocks of cotangents and examples.

    Args:
        start: first row.
        stop: end of the rows.
        n: number of examples.

    Yields:
        Which cotangents, which examples, and where their rows are from ``start`` on.

    >>> [(j, i) for j, i, _ in row_blocks(2, 9, 3)]
    [(slice(0, 1, None), slice(2, 3, None)), (slice(1, 3, None), slice(0, 3, None))]
    """
    row = start
    while row < stop:
        j, i = divmod(row, n)
        count = (stop - row) // n if i == 0 else 0
        end = row + count * n if count else min(stop, (j + 1) * n)
        cotangents = slice(j, j + max(1, count))
        examples = slice(0, n) if count else slice(i, i + end - row)
        yield cotangents, examples, slice(row - start, end - start)
        row = end
