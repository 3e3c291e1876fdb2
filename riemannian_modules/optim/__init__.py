"""Optimizers that step in the metric."""

from riemannian_modules.optim.gauss_newton import GaussNewton
from riemannian_modules.optim.levenberg_marquardt import LevenbergMarquardt
from riemannian_modules.optim.report import BlockReport, StepReport
from riemannian_modules.optim.rsgd import RiemannianSGD
from riemannian_modules.optim.trial_reports import GaussNewtonReport, TrialReport

__all__ = [
    "BlockReport",
    "GaussNewton",
    "GaussNewtonReport",
    "LevenbergMarquardt",
    "RiemannianSGD",
    "StepReport",
    "TrialReport",
]
