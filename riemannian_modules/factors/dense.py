"""A factor that stores its rows: works on every manifold, costs rank x p memory."""

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors.base import MetricFactor

__all__ = ["DenseFactor"]


class DenseFactor(MetricFactor):
    """Rows of K as one tensor of shape ``(rank, *shape)``.

    Args:
        rows: the rows, one covector of the parameter's shape each; ``(rank,)`` for a
            parameter that is a number.

    Raises:
        ShapeError: ``rows`` is a number itself.

    >>> factor = DenseFactor(torch.tensor([[1.0, 2.0]]))
    >>> factor.matvec(torch.tensor([1.0, 1.0]))
    tensor([3.])
    """

    def __init__(self, rows: Tensor) -> None:
        if rows.ndim < 1:
            raise ShapeError(
                f"rows of a dense factor have shape {tuple(rows.shape)}; expected "
                "(rank, *shape) with the shape of the parameter"
            )
        self._rows = rows
        self.rank = rows.shape[0]
        self.shape = tuple(rows.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Data type of the rows."""
        return self._rows.dtype

    @property
    def device(self) -> torch.device:
        """Device of the rows."""
        return self._rows.device

    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u``. Cost O(rank p)."""
        return self._rows.reshape(self.rank, -1) @ u.to(self.dtype).reshape(-1)

    def rmatvec(self, a: Tensor) -> Tensor:
        """Return ``K^T a``. Cost O(rank p)."""
        covector = a.to(self.dtype) @ self._rows.reshape(self.rank, -1)
        return covector.reshape(self.shape)

    def rows(self, start: int, stop: int) -> Tensor:
        """Return the stored rows ``start:stop``."""
        return self._rows[start:stop]

    def narrow(self, start: int, stop: int) -> "DenseFactor":
        """Return the factor of the rows ``start:stop``."""
        return DenseFactor(self._rows[start:stop])

    def __add__(self, other: MetricFactor) -> "DenseFactor":
        """Return the factor whose rows are the sums of both factors' rows."""
        return DenseFactor(self._rows + other.rows(0, self.rank))

    def double(self) -> "DenseFactor":
        """Return the same factor in float64."""
        return DenseFactor(self._rows.double())
