"""Rules of recurrent layers and attention with one mistake each, and where it shows.

WRONG: rules whose rows differ from the dense ones. REPLAYS: rules whose replay differs
from the layer, which they notice.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from unittest import mock

import torch
from sequence_cases import Case, attention_case, cell_case, recurrent_case

from riemannian_modules.factors import BiasFactor, DenseFactor, LinearFactor
from riemannian_modules.factors.stacked import StackedFactor
from riemannian_modules.rules import Rule
from riemannian_modules.rules import attention as attention_rule
from riemannian_modules.rules import recurrent as recurrent_rule
from riemannian_modules.rules import recurrent_cell as cell_rule
from riemannian_modules.rules.attention import _Attention
from riemannian_modules.rules.cells import GruSteps, LstmSteps, Sweep

Make = Callable[[], Case]


def replacing(rule: Rule, name: str, value: object) -> Rule:
    """Return a rule that runs with something else in the place of ``name``."""

    file, _, attribute = name.partition(".")
    module = import_module(f"riemannian_modules.rules.{file}")

    def wrong(call):
        with mock.patch.object(module, attribute, value):
            return rule(call)

    return wrong


def changing(rule: Rule, **changes: Callable) -> Rule:
    """Return a rule of whose factors some are changed; ``__`` stands for a dot."""

    def wrong(call):
        found = rule(call)
        for name, change in changes.items():
            path = name.replace("__", ".")
            found[path] = change(found[path])
        return found

    return wrong


def handing(rule: Rule, place: int, change: Callable) -> Rule:
    """Return a rule that sees other cotangents at one output."""

    def wrong(call):
        cotangents = list(call.cotangents)
        cotangents[place] = change(cotangents[place])
        return rule(replace(call, cotangents=tuple(cotangents)))

    return wrong


def exchanged(one: int, other: int, gates: int) -> Callable:
    def change(factor):
        chunks = list(factor.cotangents.chunk(gates, -1))
        chunks[one], chunks[other] = chunks[other], chunks[one]
        return LinearFactor(factor.inputs, torch.cat(chunks, -1))

    return change


def forgotten(factor):
    return BiasFactor(0.0 * factor.cotangents)


def last_position(factor):
    return LinearFactor(factor.inputs[:, -1:], factor.cotangents[:, :, -1:])


def turned(factor):
    return LinearFactor(factor.inputs, factor.cotangents.flip(2))


# ---- recurrent layers ------------------------------------------------------------


class Truncated(Sweep):
    """No gradient through time."""

    def reverse(self, l, m):
        self._hh = 0.0 * self._hh
        super().reverse(l, m)


class StatesAfter(Sweep):
    """The state after each step in the place of the one before."""

    def uses(self, layout):
        self._before = self.states
        return super().uses(layout)


class OpenMemory(LstmSteps):
    """The cell state's cotangent passes without its gate."""

    def pull(self, t, l, m, a, b):
        straight, kept = super().pull(t, l, m, a, b)
        return straight, kept / self._keep[t]


class UnreadMemory(LstmSteps):
    """The cell state's cotangent forgets what the states say about it."""

    def pull(self, t, l, m, a, b):
        straight, kept = super().pull(t, l, m, a, b)
        return straight, kept if m is None else m * self._keep[t]


class NoStraightWay(GruSteps):
    """A GRU's state before counts only through its gates."""

    def pull(self, t, l, m, a, b):
        super().pull(t, l, m, a, b)
        return None, None


class Unreset(GruSteps):
    """The new state's part of ``b_t`` without the reset gate."""

    def pull(self, t, l, m, a, b):
        found = super().pull(t, l, m, a, b)
        b.copy_(a)
        return found


class OtherGates(LstmSteps):
    """Forget gate first."""

    def __init__(self, a, b, memory):
        order = [1, 0, 2, 3]
        a, b = (torch.cat([x.chunk(4, -1)[i] for i in order], -1) for x in (a, b))
        super().__init__(a, b, memory)


class OtherUpdate(GruSteps):
    """The update gate the other way round."""

    def __init__(self, a, b, before):
        reset, update, new = a.chunk(3, -1)
        reset_b, update_b, new_b = b.chunk(3, -1)
        a = torch.cat([reset, -update, new], -1)
        super().__init__(a, torch.cat([reset_b, -update_b, new_b], -1), before)


def lstm() -> Case:
    return recurrent_case("lstm")


def gru() -> Case:
    return recurrent_case("gru")


def stacked() -> Case:
    return recurrent_case("lstm", 2, both_ways=True)


def projected() -> Case:
    return recurrent_case("projected")


# ---- attention -------------------------------------------------------------------


class Unscaled(_Attention):
    """The queries' cotangents without ``1 / sqrt(d)``."""

    def _pull(self, rows, of_weights):
        super()._pull(rows, of_weights)
        self.parts[0] *= self.module.head_dim**0.5


class OtherHeads(_Attention):
    """Heads interleaved."""

    def _heads(self, tensor):
        heads = self.module.num_heads
        return tensor.unflatten(-1, (-1, heads)).permute(0, 3, 1, 2).contiguous()


class Unmasked(_Attention):
    def _mask(self, scores):
        return None


class PaddingOfTheNext(_Attention):
    """Another example's padding."""

    def _mask(self, scores):
        padding = self.given["key_padding_mask"]
        self.given["key_padding_mask"] = padding.roll(1, 0)
        return super()._mask(scores)


def uncentred(p, l):
    return l * p


def reordered(factor):
    q, k, v = factor.blocks
    return StackedFactor([q, v, k])


def of_the_query(factor):
    q, kv = factor.blocks
    inputs = q.inputs[:, [0, 1, 2, 3, 3]]
    return StackedFactor([q, LinearFactor(inputs, kv.cotangents)])


def of_all_examples(factor):
    rows = factor.rows(0, factor.rank).unflatten(0, (2, -1))
    return DenseFactor(rows.mean(1, keepdim=True).expand_as(rows).flatten(0, 1))


def self_attention() -> Case:
    return attention_case()


def memory() -> Case:
    return attention_case("memory", padded=True)


def weights_only() -> Case:
    return attention_case(used=(1,))


WRONG: dict[str, tuple[Rule, Make]] = {
    "bias_hh forgotten": (changing(recurrent_rule, bias_hh_l0=forgotten), lstm),
    "gates exchanged": (
        changing(recurrent_rule, weight_ih_l0=exchanged(0, 1, 4)),
        lstm,
    ),
    "gru gates exchanged": (
        changing(recurrent_rule, weight_hh_l0=exchanged(0, 1, 3)),
        gru,
    ),
    "cell gates exchanged": (
        changing(cell_rule, weight_hh=exchanged(1, 2, 4)),
        lambda: cell_case("lstm"),
    ),
    "last step only": (changing(recurrent_rule, weight_ih_l0=last_position), lstm),
    "not turned back": (changing(recurrent_rule, weight_ih_l0_reverse=turned), stacked),
    "not through time": (replacing(recurrent_rule, "recurrent.Sweep", Truncated), lstm),
    "states after": (replacing(recurrent_rule, "recurrent.Sweep", StatesAfter), lstm),
    "open memory": (replacing(recurrent_rule, "cells.LstmSteps", OpenMemory), lstm),
    "unread memory": (replacing(recurrent_rule, "cells.LstmSteps", UnreadMemory), lstm),
    "no straight way": (
        replacing(recurrent_rule, "cells.GruSteps", NoStraightWay),
        gru,
    ),
    "reset forgotten": (replacing(recurrent_rule, "cells.GruSteps", Unreset), gru),
    "end of memory forgotten": (handing(recurrent_rule, 2, torch.zeros_like), lstm),
    "layers exchanged": (handing(recurrent_rule, 1, lambda l: l.flip(1)), stacked),
    "projected twice": (
        changing(recurrent_rule, weight_hr_l0=last_position),
        projected,
    ),
    "k and v exchanged": (
        changing(attention_rule, in_proj_weight=exchanged(1, 2, 3)),
        self_attention,
    ),
    "blocks exchanged": (
        changing(attention_rule, in_proj_weight=reordered),
        lambda: attention_case("three"),
    ),
    "keys of the query": (
        changing(attention_rule, in_proj_weight=of_the_query),
        memory,
    ),
    "no bias of the output": (
        changing(attention_rule, out_proj__bias=forgotten),
        self_attention,
    ),
    "learned token shared": (
        changing(attention_rule, bias_k=of_all_examples),
        lambda: attention_case(extra="learned"),
    ),
    "unscaled": (replacing(attention_rule, "attention._Attention", Unscaled), memory),
    "uncentred": (
        replacing(attention_rule, "attention._through_softmax", uncentred),
        self_attention,
    ),
    "weights not averaged": (
        handing(attention_rule, 1, lambda l: 2.0 * l),
        weights_only,
    ),
}

REPLAYS: dict[str, tuple[Rule, Make]] = {
    "gate order": (replacing(recurrent_rule, "cells.LstmSteps", OtherGates), lstm),
    "gate order below": (
        replacing(recurrent_rule, "cells.LstmSteps", OtherGates),
        stacked,
    ),
    "update gate": (replacing(recurrent_rule, "cells.GruSteps", OtherUpdate), gru),
    "cell": (
        replacing(cell_rule, "cells.LstmSteps", OtherGates),
        lambda: cell_case("lstm"),
    ),
    "heads": (
        replacing(attention_rule, "attention._Attention", OtherHeads),
        self_attention,
    ),
    "mask": (replacing(attention_rule, "attention._Attention", Unmasked), memory),
    "padding": (
        replacing(attention_rule, "attention._Attention", PaddingOfTheNext),
        memory,
    ),
}
