"""What a check returns: a finding. It neither prints nor raises."""

from collections.abc import Iterable
from dataclasses import dataclass

__all__ = ["CheckResult", "failures"]


@dataclass(frozen=True)
class CheckResult:
    """The finding of one check.

    Args:
        name: the law that was checked, the same for every object under test.
        passed: whether it holds.
        value: the measured number.
        tolerance: the bound that ``value`` was compared with.
        message: the law in words.

    >>> print(CheckResult.at_most("riesz", 0.5, 1e-12, "g(sharp e, v) = <e, v>"))
    FAILED riesz: 5.0e-01 > 1.0e-12 (g(sharp e, v) = <e, v>)
    """

    name: str
    passed: bool
    value: float
    tolerance: float
    message: str

    @classmethod
    def at_most(
        cls, name: str, value: float, tolerance: float, message: str
    ) -> "CheckResult":
        """Return a finding that passes if ``value <= tolerance``; NaN fails."""
        return cls(name, value <= tolerance, value, tolerance, message)

    @classmethod
    def at_least(
        cls, name: str, value: float, tolerance: float, message: str
    ) -> "CheckResult":
        """Return a finding that passes if ``value >= tolerance``; NaN fails."""
        return cls(name, value >= tolerance, value, tolerance, message)

    def __str__(self) -> str:
        """Return one line for a report."""
        verdict = "passed" if self.passed else "FAILED"
        sign = "<=" if self.value <= self.tolerance else ">"
        return (
            f"{verdict} {self.name}: {self.value:.1e} {sign} {self.tolerance:.1e} "
            f"({self.message})"
        )


def failures(results: Iterable[CheckResult]) -> list[CheckResult]:
    """Return the findings that did not pass.

    Args:
        results: what a check returned.

    Returns:
        Those with ``passed`` false; empty is good.

    >>> failures([CheckResult("norm", True, 0.0, 1.0, "small")])
    []
    """
    return [result for result in results if not result.passed]
