"""Optimizers that step in the metric."""

from riemannian_modules.optim.levenberg_marquardt import (
    LevenbergMarquardt,
    TrialReport,
)
from riemannian_modules.optim.report import BlockReport, StepReport
from riemannian_modules.optim.rsgd import RiemannianSGD

__all__ = [
    "BlockReport",
    "LevenbergMarquardt",
    "RiemannianSGD",
    "StepReport",
    "TrialReport",
]
