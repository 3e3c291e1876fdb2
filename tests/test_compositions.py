"""The compositions: their recursion against the same mathematics written out.

``written_out`` computes what a composition says, operation by operation, with fixed
points as unrolled iterations, and ``dense_factor`` differentiates that. Nothing
is shared with the compositions but the order of their children.
"""

import copy
import gc
import math
import pickle
import warnings
import weakref
from functools import reduce

import geoopt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutants import compositions as mutants
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import riemannian_modules as rm
from riemannian_modules import errors
from riemannian_modules import nn as rnn
from riemannian_modules.errors import LinearizationError, ShapeError
from riemannian_modules.mass import Mass
from riemannian_modules.metric import Part
from riemannian_modules.nn.composition import Composition
from riemannian_modules.nn.factor_norm import factor_norm
from riemannian_modules.testing.reference import (
    dense_factor,
    dense_natural_gradient,
    dense_sharp,
)

SEEDS = st.integers(0, 2**31 - 1)
GAIN = 0.25
TIGHT = 1e-13
UNROLLED = 26


class Times(nn.Module):
    """A constant factor."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


# ---- the reference ---------------------------------------------------------------


def written_out(module: nn.Module, *inputs: Tensor):
    """What a tree of compositions says, in plain operations."""
    x = inputs[0]
    match module:
        case rnn.Sequential():
            first, *others = module._modules.values()
            value = written_out(first, *inputs)
            return reduce(lambda v, m: written_out(m, v), others, value)
        case rnn.Parallel() | rnn.Join():
            branches = list(module._modules.values())
            each = inputs if isinstance(module, rnn.Join) else inputs * len(branches)
            outputs = [written_out(f, v) for f, v in zip(branches, each, strict=True)]
            joined = torch.cat(outputs, module.dim)
            stacked = torch.stack(outputs) if module.combine == "sum" else None
            return joined if stacked is None else stacked.sum(0)
        case rnn.Residual():
            short = x if module.shortcut is None else written_out(module.shortcut, x)
            return short + module.scale * written_out(module.module, x)
        case rnn.Gate():
            opening = 1.0 / (1.0 + (-written_out(module.gate, x)).exp())
            return opening * written_out(module.value, x)
        case rnn.Heads():
            shared = x if module.trunk is None else written_out(module.trunk, x)
            return {k: written_out(head, shared) for k, head in module.heads.items()}
        case rnn.Recurrent():
            h = torch.zeros(len(x), *module.size, dtype=x.dtype)
            if module.initial is not None:
                h = h + module.initial.value
            states = []
            for t in range(x.shape[module.dim]):
                h = written_out(module.cell, x.select(module.dim, t), h)
                states.append(h)
            return h if module.output == "last" else torch.stack(states, module.dim)
        case rnn.FixedPoint():
            size = x.shape[1:] if module.size is None else (module.size,)
            z = torch.zeros(len(x), *size, dtype=x.dtype)
            for _ in range(UNROLLED):
                z = written_out(module.module, x, z)
            return z
        case rnn.Feedback():
            y = written_out(module.ahead, x)
            for _ in range(UNROLLED):
                y = written_out(module.ahead, x + written_out(module.back, y))
            return y
        case nn.Linear():
            return x @ module.weight.mT + (0.0 if module.bias is None else module.bias)
    return module(*inputs)


class WrittenOut(nn.Module):
    def __init__(self, model: nn.Module, head: str | None = None) -> None:
        super().__init__()
        self.model = model
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        outputs = written_out(self.model, x)
        return outputs if self.head is None else outputs[self.head]

    def named_parameters(self, prefix="", recurse=True, remove_duplicate=True):
        # Told of both names of a module that is there twice, functional_call of torch
        # 2.13 does not put its parameters back.
        return super().named_parameters(prefix, recurse)


def plain(found: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("model."): value for name, value in found.items()}


def rows(metric: rm.LayerwiseMetric) -> dict[str, Tensor]:
    parts = [part for block in metric.blocks.values() for part in block.parts]
    return {p.name: p.factor.to_dense() for p in parts if p.factor is not None}


def loss_of(z: Tensor) -> Tensor:
    target = torch.arange(len(z), device=z.device) % z.shape[1]
    return F.cross_entropy(z, target)


def linearised(model: nn.Module, x: Tensor, passes: int = 1, **options):
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1, **options)
    with warnings.catch_warnings():
        # An operation without a rule for vmap is carried one by one; so what.
        warnings.filterwarnings("ignore", "There is a performance drop")
        for _ in range(passes):
            with metric.record():
                z = model(x)
            metric.backward(loss_of(z), z)
    return metric


def assert_same(
    found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-9
) -> None:
    assert found.keys() == expected.keys()
    size = max(float(v.norm()) for v in expected.values())
    for name, value in expected.items():
        assert found[name].shape == value.shape
        error = float((found[name] - value).norm())
        bound = tolerance * max(float(value.norm()), 1e-2 * size)
        assert error <= bound, f"{name}: {error:.1e} > {bound:.1e}"


def assert_right(model: nn.Module, x: Tensor, passes: int = 2) -> None:
    """The laws of the recursion and of the whole gradient, against what is written."""
    output, reference = rm.output.Categorical(), WrittenOut(model)
    torch.testing.assert_close(model(x), reference(x), rtol=1e-10, atol=1e-12)
    metric = linearised(model, x, passes)
    K = {n: v for n, v in plain(dense_factor(reference, output, x)).items() if v.any()}
    found = {n: v for n, v in rows(metric).items() if v.any()}
    assert_same(found, K)
    expected = dense_natural_gradient(reference, output, x, loss_of, mass=0.1)
    assert_same(metric.natural_gradient(), plain(expected))


# ---- random trees ----------------------------------------------------------------

BASES = {
    "euclidean": rm.manifolds.Euclidean,
    "stiefel": rm.manifolds.Stiefel,
    "canonical": rm.manifolds.CanonicalStiefel,
    "sphere": rm.manifolds.Sphere,
    "ball": rm.manifolds.PoincareBall,
    "spd": rm.manifolds.SPD,
}
KINDS = [
    "sequential",
    "sum",
    "concat",
    "residual",
    "gate",
    "shared",
    "recurrent",
    "fixed point",
    "feedback",
]


class Trees:
    """Draws modules ``(n, inputs) -> (n, outputs)``."""

    def __init__(self, draw) -> None:
        self.draw = draw

    def size(self) -> int:
        return self.draw(st.integers(1, 3))

    def leaf(self, inputs: int, outputs: int) -> nn.Module:
        kind = self.draw(st.sampled_from(list(BASES)))
        if (kind == "spd" and inputs != outputs) or inputs == outputs == 1:
            kind = "euclidean"  # one number lives on most manifolds as a point
        bias = self.draw(st.booleans())
        try:
            layer = rnn.Linear(inputs, outputs, bias, manifold=BASES[kind]())
        except ShapeError:  # no unit vectors of length one
            layer = rnn.Linear(inputs, outputs, bias)
        bend = self.draw(st.sampled_from([None, nn.Tanh, nn.Softplus]))
        return layer if bend is None else rnn.Sequential(layer, bend())

    def tree(
        self, depth: int, inputs: int, outputs: int, loops: int = 2, kind: str = ""
    ) -> nn.Module:
        kind = kind or (self.draw(st.sampled_from(KINDS)) if depth > 1 else "leaf")
        if kind in ("fixed point", "feedback") and not loops:
            kind = "gate"  # an iteration in an iteration in an iteration takes long

        def sub(i: int, o: int, loops: int = loops) -> nn.Module:
            return self.tree(depth - 1, i, o, loops)

        match kind:
            case "sequential":
                width = self.size()
                return rnn.Sequential(sub(inputs, width), sub(width, outputs))
            case "sum":
                return sub(inputs, outputs) + sub(inputs, outputs)
            case "concat" if outputs > 1:
                cut = self.draw(st.integers(1, outputs - 1))
                parts = sub(inputs, cut), sub(inputs, outputs - cut)
                return rnn.Parallel(*parts, combine="concat")
            case "residual":
                short = None if inputs == outputs else sub(inputs, outputs)
                scale = self.draw(st.sampled_from([1.0, -0.5]))
                return rnn.Residual(sub(inputs, outputs), scale, short)
            case "gate":
                return rnn.Gate(sub(inputs, outputs), sub(inputs, outputs))
            case "shared":
                twice = sub(inputs, inputs)
                return sub(inputs, outputs) @ twice @ nn.Tanh() @ twice
            case "recurrent":
                return self.recurrent(sub, inputs, outputs)
            case "fixed point":
                inner = calm(sub(outputs, outputs, loops - 1), outputs)
                joined = rnn.Join(sub(inputs, outputs, loops - 1), inner)
                implicit = self.implicit()
                return rnn.FixedPoint(nn.Tanh() @ joined, outputs, **implicit)
            case "feedback":
                ahead = calm(sub(inputs, outputs, loops - 1), inputs, 1.0)
                back = calm(sub(outputs, inputs, loops - 1), outputs)
                return rnn.Feedback(nn.Tanh() @ ahead, back, **self.implicit())
        return self.leaf(inputs, outputs)

    def recurrent(self, sub, inputs: int, outputs: int) -> nn.Module:
        cell = nn.Tanh() @ rnn.Join(sub(1, outputs), sub(outputs, outputs))
        kind = self.draw(st.sampled_from(["zero", "learned"]))
        output = self.draw(st.sampled_from(["sequence", "last"]))
        net = rnn.Recurrent(cell, outputs, initial=kind, output=output)
        chain = rnn.Sequential(nn.Unflatten(1, (inputs, 1)), net)
        if output == "last":
            return chain
        return self.leaf(inputs * outputs, outputs) @ nn.Flatten() @ chain

    def implicit(self) -> dict[str, object]:
        solvers = [rnn.Picard(TIGHT), rnn.Anderson(TIGHT)]
        adjoints = [None, rnn.Direct(), rnn.Krylov(TIGHT)]
        return {
            "solver": self.draw(st.sampled_from(solvers)),
            "adjoint": self.draw(st.sampled_from(adjoints)),
        }


def calm(module: nn.Module, inputs: int, gain: float = GAIN) -> nn.Module:
    """Bound a map's outputs, and scale it so that it contracts by ``gain`` or so."""
    points = torch.randn(32, inputs)
    slopes = torch.func.jacrev(lambda x: module(x).sum(0))(points).detach()
    largest = float(torch.linalg.matrix_norm(slopes.transpose(0, 1), 2).max())
    return rnn.Sequential(Times(gain / max(2.0 * largest, 1.0)), module)


@st.composite
def trees(draw, depth: int = 4) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(draw(SEEDS))
    builder = Trees(draw)
    inputs, outputs = builder.size(), draw(st.integers(2, 3))
    model = builder.tree(draw(st.integers(2, depth)), inputs, outputs)
    return model, torch.randn(draw(st.integers(1, 3)), inputs)


SLOW = settings(
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


@SLOW
@given(trees())
def test_random_trees(case: tuple[nn.Module, Tensor]) -> None:
    assert_right(*case)


@pytest.mark.parametrize("kind", KINDS)
@settings(SLOW, max_examples=5)
@given(data=st.data(), seed=SEEDS)
def test_every_kind_at_the_top(kind: str, data, seed: int) -> None:
    torch.manual_seed(seed)
    model = Trees(data.draw).tree(2, 2, 3, kind=kind)
    assert_right(model, torch.randn(3, 2))


@SLOW
@given(data=st.data(), seed=SEEDS)
def test_heads_stack(data, seed: int) -> None:
    torch.manual_seed(seed)
    builder = Trees(data.draw)
    trunk = builder.tree(2, 2, 2, loops=1)
    heads = {"a": builder.tree(2, 2, 3, loops=1), "b": builder.tree(2, 2, 2, loops=1)}
    model, x = rnn.Heads(heads, trunk=trunk), torch.randn(3, 2)
    outputs = {"a": rm.output.Categorical(), "b": rm.output.Euclidean()}
    metric = rm.LayerwiseMetric(model, outputs, mass=0.1)

    def loss(found):
        return loss_of(found["a"]) + 0.5 * found["b"].square().sum(1).mean()

    for _ in range(2):
        with metric.record():
            found = model(x)
        metric.backward(loss(found), found)
    dense = [plain(dense_factor(WrittenOut(model, k), outputs[k], x)) for k in "ab"]
    K = {name: torch.cat([each[name] for each in dense]) for name in dense[0]}
    assert_same(rows(metric), K)
    names, tensors = zip(*model.named_parameters(), strict=True)
    grads = torch.autograd.grad(loss(written_out(model, x)), tensors)
    e = dict(zip(names, grads, strict=True))
    expected = {}
    for block in metric.blocks.values():
        expected |= dense_sharp({p.name: p.space for p in block.parts}, K, e)
    assert_same(metric.natural_gradient(), expected)


# ---- laws of composition ---------------------------------------------------------


def by_parameter(model: nn.Module, x: Tensor, **options) -> dict[str, Tensor]:
    """Factors by the identity of the parameter, whatever it is called."""
    found = rows(linearised(model, x, **options))
    return {str(id(model.get_parameter(name))): K for name, K in found.items()}


def parts(count: int, loops: int = 1) -> list[nn.Module]:
    """Square modules that do not commute, one of them implicit."""
    modules = [
        nn.Tanh() @ rnn.Linear(3, 3, manifold=rm.manifolds.Stiefel())
        for _ in range(count)
    ]
    modules[1] = rnn.FixedPoint(mutants.body(3, 3), 3, solver=rnn.Picard(TIGHT))
    return modules


@given(seed=SEEDS)
def test_grouping_is_irrelevant(seed: int) -> None:
    torch.manual_seed(seed)
    f, g, h = parts(3)
    x = torch.randn(2, 3)
    chain = rnn.Sequential
    expected = by_parameter(chain(h, g, f), x)
    for other in (
        f @ g @ h,
        f @ (g @ h),
        chain(chain(h, g), f),
        chain(h, chain(g, f)),
        chain(h, nn.Identity(), g, chain(), f),
        rnn.Parallel(f) @ g @ rnn.Residual(rnn.Gate(h, h), 0.0, h),
    ):
        found = by_parameter(other, x)
        assert_same(found, expected, 1e-12)
    expected = by_parameter(rnn.Parallel(f, g, h), x)
    for other in (
        f + g + h,
        f + (g + h),
        h + f + g,
        rnn.Parallel(f, rnn.Parallel(g, h)),
    ):
        assert_same(by_parameter(other, x), expected, 1e-12)


def test_compositions_without_parameters_have_no_factor() -> None:
    bare = rnn.Residual(nn.Tanh()) + rnn.Gate(nn.Tanh(), nn.Identity())
    metric = linearised(nn.Linear(3, 3) @ bare @ rnn.Linear(3, 3), torch.randn(2, 3))
    assert set(metric.blocks) == {"0", "2"}


@SLOW
@given(trees(3))
def test_the_reverse_pass_is_the_adjoint_of_the_forward_one(case) -> None:
    model, x = case
    leaf = x.clone().requires_grad_()
    y = model(leaf)
    v, u = torch.randn_like(x), torch.randn(4, *y.shape)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        (together,) = torch.autograd.grad(y, leaf, u, True, is_grads_batched=True)
    alone = [torch.autograd.grad(y, leaf, each, True)[0] for each in u]
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-9, atol=1e-12)
    for forward in (model, WrittenOut(model)):
        pushed = torch.func.jvp(forward, (x,), (v,))[1]
        torch.testing.assert_close(
            (u * pushed).sum((1, 2)), (together * v).sum((1, 2)), rtol=1e-9, atol=1e-11
        )


@pytest.mark.parametrize("kind", ["orthogonal", "diagonal"])
@given(seed=SEEDS)
def test_coordinates_of_the_state_do_not_matter(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    body = mutants.body(3, 3)
    change = rnn.Linear(3, 3, bias=False).requires_grad_(False)
    back = rnn.Linear(3, 3, bias=False).requires_grad_(False)
    square = torch.linalg.qr(torch.randn(3, 3))[0]
    change.weight.copy_(
        square if kind == "orthogonal" else (1.0 + torch.rand(3)).diag()
    )
    back.weight.copy_(torch.linalg.inv(change.weight))
    moved = rnn.Sequential(
        rnn.Join(nn.Identity(), back, combine="concat"), Split(body), change
    )
    picard = rnn.Picard(TIGHT)
    last, x = rnn.Linear(3, 3), torch.randn(2, 3)
    one = last @ rnn.FixedPoint(body, 3, solver=picard)
    other = last @ back @ rnn.FixedPoint(moved, 3, solver=picard)
    assert_same(by_parameter(one, x), by_parameter(other, x), 1e-10)


class Split(nn.Module):
    """Calls a module of two arguments with the halves of one."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, both: Tensor) -> Tensor:
        return self.inner(*both.chunk(2, -1))


class Untied(nn.Module):
    """A recurrence with a copy of the cell for each time."""

    def __init__(self, net: rnn.Recurrent, times: int) -> None:
        super().__init__()
        self.cells = nn.ModuleList(copy.deepcopy(net.cell) for _ in range(times))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.zeros(len(x), 3)
        for t, cell in enumerate(self.cells):
            h = cell(x[:, t], h)
        return h


@given(seed=SEEDS)
def test_time_shares_weights(seed: int) -> None:
    torch.manual_seed(seed)
    net = rnn.Recurrent(mutants.body(2, 3), 3, output="last")
    x = torch.randn(2, 4, 2)
    copies = rows(linearised(Untied(net, 4), x))
    names = [name for name, _ in net.cell.named_parameters()]
    total = {
        f"cell.{name}": sum(copies[f"cells.{t}.{name}"] for t in range(4))
        for name in names
    }
    assert_same(rows(linearised(net, x)), total, 1e-12)


@SLOW
@given(case=trees(3), mass=st.floats(0.01, 1.0))
def test_blocks_are_those_of_the_gauss_newton_matrix(case, mass: float) -> None:
    model, x = case
    K = plain(dense_factor(WrittenOut(model), rm.output.Categorical(), x))
    named = dict(model.named_parameters())
    joint = rm.LayerwiseMetric(
        model, rm.output.Categorical(), mass=mass, blocks="model"
    )
    layers = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=mass)
    for metric in (joint, layers):
        with metric.record():
            z = model(x)
        metric.backward(loss_of(z), z)
        for block in metric.blocks.values():
            bases = torch.block_diag(*[p.space.basis().flatten(1) for p in block.parts])
            whole = torch.cat([K[p.name] for p in block.parts], 1) @ bases.mT
            mass_only = rm.LayerMetric(
                [rm.Part(p.name, p.space) for p in block.parts]
            ).to_dense()
            torch.testing.assert_close(
                block.to_dense(), whole.mT @ whole + mass_only, rtol=1e-9, atol=1e-9
            )
    expected = dense_natural_gradient(
        WrittenOut(model),
        rm.output.Categorical(),
        x,
        loss_of,
        mass=mass,
        blocks="model",
    )
    assert_same(joint.natural_gradient(), plain(expected))
    assert set(named) == set(joint.natural_gradient())


# ---- implicit modules ------------------------------------------------------------


@pytest.mark.parametrize("adjoint", [rnn.Direct(), rnn.Krylov()], ids=str)
@given(seed=SEEDS, q=st.floats(0.1, 0.8))
def test_unrolling_converges_at_the_rate_of_the_map(adjoint, seed, q) -> None:
    torch.manual_seed(seed)
    inner = rnn.Linear(3, 3, bias=False, manifold=rm.manifolds.Stiefel())
    affine = rnn.Join(rnn.Linear(2, 3), Times(q) @ inner)
    model = rnn.FixedPoint(affine, 3, solver=rnn.Anderson(TIGHT), adjoint=adjoint)
    x, output = torch.randn(2, 2), rm.output.Euclidean()
    metric = rm.LayerwiseMetric(model, output)
    with metric.record():
        z = model(x)
    metric.backward(z.square().sum(), z)
    assert float(model.residual.max()) <= 10 * TIGHT
    assert float(model.adjoint_residual.max()) <= 1e-11
    exact = rows(metric)["module.0.bias"]
    for t in (1, 3, 9):

        class Unrolled(WrittenOut):
            def forward(self, x: Tensor) -> Tensor:
                z = torch.zeros(len(x), 3)
                for _ in range(t):  # noqa: B023
                    z = affine(x, z)
                return z

        K = dense_factor(Unrolled(model), output, x)["model.module.0.bias"]
        # L (1 + q W + ... + (q W)^(t-1)) with |L| = 1 / sqrt(n), and W orthogonal.
        bound = q**t / (1.0 - q) / len(x) ** 0.5
        errors = torch.linalg.matrix_norm((exact - K).view(3, 2, 3).transpose(0, 1), 2)
        assert float(errors.max()) <= bound * (1.0 + 1e-9) + 1e-11
        assert (
            float(errors.min()) >= q**t / (1.0 + q) / len(x) ** 0.5 * (1 - 1e-9) - 1e-11
        )


def implicit(size: int = 3, **options) -> rnn.FixedPoint:
    return rnn.FixedPoint(mutants.body(4, size), size, **options)


def test_what_is_inside_is_recorded_once() -> None:
    model = rnn.Linear(3, 3) @ implicit()
    metric = linearised(model, torch.randn(5, 4), 2)
    for block in metric.blocks.values():
        for part in block.parts:
            assert isinstance(
                part.factor, rm.factors.LinearFactor | rm.factors.BiasFactor
            )
            assert part.factor.cotangents.shape[2] == 1, "one position: one use"


@pytest.mark.parametrize("solver", [rnn.Picard(), rnn.Anderson()], ids=str)
def test_examples_do_not_depend_on_each_other(solver) -> None:
    model, x = implicit(solver=solver), torch.randn(6, 4)
    x[0] *= 100.0
    together = model(x)
    assert model.iterations < 100
    for i in range(6):
        alone = model(x[i : i + 1])[0]
        torch.testing.assert_close(alone, together[i], rtol=0, atol=1e-14)


@pytest.mark.parametrize("wrong", mutants.SOLVERS)
def test_solvers_that_mix_examples_are_noticed(wrong: str) -> None:
    model, x = implicit(solver=mutants.SOLVERS[wrong]()), torch.randn(6, 4)
    x[0] *= 1e3  # saturated, so found at once
    together = model(x)
    alone = torch.cat([model(x[i : i + 1]) for i in range(6)])
    independent = torch.allclose(together, alone, rtol=0, atol=1e-12)
    model(x)
    assert not (independent and float(model.residual.max()) < 1e-11)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("adjoint", [rnn.Direct(), rnn.Krylov()], ids=str)
def test_precision(adjoint, dtype) -> None:
    torch.set_default_dtype(dtype)
    model = rnn.Linear(3, 3) @ implicit(adjoint=adjoint)
    x = torch.randn(5, 4)
    metric = linearised(model, x, 2)
    K = plain(dense_factor(WrittenOut(model), rm.output.Categorical(), x))
    found = rows(metric)
    assert {v.dtype for v in found.values()} == {dtype}
    assert_same(found, K, 1e-10 if dtype == torch.float64 else 1e-4)


@pytest.mark.parametrize("adjoint", [rnn.Direct(), rnn.Krylov()], ids=str)
def test_many_passes_over_one_graph(adjoint) -> None:
    model, x = implicit(adjoint=adjoint), torch.randn(5, 4)
    weight = model.get_parameter("module.0.0.weight")
    z = model(x)
    v = torch.randn(7, *z.shape)
    single = [torch.autograd.grad(z, weight, each, retain_graph=True)[0] for each in v]
    again = torch.autograd.grad(z, weight, v, True, is_grads_batched=True)[0]
    torch.testing.assert_close(again, torch.stack(single), rtol=1e-11, atol=1e-13)
    last = torch.autograd.grad(z, weight, v, is_grads_batched=True)[0]
    assert torch.equal(last, again)
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(z, weight, v[0])


def test_the_graph_is_freed_with_its_output() -> None:
    z = implicit()(torch.randn(5, 4))
    node = weakref.ref(z.grad_fn)
    gc.disable()
    try:
        z.sum().backward()
        del z
        assert node() is None, "no cycle keeps the activations"
    finally:
        gc.enable()


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed(reentrant: bool) -> None:
    model, x = implicit(), torch.randn(5, 4, requires_grad=True)
    expected = torch.autograd.grad(model(x).square().sum(), x)[0]
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-14)


def test_plain_backward_fills_the_gradients() -> None:
    model, x = implicit(), torch.randn(5, 4, requires_grad=True)
    model(x).square().sum().backward()
    leaves = [x, *model.parameters()]
    expected = torch.autograd.grad(written_out(model, x).square().sum(), leaves)
    for leaf, gradient in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, gradient, rtol=1e-9, atol=1e-11)


def test_second_derivatives_are_right_or_refused() -> None:
    model, x = implicit(), torch.randn(5, 4)
    values = {n: p.detach() for n, p in model.named_parameters()}
    v = {n: torch.randn_like(p) for n, p in values.items()}

    def hessian(module: nn.Module, prefix: str):
        def loss(named):
            named = {prefix + n: p for n, p in named.items()}
            return torch.func.functional_call(module, named, (x,)).square().sum()

        return torch.func.jvp(torch.func.grad(loss), (values,), (v,))[1]

    assert_same(hessian(model, ""), hessian(WrittenOut(model), "model."), 1e-9)
    tensors = list(model.parameters())
    first = torch.autograd.grad(model(x).square().sum(), tensors, create_graph=True)
    with pytest.raises(LinearizationError, match="twice"):
        torch.autograd.grad(sum(g.sum() for g in first), tensors)


def test_forward_mode_outside_of_torch_func_is_refused() -> None:
    from torch.autograd import forward_ad

    model, x = implicit(), torch.randn(5, 4)
    with forward_ad.dual_level(), pytest.raises(LinearizationError, match="jvp"):
        model(forward_ad.make_dual(x, x))


def expanding() -> rnn.Join:
    return rnn.Join(rnn.Linear(4, 3), mutants.layer(3, 3, 3.0))


def test_what_does_not_converge() -> None:
    x = torch.randn(2, 4)
    picard = rnn.Picard(iterations=5)
    with pytest.raises(rnn.NotConvergedError, match="5 iterations"):
        rnn.FixedPoint(expanding(), 3, solver=picard)(x)
    assert rnn.NotConvergedWarning is errors.NotConvergedWarning
    with pytest.warns(rnn.NotConvergedWarning, match="5 iterations"):
        rnn.FixedPoint(expanding(), 3, solver=picard, on_failure="warn")(x)
    quiet = rnn.FixedPoint(expanding(), 3, solver=picard, on_failure="ignore")
    assert quiet(x).isfinite().all()
    assert float(quiet.residual.max()) > 0.1
    found = torch.func.vmap(rnn.FixedPoint(expanding(), 3, solver=picard))(x[:, None])
    assert found.isnan().all(), "inside of vmap an error is not a number"
    # Anderson finds it; so the derivative is right as well, where the map expands.
    model = rnn.FixedPoint(expanding(), 3, solver=rnn.Anderson(TIGHT))
    (slope,) = torch.func.jacrev(lambda e: model(e[None])[0])(x[0])[None]
    weight = [m.weight.detach() for m in model.module.branches]
    exact = torch.linalg.solve(torch.eye(3) - weight[1], weight[0])
    torch.testing.assert_close(slope, exact, rtol=1e-9, atol=1e-11)
    leaf = x.clone().requires_grad_()
    (pulled,) = torch.autograd.grad(model(leaf)[:, 0].sum(), leaf)
    torch.testing.assert_close(pulled[0], exact[0], rtol=1e-9, atol=1e-11)


def test_adjoints_that_do_not_converge() -> None:
    weak = rnn.Krylov(iterations=1)
    x = torch.randn(2, 4)
    model = implicit(adjoint=weak)
    z = model(x)
    with pytest.raises(rnn.NotConvergedError, match="adjoint"):
        z.sum().backward()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop")
        found = torch.autograd.grad(
            z,
            list(model.parameters()),
            torch.eye(6).view(6, 2, 3),
            is_grads_batched=True,
        )
    assert all(g.isnan().any() for g in found)
    with pytest.warns(rnn.NotConvergedWarning, match="adjoint"):
        implicit(adjoint=weak, on_failure="warn")(x).sum().backward()


class Centred(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x - 0.5 * x.mean(0)


def test_examples_that_interact_are_refused() -> None:
    body = rnn.Sequential(mutants.body(4, 3), Centred())
    x = torch.randn(3, 4)
    with pytest.raises(rnn.NotConvergedError, match="interact"):
        rnn.FixedPoint(body, 3)(x).sum().backward()
    with pytest.raises(rnn.NotConvergedError, match="interact"):
        linearised(rnn.FixedPoint(body, 3, adjoint=rnn.Krylov()), x)


def test_noise_inside_is_refused() -> None:
    body = rnn.Sequential(mutants.body(4, 3), nn.Dropout(0.5))
    with pytest.raises(rnn.NotConvergedError):
        rnn.FixedPoint(body, 3)(torch.randn(3, 4))
    rnn.FixedPoint(body, 3).eval()(torch.randn(3, 4))


def test_what_is_frozen_needs_no_gradient() -> None:
    model, x = implicit(), torch.randn(2, 4)
    with torch.no_grad():
        z = model(x)
    assert not z.requires_grad
    assert torch.equal(model(x).detach(), z)
    model.requires_grad_(False)
    assert not model(x).requires_grad
    assert model(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("adjoint", [None, rnn.Krylov()], ids=str)
def test_meta(adjoint) -> None:
    model = (rnn.Linear(3, 3) @ implicit(adjoint=adjoint)).to("meta")
    x = torch.empty(5, 4, device="meta")
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    with metric.record():
        z = model(x)
    metric.backward(z.square().sum(), z)
    assert metric.natural_gradient()["1.weight"].shape == (3, 3)


@pytest.mark.gpu
@pytest.mark.parametrize("adjoint", [rnn.Direct(), rnn.Krylov(TIGHT, 12)], ids=str)
def test_on_a_device(adjoint) -> None:
    model = rnn.Linear(3, 3) @ implicit(adjoint=adjoint, solver=rnn.Anderson(TIGHT))
    x = torch.randn(5, 4)
    expected = rows(linearised(model, x, 2))
    found = rows(linearised(model.to("cuda"), x.to("cuda"), 2))
    assert_same({n: v.cpu() for n, v in found.items()}, expected)


def test_autocast() -> None:
    model, x = implicit().float(), torch.randn(5, 4).float()
    with torch.autocast("cpu", torch.bfloat16):
        z = model(x)
    z.float().sum().backward()
    torch.testing.assert_close(z.float(), model(x), rtol=0.1, atol=0.1)
    gradient = model.get_parameter("module.0.0.bias").grad
    assert gradient.isfinite().all()
    assert gradient.any()


def test_states_with_more_dimensions_and_a_given_start() -> None:
    body = rnn.Sequential(rnn.Join(nn.Identity(), mutants.layer(3, 3, 0.5)), nn.Tanh())
    model, x = rnn.FixedPoint(body), torch.randn(2, 4, 3)
    z = model(x)
    assert z.shape == (2, 4, 3)
    model(x, z.detach())
    assert model.iterations <= 2
    found = rows(linearised(rnn.Sequential(model, nn.Flatten()), x))
    big = rnn.Sequential(rnn.FixedPoint(body, adjoint=rnn.Krylov()), nn.Flatten())
    assert_same(rows(linearised(big, x)), {n: found[n] for n in found}, 1e-9)


# ---- the other compositions ------------------------------------------------------


@pytest.mark.parametrize("name", mutants.TWINS)
def test_mutants_are_rejected(name: str) -> None:
    right, wrong = mutants.TWINS[name]
    x = torch.randn(3, 4)
    assert_right(right(), x, 1)
    with pytest.raises(AssertionError):
        assert_right(wrong(), x, 1)


def test_heads_that_do_not_all_teach_the_trunk_are_rejected() -> None:
    x = torch.randn(3, 4)
    outputs = {"a": rm.output.Euclidean(), "b": rm.output.Euclidean()}
    for kind, right in zip(mutants.HEADS, (True, False), strict=True):
        heads = {"a": rnn.Linear(3, 2), "b": rnn.Linear(3, 2)}
        model = kind(heads, trunk=rnn.Linear(4, 3))
        metric = rm.LayerwiseMetric(model, outputs)
        with metric.record():
            found = model(x)
        metric.pull_back(found)
        dense = [
            plain(dense_factor(WrittenOut(model, k), outputs[k], x))["trunk.weight"]
            for k in "ab"
        ]
        same = torch.allclose(rows(metric)["trunk.weight"], torch.cat(dense))
        assert same is right


def test_a_learned_initial_state() -> None:
    net = rnn.Recurrent(mutants.body(2, 3), 3, initial="learned", output="last")
    with torch.no_grad():
        net.initial.value.normal_()
    assert_right(rnn.Sequential(net, rnn.Linear(3, 3)), torch.randn(4, 2, 2))
    sphere = rnn.InitialState(3, rm.manifolds.Sphere())
    net = rnn.Recurrent(mutants.body(2, 3), 3, initial=sphere, output="last")
    assert_right(rnn.Sequential(net, rnn.Linear(3, 3)), torch.randn(4, 2, 2))
    table = rnn.InitialState((2, 3))
    assert_right(
        rnn.Sequential(table, nn.Flatten(), rnn.Linear(6, 3)), torch.randn(4, 2)
    )


def test_recurrent_takes_cells_of_torch_and_time_anywhere() -> None:
    cell = nn.GRUCell(2, 3)
    x, h = torch.randn(4, 5, 2), torch.randn(4, 3)
    states = rnn.Recurrent(cell, 3)(x, h)
    time_first = rnn.Recurrent(cell, 3, dim=0)(x.transpose(0, 1), h)
    assert torch.equal(states.transpose(0, 1), time_first)
    whole = nn.GRU(2, 3, batch_first=True)
    for name, value in cell.named_parameters():
        whole.get_parameter(f"{name}_l0").data.copy_(value.data)
    torch.testing.assert_close(states, whole(x, h[None])[0])
    tokens = torch.randint(0, 7, (4, 5))
    embedded = rnn.Join(nn.Embedding(7, 3), nn.Linear(3, 3))
    assert rnn.Recurrent(embedded, 3)(tokens).shape == (4, 5, 3)


def test_operators() -> None:
    f, g, plain_ = rnn.Linear(3, 3), rnn.Linear(3, 3), nn.Linear(3, 3)
    x = torch.randn(2, 3)
    assert torch.equal((f @ g)(x), f(g(x)))
    assert torch.equal((f + g)(x), f(x) + g(x))
    assert torch.equal((plain_ @ f)(x), plain_(f(x)))
    assert torch.equal((f @ plain_)(x), f(plain_(x)))
    assert torch.equal((plain_ + f)(x), plain_(x) + f(x))
    assert torch.equal((f + plain_)(x), f(x) + plain_(x))
    assert [*(f @ g @ plain_)] == [plain_, g, f]
    assert [*(f @ (g @ plain_))] == [plain_, g, f]
    assert [*(f @ f)] == [f, f]
    assert (f + g + plain_).branches == [f, g, plain_]
    assert (f + f).branches == [f, f]
    named = rnn.Sequential(f, g)
    assert [*(plain_ @ named)] == [named, plain_], "what has a name stays together"
    assert (named + f).branches == [named, f]
    assert isinstance(nn.Sequential(plain_) + named, rnn.Parallel)
    total = named
    total += f
    assert isinstance(total, rnn.Parallel)
    for other in (torch.tanh, 2.0, None):
        with pytest.raises(TypeError):
            f @ other
        with pytest.raises(TypeError):
            other + f


def test_errors_say_what_to_do() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(TypeError, match=r"torch\.nn\.Tanh"):
        rnn.Sequential(nn.Linear(3, 3), torch.tanh)
    with pytest.raises(ShapeError, match="shortcut"):
        rnn.Residual(nn.Linear(3, 1))(x)
    with pytest.raises(ShapeError, match="concat"):
        (rnn.Linear(3, 2) + rnn.Linear(3, 1))(x)
    with pytest.raises(ShapeError, match="2 branches and got 1"):
        rnn.Join(nn.Linear(3, 2), nn.Linear(3, 2))(x)
    with pytest.raises(ShapeError, match="size of the state"):
        rnn.FixedPoint(rnn.Join(nn.Linear(3, 2), nn.Linear(3, 2)))(x)
    with pytest.raises(ShapeError, match="comes back"):
        rnn.Feedback(nn.Linear(3, 2), nn.Linear(2, 1))(x)
    with pytest.raises(ShapeError, match="no times"):
        rnn.Recurrent(mutants.body(3, 2), 2)(torch.randn(2, 0, 3))
    with pytest.raises(ShapeError, match="next one"):
        rnn.Recurrent(rnn.Join(nn.Linear(3, 2), nn.Linear(4, 2)), 4)(x[:, None])
    for make in (
        rnn.Parallel,
        rnn.Heads,
        lambda: rnn.Parallel(nn.Tanh(), combine="mean"),
        lambda: rnn.Recurrent(nn.Tanh(), 2, initial="one"),
        lambda: rnn.Recurrent(nn.Tanh(), 2, output="all"),
        lambda: rnn.FixedPoint(nn.Tanh(), on_failure="stop"),
    ):
        with pytest.raises(ValueError, match=r"choose|at least one"):
            make()


def test_heads_by_position() -> None:
    model, x = rnn.Heads(nn.Linear(3, 2), nn.Linear(3, 1)), torch.randn(2, 3)
    first, second = model(x)
    assert torch.equal(first, model.heads["0"](x))
    assert second.shape == (2, 1)
    named = rnn.Heads(nn.ModuleDict({"a": nn.Linear(3, 2)}))
    assert set(named(x)) == {"a"}


# ---- what a composition says of itself -------------------------------------------


class Quadric(geoopt.Manifold):
    """Matrices of unit norm, without a closed form of their dimension."""

    name = "Quadric"
    ndim = 2
    reversible = False

    def random(self, *size, dtype=None, device=None):
        point = torch.randn(*size, dtype=dtype, device=device)
        return geoopt.ManifoldTensor(point / point.norm(), manifold=self)

    def egrad2rgrad(self, x, u):
        return self.proju(x, u)

    def proju(self, x, u):
        return u - (u * x).sum((-2, -1), keepdim=True) * x

    def projx(self, x):
        return x / x.norm()

    def retr(self, x, u):
        return self.projx(x + u)

    expmap = retr

    def inner(self, x, u, v=None, *, keepdim=False):
        return (u * (u if v is None else v)).sum((-2, -1), keepdim=keepdim)

    def transp(self, x, y, v):
        return self.proju(y, v)

    def _check_point_on_manifold(self, x, *, atol=1e-5, rtol=1e-5):
        return bool((x.norm() - 1.0).abs() < atol), None

    def _check_vector_on_tangent(self, x, u, *, atol=1e-5, rtol=1e-5):
        return bool((x * u).sum().abs() < atol), None


def everything() -> nn.Module:
    stiefel = rm.manifolds.Stiefel()
    shared = rnn.Linear(3, 3, manifold=stiefel)
    loop = rnn.Feedback(nn.Tanh() @ shared, mutants.layer(3, 3, 0.3))
    gate = rnn.Gate(nn.Linear(3, 3), shared)
    return rnn.Sequential(
        rnn.Linear(4, 3, manifold=stiefel),
        loop,
        rnn.Residual(gate, 0.5),
        implicit_on(3),
    )


def implicit_on(size: int) -> rnn.FixedPoint:
    return rnn.FixedPoint(mutants.body(size, size), size)


def test_declared_is_the_product_of_the_children_s() -> None:
    model = everything()

    def flat(nested, prefix=""):
        for key, value in nested.items():
            if isinstance(value, dict):
                yield from flat(value, f"{prefix}{key}.")
            else:
                yield prefix + key, value

    found = dict(flat(model.declared()))
    assert list(found) == [name for name, _ in model.named_parameters()]
    assert found["1.ahead.0.weight"].name == "Stiefel"
    assert isinstance(found["2.module.gate.weight"], rm.manifolds.Euclidean)
    assert model.declared()["1"] == model[1].declared()
    model[0].requires_grad_(False)
    assert "0" not in model.declared()


def test_print() -> None:
    model = everything()
    model[0].bias.requires_grad_(False)
    assert repr(model).startswith(rnn.tree(model) + "\n(mass and sensitivity: build a ")
    lines = rnn.tree(model).splitlines()
    assert lines[0].split() == ["shape", "manifold", "dim"]
    metric = rm.LayerwiseMetric(model, None)
    total = sum(declared.space().dim for declared in metric.parameters)
    assert lines[1].split() == ["Sequential", str(total)]
    text = "\n".join(lines)
    assert "Residual(scale=0.5)" in text
    assert "value: Linear = 1.ahead.0" in text
    assert "frozen" in text
    assert max(map(len, lines)) < 88
    tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    tied[1].weight = tied[0].weight
    assert "= 0.weight" in rnn.tree(tied)


def test_print_of_what_has_no_values_yet() -> None:
    lazy = rnn.Sequential(nn.LazyLinear(3), nn.Tanh())
    assert "lazy" in repr(lazy)
    lazy(torch.randn(2, 4))
    assert "3 x 4" in repr(lazy)
    assert (
        repr(everything().to("meta")).splitlines()[1:]
        == (repr(everything()).splitlines()[1:])
    )

    unknown = rnn.Sequential(rnn.InitialState((2, 2), Quadric()))
    assert rnn.tree(unknown).splitlines()[-1].split()[-1] == "3"
    assert rnn.tree(unknown.to("meta")).splitlines()[-1].split()[-1] == "?"


def test_print_with_a_metric() -> None:
    model, x = everything(), torch.randn(5, 4)
    metric = rm.LayerwiseMetric(
        model,
        rm.output.Categorical(),
        mass={"0.weight": 0.25, "*.gate.bias": torch.tensor([1.0, 2.0, 3.0]), "*": 0.5},
    )
    assert "0.25" in rnn.tree(model, metric), "before the first pass there is the mass"
    with metric.record():
        z = model(x)
    metric.backward(loss_of(z), z)
    text = rnn.tree(model, metric)
    assert text.splitlines()[0].split()[3:] == ["mass", "sensitivity", "|gradient|"]
    (line,) = [each for each in text.splitlines() if "1..3" in each]
    (part,) = [
        p for b in metric.blocks.values() for p in b.parts if "gate.bias" in p.name
    ]
    mass, sensitivity, gradient = line.split()[-3:]
    assert mass == "1..3"
    K = part.factor.to_dense()
    assert float(sensitivity) == pytest.approx(
        float(torch.linalg.matrix_norm(K, 2)), rel=1e-2
    )
    slope = model.get_parameter(part.name).grad
    assert float(gradient) == pytest.approx(float(slope.norm()), rel=1e-2)
    # On a manifold: the largest response to a tangent vector of unit length.
    line = text.splitlines()[3]
    (part,) = [
        p for b in metric.blocks.values() for p in b.parts if p.name == "0.weight"
    ]
    basis = part.space.basis().flatten(1)
    largest = torch.linalg.matrix_norm(part.factor.to_dense() @ basis.mT, 2)
    assert float(line.split()[-2]) == pytest.approx(float(largest), rel=1e-2)
    slope = basis @ model[0].weight.grad.reshape(-1)
    assert float(line.split()[-1]) == pytest.approx(float(slope.norm()), rel=1e-2)


def test_print_knows_the_metric_that_was_built_on_the_model() -> None:
    model, x = everything(), torch.randn(5, 4)
    bare = repr(model)
    assert "mass" in bare.splitlines()[-1]
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.25)
    *lines, last = repr(model).splitlines()
    assert "\n".join(lines) == rnn.tree(model, metric)
    assert "0.25" in lines[3]
    assert last == "(sensitivity: after metric.backward or metric.pull_back)"
    with metric.record():
        z = model(x)
    metric.backward(loss_of(z), z)
    assert repr(model) == rnn.tree(model, metric)
    assert repr(model).splitlines()[0].split()[-2:] == ["sensitivity", "|gradient|"]
    # A part of the model, a chain around it, and a slice know the same metric.
    assert repr(model[1]) == rnn.tree(model[1], metric)
    assert repr(model[:2]) == rnn.tree(model[:2], metric)
    around = rnn.Sequential(nn.Linear(4, 4), model)
    assert repr(around) == rnn.tree(around, metric)
    # The last one that is still there counts; none is kept alive.
    other = rm.LayerwiseMetric(model, None, mass=0.125)
    assert "0.125" in repr(model)
    kept = weakref.ref(other)
    del other
    gc.collect()
    assert kept() is None
    assert repr(model) == bare
    for twin in (copy.deepcopy(around), pickle.loads(pickle.dumps(around))):
        assert repr(twin[1]) == bare


def test_print_tells_no_sensitivity_of_an_overwritten_input() -> None:
    model, x = everything(), torch.randn(5, 4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.25)
    with metric.record():
        z = model(x)
    metric.backward(loss_of(z), z)
    number = rnn.tree(model, metric).splitlines()[3].split()[-2]
    x.mul_(2.0)
    assert "0.25" in repr(model)
    assert number not in repr(model)
    assert "changed in place" in repr(model).splitlines()[-1]
    with pytest.raises(LinearizationError, match="changed in place"):
        rnn.tree(model, metric)


def test_a_function_transform_gets_a_short_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """vmap asks for it in every call, where nothing may be computed."""
    model, x = rnn.Sequential(nn.Linear(4, 3)), torch.randn(5, 4)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    with metric.record():
        z = model(x)
    metric.backward(loss_of(z), z)
    names: list[str] = []
    named = Composition.__repr__
    monkeypatch.setattr(
        Composition, "__repr__", lambda self: names.append(named(self)) or names[-1]
    )
    torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
    assert set(names) <= {"Sequential(...)"}
    assert torch.func.vmap(lambda e: e * len(repr(model)))(x[:1, 0]) == x[0, 0] * 15
    assert repr(model) == rnn.tree(model, metric)


def test_print_on_meta() -> None:
    model = rnn.Sequential(
        rnn.Linear(4, 3, manifold=rm.manifolds.Sphere()), nn.Linear(3, 3)
    ).to("meta")
    mass = {"0.*": 0.5, "1.weight": torch.ones(3, 3), "1.bias": 2.0}
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=mass)
    with metric.record():
        z = model(torch.randn(5, 4, device="meta"))
    metric.pull_back(z)
    assert repr(model).splitlines()[3].split()[-2:] == ["?", "?"]


@given(st.integers(1, 40), st.integers(1, 9), st.integers(1, 9), st.data())
def test_the_sensitivity_is_the_operator_norm(
    rank: int, rows: int, columns: int, data: st.DataObject
) -> None:
    seed = data.draw(st.integers(0, 2**20))
    generator = torch.Generator().manual_seed(seed)
    K = torch.randn(rank, rows * columns, generator=generator)
    # From one direction to all equal: what makes an iteration slow or stop early.
    left, values, right = torch.linalg.svd(K, full_matrices=False)
    power = data.draw(st.sampled_from([0.0, 0.1, 1.0, 30.0]))
    values = torch.linspace(1.0, 0.1, len(values)) ** power
    K = (left * values) @ right
    manifold = data.draw(
        st.sampled_from([rm.manifolds.Euclidean(), rm.manifolds.Sphere()])
    )
    point = torch.randn(rows, columns, generator=generator)
    mass = Mass(scalar=data.draw(st.sampled_from([1.0, 1e-3])))
    space = rm.TangentSpace(manifold, manifold.projx(point), mass)
    part = Part("w", space, rm.factors.DenseFactor(K.view(rank, rows, columns)))
    basis = space.basis().flatten(1)
    expected = float(torch.linalg.matrix_norm(K @ basis.mT, 2)) if len(basis) else 0.0
    assert factor_norm(part) == pytest.approx(expected, rel=1e-3, abs=1e-12)


def test_the_sensitivity_of_large_and_of_odd_factors() -> None:
    def part(K: Tensor | None) -> Part:
        space = rm.TangentSpace(rm.manifolds.Euclidean(), torch.zeros(300))
        return Part("w", space, None if K is None else rm.factors.DenseFactor(K))

    K = torch.randn(500, 300, generator=torch.Generator().manual_seed(3))
    largest = float(torch.linalg.matrix_norm(K, 2))
    assert factor_norm(part(K)) == pytest.approx(largest, rel=1e-3)
    assert factor_norm(part(K.float())) == pytest.approx(largest, rel=1e-3)
    assert factor_norm(part(None)) == 0.0
    assert factor_norm(part(torch.zeros(4, 300))) == 0.0
    assert math.isnan(factor_norm(part(K * torch.nan)))


def test_copies() -> None:
    model, x = everything(), torch.randn(5, 4)
    z = model(x)
    z.sum().backward()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), z)
        assert rnn.tree(twin) == rnn.tree(model)
        assert_same(rows(linearised(twin, x)), rows(linearised(model, x)), 1e-12)
    other = everything()
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), z)


def test_training_goes_down() -> None:
    torch.manual_seed(1)
    model, x = everything(), torch.randn(16, 4)
    target = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=1e-1)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5)
    losses = []
    for _ in range(15):
        with metric.record():
            z = model(x)
        loss = F.cross_entropy(z, target)
        metric.backward(loss, z)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]
