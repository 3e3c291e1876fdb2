"""Whether an output metric's whitened residual belongs to its rows."""

from collections.abc import Sequence

import torch
from torch import Tensor

from riemannian_modules.errors import OutputMetricError
from riemannian_modules.heads import Head, Rows

__all__ = ["require_whitened"]

_SLACK = 1e4


def require_whitened(heads: Sequence[Head], rows: Rows) -> None:
    """Check that ``L^T y + rest`` is the derivative of the loss by every output.

    The step is made of y, so a residual of other rows would be a wrong one.

    Args:
        heads: outputs and their metrics.
        rows: what is carried down from them.

    Raises:
        OutputMetricError: it is not.
    """
    y = rows.residual
    if y is None or y.is_meta:
        return
    n = len(heads[0][0])
    weights = y.view(rows.rank, 1).expand(-1, n) if rows.joint else y.view(-1, n)
    for (outputs, metric), parts in zip(heads, rows.parts, strict=True):
        own, costate = parts[0].double(), parts[1][0].double()
        rest = parts[2][0].double() if rows.has_rest else torch.zeros_like(costate)
        summands = own * _like(weights, own)
        error = (summands.sum(0) + rest - costate).abs().amax()
        size = (summands.abs().sum(0) + rest.abs() + costate.abs()).amax()
        bound = _SLACK * torch.finfo(parts[0].dtype).eps * size
        if not bool(error <= bound):
            raise OutputMetricError(
                f"{metric!r} whitens the derivative of the loss to a y with "
                f"|L^T y + rest - v| up to {float(error):.2e} for outputs of shape "
                f"{tuple(outputs.shape)}, so y does not belong to the rows L of its "
                "factor, and steps would go astray. A subclass that has its own factor "
                "needs its own whiten, or that of OutputMetric: "
                "whiten = OutputMetric.whiten (sharp and split alike)"
            )


def _like(weights: Tensor, rows: Tensor) -> Tensor:
    return weights.double().view(*weights.shape, *[1] * (rows.ndim - 2))
