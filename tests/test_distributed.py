"""Several processes take the step that one takes with all of their examples."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.distributed import MUTANTS
from scripts import loaded
from torch import Tensor

import riemannian_modules as rm
from riemannian_modules import factors as fs
from riemannian_modules.factors.stacked import StackedFactor
from riemannian_modules.joining import Offer, Pieces, Plan, shares
from riemannian_modules.joining.forms import form_of

WORKER = Path(__file__).with_name("distributed_worker.py")
# Of a launch; it takes a tenth of that on an idle machine.
SECONDS = 180
FOUR = ("layer", "curved", "tokens", "rest, model", "functional", "routed")

pytestmark = [
    # Starting processes takes some ten seconds.
    pytest.mark.slow,
    pytest.mark.skipif(
        not (dist.is_available() and dist.is_gloo_available()), reason="needs gloo"
    ),
]


# --- without processes: what is packed by one and joined by another


def rank_of(factors: Mapping[str, fs.MetricFactor], n: int) -> int:
    return next(iter(factors.values())).rank // n


def join(
    ranks: Sequence[Mapping[str, fs.MetricFactor]],
    counts: Sequence[int],
    rows: Sequence[int],
    weights: Sequence[float],
    kind: type[Plan] = Plan,
) -> dict[str, fs.MetricFactor]:
    """Join factors as processes do, in one of them."""
    offers, pieces = [], []
    for own, n, r, share in zip(ranks, counts, rows, weights, strict=True):
        piece = Pieces()
        forms = {name: form_of(f, r, 0.5, piece) for name, f in own.items()}
        offers.append(Offer(forms, piece.specs, n, r, share))
        pieces.append(piece)
    plans = [kind(offers) for _ in offers]
    cpu = torch.device("cpu")
    sent = [plan.packed(p, ranks[p], pieces[p], cpu) for p, plan in enumerate(plans)]
    return plans[0].joined(sent)


def expected(
    ranks: Sequence[Mapping[str, fs.MetricFactor]],
    name: str,
    counts: Sequence[int],
    rows: Sequence[int],
    weights: Sequence[float],
) -> Tensor:
    """The dense rows: cotangents first, then the examples of all ranks."""
    size = next(math.prod(own[name].shape) for own in ranks if name in own)
    out = torch.zeros(max(rows), sum(counts), size)
    begin = 0
    for own, n, r, share in zip(ranks, counts, rows, weights, strict=True):
        if name in own:
            dense = own[name].to_dense().view(r, n, -1)
            out[:r, begin : begin + n] = dense * share**0.5
        begin += n
    return out.flatten(0, 1)


def linear(n: int, r: int, positions: int) -> dict[str, fs.MetricFactor]:
    x, l = torch.randn(n, positions, 3), torch.randn(r, n, positions, 2)
    return {"weight": fs.LinearFactor(x, l), "bias": fs.BiasFactor(l)}


def convolution(n: int, r: int, uses: int) -> dict[str, fs.MetricFactor]:
    kind = fs.Convolution((3,), (1,), (1,), (1,))
    x, l = torch.randn(n, uses, 2, 4), torch.randn(r, n, uses, 2, 4)
    return {"weight": fs.ConvolutionFactor(kind, x, l, (2, 2, 3))}


def embedding(n: int, r: int, places: int) -> dict[str, fs.MetricFactor]:
    tokens, l = torch.randint(5, (n * places,)), torch.randn(r, n, places, 2)
    return {"table": fs.EmbeddingFactor(tokens, l, 5)}


def bag(n: int, r: int, places: int) -> dict[str, fs.MetricFactor]:
    count = n * places + 1
    tokens, where = torch.randint(5, (count,)), torch.randint(n * places, (count,))
    l, weights = torch.randn(r, n, places, 2), torch.rand(count)
    return {"table": fs.EmbeddingFactor(tokens, l, 5, where, weights)}


def tied(n: int, r: int, places: int) -> dict[str, fs.MetricFactor]:
    x, l = torch.randn(n, places, 2), torch.randn(r, n, places, 5)
    head = fs.LinearFactor(x, l)
    return {"table": embedding(n, r, places)["table"] + head}


def stacked(n: int, r: int, positions: int) -> dict[str, fs.MetricFactor]:
    blocks = [linear(n, r, positions)["weight"] for _ in range(2)]
    return {
        "weights": StackedFactor([b for b in blocks if isinstance(b, fs.LinearFactor)])
    }


def across(n: int, r: int, positions: int) -> dict[str, fs.MetricFactor]:
    inner = linear(n, r, positions)["weight"]
    assert isinstance(inner, fs.LinearFactor)
    return {"weight": fs.ViewedFactor(inner)}


def numbers(n: int, r: int, places: int) -> dict[str, fs.MetricFactor]:
    tokens, l = torch.randint(5, (n * places,)), torch.randn(r, n, places, 1)
    return {"table": fs.ViewedFactor(fs.EmbeddingFactor(tokens, l, 5))}


def dense(n: int, r: int, positions: int) -> dict[str, fs.MetricFactor]:
    return {"anything": fs.DenseFactor(torch.randn(n * r, 2, 3))}


class Other(fs.LinearFactor):
    """A class that nobody knows how to send."""


def unknown(n: int, r: int, positions: int) -> dict[str, fs.MetricFactor]:
    x, l = torch.randn(n, positions, 3), torch.randn(r, n, positions, 2)
    return {"weight": Other(x, l)}


MAKE: dict[str, Callable[[int, int, int], dict[str, fs.MetricFactor]]] = {
    each.__name__: each
    for each in (
        linear,
        convolution,
        embedding,
        bag,
        tied,
        stacked,
        dense,
        unknown,
        across,
        numbers,
    )
}


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[float]]:
    """Examples, rows and positions of every rank, and its share of the batch."""
    size = draw(st.integers(1, 4))
    small = st.lists(st.integers(1, 3), min_size=size, max_size=size)
    counts, rows, positions = draw(small), draw(small), draw(small)
    return counts, rows, positions, [n / sum(counts) for n in counts]


@pytest.mark.parametrize("name", MAKE)
@settings(max_examples=15)
@given(batch=batches())
def test_joined_rows_are_all_rows(name: str, batch: Any) -> None:
    counts, rows, positions, weights = batch
    sizes = zip(counts, rows, positions, strict=True)
    ranks = [MAKE[name](*each) for each in sizes]
    found = join(ranks, counts, rows, weights)
    for key, factor in found.items():
        want = expected(ranks, key, counts, rows, weights)
        torch.testing.assert_close(factor.to_dense(), want, rtol=1e-12, atol=1e-12)
        kinds = {type(own[key]) for own in ranks}
        assert type(factor) in kinds | {fs.DenseFactor}
        if name not in ("dense", "unknown"):
            assert type(factor) in kinds, "sent in full although it need not be"


@pytest.mark.parametrize("name", [each for each in MAKE if each != "unknown"])
def test_a_factor_that_some_ranks_lack_is_zero_there(name: str) -> None:
    counts, rows, weights = [2, 3, 1], [2, 2, 2], [1 / 3, 1 / 2, 1 / 6]
    whole = {"other": fs.BiasFactor(torch.randn(2, 2, 1, 3))}
    ranks: list[dict[str, fs.MetricFactor]] = [whole, {}, MAKE[name](1, 2, 2)]
    ranks[1] = {"other": fs.BiasFactor(torch.randn(2, 3, 1, 3))}
    found = join(ranks, counts, rows, weights)
    for key, factor in found.items():
        want = expected(ranks, key, counts, rows, weights)
        torch.testing.assert_close(factor.to_dense(), want, rtol=1e-12, atol=1e-12)


def test_factors_of_different_kinds_are_sent_as_rows() -> None:
    counts, rows, weights = [2, 1], [1, 1], [2 / 3, 1 / 3]
    first = linear(2, 1, 1)
    ranks = [
        first,
        {name: fs.DenseFactor(f.rows(0, 1)) for name, f in linear(1, 1, 1).items()},
    ]
    found = join(ranks, counts, rows, weights)
    for key, factor in found.items():
        assert isinstance(factor, fs.DenseFactor)
        want = expected(ranks, key, counts, rows, weights)
        torch.testing.assert_close(factor.to_dense(), want, rtol=1e-12, atol=1e-12)


def test_a_bias_still_travels_with_its_weight() -> None:
    found = join([linear(2, 2, 1), linear(3, 2, 1)], [2, 3], [2, 2], [0.4, 0.6])
    bias, weight = found["bias"], found["weight"]
    assert isinstance(bias, fs.BiasFactor)
    assert bias.belongs_to(weight)


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_ways_to_join_are_found(name: str) -> None:
    counts, rows, weights = [2, 1], [1, 1], [2 / 3, 1 / 3]
    ranks: list[dict[str, fs.MetricFactor]] = [
        {**linear(2, 1, 1), **dense(2, 1, 1)},
        {**linear(1, 1, 1), **dense(1, 1, 1)},
    ]
    found = join(ranks, counts, rows, weights, MUTANTS[name])
    wants = {key: expected(ranks, key, counts, rows, weights) for key in found}
    assert any(
        not torch.allclose(factor.to_dense(), wants[key], rtol=1e-12, atol=1e-12)
        for key, factor in found.items()
    )


@given(terms=st.lists(st.integers(1, 50), min_size=1, max_size=5))
def test_shares_of_a_mean_add_up(terms: list[int]) -> None:
    found = shares([[t, 3 * t] for t in terms], "mean")
    assert sum(found) == pytest.approx(1.0, rel=1e-15)
    assert found == pytest.approx([t / sum(terms) for t in terms])
    assert shares([[t] for t in terms], "sum") == [1.0] * len(terms)


def test_without_a_process_group() -> None:
    metric = rm.LayerwiseMetric(torch.nn.Linear(2, 2), rm.output.Categorical())
    with pytest.raises(rm.errors.DistributedError, match="init_process_group"):
        rm.distributed.data_parallel(metric)
    assert metric.exchange is None


def test_the_example_runs_alone(capsys: pytest.CaptureFixture[str]) -> None:
    distributed = loaded("examples/distributed.py")
    assert distributed.main(["--steps", "30"]) == 0
    said = capsys.readouterr().out
    loss, accuracy = (float(x) for x in re.findall(r"(\d+\.\d+)", said))
    assert loss < 0.3
    assert accuracy > 90.0
    assert not dist.is_initialized()


# --- with processes


def environment() -> dict[str, str]:
    package = Path(rm.__file__).parents[1]
    path = [str(package), str(WORKER.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), "OMP_NUM_THREADS": "1"}


def launch(folder: Path, processes: int, *arguments: str) -> dict[str, Any]:
    """Run the worker under torchrun and return what it found."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
            *("--nproc-per-node", str(processes), str(WORKER)),
            *(arguments[0], str(folder), *arguments[1:]),
        ],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads((folder / "results.json").read_text("utf-8"))
    return found


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("two"), 2, "all")


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return launch(tmp_path_factory.mktemp("four"), 4, "some", *FOUR)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_take_the_step_of_the_joined_batch(
    name: str, two: dict[str, Any]
) -> None:
    found = two[name]
    assert found["rank"] == found["rank alone"]
    assert found["worst"] < CASES[name].tolerance, found["steps"]
    assert found["equal bits"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FOUR)
def test_four_processes_take_the_step_of_the_joined_batch(
    name: str, four: dict[str, Any]
) -> None:
    found = four[name]
    assert found["rank"] == found["rank alone"]
    assert found["worst"] < CASES[name].tolerance, found["steps"]
    assert found["equal bits"]


# What each of two ranks says.
SAID = {
    "not finite": ("rank 1: NonFiniteError", "NonFiniteError: NaN or infinity"),
    "goes on": ("True", "True"),
    "other values": ("parameter '0.weight' has other values on rank 1",) * 2,
    "other masses": ("the mass of '0.weight' has other values on rank 1",) * 2,
    "other calls": ("rank 0: solve, rank 1: backward",) * 2,
    "other dice": ("the generator of rows= has other values on rank 1",) * 2,
    "other rows": ("reductions of rows: rows=NoneType, history=None, refresh=",) * 2,
    "no outputs": ("rank 1: ValueError: made up", "ValueError: made up"),
    "no solution": ("NotPositiveDefiniteError: made up",) * 2,
    "unmoved": ("True", "True"),
    "frozen": ("require gradients: ",) * 2,
    "frozen later": ("parameter '2.weight' has requires_grad=False",) * 2,
    "other models": ("different parameters",) * 2,
    "wrapped": ("ddp.module",) * 2,
    "divided": ("LinearizationError: parameter 'weight' is a DTensor",) * 2,
    "uneven": ("[[4, 4], [4, 8]]",) * 2,
    "no examples": ("rank 1: EmptyBatchError", "EmptyBatchError: outputs have"),
    "negative weights": ("rank 1: OutputMetricError", "OutputMetricError:"),
    "a tuple": ("rank 1: ShapeError", "ShapeError: outputs are a tuple"),
    "a number": ("rank 1: TypeError", "TypeError: the loss is a float"),
    "points that are not finite": (
        "rank 1: NonFiniteError: function 'in' gives NaN or infinity for example 0",
        "NonFiniteError: function 'in' gives NaN or infinity for example 0",
    ),
    "no points": ("rank 1: EmptyBatchError", "EmptyBatchError: the examples"),
    "points of a wrong shape": ("rank 1: ShapeError", "ShapeError: a Differential"),
    "and then": ("no error",) * 2,
}
for optimizer in ("LevenbergMarquardt", "TrustRegion", "LineSearch"):
    for kind, error in (("layer", "ValueError"), ("functional", "ShapeError")):
        SAID |= {
            f"{optimizer}, {kind}": (f"rank 1: {error}: ", f"{error}: "),
            f"{optimizer}, {kind}, unmoved": ("True", "True"),
            f"{optimizer}, {kind}, then": ("True", "True"),
        }


@pytest.mark.parametrize("name", SAID)
def test_an_error_of_one_rank_is_an_error_of_all(
    name: str, two: dict[str, Any]
) -> None:
    said = two["refusals"][name]
    for part, whole in zip(SAID[name], said, strict=True):
        assert part in whole


def test_a_checkpoint_resumes_bit_for_bit(two: dict[str, Any]) -> None:
    assert two["resumed"]["equal"] == [True, True]


@pytest.fixture(scope="module")
def noticed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 says of partners that are killed, or sleep; no agent helps it."""
    folder = tmp_path_factory.mktemp("lonely")
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), "lonely", str(folder), str(rank)],
            env=environment(),
        )
        for rank in range(3)
    ]
    try:
        processes[0].wait(SECONDS)
    finally:
        for process in processes:
            process.kill()
            process.wait()
    found: dict[str, Any] = json.loads((folder / "noticed.json").read_text("utf-8"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [("1", 3), ("2", 0)], ids=["killed", "late"])
def test_a_rank_that_is_gone_ends_the_others(
    rank: str, step: int, noticed: dict[str, Any]
) -> None:
    found = noticed[rank]
    assert found["step"] == step
    assert "start all of them from a checkpoint" in found["error"]
    # The timeouts are 3 minutes and 10 seconds; that of torch is half an hour.
    assert found["seconds"] < 60
