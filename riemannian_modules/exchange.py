"""What the metric of a model asks of the other processes that train it."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor

from riemannian_modules.factors import MetricFactor
from riemannian_modules.heads import Reduction
from riemannian_modules.joining import Size
from riemannian_modules.linearization import Linearization
from riemannian_modules.metric import LayerMetric, Solution

__all__ = ["Exchange"]


class Exchange(ABC):
    """Makes one batch of those of several processes.

    Every method is collective: all processes call the same ones in the same order.
    """

    @abstractmethod
    def guard(self, doing: str = "backward") -> AbstractContextManager[None]:
        """Let an error inside this scope be an error of every process.

        Without one, :meth:`join` has to follow, or :meth:`share` for ``"outputs"``.

        Args:
            doing: what is done inside, ``"backward"`` or ``"outputs"``.

        Raises:
            Exception: what was raised inside.
        """

    @abstractmethod
    def join(
        self,
        found: Linearization,
        loss: Tensor | None,
        size: Size,
        reduction: Reduction,
    ) -> tuple[Linearization, Tensor | None]:
        """Return the linearisation and the loss of all examples.

        Args:
            found: the linearisation of this process' examples.
            loss: their loss.
            size: how many they are.
            reduction: how the loss sums over examples.

        Returns:
            The same on every process.

        Raises:
            DistributedError: another process failed, or has other parameters.
        """

    @abstractmethod
    def solve(
        self,
        blocks: Mapping[str, LayerMetric],
        residual: Tensor | None,
        covector: Mapping[str, Tensor] | None,
        source: Mapping[str, MetricFactor] | None,
    ) -> dict[str, Solution]:
        """Solve every block on one of the processes.

        Args:
            blocks: metrics by block, the same on every process.
            residual: see :meth:`riemannian_modules.LayerMetric.solve`.
            covector: see there.
            source: see there.

        Returns:
            ``{block name: solution}``, bit for bit the same on every process.
        """

    @abstractmethod
    def joint_loss(self, loss: Tensor | Callable[[], Any]) -> Tensor:
        """Return the loss of all examples, for that of this process' examples.

        Args:
            loss: scalar, of the examples of the last :meth:`join`; or a function that
                returns it, whose error is one of all processes.

        Returns:
            A scalar.
        """

    @abstractmethod
    def joint_rows(self, rows: Tensor) -> Tensor:
        """Return what all processes say about their rows of K, in the order of K.

        Args:
            rows: ``(rank,)``, weighted like the rows that :meth:`join` was given.

        Returns:
            ``(total rank,)``.
        """

    @abstractmethod
    def same_dice(self) -> AbstractContextManager[None]:
        """Draw the same random numbers on all processes inside this scope."""

    @abstractmethod
    def share(self, terms: Sequence[float], reduction: Reduction) -> float:
        """Return the share of this process in a batch that is not recorded.

        Args:
            terms: number of terms of each output's loss, of this process.
            reduction: how the loss sums over examples.

        Raises:
            DistributedError: another process failed, or the outputs are divided in
                different proportions.
        """

    @abstractmethod
    def add(self, values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Return weighted sums over the processes, the same bits on all of them.

        Args:
            values: what this process adds, by name.
            share: its weight.
        """

    @abstractmethod
    def tell(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the first process has.

        Args:
            values: the same on all processes but for rounding, by name.
        """
