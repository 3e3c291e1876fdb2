"""Laws whose part under test may raise, or return NaN or what does not fit."""

import math
import traceback
from collections.abc import Callable, Iterable, Iterator

from riemannian_modules.testing.result import CheckResult

__all__ = ["guarded", "raised", "worst"]


def worst(values: Iterable[float]) -> float:
    """Return the largest number, NaN if there is one among them.

    >>> worst([1.0, math.nan, 2.0])
    nan
    """
    found = list(values)
    return math.nan if any(map(math.isnan, found)) else max(found)


def raised(laws: str, error: Exception) -> CheckResult:
    """Return a failed finding that says what was raised, and where.

    Args:
        laws: what could not be measured, in words.
        error: what was raised.
    """
    frame = traceback.extract_tb(error.__traceback__)[-1]
    words = f"{type(error).__name__}: {error}".strip().rstrip(".")
    place = f"{frame.name}, {frame.filename} line {frame.lineno}"
    return CheckResult("raised", False, math.inf, 0.0, f"{laws}: {words} (in {place})")


def guarded(
    laws: str, measure: Callable[[], Iterable[CheckResult]]
) -> Iterator[CheckResult]:
    """Yield findings; where the part under test raises, a last one named ``raised``.

    Args:
        laws: what is measured, in words.
        measure: yields the findings.

    Yields:
        The findings up to there.

    >>> [str(each)[:35] for each in guarded("the sign", lambda: [1 / 0])]
    ['FAILED raised: inf > 0.0e+00 (the s']
    """
    try:
        yield from measure()
    except Exception as error:
        yield raised(laws, error)
