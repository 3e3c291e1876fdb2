"""The example of the stability page, and the code of the two pages."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def stability() -> ModuleType:
    pytest.importorskip("tqdm", reason="belongs to the extra 'examples'")
    pytest.importorskip("sklearn", reason="belongs to the extra 'examples'")
    path = REPOSITORY / "examples" / "stability.py"
    spec = importlib.util.spec_from_file_location("stability_example", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_inputs_have_norms_of_at_most_one(stability) -> None:
    x, y = stability.load()
    assert x.shape == (569, 30)
    assert float(x.norm(dim=1).max()) <= 1 + 1e-12
    assert set(y.flatten().tolist()) == {0.0, 1.0}


def test_bounds_hold_and_keep_their_verdicts(stability) -> None:
    class Bar:
        def update(self) -> None:
            pass

    for problem in stability.PROBLEMS[:2]:
        found = stability.compare(problem, 40, 2, stability.LOOKS, Bar())
        bounds = found.estimates
        for seen, bound in zip(found.measured[1:], bounds[1:], strict=True):
            assert 0 < seen < bound.value
            assert str(bound.verdict) == "evidence"
    assert stability.certify(stability.PROBLEMS[1], 40, 12) is None
    certified = stability.certify(stability.PROBLEMS[0], 40, 12)
    assert str(certified.verdict) == "certified"
    assert certified.value <= 2 * 2.0 / (0.1 * 40)
    assert "logistic" in stability.table([found])


@pytest.mark.parametrize(
    "argv",
    [["--steps", "13"], ["--replaced", "0"], ["--sizes", "567", "--replaced", "3"]],
)
def test_bad_arguments_are_refused(stability, argv: list[str], capsys) -> None:
    with pytest.raises(SystemExit):
        stability.arguments(argv)
    assert "--" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["stability", "action"])
def test_code_of_the_page_runs(name: str, capsys) -> None:
    torch.set_default_dtype(torch.float32)  # what a reader has
    text = (REPOSITORY / "docs" / f"{name}.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    assert blocks
    namespace: dict[str, object] = {"__name__": name}
    for number, block in enumerate(blocks):
        exec(compile(block, f"{name}.md, block {number}", "exec"), namespace)
    assert capsys.readouterr().out
