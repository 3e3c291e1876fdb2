"""Optimizers that step in the metric."""

from riemannian_modules.optim.gauss_newton import GaussNewton, GaussNewtonReport
from riemannian_modules.optim.levenberg_marquardt import (
    LevenbergMarquardt,
    TrialReport,
)
from riemannian_modules.optim.report import BlockReport, StepReport
from riemannian_modules.optim.rsgd import RiemannianSGD

__all__ = [
    "BlockReport",
    "GaussNewton",
    "GaussNewtonReport",
    "LevenbergMarquardt",
    "RiemannianSGD",
    "StepReport",
    "TrialReport",
]
