r"""Races of optimizers for equal seconds: this library, torch, geoopt and other peers.

Every method has a small grid of settings (at most six), the same for its kind on every
problem. One seed and a share of the seconds choose the setting; then the best methods
of this library, the best of the others, and a reference (Adam, or geoopt's
RiemannianSGD) run for three other seeds and the full seconds. The clock runs during the
work of the optimizer only: forward, backward and update, not batches and measures. Runs
that are compared take turns of a tenth of a second, so that whatever else the machine
does hits them all.

    python -m benchmarks.convergence --list             what there is, and how long
    python -m benchmarks.convergence --quick            does everything work here?
    python -m benchmarks.convergence                    all, in --budget minutes
    python -m benchmarks.convergence --problems heat --budget 60
    python -m benchmarks.convergence --problems autoencoder-full \
        --methods marquardt-sampled-model --every-setting
    python -m benchmarks.tables                         tables and plots for the docs

Results are appended to a file as they come. A run that is in it already is not done
again, so an interrupted command goes on when it is repeated; --fresh forgets the
problems that are named. Packages that are not installed are skipped and named:
benchmarks/peers.txt has the commands for an environment with all of them.
"""

import argparse
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from benchmarks.method import Method, Settings
from benchmarks.methods import METHODS, REFERENCES
from benchmarks.plan import Plan, planned, said
from benchmarks.problem import Problem
from benchmarks.problems import PROBLEMS
from benchmarks.race import Result, Run, race, score, warm
from benchmarks.results import FOLDER, Store, machine

TUNING_SEED = 1000


class Campaign:
    """Carries a list of plans out."""

    def __init__(self, options: argparse.Namespace, store: Store, bar: tqdm) -> None:
        self.options, self.store, self.bar = options, store, bar
        self.warmed: dict[tuple[str, str], str] = {}

    def carry_out(self, plan: Plan) -> None:
        """Tune on one seed, choose, and run the final."""
        problem = plan.problem
        line = {"seconds": plan.seconds, "tuning": plan.tuning}
        known = self.store.plans.get(problem.name, {})
        if {name: known.get(name) for name in line} != line:
            grids = {name: list(grid) for name, grid in plan.methods.items()}
            head = {"stage": "plan", "problem": problem.name, "title": problem.title}
            self.store.add({**head, **line, "grids": grids, "refused": plan.refused})
        if self.options.every_setting:
            entries = [(n, s) for n, grid in plan.methods.items() for s in grid]
        else:
            for name, grid in plan.methods.items():
                self.bar.set_description(f"{problem.name}: tuning {name}")
                entries = [(name, settings) for settings in grid]
                self.race(plan, "tune", entries, TUNING_SEED, plan.tuning)
            entries = self.chosen(plan)
        for seed in range(self.options.seeds):
            self.bar.set_description(f"{problem.name}: final, seed {seed}")
            self.race(plan, "final", entries, seed, plan.seconds)

    def race(
        self,
        plan: Plan,
        stage: str,
        entries: Sequence[tuple[str, Settings]],
        seed: int,
        seconds: float,
    ) -> None:
        """Run what is not in the store yet, and store it."""
        problem, runs = plan.problem, []
        for name, settings in entries:
            key = Result(stage, problem.name, name, settings, seed, seconds).key()
            if key in self.store.results:
                self.tick(seconds)
                continue
            self.warm(problem, METHODS[name], settings)
            run = Run(stage, problem, METHODS[name], settings, seed, seconds)
            if run.done:
                self.tick(seconds)
            runs.append(run)
        race(runs, self.tick)
        for run in runs:
            self.store.add(run.result.line())
            if run.result.failed and stage == "final":
                tqdm.write(f"{run.result.method}, seed {seed}: {run.result.failed}")

    def tick(self, seconds: float) -> None:
        """Move the progress bar on; runs end a little late, the bar does not."""
        self.bar.update(min(seconds, self.bar.total - self.bar.n))

    def warm(self, problem: Problem, method: Method, settings: Settings) -> None:
        if (problem.name, method.name) not in self.warmed:
            failed = warm(problem, method, settings)
            self.warmed[problem.name, method.name] = failed
            if failed:
                tqdm.write(f"{problem.name}, {method.name}, at first: {failed}")

    def chosen(self, plan: Plan) -> list[tuple[str, Settings]]:
        """Return the methods of the final with their best settings."""
        ranked: dict[bool, list[tuple[tuple[bool, float, float], str, Settings]]] = {
            True: [],
            False: [],
        }
        tuned = self.store.of(plan.problem.name, "tune")
        for name in plan.methods:
            own = [each for each in tuned if each.method == name]
            best = min(own, key=lambda each: score(plan.problem, each))
            ours = METHODS[name].family == "ours"
            ranked[ours].append((score(plan.problem, best), name, best.settings))
        entries = []
        for group in ranked.values():
            group.sort(key=lambda entry: entry[0])
            for place, (_, name, settings) in enumerate(group):
                if place < self.options.finalists or name in REFERENCES:
                    entries.append((name, settings))
        return entries


# --- the command line


def positive(kind: type):
    """Return a reader of positive numbers."""

    def read(text: str):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f"{text} is not positive")
        return value

    read.__name__ = f"positive {kind.__name__}"
    return read


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.convergence",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    what = parser.add_argument_group("what")
    what.add_argument(
        "--problems",
        nargs="+",
        choices=PROBLEMS,
        default=list(PROBLEMS),
        metavar="NAME",
        help=f"of {', '.join(PROBLEMS)}; default: all",
    )
    what.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="NAME",
        help=f"of {', '.join(METHODS)}; default: all that suit the problem",
    )
    what.add_argument(
        "--every-setting",
        action="store_true",
        help="no tuning: every setting of the methods runs in the final",
    )
    how = parser.add_argument_group("how long")
    how.add_argument(
        "--budget",
        type=positive(float),
        default=25.0,
        metavar="MINUTES",
        help="for the whole command; if it would take longer, the seconds of all runs "
        "are shortened alike (default: 25)",
    )
    how.add_argument(
        "--seconds",
        type=positive(float),
        help="of a final run on every problem, whatever the budget; default: each "
        "problem's own",
    )
    how.add_argument(
        "--tuning",
        type=positive(float),
        default=0.15,
        metavar="SHARE",
        help="a tuning run's share of a final run's seconds (default: 0.15)",
    )
    how.add_argument(
        "--seeds", type=positive(int), default=3, help="of the final (default: 3)"
    )
    how.add_argument(
        "--finalists",
        type=positive(int),
        default=2,
        help="how many methods of this library, and how many others besides the "
        "reference, are in the final (default: 2)",
    )
    how.add_argument(
        "--quick",
        action="store_true",
        help="0.3 s for every run, two settings, one seed, its own results file: "
        "whether everything works",
    )
    add("--list", action="store_true", help="say what would be done, and stop")
    add("--fresh", action="store_true", help="forget the problems' results first")
    add("--results", type=Path, metavar="FILE", help=f"default: in {FOLDER.name}/")
    add("--threads", type=positive(int), default=2, help="of torch (default: 2)")
    add("--fashion-mnist", type=Path, metavar="DIR", help="of its four IDX files")
    add("--wordnet", type=Path, metavar="DIR", help="of WordNet's data.noun")
    options = parser.parse_args(argv)
    if options.results is None:
        name = "quick" if options.quick else "convergence"
        options.results = FOLDER / f"{name}.jsonl"
    if options.quick:
        options.seeds, options.tuning = 1, 0.5
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Carry out what the command line says; return the exit status."""
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    # Of packages that are compared, not of the project's.
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=FutureWarning)
    store = Store(options.results)
    if options.fresh and not options.list:
        store.forget(options.problems)
    plans = planned(options, store)
    print("\n".join(said(plans, options)))
    if options.list:
        for each in plans:
            print(f"\n{each.problem.name}: {each.problem.title}")
            for name, grid in each.methods.items():
                print(f"  {name:<26}{len(grid)} settings  {METHODS[name].about}")
            for name, reason in each.refused.items():
                print(f"  {name:<26}--          {reason}")
        return 0
    store.add(machine(options.threads))
    begin = time.perf_counter()
    with tqdm(
        total=sum(each.work(options) for each in plans),
        bar_format="{desc:<40} {percentage:3.0f}% |{bar}| {elapsed}<{remaining}",
    ) as bar:
        campaign = Campaign(options, store, bar)
        for each in plans:
            campaign.carry_out(each)
    minutes = (time.perf_counter() - begin) / 60.0
    print(f"{minutes:.1f} min; results in {options.results}")
    print("tables and plots: python -m benchmarks.tables")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
