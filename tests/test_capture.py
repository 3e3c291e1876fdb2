"""Traces, the programs that are made of them, and their rehearsals."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from captured_cases import bits
from conftest import seed_torch
from torch import Tensor

from riemannian_modules.capture import Missed, Program, Slot, Trace, UncapturableError
from riemannian_modules.optim.rehearsal import Before, rehearsed
from riemannian_modules.optim.step_kinds import before
from riemannian_modules.reading import number

N = 3


def traced(
    run: Callable[..., Any], *x: Tensor, places: Sequence[Tensor] = ()
) -> tuple[Trace, list[Slot]]:
    trace = Trace(x, places)
    with trace.listening():
        found = run(*x)
    found = found if isinstance(found, tuple) else (found,)
    return trace, [trace.slot_of(t) for t in found]


def names(program: Program) -> list[str]:
    return [str(each.function._schema.name)[6:] for each in program.operations]


SIMPLER: dict[str, tuple[Callable[[Tensor], Any], list[str]]] = {
    "dead code": (lambda x: (torch.tanh(x), x + 1.0)[1], ["add"]),
    "views that lie alike": (lambda x: x.mT + x.mT, ["transpose", "add"]),
    "a view back": (lambda x: x.mT.mT + 1.0, ["add"]),
    "results that are made twice": (
        lambda x: torch.tanh(x) + torch.tanh(x),
        ["tanh", "add"],
    ),
    "constants": (lambda x: x + torch.ones(N).cumsum(0), ["cumsum", "add"]),
    "random numbers": (lambda x: (torch.rand(2), x + 1.0)[1], ["rand", "add"]),
    "what was written between": (
        lambda x: (y := x.clone()).sum() + (y.add_(1.0), y.sum())[1],
        ["clone", "sum", "add_", "sum", "add"],
    ),
    "results that are given away": (
        lambda x: (torch.tanh(x), torch.tanh(x)),
        ["tanh", "tanh"],
    ),
    "constants that are given away": (
        lambda x: (x + torch.ones(N), torch.ones(N)),
        ["add", "ones"],
    ),
    "constants that are written": (
        lambda x: x + torch.zeros(N).add_(x[0]),
        ["select", "zeros", "add_", "add"],
    ),
    "writes that nobody sees": (lambda x: (x.clone().zero_(), x + 1.0)[1], ["add"]),
    "noise is drawn each time": (
        lambda x: torch.rand_like(x) + torch.rand_like(x),
        ["rand_like", "rand_like", "add"],
    ),
}


@pytest.mark.parametrize("name", SIMPLER)
def test_fewer_operations(name: str) -> None:
    run, kept = SIMPLER[name]
    x = torch.randn(N, N)
    program = Program(*traced(run, x))
    assert sorted(names(program)) == sorted(kept)
    for seed in (1, 2):
        x = torch.randn(N, N)
        seed_torch(seed)
        expected = run(x)
        seed_torch(seed)
        found = program([x], [])
        expected = expected if isinstance(expected, tuple) else (expected,)
        assert bits(list(found)) == bits(list(expected))


def test_what_is_returned_is_new_each_time() -> None:
    x = torch.randn(N, N)
    program = Program(*traced(lambda x: (x + torch.ones(N), torch.ones(N)), x))
    first = program([x], [])
    first[1].zero_()
    assert torch.equal(program([x], [])[1], torch.ones(N))


def test_large_constants_are_made_anew() -> None:
    x = torch.randn(1)
    program = Program(*traced(lambda x: x + torch.zeros(1 << 12), x))
    assert names(program) == ["add"]
    program = Program(*traced(lambda x: x + torch.zeros((1 << 12) + 1), x))
    assert names(program) == ["zeros", "add"]


def test_tensors_are_let_go() -> None:
    x = torch.randn(N)
    source = Program(*traced(lambda x: (x + 1.0).tanh().sum(), x)).source
    assert source.count("del ") == 2


def test_a_guard_ends_it_before_anything_is_changed() -> None:
    h = torch.zeros(N)

    def run(x: Tensor) -> Tensor:
        if x.sum() > 0.0:
            h.add_(x)
        return h.sum()

    x = torch.ones(N)
    program = Program(*traced(run, x))
    h.zero_()
    missed = program([-x], [])
    assert isinstance(missed, Missed)
    assert missed.where.startswith(f"{__file__}:")
    (at,) = program.decided
    assert missed.way == {at: False} == {at: not program.decided[at]}
    assert 0.0 < missed.part < 1.0
    assert not program.may_go(missed.way)
    assert program.may_go({at: True})
    assert program.may_go({})
    assert torch.equal(h, torch.zeros(N))
    assert program([2.0 * x], []) == (torch.tensor(6.0),)


def test_reading_after_changing_is_refused() -> None:
    h = torch.zeros(N)

    def run(x: Tensor) -> Tensor:
        h.add_(x)
        return x if bool(x.sum() > 0.0) else h

    with pytest.raises(UncapturableError, match="read first"):
        Program(*traced(run, torch.ones(N)))


def test_an_operation_that_fails_before_anything_is_changed() -> None:
    h = torch.zeros(N)

    def run(x: Tensor, at: Tensor) -> Tensor:
        found = x.index_select(0, at)
        h.add_(x)
        return found

    x = torch.ones(N)
    program = Program(*traced(run, x, torch.tensor([0])))
    h.zero_()
    assert "fails" in program([x, torch.tensor([7])], []).where
    assert torch.equal(h, torch.zeros(N))


def test_an_operation_that_fails_afterwards() -> None:
    h = torch.zeros(N)

    def run(x: Tensor, at: Tensor) -> Tensor:
        h.add_(x)
        found = x.index_select(0, at)
        h.add_(x)
        return found

    x = torch.ones(N)
    program = Program(*traced(run, x, torch.tensor([0])))
    with pytest.raises((IndexError, RuntimeError)):
        program([x, torch.tensor([7])], [])


def test_numbers_without_a_literal() -> None:
    x = torch.randn(N)
    program = Program(
        *traced(lambda x: torch.where(x > 0.0, x, -torch.inf).clamp_max(torch.nan), x)
    )
    assert torch.equal(program([-x.abs()], [])[0].isnan(), torch.ones(N) > 0.0)


def test_outputs_with_names() -> None:
    x = torch.eye(N)

    def run(x: Tensor) -> Tensor:
        root, info = x.clone(), torch.zeros((), dtype=torch.int32)
        torch.linalg.cholesky_ex(root, out=(root, info))
        return root

    program = Program(*traced(run, x))
    assert torch.equal(program([4.0 * x], [])[0], 2.0 * x)


REFUSED: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "item": (lambda x: x * x.sum().item(), "reads a number"),
    "float": (lambda x: x * float(x.sum()), "reads a number"),
    "tolist": (lambda x: x * x.tolist()[0], "tolist"),
    "numpy": (lambda x: x * x.numpy()[0], "numpy"),
    "sparse": (lambda x: x.to_sparse().to_dense(), "sparse"),
    "shape in place": (lambda x: x.unsqueeze_(0).sum(), "in place"),
    "place in memory": (lambda x: x.as_strided((2,), (1,), 0), "where in its memory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    run, why = REFUSED[name]
    trace, _ = traced(run, torch.ones(N))
    assert why in str(trace.reason)
    assert f"{__file__}:" in str(trace.reason)


@pytest.mark.parametrize("part", [slice(None), slice(1, None)])
def test_tensors_in_the_memory_of_an_argument(part: slice) -> None:
    # The next argument is another one, and they may stay.
    x = torch.ones(N)
    before = x[part]
    trace, _ = traced(lambda x: x.sum() + before.sum(), x)
    assert "in the memory of an argument" in str(trace.reason)


def test_tensors_in_the_memory_of_others() -> None:
    h, x = torch.arange(4.0), torch.ones(1)
    row, part = h.detach(), h[1:]
    run = lambda x: x + h.sum() + row.sum() + part.mul_(2.0).sum() + h.sum()  # noqa: E731
    program = Program(*traced(run, x))
    with torch.no_grad():
        h.copy_(torch.arange(4.0))
    assert torch.equal(
        program([x], [])[0], torch.tensor([1.0 + 6.0 + 6.0 + 12.0 + 12.0])
    )


def test_traces_that_differ() -> None:
    x = torch.ones(N)

    def trace(run: Callable[[Tensor], Any]) -> Trace:
        return traced(run, x)[0]

    one = trace(lambda x: x + 1.0)
    assert one.differs(trace(lambda x: x + 1.0)) is None
    for other in (
        lambda x: x + 2.0,
        lambda x: x + 1,
        lambda x: x * 1.0,
        lambda x: (x + 1.0) + 1.0,
        lambda x: x,
    ):
        assert one.differs(trace(other)) is not None
    held = torch.ones(N)
    one = trace(lambda x: x + held)
    assert one.differs(trace(lambda x: x + held)) is None
    another = torch.ones(N)
    assert "hand it over" in str(one.differs(trace(lambda x: x + another)))
    one = trace(lambda x: x + torch.tensor(1.0))
    assert one.differs(trace(lambda x: x + torch.tensor(1.0))) is None
    assert one.differs(trace(lambda x: x + torch.tensor(2.0))) is not None


def test_values_that_were_read_differ() -> None:
    def run(x: Tensor) -> Tensor:
        return x + bool(x.sum() > 0.0)

    def decided(x: Tensor) -> Tensor:
        number(x.sum(), lambda value: value > 0.0)
        return x + 1.0

    for each in (run, decided):
        one = traced(each, torch.ones(N))[0]
        assert one.differs(traced(each, 2.0 * torch.ones(N))[0]) is None
        assert one.differs(traced(each, -torch.ones(N))[0]) is not None


def test_places_are_others_each_time() -> None:
    x, p = torch.randn(N), torch.randn(N)
    program = Program(*traced(lambda x: x + p, x, places=[None, p]))
    assert program.places == [1]
    other = torch.randn(N)
    assert torch.equal(program([x], [other])[0], x + other)


def test_operations_that_torch_binds_otherwise() -> None:
    # The binding calls an operation with other defaults, or another one.
    x, y = torch.randn(N), torch.randn(N)
    trace, wanted = traced(torch.nn.functional.mse_loss, x, y)
    start = Before([], [])
    result = [torch.nn.functional.mse_loss(x, y)]
    program = rehearsed(trace, wanted, start, [x, y], [], result)
    assert torch.equal(program([y, x], [])[0], result[0])
    with pytest.raises(UncapturableError, match="same numbers"):
        rehearsed(trace, wanted, start, [x, y], [], [result[0] + 1.0])
    with pytest.raises(UncapturableError, match="same numbers"):
        rehearsed(trace, wanted, start, [x, y], [], [result[0].float()])


def test_rehearsals_change_nothing() -> None:
    h = torch.zeros(N)

    def run(x: Tensor) -> Tensor:
        h.add_(torch.rand_like(x))
        return h.sum()

    x = torch.ones(N)
    trace, _ = traced(run, x)
    start = before(trace, [x], [])
    trace, wanted = traced(run, x)
    random, value = torch.get_rng_state(), h.clone()
    rehearsed(trace, wanted, start, [x], [], [h.sum()])
    assert torch.equal(torch.get_rng_state(), random)
    assert torch.equal(h, value)
    right = h.sum()
    with torch.no_grad():
        h.add_(1.0)
    with pytest.raises(UncapturableError, match="same numbers"):
        rehearsed(trace, wanted, start, [x], [], [right])
    assert torch.equal(h, value + 1.0)
    assert torch.equal(torch.get_rng_state(), random)
