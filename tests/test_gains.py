"""Bounds on Jacobians: of layers and modules, and of matrices in intervals."""

import math
from fractions import Fraction

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import gains as mutants
from torch import Tensor, nn

from riemannian_modules import nn as rnn
from riemannian_modules.contraction import (
    Interval,
    Side,
    Verdict,
    lipschitz,
    measured_gain,
    register_lipschitz,
)
from riemannian_modules.contraction.enclosure import (
    MetricRoot,
    interval_feedback,
    interval_gain,
    interval_rate,
)
from riemannian_modules.contraction.gains import growth, known
from riemannian_modules.contraction.operator_norms import CONSTANTS, convolution_norm
from riemannian_modules.contraction.verified import (
    plus_up,
    spectral_norm,
    times_up,
    upper_eigenvalue,
)
from riemannian_modules.errors import ContractionError, ShapeError

SEEDS = st.integers(0, 2**31 - 1)


def dense(module: nn.Module, x: Tensor) -> Tensor:
    J = torch.autograd.functional.jacobian(module, x)
    return J.reshape(-1, x.numel())


# ---- rounding ----


def is_positive_semidefinite(matrix: list[list[Fraction]]) -> bool:
    """By elimination in rational numbers."""
    rows = [list(row) for row in matrix]
    for step in range(len(rows)):
        if rows[step][step] < 0:
            return False
        if rows[step][step] == 0:
            if any(rows[step][step:]):
                return False
            continue
        for i in range(step + 1, len(rows)):
            share = rows[i][step] / rows[step][step]
            rows[i] = [a - share * b for a, b in zip(rows[i], rows[step], strict=True)]
    return True


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 5), st.sampled_from([0, 1, -30, 30]))
def test_eigenvalues_are_bounded_exactly(seed: int, n: int, scale: int) -> None:
    torch.manual_seed(seed)
    S = torch.randn(n, n) * 2.0**scale
    S = torch.triu(S) + torch.triu(S, 1).mT
    bound = float(upper_eigenvalue(S))
    exact = [[-Fraction(float(x)) for x in row] for row in S]
    for i in range(n):
        exact[i][i] += Fraction(bound)
    assert is_positive_semidefinite(exact)
    true = float(torch.linalg.eigvalsh(S)[-1])
    assert bound - true <= 1e-12 * float(S.abs().max())


@settings(max_examples=15)
@given(SEEDS, st.integers(1, 4), st.integers(1, 4))
def test_norms_are_bounded_exactly(seed: int, m: int, n: int) -> None:
    torch.manual_seed(seed)
    W = torch.randn(m, n)
    bound = float(spectral_norm(W))
    rows = [[Fraction(float(x)) for x in row] for row in W]
    exact = [
        [-sum(row[i] * row[j] for row in rows) for j in range(n)] for i in range(n)
    ]
    for i in range(n):
        exact[i][i] += Fraction(bound) ** 2
    assert is_positive_semidefinite(exact)
    assert bound <= float(torch.linalg.matrix_norm(W, 2)) * (1 + 1e-12)


def test_what_is_not_finite_has_no_bound() -> None:
    bad = torch.tensor([[1.0, math.nan], [math.nan, 1.0]])
    assert upper_eigenvalue(bad) == math.inf
    assert spectral_norm(bad) == math.inf
    assert spectral_norm(torch.zeros(0, 3)) == 0.0


@given(st.lists(st.floats(0, 1e100), min_size=1, max_size=5))
def test_sums_and_products_are_rounded_up(values: list[float]) -> None:
    assert Fraction(plus_up(*values)) >= sum(map(Fraction, values))
    if math.isfinite(product := times_up(*values)):
        assert Fraction(product) >= math.prod(map(Fraction, values))


# ---- layers ----


ACTIVATIONS = [
    nn.ReLU(),
    nn.ReLU6(),
    nn.Hardtanh(),
    nn.Tanh(),
    nn.Tanhshrink(),
    nn.Softsign(),
    nn.Softplus(),
    nn.Softplus(beta=3.0),
    nn.LogSigmoid(),
    nn.Sigmoid(),
    nn.Hardsigmoid(),
    nn.SiLU(),
    nn.GELU(),
    nn.LeakyReLU(0.1),
    nn.LeakyReLU(1.5),
    nn.ELU(),
    nn.ELU(alpha=2.5),
    nn.Identity(),
]


@pytest.mark.parametrize("layer", ACTIVATIONS, ids=str)
def test_constants_of_activations_are_bounds_and_sharp(layer: nn.Module) -> None:
    x = torch.linspace(-12, 12, 200_001, requires_grad=True)
    (slope,) = torch.autograd.grad(layer(x).sum(), x)
    bound = lipschitz(layer)
    assert bound.verdict is Verdict.CERTIFIED
    # The grid may hold a rounding of torch's own formula.
    assert float(slope.abs().max()) <= bound.value * (1 + 1e-14)
    assert float(slope.abs().max()) >= bound.value * (1 - 1e-3)


@pytest.mark.parametrize(
    ("beta", "threshold", "smooth"),
    [(1, 20, True), (1, 18, False), (10, 17, True), (1, 0, False), (1, -800, False)],
)
def test_a_softplus_that_jumps_is_unknown(beta, threshold, smooth) -> None:
    layer = nn.Softplus(beta, threshold)
    at = torch.tensor(threshold / beta)
    ends = layer(torch.stack([at, torch.nextafter(at, at + 1)]))
    assert (float(ends.diff().abs()) <= 1e-8) is smooth
    assert (lipschitz(layer).verdict is Verdict.CERTIFIED) is smooth


@given(SEEDS, st.integers(2, 6))
def test_softmax(seed: int, n: int) -> None:
    torch.manual_seed(seed)
    J = dense(nn.Softmax(-1), 3 * torch.randn(1, n))
    assert float(torch.linalg.matrix_norm(J, 2)) <= 0.5 + 1e-12
    tight = dense(nn.Softmax(-1), torch.zeros(1, 2))
    assert float(torch.linalg.matrix_norm(tight, 2)) == pytest.approx(0.5)


@given(SEEDS)
def test_normalisations(seed: int) -> None:
    torch.manual_seed(seed)
    norm = nn.LayerNorm(4, eps=0.1)
    nn.init.normal_(norm.weight)
    batch = nn.BatchNorm1d(4).eval()
    nn.init.normal_(batch.weight)
    batch.running_var.uniform_(0.1, 2)
    for layer in (norm, batch):
        for size in (0.01, 1.0, 30.0):
            J = dense(layer, size * torch.randn(1, 4))
            assert float(torch.linalg.matrix_norm(J, 2)) <= lipschitz(layer).value
    slopes = batch.weight.detach() / (batch.running_var + batch.eps).sqrt()
    assert lipschitz(batch).value <= float(slopes.abs().max()) * (1 + 1e-12)


CONVOLUTIONS = st.fixed_dictionaries(
    {
        "kernel_size": st.integers(1, 3),
        "stride": st.integers(1, 3),
        "padding": st.integers(0, 2),
        "dilation": st.integers(1, 2),
        "groups": st.sampled_from([1, 2]),
    }
)


@settings(max_examples=25)
@given(SEEDS, CONVOLUTIONS, st.sampled_from([nn.Conv1d, nn.Conv2d]), st.booleans())
def test_convolutions(seed: int, options: dict, kind, transposed: bool) -> None:
    torch.manual_seed(seed)
    if transposed:
        kind = {nn.Conv1d: nn.ConvTranspose1d, nn.Conv2d: nn.ConvTranspose2d}[kind]
    layer = kind(2, 4, **options)
    dims = 1 if "1d" in kind.__name__ else 2
    x = torch.randn(1, 2, *[7, 6][:dims])
    J = dense(layer, x)
    if not len(J):
        return
    bound = lipschitz(layer)
    assert float(torch.linalg.matrix_norm(J, 2)) <= bound.value
    assert bound.value <= convolution_norm(layer)


@pytest.mark.parametrize("mutant", [mutants.kernel_norm, mutants.largest_tap])
def test_wrong_convolution_bounds_are_seen(mutant) -> None:
    layer = nn.Conv1d(1, 1, 3, padding=1, bias=False)
    nn.init.ones_(layer.weight)
    true = float(torch.linalg.matrix_norm(dense(layer, torch.randn(1, 1, 40)), 2))
    assert mutant(layer) < true <= lipschitz(layer).value
    assert lipschitz(layer).value == pytest.approx(3.0)


def test_modules_that_nobody_knows_are_unknown() -> None:
    class Loud(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 100 * super().forward(x)

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, args, output: 100 * output)
    replaced = nn.Linear(2, 2)
    replaced.forward = lambda x: 100 * x
    for module in (
        Loud(2, 2),
        hooked,
        replaced,
        nn.GELU(approximate="tanh"),
        nn.GRUCell(2, 2),
        nn.Dropout(0.5),
        nn.BatchNorm1d(2),
        nn.Conv1d(1, 1, 3, padding_mode="circular"),
        nn.LSTM(2, 2),
        nn.Bilinear(2, 2, 2),
        nn.Linear(2, 2, dtype=torch.complex128),
        nn.Conv1d(1, 1, 3, dtype=torch.complex64),
        nn.LeakyReLU(math.nan),
        nn.LeakyReLU(math.inf),
        nn.ELU(math.nan),
        nn.Softplus(beta=math.inf),
    ):
        found = lipschitz(module)
        assert found.value == math.inf
        assert found.verdict is Verdict.NOT_CERTIFIED
        inside = lipschitz(nn.Sequential(nn.Linear(2, 2), module))
        assert inside.verdict is Verdict.NOT_CERTIFIED
    assert lipschitz(nn.Dropout(0.5).eval()).value == 1.0
    assert lipschitz(rnn.Linear(2, 2)).verdict is Verdict.CERTIFIED
    nan = nn.Linear(2, 2)
    nn.init.constant_(nan.weight, math.nan)
    assert lipschitz(nan).verdict is Verdict.NOT_CERTIFIED


def test_arguments_that_a_module_does_not_have() -> None:
    cell = rnn.Join(nn.Tanh(), nn.Tanh())
    for module, last in (
        (nn.Linear(1, 1), 0),
        (nn.Sequential(nn.Linear(1, 1)), 0),
        (nn.Sequential(), 0),
        (rnn.Sequential(), 0),
        (rnn.Sequential(cell), 1),
        (rnn.Residual(nn.Tanh()), 0),
        (rnn.Parallel(cell, cell), 1),
        (rnn.Heads(cell), 1),
        (rnn.Heads(nn.Tanh(), trunk=cell), 1),
        (rnn.FixedPoint(rnn.Join(nn.Tanh(), small(nn.Linear(1, 1), 0.1))), 1),
        (rnn.Feedback(nn.Tanh(), small(nn.Linear(1, 1), 0.1)), 1),
    ):
        assert lipschitz(module, last).verdict is Verdict.CERTIFIED
        assert lipschitz(module, last + 1).verdict is Verdict.NOT_CERTIFIED


def test_what_works_in_place_changes_what_is_beside_it() -> None:
    steep = nn.LeakyReLU(5.0, inplace=True)
    block = rnn.Residual(steep)
    ends = [block(torch.full((1, 1), x)) for x in (-1.0, -2.0)]
    assert float(ends[0] - ends[1]) == 10.0
    inside = nn.Sequential(nn.Identity(), nn.Flatten(), steep)
    for module in (
        block,
        rnn.Residual(inside),
        rnn.Residual(nn.Tanh(), shortcut=steep),
        rnn.Parallel(nn.Tanh(), steep),
        rnn.Join(steep, nn.Tanh()),
        rnn.Heads(steep, nn.Tanh()),
        rnn.Feedback(steep, small(nn.Linear(1, 1), 0.01)),
        rnn.FixedPoint(rnn.Join(steep, small(nn.Linear(1, 1), 0.01))),
    ):
        assert lipschitz(module).verdict is Verdict.NOT_CERTIFIED
    usual = nn.Sequential(nn.Linear(1, 1), nn.ReLU(inplace=True), nn.Linear(1, 1))
    for module in (usual, rnn.Residual(usual), nn.Sequential(steep)):
        assert lipschitz(module).verdict is Verdict.CERTIFIED


def test_a_user_teaches_a_module() -> None:
    class Own(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 3 * x

    class Other(Own):
        def forward(self, x: Tensor) -> Tensor:
            return 30 * x

    class Same(Own):
        pass

    @register_lipschitz(Own)
    def rule(module, argument):
        return known(3.0, "three times")

    assert lipschitz(nn.Sequential(Own(), nn.Tanh())).value == pytest.approx(3.0)
    assert lipschitz(Same()).value == 3.0
    assert lipschitz(Other()).verdict is Verdict.NOT_CERTIFIED


@pytest.mark.parametrize("kind", [nn.Sequential, rnn.Sequential])
def test_a_layer_that_runs_twice_counts_twice(kind) -> None:
    layer = nn.Linear(1, 1)
    nn.init.constant_(layer.weight, 3.0)
    assert lipschitz(kind(layer, layer)).value == pytest.approx(9.0)


def test_every_constant_is_tested() -> None:
    tested = {type(layer) for layer in ACTIVATIONS} | {
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose1d,
        nn.ConvTranspose2d,
        nn.ConvTranspose3d,
        nn.Softmax,
        nn.LayerNorm,
        nn.BatchNorm1d,
        nn.BatchNorm2d,
        nn.BatchNorm3d,
        nn.Dropout,
        nn.Flatten,
        nn.Unflatten,
    }
    assert set(CONSTANTS) == tested


# ---- compositions ----


def small(module: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
    return module


@st.composite
def maps(draw, depth: int = 2) -> nn.Module:
    """A map of three numbers to three numbers."""
    torch.manual_seed(draw(SEEDS))
    if depth == 0:
        return draw(
            st.sampled_from([nn.Tanh(), nn.Sigmoid(), nn.Linear(3, 3), nn.Identity()])
        )
    inner = maps(depth - 1)
    match draw(st.integers(0, 6)):
        case 0:
            return rnn.Sequential(draw(inner), draw(inner))
        case 1:
            return nn.Sequential(draw(inner), nn.Linear(3, 3))
        case 2:
            return rnn.Parallel(draw(inner), draw(inner))
        case 3:
            both = rnn.Parallel(draw(inner), draw(inner), combine="concat")
            return rnn.Sequential(both, nn.Linear(6, 3))
        case 4:
            return rnn.Residual(draw(inner), scale=draw(st.floats(-2, 2)))
        case 5:
            cell = rnn.Join(nn.Linear(3, 3), small(nn.Linear(3, 3), 0.3))
            return rnn.FixedPoint(rnn.Sequential(cell, nn.Tanh()), 3)
        case _:
            ahead, back = nn.Linear(3, 3), nn.Linear(3, 3)
            return rnn.Feedback(small(ahead, 0.5), small(back, 0.5))


@settings(max_examples=12)
@given(maps(), SEEDS)
def test_bounds_lie_above_what_is_measured(module: nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    bound, seen = lipschitz(module), measured_gain(module, 2 * torch.randn(3, 3))
    assert seen.verdict is Verdict.EVIDENCE
    assert seen.side is Side.LOWER
    assert seen.value <= bound.value * (1 + 1e-6)
    assert (bound.verdict is Verdict.CERTIFIED) == math.isfinite(bound.value)


@given(SEEDS)
def test_heads_and_second_arguments(seed: int) -> None:
    torch.manual_seed(seed)
    heads = rnn.Heads(nn.Linear(3, 2), nn.Linear(3, 1), trunk=nn.Linear(3, 3))
    both = torch.cat([h.weight for h in heads.heads.values()]) @ heads.trunk.weight
    assert torch.linalg.matrix_norm(both, 2) <= lipschitz(heads).value
    cell = rnn.Sequential(rnn.Join(nn.Linear(4, 3), nn.Linear(3, 3)), nn.Tanh())
    for argument, size in ((0, 4), (1, 3)):
        seen = measured_gain(
            cell, 0.1 * torch.randn(2, 4), 0.1 * torch.randn(2, 3), argument=argument
        )
        bound = lipschitz(cell, argument)
        assert seen.value <= bound.value
        weight = list(cell[0].branches)[argument].weight.detach()
        assert bound.value == pytest.approx(float(torch.linalg.matrix_norm(weight, 2)))
        assert weight.shape[1] == size
    assert lipschitz(cell, 2).verdict is Verdict.NOT_CERTIFIED


def test_a_loop_that_is_too_strong_is_unknown() -> None:
    strong = small(nn.Linear(3, 3), 20.0)
    assert lipschitz(rnn.Feedback(strong, nn.Linear(3, 3))).value == math.inf


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_where_a_solver_begins_matters_unless_there_is_one_solution(factor) -> None:
    back, one = nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        back.weight.fill_(factor)
        one.weight.fill_(1.0)
    cell = rnn.Sequential(rnn.Join(nn.Linear(1, 1), back), nn.Tanh())
    loops = [
        rnn.FixedPoint(cell, 1),
        rnn.Feedback(rnn.Sequential(one, nn.Tanh()), back),
    ]
    for loop in loops:
        found = lipschitz(loop, 1)
        assert (found.value == 0.0) == (factor < 1)
        assert (found.verdict is Verdict.CERTIFIED) == (factor < 1)
    if factor > 1:
        starts = [torch.full((1, 1), x) for x in (-1.0, 1.0)]
        ends = [loops[1](torch.zeros(1, 1), start).detach() for start in starts]
        assert float(ends[1] - ends[0]) > 1.9
        assert not rnn.Recurrent(loops[1], 1).certificate().contracts


@given(SEEDS)
def test_growth_is_the_logarithmic_norm(seed: int) -> None:
    torch.manual_seed(seed)
    layer = nn.Linear(4, 4)
    W = layer.weight.detach()
    true = float(torch.linalg.eigvalsh((W + W.mT) / 2)[-1])
    assert true - 1e-15 <= growth(layer) <= true + 1e-12
    assert growth(nn.Tanh()) == 1.0
    assert growth(nn.GRUCell(2, 2)).verdict is Verdict.NOT_CERTIFIED


def test_measuring_needs_examples() -> None:
    with pytest.raises(ShapeError, match="at least one"):
        measured_gain(nn.Tanh(), torch.zeros(0, 2))
    with pytest.raises(ShapeError, match="same number"):
        measured_gain(lambda x, z: x + z, torch.zeros(2, 2), torch.zeros(3, 2))
    with pytest.raises(ContractionError, match="not finite"):
        measured_gain(nn.Tanh(), torch.full((1, 2), math.nan))


# ---- matrices in intervals ----


def drawn_metric(n: int) -> Tensor:
    R = torch.randn(n, n) + 2 * torch.eye(n)
    return (R.mT @ R + (R.mT @ R).mT) / 2


def true_rate(J: Tensor, P: Tensor) -> float:
    form = (P @ J + (P @ J).mT) / 2
    return -float(scipy.linalg.eigh(form.numpy(), P.numpy())[0][-1])


def intervals(seed: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(seed)
    lower = torch.randn(n, n)
    return lower, lower + torch.rand(n, n), drawn_metric(n)


def worst_inside(lower: Tensor, upper: Tensor, P: Tensor) -> float:
    """The least rate of matrices inside: all corners of a 2 x 2 block."""
    n = lower.numel()
    corners = torch.tensor(list(np.ndindex(*(2,) * n)), dtype=torch.bool)
    return min(
        true_rate(torch.where(c.view_as(lower), upper, lower), P) for c in corners
    )


@given(SEEDS)
def test_interval_rates_are_below_all_rates(seed: int) -> None:
    lower, upper, P = intervals(seed, 2)
    bound = float(interval_rate(lower, upper, MetricRoot.of(P)))
    assert bound <= worst_inside(lower, upper, P) + 1e-12
    exact = float(interval_rate(lower, lower, MetricRoot.of(P)))
    # The root of P and its inverse multiply the rounding of J.
    condition = float(torch.linalg.cond(P))
    scale = condition**1.5 * float(torch.linalg.matrix_norm(lower, 2))
    assert exact == pytest.approx(true_rate(lower, P), abs=5e-14 * scale)
    assert exact <= true_rate(lower, P) + 1e-12


@pytest.mark.parametrize("name", ["centre_only", "corners_only", "no_metric"])
def test_wrong_interval_rates_are_seen(name: str) -> None:
    mutant = getattr(mutants, name)
    gaps = []
    for seed in range(30):
        lower, upper, P = intervals(seed, 2)
        found = float(mutant(lower, upper, MetricRoot.of(P)))
        gaps.append(worst_inside(lower, upper, P) - found)
    assert min(gaps) < -1e-2


@given(SEEDS)
def test_interval_gains_are_above_all_gains(seed: int) -> None:
    lower, upper, P = intervals(seed, 2)
    Q = drawn_metric(2)
    bound = float(interval_gain(lower, upper, MetricRoot.of(P), MetricRoot.of(Q)))
    root, other = (torch.linalg.cholesky(each).mT for each in (P, Q))

    def gain(J: Tensor) -> float:
        return float(torch.linalg.matrix_norm(root @ J @ torch.linalg.inv(other), 2))

    for share in torch.rand(20, 2, 2).round():
        assert gain(lower + share * (upper - lower)) <= bound + 1e-12
    exact = interval_gain(lower, lower, MetricRoot.of(P), MetricRoot.of(Q))
    # Both are computed with inverse roots of P and Q, which condition numbers bound.
    condition = float(torch.linalg.cond(P) + torch.linalg.cond(Q))
    assert float(exact) == pytest.approx(gain(lower), rel=1e-14 * condition)


@given(SEEDS, st.floats(0.1, 10.0))
def test_what_feedback_leaves_over(seed: int, gamma: float) -> None:
    forth, back, P = intervals(seed, 2)
    Q = drawn_metric(2)
    bound = interval_feedback(
        (forth, forth), (back, back), MetricRoot.of(P), MetricRoot.of(Q), gamma
    )
    root, other = (torch.linalg.cholesky(each).mT for each in (P, Q))
    inner = P @ forth + gamma * back.mT @ Q
    scaled = torch.linalg.inv(root).mT @ inner @ torch.linalg.inv(other)
    true = float(torch.linalg.matrix_norm(scaled, 2)) / 2 / math.sqrt(gamma)
    assert float(bound) == pytest.approx(true, rel=1e-9, abs=1e-9)
    assert float(bound) >= true * (1 - 1e-12)
    skew = -torch.linalg.solve(Q, forth.mT @ P) / gamma
    rest = interval_feedback(
        (forth, forth), (skew, skew), MetricRoot.of(P), MetricRoot.of(Q), gamma
    )
    assert float(rest) <= 1e-10 * (1 + float(forth.abs().max())) * 100


def test_unbounded_intervals_bound_nothing() -> None:
    eye = MetricRoot.of(torch.eye(2))
    wide = torch.full((2, 2), math.inf)
    assert interval_rate(-wide, wide, eye) == -math.inf
    assert interval_gain(-wide, wide, eye, eye) == math.inf


@pytest.mark.parametrize(
    "P",
    [
        torch.tensor([[1.0, 0.5], [0.4, 1.0]]),
        torch.tensor([[1.0, 2.0], [2.0, 1.0]]),
        torch.diag(torch.tensor([1.0, 1e-18])),
        torch.ones(2),
    ],
)
def test_bad_metrics_are_refused(P: Tensor) -> None:
    with pytest.raises(ContractionError, match="metric"):
        MetricRoot.of(P)


# ---- arithmetic ----

UNARY = {
    "-": lambda x: -x,
    "square": lambda x: x.square(),
    "cube": lambda x: x**3,
    "fourth": lambda x: x**4,
    "exp": lambda x: x.exp(),
    "tanh": lambda x: x.tanh(),
    "sigmoid": lambda x: x.sigmoid(),
    "sin": lambda x: x.sin(),
    "cos": lambda x: x.cos(),
    "power": lambda x: (x.square() + 1) ** -2,
    "constant": lambda x: 1.5 - 0.1 * x + 2.0 / (x.square() + 1) + x / 3.0,
    "zeroth": lambda x: x**0,
}
BINARY = {
    "+": lambda x, y: x + y,
    "-": lambda x, y: x - y,
    "*": lambda x, y: x * y,
    "/": lambda x, y: x / (y.square() + 0.1),
}
ENDS = st.tuples(st.floats(-8, 8), st.floats(-8, 8)).map(sorted)


@pytest.mark.parametrize("name", UNARY)
@given(ENDS, st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_functions_of_intervals_contain_the_values(name, ends, shares) -> None:
    box = UNARY[name](Interval.of(*ends))
    x = torch.tensor([ends[0] + s * (ends[1] - ends[0]) for s in shares])
    value = UNARY[name](x.clamp(*ends))
    assert bool(((box.lower <= value) & (value <= box.upper)).all())


@pytest.mark.parametrize("name", BINARY)
@given(ENDS, ENDS, st.floats(0, 1), st.floats(0, 1))
def test_operations_contain_the_values(name, one, two, s, t) -> None:
    box = BINARY[name](Interval.of(*one), Interval.of(*two))
    x = torch.tensor(one[0] + s * (one[1] - one[0])).clamp(*one)
    y = torch.tensor(two[0] + t * (two[1] - two[0])).clamp(*two)
    value = BINARY[name](x, y)
    assert bool((box.lower <= value) & (value <= box.upper))


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_sums_and_products_contain_the_exact_result(x: float, y: float) -> None:
    for box, exact in (
        (Interval.of(x) + y, Fraction(x) + Fraction(y)),
        (Interval.of(x) * y, Fraction(x) * Fraction(y)),
        (Interval.of(x) ** 3, Fraction(x) ** 3),
    ):
        assert Fraction(float(box.lower)) <= exact <= Fraction(float(box.upper))


@pytest.mark.parametrize("x", [-700.0, -709.5, -709.9, -720.0, -745.0, -800.0])
def test_sigmoids_of_very_negative_numbers(x: float) -> None:
    found = Interval.of(x).sigmoid()
    assert float(found.lower) <= math.exp(x) <= float(found.upper)
    assert float(found.upper) <= max(1e-300, 2 * math.exp(x))


def test_intervals_are_tight_and_refuse() -> None:
    turn = Interval.of(3.0, 3.3).cos()
    assert float(turn.lower) == -1.0
    assert float(Interval.of(-1.0, 1.0).cos().upper) == 1.0
    assert float(Interval.of(0.5, 1.0).cos().upper) == pytest.approx(math.cos(0.5))
    assert float(Interval.of(-2.0, 1.0).square().lower) == 0.0
    with pytest.raises(ContractionError, match="contains 0"):
        1.0 / Interval.of(-1.0, 1.0)
    with pytest.raises(ContractionError, match="empty"):
        Interval.of(1.0, 0.0)
    with pytest.raises(ContractionError, match="empty"):
        Interval.of(math.nan)
