"""How fast a system converges, in which metric, where, and whether that is proved."""

from riemannian_modules.contraction.discrete import discrete_factor
from riemannian_modules.contraction.monitor import Monitor, Record
from riemannian_modules.contraction.rates import block_rates, rate
from riemannian_modules.contraction.result import Gain, Rate, Side, Verdict, weakest

__all__ = [
    "Gain",
    "Monitor",
    "Rate",
    "Record",
    "Side",
    "Verdict",
    "block_rates",
    "discrete_factor",
    "rate",
    "weakest",
]
