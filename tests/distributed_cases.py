"""Models that are trained by several processes, and by one with the joined batch."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.functional import DifferentialOperator
from riemannian_modules.model_metric import ModelMetric

Sizes = tuple[int, ...]


class Blind(rm.output.OutputMetric):
    """Rows that do not span the gradient, without the dice of sampled rows."""

    def factor(self, outputs: Tensor) -> Tensor:
        return outputs.detach().tanh().unsqueeze(1) + 0.1

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, cotangent


class Tokens(nn.Module):
    """An embedding whose weight is also the last layer's, and attention between."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        h = self.embedding(tokens)
        h = h + self.attention(h, h, h, need_weights=False)[0]
        logits: Tensor = self.head(h)
        return logits


class Routed(nn.Module):
    """Uses one of its layers only where an example asks for it."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.seldom = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh()
        if bool((x[:, 0] > 0).any()):
            h = h + (x[:, :1] > 0) * self.seldom(h)
        y: Tensor = self.last(h)
        return y


class Sometimes(nn.Module):
    """Has stored rows for all examples, and a layer that only some of them use."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.seldom = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x * self.scale
        if bool((x[:, 0] > 0).any()):
            h = h + (x[:, :1] > 0) * self.seldom(x)
        return h


class TwoHeads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Linear(3, 6)
        self.one, self.other = nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x).tanh()
        return {"one": self.one(h), "other": self.other(h)}


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 4))


def curved() -> nn.Module:
    return nn.Sequential(
        rm.nn.Linear(3, 8, manifold=rm.manifolds.Sphere()),
        nn.Tanh(),
        rm.nn.Linear(8, 4, manifold=rm.manifolds.Stiefel()),
    )


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(12, 4),
    )


def features(n: int, *shape: int) -> Tensor:
    return torch.randn(n, *(shape or (3,)))


def entropy(outputs: Any, n: Tensor) -> Tensor:
    flat = outputs.flatten(0, -2)
    return F.cross_entropy(flat, n.flatten() % flat.shape[-1])


def both(outputs: Any, n: Tensor) -> Tensor:
    target = torch.stack([n.cos(), n.sin()], 1)
    return entropy(outputs["one"], n) + F.mse_loss(outputs["other"], target)


@dataclass(frozen=True)
class Case:
    """A model, its loss, and how it is measured.

    Attributes:
        model: makes the model.
        batch: makes the inputs of n examples.
        loss: loss of the outputs and the examples' numbers.
        output: metric on the outputs.
        options: of the metric; what is a function makes the option.
        optimizer: of RiemannianSGD; None: the optimizer below.
        searching: makes an optimizer that looks at the loss anew.
        functional: a function of the model and one example, for a FunctionalMetric; or
            several, which all get the same examples.
        tokens: positions of each example, which have a number of their own.
        sizes: numbers of examples of the passes that a batch takes; the rest are one
            more pass.
        even: whether all processes have equally many examples.
        dtype: data type of the model.
        tolerance: what joined steps may differ by, relative to the largest entry.
    """

    model: Callable[[], nn.Module] = mlp
    batch: Callable[[int], Tensor] = features
    loss: Callable[[Any, Tensor], Tensor] = entropy
    output: Any = field(default_factory=rm.output.Categorical)
    options: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] | None = field(default_factory=lambda: {"lr": 0.3})
    searching: Callable[[Any], Any] = rm.optim.LevenbergMarquardt
    functional: Any = None
    tokens: int = 1
    sizes: Sizes = ()
    even: bool = False
    dtype: torch.dtype = torch.float64
    tolerance: float = 1e-10

    def metric(self, model: nn.Module) -> ModelMetric:
        if self.functional is not None:
            return rm.functional.FunctionalMetric(
                model, self.functional, self.output, **self.options
            )
        options = {"mass": 0.1, **self.options}
        made = {k: v() if callable(v) else v for k, v in options.items()}
        return rm.LayerwiseMetric(model, self.output, **made)

    def steps(self, metric: ModelMetric) -> Any:
        if self.optimizer is None:
            return self.searching(metric)
        return rm.optim.RiemannianSGD(metric, **self.optimizer)

    def numbers(self, n: int) -> Tensor:
        return torch.arange(n * self.tokens).view(n, -1).squeeze(-1)

    def given(self, x: Tensor) -> Any:
        """What a FunctionalMetric is called with."""
        return dict.fromkeys(self.output, x) if isinstance(self.output, dict) else x

    def differentiate(self, metric: ModelMetric, x: Tensor, numbers: Tensor) -> None:
        """Record and go backward, in one pass or several."""
        if not isinstance(metric, rm.LayerwiseMetric):
            outputs = metric(self.given(x))  # type: ignore[operator]
            metric.backward(self.loss(outputs, numbers), outputs)  # type: ignore[operator]
            return
        ends = [*accumulate(self.sizes), len(x)]
        for start, stop in pairwise([0, *ends]):
            with metric.record():
                outputs = metric.model(x[start:stop])
            loss = self.loss(outputs, numbers[start:stop])
            metric.backward(loss, outputs, accumulate=stop < len(x))

    def step(
        self, metric: ModelMetric, optimizer: Any, x: Tensor, numbers: Tensor
    ) -> None:
        """Record, go backward, step."""
        self.differentiate(metric, x, numbers)
        if isinstance(optimizer, rm.optim.KFAC):
            optimizer.step()
            return
        if isinstance(optimizer, rm.optim.GaussNewton):
            optimizer.step(lambda: metric.model(x), lambda z: self.loss(z, numbers))
            return

        def again() -> Tensor:
            if isinstance(metric, rm.LayerwiseMetric):
                return self.loss(metric.model(x), numbers)
            return self.loss(metric(self.given(x)), numbers)  # type: ignore[operator]

        optimizer.step(*([again] if self.optimizer is None else []))


def slope(net: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jacrev(net)(x)[0] - x.cos()


def smooth() -> nn.Module:
    return nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1))


def half_mean(outputs: Any, n: Tensor) -> Tensor:
    return 0.5 * outputs.square().sum(-1).mean()


def half_means(outputs: Any, n: Tensor) -> Tensor:
    return torch.stack([half_mean(each, n) for each in outputs.values()]).sum()


# Two rows for each point of one, and one for each of the other.
SETS = Case(
    model=lambda: nn.Sequential(nn.Linear(2, 6), nn.Tanh(), nn.Linear(6, 2)),
    batch=lambda n: features(n, 2),
    output={"in": rm.output.Euclidean(), "on": rm.output.Euclidean()},
    loss=half_means,
    functional={
        "in": DifferentialOperator(lambda u, z: u.d(0) - u.d(1, 1)),
        "on": DifferentialOperator(lambda u, z: u.value[:1] - 1.0),
    },
    optimizer=None,
    options={"mass": 1e-2},
)

CASES: dict[str, Case] = {
    "layer": Case(),
    "tensor": Case(options={"blocks": "tensor"}),
    "model": Case(options={"blocks": "model"}, optimizer={"lr": 1.0}),
    "sum": Case(
        loss=lambda z, n: F.cross_entropy(z, n % 4, reduction="sum"),
        options={"reduction": "sum"},
        optimizer={"lr": 0.1},
    ),
    "curved": Case(
        model=curved,
        optimizer={"lr": 0.1, "momentum": 0.5, "weight_decay": 0.01},
    ),
    "convolution": Case(model=convolutional, batch=lambda n: features(n, 1, 4, 4)),
    "primal": Case(
        model=lambda: nn.Linear(1, 2, bias=False), batch=lambda n: features(n, 1)
    ),
    "rest": Case(output=Blind(), options={"mass": 1.0}, optimizer={"lr": 0.1}),
    "rest, model": Case(
        output=Blind(),
        options={"mass": 1.0, "blocks": "model"},
        optimizer={"lr": 0.1, "momentum": 0.5},
    ),
    "no output metric": Case(output=None, options={"mass": 1.0}),
    "tokens": Case(
        model=Tokens,
        batch=lambda n: torch.randint(7, (n, 3)),
        tokens=3,
    ),
    "routed": Case(
        model=Routed,
        batch=lambda n: features(n) - 3.0 * (torch.arange(n) > 1).unsqueeze(1),
    ),
    "two outputs": Case(
        model=TwoHeads,
        loss=both,
        output={"one": rm.output.Categorical(), "other": rm.output.Euclidean()},
    ),
    "masses": Case(
        options={
            "mass": {
                "*.bias": 0.3,
                "0.weight": (torch.linspace(0.1, 0.2, 8), torch.linspace(0.2, 0.3, 3)),
                "2.weight": torch.linspace(0.1, 0.2, 32).view(4, 8),
            }
        }
    ),
    "Levenberg-Marquardt": Case(optimizer=None, options={"mass": 1.0}),
    "Gauss-Newton": Case(
        optimizer=None, searching=rm.optim.GaussNewton, options={"mass": 1e-2}
    ),
    "Gauss-Newton, sum": Case(
        loss=lambda z, n: F.cross_entropy(z, n % 4, reduction="sum"),
        optimizer=None,
        searching=rm.optim.GaussNewton,
        options={"mass": 1e-2, "reduction": "sum"},
    ),
    "Armijo": Case(
        model=curved,
        optimizer=None,
        searching=rm.optim.LineSearch,
        options={"mass": 1.0},
    ),
    "strong Wolfe": Case(
        model=curved,
        optimizer=None,
        searching=lambda m: rm.optim.LineSearch(m, rm.optim.StrongWolfe()),
        options={"mass": 1.0},
    ),
    "trust region": Case(
        optimizer=None, searching=rm.optim.TrustRegion, options={"mass": 1e-2}
    ),
    "K-FAC": Case(
        model=curved,
        optimizer=None,
        searching=lambda m: rm.optim.KFAC(m, rank=1),
        options={"refresh": 3},
    ),
    "history": Case(options={"history": 2}),
    "refresh": Case(options={"refresh": 2, "mass": 1.0}, optimizer={"lr": 0.1}),
    "largest": Case(options={"rows": rm.rows.Largest(6), "blocks": "model"}),
    "pivoted": Case(options={"rows": rm.rows.Pivoted(6), "history": 1}),
    "sketch": Case(
        options={
            "rows": lambda: rm.rows.Sketch(
                5, generator=torch.Generator().manual_seed(7)
            )
        }
    ),
    # Dice of each process: nothing to compare with but the other processes.
    "sketch of the global dice": Case(
        options={"rows": rm.rows.Sketch(5), "history": 1}, tolerance=float("inf")
    ),
    "in passes": Case(sizes=(1, 1)),
    "in passes, with a history": Case(
        sizes=(1,), options={"history": 1}, optimizer={"lr": 0.3, "momentum": 0.5}
    ),
    "in passes, some of stored rows": Case(
        model=Sometimes,
        # The first example of each process does not use the layer.
        batch=lambda n: (
            features(n, 4).abs() * (1.0 - 2.0 * (torch.arange(n) % 5 < 1))[:, None]
        ),
        sizes=(1,),
    ),
    "functional": Case(
        model=smooth,
        batch=lambda n: features(n, 1),
        output=rm.output.Euclidean(),
        loss=half_mean,
        functional=slope,
        optimizer=None,
        options={"mass": 1e-2},
    ),
    "sets of points": SETS,
    "sets of points, evenly": replace(SETS, even=True),
    "float32": Case(dtype=torch.float32, tolerance=1e-4),
}
