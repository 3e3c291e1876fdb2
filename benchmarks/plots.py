"""Curves of a final: the measure against seconds and against steps."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from benchmarks.methods import METHODS
from benchmarks.problem import RISING
from benchmarks.race import Result


def median_curve(
    runs: Sequence[Result], axis: str, measure: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return places and the median, least and most of all runs that got there.

    Between two looks a curve stays where it was at the first of them.
    """
    curves = [
        (np.array(each.curve[axis]), np.array(each.curve[measure])) for each in runs
    ]
    first = max(max(x[1], 1e-9) if len(x) > 1 else 1e-9 for x, _ in curves)
    last = min(x[-1] for x, _ in curves)
    if last <= first:
        first = last / 2.0
    places = np.geomspace(max(first, 1e-9), max(last, 2e-9), 120)
    values = np.stack(
        [y[np.searchsorted(x, places, side="right") - 1] for x, y in curves]
    )
    return places, np.median(values, 0), values.min(0), values.max(0)


def plot(
    groups: dict[tuple[str, str], list[Result]], measure: str, title: str, path: Path
) -> None:
    """Write the curves of all methods; solid lines are this library's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(
        1, 2, figsize=(9.0, 3.8), sharey=True, layout="constrained"
    )
    for axes, axis in zip(panels, ("seconds", "steps"), strict=True):
        for place, ((method, setting), runs) in enumerate(sorted(groups.items())):
            whole = [each for each in runs if measure in each.curve]
            if not whole:
                continue
            x, middle, least, most = median_curve(whole, axis, measure)
            own = METHODS[method].family == "ours"
            several = sum(name == method for name, _ in groups) > 1
            name = f"{method}, {setting}" if several else method
            style = "-" if own else "--"
            colour = f"C{place % 10}"
            axes.plot(
                x, middle, style, color=colour, label=name, lw=1.8 if own else 1.2
            )
            axes.fill_between(x, least, most, color=colour, alpha=0.12, lw=0)
        axes.set(xscale="log", xlabel=axis)
        axes.grid(alpha=0.3)
        if measure not in RISING:
            axes.set_yscale("log")
    panels[0].set_ylabel(measure)
    panels[1].legend(fontsize=7)
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    plt.close(figure)
