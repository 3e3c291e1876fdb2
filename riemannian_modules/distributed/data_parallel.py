"""Data parallelism: every process holds some of the examples of one batch."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar, final

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from riemannian_modules.distributed.alike import (
    marks_of,
    require_alike,
    require_equal,
)
from riemannian_modules.distributed.joining import Processes, join_rows, summed
from riemannian_modules.distributed.ranks import Ranks
from riemannian_modules.distributed.sharing import solve_shared
from riemannian_modules.errors import DistributedError, ShapeError
from riemannian_modules.exchange import Exchange
from riemannian_modules.factors import MetricFactor
from riemannian_modules.heads import Reduction
from riemannian_modules.joining import Header, Size, header_of, join, shares
from riemannian_modules.linearization import Linearization
from riemannian_modules.metric import LayerMetric, Solution
from riemannian_modules.model_metric import ModelMetric

__all__ = ["DataParallel", "data_parallel"]

Metric = TypeVar("Metric", bound=ModelMetric)


def data_parallel(metric: Metric, group: dist.ProcessGroup | None = None) -> Metric:
    """Make one batch of the examples of all processes, from the next pass on.

    Every process builds the same model, metric and optimizer, calls this, and from then
    on records and goes backward with its own examples. ``metric.backward`` sets
    ``.grad``, ``metric.loss`` and the blocks to those of the joined batch, and
    ``optimizer.step`` moves the parameters of all processes to the same bits. It is the
    step that one process takes with all examples: examples need not be divided evenly.

    Parameters and buffers are those of rank 0 from now on. At every backward pass the
    processes make sure that they still have the same parameters and masses.

    Args:
        metric: the metric of this process.
        group: the processes that take part; None: all.

    Returns:
        The metric that was handed in.

    Raises:
        DistributedError: there is no process group, the metrics of the processes
            differ, or the model is wrapped.

    Cost of a pass: factors are sent to every process, of a linear layer
    ``n (in + r out)`` numbers, and gradients are added up. The blocks are then solved
    each on one process, so that a model of one block gains nothing from more processes
    but the share of the passes.

    >>> import riemannian_modules as rm
    >>> store = dist.HashStore()
    >>> dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    >>> model = torch.nn.Linear(3, 2)
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    >>> metric = data_parallel(metric)
    >>> metric.exchange
    DataParallel(rank 0 of 1)
    >>> dist.destroy_process_group()
    """
    metric.exchange = DataParallel(metric, group)
    return metric


@final
class DataParallel(Exchange):
    """What :func:`data_parallel` gives to a metric.

    Args:
        metric: the metric.
        group: the processes that take part; None: all.

    Raises:
        DistributedError: as in :func:`data_parallel`.
    """

    def __init__(
        self, metric: ModelMetric, group: dist.ProcessGroup | None = None
    ) -> None:
        if not isinstance(metric, ModelMetric):
            raise DistributedError(
                f"data_parallel takes a metric, got a {type(metric).__name__}; build "
                "LayerwiseMetric(model, output=...) on every rank and hand it on"
            )
        if any(isinstance(m, DistributedDataParallel) for m in metric.model.modules()):
            raise DistributedError(
                "the model is wrapped in DistributedDataParallel, which averages "
                "gradients in loss.backward(); the metric does that itself. Build it "
                "from the model inside (ddp.module)"
            )
        self._ranks = Ranks(group)
        self._metric = metric
        self._headers: list[Header] = []
        self._shares: list[float] = []
        self._joining = False
        require_alike(self._ranks, metric)
        self.broadcast()

    def __repr__(self) -> str:
        return f"DataParallel(rank {self._ranks.rank} of {self._ranks.size})"

    def broadcast(self) -> None:
        """Give every process the parameters and buffers of rank 0."""
        model = self._metric.model
        for tensor in [*model.parameters(), *model.buffers()]:
            value = tensor.detach().as_subclass(Tensor).contiguous()
            received = self._ranks.broadcast_(value.clone(), 0)
            if not torch.equal(received, value):
                with torch.no_grad():
                    tensor.copy_(received)

    @contextmanager
    def guard(self, doing: str = "backward") -> Iterator[None]:
        """Let an error inside be one of every process; see :class:`Exchange`."""
        try:
            yield
        except Exception as error:
            if self._joining:
                raise  # joint_loss tells the others
            self._ranks.agree(doing, None, error)

    def join(
        self,
        found: Linearization,
        loss: Tensor | None,
        size: Size,
        reduction: Reduction,
    ) -> tuple[Linearization, Tensor | None]:
        """Return what all examples say; see :class:`Exchange`."""
        with torch.no_grad():
            header, factors, pieces = header_of(found, size)
            notes = self._ranks.agree("backward", (header, marks_of(self._metric)))
            require_equal([marks for _, marks in notes])
            self._headers = [header for header, _ in notes]
            terms = [header.terms for header in self._headers]
            self._shares = _shares(terms, reduction)
            like = self._metric.parameters.tensors()
            share = self._shares[self._ranks.rank]
            parts = Processes(self._ranks, found, factors, pieces, like, share)
            joint = join(self._headers, self._shares, parts, list(like))
            return joint, None if loss is None else self.joint_loss(loss)

    def solve(
        self,
        blocks: Mapping[str, LayerMetric],
        residual: Tensor | None,
        covector: Mapping[str, Tensor] | None,
        source: Mapping[str, MetricFactor] | None,
    ) -> dict[str, Solution]:
        """Solve every block on one of the processes; see :class:`Exchange`."""
        with torch.no_grad():
            return solve_shared(self._ranks, blocks, residual, covector, source)

    def joint_loss(self, loss: Tensor | Callable[[], Any]) -> Tensor:
        """Return the loss of all examples, for that of this process' examples.

        Args:
            loss: scalar, of the examples of the last pass; or a function that returns
                it, whose error is one of all processes.

        Returns:
            A scalar, the same bits on every process.

        Raises:
            DistributedError: there was no pass yet, or the function of another process
                has failed.
            Exception: what the function has raised.
        """
        if not self._shares:
            raise DistributedError(
                "the ranks' shares of the batch are not known yet; call "
                "metric.backward(loss, outputs) first"
            )
        share = self._shares[self._ranks.rank]
        if not callable(loss):
            value = torch.as_tensor(loss).detach()
            return self._ranks.sum_(value.double() * share).to(value.dtype)
        value, error = torch.zeros((), dtype=torch.float64), None
        self._joining = True
        try:
            value = torch.as_tensor(loss()).detach().reshape(())
        except Exception as caught:
            error = caught
        finally:
            self._joining = False
        # In one message: the loss, and how many have none.
        like = next(iter(self._metric.parameters)).tensor
        both = [float(value) * share, float(error is not None)]
        sent = torch.tensor(both, dtype=torch.float64, device=like.device)
        total, failed = self._ranks.sum_(sent)
        if failed > 0:
            self._ranks.agree("loss", None, error)
        return total.to(value.dtype)

    def joint_rows(self, rows: Tensor) -> Tensor:
        """Return what all processes say about their rows; see :class:`Exchange`."""
        offers = [header.offer for header in self._headers]
        share = self._shares[self._ranks.rank]
        return join_rows(self._ranks, offers, share**0.5 * rows)

    @contextmanager
    def same_dice(self) -> Iterator[None]:
        """Draw the same random numbers on all processes inside this scope."""
        device = next(iter(self._metric.parameters)).tensor.device
        seed = torch.randint(2**62, (1,), device="cpu").to(device)
        seed = self._ranks.broadcast_(seed, 0)
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(int(seed))
            yield

    def share(self, terms: Sequence[float], reduction: Reduction) -> float:
        """Return the share of this process in a batch; see :class:`Exchange`."""
        everyone = self._ranks.agree("outputs", list(terms))
        return _shares(everyone, reduction)[self._ranks.rank]

    def add(self, values: Mapping[str, Tensor], share: float) -> dict[str, Tensor]:
        """Return weighted sums over the processes; see :class:`Exchange`."""
        return summed(self._ranks, [values], list(values), values, share)[0]

    def tell(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return what the first process has; see :class:`Exchange`."""
        return {
            name: self._ranks.broadcast_(value.contiguous(), 0)
            for name, value in values.items()
        }


def _shares(terms: Sequence[Sequence[float]], reduction: Reduction) -> list[float]:
    try:
        return shares(terms, reduction)
    except ShapeError as error:
        raise DistributedError(str(error)) from error
