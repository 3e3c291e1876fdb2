"""The recipes run where their package is there; their text is checked anyway."""

import ast
import importlib.util
import runpy
from pathlib import Path

import pytest

RECIPES = Path(__file__).parents[1] / "examples" / "recipes"
NEEDS = {"lightning_recipe": "lightning", "transformers_recipe": "transformers"}


def test_every_recipe_says_how_to_install() -> None:
    assert {path.stem for path in RECIPES.glob("*.py")} == set(NEEDS)
    for name, package in NEEDS.items():
        tree = ast.parse((RECIPES / f"{name}.py").read_text(encoding="utf-8"))
        text = ast.get_docstring(tree) or ""
        assert "pip install" in text
        assert package in text
        assert f"python examples/recipes/{name}.py" in text


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", NEEDS)
def test_the_recipe_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if importlib.util.find_spec(NEEDS[name]) is None:
        pytest.skip(f"{NEEDS[name]} is not installed")
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(RECIPES / f"{name}.py"), run_name="__main__")
    assert "solver" in capsys.readouterr().out
