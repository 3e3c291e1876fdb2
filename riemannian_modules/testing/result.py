"""What a check returns: a finding. It neither prints nor raises."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

__all__ = ["CheckResult", "failures", "measured"]


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

    @classmethod
    def yes(cls, name: str, holds: bool, message: str) -> "CheckResult":
        """Return the finding of a law that holds or does not."""
        return cls(name, holds, float(not holds), 0.0, message)

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


def measured(
    name: str,
    value: Callable[[], float | bool],
    tolerance: float,
    message: str,
    *,
    at_least: bool = False,
) -> CheckResult:
    """Return the finding of a law whose measurement may fail itself.

    An error of what is under test is a finding like any other: the law does not hold,
    and the message tells the error.

    Args:
        name: the law.
        value: measures; a boolean tells whether the law holds.
        tolerance: the bound; 0 for booleans.
        message: the law in words.
        at_least: whether the bound is a lower one.

    Returns:
        The finding.

    >>> print(measured("root", lambda: 1 / 0, 1.0, "it has a root"))
    FAILED root: inf > 1.0e+00 (it has a root; ZeroDivisionError: division by zero)
    """
    try:
        number = value()
    except Exception as error:  # of any kind: it is the finding
        line = next(iter(str(error).strip().splitlines()), "")
        told = f"{message}; {type(error).__name__}: {line}"
        return CheckResult(
            name, False, -math.inf if at_least else math.inf, tolerance, told
        )
    if isinstance(number, bool):
        return CheckResult.yes(name, number, message)
    if at_least:
        return CheckResult.at_least(name, number, tolerance, message)
    return CheckResult.at_most(name, number, tolerance, message)
