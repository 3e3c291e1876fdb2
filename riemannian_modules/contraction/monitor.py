"""Rates, loss and step lengths along a training, as records, a plot or a log."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from riemannian_modules.contraction.geometry import Loss
from riemannian_modules.contraction.rates import Kind
from riemannian_modules.contraction.result import Rate
from riemannian_modules.errors import ContractionError

__all__ = ["Monitor", "Record"]


class _Block(Protocol):
    @property
    def update_norm(self) -> float: ...


class _Optimizer(Protocol):
    """What the monitor needs of ``optim.RiemannianSGD``, which lies above it."""

    @property
    def report(self) -> Iterable[_Block]: ...

    def contraction_rates(
        self,
        kind: Kind = ...,
        *,
        loss: Loss | None = ...,
        inputs: Sequence[Any] | None = ...,
        **options: Any,
    ) -> Mapping[str, Rate]: ...


class _Writer(Protocol):
    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> object: ...


@dataclass(frozen=True)
class Record:
    """What was seen at one step.

    Attributes:
        step: number of the step, from 1.
        loss: its loss.
        step_length: Euclidean norm of the tangent step of all blocks.
        rates: ``{kind: {block: rate}}``, with their verdicts.
    """

    step: int
    loss: float
    step_length: float
    rates: dict[str, dict[str, Rate]]


class Monitor:
    """Records the rates of an optimizer's blocks along a training.

    What it records is evidence: nothing is known of the points between two records,
    whatever the verdicts at these points.

    Args:
        optimizer: a :class:`riemannian_modules.optim.RiemannianSGD`.
        every: records one step in so many; the others cost nothing.
        kinds: which rates; others than ``"output"`` need ``loss`` and ``inputs``.
        loss: the loss as a function of what the model returns.
        inputs: what the model is called with for these rates: a fixed batch.
        **options: of the rates; see
            :func:`riemannian_modules.contraction.block_rates`.

    Attributes:
        records: what was seen, a :class:`Record` each.

    Raises:
        ContractionError: ``every`` is not positive, no kinds, or rates that need a
            loss without one.

    >>> import torch, riemannian_modules as rm
    >>> model = torch.nn.Linear(2, 1)
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    >>> optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    >>> monitor = Monitor(optimizer)
    >>> with metric.record():
    ...     z = model(torch.ones(1, 2))
    >>> loss = z.square().sum()
    >>> metric.backward(loss, z)
    >>> optimizer.step()
    >>> monitor.record(loss)
    >>> [str(rate.verdict) for rate in monitor.records[0].rates["output"].values()]
    ['certified']
    """

    def __init__(
        self,
        optimizer: _Optimizer,
        *,
        every: int = 1,
        kinds: Sequence[Kind] = ("output",),
        loss: Loss | None = None,
        inputs: Sequence[Any] | None = None,
        **options: Any,
    ) -> None:
        if every < 1 or not kinds:
            raise ContractionError(
                f"every={every}, kinds={tuple(kinds)}: record one step in 1 or more, "
                "and at least one kind"
            )
        if set(kinds) - {"output"} and (loss is None or inputs is None):
            raise ContractionError(
                f"the rates {sorted(set(kinds) - {'output'})} need the loss as a "
                "function of the outputs and a fixed batch: pass loss=... and "
                "inputs=(x, ...)"
            )
        self.records: list[Record] = []
        self._optimizer = optimizer
        self._every = every
        self._kinds = tuple(kinds)
        self._loss, self._inputs = loss, inputs
        self._options = options
        self._steps = 0
        self._writers: list[tuple[_Writer, str]] = []

    def record(self, loss: Tensor | float) -> None:
        """Take note of the step that the optimizer has just taken.

        Args:
            loss: value of the loss, read only if this step is recorded.

        Raises:
            NotRecordedError: there was no step yet.
        """
        step = self._steps + 1
        if self._steps % self._every:
            self._steps = step
            return
        lengths = [block.update_norm for block in self._optimizer.report]
        rates: dict[str, dict[str, Rate]] = {}
        for kind in self._kinds:
            given = {} if kind == "output" else self._given()
            rates[kind] = dict(self._optimizer.contraction_rates(kind, **given))
        self.records.append(Record(step, _number(loss), math.hypot(*lengths), rates))
        self._steps = step
        for writer, prefix in self._writers:
            _write(writer, prefix, self.records[-1])

    def log_to(self, writer: _Writer, prefix: str = "contraction") -> None:
        """Hand all records, those so far and those to come, to a writer.

        Args:
            writer: anything with TensorBoard's ``add_scalar(tag, value, step)``.
            prefix: what the tags begin with.
        """
        self._writers.append((writer, prefix))
        for record in self.records:
            _write(writer, prefix, record)

    def plot(self, path: str | Path) -> None:
        """Draw rates, loss and step lengths against the steps.

        Certified rates are drawn full, others hollow.

        Args:
            path: the image file.

        Raises:
            ContractionError: nothing was recorded yet.
            ModuleNotFoundError: matplotlib is not installed.
        """
        if not self.records:
            raise ContractionError(
                "there is nothing to plot: call monitor.record(loss) after each step"
            )
        try:
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure
        except ModuleNotFoundError as error:
            raise ModuleNotFoundError(
                "Monitor.plot needs matplotlib: pip install matplotlib"
            ) from error
        figure = Figure(figsize=(7.0, 8.0), layout="constrained")
        FigureCanvasAgg(figure)
        above, middle, below = figure.subplots(3, 1, sharex=True)
        for kind, block, steps, rates in self._curves():
            values = [rate.value for rate in rates]
            (line,) = above.plot(steps, values, label=f"{block} ({kind})")
            for full in (True, False):
                own = [i for i, rate in enumerate(rates) if full == _certified(rate)]
                above.plot(
                    [steps[i] for i in own],
                    [values[i] for i in own],
                    "o",
                    color=line.get_color(),
                    fillstyle="full" if full else "none",
                )
        above.axhline(0.0, color="black", linewidth=0.5)
        above.set_ylabel("rate (full: certified there)")
        above.legend(fontsize="small")
        steps = [record.step for record in self.records]
        middle.plot(steps, [record.loss for record in self.records])
        middle.set_ylabel("loss")
        below.semilogy(steps, [record.step_length for record in self.records])
        below.set_ylabel("step length")
        below.set_xlabel("step")
        figure.savefig(path)

    def _given(self) -> dict[str, Any]:
        return {"loss": self._loss, "inputs": self._inputs, **self._options}

    def _curves(self) -> Iterator[tuple[str, str, list[int], list[Rate]]]:
        for kind in self._kinds:
            blocks: dict[str, tuple[list[int], list[Rate]]] = {}
            for record in self.records:
                for block, rate in record.rates[kind].items():
                    steps, rates = blocks.setdefault(block, ([], []))
                    steps.append(record.step)
                    rates.append(rate)
            for block, (steps, rates) in blocks.items():
                yield kind, block, steps, rates


def _number(loss: Tensor | float) -> float:
    return float(loss.detach() if isinstance(loss, Tensor) else loss)


def _certified(rate: Rate) -> bool:
    return str(rate.verdict) == "certified"


def _write(writer: _Writer, prefix: str, record: Record) -> None:
    writer.add_scalar(f"{prefix}/loss", record.loss, record.step)
    writer.add_scalar(f"{prefix}/step_length", record.step_length, record.step)
    for kind, rates in record.rates.items():
        for block, rate in rates.items():
            tag = f"{prefix}/{kind}/{block}/{rate.verdict}".replace(" ", "_")
            writer.add_scalar(tag, rate.value, record.step)
