"""Optimizers that step in the metric."""

from riemannian_modules.optim.captured_step import CapturedStep
from riemannian_modules.optim.gauss_newton import GaussNewton
from riemannian_modules.optim.kfac import KFAC
from riemannian_modules.optim.levenberg_marquardt import LevenbergMarquardt
from riemannian_modules.optim.line_rules import Armijo, LineRule, StrongWolfe
from riemannian_modules.optim.line_search import LineSearch
from riemannian_modules.optim.report import BlockReport, MotionReport, StepReport
from riemannian_modules.optim.rsgd import RiemannianSGD
from riemannian_modules.optim.schedules import MassSchedule, ProbeSchedule
from riemannian_modules.optim.trial_reports import (
    GaussNewtonReport,
    KFACReport,
    LineSearchReport,
    TrialReport,
    TrustRegionReport,
)
from riemannian_modules.optim.trust_region import TrustRegion

__all__ = [
    "KFAC",
    "Armijo",
    "BlockReport",
    "CapturedStep",
    "GaussNewton",
    "GaussNewtonReport",
    "KFACReport",
    "LevenbergMarquardt",
    "LineRule",
    "LineSearch",
    "LineSearchReport",
    "MassSchedule",
    "MotionReport",
    "ProbeSchedule",
    "RiemannianSGD",
    "StepReport",
    "StrongWolfe",
    "TrialReport",
    "TrustRegion",
    "TrustRegionReport",
]
