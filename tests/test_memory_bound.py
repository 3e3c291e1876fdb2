"""A bound on memory is kept: what a solve allocates, counted operation by operation."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Part, TangentSpace
from riemannian_modules.errors import MemoryBoundError
from riemannian_modules.factors import DenseFactor, LinearFactor, MetricFactor
from riemannian_modules.factors.chunks import at_most, is_bounded, most_entries
from riemannian_modules.memory_model import held, parse_bytes

SLACK = 1 << 20


class PeakMemory(TorchDispatchMode):
    """Counts the bytes of all storages that live tensors of this scope hold."""

    def __init__(self) -> None:
        super().__init__()
        self.held = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        before = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, Tensor)
        }
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known | before:
                    self._count(storage._cdata, storage)
        return result

    def _count(self, key: int, storage: torch.UntypedStorage) -> None:
        size = storage.nbytes()
        self._known.add(key)
        self.held += size
        self.peak = max(self.peak, self.held)
        weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.held -= size


def linear(dtype: torch.dtype) -> MetricFactor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 1, 96, generator=generator, dtype=torch.float64)
    l = torch.randn(9, 64, 1, 80, generator=generator, dtype=torch.float64)
    return LinearFactor(x.to(dtype), l.to(dtype))


def positions(dtype: torch.dtype) -> MetricFactor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(64, 30, 20, generator=generator, dtype=torch.float64)
    l = torch.randn(4, 64, 30, 24, generator=generator, dtype=torch.float64)
    return LinearFactor(x.to(dtype), l.to(dtype))


def dense(dtype: torch.dtype) -> MetricFactor:
    generator = torch.Generator().manual_seed(0)
    return DenseFactor(
        torch.randn(300, 64, 50, generator=generator, dtype=torch.float64).to(dtype)
    )


FACTORS = [linear, positions, dense]
MANIFOLDS = {
    "euclidean": rm.manifolds.Euclidean,
    "oblique": rm.manifolds.Oblique,
    "stiefel": rm.manifolds.Stiefel,
}


def metric_of(
    make: Callable[[torch.dtype], MetricFactor],
    kind: str,
    dtype: torch.dtype,
    **options,
) -> LayerMetric:
    factor, manifold = make(dtype), MANIFOLDS[kind]()
    generator = torch.Generator().manual_seed(1)
    point = torch.randn(factor.shape, generator=generator, dtype=torch.float64)
    space = TangentSpace(
        manifold, manifold.projx(point).to(dtype), rm.Mass(scalar=10.0)
    )
    return LayerMetric([Part("w", space, factor)], name="first", **options)


def peak_of(metric: LayerMetric) -> tuple[int, dict[str, Tensor], str]:
    y = torch.linspace(-1.0, 1.0, metric.rank, dtype=torch.float64)
    with PeakMemory() as memory:
        solution = metric.solve(residual=y)
    return memory.peak, solution.vectors, solution.branch


def in_both_types() -> list[Any]:
    """Every factor, manifold and solver together, and each two in both data types."""
    types = torch.float32, torch.float64
    return [
        pytest.param(
            make, kind, dtype, solver, id=f"{make.__name__}-{kind}-{dtype}-{solver}"
        )
        for i, make in enumerate(FACTORS)
        for j, kind in enumerate(MANIFOLDS)
        for k, solver in enumerate(("cholesky", "cg"))
        for dtype in [types[(i + j + k) % 2]]
    ]


@pytest.mark.parametrize(("make", "kind", "dtype", "solver"), in_both_types())
def test_the_smallest_bound_is_kept(make, kind, dtype, solver) -> None:
    options = {"solver": solver}
    with pytest.raises(MemoryBoundError, match="smallest bound is") as refused:
        metric_of(make, kind, dtype, max_memory=1000, **options).solve(
            residual=torch.ones(make(dtype).rank)
        )
    smallest = int(str(refused.value).split("smallest bound is ")[1].split()[0])
    bounded = metric_of(make, kind, dtype, max_memory=smallest, **options)
    peak, found, _ = peak_of(bounded)
    _, expected, _ = peak_of(metric_of(make, kind, dtype, solver="cholesky"))
    assert peak <= smallest + SLACK
    # Nor is the bound so large that it says nothing.
    assert smallest <= 5 * peak
    torch.testing.assert_close(
        found["w"], expected["w"], rtol=0.0, atol=3e-5 * float(expected["w"].norm())
    )


@pytest.mark.parametrize("make", FACTORS)
def test_iterations_where_the_small_matrix_does_not_fit(make) -> None:
    metric = metric_of(make, "euclidean", torch.float64)
    block = metric.inverse.block
    dual, cg = (held(block, way, torch.float64, 0).smallest for way in ("dual", "cg"))
    bounded = metric_of(
        make, "euclidean", torch.float64, max_memory=min(dual - 1, max(cg, dual // 2))
    )
    if cg > dual - 1:
        with pytest.raises(MemoryBoundError, match=r"'first'.*dual or cg"):
            peak_of(bounded)
        return
    peak, found, branch = peak_of(bounded)
    assert branch == "cg"
    assert peak <= bounded.max_memory + SLACK
    with pytest.raises(MemoryBoundError, match=r"\(dual\) within"):
        bounded.logdet()
    _, expected, _ = peak_of(metric_of(make, "euclidean", torch.float64))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_model_hands_its_bound_to_its_blocks() -> None:
    model = nn.Linear(4, 3).double()
    metric = rm.LayerwiseMetric(
        model, output=rm.output.Euclidean(), max_memory="1.5 MiB", solver="cholesky"
    )
    with metric.record():
        outputs = model(torch.ones(5, 4))
    metric.backward(outputs.square().mean(), outputs)
    metric.natural_gradient()
    metric.scale_mass(2.0)
    assert {block.max_memory for block in metric.blocks.values()} == {3 << 19}
    assert metric.of(nn.Linear(4, 3).double()).max_memory == 3 << 19


@given(value=st.integers(1, 10**12), unit=st.sampled_from(["K", "M", "G", "T"]))
def test_bytes_with_units(value: int, unit: str) -> None:
    power = "KMGT".index(unit) + 1
    assert (
        parse_bytes(value)
        == value
        == parse_bytes(str(value))
        == parse_bytes(f"{value} B")
    )
    assert parse_bytes(f"{value}{unit}iB") == value * 1024**power
    assert parse_bytes(f"{value} {unit}B") == value * 1000**power


@pytest.mark.parametrize("bound", [0, -5, "0", "", "1 XB", "iB", "1 iB", "1,5GB"])
def test_bounds_that_mean_nothing_are_refused(bound) -> None:
    with pytest.raises(ValueError, match="max_memory="):
        parse_bytes(bound)


def test_a_scope_lowers_the_bound_and_gives_it_back() -> None:
    usual = most_entries()
    with at_most(10):
        assert most_entries() == 10
        assert is_bounded()
        with at_most(20):
            assert most_entries() == 10
    with at_most(2 * usual):
        assert most_entries() == usual
    assert not is_bounded()
