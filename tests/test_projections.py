"""Projections found in autograd's graph instead of running attention again."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from zoo_models import grad_jacobian, trainable

import riemannian_modules as rm
from riemannian_modules import rules
from riemannian_modules.errors import LinearizationError
from riemannian_modules.rules import linear_maps

replay = import_module("riemannian_modules.rules.attention")
N, T, E = 3, 4, 6

# Not every torch tells whether saved tensors have hooks.
needs_hooks = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="projections are not looked for with this torch",
)


class Attending(nn.Module):
    """Linear, attention, linear; what comes out of attention is put together."""

    def __init__(
        self,
        *,
        shown: str = "out",
        memory: int | None = None,
        values: bool = False,
        **options: Any,
    ) -> None:
        super().__init__()
        memory = options.get("kdim", memory)
        options = {"batch_first": True, "dropout": 0.0} | options
        self.first, self.last = nn.Linear(2, E), nn.Linear(E, 2)
        self.attention = nn.MultiheadAttention(E, 2, **options)
        self.memory = None if memory is None else nn.Linear(2, memory)
        self.shown, self.values = shown, values

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if not self.attention.batch_first:
            h = h.transpose(0, 1)
        keys = h
        if self.memory is not None:
            keys = self.memory(x[:, 1:])
            keys = keys if self.attention.batch_first else keys.transpose(0, 1)
        values = keys.flip(2) if self.values else keys
        h, weights = self.attention(h, keys, values, need_weights=self.shown != "out")
        if not self.attention.batch_first:
            h = h.transpose(0, 1)
        found = self.last(h).sum(1)
        if self.shown == "out":
            return found
        seen = weights.square().sum(1)[:, :2]
        return seen if self.shown == "weights" else found + seen


class Below(nn.Module):
    """Attention with nothing below it that is trained."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(2, 1, dropout, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x)[0].sum(1)


class Checkpointed(Attending):
    def forward(self, x: Tensor) -> Tensor:
        def attend(h: Tensor) -> Tensor:
            return self.attention(h, h, h)[0]

        h = checkpoint(attend, self.first(x), use_reentrant=False)
        return self.last(h).sum(1)


def gap(model: nn.Module, passes: int = 2) -> float:
    """The largest error of a factor, against autograd on the very same graph."""
    model = model.double()
    metric = rm.LayerwiseMetric(
        model, output=rm.output.Euclidean(), reduction="sum", mass=0.1
    )
    worst = 0.0
    for index in range(passes):
        x = torch.randn(N + index, T, 2, dtype=torch.float64)
        with metric.record():
            z = model(x)
        dense = grad_jacobian([z], trainable(model))
        metric.backward(z.square().sum(), z)
        parts = [part for block in metric.blocks.values() for part in block.parts]
        assert {p.name for p in parts} >= {n for n, rows in dense.items() if rows.any()}
        for part in parts:
            rows = part.factor.rows(0, part.factor.rank).flatten(1)
            own = rows.unflatten(0, (-1, len(x))).transpose(0, 1)
            error = (own - dense[part.name]).norm() / (dense[part.name].norm() + 1e-9)
            worst = max(worst, float(error))
    return worst


@pytest.fixture
def no_replay(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: object) -> None:
        raise AssertionError("attention ran again")

    monkeypatch.setattr(replay, "_Attention", refuse)


@pytest.fixture
def replays(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    calls: list[object] = []
    plain = replay._Attention

    def counted(call: rules.Call) -> Any:
        calls.append(call)
        return plain(call)

    monkeypatch.setattr(replay, "_Attention", counted)
    return calls


OPTIONS: dict[str, dict[str, Any]] = {
    "batch first": {},
    "positions first": {"batch_first": False},
    "without bias": {"bias": False},
    "to a memory": {"memory": E},
    "to a memory, positions first": {"memory": E, "batch_first": False},
    "values of their own": {"memory": E, "values": True, "bias": False},
    "of another width": {"kdim": 5, "vdim": 5},
    "of another width, positions first": {"kdim": 5, "vdim": 5, "batch_first": False},
    "a token of zeros": {"add_zero_attn": True},
    "its weights": {"shown": "weights"},
    "its weights as well": {"shown": "both"},
    "dropout": {"dropout": 0.5},
    "dropout, to a memory": {"dropout": 0.5, "memory": E},
    "dropout, its weights as well": {"dropout": 0.5, "shown": "both"},
}


@needs_hooks
@pytest.mark.usefixtures("no_replay")
@pytest.mark.parametrize("name", OPTIONS)
def test_projections_are_those_of_the_graph(name: str) -> None:
    torch.manual_seed(0)
    assert gap(Attending(**OPTIONS[name])) < 1e-12


@needs_hooks
@pytest.mark.usefixtures("no_replay")
def test_dropout_with_nothing_below() -> None:
    assert gap(Below(dropout=0.5)) < 1e-12


@pytest.mark.parametrize(
    "make",
    [
        Below,
        lambda: Attending(add_bias_kv=True),
        Checkpointed,
    ],
    ids=["nothing below", "learned tokens", "a checkpoint"],
)
def test_others_run_again(make: Callable[[], nn.Module], replays: list[object]) -> None:
    torch.manual_seed(0)
    assert gap(make()) < 1e-12
    assert replays


@needs_hooks
def test_nothing_is_kept_for_comparing() -> None:
    model = Attending().double()
    metric = rm.LayerwiseMetric(
        model, output=rm.output.Euclidean(), mass=0.1, static_graph=True
    )
    for _ in range(4):
        with metric.record():
            z = model(torch.randn(N, T, 2, dtype=torch.float64))
        uses = [*metric._recorder._tape.uses]
        metric.backward(z.square().mean(), z)
    (use,) = (use for use in uses if use.name == "attention")
    assert len(use.edges) == 3
    assert len(use.inside) == 2
    assert use.values == ()


@needs_hooks
def test_a_weight_that_two_layers_share() -> None:
    class Twice(Attending):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            for _ in range(2):
                h = h + self.attention(h, h, h)[0]
            return self.last(h).sum(1)

    torch.manual_seed(0)
    assert gap(Twice()) < 1e-12


@needs_hooks
@pytest.mark.usefixtures("no_replay")
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("change", ["add", "set", "scale"])
def test_an_output_that_is_changed_in_place(change: str, batch_first: bool) -> None:
    class Changed(Attending):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            h = h if batch_first else h.transpose(0, 1)
            z = self.attention(h, h, h)[0]
            if change == "add":
                z += h
            elif change == "set":
                z[..., :2] = 0.0
            else:
                z[:, 0].mul_(2.0)
            return self.last(z if batch_first else z.transpose(0, 1)).sum(1)

    torch.manual_seed(0)
    assert gap(Changed(batch_first=batch_first)) < 1e-12


@needs_hooks
@pytest.mark.usefixtures("no_replay")
@pytest.mark.parametrize("width", [None, 5])
def test_weights_alone_where_values_have_a_projection(width: int | None) -> None:
    class Shown(Attending):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            keys = h if self.memory is None else self.memory(x)
            _, weights = self.attention(h, keys, 2.0 * keys)
            return weights.square().flatten(1)

    torch.manual_seed(0)
    options = {} if width is None else {"kdim": width, "vdim": width}
    model = Shown(**options).double()
    metric = rm.LayerwiseMetric(
        model, output=rm.output.Euclidean(), reduction="sum", mass=0.1
    )
    with metric.record():
        z = model(torch.randn(N, T, 2, dtype=torch.float64))
    dense = grad_jacobian([z], trainable(model))
    metric.backward(z.square().sum(), z)
    for block in metric.blocks.values():
        for part in block.parts:
            rows = part.factor.rows(0, part.factor.rank).flatten(1)
            want = dense[part.name].flatten(0, 1)
            torch.testing.assert_close(rows.mT @ rows, want.mT @ want)


@needs_hooks
@pytest.mark.usefixtures("no_replay")
def test_a_mask_from_an_earlier_call() -> None:
    class Residual(Attending):
        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            y, weights = self.attention(h, h, h, average_attn_weights=False)
            mask = weights.flatten(0, 1)
            return self.last(self.attention(y, y, y, attn_mask=mask)[0]).sum(1)

    torch.manual_seed(0)
    assert gap(Residual()) < 1e-12


# --- layers of others


class Doubled(nn.Module):
    """``W2 tanh(W1 x)`` with functions, not with modules."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Parameter(torch.randn(5, E) / 3)
        self.two = nn.Parameter(torch.randn(E, 5) / 3)

    def forward(self, h: Tensor) -> Tensor:
        h = torch.tanh(F.linear(F.dropout(h, 0.5), self.one))
        return F.linear(F.dropout(h, 0.5), self.two)


class Around(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, E), nn.Linear(E, 2)
        self.doubled = Doubled()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.doubled(self.first(x))).sum(1)


def found(call: rules.Call) -> dict[str, rm.factors.MetricFactor]:
    factors = {}
    for name, each in zip(("one", "two"), call.inside, strict=True):
        x = each.layout.front(each.input, call.examples)
        l = each.layout.front(each.cotangent, call.examples, 1)
        factors[name] = rm.factors.LinearFactor(x, l)
    return factors


def finder(
    module: Any, args: Any, kwargs: Any, outputs: Any
) -> tuple[rm.rules.Place, ...]:
    shape = args[0].shape[:-1]
    return linear_maps(outputs, args, [module.one, module.two], [shape, shape])


def swapped(
    module: Any, args: Any, kwargs: Any, outputs: Any
) -> tuple[rm.rules.Place, ...]:
    first, second = finder(module, args, kwargs, outputs)
    return first._replace(input=first.input.flip(1)), second


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    monkeypatch.setattr(rules.base, "_ENTRIES", dict(rules.base._ENTRIES))

    def register(finder: Any) -> None:
        rules.register_rule(Doubled, found, finder=finder)

    return register


@needs_hooks
def test_a_rule_of_ones_own_finds_random_maps(registered: Callable[..., None]) -> None:
    torch.manual_seed(0)
    registered(finder)
    assert gap(Around()) < 1e-12


@needs_hooks
def test_a_wrong_finder_is_refused(registered: Callable[..., None]) -> None:
    torch.manual_seed(0)
    registered(swapped)
    with pytest.raises(LinearizationError, match=r"'doubled\.one'.*rule of Doubled"):
        gap(Around())


@needs_hooks
def test_what_is_not_there_is_not_found() -> None:
    model = Around()
    x = torch.randn(N, T, 2)
    h = model.first(x)
    z = model.doubled(h)
    one, two = model.doubled.one, model.doubled.two
    assert len(linear_maps([z], [h], [one, two], [(N, T), (N, T)])) == 2
    assert linear_maps([z], [h], [one, model.first.weight], [(N, T), (N, T)]) == ()
    assert linear_maps([z], [h], [one], [(N, T + 1)]) == ()
    with torch.autograd.graph.save_on_cpu():
        assert linear_maps([z], [h], [one], [(N, T)]) == ()
