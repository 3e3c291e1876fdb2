"""Parameters that examples meet in sums and products need no replay."""

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_models import grad_jacobian, trainable

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError

WIDTH, LONG = 6, 9

# What a parameter is multiplied with is not looked for with every torch.
needs_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell whether saved tensors have hooks",
)


class Tokens(nn.Module):
    """Adds something of its own to embedded tokens, then what drops out at random."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.last = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)
        self.build()

    def build(self) -> None:
        self.own = nn.Parameter(torch.randn(LONG, WIDTH))

    def add(self, h: Tensor) -> Tensor:
        return h + self.own[: h.shape[1]]

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(self.add(self.enter(x)), 0.3)
        return self.last(torch.tanh(h)).sum(1)


class Vision(Tokens):
    """A class token in front, and learned positions for all."""

    def build(self) -> None:
        self.token = nn.Parameter(torch.randn(1, 1, WIDTH))
        self.own = nn.Parameter(torch.randn(1, LONG, WIDTH))

    def add(self, h: Tensor) -> Tensor:
        h = torch.cat([self.token.expand(len(h), -1, -1), h], 1)
        return h + self.own[:, : h.shape[1]]


class Repeated(Vision):
    def add(self, h: Tensor) -> Tensor:
        h = torch.cat([h, self.token.repeat(len(h), 1, 1)], 1)
        return self.own[:, : h.shape[1]] - 2.0 * h


class Looked(Tokens):
    """Positions from a table, the same for all examples."""

    def build(self) -> None:
        self.own = nn.Embedding(LONG, WIDTH)

    def add(self, h: Tensor) -> Tensor:
        return h + self.own(torch.arange(h.shape[1]))


class LookedAsOne(Looked):
    def add(self, h: Tensor) -> Tensor:
        return h + self.own(torch.arange(h.shape[1]).unsqueeze(0))


class Scaled(Tokens):
    """A scale and a shift for every feature, and one number for all."""

    def build(self) -> None:
        self.scale = nn.Parameter(torch.randn(WIDTH))
        self.shift = nn.Parameter(torch.randn(WIDTH))
        self.all = nn.Parameter(torch.tensor(0.7))

    def add(self, h: Tensor) -> Tensor:
        return torch.sub(h * self.scale, self.shift, alpha=0.5) * self.all.exp()


class SequenceFirst(Tokens):
    def build(self) -> None:
        self.own = nn.Parameter(torch.randn(LONG, 1, WIDTH))

    def add(self, h: Tensor) -> Tensor:
        h = h.transpose(0, 1)
        return (h + self.own[: len(h)]).transpose(0, 1)


class Twice(Tokens):
    """Used in two ways at once."""

    def add(self, h: Tensor) -> Tensor:
        own = self.own[: h.shape[1]]
        return h * own.tanh() + own


class OfAParent(Tokens):
    """Handed to a child, which adds it."""

    class Adds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, h: Tensor, own: Tensor) -> Tensor:
            return self.layer(h) + own

    def build(self) -> None:
        super().build()
        self.child = self.Adds()

    def add(self, h: Tensor) -> Tensor:
        return self.child(h, self.own[: h.shape[1]])


SUMS: list[Callable[[], nn.Module]] = [
    *(Tokens, Vision, Repeated, Looked, LookedAsOne, SequenceFirst, OfAParent),
]
PRODUCTS: list[Callable[[], nn.Module]] = [Scaled, Twice]
MODELS = [*SUMS, *(pytest.param(each, marks=needs_hooks) for each in PRODUCTS)]


def gap(model: nn.Module, sizes: list[tuple[int, int]], **options: bool) -> float:
    """The largest error of a factor, against autograd on the very same graph."""
    metric = rm.LayerwiseMetric(
        model, rm.output.Euclidean(), reduction="sum", mass=0.1, **options
    )
    worst = 0.0
    for n, length in sizes:
        with metric.record():
            z = model(torch.randn(n, length, 3))
        dense = grad_jacobian([z], trainable(model))
        metric.backward(z.square().sum(), z)
        parts = [part for block in metric.blocks.values() for part in block.parts]
        assert {part.name for part in parts} == set(dense)
        for part in parts:
            rows = part.factor.to_dense().flatten(1)
            own = rows.unflatten(0, (-1, n)).transpose(0, 1)
            error = (own - dense[part.name]).norm() / dense[part.name].norm()
            worst = max(worst, float(error))
    return worst


SIZES = [(4, 5), (3, 3), (1, 4), (5, 1), (2, 2)]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("model", MODELS)
def test_rows_are_those_of_the_graph(
    model: Callable[[], nn.Module], static: bool
) -> None:
    torch.manual_seed(0)
    sizes = [(4, 5)] * 6 if static else SIZES
    assert gap(model(), sizes, static_graph=static) < 1e-12


@pytest.mark.usefixtures("no_replay")
@pytest.mark.parametrize(
    "model",
    [each for each in MODELS if each not in (Looked, LookedAsOne, Repeated, OfAParent)],
)
def test_nothing_runs_again(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert gap(model(), [(4, 5), (3, 3)]) < 1e-12


@pytest.mark.parametrize("model", MODELS)
def test_a_single_example_first(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert gap(model(), [(1, 4), (4, 4), (4, 1), (1, 1)]) < 1e-12


class Sorted(Tokens):
    """Used in a way that is not understood, so that the module has to run again."""

    def build(self) -> None:
        self.own = nn.Parameter(torch.randn(WIDTH))

    def add(self, h: Tensor) -> Tensor:
        return torch.maximum(h, self.own) + self.own


def test_other_uses_are_replayed_or_refused() -> None:
    torch.manual_seed(0)
    with pytest.raises(LinearizationError, match=r"'own'.*dropout"):
        gap(Sorted(), [(4, 5)])

    class Still(Sorted):
        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.add(self.enter(x)))).sum(1)

    assert gap(Still(), SIZES) < 1e-12


def test_what_all_examples_share_is_refused() -> None:
    class Mean(Tokens):
        def add(self, h: Tensor) -> Tensor:
            return h + self.own[: h.shape[1]] + h.mean(0)

    with pytest.raises(LinearizationError, match="interact"):
        gap(Mean(), [(4, 5)])


def test_on_a_manifold_and_sampled() -> None:
    torch.manual_seed(0)
    model = Vision()
    rm.geometrize(model, {"own": rm.manifolds.Sphere()})
    output = rm.output.Sampled(rm.output.Categorical())
    metric = rm.LayerwiseMetric(model, output, mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric)
    x, y = torch.randn(8, 5, 3), torch.arange(8) % 2
    for _ in range(4):
        with metric.record():
            z = model(x)
        metric.backward(F.cross_entropy(z, y), z)
        found, start = metric.natural_gradient(), model.own.detach().clone()
        assert (found["own"] * start).sum(-1).abs().max() < 1e-12
        for block in metric.blocks.values():
            assert block.rank == 16
        optimizer.step()
    own = model.own.detach()
    torch.testing.assert_close(own.norm(dim=-1), torch.ones(1, LONG))


@needs_hooks
def test_an_activation_that_is_changed_afterwards() -> None:
    class Scales(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.last = nn.Parameter(torch.ones(3)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = x + 1.0
            z = self.last(h * self.scale)
            self.kept = h
            return z

    model = Scales()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    for changed in (False, False, True):
        with metric.record():
            z = model(torch.randn(4, 3))
        if changed:
            model.kept.mul_(2.0)
            with pytest.raises((LinearizationError, RuntimeError), match=r"in.?place"):
                metric.backward(z.square().mean(), z)
        else:
            metric.backward(z.square().mean(), z)


class Drops(nn.Module):
    """A block that is left out at random, as its ``forward`` decides."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.randn(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        if random.random() < 0.5:
            return h
        return h + self.scale * torch.tanh(self.inner(h))


class DropsAnyUse(Drops):
    """What it does with its parameter is not understood, so that it would run again."""

    def forward(self, h: Tensor) -> Tensor:
        if random.random() < 0.5:
            return h
        return h + torch.maximum(self.inner(h), self.scale)


class DropsAFactor(Drops):
    """Of two parameters of its own one is left out."""

    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.randn(WIDTH))

    def forward(self, h: Tensor) -> Tensor:
        h = h + self.shift
        return h if random.random() < 0.5 else h * self.scale


def dropping(kind: type[Drops], blocks: int) -> nn.Sequential:
    inner = (layer for _ in range(blocks) for layer in (kind(), nn.Tanh()))
    return nn.Sequential(nn.Linear(3, WIDTH), *inner, nn.Linear(WIDTH, 2))


@needs_hooks
@pytest.mark.parametrize("kind", [Drops, DropsAFactor])
def test_blocks_that_are_left_out_at_random(kind: type[Drops]) -> None:
    torch.manual_seed(0)
    random.seed(1)
    model = dropping(kind, 3)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), reduction="sum", mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.01)
    resting, n = set(), 4
    for _ in range(24):
        with metric.record():
            z = model(torch.randn(n, 3))
        dense = grad_jacobian([z], trainable(model))
        metric.backward(z.square().sum(), z)
        parts = {p.name: p for b in metric.blocks.values() for p in b.parts}
        for name, rows in dense.items():
            factor = parts[name].factor if name in parts else None
            if factor is None:
                assert not rows.any()
                assert model.get_parameter(name).grad is None
                resting.add(name)
                continue
            own = factor.to_dense().flatten(1).unflatten(0, (-1, n)).transpose(0, 1)
            assert (own - rows).norm() < 1e-12 * rows.norm()
        optimizer.step()
    assert {f"{i}.scale" for i in (1, 3, 5)} <= resting < set(dense)


def test_a_block_that_would_run_again_says_that_it_is_random() -> None:
    torch.manual_seed(0)
    random.seed(1)
    model = dropping(DropsAnyUse, 1)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    seen = set()
    for _ in range(12):
        with metric.record():
            z = model(torch.randn(6, 3))
        used = bool(grad_jacobian([z], trainable(model))["1.scale"].any())
        seen.add(used)
        if used:
            with pytest.raises(LinearizationError, match=r"'1\.scale'.*another branch"):
                metric.backward(z.square().mean(), z)
        else:
            metric.backward(z.square().mean(), z)
            assert model.get_parameter("1.scale").grad is None
    assert seen == {True, False}
