"""The example of the stability page."""

from types import ModuleType

import pytest
from scripts import loaded


@pytest.fixture(scope="module")
def stability() -> ModuleType:
    pytest.importorskip("tqdm", reason="belongs to the extra 'examples'")
    pytest.importorskip("sklearn", reason="belongs to the extra 'examples'")
    return loaded("examples/stability.py")


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
