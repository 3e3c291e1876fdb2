"""A block of parameters: the product of their tangent spaces, and its factor K."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import overload

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors import BlockFactor, MetricFactor
from riemannian_modules.factors.chunks import most_entries
from riemannian_modules.factors.slabs import add_lower
from riemannian_modules.precision import dot
from riemannian_modules.tangent import TangentSpace

__all__ = ["Block", "Part", "Vectors", "small_precision"]

DOUBLE_RANK = 2048

Vectors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Part:
    """One parameter of a block: its name, tangent space and factor (None: K = 0)."""

    name: str
    space: TangentSpace
    factor: MetricFactor | None = None


class _Chosen(Sequence[Tensor]):
    """Some vectors of a mapping, in order; one is not read before it is needed."""

    def __init__(self, vectors: Vectors, names: Sequence[str]) -> None:
        self._vectors, self._names = vectors, names

    def __len__(self) -> int:
        return len(self._names)

    @overload
    def __getitem__(self, index: int) -> Tensor: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...

    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return _Chosen(self._vectors, self._names[index])
        return self._vectors[self._names[index]]


class Block:
    """The products that a block's metric is made of; K is the parts' side by side.

    Args:
        parts: the block's parameters, all factors of the same rank.
        name: the block's name, for errors.
        precision: data type of vectors of length rank.

    Raises:
        ShapeError: no parts, or factors that do not fit together or their tensors.
    """

    def __init__(
        self, parts: Sequence[Part], name: str, precision: torch.dtype
    ) -> None:
        pairs = [(p.factor, p.space) for p in parts if p.factor is not None]
        ranks = {factor.rank for factor, _ in pairs}
        if not parts or len(ranks) > 1:
            raise ShapeError(
                f"block '{name}': needs at least one parameter and factors of one "
                f"rank, got {len(parts)} parameters with ranks {sorted(ranks)}"
            )
        for part in parts:
            shape = part.space.point.shape
            if part.factor is not None and part.factor.shape != shape:
                raise ShapeError(
                    f"block '{name}': the factor of '{part.name}' has shape "
                    f"{part.factor.shape}, the parameter {tuple(shape)}"
                )
        self.parts = tuple(parts)
        self.name = name
        self.precision = precision
        self.rank = ranks.pop() if ranks else 0
        self._factor = BlockFactor(pairs)
        self._names = [part.name for part in parts if part.factor is not None]

    @cached_property
    def dim(self) -> int:
        """Dimension of the product manifold."""
        return sum(part.space.dim for part in self.parts)

    @property
    def size(self) -> int:
        """Number of entries of all parameters."""
        return sum(part.space.point.numel() for part in self.parts)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the parameters."""
        return self.parts[0].space.point.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self.parts[0].space.point.device

    def double(self) -> "Block":
        """Return the same block in float64."""
        parts = [
            Part(
                p.name,
                p.space.to(torch.float64),
                p.factor.double() if p.factor else None,
            )
            for p in self.parts
        ]
        return Block(parts, self.name, torch.float64)

    def zeros(self, *shape: int) -> Tensor:
        """Return zeros in the precision and on the device of the small matrix."""
        return torch.zeros(shape, dtype=self.precision, device=self.device)

    # --- products

    def matvec(self, u: Vectors) -> Tensor:
        """Return ``K u``, ``(rank,)``."""
        return self._sum(
            part.factor.matvec(u[part.name]) for part in self.parts if part.factor
        )

    def image(self, e: Vectors, source: Mapping[str, MetricFactor] | None) -> Tensor:
        """Return ``K sharp e``, ``(rank,)``.

        Args:
            e: covectors.
            source: factors whose row sums are these covectors, if known.

        Returns:
            The image.
        """
        if source is None:
            return self.matvec(self.sharp(e))
        names = self._names
        sums = [source[name] for name in names]
        return self._factor.image(_Chosen(e, names), sums)

    def _sum(self, images: Iterator[Tensor]) -> Tensor:
        total = next(images, None)
        if total is None:
            return self.zeros(0)
        for image in images:
            total = total + image
        return total

    def rmatvec(self, a: Tensor) -> dict[str, Tensor]:
        """Return the covectors ``K^T a``."""
        covectors = dict(zip(self._names, self._factor.rmatvec(a), strict=True))
        for part in self.parts:
            if part.factor is None:
                covectors[part.name] = torch.zeros_like(part.space.point)
        return covectors

    def sharp(self, e: Vectors) -> dict[str, Tensor]:
        """Return the Riesz map of the massed base metric."""
        return {part.name: part.space.sharp(e[part.name]) for part in self.parts}

    def direction(
        self,
        a: Tensor,
        e: Vectors | None = None,
        source: Mapping[str, MetricFactor] | None = None,
    ) -> dict[str, Tensor]:
        """Return ``sharp (e - K^T a)``, or ``sharp K^T a`` without covectors e.

        Args:
            a: ``(rank,)``.
            e: covectors.
            source: factors whose row sums are these covectors, if known.

        Returns:
            Tangent vectors, fresh tensors.
        """
        names = self._names
        own = None if e is None else _Chosen(e, names)
        sums = None if source is None else [source[name] for name in names]
        vectors = self._factor.direction(a, own, sums)
        found = dict(zip(names, vectors, strict=True))
        for part in self.parts:
            if part.factor is None:
                point = part.space.point
                found[part.name] = (
                    torch.zeros_like(point)
                    if e is None
                    else part.space.sharp(e[part.name])
                )
        return found

    def pair(self, e: Vectors, u: Vectors) -> Tensor:
        """Return ``e(u)``, a scalar, float64."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for part in self.parts:
            total = total + dot(e[part.name], u[part.name])
        return total

    # --- small matrices

    def gram(self, dtype: torch.dtype) -> Tensor:
        """Return ``K sharp K^T``, ``(rank, rank)``, lower triangle valid."""
        return self._factor.gram(dtype)

    def gram_product(self, a: Tensor) -> Tensor:
        """Return ``K sharp K^T a`` in the block's precision, without the matrix."""
        return self._factor.gram_product(a).to(self.precision)

    def gram_columns(self, index: Tensor) -> Tensor:
        """Return some columns of ``K sharp K^T``, ``(rank, k)``."""
        return self._factor.gram_columns(index)

    def gram_diagonal(self) -> Tensor:
        """Return the diagonal of ``K sharp K^T``, ``(rank,)``."""
        return self._factor.gram_diagonal()

    def coordinate_gram(self, rows: Tensor | None = None) -> Tensor:
        """Return ``(K C)^T (K C)``, ``(size, size)``, float64, lower triangle valid.

        Args:
            rows: ``K C``, if it is known.
        """
        G = torch.empty(self.size, self.size, dtype=torch.float64, device=self.device)
        first = True
        for some in self.coordinate_rows() if rows is None else [rows]:
            add_lower(G, some.mT, some.mT, first=first)
            first = False
        return G

    def all_coordinate_rows(self) -> Tensor | None:
        """Return ``K C`` in float64 if it is small, else None."""
        if self.rank * self.size > most_entries():
            return None
        return torch.cat(list(self.coordinate_rows()))

    def coordinate_rows(self) -> Iterator[Tensor]:
        """Yield ``K C`` in float64, in chunks of rows that bound the memory."""
        step = max(1, most_entries() // max(1, self.size))
        wide = [(part.factor, part.space.to(torch.float64)) for part in self.parts]
        for start in range(0, self.rank, step):
            stop = min(start + step, self.rank)
            rows = [
                space.point.new_zeros(stop - start, space.point.numel())
                if factor is None
                else space.root_adjoint(factor.rows(start, stop).double()).reshape(
                    stop - start, space.point.numel()
                )
                for factor, space in wide
            ]
            yield torch.cat(rows, 1)

    # --- flat vectors

    def stack(self, u: Vectors) -> Tensor:
        """Return the entries of all parameters as one vector, ``(size,)``."""
        return torch.cat([u[part.name].reshape(-1) for part in self.parts])

    def unstack(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the vectors whose :meth:`stack` is ``flat``."""
        sizes = [part.space.point.numel() for part in self.parts]
        return {
            part.name: piece.view_as(part.space.point)
            for part, piece in zip(self.parts, flat.split(sizes), strict=True)
        }


def small_precision(parts: Sequence[Part]) -> torch.dtype:
    """Return the data type of the small matrix: float64 up to a rank of 2048."""
    rank = max((p.factor.rank for p in parts if p.factor is not None), default=0)
    if rank <= DOUBLE_RANK:
        return torch.float64
    return torch.promote_types(parts[0].space.point.dtype, torch.float32)
