"""Bridges to packages that the library itself does not need, one each.

Nothing here is imported by ``import riemannian_modules``, but when it is asked for.
"""

from importlib import import_module
from types import ModuleType


def __getattr__(name: str) -> ModuleType:
    if name in {"geoopt_optimizers", "linear_operator", "pymanopt", "scipy"}:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
