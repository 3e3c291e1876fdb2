"""Calls of recurrent layers and of attention, compared with the dense Jacobian."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.layout import Layout
from riemannian_modules.nested import map_tensors, tensors_in
from riemannian_modules.reverse import reverse_pass
from riemannian_modules.rules import Call, Rule, entry_of
from riemannian_modules.tape import Tape, Watched

N, STEPS = 3, 4


# ---- one call of a rule against the dense Jacobian -------------------------------


@dataclass
class Case:
    """A call of a layer, and where its outputs have their batch dimension."""

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    batch: Mapping[int, int] = field(default_factory=lambda: {0: 0, 1: 0, 2: 0})
    used: Collection[int] = (0, 1, 2)
    examples: int = N
    rank: int = 2
    major: bool = True
    fused: bool = False

    def single(self) -> "Case":
        """Return the same call in float32."""

        def narrow(x: Tensor) -> Tensor:
            return x.float() if x.is_floating_point() else x

        return replace(
            self,
            module=self.module.float(),
            args=map_tensors(self.args, narrow),
            kwargs=map_tensors(self.kwargs, narrow),
        )

    def call(self, seed: int = 0) -> tuple[Call, list[tuple[Tensor, Tensor | None]]]:
        """Return the recorded call, and its outputs with random cotangents."""
        generator = torch.Generator().manual_seed(seed)
        tape = Tape()
        (handle,) = tape.watch([Watched("layer", self.module, True, ())])
        outputs = [
            z
            for z in tensors_in(self.module(*self.args, **self.kwargs))
            if z.requires_grad
        ]
        handle.remove()
        (use,) = tape.uses
        outside = tuple(
            torch.randn(
                self.rank, *z.shape, dtype=torch.float64, generator=generator
            ).to(z)
            if place in self.used
            else None
            for place, z in zip(use.places, outputs, strict=True)
        )
        # As the library sees them: of outputs that are computed from one another, the
        # cotangent of the one contains what comes by way of the other.
        active = [
            (z, l) for z, l in zip(outputs, outside, strict=True) if l is not None
        ]
        carried, _ = reverse_pass(
            [z for z, _ in active],
            use.edges,
            [l for _, l in active],
            batched=None,
        )
        wanted = [n for n, p in self.module.named_parameters() if p.requires_grad]
        call = Call(
            self.module,
            use.args,
            use.kwargs,
            use.places,
            outside if self.fused else tuple(carried),
            tuple(Layout(self.batch[place], self.major) for place in use.places),
            self.examples,
            tuple(wanted),
            "layer 'layer'",
            use.values,
            {"shows": False} if self.fused else {},
        )
        return call, [*zip(outputs, outside, strict=True)]

    def gap(self, rule: Rule | None = None) -> float:
        """Return the largest relative error of a factor's rows."""
        call, outputs = self.call()
        if rule is None:
            entry = entry_of(self.module)
            assert entry is not None
            rule = entry.rule
        with torch.no_grad():
            found = rule(call)
        parameters = [self.module.get_parameter(name) for name in call.wanted]
        rows = []
        for j in range(self.rank):
            for i in range(self.examples):
                active = [
                    (z, _only(c[j], layout, i, self.examples))
                    for (z, c), layout in zip(outputs, call.layouts, strict=True)
                    if c is not None
                ]
                rows.append(
                    torch.autograd.grad(
                        [z for z, _ in active],
                        parameters,
                        [c for _, c in active],
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )
        dense = {
            name: torch.stack([row.flatten() for row in column])
            for name, column in zip(call.wanted, zip(*rows, strict=True), strict=True)
        }
        scale = max(float(rows.norm()) for rows in dense.values())
        return max(
            float((found[name].to_dense() - rows).norm())
            / max(float(rows.norm()), 1e-3 * scale, 1e-12)
            for name, rows in dense.items()
        )


def _only(cotangent: Tensor, layout: Layout, example: int, examples: int) -> Tensor:
    mask = torch.zeros_like(cotangent)
    layout.front(mask, examples)[example] = 1.0
    return cotangent * mask


def lively(module: nn.Module) -> nn.Module:
    """Move parameters away from values, such as zero, that hide mistakes."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.6 * torch.randn_like(parameter))
    return module


# ---- recurrent layers ------------------------------------------------------------

KINDS = {
    "tanh": (nn.RNN, {}),
    "relu": (nn.RNN, {"nonlinearity": "relu"}),
    "gru": (nn.GRU, {}),
    "lstm": (nn.LSTM, {}),
    "projected": (nn.LSTM, {"proj_size": 2}),
}
USED = {"states": (0,), "ends": (1, 2), "end": (1,), "memory": (2,), "all": (0, 1, 2)}


def recurrent_case(
    kind: str,
    layers: int = 1,
    *,
    bias: bool = True,
    both_ways: bool = False,
    batch_first: bool = True,
    start: bool = True,
    used: str = "all",
) -> Case:
    make, options = KINDS[kind]
    module = make(
        2,
        3,
        layers,
        bias=bias,
        batch_first=batch_first,
        bidirectional=both_ways,
        **options,
    ).double()
    shape = (N, STEPS) if batch_first else (STEPS, N)
    args: tuple[Any, ...] = (torch.randn(*shape, 2),)
    if start:
        count = layers * (1 + both_ways)
        h = torch.randn(count, N, module.proj_size or 3)
        lstm = isinstance(module, nn.LSTM)
        args = (*args, (h, torch.randn(count, N, 3)) if lstm else h)
    if used == "memory" and not isinstance(module, nn.LSTM):
        used = "end"
    batch = {0: 0 if batch_first else 1, 1: 1, 2: 1}
    return Case(lively(module), args, batch=batch, used=USED[used])


def cell_case(
    kind: str, *, bias: bool = True, start: bool = True, used: str = "all"
) -> Case:
    make = {"gru": nn.GRUCell, "lstm": nn.LSTMCell}.get(kind, nn.RNNCell)
    options = {"nonlinearity": kind} if make is nn.RNNCell else {}
    module = make(2, 3, bias, **options).double()
    args: tuple[Any, ...] = (torch.randn(N, 2),)
    if start:
        h = torch.randn(N, 3)
        args = (*args, (h, torch.randn(N, 3)) if kind == "lstm" else h)
    places = USED[used] if kind == "lstm" and used != "memory" else (0,)
    return Case(lively(module), args, used=places)


# ---- attention -------------------------------------------------------------------

E, HEADS, SOURCE = 4, 2, 5


def attention_case(
    inputs: str = "self",
    mask: str = "none",
    *,
    padded: bool = False,
    bias: bool = True,
    extra: str = "none",
    batch_first: bool = True,
    shown: str = "averaged",
    used: Collection[int] = (0, 1),
) -> Case:
    module = nn.MultiheadAttention(
        E,
        HEADS,
        bias=bias,
        add_bias_kv=extra in ("learned", "both"),
        add_zero_attn=extra in ("zero", "both"),
        kdim=3 if inputs == "other-widths" else None,
        vdim=6 if inputs == "other-widths" else None,
        batch_first=batch_first,
    ).double()

    def tokens(count: int, width: int = E) -> Tensor:
        shape = (N, count) if batch_first else (count, N)
        return torch.randn(*shape, width)

    q = tokens(STEPS)
    if inputs == "self":
        k = v = q
    elif inputs == "own-values":
        k, v = q, tokens(STEPS)
    elif inputs == "memory":
        k = v = tokens(SOURCE)
    elif inputs == "three":
        k, v = tokens(SOURCE), tokens(SOURCE)
    else:
        k, v = tokens(SOURCE, 3), tokens(SOURCE, 6)
    source = k.shape[1 if batch_first else 0]
    kwargs: dict[str, Any] = {
        "need_weights": shown != "no",
        "average_attn_weights": shown == "averaged",
    }
    if mask in ("forbidding", "causal"):
        kwargs["attn_mask"] = torch.ones(STEPS, source).triu(1).bool()
        kwargs["is_causal"] = mask == "causal"
    elif mask == "added":
        kwargs["attn_mask"] = torch.randn(STEPS, source)
    elif mask == "by-head":
        kwargs["attn_mask"] = torch.randn(N * HEADS, STEPS, source)
    if padded:
        padding = torch.zeros(N, source).bool()
        padding[1, -1], padding[2, -2:] = True, True
        if mask in ("added", "by-head"):
            padding = torch.zeros(N, source).masked_fill(padding, -torch.inf)
        kwargs["key_padding_mask"] = padding
    batch = {0: 0 if batch_first else 1, 1: 0}
    if shown == "no":
        used = (0,)
    return Case(lively(module), (q, k, v), kwargs, batch, used)


INPUTS = ["self", "own-values", "memory", "three", "other-widths"]
