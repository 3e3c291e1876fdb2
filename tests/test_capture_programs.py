"""A program of a trace does what the Python did, on other numbers too."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from captured_cases import bits
from conftest import seed_torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch import Tensor

from riemannian_modules.capture import Missed, Program, Trace
from riemannian_modules.reading import number

N = 3
Pool = list[Tensor]
Move = Callable[[Pool, int, int], Tensor | None]


def outputs_of(pool: Pool, i: int, j: int) -> Tensor:
    out = torch.empty(N, N)
    torch.add(pool[i], pool[j], out=out)
    return out


def halves(pool: Pool, i: int, j: int) -> Tensor:
    first, second = pool[i].split([1, 2])
    return torch.cat([second, first + pool[j][:1]])


def bent(pool: Pool, i: int, j: int) -> Tensor:
    view = pool[i].view(1, N, N).squeeze_(0)
    view.unsqueeze_(0)
    return view.transpose_(1, 2).squeeze_()


def seen_through_data(pool: Pool, i: int, j: int) -> Tensor:
    return pool[i].data.mT


def strided(pool: Pool, i: int, j: int) -> Tensor:
    fresh = pool[i] + 1.0
    return torch.as_strided(fresh, (N, N), (1, N)) * fresh


MAKES: list[Move] = [
    lambda pool, i, j: pool[i].mT,
    lambda pool, i, j: pool[i].reshape(-1).view(N, N),
    lambda pool, i, j: pool[i][0].expand(N, N),
    lambda pool, i, j: pool[i].diagonal().expand(N, N),
    lambda pool, i, j: torch.stack([pool[i][0], pool[j][1], pool[i][2]]),
    lambda pool, i, j: pool[i] + pool[j].mT,
    lambda pool, i, j: pool[i] * 0.5,
    lambda pool, i, j: torch.tanh(pool[i]),
    lambda pool, i, j: pool[i] @ pool[j],
    lambda pool, i, j: torch.where(pool[i] > 0.0, pool[i], pool[j]),
    lambda pool, i, j: pool[i].clone(),
    lambda pool, i, j: pool[i].detach(),
    lambda pool, i, j: torch.zeros(N, N),
    lambda pool, i, j: torch.ones_like(pool[i]),
    lambda pool, i, j: torch.eye(N).mT,
    lambda pool, i, j: torch.full((N, N), 2.0)[1:].sum() * pool[i],
    lambda pool, i, j: torch.rand_like(pool[i]),
    lambda pool, i, j: torch.dropout(pool[i], 0.5, True),
    outputs_of,
    halves,
    bent,
    seen_through_data,
    strided,
]
WRITES: list[Callable[[Tensor, Tensor], Any]] = [
    lambda a, b: a.mul_(0.5),
    lambda a, b: a.add_(b.clone()),
    lambda a, b: a[0].add_(1.0),
    lambda a, b: a[:, 1].mul_(b[0].clone()),
    lambda a, b: a.diagonal().zero_(),
    lambda a, b: a.mT[1].copy_(b.clone()[2]),
    lambda a, b: a.reshape(-1)[4:].sub_(0.25),
    lambda a, b: a.normal_(),
    lambda a, b: torch.mul(b.clone(), 2.0, out=a),
]
READS: list[Callable[[Tensor], Any]] = [
    lambda a: bool(a.sum() > 0.0),
    lambda a: int(a.argmax()),
    lambda a: len(a[a > -0.3]),
    lambda a: number(a.sum(), lambda value: value > 0.0) > 0.0,
]

indices = st.integers(0, 40)
moves = st.one_of(
    st.tuples(st.just("make"), st.integers(0, len(MAKES) - 1), indices, indices),
    st.tuples(st.just("write"), st.integers(0, len(WRITES) - 1), indices, indices),
    st.tuples(st.just("read"), st.integers(0, len(READS) - 1), indices, indices),
)
scripts = st.tuples(
    st.lists(moves, max_size=14),
    st.lists(st.tuples(st.integers(0, len(WRITES) - 1), indices, indices), max_size=3),
    st.lists(indices, min_size=1, max_size=4),
)


def overlaps(a: Tensor) -> bool:
    return 0 in a.stride()


def play(script: Any, x: Sequence[Tensor], h: Tensor) -> tuple[list[Tensor], list[Any]]:
    """Run what a script says on arguments and on a tensor from outside."""
    first, last, returned = script
    pool: Pool = [*x, h]
    read, inner = [], []
    for kind, which, i, j in first:
        a, b = pool[i % len(pool)], pool[j % len(pool)]
        if kind == "make":
            made = MAKES[which](pool, i % len(pool), j % len(pool))
            pool.append(made)
            if made.untyped_storage()._cdata not in {
                each.untyped_storage()._cdata for each in (*x, h)
            }:
                inner.append(made)
        elif kind == "write" and inner:
            a = inner[i % len(inner)]
            if not overlaps(a):
                WRITES[which](a, b)
        elif kind == "read":
            read.append(READS[which](a))
            pool.append(pool[0] * float(read[-1]))
    for which, i, j in last:
        # The last argument is written, and what is outside.
        target = (h, x[-1], h.mT)[i % 3]
        WRITES[which](target, pool[j % len(pool)])
    return [pool[i % len(pool)] for i in returned], read


def numbers(seed: int) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(N, N, generator=generator) for _ in range(3)]
    return made[:2], made[2]


@settings(max_examples=150)
@given(scripts, st.lists(st.integers(1, 1000), min_size=1, max_size=4))
def test_programs_do_what_python_did(script: Any, seeds: list[int]) -> None:
    x, h = numbers(0)
    trace = Trace(x, [])
    seed_torch(0)
    with trace.listening():
        returned, _ = play(script, x, h)
        wanted = [trace.slot_of(t) for t in returned]
    assert trace.reason is None
    assert all(held is h for held in trace.held if held.numel() == N * N)
    program = Program(trace, wanted)
    assert len(program.operations) <= len(trace.operations)
    replayed = 0
    for seed in (0, *seeds):
        x, value = numbers(seed)
        mine, outside = [t.clone() for t in x], value.clone()
        seed_torch(seed)
        expected, _ = play(script, mine, outside)
        after = torch.get_rng_state()
        with torch.no_grad():
            h.copy_(value)
        theirs = [t.clone() for t in x]
        seed_torch(seed)
        found = program(theirs, [])
        if isinstance(found, Missed):
            assert seed != 0
            assert bits([h, *theirs]) == bits([value, *x])
            continue
        replayed += 1
        assert bits(list(found)) == bits(expected)
        assert bits([h, *theirs]) == bits([outside, *mine])
        assert torch.equal(torch.get_rng_state(), after)
    event(f"replayed {replayed}")
    assert replayed
