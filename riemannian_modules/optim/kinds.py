"""What is handed to an optimizer, and what people hand to it instead."""

from riemannian_modules.errors import DistributedError
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.retractions import Retraction

__all__ = ["require_alone", "require_kinds"]


def require_kinds(call: str, metric: object, retraction: object) -> None:
    """Check the arguments that other optimizers have in other places.

    Args:
        call: how the optimizer is called, for the error.
        metric: the first argument.
        retraction: the retraction.

    Raises:
        TypeError: one is of another kind; says what to write instead.
    """
    if not isinstance(metric, ModelMetric):
        raise TypeError(
            f"the first argument is a {type(metric).__name__}; pass the metric, which "
            f"knows the model's parameters: {call} with metric = "
            "LayerwiseMetric(model, output=...)"
        )
    if isinstance(retraction, type) and issubclass(retraction, Retraction):
        name = retraction.__name__
        raise TypeError(f"retraction is the class {name}; call it: {name}()")
    if not (retraction is None or isinstance(retraction, Retraction)):
        raise TypeError(
            f"retraction={retraction!r}; pass an instance of a Retraction, such as "
            "riemannian_modules.retractions.Exponential()"
        )


def require_alone(optimizer: str, metric: ModelMetric) -> None:
    """Refuse a metric that several processes share.

    Args:
        optimizer: what cannot work with it.
        metric: the metric.

    Raises:
        DistributedError: it is shared.
    """
    if metric.exchange is not None:
        raise DistributedError(
            f"{optimizer} differentiates the loss of this process' examples only, and "
            "the metric is shared by several processes; use RiemannianSGD, "
            "TrustRegion or LevenbergMarquardt, whose steps are those of all examples"
        )
