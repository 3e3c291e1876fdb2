"""How fast a system converges, in which metric, where, and whether that is proved."""

from riemannian_modules.contraction.certificate import Certificate, Step
from riemannian_modules.contraction.gains import (
    lipschitz,
    measured_gain,
    register_lipschitz,
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
from riemannian_modules.contraction.system import System

__all__ = [
    "Certificate",
    "Gain",
    "Interval",
    "Rate",
    "Side",
    "Simulation",
    "Step",
    "System",
    "Verdict",
    "discrete",
    "feedback",
    "hierarchy",
    "hierarchy_epsilon",
    "lipschitz",
    "measured_gain",
    "min_max",
    "parallel",
    "product",
    "register_lipschitz",
    "shared_loss",
    "skew_feedback",
    "small_gain",
    "two_time_scales",
    "weakest",
]
