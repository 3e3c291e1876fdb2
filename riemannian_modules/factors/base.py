"""The linear map K of one parameter, as an interface."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from riemannian_modules.tangent import TangentSpace

__all__ = ["MetricFactor"]


class MetricFactor(ABC):
    """The linear map ``K`` from a parameter's tangent space to ``R^rank``.

    Row ``j`` of K is an ambient covector of the parameter's shape. A structured
    factor knows K only through its products; :meth:`rows` is for small problems,
    fallbacks and tests.

    Attributes:
        shape: shape of the parameter.
        rank: number of rows.
    """

    shape: tuple[int, ...]
    rank: int

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank {self.rank}, shape {tuple(self.shape)})"

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Data type of the products."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device of the products."""

    @abstractmethod
    def matvec(self, u: Tensor) -> Tensor:
        """Return ``K u`` of shape ``(rank,)`` for a vector ``u`` of ``shape``."""

    @abstractmethod
    def rmatvec(self, a: Tensor) -> Tensor:
        """Return the covector ``K^T a`` of ``shape`` for ``a`` of shape ``(rank,)``."""

    def row_sum(self) -> Tensor:
        """Return ``K^T 1``, the sum of all rows, of ``shape``."""
        return self.rmatvec(torch.ones(self.rank, dtype=self.dtype, device=self.device))

    def image(self, space: TangentSpace, e: Tensor, source: "MetricFactor") -> Tensor:
        """Return ``K sharp e`` for a covector that is ``source.row_sum()``.

        Args:
            space: tangent space with the Riesz map and the mass.
            e: the covector.
            source: a factor whose rows add up to it.

        Returns:
            ``(rank,)``.
        """
        return self.matvec(space.sharp(e))

    def magnitude(self) -> Tensor:
        """Return an upper bound of the sum of the rows' norms, a scalar."""
        return self.rows(0, self.rank).norm() * self.rank**0.5

    @abstractmethod
    def rows(self, start: int, stop: int) -> Tensor:
        """Return rows ``start:stop`` of K, shape ``(stop - start, *shape)``."""

    @abstractmethod
    def narrow(self, start: int, stop: int) -> "MetricFactor":
        """Return the factor of rows ``start:stop``, which shares their memory.

        A structured factor may ask for whole groups of n rows, one for each example.
        """

    @abstractmethod
    def double(self) -> "MetricFactor":
        """Return the same factor in float64."""

    def __add__(self, other: "MetricFactor") -> "MetricFactor":
        """Return the factor of a parameter that is used in two places."""
        raise NotImplementedError(
            f"{type(self).__name__} cannot be added to {type(other).__name__}; define "
            "__add__ for parameters that are shared"
        )

    def gram(self, space: TangentSpace, dtype: torch.dtype) -> Tensor:
        """Return ``K sharp K^T``, shape ``(rank, rank)``, at least its lower triangle.

        The default forms all rows. Cost O(rank^2 p).

        Args:
            space: tangent space with the Riesz map and the mass.
            dtype: data type in which the matrix is formed.

        Returns:
            A fresh matrix that the caller may change. Entries above the diagonal
            are unspecified.
        """
        rows = self.rows(0, self.rank).to(dtype)
        flat = rows.reshape(self.rank, -1)
        return flat @ space.to(dtype).sharp(rows).reshape(self.rank, -1).mT

    def to_dense(self) -> Tensor:
        """Return K as a matrix, shape ``(rank, p)``, entries of the parameter flat."""
        return self.rows(0, self.rank).reshape(self.rank, -1)
