"""The examples on differential equations, smaller or shorter."""

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def load(monkeypatch):
    pytest.importorskip("tqdm", reason="belongs to the extra 'examples'")
    monkeypatch.syspath_prepend(EXAMPLES)

    def named(name: str) -> ModuleType:
        return importlib.import_module(name)

    return named


@pytest.mark.parametrize("dimension", [1, 2])
def test_exact_solutions_leave_no_residual(load, dimension):
    poisson = load("poisson")
    problem = poisson.Problem(dimension, 6)
    solution = torch.nn.Module()
    solution.forward = lambda z: problem.solution(z.view(-1, dimension)).view(-1, 1)[0]
    for name, operator in problem.operators.items():
        plain = type(operator)(operator.function, structured=False)
        for row in zip(*problem.points[name], strict=True):
            assert plain(solution.forward, *row).abs().item() < 1e-9
    assert len(problem.points["boundary"][0]) == (2 if dimension == 1 else 24)


def test_a_small_poisson_problem_is_solved(load):
    poisson = load("poisson")
    torch.manual_seed(0)
    net, problem = poisson.network(2, 10), poisson.Problem(2, 8)
    step = poisson.layer_metric(net, problem)
    for _ in range(40):
        step(0.0)
    assert problem.error(net) < 1e-3


def test_the_fit_finds_its_parameters(load, monkeypatch):
    ode_fit = load("ode_fit")
    monkeypatch.setattr(ode_fit, "TIMES", 8)
    monkeypatch.setattr(ode_fit, "SUBSTEPS", 1)
    torch.manual_seed(0)
    fit, problem = ode_fit.model(), ode_fit.Problem(8)
    step = ode_fit.layer_metric(fit, problem)
    for _ in range(14):
        step(0.0)
    assert problem.error(fit) < 1e-8
    assert float((fit["rates"].detach() - ode_fit.truth()["rates"]).abs().max()) < 1e-7


@pytest.mark.parametrize("name", ["poisson", "heat_equation", "ode_fit"])
def test_the_race_is_run_and_told(load, name, capsys):
    example, threads = load(name), torch.get_num_threads()
    runs = example.main(["--seconds", "60", "--steps", "1"])
    torch.set_num_threads(threads)
    assert [run.steps for run in runs] == [1] * len(runs)
    assert all(len(run.errors) == 2 for run in runs)
    printed = capsys.readouterr().out
    assert all(run.name in printed for run in runs)
