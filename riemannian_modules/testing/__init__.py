"""Laws that your own parts can be held to: checks that return findings.

:mod:`riemannian_modules.testing.strategies` has strategies for Hypothesis; it is not
imported here, so that the checks work without Hypothesis.
"""

from riemannian_modules.testing.geoopt_checks import check_geoopt_manifold
from riemannian_modules.testing.manifold_checks import check_base_manifold
from riemannian_modules.testing.metric_checks import check_metric
from riemannian_modules.testing.module_checks import check_module
from riemannian_modules.testing.optimizer_checks import check_optimizer
from riemannian_modules.testing.output_checks import check_output_metric
from riemannian_modules.testing.raising import raise_failures
from riemannian_modules.testing.result import CheckResult, failures
from riemannian_modules.testing.retraction_checks import check_retraction
from riemannian_modules.testing.rule_checks import check_rule
from riemannian_modules.testing.slopes import Slope, best_window_slope, error_slope

__all__ = [
    "CheckResult",
    "Slope",
    "best_window_slope",
    "check_base_manifold",
    "check_geoopt_manifold",
    "check_metric",
    "check_module",
    "check_optimizer",
    "check_output_metric",
    "check_retraction",
    "check_rule",
    "error_slope",
    "failures",
    "raise_failures",
]
