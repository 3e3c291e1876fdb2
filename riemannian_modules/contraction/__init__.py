"""How fast a system converges, in which metric, where, and whether that is proved."""

from riemannian_modules.contraction.bound import Bound, Order
from riemannian_modules.contraction.constants import Constant
from riemannian_modules.contraction.data_metric import (
    metric_sampling_bound,
    stability_bound_data_metric,
)
from riemannian_modules.contraction.generalization import (
    generalization_gap,
    paper_order,
)
from riemannian_modules.contraction.result import Gain, Rate, Side, Verdict, weakest
from riemannian_modules.contraction.stability import (
    distance_bound,
    stability_bound,
    stability_bound_discrete,
    step_factor,
)

__all__ = [
    "Bound",
    "Constant",
    "Gain",
    "Order",
    "Rate",
    "Side",
    "Verdict",
    "distance_bound",
    "generalization_gap",
    "metric_sampling_bound",
    "paper_order",
    "stability_bound",
    "stability_bound_data_metric",
    "stability_bound_discrete",
    "step_factor",
    "weakest",
]
