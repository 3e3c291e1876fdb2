"""Train a small causal transformer on the characters of a text.

The model is torch's own TransformerEncoder between an embedding and a linear layer,
written without this library. Three methods start at the same weights and see the same
batches in the same order: the layer metric (RiemannianSGD of this library, softmax
Fisher metric with one random row for each sequence), KFAC of this library (such rows,
renewed in every twentieth step and averaged), and Adam of torch.

    python examples/char_transformer.py
    python examples/char_transformer.py --text book.txt
    python examples/char_transformer.py --steps 10000 --plot curves.png  # the long run

Without --text the text is made of the docstrings of the modules of Python's standard
library, so it depends on the version of Python.
"""

import argparse
import ast
import copy
import math
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from digits import DataError, positive
from torch import Tensor, nn
from tqdm import tqdm

import riemannian_modules as rm

METHODS = {"layer": "layer metric", "kfac": "KFAC", "adam": "Adam"}
ALPHABET, OTHER = 127, "\N{WHITE SQUARE}"
HEADS = 4
LOOKS = 25


# --- data


@dataclass(frozen=True)
class Text:
    """Numbers of characters, a tenth of them for validation; the last: all others."""

    train: Tensor
    valid: Tensor
    alphabet: str


def windows(numbers: Tensor, starts: Tensor, length: int) -> Tensor:
    """Return ``(n, length)`` numbers from each start on."""
    return numbers[starts[:, None] + torch.arange(length)]


def docstrings(folder: Path) -> str:
    """Return the docstrings of all modules in a folder, without importing them."""
    found = []
    for path in sorted(folder.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if isinstance(node, kinds):
                found.append(ast.get_docstring(node) or "")
    return "\n\n".join(filter(None, found))


def load(path: Path | None, context: int) -> Text:
    """Return a text file or, with None, the docstrings of the standard library.

    Raises:
        DataError: the file cannot be read or is too short.
    """
    where = path or Path(sysconfig.get_path("stdlib"))
    try:
        text = docstrings(where) if path is None else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"no text in {where}: {error}; pass --text FILE") from error
    if len(text) < 20 * (context + 1):
        raise DataError(
            f"{where} has {len(text)} characters and {20 * (context + 1)} are needed: "
            "pass --text with a longer one or a smaller --context"
        )
    common = Counter(text).most_common(ALPHABET)
    alphabet = "".join(sorted(character for character, _ in common)) + OTHER
    number = {character: i for i, character in enumerate(alphabet)}
    numbers = torch.tensor([number.get(c, len(alphabet) - 1) for c in text])
    split = len(numbers) * 9 // 10
    return Text(numbers[:split], numbers[split:], alphabet)


# --- model


class Transformer(nn.Module):
    """Logits of the next character at every position of at most ``context``."""

    places: Tensor
    mask: Tensor

    def __init__(self, characters: int, context: int, width: int, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, width)
        self.position = nn.Embedding(context, width)
        block = nn.TransformerEncoderLayer(
            width,
            nhead=HEADS,
            dim_feedforward=4 * width,
            dropout=0.0,
            activation="gelu",
            batch_first=True,
            norm_first=True,
        )
        self.blocks = nn.TransformerEncoder(
            block, layers, norm=nn.LayerNorm(width), enable_nested_tensor=False
        )
        self.head = nn.Linear(width, characters)
        self.register_buffer("places", torch.arange(context))
        mask = nn.Transformer.generate_square_subsequent_mask(context)
        self.register_buffer("mask", mask)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``(n, length, characters)`` for numbers ``(n, length)``."""
        length = x.shape[1]
        x = self.embedding(x) + self.position(self.places[:length])
        mask = self.mask[:length, :length]
        return self.head(self.blocks(x, mask=mask, is_causal=True))


def next_character(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy over all positions, in nats."""
    return F.cross_entropy(logits.movedim(-1, 1), target)


@torch.no_grad()
def written(model: Transformer, text: Text, length: int) -> str:
    """Return what the model writes at the start of a line, drawn from its shares."""
    generator = torch.Generator().manual_seed(0)
    numbers = [max(0, text.alphabet.find("\n"))]
    for _ in range(length):
        logits = model(torch.tensor([numbers[-len(model.places) :]]))[0, -1]
        drawn = logits.softmax(-1).multinomial(1, generator=generator)
        numbers.append(int(drawn))
    return "".join(text.alphabet[i] for i in numbers[1:])


# --- the methods

Step = Callable[[Tensor, Tensor], None]
Made = tuple[Step, torch.optim.Optimizer]


def layer_metric(model: Transformer, lr: float, mass: float) -> Made:
    """Return a training step in the layer metric, and its optimizer."""
    output = rm.output.Sampled(rm.output.Categorical())
    metric = rm.LayerwiseMetric(model, output=output, mass=mass)
    return measured(metric, rm.optim.RiemannianSGD(metric, lr=lr))


def kfac(model: Transformer, clip: float, mass: float) -> Made:
    """Return a training step in a metric averaged over batches, and its optimizer."""
    output = rm.output.Sampled(rm.output.Categorical())
    metric = rm.LayerwiseMetric(
        model, output=output, mass=mass, refresh=20, static_graph=True
    )
    return measured(metric, rm.optim.KFAC(metric, clip=clip))


def measured(metric: rm.LayerwiseMetric, optimizer: torch.optim.Optimizer) -> Made:
    """Return a step of an optimizer in a metric, and the optimizer."""

    def step(x: Tensor, target: Tensor) -> None:
        with metric.record():
            logits = metric.model(x)
        metric.backward(next_character(logits, target), logits)
        optimizer.step()

    return step, optimizer


def adam(model: Transformer, lr: float) -> Made:
    """Return a training step of Adam, and Adam."""
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)

    def step(x: Tensor, target: Tensor) -> None:
        optimizer.zero_grad()
        next_character(model(x), target).backward()
        optimizer.step()

    return step, optimizer


def build(method: str, model: Transformer, options: argparse.Namespace) -> Made:
    """Return the step of a method, and its optimizer."""
    if method == "layer":
        return layer_metric(model, options.lr, options.mass)
    if method == "kfac":
        return kfac(model, options.kfac_clip, options.kfac_mass)
    return adam(model, options.adam_lr)


# --- training


@dataclass
class Curve:
    """What one method did: a point for every look, in bits for each character."""

    name: str
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    train: list[float] = field(default_factory=list)
    valid: list[float] = field(default_factory=list)

    def look(self, model: Transformer, text: Text, step: int, seconds: float) -> None:
        """Append a point."""
        self.steps.append(step)
        self.seconds.append(seconds)
        self.train.append(bits(model, text.train))
        self.valid.append(bits(model, text.valid))


@torch.no_grad()
def bits(model: Transformer, numbers: Tensor) -> float:
    """Return the loss on 256 sequences from all over a text."""
    length = len(model.places) + 1
    starts = torch.linspace(0, len(numbers) - length, 256).long()
    found = windows(numbers, starts, length)
    loss = next_character(model(found[:, :-1]), found[:, 1:])
    return float(loss) / math.log(2.0)


def train(
    name: str,
    model: Transformer,
    made: Made,
    text: Text,
    order: Sequence[Tensor],
) -> Curve:
    """Train with a learning rate that falls linearly to zero; the clock stops to look.

    ``made`` is a step and its optimizer; ``order`` says where the sequences begin.
    """
    curve, (step, optimizer) = Curve(name), made
    first = optimizer.param_groups[0]["lr"]
    every = max(1, len(order) // LOOKS)
    seconds = 0.0
    with tqdm(order, desc=f"{name:<12}", unit="step", mininterval=0.5) as bar:
        for count, starts in enumerate(bar):
            if count % every == 0:
                curve.look(model, text, count, seconds)
                bar.set_postfix(bits=f"{curve.valid[-1]:.3f}", refresh=False)
            for group in optimizer.param_groups:
                group["lr"] = first * (1.0 - count / len(order))
            found = windows(text.train, starts, len(model.places) + 1)
            begin = time.perf_counter()
            step(found[:, :-1], found[:, 1:])
            seconds += time.perf_counter() - begin
    curve.look(model, text, len(order), seconds)
    return curve


# --- what the user sees


def table(curves: Sequence[Curve]) -> str:
    """Return the results as aligned text."""
    heads = ("train bits", "validation bits", "steps", "seconds", "ms for a step")
    lines = [f"{'method':<14}" + "".join(f"{head:>17}" for head in heads)]
    lines.append("-" * len(lines[0]))
    for curve in curves:
        steps, seconds = curve.steps[-1], curve.seconds[-1]
        lines.append(
            f"{curve.name:<14}{curve.train[-1]:>17.3f}{curve.valid[-1]:>17.3f}"
            f"{steps:>17}{seconds:>17.1f}{1000 * seconds / steps:>17.1f}"
        )
    return "\n".join(lines)


def plot(curves: Sequence[Curve], path: Path) -> None:
    """Write the curves as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for curve, color in zip(curves, ("#c1272d", "#e08214", "#0b6fa4"), strict=False):
        for axes, x in zip(panels, (curve.steps, curve.seconds), strict=True):
            axes.plot(x, curve.valid, color=color, lw=1.8, label=curve.name)
            axes.plot(x, curve.train, color=color, lw=1.0, ls=":")
    for axes, label in zip(panels, ("steps", "seconds"), strict=True):
        axes.set(xlabel=label, ylabel="bits for each character (dotted: training)")
        axes.grid(visible=True, color="0.9", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle("A causal transformer on characters", fontsize=12)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a small transformer on characters: the layer metric and "
        "KFAC next to Adam."
    )
    add = parser.add_argument
    add("--text", type=Path, help="a file; default: docstrings of Python's library")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--steps", type=positive(int), default=600)
    add("--batch-size", type=positive(int), default=32)
    add("--context", type=positive(int), default=32, help="characters of a sequence")
    add("--layers", type=positive(int), default=2)
    add("--width", type=positive(int), default=64, help="a multiple of 4, the heads")
    add("--lr", type=positive(float), default=0.1, help="in the layer metric")
    add("--mass", type=positive(float), default=0.1, help="of the layer metric")
    # The best of nine settings on seed 0, by validation after 600 steps.
    add("--kfac-clip", type=positive(float), default=0.2, help="length of a step")
    add("--kfac-mass", type=positive(float), default=1e-3)
    # Of 1e-3, 3e-3, 1e-2 and 2e-2 on seed 1000, by validation after 600 steps.
    add("--adam-lr", type=positive(float), default=1e-2)
    add("--seed", type=int, default=0)
    add("--threads", type=positive(int), help="of torch; default: its own")
    add("--plot", type=Path, metavar="FILE.png", help="write the curves")
    options = parser.parse_args(argv)
    if options.width % HEADS:
        parser.error(f"--width {options.width} is not a multiple of {HEADS}")
    return options


def main(argv: Sequence[str] | None = None) -> int:
    """Train with every method, print what they reach and return the exit status.

    Raises:
        SystemExit: the arguments or the text are wrong.
    """
    options = arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        text = load(options.text, options.context)
    except DataError as error:
        raise SystemExit(f"char_transformer.py: {error}") from error
    torch.manual_seed(options.seed)
    size = (len(text.alphabet), options.context, options.width, options.layers)
    start = Transformer(*size)
    generator = torch.Generator().manual_seed(options.seed)
    last = len(text.train) - options.context
    shape = (options.steps, options.batch_size)
    order = list(torch.randint(last, shape, generator=generator))
    print(
        f"{len(text.train)} characters to train on, {len(text.valid)} for validation, "
        f"{len(text.alphabet)} kinds; {sum(p.numel() for p in start.parameters())} "
        f"parameters; {torch.get_num_threads()} threads\n"
    )
    curves, samples = [], []
    for method in options.methods:
        model = copy.deepcopy(start)
        made = build(method, model, options)
        curves.append(train(METHODS[method], model, made, text, order))
        samples.append(f"{METHODS[method]} writes: {written(model, text, 120)!r}")
    print("\n".join(["", table(curves), "", *samples]))
    if options.plot:
        plot(curves, options.plot)
        print(f"\ncurves: {options.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
