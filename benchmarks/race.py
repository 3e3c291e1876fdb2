"""Equal seconds for all: runs that take turns, and what they reached."""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch

from benchmarks.method import Method, Settings
from benchmarks.problem import Problem, Target

Stage = Literal["tune", "final"]
# A turn: long enough for caches to be warm, short enough that a busy minute of the
# machine hits all.
SLICE = 0.1
POINTS = 80


@dataclass
class Result:
    """What one run did; lines of the results file.

    Attributes:
        final: the measures after the last step.
        reached: for each target the step and the second at which it was first seen.
        curve: the measures at some steps, "steps" and "seconds" among them.
        failed: why the run ended early, "" if it did not.
    """

    stage: Stage
    problem: str
    method: str
    settings: Settings
    seed: int
    seconds: float
    spent: float = 0.0
    steps: int = 0
    final: dict[str, float] = field(default_factory=dict)
    reached: dict[str, tuple[int, float]] = field(default_factory=dict)
    curve: dict[str, list[float]] = field(default_factory=dict)
    failed: str = ""

    def key(self) -> tuple[Any, ...]:
        """Return what tells a run from all others."""
        settings = tuple(sorted(self.settings.items()))
        where = self.stage, self.problem, self.method, settings
        return *where, self.seed, self.seconds

    def line(self) -> dict[str, Any]:
        """Return what is stored; the curve of a tuning run is not."""
        found = asdict(self)
        if self.stage == "tune":
            del found["curve"]
        else:
            found["curve"] = {k: thinned(v) for k, v in self.curve.items()}
        return found


def thinned(values: Sequence[float]) -> list[float]:
    """Return at most ``POINTS`` of the values, first and last among them, rounded."""
    count = len(values)
    if count > POINTS:
        chosen = {round(i * (count - 1) / (POINTS - 1)) for i in range(POINTS)}
        values = [values[i] for i in sorted(chosen)]
    return [float(f"{value:.4g}") for value in values]


class Run:
    """One method at work; its clock runs during its steps only."""

    def __init__(
        self,
        stage: Stage,
        problem: Problem,
        method: Method,
        settings: Settings,
        seed: int,
        seconds: float,
    ) -> None:
        self.problem, self.method = problem, method
        self.result = Result(stage, problem.name, method.name, settings, seed, seconds)
        self.done = False
        self.next_look = 0
        # A tuning run is looked at in the end only, unless the way there decides.
        self.often = stage == "final" or problem.tune_on == "target"
        try:
            self.model = problem.model(seed)
            self.batches = problem.batches(seed)
            self.step = method.build(problem, self.model, settings)
        except Exception as error:  # one method of many; the tables show it
            self._fail(error)
            return
        if self.often:
            self.look()

    def advance(self, seconds: float) -> float:
        """Work for some seconds, or to the end; return the seconds that it took."""
        result, start = self.result, self.result.spent
        until = min(start + seconds, result.seconds)
        while not self.done and result.spent < until:
            batch = next(self.batches)
            gone = result.spent / result.seconds
            begin = time.perf_counter()
            try:
                self.step(batch, gone)
            except Exception as error:
                self._fail(error)
            result.spent += time.perf_counter() - begin
            result.steps += 1
            due = self.often and result.steps >= self.next_look
            if due and not self.done:
                self.look()
        if result.spent >= result.seconds and not self.done:
            self.look()
            self.done = True
        return result.spent - start

    def look(self) -> None:
        """Take the measures, and plan when to take them next."""
        result, problem = self.result, self.problem
        values = problem.look(self.model)
        point = {"steps": float(result.steps), "seconds": result.spent, **values}
        for name, value in point.items():
            result.curve.setdefault(name, []).append(value)
        for target in problem.targets:
            if str(target) not in result.reached and target.reached(values):
                result.reached[str(target)] = result.steps, result.spent
        result.final = values
        steps = result.steps + 1
        if result.steps >= problem.dense:
            steps = max(steps, math.ceil(result.steps * (1.0 + problem.growth)))
        self.next_look = steps
        if not math.isfinite(values["loss"]):
            result.failed = f"loss {values['loss']} after {result.steps} steps"
            self.done = True

    def score(self) -> tuple[bool, float, float]:
        """Return by what settings are chosen, less is better."""
        return score(self.problem, self.result)

    def _fail(self, error: Exception) -> None:
        first = str(error).partition("\n")[0]
        self.result.failed = f"{type(error).__name__}: {first}"[:300]
        self.done = True


def score(problem: Problem, result: Result) -> tuple[bool, float, float]:
    """Return by what settings and methods are chosen; less is better.

    A run that failed is the worst. Where seconds to the first target count, those come
    next that did not reach it. The final measure decides.
    """
    if result.failed or not result.final:
        return True, math.inf, math.inf
    value = problem.score(result.final)
    value = value if math.isfinite(value) else math.inf
    if problem.tune_on == "measure":
        return False, 0.0, value
    target: Target = problem.targets[0]
    _, second = result.reached.get(str(target), (0, math.inf))
    return False, second, value


def race(runs: Sequence[Run], tick: Callable[[float], None]) -> None:
    """Let the runs work in turn, always the one whose clock is behind."""
    waiting = list(runs)
    while waiting := [run for run in waiting if not run.done]:
        run = min(waiting, key=lambda run: run.result.spent)
        took = run.advance(max(SLICE, run.result.seconds / 40.0))
        left = run.result.seconds - run.result.spent
        tick(took + (max(left, 0.0) if run.done else 0.0))


def warm(problem: Problem, method: Method, settings: Settings) -> str:
    """Take the two steps of a process that cost more than all others.

    Returns:
        What went wrong, "" if nothing.
    """
    torch.manual_seed(0)
    try:
        step = method.build(problem, problem.model(0), settings)
        batches = problem.batches(0)
        for _ in range(2):
            step(next(batches), 0.0)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""
