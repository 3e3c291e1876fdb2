"""Stability bounds: worked numbers, monotony, and soundness against simulated pairs."""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import scipy.integrate
import scipy.linalg
import scipy.special
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mutants import stability as mutants

import riemannian_modules as rm
from riemannian_modules import contraction as c
from riemannian_modules.contraction import Side, Verdict
from riemannian_modules.contraction.constants import as_constant
from riemannian_modules.contraction.memory import geometric, memory
from riemannian_modules.errors import ContractionError

GOLDEN = json.loads(Path(__file__).with_name("golden.json").read_text())["stability"]
IN, OUT = GOLDEN["inputs"], GOLDEN["outputs"]
GIVEN = (IN["L_G"], IN["rate"], IN["n"])
KAPPA, MU = math.sqrt(IN["kappa_sq"]), IN["mu"]

positive = st.floats(1e-3, 1e3)
seeds = st.integers(0, 2**31)


def close(found: float, expected: float, tolerance: float = 1e-10) -> None:
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


# --- worked numbers


def test_golden_bounds() -> None:
    close(c.stability_bound(*GIVEN).value, OUT["beta"])
    close(c.stability_bound(*GIVEN, t=1.0).value, OUT["beta_t1"])
    close(c.stability_bound(2.0, 0.0, 100, t=10.0).value, OUT["beta_rate0_T10"])
    close(c.distance_bound(2 * 2.0 / 100, 0.5).value, OUT["param_distance"])
    data = c.stability_bound_data_metric(*GIVEN, kappa=KAPPA, mu=MU)
    close(data.value, OUT["beta_data_metric"])
    sampled = c.metric_sampling_bound(*GIVEN, kappa=KAPPA, mu=MU, delta=IN["delta"])
    close(sampled.value, OUT["metric_sampling_distance"])


def test_golden_gaps() -> None:
    beta = c.stability_bound(*GIVEN)
    close(c.generalization_gap(beta).value, OUT["beta"])
    with_luck = {"loss_bound": IN["loss_bound"], "delta": IN["delta"]}
    gap = c.generalization_gap(beta, IN["n"], **with_luck)
    close(gap.value, OUT["gap_replace_one"])
    assert gap.vacuous
    assert gap.verdict is Verdict.CERTIFIED
    assert not gap.guarantees
    other = c.generalization_gap(beta, IN["n"], **with_luck, change="leave one out")
    close(other.value, OUT["gap_if_beta_is_leave_one_out"])


def test_golden_order_is_never_a_guarantee() -> None:
    order = c.paper_order(KAPPA, 2.0, 0.5, MU, 100)
    close(order.value, OUT["abstract_order"])
    assert order.verdict is Verdict.NOT_CERTIFIED
    assert "not a guarantee" in str(order)
    assert not isinstance(order, c.Bound)


# --- laws of the formula


@given(positive, st.floats(-5.0, 5.0), st.integers(1, 10**6), st.floats(1e-6, 100.0))
def test_monotone(L: float, rate: float, n: int, t: float) -> None:
    def beta(L=L, rate=rate, n=n, t=t):
        return c.stability_bound(L, rate, n, t).value

    at = beta()
    close(7 * beta(n=7 * n), at)
    assert beta(rate=rate + 0.1) <= at * (1 + 1e-12)
    close(beta(L=3 * L), 9 * at)
    assert beta(t=t + 0.5) >= at
    if rate > 1e-300:
        limit = c.stability_bound(L, rate, n).value
        assert at <= limit * (1 + 1e-12)
        close(limit, 2 * L * L / (rate * n))


@given(st.floats(-1e-9, 1e-9), st.floats(1e-3, 1e3))
def test_small_rates_lose_no_digits(rate: float, t: float) -> None:
    x = rate * t
    series = t * (1 - x / 2 + x * x / 6 - x**3 / 24)
    close(memory(rate, t), series, 1e-14)
    if x != 0:
        close(c.stability_bound(1.0, rate, 2, t).value, series, 1e-14)


@given(st.floats(0.0, 2.0), st.integers(0, 60))
def test_geometric_sums(q: float, steps: int) -> None:
    close(geometric(q, steps), sum(q**k for k in range(steps)), 1e-11)


@given(st.floats(-1e-9, 1e-9), st.integers(1, 100))
def test_geometric_sums_near_one(d: float, steps: int) -> None:
    series = steps * (1 + d * (steps - 1) / 2 + d * d * (steps - 1) * (steps - 2) / 6)
    close(geometric(1 + d, steps), series, 1e-12)


def exponential(x: Fraction) -> tuple[Fraction, Fraction]:
    """Bounds on ``exp(x)``, from its series at a small part of x, squared again."""
    halvings = max(0, math.ceil(abs(x)).bit_length() + 4)
    y, total, term = x / 2**halvings, Fraction(0), Fraction(1)
    for k in range(1, 30):
        total, term = total + term, term * y / k
    low, high = total - 2 * abs(term), total + 2 * abs(term)
    for _ in range(halvings):
        low, high = low * low, high * high
        # Numbers of a bounded length.
        low = Fraction(math.floor(low * 2**1400), 2**1400)
        high = Fraction(math.ceil(high * 2**1400), 2**1400)
    return low, high


@given(positive, st.floats(-3.0, 5.0), st.integers(1, 10**6), st.floats(1e-3, 150.0))
@settings(max_examples=40)
def test_bounds_are_not_below_their_formula(L, rate, n, t) -> None:
    x = -Fraction(rate) * Fraction(t)
    assume(not 0 < abs(x) < 1e-9)
    low, high = exponential(x)
    lasting = (1 - low) / Fraction(rate) if rate else Fraction(t)
    if rate > 0:
        lasting = (1 - high) / Fraction(rate)
    beta = 2 * Fraction(L) ** 2 / n
    found = c.stability_bound(L, rate, n, t).value
    assert found >= beta * lasting
    assert found <= beta * lasting * (1 + Fraction(1, 10**10))
    apart = c.distance_bound(L, rate, t, start=L).value
    assert apart >= Fraction(L) * (low + lasting)
    if rate > 0:
        assert c.stability_bound(L, rate, n).value >= beta / Fraction(rate)


@given(positive, st.floats(0.0, 1.2), st.floats(1e-3, 10.0), st.integers(0, 300))
@settings(max_examples=60)
def test_discrete_bounds_are_not_below_their_formula(L, q, lr, steps) -> None:
    total = sum(Fraction(q) ** k for k in range(steps))
    exact = 2 * Fraction(lr) * Fraction(L) ** 2 / 7 * total
    found = c.stability_bound_discrete(L, q, 7, lr, steps).value
    assert exact <= found <= float(exact) * (1 + 1e-10)
    factor = c.step_factor(q, 2 * q, lr).value
    ends = [abs(1 - Fraction(lr) * k * Fraction(q)) for k in (1, 2)]
    assert factor >= max(ends)


def test_what_is_left_of_a_start_is_never_nothing() -> None:
    assert 0.0 < c.distance_bound(0.0, 1.0, t=800.0, start=1.0).value < 1e-300


def test_what_is_not_bounded_is_infinite() -> None:
    for bound in (
        c.stability_bound(1.0, -0.1, 10),
        c.stability_bound(1.0, 0.0, 10),
        c.stability_bound(1.0, -10.0, 10, t=1e3),
        c.stability_bound_discrete(1.0, 1.0, 10, lr=0.1),
        c.distance_bound(1.0, -1.0, start=1.0),
    ):
        assert math.isinf(bound.value)
        assert bound.vacuous
        assert not bound.guarantees
    assert c.stability_bound(0.0, -1.0, 10).value == 0.0


@given(positive, st.floats(0.1, 1.0), st.floats(1.0, 10.0), st.integers(1, 1000))
def test_the_step_length_cancels(L: float, low: float, ratio: float, n: int) -> None:
    high = ratio * low
    lr = 2.0 / (low + high)
    found = c.stability_bound(L, low, n, lr=lr, smoothness=high)
    close(found.value, 2 * L * L / (low * n))
    flow = c.stability_bound(L, low, n)
    close(found.value, flow.value)
    batch = c.stability_bound(L, low, n, lr=lr, smoothness=high, batch_size=1)
    close(batch.value, flow.value)
    assert batch.average is not None


# --- verdicts


def seen(symbol: str, value: float, side: Side, safe: str) -> c.Constant:
    return c.Constant(symbol, value, symbol, side, Verdict.EVIDENCE, "seen", safe=safe)


@pytest.mark.parametrize("weak", ["L_G", "rate", "kappa", "mu"])
def test_one_weak_constant_makes_evidence(weak: str) -> None:
    constants = {
        "L_G": seen("L_G", 2.0, Side.LOWER, "upper"),
        "rate": seen("lambda", 0.5, Side.UPPER, "lower"),
        "kappa": seen("kappa", 3.0, Side.LOWER, "upper"),
        "mu": seen("mu", 3.0, Side.UPPER, "lower"),
    }
    numbers = {"L_G": 2.0, "rate": 0.5, "kappa": 3.0, "mu": 3.0}
    given = numbers | {weak: constants[weak]}
    bound = c.stability_bound_data_metric(n=100, region="the ball", **given)
    assert bound.verdict is Verdict.EVIDENCE
    assert bound.side is Side.ESTIMATE
    close(bound.value, OUT["beta_data_metric"])
    assert c.generalization_gap(bound).verdict is Verdict.EVIDENCE
    best = c.stability_bound_data_metric(n=100, **numbers)
    assert best.verdict is Verdict.CERTIFIED
    assert best.guarantees


def test_a_rate_at_a_point_is_no_rate_of_a_region() -> None:
    here = c.Rate(0.5, where="at this point", side=Side.EXACT)
    alone = c.stability_bound(2.0, here, 100)
    assert alone.verdict is Verdict.EVIDENCE
    assert "lambda" in alone.assumptions[-1]
    vouched = c.stability_bound(2.0, here, 100, region="the unit ball")
    assert vouched.verdict is Verdict.CERTIFIED
    assert "the unit ball (the caller says so)" in vouched.assumptions[-1]


def test_results_of_others_keep_their_verdicts() -> None:
    ritz = c.Rate(0.5, side=Side.UPPER, verdict=Verdict.EVIDENCE)
    assert c.stability_bound(2.0, ritz, 100).verdict is Verdict.EVIDENCE
    refuted = c.Rate(0.5, verdict=Verdict.REFUTED)
    assert c.stability_bound(2.0, refuted, 100).verdict is Verdict.NOT_CERTIFIED
    gain = c.Gain(3.0, source="norms")
    bound = c.stability_bound_data_metric(2.0, 0.5, 100, kappa=gain, mu=3.0)
    assert bound.verdict is Verdict.CERTIFIED
    assert any(k.source == "norms" for k in bound.constants)
    # A certified lower bound of a rate is no certified upper bound of a smoothness.
    found = as_constant(c.Rate(0.5), "Lambda", "smoothness", "upper")
    assert found.verdict is Verdict.EVIDENCE


def test_an_infinite_time() -> None:
    assert c.stability_bound(1.0, 0.0, 100, t=math.inf).value == math.inf
    assert c.distance_bound(1.0, 0.0, t=math.inf).value == math.inf
    assert c.distance_bound(1.0, -0.5, t=math.inf).value == math.inf
    assert c.distance_bound(0.0, 0.0, t=math.inf, start=1.5).value == 1.5
    assert c.distance_bound(1.0, 0.5, t=math.inf, start=3.0).value == 2.0


def test_rates_of_the_residual_bound_no_distance() -> None:
    output = c.Rate(0.5, kind="output", side=Side.EXACT)
    for bound in (
        lambda: c.stability_bound(2.0, output, 100),
        lambda: c.distance_bound(1.0, output),
        lambda: c.step_factor(output, 2.0, lr=0.1),
        lambda: rm.action.tube_bound(1.0, output, 1.0),
        lambda: c.product([output, 1.0]),
    ):
        with pytest.raises(ContractionError, match="output space"):
            bound()


def test_nothing_weak_is_called_certified() -> None:
    with pytest.raises(ContractionError, match="called certified"):
        c.Constant("kappa", 1.0, "seen", Side.LOWER)
    with pytest.raises(ContractionError, match="called certified"):
        c.Constant("mu", 1.0, "seen", Side.UPPER, safe="lower")
    weak = seen("L_G", 1.0, Side.LOWER, "upper")
    with pytest.raises(ContractionError, match="not certified"):
        c.Bound(1.0, "x", constants=(weak,))
    with pytest.raises(ContractionError, match="proves nothing"):
        c.Bound(1.0, "x", side=Side.ESTIMATE)


def test_an_average_says_nothing_about_one_run() -> None:
    sgd = c.stability_bound(1.0, 0.5, 9, lr=0.1, smoothness=2.0, batch_size=3)
    assert "minibatches" in str(c.generalization_gap(sgd))
    with pytest.raises(ContractionError, match="on average over"):
        c.generalization_gap(sgd, 9, loss_bound=1.0, delta=0.1)


@pytest.mark.parametrize(
    "bad",
    [
        lambda: c.stability_bound(-1.0, 0.5, 10),
        lambda: c.stability_bound(math.nan, 0.5, 10),
        lambda: c.stability_bound(1.0, 0.5, 0),
        lambda: c.stability_bound(1.0, 0.5, 1.5),
        lambda: c.stability_bound(1.0, 0.5, math.inf),
        lambda: c.stability_bound(1.0, 0.5, 10, t=-1.0),
        lambda: c.stability_bound(1.0, 0.5, 10, lr=0.1),
        lambda: c.stability_bound(1.0, 0.5, 10, lr=0.1, smoothness=0.1),
        lambda: c.stability_bound(1.0, 0.5, 10, lr=-0.1, smoothness=1.0),
        lambda: c.stability_bound(1.0, 0.5, 10, steps=3),
        lambda: c.stability_bound_discrete(1.0, 0.5, 10, 0.1, -1),
        lambda: c.stability_bound_discrete(1.0, 0.5, 10, 0.1, 2.5),
        lambda: c.stability_bound_discrete(1.0, 1.0, 10, 0.1, 0.5),
        lambda: c.stability_bound_discrete(1.0, 0.5, 10, 0.1, batch_size=2.5),
        lambda: c.stability_bound_discrete(1.0, 0.5, 10, 0.1, batch_size=11),
        lambda: c.stability_bound_data_metric(1.0, 0.5, 10, kappa=1.0, mu=0.0),
        lambda: c.stability_bound_data_metric(1.0, 0.5, 10, kappa=-1.0, mu=1.0),
        lambda: c.metric_sampling_bound(1.0, 0.5, 10, kappa=1.0, mu=1.0, delta=1.0),
        lambda: c.generalization_gap(0.1, delta=0.1),
        lambda: c.generalization_gap(0.1, 10, loss_bound=1.0, delta=2.0),
        lambda: c.generalization_gap(0.1, change="add one"),
        lambda: c.generalization_gap(-0.1),
        lambda: c.paper_order(1.0, 1.0, 0.0, 1.0, 10),
        lambda: c.distance_bound(1.0, 1.0, start=-1.0),
    ],
)
def test_bad_numbers_are_refused(bad) -> None:
    with pytest.raises(ContractionError):
        bad()


def test_a_bound_of_zero_has_no_sign() -> None:
    for bound in (
        c.stability_bound(2.0, 0.5, 10, 0.0),
        c.stability_bound(0.0, 0.5, 10),
        c.stability_bound_discrete(2.0, 0.5, 10, 0.1, 0),
    ):
        assert math.copysign(1.0, bound.value) == 1.0
        assert bound.value == 0.0


def test_print_names_every_premise() -> None:
    text = str(c.stability_bound(2.0, 0.5, 100, t=1.0))
    for word in ("L_G = 2", "lambda = 0.5", "geodesically convex", "source:", "time 1"):
        assert word in text
    assert "vacuous" in str(c.Bound(1.0, "x", trivial=1.0))


# --- soundness: pairs of trainings that differ in one example


class Ridge:
    """``0.5 (a.w - b)^2`` for each example, plus ``0.5 decay |w|^2`` for all."""

    def __init__(self, seed: int, n: int = 6, p: int = 3) -> None:
        draw = np.random.default_rng(seed)
        self.n, self.p = n, p
        self.a = draw.normal(size=(n + 1, p))
        self.b = draw.normal(size=n + 1)
        self.decay = 10 ** draw.uniform(-1, 0.5)
        self.start = draw.normal(size=p)
        root = draw.normal(size=(p, p))
        self.G = root @ root.T + 0.3 * np.eye(p)
        self.mu = 10 ** draw.uniform(-1, 0.5)
        self.sets = [list(range(n)), [n, *range(1, n)]]

    def hessian(self, chosen) -> np.ndarray:
        a = self.a[chosen]
        return a.T @ a / len(chosen) + self.decay * np.eye(self.p)

    def pull(self, chosen) -> np.ndarray:
        return self.a[chosen].T @ self.b[chosen] / len(chosen)

    def single(self, w, i) -> np.ndarray:
        return (self.a[i] @ w - self.b[i]) * self.a[i]

    def loss(self, w, i) -> float:
        return 0.5 * (self.a[i] @ w - self.b[i]) ** 2

    def layer_metric(self, chosen) -> np.ndarray:
        a = self.a[chosen]
        return self.mu * np.eye(self.p) + a.T @ a / len(chosen)

    def flow(self, chosen, G, times) -> np.ndarray:
        H = self.hessian(chosen)
        end = np.linalg.solve(H, self.pull(chosen))
        A = np.linalg.solve(G, H)
        offset = self.start - end
        return np.stack([end + scipy.linalg.expm(-A * t) @ offset for t in times])

    def spectrum(self, chosen, G) -> np.ndarray:
        return scipy.linalg.eigh(self.hessian(chosen), G, eigvals_only=True)


def dual(e: np.ndarray, G: np.ndarray) -> float:
    return math.sqrt(e @ np.linalg.solve(G, e))


def length(u: np.ndarray, G: np.ndarray) -> float:
    return math.sqrt(u @ G @ u)


TIMES = np.linspace(0.0, 6.0, 25)


def fixed_metric_pair(seed: int, bound) -> float:
    """The largest ratio of what is measured to what is claimed, over both and times."""
    p = Ridge(seed)
    paths = [p.flow(chosen, p.G, TIMES) for chosen in p.sets]
    # A straight line between two points of the paths stays in their convex hull, and
    # the dual norm of the loss of one example is a convex function there.
    L = max(dual(p.single(w, i), p.G) for q in paths for w in q for i in range(p.n + 1))
    rate = min(p.spectrum(chosen, p.G)[0] for chosen in p.sets)
    worst = 0.0
    for t, u, v in zip(TIMES[1:], paths[0][1:], paths[1][1:], strict=True):
        beta = bound(L, rate, p.n, t).value
        seen = max(abs(p.loss(u, i) - p.loss(v, i)) for i in range(p.n + 1))
        worst = max(worst, seen / beta, length(u - v, p.G) * L / beta)
    return worst


@given(seeds)
@settings(max_examples=30)
def test_the_flow_stays_within_the_bound(seed: int) -> None:
    assert fixed_metric_pair(seed, c.stability_bound) <= 1 + 1e-9


@pytest.mark.parametrize("mutant", mutants.BOUNDS, ids=lambda f: f.__name__)
def test_wrong_bounds_are_exceeded(mutant) -> None:
    """Two opposite examples in one dimension attain the bound, so no factor is free."""
    a, b, decay, n = 1e-3, 1.0, 1.0, 2
    # f' = a(aw -+ b)/n + decay w with the other examples zero: w* = +-ab/(n decay).
    ends = [sign * a * b / (a * a + n * decay) for sign in (1, -1)]
    L = max(abs((a * w - s * b) * a) for w in ends for s in (1, -1))
    rate = decay + a * a / n
    apart = abs(ends[0] - ends[1]) * L
    assert apart <= c.stability_bound(L, rate, n).value * (1 + 1e-12)
    assert apart >= 0.999 * c.stability_bound(L, rate, n).value
    assert apart > mutant(L, rate, n).value


def test_wrong_exponents_are_noticed() -> None:
    right = c.stability_bound(1.0, 1e-12, 1, t=1.0).value
    assert abs(mutants.cancelling(1.0, 1e-12, 1, t=1.0).value - right) > 1e-6
    assert (
        mutants.backwards(1.0, 0.5, 1, 3.0).value > c.stability_bound(1, 0.5, 1).value
    )


@given(seeds)
@settings(max_examples=6)
def test_logistic_flows_stay_within_the_bound(seed: int) -> None:
    """Not quadratic: the rate is that of the decay, at all parameters."""
    p = Ridge(seed)
    signs = np.sign(p.b)
    inverse = np.linalg.inv(p.G)

    def single(w, i) -> np.ndarray:
        return -signs[i] * p.a[i] * scipy.special.expit(-signs[i] * (p.a[i] @ w))

    paths = []
    for chosen in p.sets:

        def velocity(t, w, chosen=chosen):
            mean = sum(single(w, i) for i in chosen) / p.n
            return -inverse @ (mean + p.decay * w)

        found = scipy.integrate.solve_ivp(
            velocity, (0.0, TIMES[-1]), p.start, t_eval=TIMES, rtol=1e-9, atol=1e-11
        )
        paths.append(found.y.T)
    # Between two points the slope of a logistic loss is largest at one of them.
    L = max(dual(single(w, i), p.G) for q in paths for w in q for i in range(p.n + 1))
    rate = p.decay / np.linalg.eigvalsh(p.G)[-1]
    for t, u, v in zip(TIMES[1:], paths[0][1:], paths[1][1:], strict=True):
        beta = c.stability_bound(L, rate, p.n, t).value
        for i in range(p.n + 1):
            losses = [np.logaddexp(0.0, -signs[i] * (p.a[i] @ w)) for w in (u, v)]
            assert abs(losses[0] - losses[1]) <= beta * (1 + 1e-6)
        assert length(u - v, p.G) * L <= beta * (1 + 1e-6)


@given(seeds, st.booleans())
@settings(max_examples=30)
def test_gradient_descent_stays_within_the_bound(seed: int, long: bool) -> None:
    p = Ridge(seed)
    spectra = [p.spectrum(chosen, p.G) for chosen in p.sets]
    low = min(s[0] for s in spectra)
    high = max(s[-1] for s in spectra)
    lr = (2.0 if long else 0.7) / (low + high)
    paths = []
    for chosen in p.sets:
        w, path = p.start.copy(), [p.start.copy()]
        for _ in range(30):
            gradient = p.hessian(chosen) @ w - p.pull(chosen)
            w = w - lr * np.linalg.solve(p.G, gradient)
            path.append(w)
        paths.append(path)
    L = max(dual(p.single(w, i), p.G) for q in paths for w in q for i in range(p.n + 1))
    for k, (u, v) in enumerate(zip(*paths, strict=True)):
        beta = c.stability_bound(L, low, p.n, lr=lr, steps=k, smoothness=high).value
        assert length(u - v, p.G) * L <= beta * (1 + 1e-9) + 1e-14


@given(seeds, st.integers(1, 2))
@settings(max_examples=15)
def test_sgd_stays_within_the_bound_on_average(seed: int, b: int) -> None:
    """The average over all sequences of minibatches, without sampling error."""
    p = Ridge(seed, n=3)
    decay = p.decay * np.eye(p.p)
    low = scipy.linalg.eigh(decay, p.G, eigvals_only=True)[0]
    high = max(
        scipy.linalg.eigh(np.outer(a, a) + decay, p.G, eigvals_only=True)[-1]
        for a in p.a
    )
    lr, steps, L = 1.0 / (low + high), 4, 0.0
    inverse = np.linalg.inv(p.G)
    batches = list(itertools.combinations(range(p.n), b))
    states = [(p.start, p.start)]
    for k in range(steps):
        after = []
        for pair, batch in itertools.product(states, batches):
            new = []
            for which, w in enumerate(pair):
                L = max(L, *(dual(p.single(w, i), p.G) for i in range(p.n + 1)))
                mine = [p.n if which and i == 0 else i for i in batch]
                g = sum(p.single(w, i) for i in mine) / b + p.decay * w
                new.append(w - lr * inverse @ g)
            after.append(tuple(new))
        states = after
        mean = sum(length(u - v, p.G) for u, v in states) / len(states)
        beta = c.stability_bound(
            L, low, p.n, lr=lr, steps=k + 1, smoothness=high, batch_size=b
        )
        assert mean * L <= beta.value * (1 + 1e-9)


@given(seeds)
@settings(max_examples=30)
def test_the_metric_of_the_data_stays_within_its_bound(seed: int) -> None:
    p = Ridge(seed)
    metrics = [p.layer_metric(chosen) for chosen in p.sets]
    paths = [
        p.flow(chosen, G, TIMES) for chosen, G in zip(p.sets, metrics, strict=True)
    ]
    kappa = np.linalg.norm(p.a, axis=1).max()

    def whole(w, chosen):
        return p.hessian(chosen) @ w - p.pull(chosen)

    covectors = [p.single(w, i) for q in paths for w in q for i in range(p.n + 1)]
    covectors += [whole(w, chosen) for q in paths for w in q for chosen in p.sets]
    L = max(dual(e, G) for e in covectors for G in metrics)
    rate = p.spectrum(p.sets[0], metrics[0])[0]
    for t, u, v in zip(TIMES[1:], paths[0][1:], paths[1][1:], strict=True):
        beta = c.stability_bound_data_metric(L, rate, p.n, kappa=kappa, mu=p.mu, t=t)
        seen = max(abs(p.loss(u, i) - p.loss(v, i)) for i in range(p.n + 1))
        assert seen <= beta.value * (1 + 1e-9)
        assert length(u - v, metrics[0]) * L <= beta.value * (1 + 1e-9)


def test_the_change_of_the_metric_counts() -> None:
    """The replaced example has no gradient at the start, but stretches the metric."""
    n, kappa, mu, t = 50, 3.0, 1.0, 0.05
    a = np.array([kappa, *[1e-2] * (n - 1), 0.0])
    b = np.array([0.0, *[-1e2] * (n - 1), 0.0])
    sets = [[n, *range(1, n)], list(range(n))]
    ends, L, rates = [], 0.0, []
    for chosen in sets:
        G = mu + (a[chosen] ** 2).mean()
        h, g = (a[chosen] ** 2).mean(), -(a * b)[chosen].mean()
        w = -g * -math.expm1(-h / G * t) / h
        rates.append(h / G)
        ends.append(w)
        L = max(L, *(abs(a * (a * w - b)) / math.sqrt(mu)), abs(g) / math.sqrt(mu))
    G = mu + (a[sets[0]] ** 2).mean()
    seen = abs(ends[0] - ends[1]) * math.sqrt(G) * L
    given = {"kappa": kappa, "mu": mu, "t": t}
    bound = c.stability_bound_data_metric(L, rates[0], n, **given).value
    assert 0.5 * bound < seen < bound
    assert seen > mutants.without_metric_change(L, rates[0], n, **given).value
