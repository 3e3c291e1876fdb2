"""What a race on each problem takes: who takes part, and for how many seconds."""

import argparse
import math
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.method import Settings
from benchmarks.methods import METHODS, REFERENCES
from benchmarks.problem import Problem, UnavailableError
from benchmarks.problems import PROBLEMS
from benchmarks.results import Store

# For the estimate: steps of a run, and what else a run needs (building, first steps).
STEPS, OVERHEAD = 1000, 0.05
# Less tells nothing of methods that are dear in their first steps.
TUNING_LEAST = 1.0


@dataclass
class Plan:
    """What is to be done on one problem.

    Attributes:
        methods: the methods that suit, with their settings.
        refused: the others, with the reason.
        look: seconds that one look at the model takes.
        seconds: of a final run; ``tuning``: of a tuning run.
    """

    problem: Problem
    methods: dict[str, Sequence[Settings]]
    refused: dict[str, str]
    look: float
    seconds: float
    tuning: float

    def finalists(self, options: argparse.Namespace) -> int:
        """Return how many runs each seed of the final has."""
        ours = sum(METHODS[name].family == "ours" for name in self.methods)
        others = len(self.methods) - ours
        extra = any(name in REFERENCES for name in self.methods)
        if options.every_setting:
            return self.cells
        count = min(ours, options.finalists) + min(others, options.finalists + extra)
        return int(count)

    @property
    def cells(self) -> int:
        return sum(map(len, self.methods.values()))

    def work(self, options: argparse.Namespace) -> float:
        """Return the seconds of optimizer work of the whole plan."""
        finals = self.finalists(options) * options.seeds * self.seconds
        return finals + self.cells * self.tuning * (not options.every_setting)

    def rest(self, options: argparse.Namespace) -> float:
        """Return about how many seconds go by besides."""
        problem = self.problem
        looks = problem.dense + math.log(STEPS / max(problem.dense, 1)) / problem.growth
        finals = self.finalists(options) * options.seeds
        first = looks if problem.tune_on == "target" else 1.0
        tunings = self.cells * (not options.every_setting)
        looks = finals * looks + tunings * first
        return looks * self.look + (finals + tunings) * OVERHEAD

    def scale(self, factor: float) -> None:
        """Shorten all runs."""
        self.seconds = float(f"{self.seconds * factor:.3g}")
        self.tuning = float(f"{self.tuning * factor:.3g}")


# --- planning


def planned(options: argparse.Namespace, store: Store) -> list[Plan]:
    """Return the plans, within the minutes of the budget."""
    plans = []
    folders = {"fashion-mnist": options.fashion_mnist, "wordnet": options.wordnet}
    for name in options.problems:
        try:
            problem = PROBLEMS[name](folders)
        except UnavailableError as error:
            print(f"skipped: {name}: {error}\n")
            continue
        plans.append(plan(problem, options))
    known = [each for each in plans if remembered(each, options, store)]
    new = [each for each in plans if each not in known]
    if options.seconds is None and not options.quick and new:
        work = sum(each.work(options) for each in new)
        rest = sum(each.rest(options) for each in new)
        room = 60.0 * options.budget - rest
        factor = min(1.0, max(room, 0.05 * work) / work)
        for each in new:
            each.scale(factor)
    return plans


def plan(problem: Problem, options: argparse.Namespace) -> Plan:
    refused = {
        name: reason
        for name in options.methods
        if (reason := METHODS[name].refusal(problem))
    }
    methods = {
        name: METHODS[name].grid(problem)[: 2 if options.quick else None]
        for name in options.methods
        if name not in refused
    }
    model, times = problem.model(0), []
    for _ in range(3):
        begin = time.perf_counter()
        problem.look(model)
        times.append(time.perf_counter() - begin)
    seconds = problem.seconds
    if problem.adam_epochs:
        seconds = adam_seconds(problem)
    if options.quick:
        seconds, problem.dense = 0.3, 4
    if options.seconds is not None:
        seconds = options.seconds
    seconds = float(f"{seconds:.3g}")
    tuning = max(options.tuning * seconds, min(TUNING_LEAST, seconds / 2.0))
    tuning = float(f"{tuning:.3g}")
    return Plan(problem, methods, refused, statistics.median(times), seconds, tuning)


def adam_seconds(problem: Problem) -> float:
    """Return how long the epochs of Adam take that a problem's time is measured in."""
    step = METHODS["adam"].build(problem, problem.model(0), {"lr": 1e-3})
    batches = problem.batches(0)
    times = []
    for _ in range(60):
        batch = next(batches)
        begin = time.perf_counter()
        step(batch, 0.0)
        times.append(time.perf_counter() - begin)
    return problem.adam_epochs * problem.steps_per_epoch * statistics.median(times)


def remembered(plan: Plan, options: argparse.Namespace, store: Store) -> bool:
    """Take the seconds of an earlier command whose results are there."""
    old = store.plans.get(plan.problem.name)
    if old is None or options.seconds is not None:
        return False
    plan.seconds, plan.tuning = old["seconds"], old["tuning"]
    return True


def said(plans: Iterable[Plan], options: argparse.Namespace) -> Iterator[str]:
    """Yield lines that say what will be done, and how long it takes."""
    yield f"{'problem':<18}{'methods':>8}{'settings':>9}{'tuning':>9}{'final':>9}"
    total = 0.0
    for each in plans:
        minutes = (each.work(options) + each.rest(options)) / 60.0
        total += minutes
        nominal = each.problem.seconds
        note = "" if each.seconds >= nominal else f"  ({nominal:g} s shortened)"
        yield (
            f"{each.problem.name:<18}{len(each.methods):>8}{each.cells:>9}"
            f"{each.tuning:>7.2f} s{each.seconds:>7.2f} s{minutes:>6.1f} min{note}"
        )
    yield f"{'':<53}{total:>6.1f} min"
    reasons: dict[str, list[str]] = {}
    for each in plans:
        for name, reason in each.refused.items():
            if "not installed" in reason:
                reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        yield f"skipped: {', '.join(dict.fromkeys(names))}: {reason}"
