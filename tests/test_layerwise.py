"""The geometry of a model: its blocks, its reverse pass and what may be recorded."""

import copy
import pickle
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import riemannian_modules as rm
from riemannian_modules import carry
from riemannian_modules.recorder import Recorder
from riemannian_modules.testing.reference import (
    dense_factor,
    dense_natural_gradient,
)

X = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 1])


def cross_entropy(outputs: Tensor) -> Tensor:
    return F.cross_entropy(outputs, TARGET)


def chain(activation: nn.Module | None = None) -> nn.Sequential:
    return rm.nn.Sequential(
        rm.nn.Linear(5, 4, manifold=rm.manifolds.Stiefel()),
        activation or nn.Tanh(),
        nn.Linear(4, 3),
    )


def layer_metric(model: nn.Module, **options: Any) -> rm.LayerwiseMetric:
    options = {"output": rm.output.Categorical(), "mass": 0.1, **options}
    return rm.LayerwiseMetric(model, **options)


def backward(metric: rm.LayerwiseMetric, x: Tensor = X) -> Tensor:
    with metric.record():
        outputs = metric.model(x)
    loss = cross_entropy(outputs)
    metric.backward(loss, outputs)
    return loss.detach()


def assert_close(one: dict[str, Tensor], other: dict[str, Tensor], tol: float) -> None:
    assert sorted(one) == sorted(other)
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=tol, atol=tol)


# --- which way the reverse pass takes


class NoBatching(torch.autograd.Function):
    """tanh, without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.tanh()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        # A host copy: no tensor of vmap can go through numpy.
        slope = torch.from_numpy(1.0 - y.numpy() ** 2)
        return torch.from_numpy(gradient.numpy() * slope.numpy())


class Unbatched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return NoBatching.apply(x)


@contextmanager
def spied(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[bool | None, bool]]]:
    """Collect (asked for, found) of every reverse pass."""
    ways: list[tuple[bool | None, bool]] = []
    reverse_passes = carry.reverse_passes

    def spy(*args: Any, **options: Any) -> Any:
        found = reverse_passes(*args, **options)
        ways.append((options["batched"], found[1]))
        return found

    with monkeypatch.context() as patch:
        patch.setattr(carry, "reverse_passes", spy)
        # Without the looks at where the examples are.
        patch.setattr(Recorder, "_scales", lambda *_: None)
        yield ways


def compiled_tanh() -> nn.Module:
    return torch.compile(nn.Tanh(), backend="aot_eager")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize(
    ("make", "ways"),
    [(Unbatched, {False}), (compiled_tanh, {False, True})],
    ids=["no vmap rule", "compiled"],
)
def test_every_way_back_finds_the_same(
    make: Any, ways: set[bool], blocks: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = chain()
    looped = copy.deepcopy(plain)
    looped[1] = make()
    found = []
    # Which way a compiled graph takes is its backend's affair: this one may batch.
    for model, allowed in ((plain, {True}), (looped, ways)):
        metric = layer_metric(model, blocks=blocks)
        with spied(monkeypatch) as taken:
            for _ in range(3):
                backward(metric)
        batched = taken[0][1]
        assert batched in allowed
        # The first pass carries its probes as well.
        assert taken[0] == (None, batched)
        assert taken[-2:] == [(batched, batched), (batched, batched)]
        assert {way for _, way in taken} == {batched}
        gradient = {n: p.grad for n, p in model.named_parameters()}
        found.append((metric.natural_gradient(), gradient))
    assert_close(found[1][0], found[0][0], 1e-12)
    assert_close(found[1][1], found[0][1], 1e-13)


@pytest.mark.filterwarnings("ignore")
def test_the_loop_takes_a_training_step() -> None:
    model = chain(Unbatched())
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.3, momentum=0.5)
    losses = []
    for _ in range(5):
        losses.append(float(backward(metric)))
        optimizer.step()
    assert losses[-1] < losses[0]


def test_a_graph_of_another_shape_is_looked_at_anew(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.last = nn.Linear(5, 3)
            self.twice = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).tanh()
            return self.last(self.first(x).tanh() if self.twice else x)

    model = Sometimes()
    metric = layer_metric(model)
    with spied(monkeypatch) as ways:
        for model.twice in (False, True, False, True):
            backward(metric)
            expected = dense_natural_gradient(
                model, rm.output.Categorical(), X, cross_entropy, mass=0.1
            )
            assert_close(metric.natural_gradient(), expected, 1e-10)
    # Two first passes, which carry their probes as well.
    assert [asked for asked, _ in ways] == [*4 * [None], True, True]


# --- blocks


def names_of(metric: rm.LayerwiseMetric) -> dict[str, list[str]]:
    return {
        name: [part.name for part in block.parts]
        for name, block in metric.blocks.items()
    }


GROUPS = {
    "tensor": {name: [name] for name in ("0.weight", "0.bias", "2.weight", "2.bias")},
    "layer": {"0": ["0.weight", "0.bias"], "2": ["2.weight", "2.bias"]},
    "model": {"model": ["0.weight", "0.bias", "2.weight", "2.bias"]},
}


@pytest.mark.parametrize("blocks", GROUPS)
def test_blocks_group_the_parameters(blocks: str) -> None:
    metric = layer_metric(chain(), blocks=blocks)
    assert metric.blocks == {}
    backward(metric)
    assert names_of(metric) == GROUPS[blocks]
    for name, block in metric.blocks.items():
        assert block.name == name
        assert block.rank == 14
        assert block.version == 1


@pytest.mark.parametrize("blocks", GROUPS)
def test_a_model_that_is_one_layer(blocks: str) -> None:
    model = nn.Linear(5, 3)
    metric = layer_metric(model, blocks=blocks)
    backward(metric)
    expected = {"tensor": ["weight", "bias"]}.get(blocks, ["model"])
    assert list(metric.blocks) == expected
    dense = dense_natural_gradient(
        model, rm.output.Categorical(), X, cross_entropy, mass=0.1, blocks=blocks
    )
    assert_close(metric.natural_gradient(), dense, 1e-11)


def test_layers_of_nested_modules_have_qualified_names() -> None:
    model = nn.Sequential(
        nn.ModuleDict({"a": nn.Linear(5, 4)})["a"],
        nn.Sequential(nn.Tanh(), nn.Linear(4, 3, bias=False)),
    )
    metric = layer_metric(model)
    backward(metric)
    assert names_of(metric) == {"0": ["0.weight", "0.bias"], "1.1": ["1.1.weight"]}


def test_a_shared_layer_is_one_parameter() -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.step = nn.Linear(5, 5)
            self.head = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(3):
                x = self.step(x).tanh()
            return self.head(x)

    model = Recurrent()
    metric = layer_metric(model)
    backward(metric)
    expected = dense_natural_gradient(
        model, rm.output.Categorical(), X, cross_entropy, mass=0.1
    )
    assert_close(metric.natural_gradient(), expected, 1e-10)


def test_a_tied_weight_adds_its_factors() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
    model[2].weight = model[0].weight
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=0.1)
    with metric.record():
        outputs = model(X)
    metric.backward(outputs.square().mean(), outputs)
    expected = dense_natural_gradient(
        model, rm.output.Euclidean(), X, lambda z: z.square().mean(), mass=0.1
    )
    assert names_of(metric) == {"0": ["0.weight", "0.bias"], "2": ["2.bias"]}
    assert_close(metric.natural_gradient(), expected, 1e-10)


# --- versions


def test_a_larger_batch_after_passes_with_one_example() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.shift = nn.Linear(5, 3), nn.Parameter(torch.randn(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.tanh(self.inner(x)) + 2.0 * self.shift

    model = Shifted()
    metric = layer_metric(model)
    for n in (1, 1, 1, 1, 4, 1, 1, 1, 6):
        with metric.record():
            z = model(X[:n])
        metric.backward(F.cross_entropy(z, TARGET[:n]), z)
        expected = dense_natural_gradient(
            model,
            rm.output.Categorical(),
            X[:n],
            lambda z: F.cross_entropy(z, TARGET[: len(z)]),
            mass=0.1,
        )
        assert_close(metric.natural_gradient(), expected, 1e-11)


def test_versions_count_the_pull_backs() -> None:
    model = chain()
    metric = layer_metric(model)
    assert (metric.version, metric.passes) == (0, 0)
    for count in (1, 2):
        backward(metric)
        assert (metric.version, metric.passes) == (count, count)
        assert {block.version for block in metric.blocks.values()} == {count}
        assert model[0].weight.manifold.metric.version == count
    with metric.record():
        outputs = model(X)
    metric.pull_back(outputs)
    assert (metric.version, metric.passes) == (3, 2)


def test_the_views_hold_the_metric_of_their_tensor() -> None:
    model = chain()
    metric = layer_metric(model, blocks="model")
    backward(metric)
    separate = layer_metric(copy.deepcopy(model), blocks="tensor")
    backward(separate)
    view = model[0].weight.manifold.metric
    expected = separate.blocks["0.weight"]
    torch.testing.assert_close(view.to_dense(), expected.to_dense(), rtol=1e-13, atol=0)


def test_the_representation_names_blocks_and_ranks() -> None:
    metric = layer_metric(chain())
    assert "version 0" in repr(metric)
    assert "Categorical()" in repr(metric)
    backward(metric)
    lines = repr(metric).splitlines()
    assert "version 1" in lines[0]
    assert len(lines) == 3
    assert "0.weight, 0.bias" in lines[1]
    assert "rank 14" in lines[1]


# --- batches


@pytest.mark.parametrize("blocks", GROUPS)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions(reduction: str, blocks: str) -> None:
    model = chain()

    def loss(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, TARGET, reduction=reduction)

    metric = layer_metric(model, reduction=reduction, blocks=blocks)
    with metric.record():
        outputs = model(X)
    metric.backward(loss(outputs), outputs)
    expected = dense_natural_gradient(
        model,
        rm.output.Categorical(),
        X,
        loss,
        mass=0.1,
        blocks=blocks,
        reduction=reduction,
    )
    assert_close(metric.natural_gradient(), expected, 1e-10)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_duplicating_the_batch(reduction: str) -> None:
    model = chain()
    found = []
    for copies in (1, 3):
        metric = layer_metric(model, reduction=reduction)
        with metric.record():
            outputs = model(X.repeat(copies, 1))
        loss = F.cross_entropy(outputs, TARGET.repeat(copies), reduction=reduction)
        metric.backward(loss, outputs)
        found.append(metric.natural_gradient())
    if reduction == "mean":
        assert_close(found[0], found[1], 1e-11)
    else:
        gap = max(float((found[0][n] - v).norm()) for n, v in found[1].items())
        assert gap > 1e-2


def test_a_sum_is_a_mean_with_a_smaller_mass() -> None:
    model = chain()
    found = []
    for reduction, mass in (("mean", 0.1), ("sum", 0.7)):
        metric = layer_metric(model, reduction=reduction, mass=mass)
        with metric.record():
            outputs = model(X)
        loss = F.cross_entropy(outputs, TARGET, reduction=reduction)
        metric.backward(loss, outputs)
        found.append(metric.natural_gradient())
    assert_close(found[0], found[1], 1e-12)


@pytest.mark.parametrize("blocks", GROUPS)
def test_a_mean_over_positions(blocks: str) -> None:
    model = chain()
    x = torch.randn(4, 3, 5)
    target = torch.randint(3, (4, 3))

    def loss(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs.movedim(-1, 1), target)

    metric = layer_metric(model, blocks=blocks)
    with metric.record():
        outputs = model(x)
    metric.backward(loss(outputs), outputs)
    assert {block.rank for block in metric.blocks.values()} == {4 * 3 * 2}
    expected = dense_natural_gradient(
        model, rm.output.Categorical(), x, loss, mass=0.1, blocks=blocks
    )
    assert_close(metric.natural_gradient(), expected, 1e-10)
    # Positions that do not interact are examples like any other.
    flat = layer_metric(model, blocks=blocks)
    with flat.record():
        outputs = model(x.flatten(0, 1))
    flat.backward(F.cross_entropy(outputs, target.flatten()), outputs)
    assert_close(metric.natural_gradient(), flat.natural_gradient(), 1e-11)


# --- masses


def masses_of(metric: rm.LayerwiseMetric) -> dict[str, float]:
    return {declared.name: declared.mass.scalar for declared in metric.parameters}


def test_masses_by_name_and_pattern() -> None:
    masses = {"0.*": 1.0, "2.weight": 2.0, "*.bias": 3.0}
    metric = layer_metric(chain(), mass=masses)
    expected = {"0.weight": 1.0, "0.bias": 1.0, "2.weight": 2.0, "2.bias": 3.0}
    assert masses_of(metric) == expected


def test_a_name_wins_over_a_pattern() -> None:
    metric = layer_metric(chain(), mass={"*": 1.0, "2.weight": 2.0, "0.*": 7.0})
    assert masses_of(metric)["2.weight"] == 2.0
    assert masses_of(metric)["0.weight"] == 1.0


@pytest.mark.parametrize("blocks", GROUPS)
def test_masses_of_every_kind(blocks: str) -> None:
    model = chain()
    masses = {
        "0.weight": 0.3,
        "2.weight": (torch.rand(3) + 0.5, torch.rand(4) + 0.5),
        "2.bias": torch.rand(3) + 0.5,
        "*": torch.tensor(2.0),
    }
    metric = layer_metric(model, mass=masses, blocks=blocks)
    backward(metric)
    expected = dense_natural_gradient(
        model, rm.output.Categorical(), X, cross_entropy, mass=masses, blocks=blocks
    )
    assert_close(metric.natural_gradient(), expected, 1e-10)


def test_a_set_mass_counts_from_the_next_pass_on() -> None:
    model = chain()
    metric = layer_metric(model, mass=0.1)
    backward(metric)
    before = metric.natural_gradient()
    metric.set_mass({"*.weight": 1.0, "*.bias": 2.0})
    assert_close(metric.natural_gradient(), before, 0.0)
    backward(metric)
    fresh = layer_metric(model, mass={"*.weight": 1.0, "*.bias": 2.0})
    backward(fresh)
    assert_close(metric.natural_gradient(), fresh.natural_gradient(), 0.0)


# --- copies


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_of_the_model_keeps_manifolds_and_drops_factors(how: str) -> None:
    model = chain()
    metric = layer_metric(model)
    backward(metric)
    assert model[0].weight.manifold.metric is not None
    twin = copy.deepcopy(model) if how == "deepcopy" else None
    twin = pickle.loads(pickle.dumps(model)) if twin is None else twin
    weight = twin[0].weight
    assert isinstance(weight, geoopt.ManifoldParameter)
    assert isinstance(weight.manifold.base, rm.manifolds.Stiefel)
    assert weight.manifold.metric is None
    assert model[0].weight.manifold.metric is not None
    other = layer_metric(twin)
    backward(other)
    assert_close(other.natural_gradient(), metric.natural_gradient(), 0.0)


# --- what is recorded


def test_the_last_of_two_scopes_counts() -> None:
    model = chain()
    metric, fresh = layer_metric(model), layer_metric(model)
    with metric.record():
        first = model(2.0 * X)
    with metric.record():
        second = model(X)
    with pytest.raises(rm.errors.NotRecordedError):
        metric.backward(cross_entropy(first), first)
    metric.backward(cross_entropy(second), second)
    backward(fresh)
    assert_close(metric.natural_gradient(), fresh.natural_gradient(), 0.0)


def test_a_scope_that_failed_leaves_no_hooks() -> None:
    model = chain()
    metric = layer_metric(model)
    with pytest.raises(RuntimeError, match="shapes"), metric.record():
        model(X[:, :2])
    assert not any(module._forward_hooks for module in model.modules())
    backward(metric)
    assert not any(module._forward_hooks for module in model.modules())


def test_several_calls_in_a_scope() -> None:
    model = chain()
    metric = layer_metric(model)
    with metric.record():
        both = model(X) + model(2.0 * X)
    metric.backward(cross_entropy(both), both)

    class Twice(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.inner(2.0 * x)

    whole = layer_metric(Twice(model))
    backward(whole)
    found = {f"inner.{n}": v for n, v in metric.natural_gradient().items()}
    assert_close(found, whole.natural_gradient(), 0.0)


def test_a_call_that_the_loss_does_not_see_is_ignored() -> None:
    model = chain()
    metric, fresh = layer_metric(model), layer_metric(model)
    with metric.record():
        model(3.0 * X)
        outputs = model(X)
    metric.backward(cross_entropy(outputs), outputs)
    backward(fresh)
    assert_close(metric.natural_gradient(), fresh.natural_gradient(), 0.0)


def test_inputs_may_be_passed_by_name() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(input=x)

    model = Named()
    metric = layer_metric(model)
    backward(metric)
    expected = dense_natural_gradient(
        model, rm.output.Categorical(), X, cross_entropy, mass=0.1
    )
    assert_close(metric.natural_gradient(), expected, 1e-11)


@dataclass
class Plain:
    hidden: Tensor
    name: str = "plain"


@dataclass(frozen=True)
class Frozen:
    hidden: Tensor
    width: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", self.hidden.shape[1])


@dataclass(slots=True)
class Slotted:
    hidden: Tensor
    inner: Plain | None = None


class Opaque:
    def __init__(self, hidden: Tensor) -> None:
        self.hidden = hidden


class Between(nn.Module):
    """A parameter that only a replay explains, between objects of some class."""

    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.kind, self.weight = kind, nn.Parameter(torch.randn(4, 3))

    def forward(self, given: Any) -> Any:
        return self.kind(torch.tanh(given.hidden @ self.weight))


class Around(nn.Module):
    """Hands objects of some class to a module, and returns one."""

    def __init__(self, kind: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.kind, self.first, self.between = kind, nn.Linear(5, 4), Between(kind)

    def forward(self, x: Tensor) -> Any:
        return self.between(self.kind(torch.tanh(self.first(x))))


class Hidden(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x).hidden


@pytest.mark.parametrize("kind", [Plain, Frozen, Slotted])
def test_dataclasses_in_and_out(kind: Callable[[Tensor], Any]) -> None:
    model = Around(kind)
    metric = layer_metric(model)
    for _ in range(2):
        with metric.record():
            z = model(X).hidden
        metric.backward(cross_entropy(z), z)
    expected = dense_natural_gradient(
        Hidden(model), rm.output.Categorical(), X, cross_entropy, mass=0.1
    )
    found = metric.natural_gradient()
    found = {f"model.{name}": vector for name, vector in found.items()}
    assert_close(found, expected, 1e-11)
    assert "between.weight" in {p.name for p in metric.blocks["between"].parts}


def test_an_object_that_hides_its_tensors() -> None:
    model = Around(Opaque)
    metric = layer_metric(model)
    with metric.record():
        z = model(X).hidden
    words = (
        r"'between.weight': layer 'between' returned an object of class Opaque.*dict"
    )
    with pytest.raises(rm.errors.LinearizationError, match=words):
        metric.backward(cross_entropy(z), z)
    alone = Between(Opaque)
    metric = layer_metric(alone)
    with metric.record():
        z = alone(Plain(X[:, :4])).hidden
    with pytest.raises(rm.errors.LinearizationError, match="the model returned an obj"):
        metric.backward(cross_entropy(z), z)


@pytest.mark.parametrize(
    "make",
    [lambda: nn.ReLU(inplace=True), lambda: nn.ELU(inplace=True)],
    ids=["ReLU", "ELU"],
)
def test_activations_in_place(make: Any) -> None:
    model = chain(make())
    metric = layer_metric(model)
    backward(metric)
    twin = copy.deepcopy(model)
    twin[1].inplace = False
    expected = dense_natural_gradient(
        twin, rm.output.Categorical(), X, cross_entropy, mass=0.1
    )
    assert_close(metric.natural_gradient(), expected, 1e-10)


def test_dropout_keeps_its_mask_in_the_metric() -> None:
    model = chain(nn.Dropout(0.5))
    metric = layer_metric(model)
    torch.manual_seed(3)
    backward(metric)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.mask = F.dropout(torch.ones(7, 4), 0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x * self.mask

    twin = copy.deepcopy(model)
    twin[1] = Masked()
    expected = dense_natural_gradient(
        twin, rm.output.Categorical(), X, cross_entropy, mass=0.1
    )
    assert_close(metric.natural_gradient(), expected, 1e-10)


class Partly(nn.Module):
    """A model with a layer that is never called and one without an effect."""

    def __init__(self) -> None:
        super().__init__()
        self.used = nn.Linear(5, 3)
        self.unused = nn.Linear(5, 3)
        self.detached = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.used(x) + self.detached(x).detach()


def test_layers_without_an_effect_stay() -> None:
    model = Partly()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1, momentum=0.5, weight_decay=0.1)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for _ in range(2):
        backward(metric)
        optimizer.step()
    assert list(metric.blocks) == ["used"]
    assert sorted(metric.natural_gradient()) == ["used.bias", "used.weight"]
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != name.startswith("used")
        assert (p.grad is None) != name.startswith("used")


def test_a_layer_that_drops_out_loses_its_gradient() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(5, 3), nn.Linear(5, 3)
            self.both = True

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x) + self.second(x) if self.both else self.first(x)

    model = Sometimes()
    metric = layer_metric(model)
    backward(metric)
    assert model.second.weight.grad is not None
    model.both = False
    backward(metric)
    assert model.second.weight.grad is None
    assert list(metric.blocks) == ["first"]


@pytest.mark.parametrize("parts", [("weight", "bias"), ("weight",), ("bias",)])
@pytest.mark.parametrize("blocks", GROUPS)
def test_a_frozen_layer_in_the_middle(blocks: str, parts: tuple[str, ...]) -> None:
    model = nn.Sequential(
        nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)
    )
    for part in parts:
        getattr(model[2], part).requires_grad_(False)
    metric = layer_metric(model, blocks=blocks)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    backward(metric)
    frozen = {f"2.{part}" for part in parts}
    names = {n for n, _ in model.named_parameters()} - frozen
    assert set(metric.natural_gradient()) == names
    reference = dense_of_trainable(model, names, blocks)
    assert_close(metric.natural_gradient(), reference, 1e-10)
    before = {n: model.get_parameter(n).detach().clone() for n in frozen}
    optimizer.step()
    for name, value in before.items():
        assert torch.equal(model.get_parameter(name), value)
        assert model.get_parameter(name).grad is None


def dense_of_trainable(
    model: nn.Module, names: set[str], blocks: str
) -> dict[str, Tensor]:
    K = dense_factor(model, rm.output.Categorical(), X)
    tensors = {n: p for n, p in model.named_parameters() if n in names}
    grads = torch.autograd.grad(cross_entropy(model(X)), list(tensors.values()))
    result = {}
    groups: dict[str, list[str]] = {}
    for name in tensors:
        key = {"tensor": name, "layer": name.split(".")[0], "model": ""}[blocks]
        groups.setdefault(key, []).append(name)
    gradient = dict(zip(tensors, grads, strict=True))
    for members in groups.values():
        stacked = torch.cat([K[n] for n in members], 1)
        G = stacked.mT @ stacked + 0.1 * torch.eye(stacked.shape[1])
        flat = torch.cat([gradient[n].flatten() for n in members])
        sizes = [tensors[n].numel() for n in members]
        pieces = torch.linalg.solve(G, flat).split(sizes)
        for name, piece in zip(members, pieces, strict=True):
            result[name] = piece.view_as(tensors[name])
    return result


def test_the_gradient_is_autograd_s_and_replaces_the_old_one() -> None:
    model = chain()
    metric = layer_metric(model)
    for _ in range(2):
        backward(metric)
    expected = torch.autograd.grad(cross_entropy(model(X)), list(model.parameters()))
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=1e-12, atol=1e-14)


def test_backward_keeps_no_graph() -> None:
    metric = layer_metric(chain())
    backward(metric)
    with metric.record():
        outputs = metric.model(X)
    loss = cross_entropy(outputs)
    metric.backward(loss, outputs)
    for tensor in metric.natural_gradient().values():
        assert not tensor.requires_grad
    for p in metric.model.parameters():
        assert p.grad is not None
        assert not p.grad.requires_grad


# --- memory


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest storage that any operation returns, in entries."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0
        self.where = ""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                entries = tensor.untyped_storage().nbytes() // tensor.element_size()
                if entries > self.largest:
                    self.largest, self.where = entries, str(function)
        return result


@pytest.mark.parametrize("change", ["no", "clipped", "momentum"])
@pytest.mark.parametrize("blocks", GROUPS)
@pytest.mark.parametrize(
    "manifold",
    [
        rm.manifolds.Euclidean(),
        rm.manifolds.Stiefel(),
        rm.manifolds.CanonicalStiefel(),
        rm.manifolds.Sphere(),
        rm.manifolds.SPD(),
    ],
    ids=lambda m: m.name,
)
def test_k_of_a_linear_layer_is_never_formed(
    manifold: geoopt.Manifold, blocks: str, change: str
) -> None:
    width, n, classes = 48, 16, 4
    rank, p = n * (classes - 1), width * width
    model = rm.nn.Sequential(
        rm.nn.Linear(width, width, manifold=manifold),
        nn.Tanh(),
        nn.Linear(width, classes),
    )
    metric = layer_metric(model, blocks=blocks)
    momentum = 0.9 if change == "momentum" else 0.0
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1, momentum=momentum)
    x = torch.randn(n, width)
    for _ in range(2):
        with LargestAllocation() as watched:
            with metric.record():
                outputs = model(x)
            metric.backward(outputs.square().mean(), outputs)
            if change == "clipped":
                nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()
    assert metric.blocks[next(iter(metric.blocks))].rank == rank
    bound = rank * p / 4
    assert rank**2 < bound / 10
    assert p <= watched.largest < bound, f"{watched.largest} in {watched.where}"


def test_the_watch_sees_a_dense_factor() -> None:
    rows = torch.randn(48, 48, 48)
    with LargestAllocation() as watched:
        rm.factors.DenseFactor(2.0 * rows)
    assert watched.largest == 48**3


def test_a_step_leaves_no_activations_behind_in_the_model() -> None:
    model = chain()
    metric = layer_metric(model)
    backward(metric)
    model[0].weight.manifold.release()
    assert model[0].weight.manifold.metric is None
    backward(metric)
    assert model[0].weight.manifold.metric is not None


def test_a_covector_may_leave_out_parameters() -> None:
    model = chain()
    metric = layer_metric(model, blocks="model")
    backward(metric)
    name, gradient = "2.bias", model[2].bias.grad
    short = metric.solve({name: gradient}, gradient=0.0)["model"]
    zeros = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    full = metric.solve({**zeros, name: gradient}, gradient=0.0)["model"]
    for key, vector in full.vectors.items():
        assert torch.equal(short.vectors[key], vector)


def test_a_block_without_dimensions_can_be_reported() -> None:
    model = nn.Sequential(
        rm.nn.Linear(1, 1, bias=False, manifold=rm.manifolds.Stiefel()), nn.Linear(1, 3)
    )
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    with metric.record():
        outputs = model(torch.randn(4, 1))
    metric.backward(F.cross_entropy(outputs, torch.tensor([0, 1, 2, 0])), outputs)
    optimizer.step()
    assert optimizer.report["0"].dim == 0
    assert optimizer.report["0"].condition == 1.0
    assert metric.blocks["0"].to_dense().shape == (0, 0)
    assert "push" in str(optimizer.report) or "primal" in str(optimizer.report)


def carries_batches(model: nn.Module, x: Tensor) -> bool:
    """Whether this torch carries several cotangents at once through the model."""
    outputs = model(x)
    many = torch.ones(2, *outputs.shape)
    parameters = list(model.parameters())
    try:
        torch.autograd.grad(outputs, parameters, many, is_grads_batched=True)
    except RuntimeError:
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("whole", [False, True], ids=["activation", "model"])
def test_a_graph_compiled_by_inductor_takes_the_loop(whole: bool) -> None:
    torch.compiler.reset()
    activation = nn.Sequential(nn.Tanh(), nn.Softplus())
    model = nn.Sequential(nn.Linear(6, 5), activation, nn.Linear(5, 3))
    compiled = copy.deepcopy(model)
    if whole:
        compiled = torch.compile(compiled)  # type: ignore[assignment]
    else:
        compiled[1] = torch.compile(compiled[1])  # type: ignore[assignment]
    x, y = torch.randn(7, 6), torch.randint(0, 3, (7,))
    found = []
    for each in (model, compiled):
        metric = rm.LayerwiseMetric(each, output=rm.output.Categorical())
        for _ in range(2):
            with metric.record():
                outputs = each(x)
            metric.backward(F.cross_entropy(outputs, y), outputs)
        found.append(list(metric.natural_gradient().values()))
        batched = {g.batched for g in metric._recorder.graphs.values()}
        assert batched == {carries_batches(each, x)}
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


class Centred(nn.Module):
    """Couples the examples of a batch without BatchNorm."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0)


class Reversed(nn.Module):
    """Changes the order of the examples."""

    def forward(self, x: Tensor) -> Tensor:
        return x.flip(0)


class Swapped(nn.Module):
    """Applies a layer with positions first; a batch of as many hides it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.transpose(0, 1)).transpose(0, 1)


@pytest.mark.parametrize("backwards", [True, False], ids=["backward", "pull_back"])
@pytest.mark.parametrize(
    ("model", "x"),
    [
        (nn.Sequential(nn.Linear(5, 4), Centred(), nn.Linear(4, 3)), (6, 5)),
        (nn.Sequential(nn.Linear(5, 4), Reversed(), nn.Linear(4, 3)), (6, 5)),
    ],
    ids=["centred", "reversed"],
)
def test_examples_that_interact_are_refused(
    model: nn.Module, x: tuple[int, ...], backwards: bool
) -> None:
    model = copy.deepcopy(model).double()
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    with metric.record():
        outputs = model(torch.randn(*x))
    arguments = (outputs.square().mean(), outputs) if backwards else (outputs,)
    act = metric.backward if backwards else metric.pull_back
    with pytest.raises(rm.errors.LinearizationError, match=r"layer '0.*examples"):
        act(*arguments)
    assert metric.version == 0
    assert all(p.grad is None for p in model.parameters())


def test_a_penalty_is_refused_however_small_and_whenever_it_appears() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())

    def run(weight: float | None) -> None:
        with metric.record():
            outputs = model(torch.ones(2, 5))
        loss = outputs.square().mean()
        if weight is not None:
            loss = loss + weight * model[0].weight.square().sum()
        metric.backward(loss, outputs)

    run(None)
    for weight in (0.0, 1e-12, 1.0):
        with pytest.raises(rm.errors.LinearizationError, match=r"0\.weight.*decay"):
            run(weight)
    assert metric.version == 1


def test_a_run_may_start_at_an_optimum() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, layer)
    x = torch.randn(3, 4)
    target = model(x).detach()
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    with metric.record():
        outputs = model(x)
    metric.backward((outputs - target + 1e-16).square().mean(), outputs)
    assert metric.version == 1


def test_metric_and_optimizer_are_not_copied() -> None:
    metric = rm.LayerwiseMetric(nn.Linear(2, 2), output=rm.output.Euclidean())
    for thing in (metric, rm.optim.RiemannianSGD(metric)):
        for copier in (copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match=r"copied|copy"):
                copier(thing)


def test_unfrozen_and_new_parameters_are_noticed() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    model[0].requires_grad_(True)
    with (
        pytest.raises(rm.errors.LinearizationError, match="anew"),
        metric.record(),
    ):
        model(torch.ones(1, 2))


class Stretched(geoopt.Euclidean):
    """Euclidean space with another unit of length."""

    def inner(self, x: Any, u: Any, v: Any = None, *, keepdim: bool = False) -> Any:
        return 4.0 * super().inner(x, u, v, keepdim=keepdim)

    def egrad2rgrad(self, x: Any, u: Any) -> Any:
        return super().egrad2rgrad(x, u) / 4.0


def test_a_subclass_with_its_own_metric_does_not_get_its_parents_formulas() -> None:
    model = rm.nn.Linear(3, 2, manifold=Stretched())
    with pytest.raises(rm.errors.ManifoldContractError, match=r"weight.*Stretched"):
        rm.LayerwiseMetric(model, output=rm.output.Euclidean())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    "manifold",
    [
        geoopt.Sphere(intersection=torch.eye(5, dtype=torch.float64)[:, :3]),
        geoopt.Stereographic(-0.7),
        geoopt.SphereProjection(),
    ],
    ids=lambda manifold: manifold.name,
)
def test_the_generic_path_equals_the_dense_reference(
    manifold: geoopt.Manifold, bias: bool
) -> None:
    model = nn.Sequential(rm.nn.Linear(5, 4, bias=bias), nn.Tanh(), nn.Linear(4, 3))
    start = 0.3 * torch.randn(4, 5)
    model[0].declare("weight", manifold.projx(start), manifold)
    x, y = torch.randn(3, 5), torch.tensor([0, 1, 2])
    output = rm.output.Categorical()
    metric = rm.LayerwiseMetric(model, output=output, mass=0.1)
    with metric.record():
        outputs = model(x)
    metric.backward(F.cross_entropy(outputs, y), outputs)
    expected = dense_natural_gradient(
        model, output, x, lambda z: F.cross_entropy(z, y), mass=0.1
    )
    for name, vector in metric.natural_gradient().items():
        torch.testing.assert_close(vector, expected[name], rtol=1e-9, atol=1e-11)
    block = metric.blocks["0"]
    covector = {p.name: model.get_parameter(p.name).grad for p in block.parts}
    for name, vector in block.sharp(covector).items():
        torch.testing.assert_close(vector, expected[name], rtol=1e-9, atol=1e-11)
    norm = sum((covector[n] * v).sum() for n, v in block.sharp(covector).items())
    torch.testing.assert_close(block.solve(covector=covector).squared_norm, norm)


class Gated(nn.Module):
    """Uses a weight outside its layer, behind a gate that starts closed."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gate = nn.Linear(3, 2), nn.Linear(1, 2)
        nn.init.zeros_(self.gate.weight)
        nn.init.zeros_(self.gate.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.gate(x[:, :1]) * F.linear(x, self.layer.weight)


def test_an_outside_use_with_a_zero_gradient_is_seen() -> None:
    model = Gated()
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    with metric.record():
        outputs = model(torch.randn(4, 3))
    metric.backward(outputs.square().mean(), outputs)
    # Later passes through the graph rely on what this one found.
    nn.init.ones_(model.gate.weight)
    x = torch.randn(4, 3)
    with metric.record():
        outputs = model(x)
    metric.backward(outputs.square().mean(), outputs)
    (slopes,) = torch.autograd.functional.jacobian(
        lambda w: torch.func.functional_call(model, {"layer.weight": w}, (x,)),
        (model.layer.weight.detach(),),
    )
    rows = factor_of(metric, "layer.weight").to_dense()
    wanted = slopes.transpose(0, 1).reshape(8, 6) / 2.0
    torch.testing.assert_close(rows, wanted, rtol=1e-9, atol=1e-11)
    assert isinstance(factor_of(metric, "gate.weight"), rm.factors.LinearFactor)


class Counted(nn.Module):
    """Two weights, one of which its layer explains; counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.layer = nn.Parameter(torch.ones(5)), nn.Linear(5, 3)
        self.calls: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(len(x))
        return self.layer(torch.maximum(self.scale, x))


def test_a_replay_takes_all_examples_at_once() -> None:
    model = Counted()
    metric = layer_metric(model)
    backward(metric)
    model.calls.clear()
    backward(metric)
    assert model.calls == [7, 1], "one recorded call, and one of a vectorised example"


class Potential(nn.Module):
    """Value and slope of a network, the slope by autograd or by torch.func."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "func":
            slope = torch.func.grad(lambda x: self.net(x).sum())(x)
            return torch.cat([self.net(x), slope], 1)
        if self.way == "detached":
            with torch.enable_grad():
                return self.by_autograd(x.detach())
        return self.by_autograd(x.clone())

    def by_autograd(self, x: Tensor) -> Tensor:
        u = self.net(x.requires_grad_())
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return torch.cat([u, slope], 1)


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("way", ["detached", "plain"])
def test_a_derivative_by_the_input_inside_the_model(way: str, blocks: str) -> None:
    model, twin = Potential(way), Potential("func")
    output = rm.output.Euclidean()
    metric = rm.LayerwiseMetric(model, output, mass=0.1, blocks=blocks)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    for n in (7, 7, 3):
        x = X[:n]
        twin.load_state_dict(model.state_dict())
        with metric.record():
            outputs = model(x)
        loss = outputs.square().sum(1).mean()
        metric.backward(loss, outputs)
        expected = dense_natural_gradient(
            twin, output, x, lambda z: z.square().sum(1).mean(), mass=0.1, blocks=blocks
        )
        assert_close(metric.natural_gradient(), expected, 1e-10)
        optimizer.step()


class Transformed(nn.Module):
    """A network that runs under function transforms only."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
        self.way = way

    def forward(self, x: Tensor) -> Tensor:
        if self.way == "vmap":
            return torch.func.vmap(self.net)(x)
        if self.way == "jvp":
            u, du = torch.func.jvp(self.net, (x,), (torch.ones_like(x),))
            return u + du
        jacobian = torch.func.vmap(torch.func.jacrev(self.net))(x)
        return torch.func.vmap(self.net)(x) + jacobian.square().sum(-1)


@pytest.mark.parametrize("way", ["vmap", "jvp", "jacrev"])
def test_layers_that_run_under_function_transforms_only(way: str) -> None:
    model = Transformed(way)
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    for _ in range(3):
        backward(metric)
        expected = dense_natural_gradient(
            model, metric.output, X, cross_entropy, mass=0.1
        )
        assert_close(metric.natural_gradient(), expected, 1e-10)
        optimizer.step()


def test_positions_first_are_found_even_where_there_are_as_many_examples() -> None:
    model, x = (
        nn.Sequential(Swapped(), nn.Tanh(), nn.Linear(5, 3)),
        torch.randn(6, 6, 5),
    )
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=0.1)
    with metric.record():
        outputs = model(x)
    loss = 0.5 * outputs.square().flatten(1).sum(1).mean()
    metric.backward(loss, outputs)
    expected = dense_natural_gradient(
        model,
        rm.output.Euclidean(),
        x,
        lambda z: 0.5 * z.square().flatten(1).sum(1).mean(),
        mass=0.1,
    )
    assert_close(metric.natural_gradient(), expected, 1e-10)


def factor_of(metric: rm.LayerwiseMetric, name: str) -> rm.factors.MetricFactor | None:
    parts = [part for block in metric.blocks.values() for part in block.parts]
    return next(part.factor for part in parts if part.name == name)


def test_an_overwritten_input_is_noticed_after_backward() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    with metric.record():
        outputs = model(x)
    metric.backward(outputs.square().mean(), outputs)
    x.zero_()
    with pytest.raises(rm.errors.LinearizationError, match="in place"):
        metric.natural_gradient()


def test_a_covector_with_an_unknown_name_is_refused() -> None:
    model = nn.Linear(3, 2)
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    with metric.record():
        outputs = model(torch.randn(4, 3))
    metric.backward(outputs.square().mean(), outputs)
    with pytest.raises(rm.errors.ShapeError, match="wieght"):
        metric.solve({"wieght": model.weight.detach()})


def test_a_bias_with_a_diagonal_mass_is_not_absorbed() -> None:
    model, x = nn.Linear(4, 3), torch.randn(2, 4)
    mass = {"weight": 0.3, "bias": torch.tensor([0.1, 2.0, 0.7])}
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=mass)
    with metric.record():
        outputs = model(x)
    metric.backward(outputs.square().mean(), outputs)
    expected = dense_natural_gradient(
        model, rm.output.Euclidean(), x, lambda z: z.square().mean(), mass=mass
    )
    for name, vector in metric.natural_gradient().items():
        torch.testing.assert_close(vector, expected[name], rtol=1e-10, atol=1e-12)


def test_resetting_parameters_stays_on_the_manifold() -> None:
    layer = rm.nn.Linear(5, 3, manifold=rm.manifolds.Stiefel())
    before = layer.weight.detach().clone()
    layer.reset_parameters()
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.weight @ layer.weight.mT, torch.eye(3))


def test_covectors_are_restricted_on_every_manifold() -> None:
    manifold = geoopt.Lorentz()
    point = manifold.projx(torch.randn(4)).as_subclass(Tensor)
    space = rm.TangentSpace(manifold, point)
    e = torch.randn(4)
    restricted = space.restrict(e)
    torch.testing.assert_close(space.sharp(restricted), space.sharp(e))
    tangent = manifold.proju(point, torch.randn(4))
    torch.testing.assert_close((restricted * tangent).sum(), (e * tangent).sum())


def test_parameters_that_nothing_depends_on_have_no_gradient() -> None:
    class Spare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)
            self.scale = nn.Parameter(torch.ones(3))
            self.spare = nn.Parameter(torch.ones(3))
            self.use = False

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x) * self.scale
            return y + self.spare if self.use else y

    model = Spare()
    metric = layer_metric(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1, weight_decay=0.5)
    for model.use in (False, False, True, False, True):
        before = model.spare.detach().clone()
        backward(metric)
        optimizer.step()
        assert (model.spare.grad is not None) == model.use
        assert torch.equal(model.spare, before) == (not model.use)


@pytest.mark.parametrize("seed", range(20))
def test_the_tree_of_a_gradient_that_is_rounding(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(3, 1, bias=False)
    rm.geometrize(model, {"weight": rm.manifolds.Sphere()})
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    with metric.record():
        z = model(torch.eye(3))
    metric.backward(z.square().sum(), z)
    line = rm.nn.tree(model, metric).splitlines()[-1]
    assert float(line.split()[-1]) < 1e-6
