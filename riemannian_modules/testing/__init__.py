"""Laws that your own parts can be held to: checks that return findings.

:mod:`riemannian_modules.testing.strategies` has strategies for Hypothesis; it is not
imported here, so that the checks work without Hypothesis.
"""

from riemannian_modules.testing.composition_checks import check_composition
from riemannian_modules.testing.geoopt_checks import check_geoopt_manifold
from riemannian_modules.testing.manifold_checks import check_base_manifold
from riemannian_modules.testing.metric_checks import check_metric
from riemannian_modules.testing.module_checks import check_module
from riemannian_modules.testing.optimizer_checks import check_optimizer
from riemannian_modules.testing.output_checks import check_output_metric
from riemannian_modules.testing.parametrize import parametrize_with_checks
from riemannian_modules.testing.pymanopt_checks import check_pymanopt_manifold
from riemannian_modules.testing.raising import raise_failures
from riemannian_modules.testing.report import report
from riemannian_modules.testing.result import CheckResult, failures, measured
from riemannian_modules.testing.retraction_checks import check_retraction
from riemannian_modules.testing.rule_checks import check_rule
from riemannian_modules.testing.slopes import Slope, best_window_slope, error_slope
from riemannian_modules.testing.subjects import Subject

__all__ = [
    "CheckResult",
    "Slope",
    "Subject",
    "best_window_slope",
    "check_base_manifold",
    "check_composition",
    "check_geoopt_manifold",
    "check_metric",
    "check_module",
    "check_optimizer",
    "check_output_metric",
    "check_pymanopt_manifold",
    "check_retraction",
    "check_rule",
    "error_slope",
    "failures",
    "measured",
    "parametrize_with_checks",
    "raise_failures",
    "report",
]
