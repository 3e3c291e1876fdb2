"""Captured steps leave the same bits as ordinary ones, whatever is trained, and how."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from captured_cases import Training, classes, same_bits, training
from torch import Tensor, nn

import riemannian_modules as rm

Categorical, Euclidean = rm.output.Categorical, rm.output.Euclidean
Bernoulli, Sampled = rm.output.Bernoulli, rm.output.Sampled


class Reads(nn.Module):
    """A model of sequences, read out at their mean or end."""

    def __init__(self, body: nn.Module, width: int, last: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.last = body, nn.Linear(width, 3), last

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        h = h[0][:, -1] if self.last else h.mean(1)
        z: Tensor = self.head(h)
        return z


class Attends(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h: Tensor = self.attend(x, x, x, need_weights=False)[0]
        return h


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)
    return Reads(layer, 4)


def pooled(pool: Callable[[], nn.Module], act: Callable[[], nn.Module]) -> nn.Module:
    layers = nn.Conv2d(1, 2, 3, padding=1), act(), pool(), nn.Flatten()
    return nn.Sequential(*layers, nn.Linear(8, 3))


def between(*inner: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        layers = [make() for make in inner]
        return nn.Sequential(nn.Linear(4, 6), *layers, nn.Linear(6, 3))

    return build


def on(manifold: Callable[[], Any]) -> Callable[[], nn.Module]:
    return lambda: rm.nn.Sequential(
        rm.nn.Linear(4, 3, manifold=manifold()), nn.Tanh(), rm.nn.Linear(3, 3)
    )


class Curved(nn.Module):
    """A point of a manifold that all examples meet."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.point = nn.Parameter(value)
        self.head = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.head(torch.tanh(x[:, :3] @ self.point).view(len(x), -1))
        return z


def curved(manifold: Callable[[], Any], value: Tensor) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        model = Curved(value.clone())
        rm.geometrize(model, {"point": manifold()})
        return model

    return build


def squares(outputs: Tensor, y: Tensor) -> Tensor:
    # torch's binding of this loss has another default than the operation.
    return F.mse_loss(outputs, torch.eye(3).to(outputs)[y])


def coins(outputs: Tensor, y: Tensor) -> Tensor:
    targets = torch.eye(3).to(outputs)[y]
    loss = F.binary_cross_entropy_with_logits(outputs, targets, reduction="sum")
    return loss / len(outputs)


def sampled(**options: Any) -> Callable[[], rm.output.OutputMetric]:
    return lambda: Sampled(Categorical(), **options)


IMAGES, SEQUENCES = classes((1, 4, 4)), classes((3, 4))
SINGLE: dict[str, Any] = {"dtype": torch.float32}
SYMMETRIC = torch.tensor([[2.0, 0.3, 0.0], [0.3, 1.0, 0.1], [0.0, 0.1, 1.5]])

OPTIONS: dict[str, dict[str, Any]] = {
    "automatic": {},
    "lr": {"lr": 0.1},
    "lr is 0": {"lr": 0.0},
    "momentum": {"lr": 0.1, "momentum": 0.9},
    "nesterov": {"lr": 0.1, "momentum": 0.5, "nesterov": True},
    "spring": {"lr": 0.1, "spring": 0.5},
    "decay": {"lr": 0.1, "weight_decay": 0.1},
    "clip": {"lr": 0.5, "clip": 0.01},
    "automatic clip": {"clip": 0.1},
    "normalize": {"lr": 0.1, "normalize": True},
    "no floor": {"floor": None},
    "a floor that losses are below": {"floor": 3.0},
    "maximize": {"lr": 0.01, "maximize": True},
}
CASES: dict[str, Callable[[], Training]] = {
    **{name: training(**options) for name, options in OPTIONS.items()},
    **{
        f"single, {name}": training(**SINGLE, **OPTIONS[name])
        for name in ("automatic", "nesterov")
    },
    "Euclidean": training(output=Euclidean, loss=squares),
    "Euclidean, single": training(output=Euclidean, loss=squares, **SINGLE),
    "Bernoulli": training(output=Bernoulli, loss=coins),
    "sampled Euclidean": training(output=lambda: Sampled(Euclidean()), loss=squares),
    **{
        f"{probes} rows per {per}, {rows}": training(
            output=sampled(probes=probes, per=per, gradient_rows=rows)
        )
        for probes in (0, 2)
        for per in ("example", "batch")
        for rows in (True, False)
        if probes or rows
    },
    "single, rows of the batch": training(output=sampled(per="batch"), **SINGLE),
    **{
        f"blocks of a {blocks}": training(metric={"blocks": blocks})
        for blocks in ("tensor", "layer")
    },
    **{
        f"solver {solver}": training(metric={"solver": solver})
        for solver in ("primal", "cholesky")
    },
    "no gradients": training(metric={"fill_grad": False}),
    "single, no gradients": training(metric={"fill_grad": False}, **SINGLE),
    "sums": training(metric={"reduction": "sum"}),
    "Stiefel": training(on(rm.manifolds.Stiefel)),
    "Stiefel with momentum": training(
        on(rm.manifolds.Stiefel), lr=0.1, momentum=0.9, weight_decay=0.1
    ),
    "Sphere": training(on(rm.manifolds.Sphere)),
    "Positive": training(on(rm.manifolds.Positive)),
    "SPD": training(curved(rm.manifolds.SPD, SYMMETRIC)),
    "PoincareBall": training(curved(rm.manifolds.PoincareBall, 0.2 * SYMMETRIC)),
    "Grassmann": training(on(rm.manifolds.Grassmann)),
    "dropout": training(between(lambda: nn.Dropout(0.3), nn.Tanh)),
    "layer norm": training(between(lambda: nn.LayerNorm(6), nn.GELU)),
    "group norm": training(between(lambda: nn.GroupNorm(2, 6), nn.SiLU)),
    "max pool": training(
        lambda: pooled(lambda: nn.MaxPool2d(2), nn.Tanh), batch=IMAGES
    ),
    "mean pool": training(
        lambda: pooled(lambda: nn.AvgPool2d(2), nn.ReLU), batch=IMAGES
    ),
    "rows of images": training(
        lambda: pooled(lambda: nn.MaxPool2d(2), nn.Tanh),
        sampled(per="batch"),
        batch=IMAGES,
    ),
    "attention": training(lambda: Reads(Attends(), 4), batch=SEQUENCES),
    "encoder": training(encoder, batch=SEQUENCES),
    "lstm": training(
        lambda: Reads(nn.LSTM(4, 3, batch_first=True), 3, last=True), batch=SEQUENCES
    ),
    # Its graph bends tensors in place.
    "gru": training(
        lambda: Reads(nn.GRU(4, 3, batch_first=True), 3, last=True), batch=SEQUENCES
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits(name: str) -> None:
    same_bits(CASES[name], steps=9)
