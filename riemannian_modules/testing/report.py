"""Findings as a table for people."""

from collections.abc import Iterable, Mapping

from riemannian_modules.testing.result import CheckResult

__all__ = ["report"]


def _verdict(result: CheckResult, expected: Mapping[str, str]) -> str:
    if result.name in expected:
        return "passed, but was expected to fail" if result.passed else "expected"
    return "" if result.passed else "FAILED"


def report(
    results: Iterable[CheckResult],
    *,
    title: str = "",
    expected_failures: Mapping[str, str] | None = None,
) -> str:
    """Return findings as a table: law, what was measured, the bound, the verdict.

    Args:
        results: what a check returned.
        title: what was checked.
        expected_failures: ``{name of a finding: why it is expected to fail}``.

    Returns:
        The lines, failures with the law in words (or the reason) below them.

    >>> riesz = CheckResult.at_most("riesz", 0.5, 1e-12, "g(sharp e, v) = <e, v>")
    >>> print(report([riesz, CheckResult.yes("pure", True, "")], title="Sphere"))
    Sphere: 1 of 2 laws hold
      riesz    5.0e-01  1.0e-12  FAILED
               g(sharp e, v) = <e, v>
      pure     0.0e+00  0.0e+00
    """
    findings, expected = list(results), dict(expected_failures or {})
    good = sum(result.passed for result in findings)
    head = f"{title}: " if title else ""
    lines = [f"{head}{good} of {len(findings)} laws hold"]
    width = max((len(result.name) for result in findings), default=0) + 4
    for result in findings:
        numbers = f"{result.value:>7.1e}  {result.tolerance:>7.1e}"
        verdict = _verdict(result, expected)
        lines.append(f"  {result.name:<{width - 2}}  {numbers}  {verdict}".rstrip())
        if not result.passed:
            why = expected.get(result.name, result.message)
            lines.append(f"  {'':<{width - 2}}  {why}")
    return "\n".join(lines)
