r"""What solving a block holds in memory at one time, besides its factors.

Counted are the small matrix, copies in its data type, tiles and chunks of rows, columns
of the preconditioner and vectors; not what is in use before, such as the factors, nor a
workspace inside one call of LAPACK. Allow a mebibyte for the rest.
"""

import re
from dataclasses import dataclass
from decimal import Decimal

import torch

from riemannian_modules.block import Block
from riemannian_modules.factors import (
    DenseFactor,
    LinearFactor,
    MetricFactor,
    ViewedFactor,
)
from riemannian_modules.factors.cotangents import CotangentFactor
from riemannian_modules.factors.slabs import _FEWEST_ROWS

__all__ = ["Held", "held", "parse_bytes"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_DECIMAL = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_TILE_ROWS = 384
# Tensors that exist for each chunk: its rows, their images, and one on the way.
_COPIES = 4


def parse_bytes(bound: int | str | None) -> int | None:
    """Return a number of bytes.

    Args:
        bound: bytes, a text such as ``"1.5GiB"`` or ``"200 MB"``, or None.

    Returns:
        Bytes, or None for no bound.

    Raises:
        ValueError: no positive number with a known unit.

    >>> parse_bytes("1.5 KiB"), parse_bytes("2MB"), parse_bytes(None)
    (1536, 2000000, None)
    """
    if bound is None:
        return None
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?)\s*([KMGT]?)(i?)B?\s*", str(bound))
    value = 0
    if found and not (found[3] and not found[2]):
        unit = (_UNITS if found[3] else _DECIMAL)[found[2]]
        value = int(Decimal(found[1]) * unit)
    if value <= 0:
        raise ValueError(
            f"max_memory={bound!r}; give a positive number of bytes, or a text such as "
            "'512MiB' or '2GB'"
        )
    return value


@dataclass(frozen=True)
class Held:
    """Bytes that one way to solve a block holds.

    Attributes:
        fixed: what does not come in chunks.
        each: bytes for each entry of a chunk.
        least: entries of the smallest chunk; 0 without chunks.
    """

    fixed: int
    each: int
    least: int

    @property
    def smallest(self) -> int:
        """The smallest bound that it keeps."""
        return self.fixed + self.each * self.least

    def entries(self, bound: int) -> int:
        """Return how many entries a chunk may have within a bound."""
        return (bound - self.fixed) // self.each


def held(block: Block, way: str, small: torch.dtype, pivots: int) -> Held:
    """Return what one way to solve a block holds.

    Args:
        block: the block.
        way: ``"dual"``, ``"primal"`` or ``"cg"``.
        small: data type of the small matrix.
        pivots: columns of the preconditioner.
    """
    factors = [p.factor for p in block.parts if p.factor is not None]
    rank, size = block.rank, block.size
    width, own = small.itemsize, block.dtype.itemsize
    # Solutions, covectors and vectors of length rank.
    vectors = 4 * size * own + 16 * rank * 8
    if way == "cg":
        columns = 5 * rank * pivots * 8
        # Products at a layer's outputs have the size of its cotangents.
        apart = [f for f in factors if not isinstance(f, DenseFactor)]
        products = max((2 * _stored(f) * own for f in apart), default=0)
        copies = 0 if own == 8 else 8 * sum(map(_stored, factors))
        least = 2 * size if pivots or copies else 0
        return Held(vectors + columns + products + copies, _COPIES * own, least)
    if way == "primal":
        double = 8 * sum(map(_stored, factors)) if own < 8 else 0
        fixed = vectors + 8 * size**2 + double + 4 * 8 * size
        return Held(fixed, _COPIES * 8, size)
    casts = max((0 if width == own else width * _stored(f)) for f in factors)
    tiles = width * _TILE_ROWS * rank + 2 * width * max(map(_kernel, factors))
    chunked = not all(isinstance(f, LinearFactor) for f in factors)
    # A factor whose rows are formed has a matrix of its own to add up.
    matrices = (2 if chunked and len(factors) > 1 else 1) * width * rank**2
    most = max(_numel(factor.shape) for factor in factors)
    least = _FEWEST_ROWS * most if chunked else most
    return Held(vectors + matrices + casts + tiles, _COPIES * width, least)


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _stored(factor: MetricFactor) -> int:
    """Return the entries that a factor, or a copy of it, consists of."""
    if isinstance(factor, ViewedFactor):
        return _stored(factor.inner)
    if isinstance(factor, CotangentFactor):
        inputs = getattr(factor, "inputs", None)
        return factor.cotangents.numel() + (0 if inputs is None else inputs.numel())
    return factor.rank * _numel(factor.shape)


def _kernel(factor: MetricFactor) -> int:
    """Return the entries of ``X X^T``."""
    if isinstance(factor, ViewedFactor):
        return _kernel(factor.inner)
    return len(factor.inputs) ** 2 if isinstance(factor, LinearFactor) else 0
