"""Train a small convolutional network with Stiefel filters on Fashion-MNIST.

The filters of both convolutions, one for each row of a matrix, are orthonormal. Four
methods start at the same network and see the same batches in the same order:

- the layer metric: RiemannianSGD of this library, softmax Fisher metric on the
  outputs (one random row for each image), pulled back to every layer;
- KFAC of this library: such rows, renewed in every tenth step and averaged;
- Adam of torch, which takes the filters for plain numbers and leaves the manifold;
- RiemannianAdam of geoopt, on the same manifold with its own (base) metric.

    python examples/fashion_mnist_cnn.py
    python examples/fashion_mnist_cnn.py --epochs 10 --plot cnn.png   # the long run
    python examples/fashion_mnist_cnn.py --folder path/of/the/four/files
"""

import argparse
import copy
import time
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import geoopt
import torch
import torch.nn.functional as F
from digits import (
    DEBIAN_FOLDER,
    Curve,
    Data,
    DataError,
    Step,
    batches,
    layer_metric,
    load_fashion_mnist,
    ordinary,
    plot,
    positive,
    table,
)
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR
from tqdm import tqdm

import riemannian_modules as rm

METHODS = {
    "layer": "layer metric",
    "kfac": "KFAC",
    "adam": "Adam (leaves Stiefel)",
    "geoopt": "geoopt RiemannianAdam",
}
TARGETS = (0.4, 0.84)
LOOKS = 25
GLANCE = 2000


CONVOLUTIONS = ("1", "4")


def make_model(seed: int) -> nn.Sequential:
    """Return two convolutions and two linear layers for 28 x 28 pixels.

    The model is torch's own; only then it is said where its filters live.
    """
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Unflatten(1, (1, 28, 28)),
        nn.Conv2d(1, 16, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 5),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(512, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    filters = {f"{name}.weight": rm.manifolds.Stiefel() for name in CONVOLUTIONS}
    rm.geometrize(model, filters)
    return model


def defect(layer: nn.Module) -> float:
    """Return how far the filters of a convolution are from orthonormal ones."""
    weight = layer.get_parameter("weight").detach().as_subclass(Tensor).flatten(1)
    return float((weight @ weight.mT - torch.eye(len(weight))).norm())


def train(
    name: str,
    model: nn.Sequential,
    made: tuple[Step, Optimizer],
    data: Data,
    order: Sequence[Tensor],
) -> Curve:
    """Train with a learning rate that falls to zero along a cosine.

    Some images are looked at now and then, and in the end all for validation; the
    clock stops while looking. ``made`` is a step and its optimizer.
    """
    curve, (step, optimizer) = Curve(name), made
    schedule = CosineAnnealingLR(optimizer, len(order))
    some = Data(*(getattr(data, part.name)[:GLANCE] for part in fields(data)))
    every = max(1, len(order) // LOOKS)
    seconds = 0.0
    with tqdm(order, desc=f"{name:<23}", unit="step", mininterval=0.5) as bar:
        for count, chosen in enumerate(bar):
            if count % every == 0:
                curve.look(model, some, count, seconds)
                bar.set_postfix(loss=f"{curve.loss[-1]:.4f}", refresh=False)
            x, y = data.train_x[chosen], data.train_y[chosen]
            begin = time.perf_counter()
            step(x, y)
            schedule.step()
            seconds += time.perf_counter() - begin
    everything = replace(some, valid_x=data.valid_x, valid_y=data.valid_y)
    curve.look(model, everything, len(order), seconds)
    curve.defect = max(defect(model.get_submodule(name)) for name in CONVOLUTIONS)
    return curve


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description="Train a convolutional network with Stiefel filters on "
        "Fashion-MNIST: the layer metric and KFAC next to Adam and geoopt's "
        "RiemannianAdam."
    )
    add = parser.add_argument
    add("--folder", type=Path, default=Path(DEBIAN_FOLDER), help="of the four files")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--epochs", type=positive(int), default=1, help="passes over the images")
    add("--images", type=positive(int), default=60_000, help="to train on")
    add("--batch-size", type=positive(int), default=128)
    add("--lr", type=positive(float), default=0.03, help="in the layer metric")
    add("--mass", type=positive(float), default=0.1, help="of the layer metric")
    add("--kfac-lr", type=positive(float), default=1.0)
    add("--kfac-mass", type=positive(float), default=1e-2)
    # By the training loss after one epoch on seed 1000: of 3e-4, 1e-3, 3e-3 and 1e-2
    # for Adam, of 1e-3, 3e-3, 1e-2 and 3e-2 for geoopt; the two largest again on seed 0
    # when the learning rate began to fall.
    add("--adam-lr", type=positive(float), default=1e-2)
    add("--geoopt-lr", type=positive(float), default=1e-2)
    add("--seed", type=int, default=0)
    add("--threads", type=positive(int), help="of torch; default: its own")
    add("--plot", type=Path, metavar="FILE.png", help="write the curves")
    options = parser.parse_args(argv)
    if options.plot and len(options.methods) != len(METHODS):
        parser.error("--plot compares all methods: leave --methods out")
    return options


def kfac(model: nn.Module, options: argparse.Namespace) -> tuple[Step, Optimizer]:
    """Return a training step of KFAC, and KFAC."""
    metric = rm.LayerwiseMetric(
        model,
        rm.output.Sampled(rm.output.Categorical()),
        mass=options.kfac_mass,
        refresh=10,
        static_graph=True,
    )
    optimizer = rm.optim.KFAC(metric, lr=options.kfac_lr)

    def step(x: Tensor, y: Tensor) -> None:
        with metric.record():
            logits = model(x)
        metric.backward(F.cross_entropy(logits, y), logits)
        optimizer.step()

    return step, optimizer


def adam(model: nn.Module, method: str, options: argparse.Namespace) -> Optimizer:
    """Return torch's Adam or geoopt's."""
    if method == "adam":
        return torch.optim.Adam(model.parameters(), lr=options.adam_lr)
    return geoopt.optim.RiemannianAdam(model.parameters(), lr=options.geoopt_lr)


def load(options: argparse.Namespace) -> Data:
    """Return the images, scaled, as many as the options ask for.

    Args:
        options: of the command line.

    Raises:
        DataError: no data, or fewer images than one batch.
    """
    raw = load_fashion_mnist(options.folder)
    if raw.train_x.shape[1] != 28 * 28:
        raise DataError(f"the images have {raw.train_x.shape[1]} pixels, not 28 x 28")
    x, y = raw.train_x[: options.images], raw.train_y[: options.images]
    if options.batch_size > len(x):
        raise DataError(
            f"--batch-size {options.batch_size} is more than the {len(x)} images"
        )
    return replace(raw, train_x=x, train_y=y).scaled(torch.float32)


def main(argv: Sequence[str] | None = None) -> int:
    """Train with every method and print the table.

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
        raise SystemExit(f"fashion_mnist_cnn.py: {error}") from error
    start = make_model(options.seed)
    order = list(batches(data, options.batch_size, options.epochs, options.seed))
    print(
        f"{start}\n{len(data.train_x)} images to train on, {len(data.valid_x)} for "
        f"validation; {torch.get_num_threads()} threads\n"
    )
    curves, report = [], None
    for method in options.methods:
        model = copy.deepcopy(start)
        made: tuple[Step, Optimizer]
        if method == "layer":
            output = rm.output.Sampled(rm.output.Categorical())
            made = layer_metric(model, output, options.lr, options.mass)
            report = made[1]
        elif method == "kfac":
            made = kfac(model, options)
        else:
            optimizer = adam(model, method, options)
            made = ordinary(model, optimizer), optimizer
        curves.append(train(METHODS[method], model, made, data, order))
    print(f"\n{table(curves, *TARGETS)}")
    if report:
        print(f"\nThe last step in the layer metric, by layer:\n\n{report.report}")
    if options.plot:
        plot(curves, options.plot, "Fashion-MNIST: convolutions with Stiefel filters")
        print(f"\ncurves: {options.plot}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
