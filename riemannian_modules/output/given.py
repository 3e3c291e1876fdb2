"""What is given as the output metric of a model, and what people give instead."""

from collections.abc import Mapping, Sequence

from riemannian_modules.errors import OutputMetricError
from riemannian_modules.output.base import OutputMetric

__all__ = ["require_output_metrics"]

_FOR_LOSSES = (
    "riemannian_modules.output.Categorical() for cross entropy, "
    "riemannian_modules.output.Euclidean(2 / d) for MSE of d outputs"
)


def require_output_metrics(output: object, reduction: str) -> None:
    """Refuse what is no output metric, no collection of them, and no reduction.

    Args:
        output: what was given as output metric.
        reduction: how the loss is said to sum over examples.

    Raises:
        TypeError: the metric is a class, a name, a function, ...
        OutputMetricError: an empty collection.
        ValueError: unknown ``reduction``.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}; choose 'mean' or 'sum'")
    several = isinstance(output, Mapping | Sequence) and not isinstance(output, str)
    if several and not output:
        raise OutputMetricError(
            f"output={output!r} names no output metric; pass one for each output, or "
            "None for the massed base metric"
        )
    each = output.values() if isinstance(output, Mapping) else output
    for one in each if several else [output]:  # type: ignore[attr-defined]
        if one is None or isinstance(one, OutputMetric):
            continue
        if one is ...:
            problem = (
                f"nothing; give output=: {_FOR_LOSSES}, or None for the mass alone"
            )
        elif isinstance(one, type) and issubclass(one, OutputMetric):
            problem = f"the class {one.__name__}; call it: {one.__name__}()"
        else:
            problem = (
                f"{one!r}, a {type(one).__name__}; pass an instance: {_FOR_LOSSES}"
            )
        raise TypeError(f"output must be an OutputMetric, got {problem}")
