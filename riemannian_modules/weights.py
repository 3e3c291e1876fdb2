"""Weights of the terms of a loss, handed to the metrics of its outputs."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from riemannian_modules.errors import OutputMetricError
from riemannian_modules.heads import Head, OutputMetricLike
from riemannian_modules.output import Weighted

__all__ = ["WeightsLike", "nothing_counts", "weigh"]

WeightsLike = Tensor | Sequence[Tensor | None] | Mapping[str, Tensor | None] | None


def weigh(
    metric: OutputMetricLike, heads: Sequence[Head], weights: WeightsLike
) -> list[Head]:
    """Return the outputs, each with its weighted metric.

    Args:
        metric: one output metric, None, or several by position or by name.
        heads: outputs and their metrics, as :func:`riemannian_modules.heads.pair`
            returns them.
        weights: one tensor, or as many as there are metrics; None: all count alike.

    Returns:
        The heads.

    Raises:
        OutputMetricError: weights and metrics do not match, or weights are negative.
    """
    if weights is None:
        return list(heads)
    if isinstance(metric, Mapping):
        if not isinstance(weights, Mapping) or not set(weights) <= set(metric):
            raise OutputMetricError(
                f"the metric measures the outputs {sorted(metric)}; hand on the "
                "weights as a dictionary with such keys"
            )
        each = [weights.get(name) for name in metric]
    elif isinstance(metric, Sequence):
        if isinstance(weights, Tensor | Mapping) or len(weights) != len(metric):
            raise OutputMetricError(
                f"the metric measures {len(metric)} outputs; hand on as many weights, "
                "None for those without"
            )
        each = list(weights)
    elif isinstance(weights, Tensor):
        each = [weights]
    else:
        raise OutputMetricError(
            f"the weights are a {type(weights).__name__}; hand on the one tensor that "
            "says how much each term of the loss counts"
        )
    return [
        (end, own if own is None or w is None else Weighted(own, w))
        for (end, own), w in zip(heads, each, strict=True)
    ]


def nothing_counts(heads: Sequence[Head]) -> bool:
    """Whether all weights of all outputs are zero.

    Args:
        heads: outputs and their metrics.
    """
    return all(isinstance(own, Weighted) and not own.counts for _, own in heads)
