"""Rows that cannot fit into memory are refused before they are made."""

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from test_errors import refused
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError, MemoryBoundError
from riemannian_modules.room import require_room

SIZE = 8  # of a number in float64


def language_model(classes: int) -> nn.Module:
    return nn.Sequential(nn.Embedding(classes, 4), nn.Linear(4, classes))


def cross_entropy(z: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(z.movedim(-1, 1), y)


@pytest.mark.parametrize("bound", ["1GiB", None])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_language_model_with_exact_rows(bound: str | None, weighted: bool) -> None:
    x = torch.randint(5000, (8, 64))
    model = language_model(5000)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), max_memory=bound)
    with metric.record():
        z = model(x)
    limit = "max_memory is 1.07 GB" if bound else "the machine has"
    # Of 64 x 4999 rows for each example and 64 x 5000 numbers.
    words = ("8 x 319936 rows of 320000 numbers, 6,552 GB", limit, "Sampled")
    with refused(MemoryBoundError, *words, metric=metric):
        weights = torch.ones(8, 64) if weighted else None
        metric.backward(cross_entropy(z, x), z, weights=weights)
    sampled = rm.LayerwiseMetric(
        model, rm.output.Sampled(rm.output.Categorical()), max_memory="1GiB"
    )
    with sampled.record():
        z = model(x[:1, :2])
    sampled.backward(cross_entropy(z, x[:1, :2]), z)


def test_the_bound_is_that_of_the_rows() -> None:
    x = torch.randint(7, (3, 2))
    model = language_model(7)
    needed = 3 * (2 * 6) * (2 * 7) * SIZE
    for bound in (needed, needed - 1):
        metric = rm.LayerwiseMetric(
            model, rm.output.Categorical(), solver="cg", max_memory=bound
        )
        with metric.record():
            z = model(x)
        if bound == needed:
            metric.backward(cross_entropy(z, x), z)
        else:
            with refused(MemoryBoundError, "3 x 12 rows of 14", metric=metric):
                metric.backward(cross_entropy(z, x), z)


def test_several_outputs_have_zeros_for_each_other() -> None:
    heads = [
        (torch.zeros(5, 3), rm.output.Categorical()),
        (torch.zeros(5, 4), rm.output.Euclidean()),
        (torch.zeros(5, 1), None),
    ]
    needed = 5 * (2 + 4) * (3 + 4 + 1) * SIZE
    require_room(heads, needed)
    with pytest.raises(MemoryBoundError, match=re.escape("5 x 6 rows of 8 numbers")):
        require_room(heads, needed - 1)


def test_an_output_metric_that_does_not_count_its_rows() -> None:
    class Own(rm.output.OutputMetric):
        def factor(self, outputs: Tensor) -> Tensor:
            return torch.zeros(len(outputs), 1 << 50, *outputs.shape[1:])

    model = nn.Linear(3, 2)
    metric = rm.LayerwiseMetric(model, Own(), max_memory="1MiB")
    with metric.record():
        z = model(torch.randn(4, 3))
    with refused(MemoryBoundError, "output metric", "Sampled", metric=metric):
        metric.backward(z.square().mean(), z)


def test_a_function_of_single_examples() -> None:
    model = nn.Linear(2, 40)
    metric = rm.functional.FunctionalMetric(
        model, lambda net, x: net(x), max_memory=10_000
    )
    z = metric(torch.randn(4, 2))
    with pytest.raises(MemoryBoundError, match="4 x 40 rows of 40 numbers"):
        metric.backward(z.square().mean(), z)


class Hungry(nn.Module):
    """Asks for more memory than there is when it runs again."""

    def __init__(self, failure: Callable[[], object]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 3))
        self.failure, self.calls = failure, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            self.failure()
        # No look-up in the parameter itself, which would need no run.
        return (self.table @ self.table.mT)[x].sum(1)


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 409 GiB")


def no_more() -> None:
    raise MemoryError


@pytest.mark.parametrize(
    "failure", [lambda: torch.empty(1 << 50), out_of_memory, no_more]
)
def test_rows_of_a_parameter_that_do_not_fit(failure: Callable[[], object]) -> None:
    model = nn.Sequential(Hungry(failure))
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean())
    with metric.record():
        z = model(torch.randint(5, (4, 2)))
    words = ("'0.table'", "layer '0' (Hungry)", "nn.Embedding", "Sampled", "memory")
    with refused(MemoryBoundError, *words, metric=metric):
        metric.backward(z.square().mean(), z)


def test_another_failure_of_a_replay_is_what_it_is() -> None:
    def fail() -> None:
        raise RuntimeError("something else")

    model = Hungry(fail)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean())
    with metric.record():
        z = model(torch.randint(5, (4, 2)))
    with pytest.raises(LinearizationError, match="something else"):
        metric.backward(z.square().mean(), z)
