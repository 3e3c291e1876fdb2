"""The outputs of a model and what measures them: one head, or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from riemannian_modules.errors import EmptyBatchError, OutputMetricError, ShapeError
from riemannian_modules.finite import looks_finite
from riemannian_modules.output import OutputMetric

__all__ = [
    "Head",
    "OutputLike",
    "OutputMetricLike",
    "Reduction",
    "Rows",
    "output_rows",
    "pair",
]

Reduction = Literal["mean", "sum"]
OutputMetricLike = (
    OutputMetric | None | Sequence[OutputMetric] | Mapping[str, OutputMetric]
)
OutputLike = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Head = tuple[Tensor, OutputMetric | None]


def pair(metric: OutputMetricLike, outputs: OutputLike) -> list[Head]:
    """Return the outputs, each with its metric.

    Args:
        metric: one output metric, None, or several by position or by name.
        outputs: one tensor, or as many as there are metrics.

    Returns:
        The heads.

    Raises:
        ShapeError: outputs that are no tensors, or of different batch sizes.
        OutputMetricError: outputs and metrics do not match.
        EmptyBatchError: no examples.
    """
    if isinstance(metric, Mapping):
        if not isinstance(outputs, Mapping) or set(outputs) != set(metric):
            found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs)
            raise OutputMetricError(
                f"the metric measures the outputs {sorted(metric)}, got {found}; hand "
                "on a dictionary with these keys"
            )
        heads: list[Head] = [(outputs[name], metric[name]) for name in metric]
    elif isinstance(metric, Sequence):
        if isinstance(outputs, Tensor | Mapping) or len(outputs) != len(metric):
            raise OutputMetricError(
                f"the metric measures {len(metric)} outputs; hand on a tuple of as many"
            )
        heads = list(zip(outputs, metric, strict=True))
    else:
        if not isinstance(outputs, Tensor):
            raise ShapeError(
                f"outputs are a {type(outputs).__name__}; hand on the one tensor that "
                "the output metric measures, or give LayerwiseMetric one output metric "
                "for each of several outputs"
            )
        heads = [(outputs, metric)]
    sizes = set()
    for tensor, _ in heads:
        if not isinstance(tensor, Tensor):
            raise ShapeError(f"an output is a {type(tensor).__name__}, not a tensor")
        if tensor.ndim == 0 or tensor.shape[0] == 0:
            raise EmptyBatchError(
                f"outputs have shape {tuple(tensor.shape)}: a batch needs at least "
                "one example in its first dimension; skip empty batches"
            )
        sizes.add(tensor.shape[0])
    if len(sizes) > 1:
        raise ShapeError(f"outputs have batches of different sizes {sorted(sizes)}")
    return heads


@dataclass(frozen=True)
class Rows:
    """What is carried down from the outputs.

    Attributes:
        stacks: for each head ``(count, n, *output)``: the r rows of L, the costate if
            there is one, and the rest if there is one.
        rank: number r of rows for each example, over all heads.
        residual: y with ``L^T y + rest = costate``, ``(r n,)``; None: rest is all.
        has_costate: whether a costate is among them.
        has_rest: whether a rest is among them.
    """

    stacks: list[Tensor]
    rank: int
    residual: Tensor | None
    has_costate: bool
    has_rest: bool

    @property
    def count(self) -> int:
        """Number of cotangents."""
        return self.rank + self.has_costate + self.has_rest


def output_rows(
    heads: Sequence[Head], costates: Sequence[Tensor] | None, reduction: Reduction
) -> Rows:
    """Return the rows of all output metrics, side by side, with the costate.

    A row of one head is zero on the others. Implements :eq:`factor-init`.

    Args:
        heads: outputs and their metrics.
        costates: d loss/d output of each head, or None without a loss.
        reduction: how the loss sums over examples.

    Returns:
        The rows.

    Raises:
        OutputMetricError: a factor has another shape than (n, r, *output), or is not
            finite.
    """
    parts = [_head_rows(head, reduction) for head in heads]
    rank = sum(0 if rows is None else len(rows) for rows, _ in parts)
    if costates is None:
        return Rows(_stacks(heads, parts, [], rank), rank, None, False, False)
    whitened = [
        _whitened(head, rows, weight, costate)
        for head, (rows, weight), costate in zip(heads, parts, costates, strict=True)
    ]
    extra = [list(costates)]
    exact = [y is not None for y, _ in whitened]
    if not any(exact):
        return Rows(_stacks(heads, parts, extra, rank), rank, None, True, False)
    residual = torch.cat(
        [
            costate.new_zeros(0 if rows is None else rows.shape[0] * rows.shape[1])
            if y is None
            else y
            for (y, _), (rows, _), costate in zip(
                whitened, parts, costates, strict=True
            )
        ]
    )
    rests = [rest for _, rest in whitened]
    # Reading the remainder is free on the CPU only; elsewhere it travels along.
    spans = all(r.device.type == "cpu" and not bool(r.any()) for r in rests)
    if not spans:
        extra.append(rests)
    stacks = _stacks(heads, parts, extra, rank)
    return Rows(stacks, rank, residual, True, not spans)


def _head_rows(head: Head, reduction: Reduction) -> tuple[Tensor | None, float]:
    outputs, metric = head
    if metric is None:
        return None, 1.0
    metric.validate(outputs)
    weight = 1.0 / metric.terms(outputs) if reduction == "mean" else 1.0
    rows = metric.factor(_wide(outputs))
    _require_rows(metric, rows, outputs)
    return rows.movedim(1, 0) * weight**0.5, weight


def _require_rows(metric: OutputMetric, rows: Tensor, outputs: Tensor) -> None:
    n, *rest = outputs.shape
    found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    if not isinstance(rows, Tensor) or found != (n, *rows.shape[1:2], *rest):
        raise OutputMetricError(
            f"the factor of {metric!r} is {found} for outputs of shape "
            f"{tuple(outputs.shape)}; it must have the shape (n, r, *output), test it "
            "with riemannian_modules.testing.check_output_metric"
        )
    if not looks_finite(rows):
        raise OutputMetricError(
            f"the factor of {metric!r} holds NaN or infinity although the outputs are "
            "finite; check its formula at these outputs"
        )


def _wide(tensor: Tensor) -> Tensor:
    # Never below float32: under autocast the outputs may be in half precision.
    return tensor.detach() if tensor.itemsize >= 4 else tensor.detach().float()


def _whitened(
    head: Head, rows: Tensor | None, weight: float, costate: Tensor
) -> tuple[Tensor | None, Tensor]:
    outputs, metric = head
    if metric is None or rows is None:
        return None, costate
    y, rest = metric.whiten(_wide(outputs), _wide(costate))
    return (None if y is None else y.mT.reshape(-1) / weight**0.5), rest


def _stacks(
    heads: Sequence[Head],
    parts: Sequence[tuple[Tensor | None, float]],
    extra: Sequence[Sequence[Tensor]],
    rank: int,
) -> list[Tensor]:
    stacks, before = [], 0
    for index, ((outputs, _), (rows, _)) in enumerate(zip(heads, parts, strict=True)):
        own = 0 if rows is None else len(rows)
        pieces = [] if rows is None else [rows]
        if own < rank:
            pieces.insert(0, outputs.new_zeros(before, *outputs.shape))
            pieces.append(outputs.new_zeros(rank - before - own, *outputs.shape))
        pieces += [each[index].unsqueeze(0) for each in extra]
        if pieces:
            stacks.append(torch.cat([piece.to(outputs.dtype) for piece in pieces]))
        before += own
    return stacks
