"""The example of the deep autoencoder, shortly."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch) -> ModuleType:
    pytest.importorskip("tqdm", reason="belongs to the extra 'examples'")
    pytest.importorskip("sklearn", reason="belongs to the extra 'examples'")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("autoencoder")


def test_every_method_lowers_the_loss(example, capsys) -> None:
    runs = example.main(["--seconds", "0.2", "--mass", "1e-2"])
    assert [run.name for run in runs] == list(example.METHODS)
    assert all(run.steps == len(run.losses) >= 1 for run in runs)
    # The variance of the digits about their mean is 7.3e-2, about zero 2.4e-1.
    assert all(run.losses[-1] < 0.23 for run in runs)
    printed = capsys.readouterr().out
    assert all(run.name in printed for run in runs)
    assert "mass x" in printed


def test_one_step_of_the_library_goes_far(example) -> None:
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    net, x = example.autoencoder(), torch.rand(50, 64)
    run = example.Run("gauss-newton")
    step = example.gauss_newton(net, x, 1e-3, run)
    losses = [step(0.0) for _ in range(5)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.1  # from 0.36; 1 / 12 is the variance
