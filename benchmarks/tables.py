"""Write the tables and plots of docs/convergence.md from the results file.

    python -m benchmarks.tables
    python -m benchmarks.tables --results other.jsonl --page copy-of-the-page.md

Only what lies between two markers of the page is replaced; what is outside is text of
the page's author. A problem without results keeps what it had.
"""

import argparse
import math
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.method import Settings
from benchmarks.methods import METHODS
from benchmarks.problem import RISING
from benchmarks.problems import PROBLEMS
from benchmarks.race import Result
from benchmarks.results import FOLDER, Store

PAGE = Path(__file__).parents[1] / "docs" / "convergence.md"
# What the table of a problem shows, with the measure that it is sorted by.
MEASURES = {
    "digits": ("loss", "accuracy"),
    "digits-full": ("loss", "accuracy"),
    "fashion-mnist": ("accuracy", "loss"),
    "autoencoder": ("loss",),
    "autoencoder-full": ("loss",),
    "heat": ("error", "loss"),
    "poisson": ("error", "loss"),
    "factorisation": ("error", "loss"),
    "poincare": ("map", "rank", "loss"),
}
TITLES = {"map": "MAP", "rank": "mean rank"}
Groups = dict[tuple[str, str], list[Result]]


def grouped(results: Iterable[Result]) -> Groups:
    """Return the runs of the same method and setting together, one for each seed."""
    groups: Groups = {}
    for each in results:
        groups.setdefault((each.method, said(each.settings)), []).append(each)
    return groups


def said(settings: Settings) -> str:
    """Return settings as text."""
    return ", ".join(f"{name} {value:.3g}" for name, value in settings.items())


def number(value: float, measure: str) -> str:
    """Return a measure as text."""
    if measure == "accuracy":
        return f"{100.0 * value:.2f} %"
    if measure in ("map", "rank"):
        return f"{value:.3g}"
    return f"{value:.1e}" if math.isfinite(value) else "diverged"


def spread(values: Sequence[float], measure: str) -> str:
    """Return median, least and most as text."""
    middle = number(statistics.median(values), measure)
    if len(values) == 1:
        return middle
    return (
        f"{middle} ({number(min(values), measure)} to {number(max(values), measure)})"
    )


def measured(results: Sequence[Result], measure: str) -> list[float]:
    """Return a measure of all runs, the worst value for those that failed."""
    worst = -math.inf if measure in RISING else math.inf
    return [
        worst if each.failed else each.final.get(measure, worst) for each in results
    ]


def rank(results: Sequence[Result], measure: str) -> float:
    """Return by what rows are sorted, less is better."""
    middle = statistics.median(measured(results, measure))
    return -middle if measure in RISING else middle


def target(results: Sequence[Result], name: str) -> str:
    """Return the median step and second of a target; a dash if half miss it."""
    found = [each.reached.get(name, (math.inf, math.inf)) for each in results]
    steps = statistics.median([step for step, _ in found])
    seconds = statistics.median([second for _, second in found])
    if not math.isfinite(steps) or not math.isfinite(seconds):
        return "-"
    return f"{steps:.0f} / {seconds:.2g} s"


def targets_of(results: Sequence[Result]) -> list[str]:
    """Return the targets that some run reached, in the order of reaching."""
    seen: dict[str, float] = {}
    for each in results:
        for name, (_, second) in each.reached.items():
            seen[name] = min(second, seen.get(name, math.inf))
    return sorted(seen, key=lambda name: seen[name])


def label(method: str) -> str:
    """Return a method's name, in bold type if it is this library's."""
    return f"**{method}**" if METHODS[method].family == "ours" else method


def final_table(problem: str, results: Sequence[Result]) -> list[str]:
    """Return the lines of the table of the final."""
    measures, targets = MEASURES[problem], targets_of(results)
    heads = ["method", "setting", *(TITLES.get(name, name) for name in measures)]
    heads += ["steps", "ms a step", *targets]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    groups = sorted(
        grouped(results).items(), key=lambda item: rank(item[1], measures[0])
    )
    for (method, setting), runs in groups:
        steps = statistics.median([each.steps for each in runs])
        cost = statistics.median([each.spent / max(each.steps, 1) for each in runs])
        cells = [label(method), setting]
        cells += [spread(measured(runs, name), name) for name in measures]
        cells += [f"{steps:.0f}", f"{1e3 * cost:.2g}"]
        cells += [target(runs, name) for name in targets]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def tuning_table(problem: str, store: Store) -> list[str]:
    """Return a table of the methods that were not good enough for the final."""
    inside = {each.method for each in store.of(problem, "final")}
    measure = MEASURES[problem][0]
    groups: dict[str, list[Result]] = {}
    for each in store.of(problem, "tune"):
        if each.method not in inside:
            groups.setdefault(each.method, []).append(each)
    best = [
        min(runs, key=lambda each: rank([each], measure)) for runs in groups.values()
    ]
    if not best:
        return []
    lines = [
        "",
        "Not in the final: the best setting of each after the seconds of tuning.",
        "",
        f"| method | setting | {TITLES.get(measure, measure)} | steps |",
        "|---|---|---|---|",
    ]
    for each in sorted(best, key=lambda each: rank([each], measure)):
        value = number(each.final[measure], measure) if each.final else each.failed
        cells = [label(each.method), said(each.settings), value, str(each.steps)]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def section(problem: str, store: Store, picture: str) -> str:
    """Return what stands between the markers of a problem."""
    plan = store.plans[problem]
    results = store.of(problem, "final")
    seeds = len({each.seed for each in results})
    tried = sum(len(grid) for grid in plan["grids"].values())
    lines = [
        f"{plan['title']}.",
        f"{plan['seconds']:g} s for every run, {tried} settings of "
        f"{len(plan['grids'])} methods tuned on another seed for "
        f"{plan['tuning']:g} s each; median (least to most) of "
        + (f"{seeds} seeds." if seeds > 1 else "one seed."),
        "",
        *final_table(problem, results),
        *tuning_table(problem, store),
    ]
    failed = sorted(
        {f"{each.method}: {each.failed}" for each in results if each.failed}
    )
    if failed:
        lines += ["", "Ended early: " + "; ".join(failed) + "."]
    absent = [
        name for name, why in plan["refused"].items() if why.startswith("not installed")
    ]
    if absent:
        lines += ["", f"Not installed where this ran: {', '.join(absent)}."]
    return "\n".join([*lines, "", f"![{plan['title']}]({picture})"])


def about(store: Store) -> str:
    """Return what the figures depend on, and the grids."""
    lines = []
    for each in store.machines[-1:]:
        versions = ", ".join(f"{k} {v}" for k, v in each["versions"].items())
        lines += [
            f"{each['date']}, {each['processor']} ({each['capability']}), "
            f"{each['cores']} cores, {each['threads']} threads, Python "
            f"{each['python']}, {versions}, commit {each['commit']}.",
        ]
    commits = {each["commit"] for each in store.machines}
    if len(commits) > 1:
        lines.append(f"The results come from {len(commits)} commits.")
    lines += ["", "| method | what it is | settings that were tried |", "|---|---|---|"]
    grids: dict[str, dict[str, list[float]]] = {}
    for plan in store.plans.values():
        for method, grid in plan["grids"].items():
            own = grids.setdefault(method, {})
            for settings in grid:
                for name, value in settings.items():
                    if value not in own.setdefault(name, []):
                        own[name].append(value)
    for method, own in grids.items():
        tried = "; ".join(
            f"{name} " + ", ".join(f"{value:.3g}" for value in sorted(values))
            for name, values in own.items()
        )
        lines.append(f"| {label(method)} | {METHODS[method].about} | {tried} |")
    return "\n".join(lines)


def replaced(page: str, name: str, text: str) -> str:
    """Return the page with new text between the two markers of a name.

    Raises:
        ValueError: the page does not have them.
    """
    begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
    pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
    if not pattern.search(page):
        raise ValueError(f"the page has no lines '{begin}' and '{end}'")
    return pattern.sub(lambda _: f"{begin}\n\n{text}\n\n{end}", page)


def main(argv: Sequence[str] | None = None) -> int:
    """Write the page and its pictures; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tables",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--results", type=Path, default=FOLDER / "convergence.jsonl", metavar="FILE")
    add("--page", type=Path, default=PAGE, metavar="FILE.md")
    add("--no-plots", action="store_true", help="tables only")
    options = parser.parse_args(argv)
    store = Store(options.results)
    page = options.page.read_text(encoding="utf-8")
    done = [name for name in PROBLEMS if store.of(name, "final")]
    for name in done:
        picture = f"{options.page.stem}-{name}.png"
        page = replaced(page, name, section(name, store, picture))
        if not options.no_plots:
            from benchmarks.plots import plot

            title = store.plans[name]["title"]
            path = options.page.parent / picture
            plot(grouped(store.of(name, "final")), MEASURES[name][0], title, path)
    if done:
        page = replaced(page, "about", about(store))
    options.page.write_text(page, encoding="utf-8")
    print(f"{options.page}: {', '.join(done) or 'no results'}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
