"""Train a classifier with a Stiefel layer in four ways, from the same start.

The weight of the first layer has orthonormal rows. Four methods see the same
batches in the same order:

- the layer metric: RiemannianSGD of this library, softmax Fisher metric on the
  outputs, pulled back to every layer and inverted exactly; without a learning rate,
  since a step finds its length in the quadratic model of its batch;
- the same with two rows for each example in the place of all nine, that of the gradient
  and a random one, and with steps that are captured: their operations are replayed
  without the Python between them;
- Adam of torch, which takes the Stiefel weight for a plain matrix, so that it leaves
  the manifold and solves an easier problem;
- RiemannianSGD of geoopt, on the same manifold with its own (base) metric.

    python examples/digits.py
    python examples/digits.py --plot digits.png
    python examples/digits.py --data fashion-mnist \
        --folder /usr/share/datasets/fashion-mnist
"""

import argparse
import copy
import gzip
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import geoopt
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import riemannian_modules as rm

DEBIAN_FOLDER = "/usr/share/datasets/fashion-mnist"
TARGETS = {"digits": (0.05, 0.95), "fashion-mnist": (0.5, 0.8)}


class DataError(Exception):
    """The data cannot be read; the message says how to get them."""


# --- data


@dataclass(frozen=True)
class Data:
    """Inputs ``(n, features)`` and labels ``(n,)`` of the two parts."""

    train_x: Tensor
    train_y: Tensor
    valid_x: Tensor
    valid_y: Tensor

    def scaled(self, dtype: torch.dtype) -> "Data":
        """Return the data with the training part centred and of unit variance.

        The mean is taken per feature, the scale over all features: dividing a pixel
        that is almost always dark by its own deviation would blow up its noise.
        """
        mean = self.train_x.double().mean(0)
        scale = (self.train_x.double() - mean).std()
        train_x = ((self.train_x.double() - mean) / scale).to(dtype)
        valid_x = ((self.valid_x.double() - mean) / scale).to(dtype)
        return Data(train_x, self.train_y, valid_x, self.valid_y)


def load_digits(seed: int) -> Data:
    """Return scikit-learn's 1,797 digits of 8 x 8 pixels, 360 of them held out."""
    from sklearn.datasets import load_digits as load

    images, labels = load(return_X_y=True)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    x, y = torch.from_numpy(images)[order], torch.from_numpy(labels).long()[order]
    return Data(x[360:], y[360:], x[:360], y[:360])


def read_idx(path: Path) -> Tensor:
    """Return the array of an IDX file of bytes, ``path`` itself or ``path`` + ".gz".

    Args:
        path: the file, without ".gz".

    Returns:
        A tensor of unsigned bytes.

    Raises:
        DataError: there is no such file, or it is something else.
    """
    packed = path.with_name(path.name + ".gz")
    if path.is_file():
        content = path.read_bytes()
    elif packed.is_file():
        with gzip.open(packed) as stream:
            content = stream.read()
    else:
        raise DataError(f"neither {path} nor {packed.name} exists there")
    if len(content) < 4 or content[:3] != b"\0\0\x08":
        raise DataError(f"{path} is not an IDX file of bytes")
    start = 4 + 4 * content[3]
    shape = np.frombuffer(content[4:start], dtype=">u4").astype(int)
    if len(content) != start + shape.prod():
        raise DataError(
            f"{path} announces the shape {tuple(shape.tolist())} and holds "
            f"{len(content) - start} bytes of it"
        )
    array = np.frombuffer(content, dtype=np.uint8, offset=start).reshape(shape)
    return torch.from_numpy(array.copy())


def load_fashion_mnist(folder: Path | None) -> Data:
    """Return Fashion-MNIST from its four IDX files.

    Args:
        folder: where they are, packed or not.

    Returns:
        60,000 images of 28 x 28 pixels to train on and 10,000 to validate.

    Raises:
        DataError: no folder, or a file is missing or damaged.
    """
    help_text = (
        "Fashion-MNIST is Debian's package dataset-fashion-mnist: run "
        f"'apt-get install dataset-fashion-mnist', then pass --folder {DEBIAN_FOLDER}"
    )
    if folder is None:
        raise DataError(f"--data fashion-mnist needs --folder. {help_text}")
    try:
        parts = [
            read_idx(folder / f"{part}-{content}-ubyte")
            for part in ("train", "t10k")
            for content in ("images-idx3", "labels-idx1")
        ]
    except DataError as error:
        raise DataError(f"{error}. {help_text}") from error
    train_x, train_y, valid_x, valid_y = parts
    return Data(train_x.flatten(1), train_y.long(), valid_x.flatten(1), valid_y.long())


def batches(data: Data, size: int, epochs: int, seed: int) -> Iterator[Tensor]:
    """Yield the indices of full batches, the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        order = torch.randperm(len(data.train_x), generator=generator)
        yield from order.split(size)[: len(order) // size]


# --- the four methods

Step = Callable[[Tensor, Tensor], None]


def make_model(
    data: Data, width: int, seed: int, dtype: torch.dtype
) -> rm.nn.Sequential:
    """Return a network of two layers, the first with orthonormal rows."""
    torch.manual_seed(seed)
    features, classes = data.train_x.shape[1], int(data.train_y.max()) + 1
    return rm.nn.Sequential(
        rm.nn.Linear(features, width, manifold=rm.manifolds.Stiefel(), dtype=dtype),
        torch.nn.Tanh(),
        rm.nn.Linear(width, classes, dtype=dtype),
    )


def layer_metric(
    model: torch.nn.Module,
    output: rm.output.OutputMetric,
    lr: float | None,
    mass: float,
    *,
    captured: bool = False,
) -> tuple[Step, rm.optim.RiemannianSGD]:
    """Return a training step in the layer metric, and its optimizer.

    Args:
        model: the network.
        output: metric on its outputs.
        lr: step length; None: each step finds its own.
        mass: how much the base metric of every parameter counts.
        captured: whether to replay the operations of a step.
    """
    metric = rm.LayerwiseMetric(
        model, output, mass=mass, static_graph=captured, fill_grad=not captured
    )
    optimizer = rm.optim.RiemannianSGD(metric, lr=lr)

    def step(x: Tensor, y: Tensor) -> None:
        with metric.record():
            logits = model(x)
        metric.backward(F.cross_entropy(logits, y), logits)
        optimizer.step()

    return rm.optim.CapturedStep(optimizer, step) if captured else step, optimizer


def ordinary(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> Step:
    """Return a training step of any other optimizer."""

    def step(x: Tensor, y: Tensor) -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()

    return step


# --- training


@dataclass
class Curve:
    """What one method did: a point for every look at the whole data."""

    name: str
    steps: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    defect: float = 0.0

    def first(self, reached: Iterable[bool]) -> str:
        """Return the first step at which something was reached, or a dash."""
        found = (step for step, now in zip(self.steps, reached, strict=True) if now)
        return str(next(found, "-"))

    def look(
        self, model: torch.nn.Module, data: Data, step: int, seconds: float
    ) -> None:
        """Append a point: loss on all training data, accuracy on validation data."""
        with torch.no_grad():
            loss = F.cross_entropy(model(data.train_x), data.train_y)
            correct = model(data.valid_x).argmax(-1) == data.valid_y
        self.steps.append(step)
        self.seconds.append(seconds)
        self.loss.append(float(loss))
        self.accuracy.append(float(correct.double().mean()))


def train(
    name: str, model: torch.nn.Module, step: Step, data: Data, order: Sequence[Tensor]
) -> Curve:
    """Train, and look at the model now and then; the clock stops while looking."""
    curve = Curve(name)
    every = max(1, len(order) * len(data.train_x) // 3_000_000)
    seconds = 0.0
    curve.look(model, data, 0, seconds)
    with tqdm(order, desc=f"{name:<21}", unit="step", mininterval=0.5) as bar:
        for count, chosen in enumerate(bar, start=1):
            x, y = data.train_x[chosen], data.train_y[chosen]
            begin = time.perf_counter()
            step(x, y)
            seconds += time.perf_counter() - begin
            if count % every == 0 or count == len(order):
                curve.look(model, data, count, seconds)
                bar.set_postfix(loss=f"{curve.loss[-1]:.4f}", refresh=False)
    weight = model[0].weight.detach().as_subclass(Tensor)
    gram = weight @ weight.mT if len(weight) <= weight.shape[1] else weight.mT @ weight
    curve.defect = float((gram - torch.eye(len(gram), dtype=gram.dtype)).norm())
    return curve


# --- what the user sees


def table(curves: Sequence[Curve], loss: float, accuracy: float) -> str:
    """Return the results, and when loss and accuracy were reached, as aligned text."""
    rows = [
        (
            "method",
            "train loss",
            "validation",
            "steps",
            f"to loss {loss}",
            f"to {100 * accuracy:.0f} %",
            "seconds",
            "|WW^T - I|",
        )
    ]
    rows += [
        (
            curve.name,
            f"{curve.loss[-1]:.4f}",
            f"{100 * curve.accuracy[-1]:.1f} %",
            str(curve.steps[-1]),
            curve.first(value <= loss for value in curve.loss),
            curve.first(value >= accuracy for value in curve.accuracy),
            f"{curve.seconds[-1]:.2f}",
            f"{curve.defect:.1e}",
        )
        for curve in curves
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def plot(curves: Sequence[Curve], path: Path, title: str) -> None:
    """Write the curves as a picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (by_step, by_second, accuracy) = plt.subplots(
        1, 3, figsize=(13, 4), layout="constrained"
    )
    colors = ("#c1272d", "#0b6fa4", "#5f6b6d", "#e08214")
    for curve, color in zip(curves, colors, strict=False):
        style = {"color": color, "linewidth": 1.8, "label": curve.name}
        by_step.semilogy(curve.steps, curve.loss, **style)
        by_second.loglog(curve.seconds[1:], curve.loss[1:], **style)
        percent = [100 * value for value in curve.accuracy]
        accuracy.plot(curve.steps, percent, **style)
    by_step.set(xlabel="steps", ylabel="loss on the training data")
    by_second.set(xlabel="seconds", ylabel="loss on the training data")
    best = 100 * max(value for curve in curves for value in curve.accuracy)
    accuracy.set(
        xlabel="steps", ylabel="validation accuracy in %", ylim=(best - 12, best + 0.6)
    )
    for axes in (by_step, by_second, accuracy):
        axes.grid(visible=True, which="major", color="0.9", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    by_step.legend(frameon=False)
    figure.suptitle(title, fontsize=12)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def positive(kind: type) -> Callable[[str], float]:
    """Return an argparse type: a positive number of this kind."""

    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text} is not positive and finite")
        return value

    parse.__name__ = kind.__name__
    return parse


# Digits: the fewest steps to a training loss of 0.05, as a mean of three seeds and
# splits. Layer metric: mass 0.01, 0.03, 0.1, 0.3, 1; Adam: lr 0.003, 0.01, 0.03, 0.1,
# 0.3, 1; geoopt: lr 0.1, 0.3, 1 times momentum 0, 0.9. Fashion-MNIST: the lowest
# training loss, one seed, three settings for each method, after one epoch; of the layer
# metric (mass 0.1, 1, 10) after 150 steps.
TUNED = {
    "digits": {"epochs": 10, "mass": 0.1, "adam": 0.1, "geoopt": 0.3},
    "fashion-mnist": {"epochs": 1, "mass": 1.0, "adam": 3e-3, "geoopt": 0.03},
}
MOMENTUM = 0.9


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; what is not given has the tuned value of the data."""
    parser = argparse.ArgumentParser(
        description="Train a classifier with a Stiefel layer: the layer metric next "
        "to Adam and geoopt's RiemannianSGD, from the same start."
    )
    parser.add_argument("--data", choices=sorted(TUNED), default="digits")
    parser.add_argument("--folder", type=Path, help="of the files of fashion-mnist")
    parser.add_argument("--epochs", type=positive(int), help="passes over the data")
    parser.add_argument("--batch-size", type=positive(int), default=128)
    parser.add_argument(
        "--lr",
        type=positive(float),
        help="step length in the layer metric; default: every step finds its own",
    )
    parser.add_argument("--mass", type=positive(float), help="mass of the layer metric")
    parser.add_argument(
        "--probes",
        type=positive(int),
        default=1,
        help="random rows of the output metric for each example, of the second method",
    )
    parser.add_argument("--width", type=positive(int), default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("float32", "float64"), default="float32")
    parser.add_argument(
        "--threads", type=positive(int), help="of torch; default: its own"
    )
    parser.add_argument(
        "--plot", type=Path, metavar="FILE.png", help="write the curves"
    )
    options = parser.parse_args(argv)
    for name in ("epochs", "mass"):
        if getattr(options, name) is None:
            setattr(options, name, TUNED[options.data][name])
    return options


def load(options: argparse.Namespace) -> Data:
    """Return the data that the options ask for.

    Args:
        options: of the command line.

    Returns:
        The data, scaled.

    Raises:
        DataError: no data, or fewer examples than one batch.
    """
    if options.data == "digits":
        raw = load_digits(options.seed)
    else:
        raw = load_fashion_mnist(options.folder)
    if options.batch_size > len(raw.train_x):
        raise DataError(
            f"--batch-size {options.batch_size} is more than the {len(raw.train_x)} "
            "training examples"
        )
    return raw.scaled(getattr(torch, options.dtype))


def main(argv: Sequence[str] | None = None) -> int:
    """Train four times, print the table and the report of the last step.

    Args:
        argv: the command line; None: that of the process.

    Returns:
        The exit status.

    Raises:
        SystemExit: the arguments or the data are wrong.
    """
    options = arguments(argv)
    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        data = load(options)
    except DataError as error:
        raise SystemExit(f"digits.py: {error}") from error
    tuned = TUNED[options.data]
    dtype = getattr(torch, options.dtype)
    start = make_model(data, options.width, options.seed, dtype)
    order = list(batches(data, options.batch_size, options.epochs, options.seed))
    output = rm.output.Categorical()
    print(
        f"{start}\n{options.data}: {len(data.train_x)} training examples, "
        f"{len(data.valid_x)} for validation; {torch.get_num_threads()} threads\n"
    )

    model = copy.deepcopy(start)
    step, optimizer = layer_metric(model, output, options.lr, options.mass)
    curves = [train("layer metric", model, step, data, order)]

    model = copy.deepcopy(start)
    torch.manual_seed(options.seed)
    sampled = rm.output.Sampled(output, probes=options.probes)
    step, _ = layer_metric(model, sampled, options.lr, options.mass, captured=True)
    curves.append(train("layer metric, sampled", model, step, data, order))

    model = copy.deepcopy(start)
    adam = torch.optim.Adam(model.parameters(), lr=tuned["adam"])
    curves.append(
        train("Adam (leaves Stiefel)", model, ordinary(model, adam), data, order)
    )

    model = copy.deepcopy(start)
    rsgd = geoopt.optim.RiemannianSGD(
        model.parameters(), lr=tuned["geoopt"], momentum=MOMENTUM
    )
    curves.append(
        train("geoopt RiemannianSGD", model, ordinary(model, rsgd), data, order)
    )

    print(f"\n{table(curves, *TARGETS[options.data])}")
    print("\nThe last step in the layer metric, by layer:\n")
    print(optimizer.report)
    if options.plot:
        plot(curves, options.plot, f"{options.data}: a Stiefel layer in four ways")
        print(f"\ncurves: {options.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
