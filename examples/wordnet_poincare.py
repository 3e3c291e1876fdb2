"""Embed the mammals of WordNet in the Poincare ball with three optimizers.

Every synset below "mammal" becomes a point of the ball, nearer to the more general
synsets above it than to all others (Nickel & Kiela, 2017). Three optimizers start at
the same points, see the same batches in the same order and get the same seconds:

- the layer metric: RiemannianSGD of this library, softmax Fisher metric on the
  distances, pulled back to the points, on top of the metric of the ball;
- RiemannianSGD and RiemannianAdam of geoopt, with the metric of the ball.

    python examples/wordnet_poincare.py --plot disk.png
    python examples/wordnet_poincare.py --seconds 120 --tune         # the long run
    python examples/wordnet_poincare.py --seconds 120 --tune --dim 5
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import geoopt
import torch
import torch.nn.functional as F
from digits import positive
from torch import Tensor
from tqdm import tqdm
from wordnet import DataError, Sampler, Tree, load, reconstruction

import riemannian_modules as rm

# --- model


class Embedding(torch.nn.Module):
    """Points of the Poincare ball, close to its centre at first; see `forward`."""

    def __init__(self, points: int, dim: int, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        table = torch.rand(points, dim, generator=generator, dtype=torch.float64)
        self.points = torch.nn.Embedding(points, dim, dtype=torch.float64)
        self.points.weight = geoopt.ManifoldParameter(
            (2.0 * table - 1.0) * 1e-3, manifold=rm.manifolds.PoincareBall()
        )

    def forward(self, indices: Tensor) -> Tensor:
        """Return minus the distances ``(n, k)`` of the first point to the k others."""
        points = self.points(indices)
        return -distance(points[:, :1], points[:, 1:])


def distance(x: Tensor, y: Tensor) -> Tensor:
    """Return the distance ``(...)`` of points ``(..., dim)`` of the Poincare ball.

    ``arcosh(1 + 2 a^2) = 2 arsinh(a)`` loses no digits of a small distance, and the
    norm's gradient at a zero distance is zero instead of infinite.
    """
    room = (1.0 - x.square().sum(-1)) * (1.0 - y.square().sum(-1))
    return 2.0 * torch.asinh(torch.linalg.vector_norm(x - y, dim=-1) * room.rsqrt())


def cross_entropy(logits: Tensor) -> Tensor:
    """Return the loss: the first column is the right one."""
    return F.cross_entropy(logits, torch.zeros(len(logits), dtype=torch.long))


# --- the three methods

Step = Callable[[Tensor], None]
Settings = dict[str, float]
# The first setting of each is what --tune chose at the default options: the best MAP
# on TUNING_SEED, burn-in included. Momentum 0.9 for geoopt's RiemannianSGD and other
# betas for its Adam gained at most 0.03 of MAP on that seed.
SETTINGS: dict[str, list[Settings]] = {
    "layer metric": [
        {"lr": ratio * mass, "mass": mass}
        for ratio in (100.0, 30.0)
        for mass in (0.01, 0.03, 0.003)
    ],
    "geoopt RiemannianSGD": [{"lr": lr} for lr in (20, 5, 10, 15, 30, 60)],
    "geoopt RiemannianAdam": [{"lr": lr} for lr in (0.04, 0.01, 0.02, 0.03, 0.06, 0.1)],
}
# In the first tenth of the seconds every method takes a tenth of its learning rate:
# without, points run to the rim before they have found their neighbours.
BURN_IN = 0.1
TUNING_SEED = 1000


def layer_metric(
    model: Embedding, settings: Settings, probes: int | None
) -> tuple[Step, torch.optim.Optimizer]:
    """Return a training step in the layer metric, and its optimizer."""
    output: rm.output.OutputMetric = rm.output.Categorical()
    if probes:
        output = rm.output.Sampled(output, probes=probes)
    metric = rm.LayerwiseMetric(model, output=output, mass=settings["mass"])
    optimizer = rm.optim.RiemannianSGD(metric, lr=settings["lr"])

    def step(batch: Tensor) -> None:
        with metric.record():
            logits = model(batch)
        metric.backward(cross_entropy(logits), logits)
        optimizer.step()

    return step, optimizer


def ordinary(
    model: Embedding, kind: str, settings: Settings
) -> tuple[Step, torch.optim.Optimizer]:
    """Return a training step of one of geoopt's optimizers, and the optimizer."""
    optimizer = getattr(geoopt.optim, kind)(model.parameters(), lr=settings["lr"])

    def step(batch: Tensor) -> None:
        optimizer.zero_grad()
        cross_entropy(model(batch)).backward()
        optimizer.step()

    return step, optimizer


class Run:
    """One method at work; its clock runs during its steps only."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        tree: Tree,
        seed: int,
        options: argparse.Namespace,
    ) -> None:
        self.name, self.settings, self.options = name, settings, options
        self.model = Embedding(len(tree.names), options.dim, seed)
        self.sampler = Sampler(tree, options.negatives, seed)
        if name == "layer metric":
            made = layer_metric(self.model, settings, options.probes)
        else:
            made = ordinary(self.model, name.split()[1], settings)
        self.step, self.optimizer = made
        self.steps, self.seconds = 0, 0.0

    def advance(self) -> None:
        """Take a step."""
        early = self.seconds < BURN_IN * self.options.seconds
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * (BURN_IN if early else 1.0)
        batch = self.sampler.draw(self.options.batch_size)
        begin = time.perf_counter()
        self.step(batch)
        self.seconds += time.perf_counter() - begin
        self.steps += 1

    @torch.no_grad()
    def scores(self, tree: Tree) -> tuple[float, ...]:
        """Return mean rank, MAP, loss on one draw of negatives, steps and seconds."""
        points = self.model.points.weight.detach().as_subclass(Tensor)
        table = distance(points[:, None], points)
        sampler = Sampler(tree, self.options.negatives, seed=0)
        loss = cross_entropy(self.model(sampler.draw(len(sampler.pairs))))
        found = reconstruction(table, tree.related)
        return (*found, float(loss), float(self.steps), self.seconds)


# --- what the user sees


def race(runs: Sequence[Run], title: str) -> None:
    """Let the runs work in turn, always the one whose clock is behind."""
    seconds = runs[0].options.seconds
    bar = tqdm(
        total=len(runs) * seconds,
        desc=title,
        bar_format="{desc} {percentage:3.0f}% |{bar}| {n:.0f}/{total:.0f} s{postfix}",
    )
    with bar:
        while (run := min(runs, key=lambda run: run.seconds)).seconds < seconds:
            run.advance()
            bar.n = min(bar.total, sum(run.seconds for run in runs))
            bar.update(0)
            bar.set_postfix(steps=sum(run.steps for run in runs), refresh=False)


def tuned(tree: Tree, options: argparse.Namespace) -> dict[str, Settings]:
    """Return the settings with the best MAP on one seed, and print all of them."""
    chosen = {}
    for name in options.methods:
        runs = [Run(name, s, tree, TUNING_SEED, options) for s in SETTINGS[name]]
        race(runs, f"tuning {name}")
        precision = []
        for run in runs:
            rank, average, *_ = run.scores(tree)
            print(f"  {said(run.settings)}: mean rank {rank:.2f}, MAP {average:.4f}")
            precision.append(average)
        chosen[name] = SETTINGS[name][precision.index(max(precision))]
    return chosen


def said(settings: Settings) -> str:
    """Return settings as text."""
    return ", ".join(f"{name} {value:g}" for name, value in settings.items())


def table(results: dict[str, list[tuple[float, ...]]]) -> str:
    """Return means over the seeds (and least to most) as aligned text."""
    lines = [
        f"{'optimizer':<21}{'mean rank':>24}{'MAP':>24}{'loss':>24}{'steps':>8}"
        f"{'seconds':>9}"
    ]
    lines.append("-" * len(lines[0]))
    for name, scores in results.items():
        columns = list(zip(*scores, strict=True))
        line = f"{name:<21}"
        for values, digits, width in zip(
            columns, (2, 3, 3), (24, 24, 24), strict=False
        ):
            low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
            mean = f"{statistics.fmean(values):.{digits}f}"
            line += f"{mean} ({low} to {high})".rjust(width)
        steps, seconds = (statistics.fmean(values) for values in columns[3:])
        lines.append(f"{line}{steps:>8.0f}{seconds:>9.1f}")
    return "\n".join(lines)


def plot(runs: Sequence[Run], tree: Tree, path: Path) -> None:
    """Write the disks: points, edges as geodesics, and the names of large groups."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.collections import LineCollection
    from matplotlib.patches import Circle

    figure, panels = plt.subplots(
        1, len(runs), figsize=(6 * len(runs), 6.4), layout="constrained", squeeze=False
    )
    large = tree.related.sum(0).argsort(descending=True)[:30].tolist()
    depth = tree.related.sum(1)
    times = torch.linspace(0.0, 1.0, 64, dtype=torch.float64)[:, None, None]
    for axes, run in zip(panels[0], runs, strict=True):
        points = run.model.points.weight.detach().as_subclass(Tensor)
        below, above = points[tree.edges].unbind(1)
        arcs = rm.manifolds.PoincareBall().geodesic(times, below, above)
        axes.add_collection(
            LineCollection(list(arcs.transpose(0, 1).numpy()), color="0.6", lw=0.35)
        )
        axes.scatter(*points.mT.numpy(), c=depth.numpy(), s=4, cmap="plasma", zorder=2)
        axes.add_patch(Circle((0.0, 0.0), 1.0, fill=False, color="0.3", lw=0.8))
        room = (points[:, None] - points).abs() > torch.tensor([0.4, 0.08])
        named: list[int] = []
        for i in large:
            if not room[i, named].any(-1).all():
                continue
            named.append(i)
            axes.annotate(
                tree.names[i],
                points[i].tolist(),
                fontsize=8,
                ha="center",
                bbox={
                    "boxstyle": "round,pad=0.15",
                    "fc": "white",
                    "ec": "0.7",
                    "lw": 0.5,
                },
            )
        axes.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), aspect="equal", title=run.name)
        axes.set_axis_off()
    figure.savefig(path, dpi=140)
    plt.close(figure)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Poincare embeddings of a subtree of WordNet: the layer metric "
        "next to geoopt's optimizers, for equal seconds."
    )
    add = parser.add_argument
    add("--folder", type=Path, help="of WordNet's data.noun; default: the usual places")
    add("--root", default="mammal", help="a word of one synset only, or its offset")
    add(
        "--methods", nargs="+", choices=SETTINGS, default=list(SETTINGS), metavar="NAME"
    )
    add("--seconds", type=positive(float), default=8.0, help="for each method and seed")
    add("--seeds", type=positive(int), default=3, help="how many starts")
    add("--dim", type=positive(int), default=2)
    add("--batch-size", type=positive(int), default=128)
    add("--negatives", type=positive(int), default=50, help="for each pair")
    add(
        "--probes",
        type=int,
        default=1,
        help="random rows of the Fisher metric for each pair; 0: all",
    )
    add("--tune", action="store_true", help="choose the settings first")
    add("--threads", type=positive(int), default=1, help="of torch")
    add(
        "--plot", type=Path, metavar="FILE.png", help="the first seed's disks (--dim 2)"
    )
    options = parser.parse_args(argv)
    if options.plot and options.dim != 2:
        parser.error(f"--plot draws a disk: it needs --dim 2, not {options.dim}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Race the methods for every seed, print the table and return the exit status.

    Raises:
        SystemExit: the arguments or the data are wrong.
    """
    options = arguments(argv)
    torch.set_num_threads(options.threads)
    try:
        tree = load(options.folder, options.root)
        Sampler(tree, options.negatives, seed=0)
    except DataError as error:
        raise SystemExit(f"wordnet_poincare.py: {error}") from error
    print(
        f"{len(tree.names)} synsets below '{tree.names[0]}', {len(tree.edges)} edges, "
        f"{int(tree.related.sum())} pairs; {options.seconds:g} s for each run\n"
    )
    chosen = {name: SETTINGS[name][0] for name in options.methods}
    for name, settings in chosen.items():  # what only a process's first step costs
        Run(name, settings, tree, TUNING_SEED, options).advance()
    if options.tune:
        chosen = tuned(tree, options)
    results: dict[str, list[tuple[float, ...]]] = {name: [] for name in chosen}
    for seed in range(options.seeds):
        runs = [Run(name, s, tree, seed, options) for name, s in chosen.items()]
        race(runs, f"seed {seed}")
        for run in runs:
            results[run.name].append(run.scores(tree))
        if options.plot and seed == 0:
            plot(runs, tree, options.plot)
    print(f"\n{table(results)}")
    for name, settings in chosen.items():
        print(f"{name}: {said(settings)}")
    if options.plot:
        print(f"disks: {options.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
