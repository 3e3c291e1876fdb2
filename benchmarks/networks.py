"""Classifiers and autoencoders on small images."""

from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from benchmarks.models import mlp
from benchmarks.problem import (
    NetworkProblem,
    Target,
    UnavailableError,
    default_type,
    example,
)

WIDTHS = (64, 128, 64, 32, 16, 32, 64, 128, 64)
FASHION_PLACES = (
    "/usr/share/datasets/fashion-mnist",
    "/usr/share/dataset-fashion-mnist",
)


class Classifier(NetworkProblem):
    """Cross-entropy of a chain of ReLU layers."""

    kind = "network"

    def __init__(
        self,
        train: tuple[Tensor, Tensor],
        valid: tuple[Tensor, Tensor],
        sizes: tuple[int, ...],
        batch: int | None,
    ) -> None:
        super().__init__(*train, batch)
        self.valid, self.sizes, self.outputs = valid, sizes, sizes[-1]
        self.glance = train

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        with default_type(torch.float32):
            return mlp(self.sizes)

    def criterion(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(outputs, y)

    def output(self) -> rm.output.OutputMetric:
        return rm.output.Categorical()

    def loss_module(self) -> nn.Module | None:
        return nn.CrossEntropyLoss()

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        x, y = self.glance
        right = model(self.valid[0]).argmax(-1) == self.valid[1]
        return {
            "loss": float(F.cross_entropy(model(x), y)),
            "accuracy": float(right.double().mean()),
        }


class Digits(Classifier):
    """An MLP 64-256-256-10 on scikit-learn's digits, 360 of them held out."""

    tune_on = "target"

    def __init__(self, batch: int | None) -> None:
        data = example("digits").load_digits(0).scaled(torch.float32)
        train, valid = (data.train_x, data.train_y), (data.valid_x, data.valid_y)
        super().__init__(train, valid, (64, 256, 256, 10), batch)
        self.name = "digits" if batch else "digits-full"
        how = f"batch {batch}" if batch else "full batch"
        self.title = f"Digits, MLP 64-256-256-10, {how}"
        self.seconds = 2.0 if batch else 4.0
        self.targets = (Target("loss", 0.05), Target("loss", 1e-3))


class FashionMnist(Classifier):
    """An MLP 784-256-256-10 on Fashion-MNIST.

    All methods have the seconds that two epochs of Adam take, which are measured.
    """

    name = "fashion-mnist"
    title = "Fashion-MNIST, MLP 784-256-256-10, batch 128, seconds of two Adam epochs"
    measure = "accuracy"
    targets = (Target("accuracy", 0.85),)
    dense = 0
    growth = 1 / 4
    adam_epochs = 2

    def __init__(self, folder: Path | None = None) -> None:
        module = example("digits")
        known = [Path(place) for place in FASHION_PLACES]
        there = [place for place in known if place.is_dir()]
        place = folder or (there[0] if there else known[0])
        try:
            data = module.load_fashion_mnist(place)
        except module.DataError as error:
            raise UnavailableError(str(error)) from error
        # The mean and deviation of all training pixels.
        x, valid_x = (
            (part.float() / 255.0 - 0.2860) / 0.3530
            for part in (data.train_x, data.valid_x)
        )
        sizes = (x.shape[1], 256, 256, 10)
        super().__init__((x, data.train_y), (valid_x, data.valid_y), sizes, 128)
        self.glance = x[:5000], data.train_y[:5000]
        self.steps_per_epoch = len(x) // 128
        self.seconds = 3.0  # until it is measured


class Autoencoder(NetworkProblem):
    """A deep tanh autoencoder of all 1,797 digits, mean squared error."""

    kind = "network"
    outputs = WIDTHS[-1]
    masses = (1e-4, 1e-3, 1e-2)

    def __init__(self, batch: int | None) -> None:
        data = example("digits").load_digits(0)
        x = torch.cat([data.train_x, data.valid_x]).float() / 16.0
        super().__init__(x, x, batch)
        self.name = "autoencoder" if batch else "autoencoder-full"
        how = f"batch {batch}" if batch else "full batch"
        self.title = f"Deep autoencoder on digits, {how}"
        self.seconds = 8.0 if batch else 15.0
        self.targets = (Target("loss", 1e-2), Target("loss", 3e-3))

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        layers: list[nn.Module] = []
        with default_type(torch.float32):
            for before, after in pairwise(WIDTHS):
                layers += [nn.Linear(before, after), nn.Tanh()]
        return nn.Sequential(*layers[:-1])

    def criterion(self, outputs: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(outputs, y)

    def output(self) -> rm.output.OutputMetric:
        return rm.output.Euclidean(2.0 / WIDTHS[-1])

    def loss_module(self) -> nn.Module | None:
        return nn.MSELoss()

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        return {"loss": float(F.mse_loss(model(self.x), self.y))}
