"""An approximate inverse of the metric, one Kronecker product for each parameter."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import singledispatch

import torch
from torch import Tensor

from riemannian_modules.block import Part
from riemannian_modules.factors import BiasFactor, LinearFactor, MetricFactor
from riemannian_modules.tangent import TangentSpace

__all__ = ["KroneckerInverse", "Sides", "sides", "sides_in_coordinates"]

_CHUNK_ENTRIES = 1 << 22
_LONGEST = 2048


@dataclass(frozen=True)
class Sides:
    """What the rows of a factor, as matrices, look like from the left and the right.

    Attributes:
        left: ``sum_j k_j k_j^T``, or its diagonal where that side is long.
        right: ``sum_j k_j^T k_j``, or its diagonal; a vector has ``(1, 1)``.
    """

    left: Tensor
    right: Tensor

    @property
    def trace(self) -> Tensor:
        """``sum_j |k_j|^2``, which is the trace of either."""
        return _diagonal(self.left).sum()


def _diagonal(side: Tensor) -> Tensor:
    return side if side.ndim == 1 else side.diagonal()


def _product(rows: Tensor) -> Tensor:
    # (side, entries) -> its Gram matrix, or the diagonal of that.
    return rows.square().sum(1) if len(rows) > _LONGEST else rows @ rows.mT


def _sides_of_rows(rows: Tensor) -> Sides:
    matrices = rows.reshape(len(rows), rows.shape[1] if rows.ndim > 1 else 1, -1)
    return Sides(
        _product(matrices.transpose(0, 1).flatten(1)),
        _product(matrices.permute(2, 0, 1).flatten(1)),
    )


@singledispatch
def sides(factor: MetricFactor) -> Sides | None:
    """Return the sides of a factor without forming its rows, None: form them.

    Args:
        factor: the factor of a parameter.
    """
    return None


@sides.register
def _(factor: LinearFactor) -> Sides | None:
    positions, entries = factor.inputs.shape[1:]
    if positions != 1:
        outputs = factor.cotangents.shape[-1]
        if positions > min(entries, outputs) or max(entries, outputs) > _LONGEST:
            return None
        return _sides_of_positions(factor.inputs, factor.cotangents)
    x = factor.inputs.squeeze(1)
    rows = factor.cotangents.squeeze(2)
    long = x.square().sum(1).sqrt()
    weight = rows.square().sum((0, 2)).sqrt()
    return Sides(
        _product((rows * long[:, None]).flatten(0, 1).mT),
        _product((x * weight[:, None]).mT),
    )


def _sides_of_positions(x: Tensor, rows: Tensor) -> Sides:
    # A row is S^T X with positions first: (S^T X)(S^T X)^T = S^T (X X^T) S.
    pairs = x @ x.mT
    left = rows.flatten(0, 2).mT @ (pairs @ rows).flatten(0, 2)
    pairs = (rows @ rows.mT).sum(0)
    right = x.flatten(0, 1).mT @ (pairs @ x).flatten(0, 1)
    return Sides(left, right)


@sides.register
def _(factor: BiasFactor) -> Sides:
    rows = factor.cotangents.sum(2).flatten(0, 1)
    return Sides(_product(rows.mT), rows.square().sum().view(1, 1))


def sides_in_coordinates(factor: MetricFactor, space: TangentSpace) -> Sides:
    """Return the sides of the rows of ``K C``, with the mass in C.

    Args:
        factor: the factor K of a parameter.
        space: its tangent space, ``C C^T`` its inverse metric.
    """
    divisor = space.divisor
    known = None if divisor is None else sides(factor)
    if known is not None and divisor is not None:
        return Sides(known.left / divisor, known.right / divisor)
    step = max(1, _CHUNK_ENTRIES // max(1, space.point.numel()))
    total: Sides | None = None
    for start in range(0, factor.rank, step):
        rows = factor.rows(start, min(start + step, factor.rank))
        some = _sides_of_rows(space.root_adjoint(rows.to(space.point.dtype)))
        total = (
            some
            if total is None
            else Sides(total.left + some.left, total.right + some.right)
        )
    if total is None:
        return _sides_of_rows(space.point.new_zeros(1, *space.point.shape))
    return total


class KroneckerInverse:
    """A symmetric positive map from covectors to tangent vectors, near the inverse.

    Implements :eq:`kronecker-inverse`. In coordinates ``u = C z``, with the mass in C,
    the metric of one parameter is ``1 + sum_j k_j k_j^T`` for the rows k of ``K C``,
    taken as matrices (a vector is a column, a tensor is flattened behind its first
    dimension). Their left and right Gram matrices make the Kronecker product, one step
    of the power iteration to the nearest one, and the 1 is shared out so that both
    sides gain in proportion to their mean eigenvalue (Martens & Grosse, 2015). Sides
    longer than 2,048 are taken as diagonal. Parameters do not see each other.

    Args:
        parts: parameters with tangent spaces and factors; a factor of None is zero.

    Cost: O(rank P (in + out) (P + in + out)) for linear layers at P positions, as long
    as these are fewer than entries of either side; the rows themselves, in
    chunks, for all other factors and on manifolds; a cube of each side's length.

    >>> import geoopt
    >>> from riemannian_modules.factors import DenseFactor
    >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(2))
    >>> part = Part("w", space, DenseFactor(torch.tensor([[1.0, 1.0]])))
    >>> KroneckerInverse([part])({"w": torch.tensor([3.0, 0.0])})["w"]
    tensor([ 2., -1.])
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        self._spaces = {}
        self._sides: dict[str, Sides] = {}
        for part in parts:
            self._spaces[part.name] = part.space
            if part.factor is not None:
                self._sides[part.name] = sides_in_coordinates(part.factor, part.space)
        self._scale = 1.0
        self._known: dict[str, tuple[Tensor, Tensor]] | None = None

    def scale_mass(self, factor: float) -> None:
        """Multiply the mass by a positive number; the next use factorises anew."""
        self._scale *= factor
        self._known = None

    @property
    def _inverses(self) -> dict[str, tuple[Tensor, Tensor]]:
        if self._known is None:
            self._known = self._factorise()
        return self._known

    def _factorise(self) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name, each in self._sides.items():
            left, right = each.left.double(), each.right.double()
            dtype = self._spaces[name].point.dtype
            if min(len(left), len(right)) == 1:
                # One side of one entry: the other says it all, exactly.
                longer = left if len(left) > 1 else right
                own = _inverse(longer / self._scale, 1.0).to(dtype)
                one = own.new_ones(1)
                found[name] = (own, one) if longer is left else (one, own)
                continue
            # Equal traces: the root of one shared out between the two sides.
            share = (self._scale * each.trace.double().clamp_min(1e-300)).sqrt()
            ratio = (len(right) / len(left)) ** 0.5
            found[name] = (
                _inverse(left / share, ratio).to(dtype),
                _inverse(right / share, 1.0 / ratio).to(dtype),
            )
        return found

    def __call__(self, e: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return tangent vectors for covectors, both by parameter name."""
        return {
            name: self._one(name, space, e[name])
            for name, space in self._spaces.items()
        }

    def _one(self, name: str, space: TangentSpace, e: Tensor) -> Tensor:
        z = space.root_adjoint(e)
        if name in self._inverses:
            left, right = self._inverses[name]
            matrix = z.reshape(len(left), len(right))
            z = _times(_times(matrix, left).mT, right).mT.reshape(z.shape)
        return space.root(z / self._scale)


def _inverse(side: Tensor, shift: float) -> Tensor:
    if side.ndim == 1:
        return (side + shift).reciprocal()
    eye = torch.eye(len(side), dtype=side.dtype, device=side.device)
    lower, info = torch.linalg.cholesky_ex(side + shift * eye)
    if int(info) == 0:
        return torch.cholesky_inverse(lower)
    # A mass below the rounding of the side: as much as that has to do.
    values, vectors = torch.linalg.eigh(side)
    floor = len(side) * torch.finfo(side.dtype).eps * values[-1].abs()
    return (vectors / (values.clamp_min(0.0) + shift + floor)) @ vectors.mT


def _times(matrix: Tensor, inverse: Tensor) -> Tensor:
    return inverse[:, None] * matrix if inverse.ndim == 1 else inverse @ matrix
