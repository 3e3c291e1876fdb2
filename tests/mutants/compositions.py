"""Compositions with one mistake each: in the value, in the reverse pass, or between."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from riemannian_modules import nn as rnn


class LastIterationOnly(rnn.FixedPoint):
    """Differentiates one evaluation at the fixed point and forgets the inverse."""

    def forward(self, x, start=None):
        with torch.no_grad():
            z = super().forward(x, start)
        return self.step(x, z)


class Unsolved(rnn.FixedPoint):
    """Stops long before it has converged."""

    def __init__(self, module, size):
        few = rnn.Picard(iterations=3)
        super().__init__(module, size, solver=few, on_failure="ignore")


def untransposed(system) -> rnn.Adjoint:
    """Solves with ``df/dz`` where the adjoint asks for its transpose."""
    inverse = torch.linalg.inv(system.matrix()).mT
    good = torch.ones(len(inverse), dtype=torch.bool)

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        return (v.reshape(len(v), 1, -1) @ inverse).view(v.shape), good

    return rnn.Adjoint(solve, torch.zeros(len(inverse)), good)


def neumann(system) -> rnn.Adjoint:
    """Two terms of the series, and says that it has converged."""
    good = torch.ones(len(system.image), dtype=torch.bool)

    def solve(v: Tensor) -> tuple[Tensor, Tensor]:
        u = v
        for _ in range(2):
            u = v + u - system.apply(u)
        return u, good

    return rnn.Adjoint(solve, torch.zeros(len(good)), good)


class Untransposed(rnn.FixedPoint):
    def __init__(self, module, size):
        super().__init__(module, size, adjoint=untransposed)


class TwoTerms(rnn.FixedPoint):
    def __init__(self, module, size):
        super().__init__(module, size, adjoint=neumann)


class FirstExample:
    """Calls all examples converged when the first one is."""

    def __call__(self, step, start):
        single = rnn.Picard()(lambda z: step(z.expand(start.shape))[:1], start[:1])
        z = start
        for _ in range(single.iterations):
            z = step(z)
        good = torch.ones(len(start), dtype=torch.bool)
        return rnn.Solved(z, good, single.iterations)


class Mixed:
    """One mixing weight for the whole batch, and few iterations of it."""

    def __call__(self, step, start):
        batch = rnn.Anderson(tolerance=1e-3, memory=2)
        found = batch(lambda z: step(z[0]).unsqueeze(0), start.unsqueeze(0))
        good = torch.ones(len(start), dtype=torch.bool)
        return replace(found, value=found.value[0], converged=good)


class OpenLoop(rnn.Feedback):
    """Nothing comes back."""

    def forward(self, x, start=None):
        return self.ahead(x)


class CutLoop(rnn.Feedback):
    """What comes back carries no derivative."""

    def forward(self, x, start=None):
        y = super().forward(x, start).detach()
        return self.ahead(x + self.back(y).detach())


class ForgetfulResidual(rnn.Residual):
    """The identity is there going forward and not in reverse."""

    def forward(self, x):
        return x.detach() + self.scale * self.module(x)


class UnscaledReverse(rnn.Residual):
    """The scale is there going forward and not in reverse."""

    def forward(self, x):
        branch = self.module(x)
        return x + branch + ((self.scale - 1.0) * branch).detach()


class SwappedGate(rnn.Gate):
    def forward(self, *inputs):
        return torch.sigmoid(self.value(*inputs)) * self.gate(*inputs)


class HalfGate(rnn.Gate):
    """The gate learns nothing."""

    def forward(self, *inputs):
        return torch.sigmoid(self.gate(*inputs)).detach() * self.value(*inputs)


class MeanParallel(rnn.Parallel):
    def forward(self, *inputs):
        return super().forward(*inputs) / len(self.branches)


class OnceParallel(rnn.Parallel):
    """A branch that is there twice counts once."""

    @property
    def branches(self):
        return list(self.children())


class BackwardsParallel(rnn.Parallel):
    """Concatenates in the wrong order."""

    @property
    def branches(self):
        return super().branches[::-1]


class CrossedJoin(rnn.Join):
    def forward(self, *inputs):
        return super().forward(*inputs[::-1])


class TruncatedRecurrent(rnn.Recurrent):
    """Cuts the graph between times."""

    def forward(self, x, state=None):
        cell = self.cell
        self.cell = Cut(cell)
        try:
            return super().forward(x, state)
        finally:
            self.cell = cell


class Cut(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell = cell

    def forward(self, x, h):
        return self.cell(x, h.detach())


class LateRecurrent(rnn.Recurrent):
    """Returns each state before its update."""

    def forward(self, x, state=None):
        after = super().forward(x, state)
        return torch.cat([torch.zeros_like(after[:, :1]), after[:, :-1]], 1)


class ReversedChain(rnn.Sequential):
    def forward(self, *inputs):
        (value,) = inputs
        for child in reversed(list(self)):
            value = child(value)
        return value


class CutHeads(rnn.Heads):
    """Only the first head teaches the trunk."""

    def forward(self, *inputs):
        shared = self.trunk(*inputs)
        first, *others = self.heads.items()
        outputs = {first[0]: first[1](shared)}
        return outputs | {name: head(shared.detach()) for name, head in others}


def layer(inputs: int, outputs: int, gain: float = 1.0) -> nn.Module:
    """A linear layer of a spectral norm that is known, and not symmetric."""
    made = rnn.Linear(inputs, outputs)
    with torch.no_grad():
        made.weight.mul_(gain / torch.linalg.matrix_norm(made.weight, 2))
    return made


def body(inputs: int, state: int) -> nn.Module:
    """A contraction in its second argument."""
    joined = rnn.Join(layer(inputs, state), layer(state, state, 0.3))
    return rnn.Sequential(joined, nn.Tanh())


def before(middle: nn.Module, wide: int = 3) -> nn.Module:
    return rnn.Sequential(layer(4, 3), nn.Tanh(), middle, layer(wide, 3))


def over_time(recurrent: nn.Module) -> nn.Module:
    return rnn.Sequential(
        nn.Unflatten(1, (4, 1)), recurrent, nn.Flatten(), layer(12, 3)
    )


# Name: what makes the right one, what makes the wrong one.
Maker = Callable[[], nn.Module]
TWINS: dict[str, tuple[Maker, Maker]] = {}


def twins(name: str, right: type, wrong: type, make: Callable[[type], nn.Module]):
    TWINS[name] = (lambda: make(right), lambda: make(wrong))


for name, wrong in {
    "fixed point, last iteration only": LastIterationOnly,
    "fixed point, unsolved": Unsolved,
    "fixed point, untransposed": Untransposed,
    "fixed point, two terms": TwoTerms,
}.items():
    twins(name, rnn.FixedPoint, wrong, lambda kind: before(kind(body(3, 3), 3)))
for name, wrong in {"open loop": OpenLoop, "cut loop": CutLoop}.items():
    twins(
        name,
        rnn.Feedback,
        wrong,
        lambda kind: before(
            kind(rnn.Sequential(layer(3, 2), nn.Tanh()), layer(2, 3, 0.3)), 2
        ),
    )
for name, wrong in {
    "residual without identity": ForgetfulResidual,
    "residual without scale": UnscaledReverse,
}.items():
    twins(name, rnn.Residual, wrong, lambda kind: before(kind(layer(3, 3), 0.5)))
for name, wrong in {"swapped gate": SwappedGate, "half a gate": HalfGate}.items():
    twins(name, rnn.Gate, wrong, lambda kind: before(kind(layer(3, 3), layer(3, 3))))
twins(
    "mean for a sum",
    rnn.Parallel,
    MeanParallel,
    lambda kind: before(kind(layer(3, 3), layer(3, 3))),
)


def repeated(kind: type) -> nn.Module:
    shared = layer(3, 3)
    return before(kind(shared, shared))


twins("once for twice", rnn.Parallel, OnceParallel, repeated)
twins(
    "backwards concatenation",
    rnn.Parallel,
    BackwardsParallel,
    lambda kind: before(kind(layer(3, 2), layer(3, 3), combine="concat"), 5),
)


def crossed(kind: type) -> nn.Module:
    map_ = rnn.Sequential(kind(layer(3, 3), layer(3, 3, 0.3)), nn.Tanh())
    return before(rnn.FixedPoint(map_, 3))


twins("crossed inputs", rnn.Join, CrossedJoin, crossed)
for name, wrong in {
    "truncated recurrence": TruncatedRecurrent,
    "late recurrence": LateRecurrent,
}.items():
    twins(name, rnn.Recurrent, wrong, lambda kind: over_time(kind(body(1, 3), 3)))
twins(
    "reversed chain",
    rnn.Sequential,
    ReversedChain,
    lambda kind: before(kind(layer(3, 3), nn.Tanh())),
)

HEADS: tuple[type, type] = (rnn.Heads, CutHeads)
SOLVERS = {"the first example": FirstExample, "one mixing weight": Mixed}
