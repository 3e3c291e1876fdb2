"""How fast a system converges, in which metric, where, and whether that is proved."""

from riemannian_modules.contraction.audit import Audit, audit
from riemannian_modules.contraction.bound import Bound, Order
from riemannian_modules.contraction.certificate import Certificate, Step
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
from riemannian_modules.contraction.gains import (
    lipschitz,
    measured_gain,
    register_lipschitz,
)
from riemannian_modules.contraction.generalization import (
    generalization_gap,
    paper_order,
)
from riemannian_modules.contraction.hierarchy import hierarchy, hierarchy_epsilon
from riemannian_modules.contraction.interval import Interval
from riemannian_modules.contraction.networks import shared_loss, small_gain
from riemannian_modules.contraction.result import Gain, Rate, Side, Verdict, weakest
from riemannian_modules.contraction.rules import (
    feedback,
    min_max,
    parallel,
    product,
    skew_feedback,
)
from riemannian_modules.contraction.scales import discrete, two_time_scales
from riemannian_modules.contraction.simulation import Simulation
from riemannian_modules.contraction.stability import (
    distance_bound,
    stability_bound,
    stability_bound_discrete,
    step_factor,
)
from riemannian_modules.contraction.system import System

__all__ = [
    "Audit",
    "Bound",
    "Certificate",
    "Constant",
    "Gain",
    "Interval",
    "Order",
    "Rate",
    "Side",
    "Simulation",
    "Step",
    "System",
    "Verdict",
    "audit",
    "chain_sensitivity",
    "discrete",
    "distance_bound",
    "example_norms",
    "feedback",
    "frozen_curvature",
    "generalization_gap",
    "hierarchy",
    "hierarchy_epsilon",
    "lipschitz",
    "loss_lipschitz",
    "mass_constant",
    "measured_gain",
    "metric_sampling_bound",
    "min_max",
    "paper_order",
    "parallel",
    "product",
    "register_lipschitz",
    "residual_norm",
    "sensitivity",
    "shared_loss",
    "skew_feedback",
    "small_gain",
    "stability_bound",
    "stability_bound_data_metric",
    "stability_bound_discrete",
    "step_factor",
    "two_time_scales",
    "weakest",
]
