r"""How much does one training example matter? Retraining against the bounds.

A logistic regression and a network of two layers are trained on scikit-learn's breast
cancer data, with weight decay, in two metrics: a fixed one (the mass alone, which is
gradient descent) and the layer metric of the library. Then one training example is
replaced by a new one and the training repeated from the same start, several times.

- *measured*: the largest change of the loss of any example of the data set;
- *estimate*: the bound with constants measured along the training run. Constants that
  were seen are no suprema, so its verdict is "evidence";
- *certified*: the bound with constants proved for all parameters and all examples.
  Known here for the logistic regression in the fixed metric only.

    python examples/stability.py
    python examples/stability.py --sizes 50 100 200 400 --replaced 20 \
        --plot stability.png
"""

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

import riemannian_modules as rm
from riemannian_modules import contraction
from riemannian_modules.contraction import Bound, Constant, Side, Verdict

LOOKS = 12


@dataclass(frozen=True)
class Problem:
    """A model, a metric and how to train in it."""

    name: str
    width: int
    fixed: bool
    lr: float
    decay: float
    mass: float

    def model(self) -> nn.Module:
        """Return a new model, always with the same parameters."""
        generator = torch.Generator().manual_seed(0)
        if self.width == 0:
            model: nn.Module = nn.Linear(30, 1)
        else:
            model = nn.Sequential(
                nn.Linear(30, self.width), nn.Tanh(), nn.Linear(self.width, 1)
            )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(std=0.3, generator=generator)
        return model


PROBLEMS = (
    Problem("logistic, fixed metric", 0, fixed=True, lr=1.0, decay=0.1, mass=1.0),
    Problem("logistic, layer metric", 0, fixed=False, lr=0.5, decay=0.1, mass=0.5),
    Problem("network, fixed metric", 4, fixed=True, lr=0.2, decay=0.1, mass=0.3),
    Problem("network, layer metric", 4, fixed=False, lr=0.2, decay=0.1, mass=0.3),
)


@dataclass
class Run:
    """One training run, looked at now and then.

    Attributes:
        losses: the loss of every example of the data set, ``(looks, examples)``.
        L_G: largest dual norm of the loss of a training example so far.
        kappa: largest sensitivity of a training example so far.
        rate: smallest frozen rate so far.
        accuracy: of the trained model, on the examples after the training set.
    """

    losses: list[Tensor] = field(default_factory=list)
    L_G: list[float] = field(default_factory=list)
    kappa: list[float] = field(default_factory=list)
    rate: list[float] = field(default_factory=list)
    accuracy: float = math.nan


@dataclass(frozen=True)
class Outcome:
    """What came out for one problem and one size of the training set."""

    problem: Problem
    n: int
    times: list[float]
    measured: list[float]
    estimates: list[Bound]
    certified: Bound | None
    accuracy: float


def load() -> tuple[Tensor, Tensor]:
    """Return the data in random order, inputs scaled to norms of at most one."""
    from sklearn.datasets import load_breast_cancer

    x, y = load_breast_cancer(return_X_y=True)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = torch.from_numpy(x)[order], torch.from_numpy(y).double()[order]
    x = (x - x.mean(0)) / x.std(0) / math.sqrt(x.shape[1])
    return x / x.norm(dim=1, keepdim=True).clamp_min(1.0), y.unsqueeze(1)


def each(z: Tensor, y: Tensor) -> Tensor:
    """Return the loss of every example."""
    return F.binary_cross_entropy_with_logits(z, y, reduction="none").squeeze(-1)


def mean(z: Tensor, y: Tensor) -> Tensor:
    """Return the training loss."""
    return F.binary_cross_entropy_with_logits(z, y)


def train(
    problem: Problem, chosen: Tensor, x: Tensor, y: Tensor, steps: int, *, measure: bool
) -> Run:
    """Train on the chosen examples and look at the model at equal distances.

    Args:
        problem: model and metric.
        chosen: indices of the training examples.
        x: all inputs.
        y: all targets.
        steps: number of steps.
        measure: whether to estimate the constants at every look.

    Returns:
        What was seen.
    """
    model, run = problem.model(), Run()
    metric = rm.LayerwiseMetric(
        model,
        output=None if problem.fixed else rm.output.Bernoulli(),
        mass=problem.mass,
        blocks="model",
    )
    optimizer = rm.optim.RiemannianSGD(
        metric, lr=problem.lr, weight_decay=problem.decay
    )
    inputs, targets = x[chosen], y[chosen]
    for step in range(steps + 1):
        with metric.record():
            z = model(inputs)
        metric.backward(mean(z, targets), z)
        if step % (steps // LOOKS) == 0:
            with torch.no_grad():
                run.losses.append(each(model(x), y))
            if measure:
                look(run, metric, inputs, targets, problem)
        if step < steps:
            optimizer.step()
    new = slice(int(chosen.max()) + 1, None)
    with torch.no_grad():
        run.accuracy = float(((model(x[new]) > 0) == (y[new] > 0.5)).double().mean())
    return run


def look(
    run: Run, metric: rm.LayerwiseMetric, x: Tensor, y: Tensor, problem: Problem
) -> None:
    """Estimate the constants at this point of the run."""
    rate, _ = contraction.frozen_curvature(
        metric, x, y, mean, weight_decay=problem.decay
    )
    kappa = 0.0 if problem.fixed else contraction.sensitivity(metric).value
    found = contraction.loss_lipschitz(metric).value
    run.L_G.append(max([found, *run.L_G[-1:]]))
    run.kappa.append(max([kappa, *run.kappa[-1:]]))
    run.rate.append(min([rate.value, *run.rate[-1:]]))


def seen(symbol: str, value: float, safe: str) -> Constant:
    """Return a constant that was seen along a run, on the unsafe side."""
    side = Side.LOWER if safe == "upper" else Side.UPPER
    where = "points of the run"
    meaning = "extreme along the run"
    return Constant(symbol, value, meaning, side, Verdict.EVIDENCE, where, safe=safe)


def estimate(problem: Problem, run: Run, index: int, n: int, t: float) -> Bound:
    """Return the bound from the constants seen up to a look."""
    slope = seen("L_G", run.L_G[index], "upper")
    rate = seen("lambda", run.rate[index], "lower")
    if problem.fixed:
        return contraction.stability_bound(slope, rate, n, t)
    kappa = seen("kappa", run.kappa[index], "upper")
    return contraction.stability_bound_data_metric(
        slope, rate, n, kappa=kappa, mu=problem.mass, t=t
    )


def certify(problem: Problem, n: int, steps: int) -> Bound | None:
    """Return the certified bound, where the constants are proved.

    The slope of the logistic loss lies between -1 and 1 and its curvature between 0 and
    1/4, and the input of the layer (with the one of the bias) has at most the norm
    sqrt(2), at all parameters and for all examples.
    """
    if problem.width > 0 or not problem.fixed:
        return None
    decay, mass = problem.decay, problem.mass
    return contraction.stability_bound(
        math.sqrt(2.0 / mass),
        decay,
        n,
        lr=problem.lr,
        steps=steps,
        smoothness=decay + 0.25 * 2.0 / mass,
    )


def compare(problem: Problem, n: int, replaced: int, steps: int, bar: tqdm) -> Outcome:
    """Train once, then again with one example replaced, and compare.

    Args:
        problem: model and metric.
        n: number of training examples.
        replaced: how many examples are replaced, one at a time.
        steps: number of steps.
        bar: progress, one count for each training.

    Returns:
        Measured changes of losses, and bounds.
    """
    x, y = load()
    base = torch.arange(n)
    reference = train(problem, base, x, y, steps, measure=True)
    bar.update()
    measured = [0.0] * len(reference.losses)
    for index in range(replaced):
        chosen = base.clone()
        chosen[index * n // replaced] = n + index
        run = train(problem, chosen, x, y, steps, measure=False)
        bar.update()
        for k, (ours, theirs) in enumerate(
            zip(reference.losses, run.losses, strict=True)
        ):
            measured[k] = max(measured[k], float((ours - theirs).abs().max()))
    times = [problem.lr * (steps // LOOKS) * k for k in range(LOOKS + 1)]
    estimates = [estimate(problem, reference, k, n, t) for k, t in enumerate(times)]
    return Outcome(
        problem,
        n,
        times,
        measured,
        estimates,
        certify(problem, n, steps),
        reference.accuracy,
    )


def table(outcomes: Sequence[Outcome]) -> str:
    """Return the results at the end of training as aligned text."""
    head = ("model", "n", "measured", "estimate", "certified", "L_G", "rate")
    rows = [(*head, "accuracy")]
    for o in outcomes:
        bound = o.estimates[-1]
        constants = {c.symbol: c.value for c in bound.constants}
        proved = "-" if o.certified is None else f"{o.certified.value:.3g}"
        rows.append(
            (
                o.problem.name,
                str(o.n),
                f"{o.measured[-1]:.4f}",
                f"{bound.value:.3g}",
                proved,
                f"{constants['L_G']:.2f}",
                f"{constants['lambda']:.3f}",
                f"{100 * o.accuracy:.1f} %",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the picture: along the training of the largest size, and against n."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    largest = max(o.n for o in outcomes)
    figure, (along, against) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    colors = ("#c1272d", "#0b6fa4", "#e08e0b", "#5f6b6d")
    for problem, color in zip(PROBLEMS, colors, strict=True):
        own = [o for o in outcomes if o.problem is problem]
        last = next(o for o in own if o.n == largest)
        style = {"color": color, "linewidth": 1.6}
        along.semilogy(
            last.times[1:],
            last.measured[1:],
            **style,
            marker="o",
            markersize=3,
            label=problem.name,
        )
        along.semilogy(
            last.times[1:],
            [b.value for b in last.estimates[1:]],
            **style,
            linestyle="--",
        )
        sizes = [o.n for o in own]
        against.loglog(
            sizes,
            [o.measured[-1] for o in own],
            **style,
            marker="o",
            markersize=4,
        )
        against.loglog(
            sizes, [o.estimates[-1].value for o in own], **style, linestyle="--"
        )
        proved = [o.certified.value for o in own if o.certified is not None]
        if proved:
            against.loglog(sizes, proved, **style, linestyle=":")
    along.set(xlabel="training time", ylabel="change of a loss", title=f"n = {largest}")
    for axes in (along, against):
        axes.set_ylim(1e-3, 1e2)
    against.set(
        xlabel="training examples n",
        title="solid: measured, dashed: estimate, dotted: certified",
    )
    for axes in (along, against):
        axes.grid(visible=True, which="major", color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    against.set_xticks(sizes, [str(n) for n in sizes], minor=False)
    against.minorticks_off()
    along.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=70)
    plt.close(figure)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return the command line's arguments."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[50, 100, 200])
    parser.add_argument("--replaced", type=int, default=3, help="examples replaced")
    parser.add_argument("--steps", type=int, default=5 * LOOKS, help="training steps")
    parser.add_argument("--plot", type=Path, help="write the curves to this file")
    given = parser.parse_args(argv)
    if given.steps < LOOKS or given.steps % LOOKS:
        parser.error(f"--steps must be a multiple of {LOOKS}")
    if not 1 <= given.replaced <= min(given.sizes):
        parser.error("--replaced must be at least 1 and at most the smallest size")
    if max(given.sizes) + given.replaced > 569:
        parser.error("the data set has 569 examples: lower --sizes or --replaced")
    return given


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison and print the table.

    Args:
        argv: command line; None: the program's.

    Returns:
        The exit status.
    """
    given = arguments(argv)
    torch.set_default_dtype(torch.float64)
    outcomes = []
    total = len(PROBLEMS) * len(given.sizes) * (given.replaced + 1)
    with tqdm(total=total, unit="training", mininterval=0.5) as bar:
        for problem in PROBLEMS:
            for n in given.sizes:
                bar.set_description(f"{problem.name}, n = {n}")
                outcomes.append(compare(problem, n, given.replaced, given.steps, bar))
    print(table(outcomes))
    proved = next(o.certified for o in outcomes if o.certified is not None)
    print(f"\nThe certified bound in full:\n{proved}")
    if given.plot is not None:
        plot(outcomes, given.plot)
        print(f"\nwrote {given.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
