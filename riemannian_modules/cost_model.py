r"""What solving a block costs, counted from ranks, dimensions and shapes.

Seconds are the unit, from rates of one thread that were measured once; only their
quotients matter. With R the rank, p the entries of the parameters and m the smaller of
R and the dimension,

    direct     Gram matrix + m^3 / 3 + two products with K
    iterative  diagonal + k columns of the preconditioner + R k^2 + iterations * product

where the Gram matrix, a column and a product of each factor are counted by
:func:`work`.
"""

import math
from dataclasses import dataclass
from functools import singledispatch

import torch

from riemannian_modules.block import Block
from riemannian_modules.factors import (
    BiasFactor,
    ConvolutionFactor,
    DenseFactor,
    EmbeddingFactor,
    LinearFactor,
    MetricFactor,
    SumFactor,
    ViewedFactor,
)
from riemannian_modules.factors.linear_gram import forms_rows, has_terms
from riemannian_modules.factors.products import has_kernel
from riemannian_modules.tangent import TangentSpace

__all__ = ["Costs", "Work", "costs", "predicted_iterations", "work"]

# Measured on one core with AVX-512, float32: multiply-adds of a large product of
# matrices and of a Cholesky factorisation, entries read and combined, and one call.
PRODUCT = 5.0e10
CHOLESKY = 2.2e10
STREAM = 4.0e9
CALL = 6e-6
# What n threads make of a large product: n to this power.
SHARED = 0.9
# Float64 takes this many times longer.
DOUBLE = 2.0
# Of an entrywise product of the Gram matrix, in entries read.
HADAMARD = 2.0

MOST_PIVOTS = 128
FEWEST_PIVOTS = 16
TYPICAL_ITERATIONS = 8


@dataclass(frozen=True)
class Work:
    """Seconds for one factor, in float32.

    Attributes:
        product: one product with ``K sharp K^T``.
        column: one column of it.
        gram: all of it.
        diagonal: its diagonal.
    """

    product: float
    column: float
    gram: float
    diagonal: float

    def __add__(self, other: "Work") -> "Work":
        return Work(
            self.product + other.product,
            self.column + other.column,
            self.gram + other.gram,
            self.diagonal + other.diagonal,
        )


@singledispatch
def work(factor: MetricFactor, space: TangentSpace) -> Work:
    """Return what products with the Gram matrix of a factor cost.

    Register a factor's class here if its products cost less than those of its rows.

    Args:
        factor: K.
        space: tangent space of the parameter.
    """
    return _stored(factor.rank, space.point.numel())


def _stored(rank: int, size: int) -> Work:
    product = 2 * rank * size / STREAM + 4 * CALL
    gram = rank**2 * size / (2 * PRODUCT)
    return Work(product, rank * size / PRODUCT, gram, _of_rows(rank, size))


def _of_rows(rank: int, size: int, riesz: float = 0.0) -> float:
    """Return the seconds for the lengths of rows that are formed first."""
    return rank * (4 * size / STREAM + riesz / PRODUCT)


@work.register(DenseFactor)
@work.register(BiasFactor)
def _(factor: DenseFactor | BiasFactor, space: TangentSpace) -> Work:
    return _stored(factor.rank, space.point.numel())


@work.register(LinearFactor)
def _(factor: LinearFactor, space: TangentSpace) -> Work:
    r, n, positions, out = factor.cotangents.shape
    rank, width, stream = factor.rank, factor.shape[1], factor.cotangents.numel()
    size = out * width
    paired = space.mass.diagonal is None and has_terms(space.manifold)
    if not paired or forms_rows(r, n, positions, out, width):
        gram = rank * size * (positions + rank / 2) / PRODUCT
    else:
        pairs = rank**2 / 2 * (out / PRODUCT + HADAMARD / STREAM)
        gram = positions**2 * (pairs + n**2 * width / PRODUCT)
        gram *= 1 if space.divisor is not None else 2
    if has_kernel(factor, space):
        small = min(n, 2 * width) * n * out
        product = small / PRODUCT + 2 * stream / STREAM + 8 * CALL
        column = rank * (out / PRODUCT + 1 / STREAM)
        return Work(product, column, gram, stream / STREAM)
    riesz = 0 if space.divisor is not None else 4 * size * min(out, width)
    dense = 2 * n * positions * size + riesz
    product = dense / PRODUCT + 2 * stream / STREAM + 20 * CALL
    column = (n * positions * size + riesz) / PRODUCT + stream / PRODUCT
    return Work(product, column, gram, _of_rows(rank, size, riesz))


@work.register(ConvolutionFactor)
def _(factor: ConvolutionFactor, space: TangentSpace) -> Work:
    size, stream = space.point.numel(), factor.cotangents.numel()
    places = stream / (len(factor.cotangents) * factor.shape[0])
    if factor.whole is not None:
        return _stored(factor.rank, size)
    product = 2 * places * size / PRODUCT + 2 * stream / STREAM + 20 * CALL
    rows = len(factor.cotangents) * places * size
    gram = (rows + factor.rank**2 * size / 2) / PRODUCT
    return Work(product, product, gram, rows / PRODUCT + _of_rows(factor.rank, size))


@work.register(EmbeddingFactor)
def _(factor: EmbeddingFactor, space: TangentSpace) -> Work:
    stream = factor.cotangents.numel()
    product = 2 * (stream + space.point.numel()) / STREAM + 10 * CALL
    # Rows exist at the tokens that occur only.
    occurring = 4 * len(factor.cotangents) * len(factor.tokens) * factor.shape[1]
    return Work(
        product, product, factor.gram_work() / PRODUCT, occurring / STREAM + 10 * CALL
    )


@work.register(SumFactor)
def _(factor: SumFactor, space: TangentSpace) -> Work:
    total = Work(0.0, 0.0, 0.0, 0.0)
    for part in factor.parts:
        total = total + work(part, space)
    return total


@work.register(ViewedFactor)
def _(factor: ViewedFactor, space: TangentSpace) -> Work:
    view = factor.inner_space(space)
    if view is not None:
        return work(factor.inner, view)
    return _stored(factor.rank, space.point.numel())


@dataclass(frozen=True)
class Costs:
    """Estimated seconds, and bytes held at one time, of the ways to solve a block.

    Attributes:
        rank: number of rows of K.
        product: seconds for a product with the small matrix and what belongs to an
            iteration.
        pivots: columns in the preconditioner that suit these costs.
        column: seconds for one of them.
        diagonal: seconds for the diagonal that they are chosen by.
        cholesky: seconds for Gram matrix, factorisation and solve in the dual.
        primal: the same in the primal.
    """

    rank: int
    product: float
    pivots: int
    column: float
    diagonal: float
    cholesky: float
    primal: float

    def direct(self, form: str) -> float:
        """Return the seconds of the direct solve of a form."""
        return self.primal if form == "primal" else self.cholesky

    def pivoting(self, pivots: int) -> float:
        """Return the seconds for a preconditioner with this many columns."""
        small = 3 * DOUBLE * self.rank * pivots**2 / PRODUCT
        calls = 40 * CALL if pivots else 0.0
        return self.diagonal + pivots * self.column + small + calls

    def iterative(self, iterations: int) -> float:
        """Return the seconds of conjugate gradients."""
        return self.pivoting(self.pivots) + iterations * self.product

    def affordable(self, form: str) -> int:
        """Return the iterations after which the direct solve would have been done."""
        left = self.direct(form) - self.pivoting(self.pivots)
        return max(0, math.floor(left / self.product)) if left > 0 else 0


def costs(block: Block, small: torch.dtype, pivots: int | None = None) -> Costs:
    """Return what the ways to solve a block cost.

    Args:
        block: the block.
        small: data type of the small matrix.
        pivots: columns in the preconditioner; None: chosen.

    >>> import geoopt
    >>> from riemannian_modules import TangentSpace
    >>> from riemannian_modules.block import Part
    >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(256, 256))
    >>> def block(examples, rows):
    ...     l = torch.zeros(rows, examples, 1, 256)
    ...     factor = LinearFactor(torch.zeros(examples, 1, 256), l)
    ...     return Block([Part("w", space, factor)], "block", torch.float64)
    >>> few, many = (
    ...     costs(block(8, 2), torch.float32),
    ...     costs(block(512, 9), torch.float32),
    ... )
    >>> few.cholesky < few.iterative(8), many.cholesky > 10 * many.iterative(8)
    (True, True)
    """
    rank, p = block.rank, block.size
    total = Work(0.0, 0.0, 0.0, 0.0)
    for part in block.parts:
        if part.factor is not None:
            total = total + work(part.factor, part.space)
    wide = DOUBLE if small == torch.float64 else 1.0
    own = DOUBLE if block.dtype == torch.float64 else 1.0
    vectors = 12 * rank / STREAM + 20 * CALL
    product = own * total.product + vectors
    if pivots is None:
        most = min(MOST_PIVOTS, rank // 8, int(4 * product / (own * total.column)))
        pivots = most if most >= FEWEST_PIVOTS else 0
    product += 4 * rank * pivots / STREAM
    # Products of large matrices share the threads, what reads memory hardly does.
    speed = torch.get_num_threads() ** SHARED
    lower = wide * (rank**3 / 6 / CHOLESKY / speed + 2 * rank**2 / STREAM)
    cholesky = wide * total.gram / speed + lower + 2 * own * total.product + 20 * CALL
    primal = (rank * p**2 / 2) / PRODUCT + p**3 / 6 / CHOLESKY
    primal = DOUBLE * primal / speed + 20 * CALL
    column, diagonal = own * total.column, own * total.diagonal
    return Costs(rank, product, pivots, column, diagonal, cholesky, primal)


def predicted_iterations(remaining: float, pivots: int, tolerance: float) -> int:
    """Return how many iterations are to be expected, from what no pivot sees.

    The largest eigenvalue of the rest is guessed to be its trace over the number of
    pivots, and conjugate gradients are taken at their worst for it.

    Args:
        remaining: trace of the rest of M.
        pivots: columns in the preconditioner.
        tolerance: of the step.
    """
    condition = 1.0 + remaining / max(1, pivots)
    if not math.isfinite(condition):
        return 1 << 30
    return 1 + math.ceil(0.5 * math.sqrt(condition) * math.log(2.0 / tolerance))
