"""pymanopt's optimizers on models, and manifolds that change libraries.

- :func:`problem`: a model, a loss and a layer metric as a ``pymanopt.Problem``;
- :func:`as_pymanopt`: a geoopt manifold as a pymanopt manifold;
- :func:`as_geoopt`: a pymanopt manifold as a geoopt manifold.
"""

try:
    import pymanopt as _pymanopt  # noqa: F401
except ModuleNotFoundError as error:
    if error.name != "pymanopt":
        raise
    raise ImportError(
        "riemannian_modules.interop.pymanopt needs pymanopt, which is not installed; "
        "run: pip install riemannian-modules[pymanopt]"
    ) from error

from riemannian_modules.interop.pymanopt.as_geoopt import PymanoptManifold, as_geoopt
from riemannian_modules.interop.pymanopt.as_pymanopt import (
    GeooptManifold,
    GeooptSubmanifold,
    as_pymanopt,
)
from riemannian_modules.interop.pymanopt.problem import (
    ModelManifold,
    ModelProblem,
    problem,
)

__all__ = [
    "GeooptManifold",
    "GeooptSubmanifold",
    "ModelManifold",
    "ModelProblem",
    "PymanoptManifold",
    "as_geoopt",
    "as_pymanopt",
    "problem",
]
