"""The action of a training run, and backpropagation as constrained optimisation."""

from riemannian_modules.action.costates import (
    RecordedPass,
    Residuals,
    hamiltonians,
    kkt_residuals,
    pairings,
    record_pass,
)
from riemannian_modules.action.functional import (
    Action,
    Dissipation,
    action,
    dissipation,
    tube_bound,
)
from riemannian_modules.action.inverse_retraction import inverse_retraction
from riemannian_modules.action.proximal import (
    hamiltonian,
    one_step_action,
    proximal_model,
    proximal_value,
)
from riemannian_modules.action.recording import ModelLandscape, TrajectoryRecorder
from riemannian_modules.action.riccati import RiccatiSweep, riccati_sweep
from riemannian_modules.action.trajectory import Local, Trajectory

__all__ = [
    "Action",
    "Dissipation",
    "Local",
    "ModelLandscape",
    "RecordedPass",
    "Residuals",
    "RiccatiSweep",
    "Trajectory",
    "TrajectoryRecorder",
    "action",
    "dissipation",
    "hamiltonian",
    "hamiltonians",
    "inverse_retraction",
    "kkt_residuals",
    "one_step_action",
    "pairings",
    "proximal_model",
    "proximal_value",
    "record_pass",
    "riccati_sweep",
    "tube_bound",
]
