"""The registry of cases that the laws run over: manifolds, outputs with losses, models.

Everything is made when asked for, in the default data type of torch at that time.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import geoopt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.output import OutputMetric

Loss = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Base:
    """A base manifold with the shape of a weight ``(out, in)`` on it."""

    manifold: Callable[[], geoopt.Manifold]
    shape: tuple[int, int]


BASES: dict[str, Base] = {
    "euclidean": Base(rm.manifolds.Euclidean, (3, 4)),
    "stiefel-wide": Base(rm.manifolds.Stiefel, (3, 5)),
    "stiefel-tall": Base(rm.manifolds.Stiefel, (5, 3)),
    "stiefel-square": Base(rm.manifolds.Stiefel, (4, 4)),
    "canonical-wide": Base(rm.manifolds.CanonicalStiefel, (3, 5)),
    "canonical-tall": Base(rm.manifolds.CanonicalStiefel, (5, 3)),
    "canonical-square": Base(rm.manifolds.CanonicalStiefel, (4, 4)),
    "sphere": Base(rm.manifolds.Sphere, (3, 4)),
    "poincare": Base(rm.manifolds.PoincareBall, (3, 4)),
    "poincare-c2": Base(lambda: rm.manifolds.PoincareBall(c=2.0), (3, 4)),
    "spd": Base(rm.manifolds.SPD, (4, 4)),
}


class UnitRows(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(z + 0.5, dim=-1)


class InBall(nn.Module):
    def forward(self, z: Tensor) -> Tensor:
        return 0.8 * z / (1.0 + z.square().sum(-1, keepdim=True)).sqrt()


class Positive(nn.Module):
    """Vectors of length 4 to 2 x 2 positive definite matrices."""

    def forward(self, z: Tensor) -> Tensor:
        a = z.unflatten(-1, (2, 2))
        return a @ a.mT + torch.eye(2, dtype=z.dtype)


@dataclass(frozen=True)
class Output:
    """An output metric, a loss that suits it, and what makes outputs of vectors."""

    metric: Callable[[], OutputMetric]
    loss: Callable[[Tensor, Tensor, str], Tensor]
    width: int = 3
    head: Callable[[], nn.Module] | None = None
    positions: bool = True

    def loss_for(self, z: Tensor, reduction: str = "mean", seed: int = 5) -> Loss:
        """Return the loss with random targets for outputs of the shape of ``z``."""
        generator = torch.Generator().manual_seed(seed)
        target = torch.rand(z.shape, generator=generator, dtype=torch.float64).to(z)
        return lambda outputs: self.loss(outputs, target, reduction)


def covariance() -> Tensor:
    return torch.tensor([[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]])


def squares(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    each = 0.5 * (z - t).square().flatten(1).sum(1)
    return each.mean() if reduction == "mean" else each.sum()


def cross_entropy(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(z.movedim(-1, 1), t.argmax(-1), reduction=reduction)


def smoothed(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    return F.cross_entropy(
        z.movedim(-1, 1), t.argmax(-1), reduction=reduction, label_smoothing=0.2
    )


def coins(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    return F.binary_cross_entropy_with_logits(z, t.round(), reduction=reduction)


def counts(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    return F.poisson_nll_loss(z, (4 * t).round(), log_input=True, reduction=reduction)


def normal(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    precision = covariance().to(z).inverse()
    each = 0.5 * torch.einsum("...i,ij,...j->...", z - t, precision, z - t)
    return each.mean() if reduction == "mean" else each.sum()


def normal_log_variance(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    mean, s = z.chunk(2, -1)
    return F.gaussian_nll_loss(
        mean, t[..., : mean.shape[-1]], s.exp(), reduction=reduction
    )


def normal_log_std(z: Tensor, t: Tensor, reduction: str) -> Tensor:
    mean, s = z.chunk(2, -1)
    return F.gaussian_nll_loss(
        mean, t[..., : mean.shape[-1]], (2 * s).exp(), reduction=reduction
    )


def on(manifold: Callable[[], geoopt.Manifold]) -> Callable[[], OutputMetric]:
    return lambda: rm.output.OnManifold(manifold())


OUTPUTS: dict[str, Output] = {
    "euclidean": Output(rm.output.Euclidean, squares),
    "euclidean-mse": Output(
        lambda: rm.output.Euclidean(scale=2 / 3),
        lambda z, t, reduction: F.mse_loss(z, t, reduction=reduction),
    ),
    "categorical": Output(rm.output.Categorical, cross_entropy),
    "categorical-smoothed": Output(rm.output.Categorical, smoothed, width=4),
    "bernoulli": Output(rm.output.Bernoulli, coins),
    "poisson": Output(rm.output.Poisson, counts, width=2),
    "gaussian": Output(lambda: rm.output.Gaussian(covariance()), normal),
    "gaussian-log-variance": Output(
        lambda: rm.output.Gaussian(learned="log_variance"), normal_log_variance, width=4
    ),
    "gaussian-log-std": Output(
        lambda: rm.output.Gaussian(learned="log_std"), normal_log_std, width=4
    ),
    # The loss of a manifold's outputs has a part across the manifold: the rest.
    "on-sphere": Output(on(rm.manifolds.Sphere), squares, head=UnitRows),
    "on-ball": Output(on(rm.manifolds.PoincareBall), squares, head=InBall),
    "on-spd": Output(on(rm.manifolds.SPD), squares, 4, Positive, positions=False),
}


def chain(
    base: str = "euclidean",
    output: str = "categorical",
    *,
    bias: bool = True,
    manifold_last: bool = False,
) -> nn.Sequential:
    """Return two linear layers, the first (or both) on a manifold, and the head."""
    case, target = BASES[base], OUTPUTS[output]
    (out, width), kind = case.shape, case.manifold
    last = kind() if manifold_last and not base.startswith("spd") else None
    layers: list[nn.Module] = [
        rm.nn.Linear(width, out, bias, manifold=kind()),
        nn.Tanh(),
        rm.nn.Linear(out, target.width, bias, manifold=last),
    ]
    if target.head is not None:
        layers.append(target.head())
    model = rm.nn.Sequential(*layers)
    spread(model)
    return model


def spread(model: nn.Module) -> None:
    """Move points of the ball away from the origin, where its metric is flat."""
    with torch.no_grad():
        for parameter in model.parameters():
            base = rm.manifolds.base_of(getattr(parameter, "manifold", None))
            if isinstance(base, geoopt.PoincareBall):
                unit = F.normalize(torch.randn_like(parameter), dim=-1)
                radius = torch.linspace(0.2, 0.7, len(parameter)) / float(base.c) ** 0.5
                parameter.copy_(radius.unsqueeze(-1) * unit)


def inputs(model: nn.Module, n: int, positions: Sequence[int] = ()) -> Tensor:
    first = next(m for m in model.modules() if isinstance(m, nn.Linear))
    return torch.randn(n, *positions, first.in_features)


class Twice(nn.Module):
    """A layer that is used twice."""

    def __init__(self, base: str, width: int) -> None:
        super().__init__()
        side = max(BASES[base].shape)
        self.inner = rm.nn.Linear(side, side, manifold=BASES[base].manifold())
        self.outer = nn.Linear(side, width)
        spread(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.outer(torch.tanh(self.inner(torch.tanh(self.inner(x)))))


class Tied(nn.Module):
    """Two layers that share a weight."""

    def __init__(self, base: str, width: int) -> None:
        super().__init__()
        side = max(BASES[base].shape)
        self.first = rm.nn.Linear(side, side, manifold=BASES[base].manifold())
        self.second = nn.Linear(side, side)
        self.second.weight = self.first.weight
        self.outer = nn.Linear(side, width)
        spread(self)

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.outer(hidden)


class Branches(nn.Module):
    """A residual branch, a gate and a concatenation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.gate = rm.nn.Linear(4, 4, bias=False, manifold=rm.manifolds.Stiefel())
        self.last = nn.Linear(8, width)

    def forward(self, x: Tensor) -> Tensor:
        z = x + torch.tanh(self.first(x))
        gated = z * torch.sigmoid(self.gate(z))
        return self.last(torch.cat([z, gated], -1))


def place(model: nn.Module, name: str, manifold: geoopt.Manifold) -> None:
    """Put a parameter at a random point of a manifold."""
    with torch.no_grad():
        parameter = model.get_parameter(name)
        unit = F.normalize(torch.randn_like(parameter), dim=-1)
        if isinstance(manifold, rm.manifolds.Positive):
            unit = (0.5 * unit).exp()
        parameter.copy_(0.6 * unit)
    rm.geometrize(model, {name: manifold})


class CurvedBiases(nn.Module):
    """Biases that live on manifolds, one of them in two layers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3), nn.Linear(3, 3)
        self.third, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, width)
        self.third.bias = self.second.bias
        self.norm = nn.LayerNorm(3)
        place(self, "first.bias", rm.manifolds.Positive())
        place(self, "second.bias", rm.manifolds.PoincareBall())
        place(self, "last.bias", rm.manifolds.Lorentz())
        place(self, "norm.weight", rm.manifolds.Positive())
        place(self, "norm.bias", rm.manifolds.Scaled(rm.manifolds.Sphere(), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.last(torch.tanh(self.third(self.norm(hidden))))


class Scalars(nn.Module):
    """Parameters of shape (): a scale on two branches, and a temperature."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, width)
        self.scale = nn.Parameter(torch.tensor(0.7))
        self.temperature = nn.Parameter(torch.tensor(1.3))
        rm.geometrize(self, {"temperature": rm.manifolds.Positive()})

    def forward(self, x: Tensor) -> Tensor:
        hidden = x + self.scale * torch.tanh(self.first(self.scale * x))
        return self.second(hidden) / self.temperature


MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": lambda: chain("stiefel-wide", bias=True),
    "twice": lambda: Twice("stiefel-square", 3),
    "tied": lambda: Tied("sphere", 3),
    "branches": lambda: Branches(3),
    "curved-biases": lambda: CurvedBiases(3),
    "scalars": lambda: Scalars(3),
}
