"""Riemannian metrics for the layers of PyTorch models, and optimisation in them."""

from importlib import import_module
from types import ModuleType

from riemannian_modules import (
    action,
    contraction,
    distributed,
    errors,
    factors,
    functional,
    manifolds,
    nn,
    optim,
    output,
    retractions,
    rows,
    rules,
    woodbury,
)
from riemannian_modules._version import __version__
from riemannian_modules.conjugate import ConjugateGradients
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.mass import Mass
from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.nn.geometrize import geometrize, project_
from riemannian_modules.tangent import TangentSpace

__all__ = [
    "ConjugateGradients",
    "LayerMetric",
    "LayerwiseMetric",
    "Mass",
    "Part",
    "TangentSpace",
    "__version__",
    "action",
    "contraction",
    "distributed",
    "errors",
    "factors",
    "functional",
    "geometrize",
    "manifolds",
    "nn",
    "optim",
    "output",
    "project_",
    "retractions",
    "rows",
    "rules",
    "woodbury",
]


def __getattr__(name: str) -> ModuleType:
    # They need packages that not everyone has, so they are imported when asked for.
    if name in {"interop", "testing"}:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
