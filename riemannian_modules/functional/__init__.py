"""Metrics of functions of a model that are no plain forward pass."""

from riemannian_modules.functional.jet import Jet
from riemannian_modules.functional.metric import FunctionalMetric
from riemannian_modules.functional.operator import DifferentialOperator
from riemannian_modules.functional.parameters import Parameters, of_batch

__all__ = [
    "DifferentialOperator",
    "FunctionalMetric",
    "Jet",
    "Parameters",
    "of_batch",
]
