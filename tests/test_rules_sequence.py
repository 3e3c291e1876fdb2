"""The rules of recurrent layers and of attention, against the dense Jacobian."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from mutants import sequence as mutants
from sequence_cases import (
    INPUTS,
    KINDS,
    STEPS,
    USED,
    N,
    attention_case,
    cell_case,
    lively,
    recurrent_case,
)
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence

from riemannian_modules.errors import LinearizationError, ShapeError
from riemannian_modules.factors import LinearFactor
from riemannian_modules.factors.stacked import StackedFactor
from riemannian_modules.testing import check_rule, raise_failures

# ---- single calls ----------------------------------------------------------------


@given(
    kind=st.sampled_from(list(KINDS)),
    layers=st.integers(1, 3),
    bias=st.booleans(),
    both_ways=st.booleans(),
    batch_first=st.booleans(),
    start=st.booleans(),
    used=st.sampled_from(list(USED)),
)
def test_recurrent_layers(kind: str, layers: int, **options: Any) -> None:
    assert recurrent_case(kind, layers, **options).gap() < 1e-10


@given(
    kind=st.sampled_from(["tanh", "relu", "gru", "lstm"]),
    bias=st.booleans(),
    start=st.booleans(),
    used=st.sampled_from(["states", "end", "all"]),
)
def test_cells(kind: str, **options: Any) -> None:
    assert cell_case(kind, **options).gap() < 1e-10


@pytest.mark.parametrize("used", ["end", "all"])
def test_a_cell_whose_outputs_come_side_by_side(used: str) -> None:
    # As from the fused kernel of another device: no output is made of the other.
    case = cell_case("lstm", used=used)
    assert case.gap() < 1e-10
    case.fused = True
    assert case.gap() < 1e-10


@given(
    inputs=st.sampled_from(INPUTS),
    mask=st.sampled_from(["none", "forbidding", "causal", "added", "by-head"]),
    padded=st.booleans(),
    bias=st.booleans(),
    extra=st.sampled_from(["none", "learned", "zero", "both"]),
    batch_first=st.booleans(),
    shown=st.sampled_from(["no", "averaged", "by-head"]),
    used=st.sampled_from([(0,), (1,), (0, 1)]),
)
def test_attention(inputs: str, mask: str, **options: Any) -> None:
    assert attention_case(inputs, mask, **options).gap() < 1e-10


@pytest.mark.parametrize("kind", ["tanh", "gru", "lstm", "cell", "attention"])
def test_one_sequence_without_a_batch(kind: str) -> None:
    if kind == "attention":
        case = attention_case("memory")
        case.args = tuple(x[0] for x in case.args)
    elif kind == "cell":
        case = cell_case("lstm")
        x, (h, c) = case.args
        case.args = (x[0], (h[0], c[0]))
    else:
        case = recurrent_case(kind, 2, both_ways=True, start=False)
        case.args = (case.args[0][0],)
    case.examples = 1
    assert case.gap() < 1e-10


@pytest.mark.parametrize("major", [True, False])
@pytest.mark.parametrize("kind", ["gru", "lstm", "attention"])
def test_several_sequences_make_one_example(kind: str, major: bool) -> None:
    if kind == "attention":
        case = attention_case(batch_first=False, extra="both")
        x = torch.randn(STEPS, 2 * N, 4)
        case.args = (x, x, x)
    else:
        case = recurrent_case(kind, start=False, batch_first=False)
        case.args = (torch.randn(STEPS, 2 * N, 2),)
    case.major = major
    assert case.gap() < 1e-10


@pytest.mark.parametrize("make", ["lstm", "gru", "cell", "attention", "memory"])
def test_in_float32(make: str) -> None:
    case = {
        "lstm": lambda: recurrent_case("lstm", 2, both_ways=True),
        "gru": lambda: recurrent_case("gru", 2),
        "cell": lambda: cell_case("lstm"),
        "attention": lambda: attention_case(padded=True),
        "memory": lambda: attention_case("memory", "added"),
    }[make]()
    assert case.single().gap() < 2e-5


def test_long_sequences_take_some_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(import_module("riemannian_modules.rules.attention"), "_ROOM", 1)
    for shown in ("no", "averaged", "by-head"):
        case = attention_case("memory", shown=shown)
        case.rank = 3
        assert case.gap() < 1e-10


def test_tokens_that_attend_to_nothing() -> None:
    case = attention_case(shown="no")
    case.kwargs["key_padding_mask"] = torch.tensor([[False], [True], [False]]).expand(
        N, STEPS
    )
    assert case.gap() < 1e-10


def test_shared_weights_within_a_layer() -> None:
    case = recurrent_case("gru", both_ways=True)
    case.module.weight_hh_l0_reverse = case.module.weight_hh_l0
    case.module.bias_ih_l0 = case.module.bias_hh_l0
    assert case.gap() < 1e-10


def test_frozen_parameters() -> None:
    case = recurrent_case("lstm", 2)
    case.module.weight_ih_l0.requires_grad_(False)
    assert case.gap() < 1e-10
    case = attention_case("memory")
    case.module.in_proj_weight.requires_grad_(False)
    assert case.gap() < 1e-10


# ---- what a wrong rule does ------------------------------------------------------


@pytest.mark.parametrize("name", mutants.WRONG)
def test_a_wrong_rule_is_far_from_the_dense_rows(name: str) -> None:
    rule, make = mutants.WRONG[name]
    case = make()
    assert case.gap() < 1e-10
    assert case.gap(rule) > 1e-2


@pytest.mark.parametrize("name", mutants.REPLAYS)
def test_a_wrong_replay_is_noticed(name: str) -> None:
    rule, make = mutants.REPLAYS[name]
    case = make()
    assert case.gap() < 1e-10
    with pytest.raises(LinearizationError, match="recorded outputs"):
        case.gap(rule)


# ---- every use of a layer, every product of its factors --------------------------

X = torch.randn(4, 3, 2, generator=torch.Generator().manual_seed(1)).double()
MEMORY = torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(2)).double()


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (lambda: nn.GRU(2, 2, batch_first=True), (X,)),
        (lambda: nn.LSTM(2, 2, batch_first=True, bidirectional=True), (X,)),
        (lambda: nn.RNN(2, 2, 2, batch_first=True), (X,)),
        (lambda: nn.GRUCell(2, 2), (X[:, 0], X[:, 1])),
        (lambda: nn.MultiheadAttention(2, 2, batch_first=True), (X, X, X)),
        (lambda: nn.MultiheadAttention(2, 1, batch_first=True), (X, MEMORY, MEMORY)),
        (
            lambda: nn.MultiheadAttention(2, 1, batch_first=True, add_bias_kv=True),
            (X, X, X.flip(1)),
        ),
    ],
    ids=["gru", "lstm", "rnn", "cell", "self", "memory", "own-values"],
)
def test_check_rule(make: Callable[[], nn.Module], inputs: tuple[Tensor, ...]) -> None:
    generator = torch.Generator().manual_seed(3)
    raise_failures(check_rule(lively(make()), *inputs, generator=generator))


def test_stacked_factors_must_fit() -> None:
    block = LinearFactor(torch.ones(2, 1, 3), torch.ones(1, 2, 1, 4))
    wide = LinearFactor(torch.ones(2, 1, 5), torch.ones(1, 2, 1, 4))
    with pytest.raises(ShapeError, match=r"\(2, 3\), \(2, 5\)"):
        StackedFactor([block, wide])


def test_packed_sequences_are_refused() -> None:
    case = recurrent_case("gru", start=False)
    lengths = torch.tensor([4, 3, 2])
    case.args = (pack_padded_sequence(case.args[0], lengths, True),)
    case.used = (2,)
    with pytest.raises(LinearizationError, match=r"layer 'layer'.*PackedSequence.*pad"):
        case.gap()
