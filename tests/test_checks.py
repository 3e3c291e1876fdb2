"""The checks themselves: every law rejects a mutant, and good parts pass them all."""

import subprocess
import sys
from collections.abc import Iterable

import pytest
import torch
from hypothesis import find, given, settings
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from mutants.metrics import METRICS, MODULES, OUTPUTS, Coins, layer
from torch import nn

import riemannian_modules as rm
from riemannian_modules import TangentSpace
from riemannian_modules.testing import (
    CheckResult,
    check_metric,
    check_module,
    check_output_metric,
    failures,
    raise_failures,
)
from riemannian_modules.testing import strategies as rst

GENERATOR_SEED = 20


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(GENERATOR_SEED)


def failed(results: Iterable[CheckResult]) -> set[str]:
    return {result.name for result in failures(results)}


# ---- metrics ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "make"),
    [(law, make) for law, mutants in METRICS.items() for make in mutants],
    ids=[
        f"{law}-{index}"
        for law, mutants in METRICS.items()
        for index, _ in enumerate(mutants)
    ],
)
def test_a_wrong_metric_breaks_the_law(law: str, make) -> None:
    assert law in failed(check_metric(make(), generator=seeded()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_right_metric_keeps_every_law(dtype: torch.dtype) -> None:
    results = check_metric(layer(dtype=dtype), generator=seeded())
    raise_failures(results)
    names = set(METRICS) - ({"float64"} if dtype == torch.float64 else set())
    assert {result.name for result in results} == names


# ---- output metrics --------------------------------------------------------------


def coins(output) -> list[CheckResult]:
    outputs = torch.linspace(-2.0, 2.0, 6).view(3, 2)
    return check_output_metric(
        output, outputs, expected=Coins.expected, generator=seeded()
    )


@pytest.mark.parametrize("law", OUTPUTS)
def test_a_wrong_output_metric_breaks_the_law(law: str) -> None:
    assert law in failed(coins(OUTPUTS[law]()))


def test_the_right_output_metric_keeps_every_law() -> None:
    results = coins(Coins())
    raise_failures(results)
    assert {result.name for result in results} == set(OUTPUTS)
    raise_failures(coins(rm.output.Bernoulli()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", rst.OUTPUTS)
def test_shipped_output_metrics_keep_every_law(kind: str, dtype) -> None:
    outputs = torch.randn(3, 4, dtype=dtype)
    outputs = nn.functional.normalize(outputs, dim=-1)
    results = check_output_metric(rst.OUTPUTS[kind](), outputs, generator=seeded())
    raise_failures(results)


@pytest.mark.parametrize("kind", ["Euclidean", "Bernoulli", "Poisson"])
def test_outputs_may_be_single_numbers(kind: str) -> None:
    output = getattr(rm.output, kind)()
    raise_failures(check_output_metric(output, torch.randn(5), generator=seeded()))


def test_random_rows_are_checked_too() -> None:
    output = rm.output.Sampled(rm.output.Categorical(), 2)
    results = check_output_metric(output, torch.randn(3, 4), random=True)
    raise_failures(results)
    assert "factor_per_example" not in {result.name for result in results}


# ---- models ----------------------------------------------------------------------


def model(layer: type[nn.Linear], output) -> list[CheckResult]:
    # Two positions and several rows an example, on a Stiefel manifold's neighbour.
    net = nn.Sequential(layer(3, 4), nn.Tanh(), nn.Flatten(1), nn.Linear(8, 2))
    x = torch.randn(3, 2, 3)
    return check_module(
        net, x, output(), lambda z: nn.functional.softplus(z).sum(), generator=seeded()
    )


@pytest.mark.parametrize("law", MODULES)
def test_a_wrong_module_breaks_the_law(law: str) -> None:
    assert law in failed(model(*MODULES[law]))


def test_the_right_module_keeps_every_law() -> None:
    results = model(nn.Linear, Coins)
    raise_failures(results)
    assert {result.name for result in results} == set(MODULES)


# ---- findings --------------------------------------------------------------------


def test_expected_failures_are_strict() -> None:
    good, bad = (CheckResult(n, n == "good", 0.0, 0.0, "") for n in ("good", "bad"))
    raise_failures([good])
    raise_failures([good, bad], expected_failures={"bad": "a known flaw"})
    with pytest.raises(AssertionError, match="FAILED bad"):
        raise_failures([good, bad])
    with pytest.raises(AssertionError, match=r"good was expected to fail \(why\)"):
        raise_failures([good], expected_failures={"good": "why"})


def test_the_checks_do_without_hypothesis() -> None:
    block = "import sys; sys.modules['hypothesis'] = None"
    code = f"{block}; import riemannian_modules.testing"
    command = [sys.executable, "-W", "ignore", "-c", code]
    subprocess.run(command, check=True, capture_output=True)


# ---- strategies ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("kind", rst.MANIFOLDS)
@given(data=st.data())
def test_points_are_on_their_manifold(kind: str, dtype, data) -> None:
    manifold = data.draw(rst.manifolds(kinds=[kind]))
    shape = data.draw(rst.shapes(manifold))
    point = data.draw(rst.points(manifold, shape, dtype=dtype))
    assert (point.shape, point.dtype) == (shape, dtype)
    assert manifold.check_point_on_manifold(point, atol=1e-5)
    space = TangentSpace(manifold, point)
    tangent = data.draw(rst.tangent_vectors(space))
    assert manifold.check_vector_on_tangent(point, tangent, atol=1e-5)
    assert tangent.dtype == data.draw(rst.covectors(space)).dtype == dtype


@given(
    mass=rst.masses((2, 3), min_mass=0.1, max_mass=0.2),
    vector=rst.masses((4,), kinds=["rank_one"]),
)
def test_masses_stay_in_their_range(mass, vector) -> None:
    entries = torch.as_tensor(mass.elementwise(torch.zeros(2, 3)))
    assert bool((entries >= 0.1 - 1e-12).all() & (entries <= 0.2 + 1e-12).all())
    assert vector.is_scalar


@pytest.mark.parametrize("form", ["base", "dual", "primal"])
@pytest.mark.slow  # it needs more draws than the quick profile makes
def test_layer_metrics_straddle_rank_and_dimension(form: str) -> None:
    found = find(
        rst.layer_metrics(),
        lambda metric: metric.inverse.form == form,
        settings=settings(database=None),
    )
    assert found.inverse.form == form


@given(metric=rst.layer_metrics(min_rank=2, max_rank=3, max_amplification=10.0))
def test_ranges_of_layer_metrics_are_kept(metric) -> None:
    assert 2 <= metric.rank <= 3
    assert 1.0 + float(metric.gram_spectrum()[0]) <= 10.0 + 1e-6


@given(data=st.data())
def test_random_models_have_outputs_for_their_output_metric(data) -> None:
    net = data.draw(rst.modules(in_features=3, out_features=4))
    output = data.draw(
        rst.output_metrics(kinds=["euclidean", "categorical", "poisson"])
    )
    x = data.draw(rst.inputs_for(net, max_examples=3, max_positions=2))
    z = net(x)
    assert output.factor(z.detach()).shape[2:] == z.shape[1:]


@pytest.mark.parametrize("kinds", [[], ["torus"]])
def test_unknown_kinds_are_refused(kinds) -> None:
    with pytest.raises(InvalidArgument, match="choose from"):
        rst.manifolds(kinds=kinds)
