"""Laws that your own parts can be held to: checks that return findings."""

from riemannian_modules.testing.manifold_checks import check_base_manifold
from riemannian_modules.testing.result import CheckResult, failures
from riemannian_modules.testing.retraction_checks import check_retraction
from riemannian_modules.testing.slopes import Slope, best_window_slope, error_slope

__all__ = [
    "CheckResult",
    "Slope",
    "best_window_slope",
    "check_base_manifold",
    "check_retraction",
    "error_slope",
    "failures",
]
