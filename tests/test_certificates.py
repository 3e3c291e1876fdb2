"""Rules of composition: golden numbers, soundness by search, and what they refuse."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from adversary import CASES, search
from hypothesis import example, given, settings
from hypothesis import strategies as st
from mutants import certificates as mutants

from riemannian_modules import contraction
from riemannian_modules.contraction import (
    Certificate,
    Gain,
    Rate,
    Side,
    Verdict,
    discrete,
    feedback,
    hierarchy,
    hierarchy_epsilon,
    min_max,
    parallel,
    product,
    shared_loss,
    skew_feedback,
    small_gain,
    two_time_scales,
)
from riemannian_modules.contraction.exact import (
    root_up,
    round_down,
    round_up,
    verified_rate,
)
from riemannian_modules.contraction.perron import perron_vector, perron_weights
from riemannian_modules.errors import ContractionError

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text("utf-8"))
GOLDEN = GOLDEN["composition"]
GIVEN, WANTED = GOLDEN["inputs"], GOLDEN["outputs"]
SEEDS = st.integers(0, 2**32 - 1)
TIGHT = 1e-10


def drawn(seed: int, n: int) -> tuple[list[float], np.ndarray]:
    rng = np.random.default_rng(seed)
    gains = np.exp(rng.normal(size=(n, n)) * 2 - 1)
    np.fill_diagonal(gains, 0.0)
    return np.exp(rng.normal(size=n)).tolist(), gains


# ---- golden numbers ----


def test_golden_hierarchy() -> None:
    rates = [GIVEN["l1"], GIVEN["l2"]]
    found = hierarchy(rates, GIVEN["k"], epsilon=GIVEN["eps"])
    assert found.value == pytest.approx(WANTED["hier_rate"], abs=TIGHT)
    eps = hierarchy_epsilon(rates, GIVEN["k"], 1.7)
    assert eps == pytest.approx(WANTED["hier_eps_for_rate_17"], abs=TIGHT)
    assert found.overshoot == pytest.approx(1 / GIVEN["eps"], abs=TIGHT)


def test_golden_feedback() -> None:
    found = feedback([GIVEN["l1"], GIVEN["l2"]], 1.0)
    assert found.value == pytest.approx(WANTED["feedback_rate_s1"], abs=TIGHT)
    margin = found.limits["largest gain"]
    assert margin == pytest.approx(WANTED["feedback_margin_s_max"], abs=TIGHT)


def test_golden_small_gain() -> None:
    A = np.array(GIVEN["metzler"])
    gains = A - np.diag(np.diag(A))
    found = small_gain((-np.diag(A)).tolist(), gains)
    assert found.value == pytest.approx(-WANTED["perron_alpha"], abs=TIGHT)
    expected = WANTED["two_module_rate_k12_1_k21_2_l_3_4"]
    assert found.value == pytest.approx(expected, abs=TIGHT)
    for weight, wanted in zip(
        found.weights.values(), WANTED["perron_weights_d"], strict=True
    ):
        assert weight == pytest.approx(wanted, abs=TIGHT)
    for vector, name in ((perron_vector(A), "right"), (perron_vector(A.T), "left")):
        np.testing.assert_allclose(vector, WANTED[f"perron_{name}"], atol=TIGHT)


def test_golden_not_certified() -> None:
    A = np.array(GIVEN["not_certified"])
    found = small_gain((-np.diag(A)).tolist(), A - np.diag(np.diag(A)))
    assert found.value == pytest.approx(-WANTED["not_certified_alpha"], abs=TIGHT)
    assert found.verdict is Verdict.NOT_CERTIFIED
    assert not found.contracts
    # The system with one sign flipped contracts; another rule sees that.
    assert skew_feedback([1.0, 1.0]).contracts


def test_golden_discrete() -> None:
    N = np.array(GIVEN["discrete"])
    found = discrete(np.diag(N).tolist(), N - np.diag(np.diag(N)))
    assert found.value == pytest.approx(WANTED["discrete_rho"], abs=TIGHT)
    assert found.contracts


def test_golden_two_time_scales() -> None:
    l_z, l_red, k_xz, b, ell = GIVEN["timescale"]
    premises = {"gain": k_xz, "lipschitz": ell, "drift": b}
    found = two_time_scales(l_red, l_z, **premises)
    largest = found.limits["largest epsilon"]
    assert largest == pytest.approx(WANTED["timescale_eps_max"], abs=TIGHT)
    below = two_time_scales(l_red, l_z, epsilon=largest * (1 - 1e-9), **premises)
    above = two_time_scales(l_red, l_z, epsilon=largest * (1 + 1e-9), **premises)
    assert below.contracts
    assert not above.contracts


# ---- soundness, by search ----


@pytest.mark.parametrize("name", CASES)
def test_no_system_is_slower_than_certified(name: str) -> None:
    """More than 10,000 tries for each rule; the search comes close to the bound."""
    gap = search(CASES[name])
    assert -1e-9 <= gap <= 1e-3


@pytest.mark.parametrize(
    ("name", "mutant"),
    [(name, mutant) for name, wrong in mutants.MUTANTS.items() for mutant in wrong],
)
def test_the_search_finds_wrong_rules(name: str, mutant) -> None:
    assert search(CASES[name], mutant, premises=3, systems=16) < -1e-3


@pytest.mark.parametrize("name", CASES)
@given(SEEDS)
def test_some_system_attains_the_bound(name: str, seed: int) -> None:
    case = CASES[name]
    premises = case.draw(np.random.default_rng(seed))
    certificate = case.certify(premises)
    J, states = case.tight(premises)
    gap = float(case.gap(J, certificate, states))
    assert -1e-9 <= gap <= 1e-6 * (1 + abs(certificate.value))


@given(SEEDS, st.integers(2, 5))
def test_rates_hold_in_the_metrics_of_the_modules(seed: int, n: int) -> None:
    """Law 39, in metrics P_i that are not the identity, by a generalised eigenvalue."""
    rng = np.random.default_rng(seed)
    m = 2
    factors = [rng.normal(size=(m, m)) + 2 * np.eye(m) for _ in range(n)]
    P = [R.T @ R for R in factors]
    J = rng.normal(size=(n * m, n * m)) / n - 2 * np.eye(n * m)
    block = [slice(i * m, i * m + m) for i in range(n)]

    def rate(matrix: np.ndarray, metric: np.ndarray) -> float:
        form = metric @ matrix
        return -float(scipy.linalg.eigh((form + form.T) / 2, metric)[0][-1])

    rates = [rate(J[block[i], block[i]], P[i]) for i in range(n)]
    gains = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            if i != j:
                inner = factors[i] @ J[block[i], block[j]] @ np.linalg.inv(factors[j])
                gains[i, j] = np.linalg.norm(inner, 2)
    found = small_gain(rates, gains)
    weights = found.weights.values()
    metric = scipy.linalg.block_diag(*(d * p for d, p in zip(weights, P, strict=True)))
    assert found.value <= rate(J, metric) + 1e-9 * (1 + abs(found.value))


@given(SEEDS, st.integers(1, 6), st.sampled_from(["inf", "1"]))
def test_other_norms(seed: int, n: int, norm: str) -> None:
    """The logarithmic norm of the matrix of gains in the weighted norm."""
    rates, gains = drawn(seed, n)
    found = small_gain(rates, gains, norm=norm)
    A = gains - np.diag(rates)
    w = np.array(list(found.weights.values()))
    B = w[:, None] * A / w[None, :]
    off = B - np.diag(np.diag(B))
    true = -(np.diag(B) + np.abs(off).sum(1 if norm == "inf" else 0)).max()
    assert found.value == pytest.approx(true, rel=1e-9, abs=1e-9)
    assert found.value == pytest.approx(small_gain(rates, gains).value, rel=1e-7)
    assert found.overshoot == pytest.approx(w.max() / w.min())


def test_a_norm_without_a_metric_composes_no_further() -> None:
    inner = small_gain([2.0, 2.0], [[0, 1], [1, 0]], norm="inf")
    for given_one in (inner, inner.rate):
        with pytest.raises(ContractionError, match="norm='2'"):
            skew_feedback([given_one, 1.0])
    assert inner.rate.value == inner.value


# ---- rounding ----


DECADES = st.one_of(st.just(-math.inf), st.floats(-300.0, 300.0))


@settings(max_examples=60)
@given(st.lists(DECADES, min_size=9, max_size=9), st.lists(DECADES, min_size=3))
def test_what_doubles_do_not_hold_is_not_certified(gains, rates) -> None:
    k = 10.0 ** np.array(gains).reshape(3, 3) * (1 - np.eye(3))
    own = [10.0**each for each in rates[:3]]
    for norm in ("2", "inf", "1"):
        found = small_gain(own, k, norm=norm)
        assert found.contracts == (found.value > 0)
        assert min(found.weights.values()) > 0
    maps = discrete(own, k)
    assert maps.contracts == (maps.value < 1)
    assert math.isfinite(max(maps.weights.values()))


def test_weights_beyond_all_doubles() -> None:
    gains = [[0, 0, 1.0], [1e150, 0, 1e-109], [1e214, 1e-274, 0]]
    found = small_gain([3.0, 0.0, -1.0], gains)
    assert found.value == -math.inf
    assert found.verdict is Verdict.NOT_CERTIFIED


@given(st.floats(0.1, 10.0), st.floats(1.0, 3.0), st.floats(0.1, 0.999))
def test_designed_chains_are_proved_to_meet_their_target(gain, more, share) -> None:
    for rates in ([2.0, 2.0 * more], [2.0 * more, 2.0, 3.0]):
        gains = [gain] * (len(rates) - 1)
        found = hierarchy(rates, gains, target=2.0 * share)
        assert found.value >= 2.0 * share
        # And not by much more than that.
        assert found.value == pytest.approx(2.0 * share, rel=1e-6)


@given(st.fractions())
def test_rounding_goes_to_the_safe_side(value: Fraction) -> None:
    assert Fraction(round_down(value)) <= value <= Fraction(round_up(value))
    assert round_up(value) - round_down(value) <= 4e-16 * abs(round_up(value))
    assert Fraction(root_up(abs(value))) ** 2 >= abs(value)


@given(SEEDS, st.integers(2, 6))
def test_the_verified_rate_is_proved_for_any_witness(seed: int, n: int) -> None:
    """Exactly: the form minus the rate has non-negative pivots in rationals."""
    rates, gains = drawn(seed, n)
    rng = np.random.default_rng(seed)
    weights, x = np.exp(rng.normal(size=(2, n))).tolist()
    c = Fraction(verified_rate(rates, gains.tolist(), weights, x))
    d = list(map(Fraction, weights))
    Q = [
        [
            d[i] * (Fraction(rates[i]) - c)
            if i == j
            else -(d[i] * Fraction(gains[i, j]) + d[j] * Fraction(gains[j, i])) / 2
            for j in range(n)
        ]
        for i in range(n)
    ]
    for step in range(n):
        assert Q[step][step] >= 0
        if Q[step][step] == 0:
            break
        for i in range(step + 1, n):
            share = Q[i][step] / Q[step][step]
            Q[i] = [a - share * b for a, b in zip(Q[i], Q[step], strict=True)]


@given(SEEDS, st.integers(2, 8))
def test_perron_weights_attain_the_abscissa(seed: int, n: int) -> None:
    """Law 41."""
    rates, gains = drawn(seed, n)
    A = gains - np.diag(rates)
    root = np.sqrt(perron_weights(A))
    S = A * root[:, None] / root[None, :]
    alpha = np.linalg.eigvals(A).real.max()
    size = np.abs(A).max()
    assert np.linalg.eigvalsh((S + S.T) / 2)[-1] == pytest.approx(
        alpha, abs=1e-8 * size
    )
    found = small_gain(rates, gains)
    assert found.value == pytest.approx(-alpha, abs=1e-8 * size)


def test_badly_scaled_networks_keep_their_digits() -> None:
    """Perron vectors over 24 orders of magnitude."""
    scale = np.array([1e-12, 1.0, 1e12])
    gains = np.ones((3, 3)) * scale[:, None] / scale[None, :]
    np.fill_diagonal(gains, 0.0)
    found = small_gain([3.0, 3.0, 3.0], gains)
    assert found.value == pytest.approx(1.0, rel=1e-9)
    assert found.condition == pytest.approx(1e48, rel=1e-6)


# ---- equivariance and monotonicity ----


@given(SEEDS, st.integers(2, 5), st.floats(0.0, 3.0))
def test_rates_are_monotone(seed: int, n: int, more: float) -> None:
    """Law 40."""
    rates, gains = drawn(seed, n)
    i, j = np.random.default_rng(seed).choice(n, 2, replace=False)
    before = small_gain(rates, gains).value
    slack = 1e-9 * (1 + np.abs(gains).max() + max(rates))
    faster = list(rates)
    faster[i] += more
    assert small_gain(faster, gains).value >= before - slack
    stronger = gains.copy()
    stronger[i, j] += more
    assert small_gain(rates, stronger).value <= before + slack


@given(SEEDS, st.integers(2, 5), st.floats(0.01, 100.0))
def test_order_and_units_do_not_matter(seed: int, n: int, speed: float) -> None:
    rates, gains = drawn(seed, n)
    found = small_gain(rates, gains)
    size = np.abs(gains).max() + max(rates)
    order = np.random.default_rng(seed).permutation(n)
    permuted = small_gain(np.array(rates)[order].tolist(), gains[np.ix_(order, order)])
    assert permuted.value == pytest.approx(found.value, abs=1e-9 * size)
    weights = np.array(list(found.weights.values()))
    np.testing.assert_allclose(
        list(permuted.weights.values()), weights[order], rtol=1e-7
    )
    scaled = small_gain((speed * np.array(rates)).tolist(), speed * gains)
    assert scaled.value == pytest.approx(speed * found.value, abs=1e-9 * speed * size)
    np.testing.assert_allclose(list(scaled.weights.values()), weights, rtol=1e-7)


@pytest.mark.parametrize(("n", "gain"), [(10, 1e6), (22, 1e6), (150, 1.0), (3, 1e-300)])
def test_long_chains_meet_their_target(n: int, gain: float) -> None:
    found = hierarchy([1.0] * n, [gain] * (n - 1), target=0.5)
    assert found.value >= 0.5 - 1e-10
    assert found.contracts
    assert all(0.0 < weight < math.inf for weight in found.weights.values())


def test_chains_without_couplings_need_no_epsilon() -> None:
    found = hierarchy([1.0, 2.0, 3.0], [0.0, 0.0], target=0.5)
    assert (found.value, found.overshoot) == (1.0, 1.0)


@pytest.mark.parametrize(
    "gains",
    [
        np.float32(4),
        np.array(4.0),
        np.array([4.0]),
        [np.int64(4)],
        torch.tensor(4.0),
        torch.tensor([4.0]),
        [torch.tensor(4.0)],
        (4,),
        [Gain(4.0)],
        Gain(4.0),
        [[0.0, 0.0], [4.0, 0.0]],
    ],
    ids=repr,
)
def test_gains_of_a_chain_are_numbers_of_any_library(gains) -> None:
    wanted = hierarchy([2.0, 3.0], 4.0, epsilon=0.3)
    assert hierarchy([2.0, 3.0], gains, epsilon=0.3).value == wanted.value


def test_tiny_maps_have_tiny_factors() -> None:
    """Squares of the factor underflow."""
    found = discrete([1e-200, 1e-200], [[0, 1e-200], [1e-200, 0]])
    assert 2e-200 <= found.value <= 2e-200 * (1 + 1e-14)
    for value in (Fraction(1, 10**500), Fraction(3, 10**700), Fraction(2), Fraction(0)):
        root = root_up(value)
        assert Fraction(root) ** 2 >= value
        smaller = Fraction(math.nextafter(math.nextafter(root, 0.0), 0.0))
        assert smaller**2 <= value


@given(SEEDS, st.integers(2, 5), st.floats(0.01, 0.99))
@example(4096, 5, 0.6875)
def test_the_inverse_design_meets_its_target(seed: int, n: int, share: float) -> None:
    """Law 41."""
    rates, gains = drawn(seed, n)
    gains = np.tril(gains)
    target = share * min(rates)
    eps = hierarchy_epsilon(rates, gains, target)
    found = hierarchy(rates, gains, target=target)
    assert found.limits["epsilon"] == eps
    assert found.value == pytest.approx(target, abs=1e-10)
    assert found.limits["supremum"] == min(rates)
    smaller = hierarchy(rates, gains, epsilon=eps / 8)
    assert target < smaller.value < min(rates)


@given(SEEDS, st.floats(0.2, 3.0))
def test_two_modules_in_closed_form(seed: int, eps: float) -> None:
    (one, two), gains = drawn(seed, 2)
    up, down = gains[0, 1], gains[1, 0]
    root = math.sqrt((one - two) ** 2 + eps**2 * down**2)
    chain = hierarchy([one, two], float(down), epsilon=eps)
    assert chain.value == pytest.approx((one + two - root) / 2, abs=1e-10)
    root = math.sqrt((one - two) ** 2 / 4 + up * down)
    loop = small_gain([one, two], gains)
    assert loop.value == pytest.approx((one + two) / 2 - root, abs=1e-9 * (1 + root))
    assert loop.contracts == (loop.value > 0)


@given(SEEDS)
def test_a_slack_costs_what_is_reported(seed: int) -> None:
    rates, gains = drawn(seed, 4)
    gains = np.tril(gains)
    found = small_gain(rates, gains)
    assert found.limits["loss"] == pytest.approx(
        min(rates) - found.value, abs=1e-9 * max(rates)
    )
    assert 0 < found.limits["loss"] <= 0.0101 * min(rates)
    small = small_gain(rates, gains, slack=found.limits["slack"] / 16)
    assert small.limits["loss"] < found.limits["loss"]
    assert small.condition > found.condition


# ---- verdicts ----

SEEN = Rate(5.0, side=Side.ESTIMATE, verdict=Verdict.EVIDENCE)
UNKNOWN = Rate(5.0, side=Side.ESTIMATE, verdict=Verdict.NOT_CERTIFIED)
REFUTED = Rate(-1.0, side=Side.UPPER, verdict=Verdict.REFUTED)
MEASURED = Gain(0.1, side=Side.LOWER, verdict=Verdict.EVIDENCE)
UNBOUNDED = Gain(math.inf, verdict=Verdict.NOT_CERTIFIED)

RATE_RULES = {
    "parallel": lambda a, b: parallel([a, b], [1.0, 1.0]),
    "product": lambda a, b: product([a, b]),
    "hierarchy": lambda a, b: hierarchy([a, b], 0.1, epsilon=1.0),
    "skew": lambda a, b: skew_feedback([a, b]),
    "min-max": lambda a, b: min_max([a, b]),
    "feedback": lambda a, b: feedback([a, b], 0.1),
    "small gain": lambda a, b: small_gain([a, b], [[0, 0.1], [0.1, 0]]),
    "inf": lambda a, b: small_gain([a, b], [[0, 0.1], [0.1, 0]], norm="inf"),
    "shared": lambda a, b: shared_loss([a, b], [[0, 0.1], [0.1, 0]]),
    "scales": lambda a, b: two_time_scales(
        a, b, gain=0.1, lipschitz=0.1, drift=0.1
    ),
}  # fmt: skip
SCALES = {"gain": 0.1, "lipschitz": 0.1, "drift": 0.1}
GAIN_RULES = {
    "hierarchy": lambda k: hierarchy([1.0, 2.0], k, epsilon=1.0),
    "feedback": lambda k: feedback([1.0, 2.0], k),
    "small gain": lambda k: small_gain([1.0, 2.0], [[0, k], [0.1, 0]]),
    "one-way": lambda k: small_gain([1.0, 2.0], [[0, k], [0, 0]]),
    "shared": lambda k: shared_loss([1.0, 2.0], [[0, k], [k, 0]]),
    "discrete": lambda k: discrete([0.1, 0.1], [[0, k], [0.1, 0]]),
    "factor": lambda k: discrete([0.1, k]),
    **{
        name: lambda k, name=name: two_time_scales(1.0, 2.0, **(SCALES | {name: k}))
        for name in (*SCALES, "mismatch")
    },
}


@pytest.mark.parametrize("rule", RATE_RULES)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    "worse", [SEEN, UNKNOWN, REFUTED], ids=lambda r: str(r.verdict)
)
def test_no_rule_is_better_than_its_rates(rule: str, place: int, worse: Rate) -> None:
    rates = [2.0, 2.0]
    assert RATE_RULES[rule](*rates).contracts
    rates[place] = worse
    found = RATE_RULES[rule](*rates)
    assert not found.contracts
    assert found.side is Side.ESTIMATE
    if worse is SEEN:
        assert found.verdict is Verdict.EVIDENCE
    else:
        assert found.verdict is Verdict.NOT_CERTIFIED


@pytest.mark.parametrize("rule", GAIN_RULES)
@pytest.mark.parametrize("worse", [MEASURED, UNBOUNDED], ids=["measured", "unbounded"])
def test_no_rule_is_better_than_its_gains(rule: str, worse: Gain) -> None:
    assert GAIN_RULES[rule](0.1).contracts
    found = GAIN_RULES[rule](worse)
    assert not found.contracts
    if worse is MEASURED:
        assert found.verdict is Verdict.EVIDENCE
        assert found.side is Side.ESTIMATE
    else:
        assert found.verdict is Verdict.NOT_CERTIFIED


@pytest.mark.parametrize("rule", RATE_RULES)
def test_what_does_not_shrink_is_not_certified(rule: str) -> None:
    for least in (0.0, -1.0):
        found = RATE_RULES[rule](least, least)
        assert found.verdict is Verdict.NOT_CERTIFIED
    assert discrete([1.0]).verdict is Verdict.NOT_CERTIFIED


def test_certificates_compose() -> None:
    inner = small_gain({"a": 3.0, "b": 4.0}, {("a", "b"): 1.0, ("b", "a"): 2.0})
    outer = hierarchy({"plant": inner, "observer": 5.0}, 1.0, epsilon=0.5)
    assert outer.contracts
    assert outer.leaves == pytest.approx(
        {"plant.a": 4 / 3, "plant.b": 2 / 3, "observer": 0.25}
    )
    assert outer.condition == pytest.approx(16 / 3)
    assert outer.overshoot == pytest.approx(math.sqrt(16 / 3))
    assert outer.children == (inner,)
    same = parallel([inner, inner])
    assert same.value == 2 * inner.value
    assert same.metric == inner.metric
    assert same.leaves == inner.leaves
    unknown = product([small_gain([1.0, 1.0], [[0, 2], [2, 0]]), 3.0])
    assert unknown.verdict is Verdict.NOT_CERTIFIED
    step = discrete([discrete([0.5, 0.4], [[0, 0.3], [0.1, 0]]), 0.1])
    assert step.contracts
    assert step.value == pytest.approx(WANTED["discrete_rho"], rel=0.02)


def test_the_composite_of_composites_is_sound() -> None:
    """Nested weights: the rate of the whole in the metric of all leaves."""
    inner = small_gain([3.0, 4.0], [[0, 1], [2, 0]])
    d = np.array(list(inner.weights.values()))
    across = np.array([[0.3, -0.2]])  # on a third module, of one state
    gain = np.linalg.norm(across / np.sqrt(d))
    outer = hierarchy([inner, 5.0], float(gain) * (1 + 1e-12), epsilon=0.7)
    leaves = np.array(list(outer.leaves.values()))
    J = np.array([[-3.0, 1.0, 0.0], [2.0, -4.0, 0.0], [0.3, -0.2, -5.0]])
    S = np.diag(leaves) @ J
    true = -scipy.linalg.eigh((S + S.T) / 2, np.diag(leaves))[0][-1]
    assert outer.value <= true + 1e-9


# ---- refusals ----


def test_rates_in_different_metrics_do_not_add_up() -> None:
    """Each of the two contracts at 0.05 in its own metric; their sum is unstable."""
    J = [np.array([[-1.0, 10.0], [0.0, -1.0]]), np.array([[-1.0, 0.0], [10.0, -1.0]])]
    rates = []
    for matrix, weight in zip(J, (1 / 150, 150.0), strict=True):
        P = np.diag([weight, 1.0])
        form = P @ matrix
        rate = -scipy.linalg.eigh((form + form.T) / 2, P)[0][-1]
        rates.append(Rate(float(rate), metric=f"diag({weight:.3g}, 1)"))
    assert all(rate.value > 0.05 for rate in rates)
    assert np.linalg.eigvals(J[0] + J[1]).real.max() > 0
    assert mutants.parallel_in_any_metric(rates) > 0
    with pytest.raises(ContractionError, match="different metrics"):
        parallel(rates)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda: parallel([1.0, 2.0], [1.0]), "one number"),
        (lambda: parallel([1.0], [-1.0]), "one number"),
        (lambda: product([]), "at least one"),
        (lambda: product([math.inf]), "infinite"),
        (lambda: product([math.nan]), "NaN"),
        (lambda: product([Rate(1.0, kind="output")]), "output space"),
        (lambda: hierarchy([1.0, 2.0], 1.0), "epsilon or target"),
        (lambda: hierarchy([1.0, 2.0], 1.0, epsilon=1.0, target=1.0), "epsilon or"),
        (lambda: hierarchy([1.0, 2.0], 1.0, epsilon=0.0), "positive"),
        (lambda: hierarchy([1.0, 2.0], 1.0, target=1.0), "cannot reach"),
        (lambda: hierarchy_epsilon([1.0, 2.0], 0.0, 0.5), "any epsilon"),
        (lambda: hierarchy([1.0] * 30, [1e6] * 29, target=0.5), "10\\^182"),
        (lambda: hierarchy([1.0] * 60, [1e3] * 59, target=0.5), "lower target"),
        (lambda: hierarchy([1.0] * 100, [1.0] * 99, epsilon=0.01), "10\\^198"),
        (lambda: hierarchy([1.0, 2.0], [1.0, 1.0], epsilon=1.0), "1 couplings"),
        (lambda: hierarchy([1.0, 2.0], [[0, 1], [0, 0]], epsilon=1.0), "acts back"),
        (lambda: skew_feedback([1.0]), "two modules"),
        (lambda: skew_feedback([1.0, 1.0], gamma=-1.0), "gamma"),
        (lambda: feedback([1.0, 1.0], 1.0, gamma=math.nan), "gamma"),
        (lambda: feedback([1.0, 1.0], -1.0), "norm"),
        (lambda: small_gain([1.0, 1.0], [[0, 1]]), "2 x 2"),
        (lambda: small_gain([1.0, 1.0], [[1, 1], [1, 0]]), "on itself"),
        (lambda: small_gain({"a": 1.0}, {("a", "b"): 1.0}), "'b'"),
        (lambda: small_gain([1.0], [[0]], norm="3"), "choose"),
        (lambda: small_gain([1.0], [[0]], slack=-1.0), "slack"),
        (lambda: shared_loss([1.0, 1.0], [[0, 1], [2, 0]]), "one Hessian"),
        (lambda: two_time_scales(1, 1, **SCALES, epsilon=-1.0), "epsilon"),
        (lambda: discrete([0.5, 0.5], [[1, 0], [0, 0]]), "diagonal"),
        (lambda: discrete([product([1.0])]), "take certificate.rate"),
        (lambda: product([discrete([0.5])]), "take certificate.factor"),
    ],
)
def test_refusals(call, word: str) -> None:
    with pytest.raises(ContractionError, match=word):
        call()


def test_a_certificate_cannot_be_made_up() -> None:
    good = product({"a": 1.0})
    arguments = {**good.__dict__}
    for wrong in ({"value": 0.0}, {"value": math.nan}, {"side": Side.UPPER}):
        with pytest.raises(ContractionError):
            Certificate(**(arguments | wrong))


# ---- what is printed ----


def test_it_reads_like_a_proof() -> None:
    inner = small_gain({"a": 3.0, "b": 4.0}, {("a", "b"): 1.0, ("b", "a"): 2.0})
    outer = hierarchy({"plant": inner, "observer": 5.0}, 1.0, epsilon=0.5)
    text = str(outer)
    for word in (
        "Certificate: rate",
        "plant contracts with the rate 2",
        "1.5. the matrix of gains has the spectral abscissa -2",
        "observer contracts with the rate 5",
        "Slotine 2003",
        "Russo",
        "given by the caller",
        "exact arithmetic",
        "condition number",
        "Assuming",
    ):
        assert word in text, word
    assert text.index("1.5.") < text.index("  2. observer")


def test_it_does_not_say_proof_where_there_is_none() -> None:
    seen = str(product({"a": SEEN}))
    assert seen.startswith("Evidence, no proof")
    assert "Proof" not in seen
    assert str(product({"a": 0.0})).startswith("Not certified")
    assert "contraction factor" in str(discrete([0.5]))


def test_gains_come_in_three_forms() -> None:
    by_name = {("x", "y"): 1.0, ("y", "x"): 2.0}
    rates = {"x": 3.0, "y": 4.0}
    values = {
        small_gain(rates, gains).value
        for gains in (by_name, [[0, 1], [2, 0]], torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    }
    assert values == {2.0}
    assert contraction.small_gain([3.0, 4.0], np.array([[0, 1], [2, 0]])).value == 2.0
