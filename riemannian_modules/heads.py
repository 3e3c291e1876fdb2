"""The outputs of a model and what measures them: one head, or several."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from riemannian_modules.errors import (
    EmptyBatchError,
    NonFiniteError,
    OutputMetricError,
    ShapeError,
)
from riemannian_modules.finite import looks_finite
from riemannian_modules.output import OutputMetric
from riemannian_modules.output.rows import rounded_to
from riemannian_modules.room import enough_room

__all__ = [
    "Head",
    "OutputLike",
    "OutputMetricLike",
    "Reduction",
    "Rows",
    "output_rows",
    "pair",
    "require_loss",
]

Reduction = Literal["mean", "sum"]
OutputMetricLike = (
    OutputMetric | None | Sequence[OutputMetric] | Mapping[str, OutputMetric]
)
OutputLike = Tensor | Sequence[Tensor] | Mapping[str, Tensor]
Head = tuple[Tensor, OutputMetric | None]


def require_loss(loss: object, outputs: object) -> None:
    """Refuse what is no loss, and the outputs in its place.

    Args:
        loss: what was given as the loss.
        outputs: what was given as the outputs.

    Raises:
        TypeError: the loss is no tensor.
        ShapeError: loss and outputs are the wrong way round.
    """
    lonely = isinstance(outputs, Tensor) and outputs.ndim == 0
    several = isinstance(loss, tuple | list | dict)
    if lonely and (several or (isinstance(loss, Tensor) and loss.ndim > 0)):
        what = "several values" if several else f"the shape {tuple(loss.shape)}"  # type: ignore[attr-defined]
        raise ShapeError(
            f"the loss has {what} and the outputs are a scalar: they are the wrong way "
            "round; call metric.backward(loss, outputs)"
        )
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"the loss is a {type(loss).__name__}; pass the scalar tensor that was "
            "computed from the outputs, before .item() or float(): "
            "metric.backward(loss, outputs)"
        )


def pair(metric: OutputMetricLike, outputs: OutputLike) -> list[Head]:
    """Return the outputs, each with its metric.

    Args:
        metric: one output metric, None, or several by position or by name.
        outputs: one tensor, or as many as there are metrics; by name in a dictionary,
            or in an object with such attributes (what else that holds is left out).

    Returns:
        The heads.

    Raises:
        ShapeError: outputs that are no tensors, or of different batch sizes.
        OutputMetricError: outputs and metrics do not match.
        EmptyBatchError: no examples.
    """
    if isinstance(metric, Mapping):
        outputs = _by_name(outputs, metric)
        if not isinstance(outputs, Mapping) or set(outputs) != set(metric):
            found = sorted(outputs) if isinstance(outputs, Mapping) else type(outputs)
            ordered = isinstance(outputs, tuple | list)
            raise OutputMetricError(
                f"the metric measures the outputs {sorted(metric)}, got {found}; hand "
                "on a dictionary with these keys"
                + (", or give a list of output metrics" if ordered else "")
            )
        heads: list[Head] = [(outputs[name], metric[name]) for name in metric]
    elif isinstance(metric, Sequence):
        if not isinstance(outputs, Sequence) or len(outputs) != len(metric):
            raise OutputMetricError(
                f"the metric measures {len(metric)} outputs, got a "
                f"{type(outputs).__name__}; hand on a tuple of as many"
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


def _by_name(outputs: Any, metric: Mapping[str, object]) -> Any:
    """Return the measured fields of an object, such as a dataclass, as a dictionary."""
    alike = isinstance(outputs, Mapping) and set(outputs) == set(metric)
    if alike or type(outputs) is dict:
        return outputs
    if not all(isinstance(getattr(outputs, name, None), Tensor) for name in metric):
        return outputs
    return {name: getattr(outputs, name) for name in metric}


@dataclass(frozen=True)
class Rows:
    """What is carried down from the outputs.

    Attributes:
        parts: for each head the r rows of L, the costate if there is one, and the rest
            if there is one, ``(k, n, *output)`` each; empty without any of them.
        rank: number r of rows for each example, over all heads.
        residual: y with ``L^T y + rest = costate``, ``(r n,)``; None: rest is all.
        has_costate: whether a costate is among them.
        has_rest: whether a rest is among them.
        joint: whether a row of L is the sum of its n parts; y is ``(r,)`` then.
        led: whether the costate is y times the first row of each example.
    """

    parts: list[list[Tensor]]
    rank: int
    residual: Tensor | None
    has_costate: bool
    has_rest: bool
    joint: bool = False
    led: bool = False

    @cached_property
    def stacks(self) -> list[Tensor]:
        """All of them for each head, ``(count, n, *output)``."""
        return [torch.cat(parts) for parts in self.parts if parts]

    @property
    def bare(self) -> list[Tensor]:
        """The rows alone for each head; only where there are some."""
        return [parts[0] for parts in self.parts]

    @property
    def others(self) -> list[Tensor]:
        """All but the costate for each head; only where there are rows."""
        found = [[*parts[:1], *parts[2:]] for parts in self.parts]
        return [each[0] if len(each) == 1 else torch.cat(each) for each in found]

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
        ShapeError: a metric's rows are not of the shape ``(n, r, *output)``, or its
            whitened residual does not fit them.
        NonFiniteError: they hold NaN or infinity.
        MemoryBoundError: they do not fit into memory.
    """
    joint = _joint(heads)
    each = [None] * len(heads) if costates is None else costates
    with enough_room():
        found = [_head_rows(*pair, reduction) for pair in zip(heads, each, strict=True)]
    parts = [head.rows for head in found]
    rank = sum(0 if rows is None else len(rows) for rows in parts)
    if costates is None:
        return Rows(_parts(heads, parts, [], rank), rank, None, False, False, joint)
    extra = [list(costates)]
    if all(head.residual is None for head in found):
        carried = _parts(heads, parts, extra, rank)
        return Rows(carried, rank, None, True, False, joint)
    residual = torch.cat([head.coordinates(joint) for head in found])
    rests = [head.rest for head in found]
    # Reading the remainder is free on the CPU only; elsewhere it travels along.
    spans = all(r.device.type == "cpu" and not bool(r.any()) for r in rests)
    if not spans:
        extra.append(rests)
    carried = _parts(heads, parts, extra, rank)
    only = heads[0][1] if len(heads) == 1 else None
    led = spans and not joint and only is not None and only.leads
    led = led and not bool(residual[len(heads[0][0]) :].any())
    return Rows(carried, rank, residual, True, not spans, joint, led)


@dataclass(frozen=True)
class _Found:
    """The rows ``(r, n, *output)`` of one head, and its costate in their terms."""

    rows: Tensor | None
    residual: Tensor | None
    rest: Tensor

    def coordinates(self, joint: bool) -> Tensor:
        """Return y, flat; zero where the rows explain nothing."""
        if self.residual is not None:
            return self.residual
        r, n = (0, 0) if self.rows is None else self.rows.shape[:2]
        return self.rest.new_zeros(r if joint else r * n)


def _joint(heads: Sequence[Head]) -> bool:
    kinds = {metric.joint for _, metric in heads if metric is not None}
    if len(kinds) > 1:
        raise OutputMetricError(
            "some outputs have rows for each example and others for the whole batch "
            "(Sampled(..., per='batch')); choose one of them for all outputs"
        )
    return kinds == {True}


def _head_rows(head: Head, costate: Tensor | None, reduction: Reduction) -> _Found:
    outputs, metric = head
    if metric is None:
        return _Found(None, None, outputs if costate is None else costate)
    metric.validate(outputs)
    # Where no term counts, the rows are zero.
    terms = metric.terms(outputs) or 1.0
    weight = 1.0 / terms if reduction == "mean" else 1.0
    wide = _wide(outputs)
    with rounded_to(outputs.dtype):
        if costate is not None and type(metric).split is not OutputMetric.split:
            rows, y, rest = metric.split(wide, _wide(costate))
            _require_rows(metric, rows, outputs)
        else:
            rows, y, rest = metric.factor(wide), None, wide
            _require_rows(metric, rows, outputs)
            if costate is not None:
                y, rest = metric.whiten(wide, _wide(costate))
    if costate is not None:
        _require_split(metric, rows, y, rest, outputs)
    if y is not None:
        y = (y if metric.joint else y.mT.reshape(-1)) / weight**0.5
    return _Found(rows.movedim(1, 0) * weight**0.5, y, rest)


def _require_rows(metric: OutputMetric, rows: object, outputs: Tensor) -> None:
    n, *rest = outputs.shape
    found = tuple(rows.shape) if isinstance(rows, Tensor) else type(rows).__name__
    fits = len(found) == outputs.ndim + 1 and (found[0], *found[2:]) == (n, *rest)
    if not isinstance(rows, Tensor) or not fits:
        raise ShapeError(
            f"{metric!r}.factor gives {found} for outputs of shape "
            f"{tuple(outputs.shape)}; it must give a tensor of shape "
            f"{('n', 'r', *rest)}, r rows for each of n = {n} examples"
        )
    if not looks_finite(rows):
        raise NonFiniteError(
            f"the rows that {metric!r} gives for outputs of shape "
            f"{tuple(outputs.shape)} hold NaN or infinity while the outputs do not; "
            "nothing was changed. Check its factor for roots and logarithms of 0, and "
            "the outputs for too large values"
        )


def _wide(tensor: Tensor) -> Tensor:
    # Never below float32: under autocast the outputs may be in half precision.
    return tensor.detach() if tensor.itemsize >= 4 else tensor.detach().float()


def _require_split(
    metric: OutputMetric, rows: Tensor, y: Tensor | None, rest: Tensor, outputs: Tensor
) -> None:
    count = (rows.shape[1],) if metric.joint else tuple(rows.shape[:2])
    if rest.shape != outputs.shape or (y is not None and y.shape != count):
        found = None if y is None else tuple(y.shape)
        raise ShapeError(
            f"{metric!r}.whiten gives y of shape {found} and a rest of shape "
            f"{tuple(rest.shape)}; it must give the shapes {count}, or None, and "
            f"{tuple(outputs.shape)}"
        )


def _parts(
    heads: Sequence[Head],
    parts: Sequence[Tensor | None],
    extra: Sequence[Sequence[Tensor]],
    rank: int,
) -> list[list[Tensor]]:
    found, before = [], 0
    for index, ((outputs, _), rows) in enumerate(zip(heads, parts, strict=True)):
        own = 0 if rows is None else len(rows)
        pieces = [] if rows is None else [rows]
        if own < rank:
            left = outputs.new_zeros(before, *outputs.shape)
            right = outputs.new_zeros(rank - before - own, *outputs.shape)
            pieces = [torch.cat([left, *pieces, right])]
        pieces += [each[index].unsqueeze(0) for each in extra]
        # In half precision they would underflow before they can be scaled.
        dtype = outputs.dtype if outputs.itemsize >= 4 else torch.float32
        found.append([piece.to(dtype) for piece in pieces])
        before += own
    return found
