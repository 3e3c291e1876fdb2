"""Optimizers that step in the metric."""

from riemannian_modules.optim.levenberg_marquardt import (
    LevenbergMarquardt,
    TrialReport,
)
from riemannian_modules.optim.report import BlockReport, MotionReport, StepReport
from riemannian_modules.optim.rsgd import RiemannianSGD
from riemannian_modules.optim.schedules import MassSchedule, ProbeSchedule

__all__ = [
    "BlockReport",
    "LevenbergMarquardt",
    "MassSchedule",
    "MotionReport",
    "ProbeSchedule",
    "RiemannianSGD",
    "StepReport",
    "TrialReport",
]
