"""Factors that keep cotangents at the outputs of a layer."""

from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor

__all__ = ["CotangentFactor", "Known", "memory", "side_by_side", "under_each_other"]


def memory(tensor: Tensor) -> tuple[int, torch.Size, tuple[int, ...]]:
    """Return what two tensors have in common only if they are the same numbers."""
    return tensor.data_ptr(), tensor.shape, tensor.stride()


Known = dict[tuple[int, ...], Tensor]


def side_by_side(pieces: Sequence[Tensor], known: Known) -> Tensor:
    """Return the cotangents of several passes as one tensor.

    Args:
        pieces: ``(r_k, n, *places)`` each.
        known: what was put together before, so that a weight and its bias share it.

    Returns:
        ``(r, n, *places)``.
    """
    key = tuple(map(id, pieces))
    if key not in known:
        known[key] = torch.cat(list(pieces))
    return known[key]


def under_each_other(factors: Sequence[MetricFactor], known: Known) -> MetricFactor:
    """Return the factor of the rows of factors of one call, one after the other.

    Args:
        factors: of one kind, with cotangents; at least one.
        known: see :func:`side_by_side`; the factors must outlive it.

    Returns:
        The factor.

    Raises:
        ShapeError: the factors do not keep cotangents.
    """
    first = factors[0]
    pieces = [f.cotangents for f in factors if isinstance(f, CotangentFactor)]
    if not isinstance(first, CotangentFactor) or len(pieces) < len(factors):
        raise ShapeError(
            f"the rows of {first!r} and of other passes cannot be put together; a "
            "rule that is registered with apart=True must return factors that keep "
            "their cotangents"
        )
    return first.with_cotangents(pieces, known)


class CotangentFactor(MetricFactor):
    """A factor that is linear in cotangents ``(r, n, *places)`` at a layer's output.

    Attributes:
        pieces: the cotangents of one reverse pass after the other.
    """

    pieces: tuple[Tensor, ...]

    @cached_property
    def cotangents(self) -> Tensor:
        """All of them, ``(r, n, *places)``."""
        return self.pieces[0] if len(self.pieces) == 1 else torch.cat(self.pieces)

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the cotangents."""
        return self.pieces[0].dtype

    @property
    def device(self) -> torch.device:
        """Device of the cotangents."""
        return self.pieces[0].device

    def combine(self, a: Tensor) -> Tensor:
        """Return ``sum_j a_ji l_ji``, ``(n, *places)``, for ``a`` (rank,)."""
        r, n, *places = self.cotangents.shape
        weights = a.to(self.dtype).view(r, n, *[1] * len(places))
        if r == 1:
            return self.cotangents[0] * weights[0]
        return (self.cotangents * weights).sum(0)

    def remainder(self, a: Tensor, total: Tensor) -> Tensor:
        """Return what :meth:`combine` leaves of a total, in one pass where it can."""
        if self.cotangents.shape[0] > 1:
            return total - self.combine(a)
        own = self.cotangents[0]
        weights = a.to(self.dtype).view(-1, *[1] * (own.ndim - 1))
        return torch.addcmul(total, own, weights, value=-1.0)

    def total(self) -> Tensor:
        """Return :meth:`combine` of ones."""
        l = self.cotangents
        return l[0] if l.shape[0] == 1 else l.sum(0)

    @classmethod
    @abstractmethod
    def merge(cls, factors: Sequence[Self]) -> MetricFactor:
        """Return the sum of factors of this kind."""

    @abstractmethod
    def with_cotangents(self, cotangents: Sequence[Tensor], known: Known) -> Self:
        """Return the factor of other rows of the same call.

        Args:
            cotangents: ``(r_k, n, *places)`` each, one after the other.
            known: what :func:`side_by_side` remembers.
        """

    def _groups(self, start: int, stop: int) -> Tensor:
        n = self.cotangents.shape[1]
        if start % n or stop % n:
            raise ShapeError(f"rows {start}:{stop} are not whole groups of {n} rows")
        return self.cotangents[start // n : stop // n]
