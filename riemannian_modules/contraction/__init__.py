"""How fast a system converges, in which metric, where, and whether that is proved."""

from riemannian_modules.contraction.certificate import Certificate, Step
from riemannian_modules.contraction.networks import (
    hierarchy,
    hierarchy_epsilon,
    shared_loss,
    small_gain,
)
from riemannian_modules.contraction.result import Gain, Rate, Side, Verdict, weakest
from riemannian_modules.contraction.rules import (
    feedback,
    min_max,
    parallel,
    product,
    skew_feedback,
)
from riemannian_modules.contraction.scales import discrete, two_time_scales

__all__ = [
    "Certificate",
    "Gain",
    "Rate",
    "Side",
    "Step",
    "Verdict",
    "discrete",
    "feedback",
    "hierarchy",
    "hierarchy_epsilon",
    "min_max",
    "parallel",
    "product",
    "shared_loss",
    "skew_feedback",
    "small_gain",
    "two_time_scales",
    "weakest",
]
