"""parametrize_with_checks, reports, and the kit without Hypothesis."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
from torch import nn

import riemannian_modules as rm
from riemannian_modules.testing import (
    CheckResult,
    Subject,
    measured,
    parametrize_with_checks,
    raise_failures,
    report,
)

CLAMPED = {"dist_zero": "acos is clamped"}


def linears() -> list[nn.Module]:
    return [nn.Linear(3, 3, dtype=torch.float64) for _ in "ab"]


X = torch.linspace(-1.0, 1.0, 12, dtype=torch.float64).sin().view(4, 3)
SUBJECTS = [
    Subject.manifold(geoopt.Sphere(), (3,), expected_failures=CLAMPED),
    Subject.manifold(rm.manifolds.Oblique(), (3, 2), batch=(2,)),
    Subject.optimizer(
        "torch.optim.SGD",
        lambda model, groups: torch.optim.SGD(groups, lr=0.1),
        manifold=geoopt.Euclidean(),
        expected_failures={"bad_data": "it steps to NaN"},
    ),
    Subject.composition(
        "Residual",
        lambda a, b: rm.nn.Residual(a @ b),
        lambda: [rm.nn.Linear(3, 3, dtype=torch.float64) for _ in "ab"],
        x=X,
    ),
]


@parametrize_with_checks(SUBJECTS, seeds=[0], examples=1)
def test_subjects(check: Any) -> None:
    check()


def test_pymanopt_subjects() -> None:
    manifolds = pytest.importorskip("pymanopt.manifolds")
    Subject.pymanopt(manifolds.Stiefel(4, 2)).run()
    known = dict.fromkeys(["projection_complete"], "the real skew part")
    with pytest.raises(AssertionError, match="riesz"):
        Subject.pymanopt(manifolds.UnitaryGroup(3), expected_failures=known).run()


def test_ids_are_names() -> None:
    mark = parametrize_with_checks(SUBJECTS[:2]).mark
    assert [case.id for case in mark.args[1]] == ["Sphere", "Oblique"]
    with pytest.raises(ValueError, match=r"\['Sphere'\]"):
        parametrize_with_checks(SUBJECTS[:1] * 2)


def test_a_failure_that_is_not_expected() -> None:
    bad = Subject.manifold(geoopt.CanonicalStiefel(), (4, 2))
    with pytest.raises(AssertionError, match=r"(?s)seed 0.*FAILED gradient_slope"):
        bad.run()
    for examples in (0, 2):
        check = parametrize_with_checks([bad], examples=examples).mark.args[1][0]
        with pytest.raises(AssertionError, match="gradient_slope"):
            check.values[0]()


def test_an_expected_failure_that_passes_is_an_error() -> None:
    good = Subject.manifold(
        rm.manifolds.Oblique(), (3, 2), expected_failures={"riesz": "why not"}
    )
    with pytest.raises(AssertionError, match=r"riesz was expected to fail \(why not\)"):
        good.run()


def test_an_expected_failure_need_not_fail_for_every_seed() -> None:
    def sometimes(generator: torch.Generator) -> list[CheckResult]:
        return [CheckResult.yes("odd", generator.initial_seed() % 2 == 0, "even")]

    subject = Subject("sometimes", sometimes, {"odd": "seeds are what they are"})
    subject.run([0, 1])
    with pytest.raises(AssertionError, match="odd"):
        subject.run([0, 2])
    with pytest.raises(AssertionError, match=r"sometimes, seed 1"):
        Subject("sometimes", sometimes).run([0, 1])


def test_what_hypothesis_finds_is_reported() -> None:
    def rare(generator: torch.Generator) -> list[CheckResult]:
        return [CheckResult.yes("small", generator.initial_seed() < 3, "small seeds")]

    (case,) = parametrize_with_checks([Subject("rare", rare)], examples=20).mark.args[1]
    with pytest.raises(AssertionError, match="small") as caught:
        case.values[0]()
    assert any("seed=" in note for note in caught.value.__notes__)


def test_the_report_is_readable() -> None:
    table = SUBJECTS[0].report()
    head, *lines = table.splitlines()
    assert head == f"Sphere: {len(lines) - 2} of {len(lines) - 1} laws hold"
    (row,) = (line for line in lines if line.split()[0] == "dist_zero")
    assert row.endswith("expected")
    assert lines[lines.index(row) + 1].strip() == "acos is clamped"
    good = CheckResult.yes("good", True, "")
    assert "but was expected to fail" in report([good], expected_failures={"good": "?"})
    assert report([]) == "0 of 0 laws hold"
    assert all(line == line.rstrip() for line in table.splitlines())


def test_measurements_that_fail() -> None:
    def broken() -> float:
        raise KeyError("lost")

    for at_least in (False, True):
        found = measured("law", broken, 1.0, "words", at_least=at_least)
        assert not found.passed
        assert "KeyError: 'lost'" in found.message
    assert measured("law", lambda: True, 0.0, "words").passed
    assert not measured("law", lambda: False, 0.0, "words").passed
    assert not measured("law", lambda: float("nan"), 1.0, "words").passed


SCRIPT = """
import sys
sys.path[:0] = {paths!r}
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("hypothesis", "pymanopt"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
import importlib.util, torch, geoopt
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "hypothesis" else find(name)
import riemannian_modules.testing as kit
import riemannian_modules as rm
assert "hypothesis" not in sys.modules and "pymanopt" not in sys.modules
first = kit.Subject.manifold(geoopt.Euclidean(), (3,), batch=(2,))
second = kit.Subject.optimizer(
    "sgd", lambda m, g: rm.optim.RiemannianSGD(
        rm.LayerwiseMetric(m, output=rm.output.Euclidean(), mass=0.5), g, lr=0.5),
    steps=5)
layers = lambda: [torch.nn.Linear(2, 2, dtype=torch.float64)]
third = kit.Subject.composition(
    "chain", rm.nn.Sequential, layers, x=torch.ones(4, 2, dtype=torch.float64))
for case in kit.parametrize_with_checks([first, second, third], seeds=[0]).mark.args[1]:
    case.values[0]()
print(first.report())
try:
    import riemannian_modules.testing.strategies
except ImportError as error:
    print("strategies:", error)
assert "hypothesis" not in sys.modules
"""


def test_everything_works_without_hypothesis() -> None:
    paths = [str(Path(rm.__file__).parents[1]), *sys.path]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT.format(paths=paths)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "laws hold" in done.stdout
    assert "strategies: hypothesis is blocked" in done.stdout


def test_every_check_is_exported() -> None:
    checks = {name for name in rm_testing().__all__ if name.startswith("check_")}
    assert checks >= {
        "check_geoopt_manifold",
        "check_pymanopt_manifold",
        "check_optimizer",
        "check_rule",
        "check_composition",
    }
    raise_failures([])


def rm_testing() -> Any:
    import riemannian_modules.testing

    return riemannian_modules.testing
