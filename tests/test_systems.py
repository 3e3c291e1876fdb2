"""Systems: their certificates against Jacobians, samples and simulations."""

import math
from pathlib import Path

import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import loaded
from torch import Tensor

from riemannian_modules.contraction import (
    Interval,
    Side,
    System,
    Verdict,
    discrete,
    parallel,
    product,
    small_gain,
)
from riemannian_modules.errors import ContractionError

SEEDS = st.integers(0, 2**31 - 1)
REGION = {"a": (-1.5, 1.5), "b": (-1.5, 1.5)}
START = {"a": [1.0, -1.0], "b": [0.5]}
OTHER = {"a": [-1.0, 0.2], "b": [-1.2]}


def metric_of_a() -> Tensor:
    return torch.tensor([[1.25, 0.125], [0.125, 1.0]])


def pair(gain: float = 0.4, metrics=None) -> System:
    """A module of two states and one of one, with a skew and a nonlinear coupling."""

    def a(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        turn = torch.stack([own[1], -own[0]])
        return turn - 1.5 * own - own**3 / 3 + gain * torch.tanh(others["b"])

    def b(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        return -2 * own - gain * torch.sin(others["a"][:1])

    return System({"a": a, "b": b}, {"a": 2, "b": 1}, metrics)


def slopes(gain: float = 0.4):
    def bounds(x: dict[str, Interval]) -> dict:
        one, two, three = x["a"][..., 0], x["a"][..., 1], x["b"][..., 0]
        by_b = gain * (1 - three.tanh().square())
        return {
            ("a", "a"): [
                [-1.5 - one.square(), 1.0],
                [-1.0, -1.5 - two.square()],
            ],
            ("a", "b"): [[by_b], [by_b]],
            ("b", "a"): [[-gain * one.cos(), 0.0]],
            ("b", "b"): [[-2.0]],
        }

    return bounds


RULES = {
    "small_gain": {},
    "whole": {},
    "feedback": {"gamma": 1.5},
}


def true_rate(system: System, certificate, states: Tensor) -> float:
    weights = certificate.weights
    P = scipy.linalg.block_diag(
        *(weights[n] * system.roots[n].P.numpy() for n in weights)
    )
    worst = math.inf
    for J in system.jacobian(states).numpy():
        form = P @ J
        least = -scipy.linalg.eigh((form + form.T) / 2, P)[0][-1]
        worst = min(worst, float(least))
    return worst


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("metric", [None, metric_of_a()], ids=["identity", "metric"])
def test_certified_rates_hold_everywhere_in_the_box(rule: str, metric) -> None:
    system = pair(metrics=None if metric is None else {"a": metric})
    options = RULES[rule]
    found = system.certify(
        rule, region=REGION, jacobian_bounds=slopes(), pieces=3, **options
    )
    assert found.contracts
    assert found.side is Side.LOWER
    states = 3 * torch.rand(150, 3) - 1.5
    grid = torch.tensor([-1.5, 0.0, 1.5])
    corners = torch.cartesian_prod(grid, grid, grid)
    true = true_rate(system, found, torch.cat([states, corners]))
    assert found.value <= true + 1e-12
    seen = system.certify(rule, region=REGION, **options)
    assert seen.verdict is Verdict.EVIDENCE
    assert seen.side is Side.ESTIMATE or rule == "whole"
    assert found.value <= seen.value + 1e-9


@pytest.mark.parametrize("rule", RULES)
def test_trajectories_stay_under_the_envelope(rule: str) -> None:
    system = pair(metrics={"a": metric_of_a()})
    found = system.certify(
        rule, region=REGION, jacobian_bounds=slopes(), pieces=2, **RULES[rule]
    )
    shown = system.simulate(found, START, OTHER, time=5.0, region=REGION)
    assert bool(shown.inside.all())
    assert 0.1 < shown.worst <= 1 + 1e-9
    assert shown.measured_rate >= found.value
    assert "inside the region: always" in str(shown)
    before = float(shown.distance[0])
    delta = torch.tensor([2.0, -1.2])
    inner = float(delta @ metric_of_a() @ delta) * found.weights["a"]
    assert before == pytest.approx(math.sqrt(inner + found.weights["b"] * 1.7**2))


def test_pieces_sharpen_bounds() -> None:
    system = pair()
    rates = [
        system.certify("whole", region=REGION, jacobian_bounds=slopes(), pieces=n).value
        for n in (1, 4)
    ]
    assert rates[0] + 0.01 < rates[1]
    split = {"a": (4, 1)}
    found = system.certify(region=REGION, jacobian_bounds=slopes(), pieces=split)
    assert found.contracts


def test_the_whole_matrix_sees_signs() -> None:
    """A skew system: small gain does not certify it, feedback and the whole do."""

    def x(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        return -own + 2 * others["y"]

    def y(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        return -own - 2 * others["x"]

    def bounds(states):
        own = {("x", "x"): [[-1.0]], ("y", "y"): [[-1.0]]}
        return own | {("x", "y"): [[2.0]], ("y", "x"): [[-2.0]]}

    system = System({"x": x, "y": y}, {"x": 1, "y": 1})
    options = {"region": {"x": (-1, 1), "y": (-1, 1)}, "jacobian_bounds": bounds}
    gain = system.certify(**options)
    assert gain.verdict is Verdict.NOT_CERTIFIED
    assert gain.value == pytest.approx(-1.0)
    for rule in ("feedback", "whole"):
        found = system.certify(rule, **options)
        assert found.value == pytest.approx(1.0, abs=1e-12)
        assert found.contracts
    shown = system.simulate(found, {"x": 1, "y": 0}, {"x": 0, "y": 0}, time=3.0)
    assert shown.worst == pytest.approx(1.0, abs=1e-6)
    assert shown.measured_rate == pytest.approx(1.0, abs=1e-6)


@settings(max_examples=10)
@given(SEEDS)
def test_linear_chains_attain_the_hierarchy(seed: int) -> None:
    torch.manual_seed(seed)
    one, two, k = (0.2 + torch.rand(3)).tolist()

    def first(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        return -one * own

    def second(own: Tensor, others: dict[str, Tensor]) -> Tensor:
        return -two * own + k * others["u"]

    def bounds(states):
        return {("u", "u"): [[-one]], ("v", "v"): [[-two]], ("v", "u"): [[k]]}

    system = System({"u": first, "v": second}, {"u": 1, "v": 1})
    region = {"u": (-9, 9), "v": (-9, 9)}
    found = system.certify(
        "hierarchy", region=region, jacobian_bounds=bounds, epsilon=0.5
    )
    root = math.sqrt((one - two) ** 2 + 0.25 * k**2)
    assert found.value == pytest.approx((one + two - root) / 2, abs=1e-10)
    true = true_rate(system, found, torch.zeros(1, 2))
    assert found.value == pytest.approx(true, abs=1e-10)


@pytest.mark.parametrize("norm", ["inf", "1"])
def test_envelopes_in_other_norms(norm: str) -> None:
    system = pair()
    found = system.certify(region=REGION, jacobian_bounds=slopes(), pieces=2, norm=norm)
    assert found.contracts
    shown = system.simulate(found, START, OTHER, time=4.0)
    assert shown.worst <= 1 + 1e-9


def test_leaving_the_region_is_noticed() -> None:
    system = pair()
    found = system.certify(region=REGION, jacobian_bounds=slopes())
    small = {"a": (-0.5, 0.5), "b": (-0.5, 0.5)}
    shown = system.simulate(found, START, OTHER, time=1.0, region=small)
    assert not bool(shown.inside[0])
    assert "not always" in str(shown)
    assert math.isnan(shown.worst)


def test_the_plot_is_a_picture(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    system = pair()
    found = system.certify(region=REGION, jacobian_bounds=slopes())
    shown = system.simulate(found, START, OTHER, time=1.0, points=20)
    shown.plot(tmp_path / "pair.png")
    assert (tmp_path / "pair.png").read_bytes().startswith(b"\x89PNG")


# ---- what is refused ----


def test_the_whole_of_couplings_that_are_far_apart() -> None:
    system = System(
        {
            "a": lambda x, others: -2.0 * x + others["b"],
            "b": lambda x, others: -2.0 * x + 1e-50 * others["a"],
        },
        {"a": 1, "b": 1},
    )
    region = {"a": (-1.0, 1.0), "b": (-1.0, 1.0)}

    def bounds(x: dict[str, Interval]) -> dict:
        own = {(name, name): [[-2.0]] for name in ("a", "b")}
        return {**own, ("a", "b"): [[1.0]], ("b", "a"): [[1e-50]]}

    found = system.certify("whole", region=region, jacobian_bounds=bounds)
    assert found.verdict is Verdict.CERTIFIED
    assert 1.99 < found.value <= 2.0
    with pytest.raises(ContractionError, match="samples=0"):
        system.certify(region=region, samples=0)


def test_wrong_bounds_are_found_by_samples() -> None:
    system = pair()

    def forgets(states):
        found = slopes()(states)
        del found["b", "a"]
        return found

    with pytest.raises(ContractionError, match=r"entry \(2, 0\).*wrong"):
        system.certify(region=REGION, jacobian_bounds=forgets)
    with pytest.raises(ContractionError, match="jacobian_bounds is wrong"):
        system.certify(region=REGION, jacobian_bounds=slopes(0.2))
    with pytest.raises(ContractionError, match="the modules are a, b"):
        system.certify(region=REGION, jacobian_bounds=lambda x: {("c", "a"): [[0.0]]})
    with pytest.raises(ContractionError, match="have the shape"):
        system.certify(region=REGION, jacobian_bounds=lambda x: {("a", "a"): [[0.0]]})


def test_unbounded_intervals_are_not_certified() -> None:
    def wide(states):
        huge = Interval.of(-math.inf, math.inf)
        return slopes()(states) | {("b", "a"): [[huge, 0.0]]}

    found = pair().certify(region=REGION, jacobian_bounds=wide)
    assert found.verdict is Verdict.NOT_CERTIFIED
    assert found.value == -math.inf


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda s: s.certify(region={"a": (0, 1)}), "the modules are a, b"),
        (lambda s: s.certify(region=REGION | {"b": (1, 0)}), "no box"),
        (lambda s: s.certify(region=REGION | {"b": (0, math.inf)}), "no box"),
        (lambda s: s.certify(region=REGION | {"b": ([0, 0], 1)}), "1 states"),
        (lambda s: s.certify("other", region=REGION), "choose"),
        (lambda s: s.certify("feedback", region=REGION, gamma=0.0), "gamma"),
        (
            lambda s: s.certify(region=REGION, jacobian_bounds=slopes(), pieces=0),
            "at least one",
        ),
        (
            lambda s: s.certify(region=REGION, jacobian_bounds=slopes(), pieces=999),
            "a million",
        ),
        (
            lambda s: s.simulate(product([1.0]), START, OTHER, time=1.0),
            "a certificate of",
        ),
        (
            lambda s: s.simulate(
                discrete({"a": 0.1, "b": 0.1}), START, OTHER, time=1.0
            ),
            "certificate of maps",
        ),
    ],
)
def test_refusals(call, word: str) -> None:
    with pytest.raises(ContractionError, match=word):
        call(pair())


def test_a_system_has_to_fit_together() -> None:
    def field(own, others):
        return -own

    with pytest.raises(ContractionError, match="do not belong together"):
        System({"a": field}, {"b": 1})
    with pytest.raises(ContractionError, match="the metric of 'a'"):
        System({"a": field}, {"a": 1}, {"a": torch.eye(2)})
    bad = System({"a": lambda own, others: own[:1]}, {"a": 2})
    with pytest.raises(ContractionError, match="has the shape of the state"):
        bad.certify(region={"a": (0, 1)})
    three = System(dict.fromkeys("abc", field), dict.fromkeys("abc", 1))
    with pytest.raises(ContractionError, match="two modules"):
        three.certify("feedback", region=dict.fromkeys("abc", (0, 1)))
    nan = System({"a": lambda own, others: own.sqrt()}, {"a": 1})
    with pytest.raises(ContractionError, match="not finite"):
        nan.certify(region={"a": (-1, 1)})


def test_metrics_of_the_same_name_are_told_apart() -> None:
    """Each of the two contracts in its own metric P_x; their sum is unstable."""
    fields = [[[-1.0, 10.0], [0.0, -1.0]], [[-1.0, 0.0], [10.0, -1.0]]]

    def certified(matrix: list[list[float]], weight: float):
        A = torch.tensor(matrix)
        system = System(
            {"x": lambda x, others: A @ x},
            {"x": 2},
            {"x": torch.tensor([[weight, 0.0], [0.0, 1.0]])},
        )
        return system.certify(
            region={"x": (-1.0, 1.0)}, jacobian_bounds=lambda x: {("x", "x"): matrix}
        )

    found = [
        certified(matrix, weight)
        for matrix, weight in zip(fields, (1 / 150, 150.0), strict=True)
    ]
    assert all(each.contracts for each in found)
    assert float(torch.linalg.eigvals(sum(map(torch.tensor, fields))).real.max()) > 7
    with pytest.raises(ContractionError, match="different metrics"):
        parallel(found)
    again = certified(fields[0], 1 / 150)
    assert parallel([found[0], again]).value == pytest.approx(2 * again.value)


def test_evidence_does_not_become_proof_further_up() -> None:
    seen = pair().certify(region=REGION)
    above = small_gain([seen, 5.0], [[0, 0.1], [0.1, 0]])
    assert above.verdict is Verdict.EVIDENCE


# ---- the examples ----


@pytest.fixture(scope="module", params=["oscillators", "gene_regulation"])
def example(request):
    return loaded(f"examples/{request.param}.py")


def test_derivatives_of_the_examples_are_right(example) -> None:
    """Over a box without volume the bounds are the Jacobian."""
    if example.__name__.startswith("osc"):
        system, bounds = example.pendulums(1.8, 0.2), example.slopes(1.8, 0.2)
    else:
        system, bounds = example.network(0.4, 0.3, 0.1), example.slopes(0.4, 0.3, 0.1)
    for share in torch.rand(5).tolist():
        point = {
            name: torch.tensor(low) + share * (torch.tensor(high) - torch.tensor(low))
            for name, (low, high) in example.REGION.items()
        }
        region = {name: (x, x) for name, x in point.items()}
        J = system.jacobians(region, bounds, samples=1)
        seen = system.jacobian(system.layout.join(point)[None])
        torch.testing.assert_close(J.lower, seen, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(J.upper, seen, rtol=1e-12, atol=1e-12)
