"""Whether an output metric's whitened residual belongs to its rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from riemannian_modules.errors import OutputMetricError
from riemannian_modules.heads import Head, Reduction, Rows
from riemannian_modules.output import OutputMetric, Sampled, Weighted

__all__ = ["require_whitened"]

_SLACK = 1e4
_MOST_ENTRIES = 2**24
_AT_ONCE = 2**22


def require_whitened(heads: Sequence[Head], rows: Rows, reduction: Reduction) -> None:
    """Check that every output metric whitens combinations of its rows to themselves.

    Steps are made of y with ``L^T y = d loss``, so that of other rows would be a wrong
    one. The rows are combined with fixed numbers: the loss itself may be so small that
    only rounding is left of it. Where the metric of samples would have more than 2^24
    entries, it is asked for its first examples, or for none if one has more.

    Args:
        heads: outputs and their metrics.
        rows: what these gave.
        reduction: how the loss sums over examples.

    Raises:
        OutputMetricError: one does not.
    """
    for (outputs, metric), parts in zip(heads, rows.parts, strict=True):
        if metric is None or outputs.is_meta:
            continue
        own, given, sampled = metric, None, False
        while isinstance(own, Sampled | Weighted):
            own, sampled = own.metric, sampled or isinstance(own, Sampled)
        if not sampled and type(own).split is not OutputMetric.split:
            # It splits the cotangent itself and is not asked to whiten it.
            continue
        wide = outputs.detach().to(torch.promote_types(outputs.dtype, torch.float32))
        if own is metric and len(heads) == 1:
            # Not asked again for what it gave: it may count, or draw.
            terms = metric.terms(outputs) if reduction == "mean" else 1.0
            given = parts[0].movedim(0, 1).to(wide) * terms**0.5
        else:
            # One row for each entry, or fewer: all of them are more than a sample.
            wide = wide[: _MOST_ENTRIES // max(1, wide[0].numel() ** 2)]
        if len(wide):
            _require(own, wide, own.factor(wide) if given is None else given)


def _require(metric: OutputMetric, outputs: Tensor, rows: Tensor) -> None:
    count = torch.arange(1, rows.shape[:2].numel() + 1, device=rows.device)
    numbers = 0.5 + torch.frac(count.double() * 0.6180339887498949)
    numbers = numbers.to(rows).view(rows.shape[:2])
    combined = torch.einsum("nr...,nr->n...", rows, numbers)
    y, rest = metric.whiten(outputs, combined)
    if y is None:
        return
    error, size = rows.new_zeros(2, dtype=torch.float64)
    # A few examples at a time, in float64.
    most = max(1, _AT_ONCE // max(1, rows[0].numel()))
    split = (each.split(most) for each in (rows, y, rest, combined))
    for row, weight, left, whole in zip(*split, strict=True):
        summands = row.double() * weight.double().view(
            *weight.shape, *[1] * (rows.ndim - 2)
        )
        error = error.maximum((summands.sum(1) + left - whole).abs().amax())
        sizes = summands.abs().sum(1) + left.abs() + whole.abs()
        size = size.maximum(sizes.amax())
    # Other rows are off by as much as they are; ill-conditioned ones by rounding.
    bound = min(0.05, max(1e-6, _SLACK * torch.finfo(rows.dtype).eps)) * size
    # Written so that NaN is left to those who look for it.
    if bool(error > bound):
        raise OutputMetricError(
            f"{metric!r} whitens a combination v of its own rows L to a y with "
            f"|L^T y + rest - v| up to {float(error / size):.1e} of their size, for "
            f"outputs of shape {tuple(outputs.shape)}: whiten belongs to other rows "
            "than factor, and steps would go astray. Write whiten for this factor, or "
            "leave it out for the default"
        )
