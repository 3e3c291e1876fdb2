"""Metrics of functions of a model that are no plain forward pass."""

from riemannian_modules.functional.metric import FunctionalMetric

__all__ = ["FunctionalMetric"]
