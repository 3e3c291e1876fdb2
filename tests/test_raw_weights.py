"""Raw weights in matrix products, and raw tables, have the factors of layers."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from zoo_models import grad_jacobian, trainable

import riemannian_modules as rm
from riemannian_modules import factors as fs
from riemannian_modules.errors import LinearizationError
from riemannian_modules.testing.reference import dense_natural_gradient

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="this torch does not tell whether saved tensors have hooks",
)

# Square, so that a weight taken for its transpose fits and is wrong.
D, V, MASS = 4, 7, 0.3
Use = Callable[[nn.ParameterDict, Tensor], Tensor]


def addmm(p: nn.ParameterDict, h: Tensor) -> Tensor:
    flat = h.reshape(-1, D)
    return torch.addmm(p["b"], flat, p["W"], beta=0.5, alpha=2.0).view(h.shape)


def ids(h: Tensor) -> Tensor:
    return (h.detach()[..., 0].abs() * 100).long() % V


def selected(p: nn.ParameterDict, h: Tensor) -> Tensor:
    return p["E"].index_select(0, ids(h).flatten()).view(h.shape)


PRODUCTS: dict[str, Use] = {
    "x @ W": lambda p, h: h @ p["W"],
    "x @ W.T": lambda p, h: h @ p["W"].T,
    "x @ W.mT": lambda p, h: h @ p["W"].mT,
    "linear": lambda p, h: F.linear(h, p["W"], p["b"]),
    "sequence first": lambda p, h: F.linear(h.mT.movedim(2, 0), p["W"]).movedim(0, 1),
    "positions outside": lambda p, h: (
        (h.transpose(0, 1).reshape(-1, D) @ p["W"])
        .view(h.shape[1], len(h), D)
        .transpose(0, 1)
    ),
    "addmm": addmm,
    "bmm": lambda p, h: torch.bmm(h, p["W"].expand(len(h), D, D)),
    "W @ x": lambda p, h: (p["W"] @ h.mT).mT,
    "W @ x, flat": lambda p, h: (p["W"] @ h.reshape(-1, D).T).T.view(h.shape),
    "bmm, left": lambda p, h: torch.bmm(p["W"].T.expand(len(h), D, D), h.mT).mT,
    "einsum": lambda p, h: torch.einsum("ntd,dk->ntk", h, p["W"]),
    "einsum, transposed": lambda p, h: torch.einsum("ntd,kd->ntk", h, p["W"]),
    "low rank": lambda p, h: h @ p["A"].T @ p["B"].T,
    "x @ w": lambda p, h: (h @ p["b"]).unsqueeze(-1) * h,
}
TABLES: dict[str, Use] = {
    "table[i]": lambda p, h: p["E"][ids(h)],
    "table[-i]": lambda p, h: p["E"][ids(h) - V],
    "table[i, :]": lambda p, h: p["E"][ids(h).int(), :] * h,
    "first": lambda p, h: p["E"][ids(h)[:, 0]].unsqueeze(1) * h,
    "embedding": lambda p, h: F.embedding(ids(h), p["E"], padding_idx=2),
    "index_select": selected,
    "numbers": lambda p, h: p["n"][ids(h)].unsqueeze(-1) + h,
    "tied": lambda p, h: p["E"][ids(h)] + (h @ p["E"].T).tanh() @ p["E"],
    "all alike": lambda p, h: h + p["E"][torch.arange(h.shape[1]) % V],
}
USES = PRODUCTS | TABLES


class Raw(nn.Module):
    """Uses raw parameters one after the other, with what is random in between."""

    def __init__(self, uses: list[Use], drop: float = 0.3) -> None:
        super().__init__()
        self.enter, self.last = nn.Linear(3, D), nn.Linear(D, 2)
        self.uses, self.drop = uses, drop
        sizes = {"W": (D, D), "A": (2, D), "B": (D, 2), "E": (V, D), "b": (D,)}
        sizes |= {"n": (V,)}
        self.p = nn.ParameterDict({k: torch.randn(s) / 2 for k, s in sizes.items()})

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.enter(x))
        for use in self.uses:
            h = F.dropout(torch.tanh(h + use(self.p, h)), self.drop)
        return self.last(h).sum(1)


def only_used(model: nn.Module, x: Tensor) -> nn.Module:
    """Freeze what the model does not use."""
    grads = torch.autograd.grad(
        model(x).sum(), [*model.parameters()], allow_unused=True
    )
    for parameter, grad in zip([*model.parameters()], grads, strict=True):
        parameter.requires_grad_(grad is not None)
    return model


def checked(
    model: nn.Module, sizes: list[tuple[int, int]]
) -> dict[str, fs.MetricFactor]:
    """Compare rows and steps with dense ones of the very same graph."""
    metric = rm.LayerwiseMetric(
        only_used(model, torch.randn(2, 3, 3)),
        rm.output.Euclidean(),
        reduction="sum",
        mass=MASS,
    )
    found: dict[str, fs.MetricFactor] = {}
    for n, length in sizes:
        with metric.record():
            z = model(torch.randn(n, length, 3))
        loss = (z - 1.0).square().sum()
        dense = grad_jacobian([z], trainable(model))
        named = {k: p for k, p in model.named_parameters() if p.requires_grad}
        costate = dict(
            zip(
                named,
                torch.autograd.grad(loss, [*named.values()], retain_graph=True),
                strict=True,
            )
        )
        metric.backward(loss, z)
        steps = metric.natural_gradient()
        assert set(steps) == set(named)
        for block in metric.blocks.values():
            rows, step, covector = [], [], []
            for part in block.parts:
                assert part.factor is not None
                found[part.name] = part.factor
                own = part.factor.to_dense().unflatten(0, (-1, n)).transpose(0, 1)
                want = dense[part.name]
                assert (own - want).norm() <= 1e-9 * (1 + want.norm()), part.name
                rows.append(want.flatten(0, 1))
                step.append(steps[part.name].flatten())
                covector.append(costate[part.name].flatten())
            k, u, e = torch.cat(rows, 1), torch.cat(step), torch.cat(covector)
            error = MASS * u + k.mT @ (k @ u) - e
            assert error.norm() <= 1e-9 * (1 + e.norm())
    return found


@pytest.mark.usefixtures("no_replay")
@pytest.mark.parametrize("name", USES)
def test_nothing_runs_again_and_nothing_is_dense(name: str) -> None:
    torch.manual_seed(0)
    found = checked(Raw([USES[name]]), [(5, 3), (5, 3), (4, 2), (3, 3)])
    for path, factor in found.items():
        if path[2:] in ("W", "A", "B", "E", "n") and name != "all alike":
            assert not isinstance(factor, fs.DenseFactor), path


@pytest.mark.parametrize("name", USES)
def test_single_examples_and_single_positions(name: str) -> None:
    torch.manual_seed(0)
    checked(Raw([USES[name]]), [(1, 3), (4, 1), (1, 1), (3, 3)])


@settings(max_examples=25, deadline=None)
@given(
    names=st.lists(st.sampled_from([*USES]), min_size=1, max_size=4),
    size=st.tuples(st.integers(1, 5), st.integers(1, 4)),
    drop=st.sampled_from([0.0, 0.4]),
    seed=st.integers(0, 2**20),
)
def test_any_uses_in_any_order(
    names: list[str], size: tuple[int, int], drop: float, seed: int
) -> None:
    torch.manual_seed(seed)
    checked(Raw([USES[name] for name in names], drop), [size, size])


def masked(p: nn.ParameterDict, h: Tensor) -> Tensor:
    return h + p["E"][torch.arange(V) < 1]


OTHERS: dict[str, Use] = {
    "first multiplied": lambda p, h: h @ (p["A"].T @ p["B"].T),
    "itself": lambda p, h: h @ (p["W"].T @ p["W"]),
    "a function": lambda p, h: h @ p["W"].tanh(),
    "a part": lambda p, h: h @ p["W"][:, :1],
    "reshaped": lambda p, h: h @ p["E"].view(D, V)[:, :D],
    "also otherwise": lambda p, h: h @ p["W"] + h @ p["W"].exp(),
    "also in a maximum": lambda p, h: torch.maximum(h @ p["W"], p["W"][0]),
    "a mask": masked,
    "columns": lambda p, h: p["W"][:, ids(h) % D].movedim(0, 2),
    "pairs": lambda p, h: p["E"][ids(h), ids(h) % D].unsqueeze(-1) * h,
    "of a function": lambda p, h: p["E"].tanh()[ids(h)],
    "gather": lambda p, h: p["n"].gather(0, ids(h).flatten()).view(*h.shape[:2], 1) * h,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_uses_are_replayed(name: str) -> None:
    torch.manual_seed(0)
    checked(Raw([OTHERS[name]], 0.0), [(5, 3), (4, 4), (1, 2)])


@pytest.mark.parametrize("name", ["first multiplied", "also otherwise"])
def test_other_uses_are_refused_where_a_replay_differs(name: str) -> None:
    torch.manual_seed(0)
    with pytest.raises(LinearizationError, match=r"'p\.[AW]'"):
        checked(Raw([OTHERS[name]]), [(5, 3)])


def test_examples_that_a_weight_mixes_are_refused() -> None:
    class Mixes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.W, self.last = nn.Parameter(torch.randn(5, 5)), nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.W @ x))

    metric = rm.LayerwiseMetric(Mixes(), rm.output.Euclidean(), mass=MASS)
    with metric.record():
        z = metric.model(torch.randn(5, 3))
    with pytest.raises(LinearizationError, match="'W'"):
        metric.backward(z.square().mean(), z)


def test_a_hook_on_a_weight_is_noticed() -> None:
    class Hooked(Raw):
        def forward(self, x: Tensor) -> Tensor:
            w = self.p["W"].T
            w.register_hook(lambda g: 2.0 * g)
            return self.last(torch.tanh(self.enter(x)) @ w).sum(1)

    torch.manual_seed(0)
    found = checked(Hooked([]), [(4, 3)])
    assert isinstance(found["p.W"], fs.DenseFactor)


def test_conv1d_of_a_transformer_in_half_precision() -> None:
    torch.manual_seed(0)
    model = Raw([PRODUCTS["addmm"], PRODUCTS["x @ W.T"]]).float()
    only_used(model, torch.randn(2, 3, 3, dtype=torch.float32))
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=MASS)
    for _ in range(3):
        with metric.record(), torch.autocast("cpu", torch.bfloat16):
            z = model(torch.randn(6, 3, 3, dtype=torch.float32))
        loss = z.float().square().mean()
        (want,) = torch.autograd.grad(loss, [model.p["W"]], retain_graph=True)
        metric.backward(loss, z)
        found = model.p["W"].grad
        assert (found - want).norm() < 0.03 * want.norm()
        assert isinstance(metric.blocks["p"].parts[0].factor, fs.SlabFactor)


@pytest.mark.filterwarnings("ignore:.*cannot be mapped:UserWarning")
@pytest.mark.parametrize("kind", ["product", "look-up"])
def test_nothing_is_looked_for_in_a_checkpoint(kind: str) -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w, self.runs = nn.Parameter(torch.randn(D, D)), 0

        def forward(self, h: Tensor) -> Tensor:
            self.runs += 1
            found = h @ self.w if kind == "product" else self.w[ids(h) % D]
            return torch.tanh(h + found)

    class Saves(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.last = nn.Linear(3, D), nn.Linear(D, 2)
            self.layers = nn.ModuleList(Inner() for _ in range(4))

        def forward(self, x: Tensor) -> Tensor:
            h = self.enter(x)
            return self.last(
                checkpoint(nn.Sequential(*self.layers), h, use_reentrant=0)
            )

    torch.manual_seed(0)
    model = Saves()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=MASS)
    for index in range(5):
        for layer in model.layers:
            layer.runs = 0
        with metric.record():
            z = model(torch.randn(6, 3))
        metric.backward(z.square().mean(), z)
        if index > 2:
            # The pass, its two repetitions in the reverse passes, and the replay.
            assert max(layer.runs for layer in model.layers) <= 4


def test_rows_that_are_held_stay_as_they_were() -> None:
    class Query(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q = nn.Parameter(torch.randn(1, D))
            self.W, self.last = nn.Parameter(torch.randn(D, D)), nn.Linear(D, 2)

        def forward(self, x: Tensor) -> Tensor:
            h = self.q.expand(len(x), -1) @ self.W
            return self.last(torch.tanh(h * x.mean(1, keepdim=True)))

    torch.manual_seed(0)
    metric = rm.LayerwiseMetric(Query(), rm.output.Euclidean(), mass=MASS, refresh=2)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5)
    with metric.record():
        z = metric.model(torch.randn(6, 3))
    metric.backward(z.square().mean(), z)
    parts = [part for block in metric.blocks.values() for part in block.parts]
    (factor,) = (part.factor for part in parts if part.name == "W")
    assert factor is not None
    before = factor.to_dense()
    optimizer.step()
    assert torch.equal(factor.to_dense(), before)
    with metric.record():
        z = metric.model(torch.randn(6, 3))
    metric.backward(z.square().mean(), z)
    optimizer.step()


def test_a_table_that_all_look_up_alike_is_explored_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    passes = []
    recorder = import_module("riemannian_modules.recorder")
    explore = recorder.explore
    monkeypatch.setattr(
        recorder, "explore", lambda *a, **k: passes.append(0) or explore(*a, **k)
    )
    torch.manual_seed(0)
    checked(Raw([TABLES["all alike"]]), [(5, 3)] * 3)
    assert len(passes) == 1


def test_columns_of_unit_length_in_a_weight_that_is_stored_across() -> None:
    torch.manual_seed(0)
    model = only_used(Raw([PRODUCTS["x @ W"]], 0.0), torch.randn(2, 3, 3))
    rm.geometrize(model, {"p.W": rm.manifolds.Oblique("columns")})
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(2.0), mass=MASS)
    x, y = torch.randn(6, 3, 3), torch.randn(6, 2)
    with metric.record():
        z = model(x)
    metric.backward(F.mse_loss(z, y), z)
    found = metric.natural_gradient()
    wanted = dense_natural_gradient(
        model, rm.output.Euclidean(2.0), x, lambda z: F.mse_loss(z, y), mass=MASS
    )
    for name, expected in wanted.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-9, atol=1e-11)


class Learned(nn.Module):
    """Attention with learned tokens, and what drops out in it."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(4, 2, 0.3, add_bias_kv=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        h = F.pad(x, (0, 1))
        return self.core(h, h, h, need_weights=False)[0].sum(1)


class Recurrent(nn.Module):
    """What drops out between the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.LSTM(3, 2, 2, batch_first=True, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x)[0].sum(1)


@pytest.mark.parametrize("make", [Learned, Recurrent])
def test_layers_whose_rule_refuses_dropout(make: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    checked(make(), [(5, 3), (5, 3), (3, 3), (1, 2)])


@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_a_weight_in_a_list_and_a_derivative_by_the_input(gate: float) -> None:
    class Stray(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.last = nn.Linear(3, 3), nn.Linear(3, 2)
            self.alias = [self.net.weight]

        def forward(self, x: Tensor) -> Tensor:
            x = x.clone().requires_grad_()
            u = self.net(x).square() + gate * F.linear(x, self.alias[0]).pow(3)
            (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
            return self.last(self.net(slope)).sum(1)

    torch.manual_seed(0)
    checked(Stray(), [(5, 3), (5, 3), (4, 2)])
