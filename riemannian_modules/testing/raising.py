"""Findings as an assertion, with failures that are known."""

from collections.abc import Iterable, Mapping

from riemannian_modules.testing.result import CheckResult

__all__ = ["raise_failures"]


def raise_failures(
    results: Iterable[CheckResult],
    *,
    expected_failures: Mapping[str, str] | None = None,
) -> None:
    """Raise if a law fails, or if one that is expected to fail holds.

    Args:
        results: what a check returned.
        expected_failures: ``{name of a finding: why it is expected to fail}``.

    Raises:
        AssertionError: lists the findings that are not as expected.

    >>> result = CheckResult.at_most("riesz", 0.5, 1e-12, "g(sharp e, v) = <e, v>")
    >>> raise_failures([result], expected_failures={"riesz": "not a Riesz map"})
    >>> raise_failures([result])
    Traceback (most recent call last):
    ...
    AssertionError: FAILED riesz: 5.0e-01 > 1.0e-12 (g(sharp e, v) = <e, v>)
    """
    expected = dict(expected_failures or {})
    findings = list(results)
    failed = {result.name for result in findings if not result.passed}
    lines = [str(r) for r in findings if not r.passed and r.name not in expected]
    lines += [
        f"{name} was expected to fail ({reason}) and did not"
        for name, reason in expected.items()
        if name not in failed
    ]
    if lines:
        raise AssertionError("\n".join(lines))
