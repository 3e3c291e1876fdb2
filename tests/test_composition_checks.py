"""check_composition on the library's compositions, and what it must reject."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mutants import composed as mutants
from torch import nn

import riemannian_modules as rm
from riemannian_modules.testing import (
    check_composition,
    check_module,
    raise_failures,
)

X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
MANIFOLDS = [rm.manifolds.Stiefel, rm.manifolds.Sphere, rm.manifolds.Euclidean]


def children(kind: Any = rm.manifolds.Stiefel) -> Callable[[], Sequence[nn.Module]]:
    def make() -> Sequence[nn.Module]:
        return [rm.nn.Linear(3, 3, manifold=kind(), dtype=torch.float64) for _ in "ab"]

    return make


COMPOSITIONS: dict[str, Callable[..., nn.Module]] = {
    "Sequential": rm.nn.Sequential,
    "torch.nn.Sequential": nn.Sequential,
    "Parallel": rm.nn.Parallel,
    "Parallel, joined": lambda *each: rm.nn.Parallel(*each, combine="concat"),
    "Residual": lambda a, b: rm.nn.Residual(rm.nn.Sequential(a, nn.Tanh(), b)),
    "Gate": rm.nn.Gate,
    "operators": lambda a, b: a @ nn.Tanh() @ b + nn.Identity(),
    "nested": lambda a, b: rm.nn.Residual(rm.nn.Parallel(a, rm.nn.Sequential(b))),
}


def names() -> list[str]:
    return list(COMPOSITIONS)


@pytest.mark.parametrize("name", names())
def test_the_library_s_compositions(name: str) -> None:
    found = check_composition(COMPOSITIONS[name], children(), X)
    assert "shared_child" in {result.name for result in found}
    raise_failures(found)


@settings(max_examples=5, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    name=st.sampled_from(names()),
    kind=st.sampled_from(MANIFOLDS),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_children(name: str, kind: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    found = check_composition(
        COMPOSITIONS[name], children(kind), X, generator=generator
    )
    raise_failures(found)


def test_children_of_other_shapes_are_not_shared() -> None:
    def make() -> Sequence[nn.Module]:
        return [nn.Linear(3, 4, dtype=torch.float64), nn.Linear(4, 2).double()]

    found = check_composition(nn.Sequential, make, X)
    assert "shared_child" not in {result.name for result in found}
    raise_failures(found)


@pytest.mark.parametrize("law", mutants.COMPOSITIONS)
def test_the_law_rejects_its_mutant(law: str) -> None:
    compose = mutants.COMPOSITIONS[law]
    found = {r.name: r for r in check_composition(compose, mutants.children, X)}
    assert law in found
    assert not found[law].passed


def test_every_own_law_has_a_mutant() -> None:
    found = {r.name for r in check_composition(nn.Sequential, children(), X)}
    model = nn.Sequential(*children()())
    older = check_module(model, X, rm.output.Euclidean(), lambda z: z.square().mean())
    assert found - {r.name for r in older} <= set(mutants.COMPOSITIONS)
