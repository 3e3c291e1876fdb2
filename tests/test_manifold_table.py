"""The tables of docs/manifolds.md, computed anew."""

import inspect
from functools import cache
from pathlib import Path
from types import ModuleType

import geoopt
import pytest
from manifold_cases import GEOOPT, OURS, Case
from scripts import loaded

from riemannian_modules import manifolds
from riemannian_modules.retractions import Default

ALL = [*GEOOPT, *OURS]

# They pass what is measured, and are refused for what cannot be.
PASSING_AND_REFUSED = {"PoincareBall (learnable)", "Stereographic (learnable)"}


@cache
def script() -> ModuleType:
    return loaded("docs/manifold_table.py")


def kinds(source: object, names: list[str]) -> set[type[geoopt.Manifold]]:
    classes = filter(inspect.isclass, (getattr(source, name) for name in names))
    return {kind for kind in classes if issubclass(kind, geoopt.Manifold)}


@pytest.mark.slow
def test_the_page_has_the_tables_of_today() -> None:
    fresh, page = script().render(), script().committed()
    assert fresh == page, "run: python docs/manifold_table.py --write"


def test_every_manifold_is_in_the_tables() -> None:
    views = {manifolds.MetricManifold, manifolds.MetricProduct}
    ours = kinds(manifolds, manifolds.__all__) - views
    assert ours <= {type(case.make()) for case in OURS}
    theirs = kinds(geoopt.manifolds, dir(geoopt.manifolds))
    listed = {type(case.make()) for case in GEOOPT}
    # Stiefel(...) makes one of the other two.
    assert theirs - listed == {geoopt.Manifold, geoopt.Stiefel}
    assert len({case.name for case in GEOOPT}) == len(GEOOPT)
    assert len({case.name for case in OURS}) == len(OURS)


@pytest.mark.parametrize("case", ALL, ids=lambda case: case.name)
def test_refused_is_what_fails(case: Case) -> None:
    contract = script().findings(case)
    broken = [
        law for law, found in contract.items() if not all(r.passed for r in found)
    ]
    steps = script().order(case, Default())
    fails = bool(broken) or steps == script().FAIL
    assert bool(script().refusal(case)) == (fails or case.name in PASSING_AND_REFUSED)
    if case in OURS:
        assert not fails


def test_the_script_prints_and_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = script()
    page = tmp_path / "page.md"
    page.write_text(f"head\n{module.START}old\n{module.END}tail\n", encoding="utf-8")
    monkeypatch.setattr(module, "PAGE", page)
    monkeypatch.setattr(module, "render", lambda: "new\n")
    module.write()
    assert module.committed() == "new\n"
    text = page.read_text(encoding="utf-8")
    assert text.startswith("head\n")
    assert text.endswith("tail\n")
