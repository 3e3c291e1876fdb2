"""Models made to be linearised wrongly: each is right, or refused with a reason.

A case has two modes. In the good one the model is innocent, in the bad one it does what
its name says. Both orders are run, since what a first pass has found out about a graph
is trusted later; and with and without a loss, since only a loss has a gradient to
compare with. After every pass, refused or not, the parameters, buffers, gradients and
the optimizer are compared bit for bit with those of a twin that was never linearised.
"""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint
from zoo_models import (
    MASS,
    grad_jacobian,
    trainable,
    truth,
    wrong_factors,
    wrong_gradients,
)

import riemannian_modules as rm
from riemannian_modules import errors

REMEDY = re.compile(
    r"\b(use|call|pass|build|raise|lower|load|skip|check|put|freeze|give|hand|run|"
    r"keep|test|set|choose|declare|register_rule|subclass|try|needs|must)\b",
    re.IGNORECASE,
)

Run = Callable[[Any, Tensor], Tensor]


class Model(nn.Module):
    """Two layers; ``bad`` switches to what the case is about."""

    bad = False
    width = 5

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, self.width)
        self.last = nn.Linear(self.width, 3)
        self.build()

    def build(self) -> None:
        """Add what the case needs."""

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.middle(self.first(x))))

    def middle(self, h: Tensor) -> Tensor:
        return h


@dataclass(frozen=True)
class Case:
    """A model, how it is run, and what has to come of its bad mode.

    Attributes:
        make: makes the model.
        run: runs it.
        batch: inputs of a pass, from the mode.
        right: whether the bad mode has to be right; else it may also be refused.
        tolerance: of the comparison, where it is right.
        copies: whether the model can be copied.
        same: whether both modes compute the same function, so that the good one gives
            the truth.
        hows: ways to linearise it.
    """

    make: Callable[[], nn.Module]
    run: Run = lambda model, x: model(x)
    batch: Callable[[bool], Tensor] = lambda bad: torch.randn(4, 5)
    right: bool = False
    tolerance: float = 1e-9
    copies: bool = True
    same: bool = False
    hows: tuple[str, ...] = ("backward", "pull_back", "optimum")


CASES: dict[str, Case] = {}


def case(name: str, **options: Any) -> Callable[[type[nn.Module]], type[nn.Module]]:
    def register(kind: type[nn.Module]) -> type[nn.Module]:
        CASES[name] = Case(kind, **options)
        return kind

    return register


# --- the parameter is used where its layer does not see it


@case("F.linear in the parent", right=True)
class InParent(Model):
    def middle(self, h: Tensor) -> Tensor:
        return F.linear(h, self.first.weight) if self.bad else h


def outside(model: Model, x: Tensor) -> Tensor:
    z = model(x)
    return z + F.linear(x, model.last.weight) if model.bad else z


CASES["F.linear outside the model"] = Case(Model, outside)


@case("double use of a layer", right=True)
class Double(Model):
    def middle(self, h: Tensor) -> Tensor:
        return self.first(torch.tanh(h)) if self.bad else h


@case("which of two weights is used outside", right=True)
class WhichWeight(Model):
    """The same operations in the same order, with another weight."""

    def build(self) -> None:
        self.other = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.other if self.bad else self.first).weight
        h = F.linear(x, weight) + self.first(x) * self.other(x)
        return self.last(torch.tanh(h))


@case("an alias in a list, behind a gate", right=False)
class AliasInList(Model):
    def build(self) -> None:
        self.alias = [self.first.weight]

    def middle(self, h: Tensor) -> Tensor:
        return h + float(self.bad) * F.linear(h, self.alias[0])


class Borrower(nn.Module):
    """A leaf that uses the weight of another layer, which it does not own."""

    def __init__(self, lender: nn.Linear) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.lender = [lender]
        self.gate = 0.0

    def forward(self, h: Tensor) -> Tensor:
        return self.scale * h + self.gate * F.linear(h, self.lender[0].weight)


@case("a leaf that borrows another layer's weight")
class Borrowing(Model):
    def build(self) -> None:
        self.borrower = Borrower(self.first)

    def middle(self, h: Tensor) -> Tensor:
        self.borrower.gate = float(self.bad)
        return self.borrower(h)


@case("a buffer that aliases a parameter", right=True)
class BufferAlias(Model):
    def build(self) -> None:
        self.register_buffer("shadow", self.first.weight.detach())

    def middle(self, h: Tensor) -> Tensor:
        return F.linear(h, self.shadow) if self.bad else h


# --- the layer does not compute what its type says


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return 2.0 * output


def scaled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return module.factor * output


@case("a hook on the output, added later")
class HookAdded(Model):
    def forward(self, x: Tensor) -> Tensor:
        if not self.bad:
            return super().forward(x)
        handle = self.first.register_forward_hook(doubled)
        try:
            return super().forward(x)
        finally:
            handle.remove()


@case("a hook on the output that stays")
class HookStays(Model):
    def build(self) -> None:
        self.first.factor = 1.0
        self.first.register_forward_hook(scaled)

    def forward(self, x: Tensor) -> Tensor:
        self.first.factor = 2.0 if self.bad else 1.0
        return super().forward(x)


def halved(module: nn.Module, args: Any) -> Any:
    return tuple(0.5 * x for x in args)


@case("a hook on the input", right=True)
class HookBefore(Model):
    def forward(self, x: Tensor) -> Tensor:
        if not self.bad:
            return super().forward(x)
        handle = self.first.register_forward_pre_hook(halved)
        try:
            return super().forward(x)
        finally:
            handle.remove()


@case("a forward set on the instance")
class ForwardOnInstance(Model):
    def forward(self, x: Tensor) -> Tensor:
        if self.bad:
            layer = self.first
            layer.forward = lambda x: F.linear(x, 2.0 * layer.weight, layer.bias)
        try:
            return super().forward(x)
        finally:
            self.first.__dict__.pop("forward", None)


@case("a forward on the instance with a changing factor")
class FactorOnInstance(Model):
    def build(self) -> None:
        self.factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        self.factor = 2.0 if self.bad else 1.0
        layer, factor = self.first, self.factor
        layer.forward = lambda x: F.linear(x, factor * layer.weight, layer.bias)
        try:
            return super().forward(x)
        finally:
            self.first.__dict__.pop("forward", None)


@case("pruning", copies=False)
class Pruned(Model):
    def build(self) -> None:
        prune.l1_unstructured(self.first, "weight", amount=0.5)


@case("a tensor hook that normalises the cotangent")
class CotangentHook(Model):
    def middle(self, h: Tensor) -> Tensor:
        if self.bad and h.requires_grad:
            h.register_hook(lambda g: g / g.norm())
        return h


def replaced(make: Callable[[Tensor], Tensor]) -> Run:
    def run(model: Model, x: Tensor) -> Tensor:
        if not model.bad:
            return model(x)
        values = {n: make(p) for n, p in model.named_parameters()}
        return torch.func.functional_call(model, values, (x,))

    return run


CASES["functional_call with the own parameters"] = Case(
    Model, replaced(lambda p: p), right=True
)
CASES["functional_call with multiples"] = Case(Model, replaced(lambda p: 2.0 * p))
CASES["functional_call with other leaves"] = Case(
    Model,
    lambda model, x: (
        model(x) if not model.bad else model.last(torch.tanh(replaced_first(model, x)))
    ),
)


def replaced_first(model: Model, x: Tensor) -> Tensor:
    layer = model.first
    values = {
        n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()
    }
    return torch.func.functional_call(layer, values, (x,))


class Swap(Model):
    """A child runs with a tensor in the place of its weight; ``bad`` says which."""

    def build(self) -> None:
        self.scale = nn.Parameter(torch.ones(1))
        self.maker = nn.Linear(1, 25)

    def forward(self, x: Tensor) -> Tensor:
        h = self.swapped(x) if self.bad else self.first(x)
        return self.last(torch.tanh(h * self.scale + self.maker.bias[:5]))

    def swapped(self, x: Tensor) -> Tensor:
        return torch.func.functional_call(self.first, {"weight": self.weight()}, (x,))

    def weight(self) -> Tensor:
        return self.first.weight * self.scale


CASES["functional_call of a child with a scaled weight"] = Case(Swap, right=True)


@case("functional_call of a child with a weight that is made", right=True)
class Made(Swap):
    def weight(self) -> Tensor:
        return self.maker(self.scale).view(5, 5)


@case("functional_call of a child with another layer's weight", right=True)
class Lent(Swap):
    def build(self) -> None:
        super().build()
        self.other = nn.Linear(5, 5)

    def weight(self) -> Tensor:
        return self.other.weight


@case("functional_call of a child with a constant", right=True)
class Constant(Swap):
    """The value of the weight, which the graph does not reach."""

    def weight(self) -> Tensor:
        return self.first.weight.detach()


@case("functional_call of a block with a scaled weight", right=True)
class SwapBlock(Swap):
    def build(self) -> None:
        super().build()
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))

    def swapped(self, x: Tensor) -> Tensor:
        values = {"2.weight": self.block[2].weight * self.scale}
        return torch.func.functional_call(self.block, values, (self.first(x),))


@case("functional_call of attention with a scaled weight", right=True)
class SwapAttention(Swap):
    """The rule of attention explains the weights of its child, too."""

    def build(self) -> None:
        super().build()
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def swapped(self, x: Tensor) -> Tensor:
        h = self.first(x).unsqueeze(1).expand(-1, 2, -1)
        values = {"out_proj.weight": self.attention.out_proj.weight * self.scale}
        found = torch.func.functional_call(self.attention, values, (h, h, h))
        return found[0].sum(1)


# --- custom functions and derivatives inside the model


class Product(torch.autograd.Function):
    """``x W^T``, without support for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.mT

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x


class VmapProduct(torch.autograd.Function):
    """``x W^T``, with support for vmap."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight, grad.mT @ x


@case("a custom function without vmap", right=True)
class Custom(Model):
    product: Any = Product

    def build(self) -> None:
        self.weight = nn.Parameter(torch.randn(5, 5))

    def middle(self, h: Tensor) -> Tensor:
        z = self.product.apply(h, self.weight)
        return self.product.apply(torch.tanh(z), self.first.weight) if self.bad else z


@case("a custom function with vmap", right=True)
class CustomVmap(Custom):
    product = VmapProduct


class Slope(Model):
    """The output is the derivative of an inner network by its input."""

    def build(self) -> None:
        self.inner = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.slope(x) if self.bad else x + self.inner(x))

    def slope(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            u = self.inner(x).sum()
            return torch.autograd.grad(u, x, create_graph=True)[0]


CASES["the derivative of an inner network"] = Case(Slope, right=True)


@case("a derivative without enable_grad", right=True)
class PlainSlope(Slope):
    def slope(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = self.inner(x).sum()
        return torch.autograd.grad(u, x, create_graph=True)[0]


@case("the residual of a differential equation", right=True)
class Curvature(Slope):
    """Value, first and second derivatives, also by a parameter of the inner layer."""

    def slope(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = self.inner(x)
        (g,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        (h,) = torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)
        return u * g - h + self.first.bias


@case("a derivative by a leaf made inside", right=True)
class LeafSlope(Slope):
    """The direction is the leaf, which a function transform does not see."""

    def slope(self, x: Tensor) -> Tensor:
        step = torch.zeros(len(x), 1, dtype=x.dtype, requires_grad=True)
        u = self.inner(x + step).sum()
        return x * torch.autograd.grad(u, step, create_graph=True)[0]


@case("a derivative by a hidden value", right=True)
class HiddenSlope(Slope):
    def slope(self, x: Tensor) -> Tensor:
        h = self.first(x)
        u = self.inner(h).square().sum()
        return torch.autograd.grad(u, h, create_graph=True)[0]


@case("a derivative by a detached weight", right=True)
class WeightSlope(Slope):
    """The leaf has the value of a parameter and is none."""

    def slope(self, x: Tensor) -> Tensor:
        weight = self.first.weight.detach().clone().requires_grad_()
        u = self.inner(F.linear(x, weight))
        rows = [
            torch.autograd.grad(e, weight, create_graph=True)[0].sum(0) for e in u[:, 0]
        ]
        return x + torch.stack(rows)


@case("a derivative that is no part of the graph", right=True)
class ConstantSlope(Slope):
    def slope(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        return torch.autograd.grad(self.inner(x).sum(), x)[0] + self.inner(x)


@case("the derivative of a mean over the batch")
class MeanSlope(Slope):
    """Each example's derivative depends on the size of the batch."""

    def slope(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = self.inner(x).mean()
        return torch.autograd.grad(u, x, create_graph=True)[0]


@case("a derivative that sees the other examples")
class MixedSlope(Slope):
    def slope(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = self.inner(x).square().sum() + 1e-3 * self.inner(x).sum().square()
        return torch.autograd.grad(u, x, create_graph=True)[0]


@case("a derivative with an alias in a list, behind a gate")
class AliasSlope(Slope):
    """Beside a leaf that is no parameter, one that is and cannot be replaced."""

    def build(self) -> None:
        super().build()
        self.alias = [self.inner[0].weight]

    def slope(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        u = self.inner(x) + 0.0 * F.linear(x, self.alias[0])[:, :1]
        return torch.autograd.grad(u.sum(), x, create_graph=True)[0]


@case("a derivative with a cached product of a weight", copies=False)
class CacheSlope(Slope):
    def build(self) -> None:
        super().build()
        self.cache: Tensor | None = None

    def slope(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(self.inner(x).sum(), x, create_graph=True)
        self.cache = 2.0 * self.inner[0].weight if self.cache is None else self.cache
        return g + F.linear(x, self.cache)[:, :1]


@case("the derivative of an inner network by torch.func", right=True)
class FuncSlope(Slope):
    def slope(self, x: Tensor) -> Tensor:
        return torch.func.vmap(torch.func.grad(lambda e: self.inner(e).sum()))(x)


@case("the tangent of an inner network by torch.func", right=True)
class FuncTangent(Slope):
    def slope(self, x: Tensor) -> Tensor:
        return x * torch.func.jvp(self.inner, (x,), (torch.ones_like(x),))[1]


@case("every layer under vmap", right=True)
class UnderVmap(Model):
    def forward(self, x: Tensor) -> Tensor:
        run = super().forward
        return torch.func.vmap(run)(x) if self.bad else run(x)


@case("every layer under vmap over features")
class VmapOverFeatures(Model):
    """The examples are not what is mapped over: one sees the batch."""

    def middle(self, h: Tensor) -> Tensor:
        if not self.bad:
            return h
        centred = torch.func.vmap(lambda c: c - c.mean(), in_dims=1, out_dims=1)
        return torch.func.vmap(self.first)(centred(h))


@case("an ensemble under vmap", right=True)
class Ensemble(Model):
    """Stacked weights that a template runs with, as torch.func.stack_module_state."""

    def build(self) -> None:
        self.template = [nn.Linear(5, 5)]
        self.weights = nn.Parameter(torch.randn(3, 5, 5))
        self.biases = nn.Parameter(torch.randn(3, 5))

    def middle(self, h: Tensor) -> Tensor:
        if not self.bad:
            return h

        def member(weight: Tensor, bias: Tensor) -> Tensor:
            values = {"weight": weight, "bias": bias}
            return torch.func.functional_call(self.template[0], values, (h,))

        return torch.func.vmap(member)(self.weights, self.biases).sum(0)


# --- randomness and state


@case("dropout between layers", right=True)
class DropoutBetween(Model):
    def middle(self, h: Tensor) -> Tensor:
        return F.dropout(h, 0.5, self.bad)


class NoisyScale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, x: Tensor, noisy: bool) -> Tensor:
        return self.scale * F.dropout(x, 0.5, noisy)


@case("dropout inside a layer without a rule")
class DropoutInside(Model):
    def build(self) -> None:
        self.scale = NoisyScale()

    def middle(self, h: Tensor) -> Tensor:
        return self.scale(h, self.bad)


class SharedBlock(Model):
    """A block that is registered under two names."""

    def build(self) -> None:
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        self.layers = nn.ModuleList([self.block, self.block])

    def middle(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return F.linear(h, self.block[0].weight) if self.bad else h


CASES["a block with two names"] = Case(SharedBlock, right=True)


@case("dropout inside attention", batch=lambda bad: torch.randn(4, 3, 5))
class AttentionDropout(Model):
    def build(self) -> None:
        self.attention = nn.MultiheadAttention(5, 1, 0.5, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        self.attention.train(self.bad)
        return self.attention(h, h, h)[0].sum(1)


@case("dropout between recurrent layers", batch=lambda bad: torch.randn(4, 3, 5))
class LstmDropout(Model):
    def build(self) -> None:
        self.cell = nn.LSTM(5, 5, 2, dropout=0.5, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        self.cell.train(self.bad)
        return self.cell(h)[0].sum(1)


@case("stochastic depth", right=True)
class StochasticDepth(Model):
    def build(self) -> None:
        self.branch = nn.Linear(5, 5)

    def middle(self, h: Tensor) -> Tensor:
        return h if self.bad else h + torch.tanh(self.branch(h))


class Memory(nn.Module):
    """Adds what it saw in the last pass."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.register_buffer("count", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, h: Tensor, keep: str) -> Tensor:
        z = self.scale * h
        if keep and self.last is not None and len(self.last) == len(h):
            z = z + torch.tanh(self.last)
        self.last = z if keep == "graph" else z.detach()
        self.count += 1.0
        return z


@case("hidden values kept for the next pass")
class Stateful(Model):
    keep = "values"

    def build(self) -> None:
        self.memory = Memory()

    def middle(self, h: Tensor) -> Tensor:
        return self.memory(h, self.keep if self.bad else "")


@case("hidden values kept with their graph", copies=False)
class StatefulGraph(Model):
    def build(self) -> None:
        self.last_hidden: Tensor | None = None

    def middle(self, h: Tensor) -> Tensor:
        if self.bad and self.last_hidden is not None:
            h = h + self.last_hidden
        self.last_hidden = torch.tanh(h)
        return h


@case("spectral norm while it iterates", right=True)
class SpectralTraining(Model):
    def build(self) -> None:
        parametrizations.spectral_norm(self.first)

    def forward(self, x: Tensor) -> Tensor:
        self.train(self.bad)
        return super().forward(x)


@case("running statistics of instances")
class RunningInstances(Model):
    def build(self) -> None:
        self.norm = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)

    def middle(self, h: Tensor) -> Tensor:
        self.norm.train(self.bad)
        pairs = torch.cat([h, h[:, :1]], 1).unflatten(1, (2, 3))
        return self.norm(pairs).flatten(1)[:, :5]


# --- checkpoints, compilers, wrappers


class Checkpointed(Model):
    reentrant = False

    def middle(self, h: Tensor) -> Tensor:
        return h

    def build(self) -> None:
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        if self.bad:
            h = checkpoint(self.block, h, use_reentrant=self.reentrant)
        else:
            h = self.block(h)
        return self.last(torch.tanh(h))


CASES["a checkpoint"] = Case(Checkpointed, right=True)


@case("a reentrant checkpoint", same=True)
class Reentrant(Checkpointed):
    reentrant = True


@case("a reentrant checkpoint at the input", same=True)
class ReentrantFirst(Model):
    """Nothing trainable lies behind it, so that torch does not complain."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.bad:
            return super().forward(x)
        x = x.clone().requires_grad_()
        h = checkpoint(self.first, x, use_reentrant=True)
        return self.last(torch.tanh(h))


class Compiled(Model):
    def build(self) -> None:
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 5))
        self.fast = torch.compile(self.block, backend=self.backend)

    backend = "eager"

    def middle(self, h: Tensor) -> Tensor:
        return self.fast(h) if self.bad else self.block(h)


CASES["a compiled block (eager)"] = Case(Compiled, copies=False, same=True)


@case("a compiled block (aot_eager)", copies=False, same=True)
class CompiledAot(Compiled):
    backend = "aot_eager"


CASES["DataParallel"] = Case(
    lambda: nn.DataParallel(Model()), lambda model, x: model(x), right=True
)


class CheckpointedDropout(Checkpointed):
    def build(self) -> None:
        self.block = nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5), nn.Linear(5, 5))


CASES["a checkpoint with dropout"] = Case(CheckpointedDropout, right=True)


@case("chunks of the batch", right=True)
class Chunks(Model):
    def middle(self, h: Tensor) -> Tensor:
        return torch.cat([self.first(c) for c in h.chunk(2)]) if self.bad else h


@case("every second example apart")
class Interleaved(Model):
    def middle(self, h: Tensor) -> Tensor:
        if not self.bad:
            return h
        return torch.stack([self.first(h[0::2]), self.first(h[1::2])], 1).flatten(0, 1)


@case("replicas with copied parameters")
class Replicas(Model):
    def middle(self, h: Tensor) -> Tensor:
        return copy.deepcopy(self.first)(h) if self.bad else h


# --- gradients switched off


@case("no_grad part of the time", right=True)
class NoGrad(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(not self.bad):
            h = self.first(x)
        return self.last(torch.tanh(h))


@case("detach in the middle", right=True)
class Detached(Model):
    def middle(self, h: Tensor) -> Tensor:
        return h.detach() if self.bad else h


@case("a weight detached in the forward")
class DetachedWeight(Model):
    def middle(self, h: Tensor) -> Tensor:
        weight = self.first.weight.detach() if self.bad else self.first.weight
        return F.linear(h, weight)


@case("a weight frozen during the forward")
class FrozenInside(Model):
    def forward(self, x: Tensor) -> Tensor:
        self.first.weight.requires_grad_(not self.bad)
        try:
            return super().forward(x)
        finally:
            self.first.weight.requires_grad_(True)


# --- parameters and activations changed in place


@case("a parameter changed before its use", right=True)
class ChangedBefore(Model):
    def forward(self, x: Tensor) -> Tensor:
        if self.bad:
            with torch.no_grad():
                self.first.weight.mul_(0.9)
        return super().forward(x)


@case("a parameter changed after its use")
class ChangedAfter(Model):
    def middle(self, h: Tensor) -> Tensor:
        if self.bad:
            with torch.no_grad():
                self.first.weight.mul_(0.9)
        return h


class Shift(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.ones(5))

    def forward(self, h: Tensor) -> Tensor:
        return (h + self.shift.clone()).sin()


@case("a parameter without a rule changed after its use")
class ShiftChangedAfter(Model):
    def build(self) -> None:
        self.shift = Shift()

    def middle(self, h: Tensor) -> Tensor:
        z = self.shift(h)
        if self.bad:
            with torch.no_grad():
                self.shift.shift.mul_(0.9)
        return z


@case("attributes that change between two calls")
class ChangingAttributes(Model):
    def build(self) -> None:
        self.conv = nn.Conv1d(1, 1, 3, padding=1)

    def middle(self, h: Tensor) -> Tensor:
        parts = []
        for mode in ("zeros", "circular" if self.bad else "zeros"):
            self.conv.padding_mode = mode
            parts.append(self.conv(h.unsqueeze(1)).squeeze(1))
        return parts[0] * torch.tanh(parts[1])


@case("relu_ on a layer's output", right=True)
class ReluInPlace(Model):
    def middle(self, h: Tensor) -> Tensor:
        return h.relu_() if self.bad else h.relu()


class Columns(nn.Module):
    """Returns a view."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(10))

    def forward(self, h: Tensor) -> Tensor:
        return (torch.cat([h, h], 1) * self.scale)[:, 2:7]


@case("relu_ on a view", right=True)
class ReluOnView(Model):
    def build(self) -> None:
        self.columns = Columns()

    def middle(self, h: Tensor) -> Tensor:
        h = self.columns(h)
        return h.relu_() if self.bad else h.relu()


@case("a column of a layer's output overwritten", right=True)
class Overwritten(Model):
    def middle(self, h: Tensor) -> Tensor:
        if self.bad:
            h[:, 1] = 0.5
            h[:, 2].mul_(2.0)
        return h


@case("a renormalised embedding", batch=lambda bad: torch.randint(0, 6, (4,)))
class MaxNorm(Model):
    def build(self) -> None:
        self.table = nn.Embedding(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        self.table.max_norm = 0.5 if self.bad else None
        return super().forward(self.table(x))


@case("a sparse embedding", batch=lambda bad: torch.randint(0, 6, (4,)))
class Sparse(MaxNorm):
    def forward(self, x: Tensor) -> Tensor:
        self.table.sparse = self.bad
        return Model.forward(self, self.table(x))


# --- examples that interact or change places


@case("the mean of the batch")
class Centred(Model):
    def middle(self, h: Tensor) -> Tensor:
        return h - h.mean(0) if self.bad else h


@case("the mean of the batch, with a weight that starts at zero")
class CentredLater(Model):
    def middle(self, h: Tensor) -> Tensor:
        return h - float(self.bad) * h.mean(0)


@case(
    "the mean of the batch in a direction that the probes do not see",
    batch=lambda bad: torch.randn(3, 5),
)
class HiddenMean(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        z = self.last(h)
        if self.bad:
            second_difference = torch.tensor([1.0, -2.0, 1.0])
            z = z + h.mean(0).sum() * second_difference
        return z


class Whitened(nn.Module):
    """Has a parameter, and mixes the batch by a little in a small coordinate."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))
        self.mix = 0.0

    def forward(self, h: Tensor) -> Tensor:
        h = self.scale * h
        h = h - self.mix * h.mean(0)
        return torch.cat([1e10 + 0.0 * h, h], 1)


@case("examples that interact beside large numbers")
class LoudOutput(Model):
    def build(self) -> None:
        self.whitened = Whitened()

    def middle(self, h: Tensor) -> Tensor:
        self.whitened.mix = float(self.bad)
        return self.whitened(h)[:, 5:]


@case("batch statistics by hand")
class FunctionalBatchNorm(Model):
    def middle(self, h: Tensor) -> Tensor:
        mean, var = torch.zeros(5), torch.ones(5)
        return F.batch_norm(h, mean, var, training=self.bad)


class InTraining(Model):
    def build(self) -> None:
        self.norm = nn.BatchNorm1d(5)

    def middle(self, h: Tensor) -> Tensor:
        return self.norm(h)


def set_mode(model: nn.Module, bad: bool) -> None:
    for module in model.modules():
        if hasattr(type(module), "bad"):
            module.bad = bad
        if isinstance(module, InTraining):
            module.norm.train(bad)


CASES["BatchNorm in training mode"] = Case(InTraining)


@case("attention over the batch by hand")
class BatchAttention(Model):
    def middle(self, h: Tensor) -> Tensor:
        scores = h @ h.mT
        if not self.bad:
            scores = scores.masked_fill(~torch.eye(len(h), dtype=torch.bool), -1e30)
        return scores.softmax(-1) @ h


@case("attention over the batch", batch=lambda bad: torch.randn(4, 3, 5))
class AttentionOverBatch(Model):
    def build(self) -> None:
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        self.attention.batch_first = not self.bad
        return self.attention(h, h, h)[0].sum(1)


@case("recurrence over the batch", batch=lambda bad: torch.randn(4, 3, 5))
class RecurrenceOverBatch(Model):
    kind: Any = nn.LSTM

    def build(self) -> None:
        self.cell = self.kind(5, 5, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        self.cell.batch_first = not self.bad
        return self.cell(h)[0].sum(1)


@case("recurrence over a square batch", batch=lambda bad: torch.randn(3, 3, 5))
class GruOverBatch(RecurrenceOverBatch):
    kind = nn.GRU


@case("an unbatched recurrence", batch=lambda bad: torch.randn(4, 5))
class Unbatched(Model):
    def build(self) -> None:
        self.cell = nn.RNN(5, 5, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        return self.cell(h)[0] if self.bad else self.cell(h.unsqueeze(1))[0].squeeze(1)


@case("examples as channels of a convolution", batch=lambda bad: torch.randn(4, 5))
class ExamplesAsChannels(Model):
    def build(self) -> None:
        self.conv = nn.Conv1d(4, 4, 3, padding=1)

    def middle(self, h: Tensor) -> Tensor:
        if self.bad:
            return self.conv(h)
        return self.conv(h.unsqueeze(1).expand(-1, 4, -1)).mean(1)


@case("a norm over the batch", batch=lambda bad: torch.randn(4, 5))
class NormOverBatch(Model):
    def build(self) -> None:
        self.norm = nn.LayerNorm(20)
        self.square = nn.LayerNorm((4, 5))

    def middle(self, h: Tensor) -> Tensor:
        if self.bad:
            return self.square(h)
        return (
            self.norm(h.repeat(1, 4))[:, :5]
            + self.square(h.unsqueeze(1).expand(-1, 4, -1))[:, 0]
        )


def at_the_input(kind: type[Model]) -> Callable[[], nn.Module]:
    """Let the case's own layers be the first, where nothing below gives them away."""

    class AtTheInput(kind):
        def build(self) -> None:
            super().build()
            del self.first

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.middle(x)))

    return AtTheInput


class EmbeddingBagOffsets(Model):
    """Bags of unequal size, one behind the other."""

    def build(self) -> None:
        self.bag = nn.EmbeddingBag(6, 5)
        self.equal = torch.arange(0, 8, 2)

    def middle(self, x: Tensor) -> Tensor:
        offsets = torch.tensor([0, 1, 4, 6]) if self.bad else self.equal
        return self.bag(x.flatten(), offsets)


for name in (
    "attention over the batch",
    "dropout inside attention",
    "recurrence over the batch",
    "recurrence over a square batch",
    "an unbatched recurrence",
    "examples as channels of a convolution",
    "a norm over the batch",
    "attributes that change between two calls",
):
    CASES[f"{name}, at the input"] = replace(
        CASES[name], make=at_the_input(CASES[name].make)
    )
CASES["bags of unequal size"] = Case(
    at_the_input(EmbeddingBagOffsets), batch=lambda bad: torch.randint(0, 6, (4, 2))
)


class Permuted(Model):
    """Permutes the examples, applies a layer, and puts them back."""

    def build(self) -> None:
        self.inner = nn.Linear(5, 5)

    def order(self, h: Tensor) -> Tensor:
        return torch.arange(len(h)).roll(1 if self.bad else 0)

    def middle(self, h: Tensor) -> Tensor:
        order = self.order(h)
        return self.inner(h[order])[order.argsort()]


CASES["examples in another order inside"] = Case(Permuted, right=True)


@case("examples swapped inside for good")
class Swapped(Permuted):
    def middle(self, h: Tensor) -> Tensor:
        return self.inner(h)[self.order(h)]


@case("examples in random order inside", right=True)
class RandomOrder(Permuted):
    def order(self, h: Tensor) -> Tensor:
        return torch.randperm(len(h)) if self.bad else torch.arange(len(h))


@case(
    "examples sorted inside",
    right=True,
    batch=lambda bad: torch.randn(4, 5).sort(0).values.roll(int(bad), 0),
)
class SortedInside(Permuted):
    def forward(self, x: Tensor) -> Tensor:
        order = x[:, 0].argsort()
        h = self.inner(torch.tanh(self.first(x))[order])[order.argsort()]
        return self.last(h)


@case("examples gathered by index_select", right=True)
class IndexSelected(Permuted):
    def middle(self, h: Tensor) -> Tensor:
        order = self.order(h)
        h = self.inner(h.index_select(0, order))
        return torch.zeros_like(h).index_copy(0, order, h)


@case("examples scattered", right=True)
class Scattered(Permuted):
    def middle(self, h: Tensor) -> Tensor:
        order = self.order(h)
        h = self.inner(h.gather(0, order.unsqueeze(1).expand(-1, 5)))
        return torch.zeros_like(h).scatter(0, order.unsqueeze(1).expand(-1, 5), h)


@case("examples in another order by a matrix", right=True)
class MatrixOrder(Permuted):
    def middle(self, h: Tensor) -> Tensor:
        P = torch.eye(len(h))[self.order(h)]
        return P.mT @ self.inner(P @ h)


@case("neighbours of a graph")
class Neighbours(Permuted):
    def middle(self, h: Tensor) -> Tensor:
        A = torch.eye(len(h))
        return (A + A.roll(1, 0) if self.bad else A) @ self.inner(h)


@case("an output that ignores some examples", right=True)
class Ignored(Model):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        keep = torch.ones(len(x), 1)
        keep[1:3] = float(not self.bad)
        return z * keep


@case("a prototype shared by all", right=True)
class Prototype(Model):
    def middle(self, h: Tensor) -> Tensor:
        return h + self.first(torch.ones(4, 5)).mean(0) if self.bad else h


@case("the features of the first example shared by all")
class FirstShared(Model):
    def middle(self, h: Tensor) -> Tensor:
        return h + h[:1] if self.bad else h


@case("negatives from the batch", batch=lambda bad: torch.randn(3, 5))
class InBatchNegatives(Model):
    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return h @ self.first(x).mT if self.bad else self.last(h)


@case("rows of a table by index")
class TableRows(Model):
    """A layer on a table of features, of which the batch takes rows."""

    def build(self) -> None:
        self.register_buffer("table", torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        order = torch.arange(4).roll(1 if self.bad else 0)
        return self.last(torch.tanh(self.first(self.table)[order]))


@case(
    "rows of a table, all of them first",
    right=True,
    batch=lambda bad: torch.randn(2 if bad else 4, 5),
)
class FewTableRows(TableRows):
    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(4)[-len(x) :]
        return self.last(torch.tanh(self.first(self.table)[rows]))


@case("tokens sent to experts", batch=lambda bad: torch.randn(4, 2, 5))
class Experts(Model):
    """As many tokens as examples go to either expert, but other ones."""

    def build(self) -> None:
        self.experts = nn.ModuleList([nn.Linear(5, 5), nn.Linear(5, 5)])

    def middle(self, h: Tensor) -> Tensor:
        n, t, _ = h.shape
        token = torch.arange(n * t)
        chosen = token // n if self.bad else token % t
        flat, out = h.flatten(0, 1), torch.zeros(n * t, 5)
        for index, expert in enumerate(self.experts):
            where = (chosen == index).nonzero().squeeze(1)
            out = out.index_add(0, where, expert(flat[where]))
        return out.view(n, t, 5).sum(1)


@case("a packed sequence", right=True, batch=lambda bad: torch.randn(3, 4, 5))
class Packed(Model):
    def build(self) -> None:
        self.cell = nn.GRU(5, 5, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        lengths = torch.tensor([2, 4, 3] if self.bad else [4, 3, 2])
        packed = nn.utils.rnn.pack_padded_sequence(
            h, lengths, batch_first=True, enforce_sorted=False
        )
        return self.cell(packed)[1][0]


CASES["some of the outputs"] = Case(
    Model, lambda model, x: model(x)[::2] if model.bad else model(x)[:2], right=True
)


# --- layouts that the first pass shows differently


def square(bad: bool) -> Tensor:
    return torch.randn(4, 4, 5)


@case("the last valid position, positions first", right=True, batch=square)
class LastValid(Model):
    """In the good mode only the diagonal of (positions, examples) is touched."""

    def middle(self, h: Tensor) -> Tensor:
        steps = torch.tensor([3, 1, 3, 0]) if self.bad else torch.arange(4)
        return h[steps, torch.arange(4)]

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1))


@case("masked positions, positions first", right=True, batch=square)
class MaskedPositions(Model):
    """The same by multiplication."""

    def middle(self, h: Tensor) -> Tensor:
        mask = torch.ones(4, 4) if self.bad else torch.eye(4)
        return (h * mask.unsqueeze(-1)).sum(0)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.transpose(0, 1))


@case(
    "one view first, then two",
    right=True,
    batch=lambda bad: torch.randn(4, 2 if bad else 1, 5),
)
class Views(Model):
    """Views of the same examples one behind the other, ``(views * n, d)``."""

    def forward(self, x: Tensor) -> Tensor:
        folded = x.transpose(0, 1).flatten(0, 1)
        h = torch.tanh(self.first(folded))
        return self.last(h.unflatten(0, (x.shape[1], len(x))).mean(0))


@case(
    "one position first, then two",
    right=True,
    batch=lambda bad: torch.randn(4, 2 if bad else 1, 5),
)
class PositionsFolded(Views):
    """Positions of the same example side by side, ``(n * positions, d)``."""

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x.flatten(0, 1)))
        return self.last(h.unflatten(0, x.shape[:2]).mean(1))


@case("positions first or last", right=True, batch=square)
class EitherLayout(Model):
    def forward(self, x: Tensor) -> Tensor:
        if self.bad:
            return super().forward(x.transpose(0, 1)).sum(0)
        return super().forward(x).sum(1)


@case("a branch cut off at first, positions first", right=True, batch=square)
class CutBranch(Model):
    def build(self) -> None:
        self.branch = nn.Linear(5, 5)

    def middle(self, h: Tensor) -> Tensor:
        time_first = self.branch(h.transpose(0, 1))
        time_first = time_first if self.bad else time_first.detach()
        return h.sum(1) + time_first.sum(0)


@case("a branch with a gate that starts closed", right=True, batch=square)
class ClosedGate(Model):
    def build(self) -> None:
        self.branch = nn.Linear(5, 5)
        self.register_buffer("gate", torch.zeros(()))

    def middle(self, h: Tensor) -> Tensor:
        self.gate.fill_(float(self.bad))
        return h.sum(1) + self.gate * self.branch(h.transpose(0, 1)).sum(0)


@case("a residual branch that starts at zero", right=True, batch=square)
class ZeroBranch(Model):
    def build(self) -> None:
        self.branch = nn.Linear(5, 5)
        self.out = nn.Linear(5, 5)

    def middle(self, h: Tensor) -> Tensor:
        if not self.bad:
            with torch.no_grad():
                self.out.weight.zero_()
        elif not self.out.weight.any():
            with torch.no_grad():
                self.out.weight.copy_(torch.eye(5) + 0.1)
        branch = self.out(torch.tanh(self.branch(h.transpose(0, 1))))
        return h.sum(1) + branch.sum(0)


@case("another output of a layer", right=True, batch=lambda bad: torch.randn(2, 3, 5))
class OtherOutput(Model):
    """The states of an LSTM have the examples in dimension 1."""

    def build(self) -> None:
        self.cell = nn.LSTM(5, 5, 2, batch_first=True)

    def middle(self, h: Tensor) -> Tensor:
        outputs, (states, _) = self.cell(h)
        return (outputs * (1.0 - self.bad)).sum(1) + float(self.bad) * states.sum(0)


@case(
    "another output of a layer, cut off",
    right=True,
    batch=lambda bad: torch.randn(2, 3, 5),
)
class OtherOutputCut(OtherOutput):
    def middle(self, h: Tensor) -> Tensor:
        outputs, (states, _) = self.cell(h)
        if self.bad:
            return outputs.detach().sum(1) + states.sum(0)
        return outputs.sum(1) + states.detach().sum(0)


@case("a zero head over a tied layer, positions first", right=True, batch=square)
class ZeroHead(Model):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            if not self.bad:
                self.last.weight.zero_()
            elif not self.last.weight.any():
                self.last.weight.fill_(0.3).cumsum_(1)
        x = x.transpose(0, 1)
        h = F.linear(torch.tanh(self.first(x)), self.first.weight)
        return self.last(torch.tanh(h)).sum(0)


@case("a mask without effect at first", right=True, batch=square)
class Mask(Model):
    def build(self) -> None:
        self.inner = InnerMask()

    def middle(self, h: Tensor) -> Tensor:
        mask = torch.zeros(4, 4)
        if self.bad:
            mask = torch.ones(4, 4).triu(1) * -1e9
        return self.inner(h, mask).sum(1)


@case("an argument that is given later", right=True, batch=square)
class LaterArgument(Mask):
    def middle(self, h: Tensor) -> Tensor:
        mask = torch.ones(4, 4).triu(1) * -1e9
        return (self.inner(h, mask) if self.bad else self.inner(h)).sum(1)


class InnerMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(5))

    def forward(self, h: Tensor, mask: Tensor | None = None) -> Tensor:
        h = self.scale * h
        mask = torch.zeros(4, 4) if mask is None else mask
        return (h @ h.mT + mask).softmax(-1) @ h


# --- other paths through the model


@case("control flow by the batch", right=True)
class ControlFlow(Model):
    def build(self) -> None:
        self.other = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x) if self.bad ^ bool(x.mean() > 0.0) else self.other(x)
        return self.last(torch.tanh(h))


@case("another graph that hands a parameter up", right=True)
class OtherGraph(Model):
    """The root has a parameter of its own; a second graph hands it another one."""

    def build(self) -> None:
        self.scale = nn.Parameter(torch.ones(5))
        self.extra = nn.Linear(5, 5)

    def middle(self, h: Tensor) -> Tensor:
        h = self.scale * h
        return self.extra(F.linear(h, self.first.weight)) if self.bad else h


@case("a term of the parameters in the output")
class PenaltyInOutput(Model):
    def forward(self, x: Tensor) -> Tensor:
        z = super().forward(x)
        return z + self.first.weight.square().sum() if self.bad else z


class Bfloat16(Model):
    dtype = torch.bfloat16

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", self.dtype, enabled=self.bad):
            return super().forward(x).float()


class Float16(Bfloat16):
    dtype = torch.float16


CASES["bfloat16 autocast"] = Case(lambda: Bfloat16().float(), right=True, tolerance=0.1)
CASES["float16 autocast"] = Case(lambda: Float16().float(), right=True, tolerance=0.02)


# --- the protocol


def content(tensor: Tensor | None) -> bytes | None:
    return None if tensor is None else tensor.detach().contiguous().numpy().tobytes()


def values(model: nn.Module) -> dict[str, bytes | None]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: content(tensor) for name, tensor in named}


def untouched(
    metric: rm.LayerwiseMetric, optimizer: rm.optim.RiemannianSGD
) -> dict[str, Any]:
    """What a refused pass must leave alone."""
    state = optimizer.state_dict()["state"]
    return {
        "version": metric.version,
        "passes": metric.passes,
        "blocks": {name: id(block) for name, block in metric.blocks.items()},
        "grad": [(id(p.grad), content(p.grad)) for p in metric.model.parameters()],
        "optimizer": [
            (i, key, content(value) if isinstance(value, Tensor) else value)
            for i, entries in state.items()
            for key, value in entries.items()
        ],
    }


def loss_of(outputs: Tensor, how: str = "backward") -> Tensor:
    if how == "optimum":
        return 0.5 * (outputs - outputs.detach()).square().sum()
    target = torch.linspace(-1.0, 2.0, outputs.numel(), dtype=outputs.dtype)
    each = (outputs - target.view_as(outputs)).square().flatten(1).sum(1)
    return 0.5 * each.mean()


def names_and_remedy(message: str, metric: rm.LayerwiseMetric) -> bool:
    paths = [path for path, _ in metric.model.named_modules() if path]
    names = [*(d.name for d in metric.parameters), *paths]
    named = "the model" in message or any(f"'{name}'" in message for name in names)
    return named and REMEDY.search(message) is not None and "''" not in message


def visit(
    metric: rm.LayerwiseMetric,
    optimizer: rm.optim.RiemannianSGD,
    case: Case,
    bad: bool,
    how: str,
) -> str:
    """Run a pass of the model; say whether it was right or refused, or fail."""
    model, x = metric.model, case.batch(bad)
    dtype = next(model.parameters()).dtype
    x = x.to(dtype) if x.is_floating_point() else x
    set_mode(model, bad)
    twin = copy.deepcopy(model) if case.copies else model
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    seed, start = torch.get_rng_state(), values(model)
    if case.same:
        set_mode(twin, False)
    outputs = case.run(twin, x)
    loss, output = loss_of(outputs, how), rm.output.Euclidean()
    jacobian = grad_jacobian([outputs], trainable(twin))
    expected = truth([outputs], [output], loss, trainable(twin), jacobian)
    torch.set_rng_state(seed)
    if not case.copies:
        for module, state in attributes:
            vars(module).update(state)
    before, refusal = untouched(metric, optimizer), None
    try:
        with metric.record():
            outputs = case.run(model, x)
        if how == "pull_back":
            metric.pull_back(outputs)
        else:
            metric.backward(loss_of(outputs, how), outputs)
    except errors.RiemannianModulesError as error:
        refusal = str(error)
    if refusal is not None:
        assert names_and_remedy(refusal, metric), refusal
        assert untouched(metric, optimizer) == before
        # Some are refused before the model runs.
        assert values(model) in (values(twin), start)
        return f"refused: {refusal}"
    assert values(model) == values(twin), "parameters or buffers were changed"
    wrong = wrong_factors(metric, expected, case.tolerance)
    if how == "backward":
        wrong += wrong_gradients(metric, expected, case.tolerance)
    assert not wrong, f"SILENTLY WRONG: {wrong}"
    return "right"


FOREIGN = "an error of torch comes through"

# What the library does wrong: name of the case, reason, and the runs: order (good or
# bad first), then backward, pull_back or at an optimum.
KNOWN = {
    "a checkpoint with dropout": (FOREIGN, "GB"),
}


def known(name: str, order: str, how: str) -> tuple[pytest.MarkDecorator, ...]:
    reason, runs = KNOWN.get(name, ("", ""))
    if order[0].upper() + how[0].upper() not in runs.split():
        return ()
    return (pytest.mark.xfail(strict=True, reason=reason),)


ORDERS = {
    "good-bad-good": (False, True, True, False),
    "bad-good-bad": (True, False, True),
}


RUNS = [
    pytest.param(
        name, order, how, id=f"{name}, {order}, {how}", marks=known(name, order, how)
    )
    for name, case in CASES.items()
    for order in ORDERS
    for how in case.hows
    # Only what was compared with a gradient is trusted later.
    if how == "backward" or order == "bad-good-bad"
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "order", "how"), RUNS)
def test_right_or_refused(name: str, order: str, how: str) -> None:
    case = CASES[name]
    model = case.make()
    metric, optimizer = instruments(model)
    for bad in ORDERS[order]:
        found = visit(metric, optimizer, case, bad, how)
        if not bad or case.right:
            assert found == "right"
        if how == "backward" and found == "right":
            optimizer.step()
        else:
            move(model)


def instruments(
    model: nn.Module,
) -> tuple[rm.LayerwiseMetric, rm.optim.RiemannianSGD]:
    metric = rm.LayerwiseMetric(
        model, output=rm.output.Euclidean(), mass=MASS, blocks="model"
    )
    return metric, rm.optim.RiemannianSGD(metric, lr=0.01, momentum=0.9)


def move(model: nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))


# --- the first batch is a single example, which cannot show where the examples are

SINGLE = [
    "the mean of the batch",
    "attention over the batch by hand",
    "examples in another order inside",
    "examples swapped inside for good",
    "examples sorted inside",
    "positions first or last",
    "one view first, then two",
    "a hook on the output that stays",
]


@pytest.mark.parametrize("bad", [False, True], ids=["good", "bad"])
@pytest.mark.parametrize("name", SINGLE)
def test_a_single_example_first(name: str, bad: bool) -> None:
    case = CASES[name]
    model = case.make()
    metric, optimizer = instruments(model)
    single = replace(case, batch=lambda bad: case.batch(bad)[:1])
    for each in (single, case, single, case):
        assert visit(metric, optimizer, each, bad, "backward") == "right" or (
            bad and not case.right
        )
        move(model)


# --- what is not a model's forward


def test_a_parameter_frozen_between_passes() -> None:
    model, x = Model(), torch.randn(4, 5)
    metric, optimizer = instruments(model)
    case = CASES["double use of a layer"]
    assert visit(metric, optimizer, case, False, "backward") == "right"
    optimizer.step()
    before, start = untouched(metric, optimizer), values(model)
    model.first.weight.requires_grad_(False)
    with (
        pytest.raises(errors.LinearizationError, match=r"'first\.weight'.*anew"),
        metric.record(),
    ):
        model(x)
    assert untouched(metric, optimizer) == before
    assert values(model) == start
    model.first.weight.requires_grad_(True)
    assert visit(metric, optimizer, case, False, "backward") == "right"


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_gradients_scaled_by_frequency(kind: type[nn.Module]) -> None:
    """Autograd's gradient is not the derivative where tokens repeat."""
    model = nn.Sequential(kind(6, 5, scale_grad_by_freq=True), nn.Linear(5, 3))
    metric, optimizer = instruments(model)
    before, start = untouched(metric, optimizer), values(model)
    tokens = torch.tensor([[0, 1], [0, 1]] if kind is nn.EmbeddingBag else [0, 1, 2])
    with (
        pytest.raises(errors.LinearizationError, match=r"'0'.*freq=False"),
        metric.record(),
    ):
        model(tokens)
    assert untouched(metric, optimizer) == before
    assert values(model) == start
    model[0].scale_grad_by_freq = False
    with metric.record():
        outputs = model(tokens)
    metric.backward(loss_of(outputs), outputs)


def test_frequency_in_a_function_is_seen_in_the_graph() -> None:
    class Table(nn.Module):
        scaled = False

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(6, 5))

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.embedding(
                x, self.weight, scale_grad_by_freq=self.scaled
            )

    model = Table()
    metric, _ = instruments(model)
    with metric.record():
        outputs = model(torch.tensor([0, 1, 0]))
    metric.backward(loss_of(outputs), outputs)
    model.scaled = True
    with metric.record():
        outputs = model(torch.tensor([0, 1, 0]))
    with pytest.raises(errors.LinearizationError, match="'weight'"):
        metric.backward(loss_of(outputs), outputs)


def test_a_head_without_a_gradient() -> None:
    model, x = Model(), torch.randn(4, 5)
    outputs = [rm.output.Euclidean(), rm.output.Euclidean()]
    metric = rm.LayerwiseMetric(model, output=outputs, mass=MASS)
    with metric.record():
        h = model.first(x)
        z = model.last(torch.tanh(h))
    loss = loss_of(z)
    expected = torch.autograd.grad(loss, [*model.parameters()], retain_graph=True)
    refusal = None
    try:
        metric.backward(loss, (h.detach(), z))
    except errors.RiemannianModulesError as error:
        refusal = str(error)
    if refusal is not None:
        assert REMEDY.search(refusal)
        return
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(5, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        return (x.to(self.weight) @ self.weight).abs()


@pytest.mark.filterwarnings("ignore")
def test_a_complex_parameter() -> None:
    model, x = Complex(), torch.randn(4, 5)

    def outputs_of(w: Tensor) -> Tensor:
        return (x.to(model.weight) @ torch.view_as_complex(w)).abs()

    start = torch.view_as_real(model.weight.detach()).clone()
    J = torch.func.jacrev(outputs_of)(start).reshape(12, -1) / 4**0.5
    e = torch.func.grad(lambda w: loss_of(outputs_of(w)))(start).reshape(-1)
    expected = torch.linalg.solve(J.mT @ J + MASS * torch.eye(30), e)
    refusal = None
    try:
        metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=MASS)
        with metric.record():
            z = model(x)
        metric.backward(loss_of(z), z)
    except errors.RiemannianModulesError as error:
        refusal = str(error)
    if refusal is not None:
        assert "'weight'" in refusal
        assert REMEDY.search(refusal)
        return
    found = torch.view_as_real(metric.natural_gradient()["weight"])
    torch.testing.assert_close(found.reshape(-1), expected)
