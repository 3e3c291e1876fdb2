"""One pytest test for each of many things under test."""

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from riemannian_modules.testing.subjects import Subject

__all__ = ["parametrize_with_checks"]


def _with_hypothesis(subject: Subject, seeds: Sequence[int], examples: int) -> None:
    from hypothesis import HealthCheck, given, settings
    from hypothesis import strategies as st

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(seed=st.integers(0, 2**32 - 1))
    def explore(seed: int) -> None:
        subject.run_once(seed)

    subject.run(seeds)
    explore()


def parametrize_with_checks(
    subjects: Iterable[Subject],
    *,
    seeds: Sequence[int] = (0, 1, 2),
    examples: int = 5,
) -> Callable[[Any], Any]:
    """Return a decorator that makes a pytest test for each subject.

    The test function takes one argument, ``check``, and calls it::

        @parametrize_with_checks(
            [
                Subject.manifold(MyManifold(), (3, 2)),
                Subject.optimizer("mine", lambda model, groups: Mine(groups, lr=0.1)),
            ]
        )
        def test_conformance(check):
            check()

    Args:
        subjects: what is under test.
        seeds: draws that are always made. Expected failures are strict: one that does
            not fail in any of these is an error.
        examples: with Hypothesis installed, draws of further seeds; what it finds it
            shrinks and reports. 0: none.

    Returns:
        ``pytest.mark.parametrize("check", ...)`` with the subjects' names as ids.

    Raises:
        ValueError: two subjects have the same name.
    """
    import pytest

    listed = list(subjects)
    names = [subject.name for subject in listed]
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise ValueError(
            f"several subjects are called {double}; give each its own name"
        )
    explored = examples > 0 and importlib.util.find_spec("hypothesis") is not None

    def bound(subject: Subject) -> Callable[[], None]:
        def check() -> None:
            if explored:
                _with_hypothesis(subject, seeds, examples)
            else:
                subject.run(seeds)

        return check

    return pytest.mark.parametrize(
        "check", [pytest.param(bound(each), id=each.name) for each in listed]
    )
