"""How fast a system converges, in which metric, where, and whether that is proved."""

from riemannian_modules.contraction.audit import Audit, audit
from riemannian_modules.contraction.bound import Bound, Order
from riemannian_modules.contraction.chain import chain_sensitivity
from riemannian_modules.contraction.constants import Constant
from riemannian_modules.contraction.curvature import frozen_curvature
from riemannian_modules.contraction.data_metric import (
    metric_sampling_bound,
    stability_bound_data_metric,
)
from riemannian_modules.contraction.estimates import (
    example_norms,
    loss_lipschitz,
    mass_constant,
    residual_norm,
    sensitivity,
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
    "Audit",
    "Bound",
    "Constant",
    "Gain",
    "Order",
    "Rate",
    "Side",
    "Verdict",
    "audit",
    "chain_sensitivity",
    "distance_bound",
    "example_norms",
    "frozen_curvature",
    "generalization_gap",
    "loss_lipschitz",
    "mass_constant",
    "metric_sampling_bound",
    "paper_order",
    "residual_norm",
    "sensitivity",
    "stability_bound",
    "stability_bound_data_metric",
    "stability_bound_discrete",
    "step_factor",
    "weakest",
]
