"""The races: problems say the truth about their loss, clocks are fair, files resume."""

import importlib
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from mutants.benchmarks import MUTANTS
from torch import Tensor, nn
from torch.func import functional_call, jvp

import riemannian_modules as rm

# The folder is not in the wheel, and what it needs is the extra 'examples'.
WHY = "belongs to the repository and the extra 'examples'"
pytest.importorskip("sklearn", reason=WHY)
convergence = pytest.importorskip("benchmarks.convergence", reason=WHY)
ours, plan, plots, race, results, tables = (
    importlib.import_module(f"benchmarks.{name}")
    for name in ("ours", "plan", "plots", "race", "results", "tables")
)
problem_module = importlib.import_module("benchmarks.problem")
Target = problem_module.Target
METHODS, PROBLEMS = convergence.METHODS, convergence.PROBLEMS
Result, Run = race.Result, race.Run
REPOSITORY = Path(__file__).parents[1]

SMALL = ("digits", "autoencoder", "factorisation", "heat", "poisson", "poincare")
MASS = 1e-2


class Tiny(problem_module.NetworkProblem):
    """Full-batch classification of eight examples."""

    kind = "network"
    name = "tiny"
    title = "A tiny problem"
    seconds = 0.05
    outputs = 3
    targets = (Target("loss", 1.0),)

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(3)
        x = torch.randn(8, 4, generator=generator)
        super().__init__(x, torch.arange(8) % 3, None)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))

    def criterion(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y)

    def output(self) -> rm.output.OutputMetric:
        return rm.output.Categorical()

    def loss_module(self) -> nn.Module:
        return nn.CrossEntropyLoss()

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(self.loss(model, (self.x, self.y)))}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> Tiny:
    problem = Tiny()
    monkeypatch.setitem(PROBLEMS, "tiny", lambda _: problem)
    monkeypatch.setitem(tables.MEASURES, "tiny", ("loss",))
    return problem


# --- problems


def small_batch(problem):
    """A batch of five examples of those problems that have any number."""
    batch = next(problem.batches(0))
    if isinstance(batch, tuple):
        return tuple(part[:5] for part in batch)
    return batch[:5] if isinstance(batch, Tensor) else batch


def curvature(problem, model: nn.Module, batch, u: dict[str, Tensor]) -> float:
    """``u^T G u`` for the Gauss-Newton matrix G of the loss, by differentiation."""
    start = {name: p.detach().as_subclass(Tensor) for name, p in u.items()}
    point = {
        name: p.detach().as_subclass(Tensor) for name, p in model.named_parameters()
    }

    def outputs(p):
        if problem.kind == "functions":

            def net(z):
                return functional_call(model, p, (z,))

            return {
                name: torch.func.vmap(lambda *e, f=function: f(net, *e))(*batch[name])
                for name, function in problem.operators.items()
            }
        x = batch if isinstance(batch, Tensor) else batch[0]
        return functional_call(model, p, (x,))

    def loss(values):
        if problem.name == "poisson":
            inside, edge = (values[name].square() for name in ("equation", "boundary"))
            return inside.mean() + 100.0 * edge.mean()
        if problem.kind == "functions":
            total = sum(each.square().sum() for each in values.values())
            return total / sum(each.numel() for each in values.values())
        if problem.name == "poincare":
            return F.cross_entropy(values, torch.zeros(len(values), dtype=torch.long))
        return problem.criterion(values, batch[1])

    values, along = jvp(outputs, (point,), (start,))

    def moved(step: Tensor) -> Tensor:
        if isinstance(values, dict):
            return loss({name: values[name] + step * along[name] for name in values})
        return loss(values + step * along)

    second = torch.func.grad(torch.func.grad(moved))
    return float(second(torch.zeros((), dtype=next(iter(point.values())).dtype)))


def mismatch(problem) -> float:
    """Relative difference of the problem's metric and the loss's Gauss-Newton form."""
    model, batch = problem.model(0), small_batch(problem)
    geometry = problem.geometry(model, blocks="model", mass=MASS)
    geometry.backward(batch)
    (block,) = geometry.metric.blocks.values()
    generator = torch.Generator().manual_seed(1)
    u, base = {}, 0.0
    for declared in geometry.metric.parameters:
        tensor = declared.tensor.detach().as_subclass(Tensor)
        noise = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        u[declared.name] = declared.manifold.proju(tensor, noise).as_subclass(Tensor)
        # Without keepdim geoopt's ball pairs every row with every other.
        own = declared.manifold.inner(
            tensor, u[declared.name], u[declared.name], keepdim=True
        )
        base += MASS * float(own.sum())
    found = float(block.inner(u, u)) - base
    expected = curvature(problem, model, batch, u)
    return abs(found - expected) / (abs(expected) + base)


@pytest.mark.parametrize("name", SMALL)
def test_the_metric_is_the_curvature_of_the_loss(name: str) -> None:
    assert mismatch(PROBLEMS[name]({})) < 1e-5


@pytest.mark.parametrize("mutant", MUTANTS)
def test_wrong_metrics_are_seen(mutant: str) -> None:
    name, change = MUTANTS[mutant]
    problem = PROBLEMS[name]({})
    change(problem)
    assert mismatch(problem) > 1e-2


@pytest.mark.parametrize("name", SMALL)
def test_a_seed_decides_start_and_batches(name: str) -> None:
    problem = PROBLEMS[name]({})
    looks = [problem.look(problem.model(seed)) for seed in (4, 4, 5)]
    assert looks[0] == looks[1]
    assert looks[0] != looks[2]
    assert problem.measure in looks[0]
    for target in problem.targets:
        assert target.measure in looks[0]
    first, again = next(problem.batches(1)), next(problem.batches(1))
    torch.testing.assert_close(first, again, rtol=0, atol=0)


@pytest.mark.parametrize("name", SMALL)
def test_both_ways_to_the_gradient_agree(name: str) -> None:
    problem = PROBLEMS[name]({})
    model, batch = problem.model(0), small_batch(problem)
    names, parameters = zip(*model.named_parameters(), strict=True)
    loss = problem.loss(model, batch)
    expected = torch.autograd.grad(loss, parameters)
    geometry = problem.geometry(model, blocks="layer", mass=MASS)
    found = geometry.backward(batch)
    torch.testing.assert_close(found.detach(), loss.detach())
    with torch.no_grad():
        torch.testing.assert_close(geometry.loss(batch), loss.detach())
    for name_, gradient in zip(names, expected, strict=True):
        own = geometry.metric.gradients.of(name_)
        assert own is not None
        plain = own.as_subclass(Tensor), gradient.as_subclass(Tensor)
        assert torch.allclose(*plain, atol=1e-6), name_


def test_missing_data_are_named(tmp_path: Path) -> None:
    with pytest.raises(problem_module.UnavailableError, match="dataset-fashion-mnist"):
        PROBLEMS["fashion-mnist"]({"fashion-mnist": tmp_path})


def test_fashion_mnist_has_the_seconds_of_two_epochs_of_adam(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 300), ("t10k", 20)):
        shapes = {"images-idx3": (count, 28, 28), "labels-idx1": (count,)}
        for content, shape in shapes.items():
            top = 10 if content == "labels-idx1" else 256
            array = torch.randint(top, shape, generator=generator).byte()
            head = bytes([0, 0, 8, len(shape)]) + struct.pack(f">{len(shape)}I", *shape)
            path = tmp_path / f"{part}-{content}-ubyte"
            path.write_bytes(head + array.numpy().tobytes())
    problem = PROBLEMS["fashion-mnist"]({"fashion-mnist": tmp_path})
    x, _ = next(problem.batches(0))
    assert x.shape == (128, 784)
    assert set(problem.look(problem.model(0))) == {"loss", "accuracy"}
    clock = Clock()
    monkeypatch.setattr(plan.time, "perf_counter", clock)
    monkeypatch.setitem(METHODS, "adam", paced(clock, 0.25))
    # Two epochs of two batches of 128 of the 300 images.
    assert plan.adam_seconds(problem) == pytest.approx(2 * 2 * 0.25)


# --- methods


@pytest.mark.parametrize("name", METHODS)
def test_two_steps_of_every_method(name: str, tiny: Tiny) -> None:
    method = METHODS[name]
    problem = PROBLEMS["factorisation"]({}) if method.family == "geoopt" else tiny
    if reason := method.refusal(problem):
        known = ("not installed", "needs a learning rate", "has no Muon")
        absent = any(each in reason for each in known)
        assert absent, reason
        pytest.skip(reason)
    settings = method.grid(problem)
    assert 3 <= len(settings) <= 6
    model = problem.model(0)
    start = [p.detach().clone() for p in model.parameters()]
    step, batches = method.build(problem, model, settings[0]), problem.batches(0)
    for gone in (0.0, 0.5):
        step(next(batches), gone)
    assert math.isfinite(problem.look(model)["loss"])
    moved = [
        not torch.equal(p, q) for p, q in zip(model.parameters(), start, strict=True)
    ]
    assert all(moved)


def test_a_method_is_refused_where_it_does_not_suit() -> None:
    digits, factorisation = PROBLEMS["digits"]({}), PROBLEMS["factorisation"]({})
    assert "changes from step to step" in METHODS["lbfgs"].refusal(digits)
    assert "manifolds" in METHODS["adam"].refusal(factorisation)
    assert METHODS["geoopt-adam"].refusal(digits)
    assert "too dear" in ours.exact(PROBLEMS["autoencoder-full"]({}), "model")


# --- races


class Clock:
    """Seconds that pass only when a step says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def paced(clock: Clock, seconds: float, name: str = "paced", fail_at: int = 0):
    """A method whose steps take some seconds and lower the loss by a tenth."""

    def build(problem, model: nn.Module, settings):
        steps = 0

        def step(batch, gone: float) -> None:
            nonlocal steps
            steps += 1
            clock.now += seconds
            if steps == fail_at:
                raise RuntimeError("out of luck\nand more")
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9)

        return step

    return convergence.Method(
        name, "peer", "", lambda _: [{"lr": 1.0}], build, lambda _: ""
    )


def test_all_have_equal_seconds(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(race.time, "perf_counter", clock)
    runs = [
        Run("final", tiny, paced(clock, cost), {"lr": 1.0}, 0, 6.0)
        for cost in (0.5, 0.03125)
    ]
    ticks: list[float] = []
    race.race(runs, ticks.append)
    assert [run.result.steps for run in runs] == [12, 192]
    for run in runs:
        assert run.result.spent == pytest.approx(6.0)
        assert run.result.curve["steps"][0] == 0.0
        assert run.result.curve["steps"][-1] == run.result.steps
        assert not run.result.failed
    assert sum(ticks) == pytest.approx(12.0)


def test_targets_are_seen_at_their_first_step(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(race.time, "perf_counter", clock)
    size = torch.no_grad()(lambda _, model: {"loss": float(model[0].weight.norm())})
    monkeypatch.setattr(Tiny, "look", size)
    start = tiny.look(tiny.model(0))["loss"]
    tiny.targets = (Target("loss", 0.9**7 * start * 1.001), Target("loss", 0.0))
    run = Run("final", tiny, paced(clock, 0.25), {"lr": 1.0}, 0, 5.0)
    race.race([run], lambda _: None)
    assert run.result.reached == {str(tiny.targets[0]): (7, pytest.approx(1.75))}


def test_a_failure_ends_one_run_only(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr(race.time, "perf_counter", clock)
    bad = Run("final", tiny, paced(clock, 0.5, fail_at=3), {"lr": 1.0}, 0, 4.0)
    good = Run("final", tiny, paced(clock, 0.5), {"lr": 1.0}, 0, 4.0)
    race.race([bad, good], lambda _: None)
    assert bad.result.failed == "RuntimeError: out of luck"
    assert good.result.steps == 8
    assert race.score(tiny, bad.result) > race.score(tiny, good.result)


def test_less_time_to_the_target_is_better(tiny: Tiny) -> None:
    tiny.tune_on = "target"
    name = str(tiny.targets[0])
    make = {"stage": "tune", "problem": "tiny", "settings": {}, "seed": 0}
    quick = Result(
        **make, method="a", seconds=1.0, final={"loss": 0.9}, reached={name: (9, 0.2)}
    )
    deep = Result(
        **make, method="b", seconds=1.0, final={"loss": 0.1}, reached={name: (5, 0.4)}
    )
    never = Result(**make, method="c", seconds=1.0, final={"loss": 1.5})
    order = sorted([never, deep, quick], key=lambda each: race.score(tiny, each))
    assert [each.method for each in order] == ["a", "b", "c"]
    tiny.tune_on = "measure"
    order = sorted([never, quick, deep], key=lambda each: race.score(tiny, each))
    assert [each.method for each in order] == ["b", "a", "c"]


# --- the command


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    file = tmp_path / "results.jsonl"
    return [
        *("--problems", "tiny", "--methods", "adam", "sgd", "exact-model", "muon"),
        *("--seconds", "0.02", "--seeds", "2", "--finalists", "1", "--threads", "1"),
        *("--results", str(file)),
    ]


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_a_repeated_command_does_nothing_again(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys
) -> None:
    file = tmp_path / "results.jsonl"
    assert convergence.main(command) == 0
    lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    stages = [line["stage"] for line in lines]
    runs = [
        (line["method"], line["seed"]) for line in lines if line["stage"] == "final"
    ]
    # Two seeds of each; the best of the others is Adam if the machine is busy enough.
    finals = {method for method, _ in runs}
    assert {"adam", "exact-model"} <= finals
    assert len(finals) <= 3
    assert len(runs) == len(set(runs)) == 2 * len(finals)
    assert stages.count("tune") == sum(
        len(METHODS[name].grid(tiny)) for name in ("adam", "sgd", "exact-model", "muon")
    )
    assert convergence.main(command) == 0
    again = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
    assert [line["stage"] for line in again] == [*stages, "machine"]
    assert convergence.main([*command, "--fresh"]) == 0
    anew = results.Store(file)
    assert len(anew.of("tiny", "final")) in {4, 6}
    capsys.readouterr()


def test_the_page_is_made_from_results(
    tiny: Tiny, command: list[str], tmp_path: Path, capsys
) -> None:
    pytest.importorskip("matplotlib", reason="belongs to the extra 'examples'")
    page = tmp_path / "page.md"
    marks = [f"<!-- begin {n} -->\nold\n<!-- end {n} -->" for n in ("about", "tiny")]
    page.write_text("Kept.\n" + "\n".join(marks) + "\nKept too.\n", encoding="utf-8")
    convergence.main(command)
    stored = ["--results", str(tmp_path / "results.jsonl")]
    tables.main([*stored, "--page", str(page)])
    text = page.read_text("utf-8")
    assert text.startswith("Kept.\n")
    assert text.endswith("Kept too.\n")
    assert "old" not in text
    assert "| **exact-model** |" in text
    assert "median (least to most) of 2 seeds" in text
    assert (tmp_path / "page-tiny.png").stat().st_size > 1000
    capsys.readouterr()


def test_a_budget_shortens_all_runs_alike(tiny: Tiny, capsys) -> None:
    tiny.seconds = 60.0
    call = ["--problems", "tiny", "--methods", "adam", "--budget", "1", "--list"]
    convergence.main([*call, "--results", "absent.jsonl", "--threads", "1"])
    line = capsys.readouterr().out.splitlines()[1].split()
    final, minutes = float(line[5]), float(line[7])
    assert final < 20.0
    assert minutes == pytest.approx(1.0, abs=0.1)


def test_the_table_has_the_best_first_and_failures_last() -> None:
    make = {"stage": "final", "problem": "heat", "settings": {}, "seconds": 1.0}
    runs = [
        Result(**make, method="adam", seed=s, steps=9, final={"error": e, "loss": e})
        for s, e in enumerate((3e-1, 1e-1, 2e-1))
    ]
    runs += [
        Result(**make, method="soap", seed=s, final={"error": 1e-3, "loss": 1.0})
        for s in range(3)
    ]
    runs += [
        Result(**make, method="muon", seed=s, final={"error": 1e-9}, failed="burst")
        for s in range(3)
    ]
    body = tables.final_table("heat", runs)[2:]
    assert [line.split(" | ")[0].strip("| ") for line in body] == [
        "soap",
        "adam",
        "muon",
    ]
    assert "2.0e-01 (1.0e-01 to 3.0e-01)" in body[1]
    assert "diverged" in body[2]


def test_curves_keep_their_value_between_looks() -> None:
    run = Result("final", "heat", "adam", {}, 0, 4.0)
    run.curve = {"seconds": [0.0, 1.0, 4.0], "error": [3.0, 2.0, 1.0]}
    x, middle, _, _ = plots.median_curve([run], "seconds", "error")
    assert set(middle[x < 3.99]) == {2.0}
    assert middle[-1] == 1.0


def test_the_page_has_a_place_for_every_problem() -> None:
    text = (REPOSITORY / "docs" / "convergence.md").read_text("utf-8")
    for name in [*PROBLEMS, "about"]:
        assert tables.replaced(text, name, "new") != text
        assert name == "about" or name in tables.MEASURES
    with pytest.raises(ValueError, match="no lines"):
        tables.replaced(text, "absent", "new")
