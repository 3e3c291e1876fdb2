"""Output metrics: factors, whitened residuals, sampled rows, refusals."""

import copy
import math

import geoopt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from riemannian_modules import manifolds
from riemannian_modules.errors import (
    EmptyBatchError,
    ManifoldContractError,
    OutputMetricError,
    ShapeError,
)
from riemannian_modules.output import (
    Bernoulli,
    Categorical,
    Euclidean,
    Gaussian,
    OnManifold,
    OutputMetric,
    Poisson,
    Sampled,
)

SEEDS = st.integers(0, 2**32 - 1)
DTYPES = st.sampled_from([torch.float64, torch.float32])
POSITIONS = st.sampled_from([(), (3,), (2, 2)])
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
COVARIANCE = torch.tensor(
    [[2.0, 0.6, 0.0], [0.6, 1.0, -0.3], [0.0, -0.3, 0.5]], dtype=torch.float64
)


class FactorOnly(OutputMetric):
    """Keeps only the one method that a user has to write."""

    def __init__(self, metric: OutputMetric) -> None:
        self.metric = metric

    def factor(self, outputs: Tensor) -> Tensor:
        return self.metric.factor(outputs)


def normal(seed: int, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def gram(rows: Tensor) -> Tensor:
    """Return L^T L for each example, ``(n, D, D)``, in float64."""
    rows = rows.reshape(*rows.shape[:2], -1).double()
    return rows.mT @ rows


def combine(metric: OutputMetric, z: Tensor, y: Tensor, rest: Tensor) -> Tensor:
    rows = metric.factor(z).double()
    return torch.einsum("nr...,nr->n...", rows, y.double()) + rest.double()


def hessians(loss, z: Tensor) -> Tensor:
    """Return the Hessian of ``loss(output, index)`` for each example."""
    d = z[0].numel()
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda o, i=i: loss(o, i), z[i]).view(
                d, d
            )
            for i in range(len(z))
        ]
    )


def point(manifold: geoopt.Manifold, seed: int, n: int = 3) -> Tensor:
    if isinstance(manifold, geoopt.SymmetricPositiveDefinite):
        a = normal(seed, n, 3, 3)
        return a @ a.mT + 0.5 * torch.eye(3)
    if isinstance(manifold, geoopt.Stiefel):
        return torch.linalg.qr(normal(seed, n, 4, 2))[0]
    if isinstance(manifold, geoopt.PoincareBall):
        return (
            0.9 * F.normalize(normal(seed, n, 4)) * torch.linspace(0.1, 1, n)[:, None]
        )
    if isinstance(manifold, geoopt.Sphere):
        return F.normalize(normal(seed, n, 4), dim=-1)
    if isinstance(manifold, geoopt.ProductManifold):
        return torch.cat(
            [
                F.normalize(normal(seed, n, 3)),
                0.5 * F.normalize(normal(seed + 1, n, 2)),
            ],
            -1,
        )
    if isinstance(manifold, geoopt.Lorentz):
        return manifold.projx(normal(seed, n, 4))
    return normal(seed, n, 4)


MANIFOLDS = [
    geoopt.Euclidean(ndim=1),
    geoopt.Sphere(),
    geoopt.EuclideanStiefel(),
    geoopt.PoincareBall(c=0.7),
    geoopt.SymmetricPositiveDefinite(),
    manifolds.Lorentz(),
    geoopt.ProductManifold((geoopt.Sphere(), 3), (geoopt.PoincareBall(c=0.7), 2)),
]
MANIFOLD_IDS = [type(m).__name__ for m in MANIFOLDS]

# Each case: the metric, and its outputs for a seed.
CASES = [
    (Euclidean(), lambda s: normal(s, 3, 2, 2)),
    (Euclidean(scale=0.3), lambda s: normal(s, 3)),
    (Categorical(), lambda s: 2 * normal(s, 3, 4)),
    (Categorical(), lambda s: 2 * normal(s, 3, 2, 4)),
    (Bernoulli(), lambda s: 2 * normal(s, 3)),
    (Bernoulli(), lambda s: 2 * normal(s, 3, 2, 2)),
    (Poisson(), lambda s: normal(s, 3, 2)),
    (Gaussian(), lambda s: normal(s, 3, 2)),
    (Gaussian(COVARIANCE), lambda s: normal(s, 3, 2, 3)),
    (Gaussian(learned="log_variance"), lambda s: normal(s, 3, 2, 4)),
    (Gaussian(learned="log_std"), lambda s: normal(s, 3, 4)),
    *[(OnManifold(m), lambda s, m=m: point(m, s)) for m in MANIFOLDS],
]
CASE_IDS = [f"{m!r}-{f(0).ndim}" for m, f in CASES]
cases = pytest.mark.parametrize(("metric", "outputs"), CASES, ids=CASE_IDS)


# ---- L^T L is the Fisher metric -------------------------------------------------


@given(SEEDS, DTYPES, POSITIONS, st.integers(2, 5), st.floats(0.1, 5.0))
def test_categorical_factor_is_the_hessian(seed, dtype, positions, classes, spread):
    z = spread * normal(seed, 2, *positions, classes, dtype=dtype)
    targets = torch.zeros(2, *positions, dtype=torch.long)

    def loss(o, i):
        o = o.reshape(-1, classes)
        return F.cross_entropy(o, targets[i].reshape(-1), reduction="sum")

    rows = Categorical().factor(z)
    assert rows.shape == (2, math.prod(positions) * (classes - 1), *z.shape[1:])
    torch.testing.assert_close(
        gram(rows), hessians(loss, z.double()), rtol=0, atol=TOLERANCE[dtype]
    )
    shifted = Categorical().factor(z.double() + 7.0)
    torch.testing.assert_close(
        shifted, Categorical().factor(z.double()), rtol=0, atol=1e-12
    )
    assert rows.sum(-1).abs().max() <= TOLERANCE[dtype]


@given(SEEDS, DTYPES, POSITIONS)
def test_independent_factors_are_the_hessian(seed, dtype, positions):
    z = normal(seed, 2, *positions, dtype=dtype)
    t = normal(seed + 1, 2, *positions).abs().round()
    losses = {
        Bernoulli(): lambda o, i: F.binary_cross_entropy_with_logits(
            o, t[i].clamp(max=1), reduction="sum"
        ),
        Poisson(): lambda o, i: F.poisson_nll_loss(o, t[i], reduction="sum"),
        Euclidean(2.0): lambda o, i: F.mse_loss(o, t[i], reduction="sum"),
    }
    for metric, loss in losses.items():
        rows = metric.factor(z)
        assert rows.shape == (2, z[0].numel(), *z.shape[1:])
        expected = hessians(loss, z.double())
        atol = TOLERANCE[dtype] * max(1.0, float(expected.max()))
        torch.testing.assert_close(gram(rows), expected, rtol=0, atol=atol)


@given(SEEDS, DTYPES, POSITIONS)
def test_gaussian_factor_with_covariance_is_the_hessian(seed, dtype, positions):
    z = normal(seed, 2, *positions, 3, dtype=dtype)
    normal_law = torch.distributions.MultivariateNormal

    def loss(o, i):
        return -normal_law(o, COVARIANCE).log_prob(torch.zeros_like(o)).sum()

    torch.testing.assert_close(
        gram(Gaussian(COVARIANCE).factor(z)),
        hessians(loss, z.double()),
        rtol=0,
        atol=4 * TOLERANCE[dtype],
    )
    unit = gram(Gaussian().factor(z))
    assert torch.equal(unit, torch.eye(z[0].numel()).expand_as(unit))


@given(SEEDS, DTYPES, POSITIONS, st.sampled_from(["log_variance", "log_std"]))
def test_gaussian_factor_with_learned_variance_is_the_fisher(
    seed, dtype, positions, learned
):
    """E[score score^T] is the second derivative of KL(z0 | z) at z = z0."""
    z = normal(seed, 2, *positions, 4, dtype=dtype)
    half = 0.5 if learned == "log_variance" else 1.0

    def law(o):
        return torch.distributions.Normal(o[..., :2], (half * o[..., 2:]).exp())

    def loss(o, i):
        return torch.distributions.kl_divergence(law(z[i].double()), law(o)).sum()

    expected = hessians(loss, z.double())
    torch.testing.assert_close(
        gram(Gaussian(learned=learned).factor(z)),
        expected,
        rtol=0,
        atol=TOLERANCE[dtype] * max(1.0, float(expected.max())),
    )


@pytest.mark.parametrize("manifold", MANIFOLDS, ids=MANIFOLD_IDS)
@given(SEEDS, DTYPES)
def test_on_manifold_factor_is_the_inner_product(manifold, seed, dtype):
    x = point(manifold, seed)
    ambient = [normal(seed + k, *x.shape) for k in (1, 2)]
    u, v = (manifold.proju(x, a) for a in ambient)
    rows = OnManifold(manifold).factor(x.to(dtype)).double().flatten(2)
    value = (rows @ u.flatten(1).unsqueeze(-1)) * (rows @ v.flatten(1).unsqueeze(-1))
    size = (rows @ rows.mT).diagonal(dim1=1, dim2=2).sum(-1).amax() * 50
    expected = manifold.inner(x, u, v, keepdim=True).flatten()
    torch.testing.assert_close(
        value.sum((1, 2)), expected, rtol=0, atol=float(size) * TOLERANCE[dtype]
    )


@pytest.mark.parametrize(
    "manifold", [MANIFOLDS[k] for k in (1, 2, 3, 4)], ids=MANIFOLD_IDS[1:5]
)
def test_closed_forms_equal_the_numeric_root(manifold):
    x = point(manifold, 0)
    metric = OnManifold(manifold)
    torch.testing.assert_close(
        gram(metric.factor(x)), gram(metric._numeric(x)), rtol=1e-9, atol=1e-10
    )


def test_spd_factor_has_no_idle_rows():
    assert OnManifold(MANIFOLDS[4]).factor(point(MANIFOLDS[4], 0)).shape == (3, 6, 3, 3)


# ---- L^T y + rest is the cotangent ----------------------------------------------


@cases
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@given(seed=SEEDS)
def test_whiten_carries_any_cotangent(metric, outputs, dtype, seed):
    z = outputs(seed).to(dtype)
    v = normal(seed + 9, *z.shape, dtype=dtype)
    before = z.clone(), v.clone()
    for each in (metric, FactorOnly(metric)):
        y, rest = each.whiten(z, v)
        assert y.shape == each.factor(z).shape[:2]
        assert rest.shape == z.shape
        assert y.dtype == rest.dtype == dtype
        size = float(
            (
                each.factor(z).reshape(*y.shape, -1).mT.abs() @ y.abs().unsqueeze(-1)
            ).max()
        )
        torch.testing.assert_close(
            combine(each, z, y, rest),
            v.double(),
            rtol=0,
            atol=TOLERANCE[dtype] * max(1.0, size),
        )
    assert torch.equal(z, before[0])
    assert torch.equal(v, before[1])


@cases
@given(seed=SEEDS)
def test_whiten_leaves_no_rest_in_the_row_space(metric, outputs, seed):
    z = outputs(seed)
    rows = metric.factor(z)
    v = torch.einsum("nr...,nr->n...", rows, normal(seed + 5, *rows.shape[:2]))
    for each in (metric, FactorOnly(metric)):
        y, rest = each.whiten(z, v)
        assert not rest.any()
        torch.testing.assert_close(combine(each, z, y, rest), v, rtol=0, atol=1e-10)


@given(SEEDS)
def test_default_whiten_has_the_least_norm(seed):
    """On a factor with dependent rows, against the pseudo-inverse."""
    rows = normal(seed, 2, 5, 2) @ normal(seed + 1, 2, 4)

    class Deficient(OutputMetric):
        def factor(self, outputs):
            return rows

    v = normal(seed + 2, 2, 4)
    y, rest = Deficient().whiten(torch.zeros(2, 4), v)
    expected = torch.linalg.pinv(rows.mT, rtol=1e-9) @ v.unsqueeze(-1)
    torch.testing.assert_close(y, expected.squeeze(-1), rtol=1e-7, atol=1e-7)
    assert rest.any()
    torch.testing.assert_close(combine(Deficient(), v, y, rest), v)


def losses_of_logits(z, seed):
    classes = z.shape[-1]
    logits = z.movedim(-1, 1)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(z), *z.shape[1:-1])
    hard = torch.randint(classes, shape, generator=generator)
    soft = normal(seed, *z.shape, dtype=z.dtype).softmax(-1).movedim(-1, 1)
    weight = torch.rand(classes, generator=generator, dtype=z.dtype) + 0.1
    ignored = hard.clone()
    ignored.view(-1)[0] = -100
    yield F.cross_entropy(logits, hard)
    yield F.cross_entropy(logits, hard, reduction="sum")
    yield F.cross_entropy(logits, hard, weight=weight)
    yield F.cross_entropy(logits, hard, label_smoothing=0.1)
    yield F.cross_entropy(logits, hard, weight=weight, label_smoothing=0.3)
    yield F.cross_entropy(logits, ignored, reduction="sum")
    yield F.cross_entropy(logits, soft)
    yield F.cross_entropy(logits, logits.detach().argmax(1))
    if z.detach().abs().max() < 5:  # a saturated softmax rounds away its gradient
        yield F.multi_margin_loss(z.softmax(-1).reshape(-1, classes), hard.reshape(-1))


@given(SEEDS, DTYPES, POSITIONS, st.integers(2, 6), st.sampled_from([0.1, 2, 10, 20]))
@example(0, torch.float32, (), 6, 20)
def test_categorical_whitens_every_loss(seed, dtype, positions, classes, spread):
    z = (spread * normal(seed, 4, *positions, classes, dtype=dtype)).requires_grad_()
    for loss in losses_of_logits(z, seed):
        (v,) = torch.autograd.grad(loss, z, retain_graph=True)
        y, rest = Categorical().whiten(z, v)
        assert not rest.any()
        torch.testing.assert_close(
            combine(Categorical(), z, y, rest),
            v.double(),
            rtol=0,
            atol=TOLERANCE[dtype] * 2,
        )


@given(SEEDS, st.integers(2, 6), st.sampled_from([1e-6, 1e-30, 1e-300, 1e-330]))
def test_categorical_residual_of_an_improbable_target(seed, classes, p):
    """|y|^2 = 1/p - 1 and L^T y = p - e, for a target of any probability."""
    z = normal(seed, 1, classes)
    target = seed % classes
    log_p = math.log(10) * round(math.log10(p) if p else -330)
    others = torch.cat([z[:, :target], z[:, target + 1 :]], -1).logsumexp(-1)
    z[:, target] = others + log_p
    v = z.softmax(-1)
    v[:, target] -= 1.0
    y, rest = Categorical().whiten(z, v)
    assert not rest.any()
    assert y.isfinite().all()
    scaled = y.abs().log().mul(2).logsumexp(-1)
    torch.testing.assert_close(scaled, -z.log_softmax(-1)[:, target], rtol=1e-5, atol=0)
    torch.testing.assert_close(
        combine(Categorical(), z, y, rest), v, rtol=0, atol=1e-12
    )


@given(SEEDS, DTYPES, st.integers(2, 6), st.sampled_from([0, 30, 70, 700, 2000]))
def test_categorical_carries_a_sum(seed, dtype, classes, log_ratio):
    """Cotangents that no softmax gives, at probabilities down to nothing."""
    z = normal(seed, 3, classes, dtype=dtype)
    z[:, seed % classes] -= log_ratio
    v = normal(seed + 1, 3, classes, dtype=dtype)
    y, rest = Categorical().whiten(z, v)
    assert y.isfinite().all()
    lost = combine(Categorical(), z, y, rest) - v.double()
    # A sum that rounding in a loss of the weight v / p would explain may be dropped.
    total = v.double().sum(-1, keepdim=True).abs()
    weight = (v.double() / z.double().softmax(-1)).abs().amax(-1, keepdim=True)
    rounding = total <= 50.0 * torch.finfo(dtype).eps * weight
    allowed = TOLERANCE[dtype] + torch.where(rounding & (log_ratio == 30), total, 0.0)
    assert (lost.abs() <= allowed).all()


def test_categorical_rest_is_the_share_of_the_sum():
    z = torch.tensor([[1.0, 2.0, 3.0]]).log()
    _, rest = Categorical().whiten(z, torch.tensor([[1.0, 1.0, 4.0]]))
    torch.testing.assert_close(rest, torch.tensor([[1.0, 2.0, 3.0]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("confidence", [3, 9, 15, 20, 30, 60])
def test_confident_examples_have_no_spurious_rest(dtype, confidence):
    """Rounding of p - 1 in the cotangent is not a part outside the row space."""
    z = normal(0, 50, 10, dtype=dtype)
    z[:, 4] += confidence
    z.requires_grad_()
    loss = F.cross_entropy(z, torch.full((50,), 4))
    (v,) = torch.autograd.grad(loss, z)
    y, rest = Categorical().whiten(z, v)
    assert not rest.any()
    logits = z.detach().double()
    others = torch.cat([logits[:, :4], logits[:, 5:]], -1).logsumexp(-1)
    expected = (0.5 * (others - logits[:, 4])).exp() / 50
    norm = y.double().square().sum(-1).sqrt()
    tail = 10 * torch.finfo(dtype).tiny
    torch.testing.assert_close(norm, expected, rtol=1e-5, atol=tail)


@given(SEEDS, DTYPES, POSITIONS)
def test_independent_losses_are_whitened(seed, dtype, positions):
    z = normal(seed, 3, *positions, dtype=dtype).requires_grad_()
    t = normal(seed + 1, 3, *positions, dtype=dtype).abs().round()
    p, rate = z.detach().sigmoid(), z.detach().exp()
    coin = t.clamp(max=1)
    table = [
        (
            Bernoulli(),
            F.binary_cross_entropy_with_logits(z, coin, reduction="sum"),
            (p - coin) / (p * (1 - p)).sqrt(),
        ),
        (
            Poisson(),
            F.poisson_nll_loss(z, t, reduction="sum"),
            rate.sqrt() - t / rate.sqrt(),
        ),
        (
            Euclidean(3.0),
            1.5 * F.mse_loss(z, t, reduction="sum"),
            math.sqrt(3) * (z.detach() - t),
        ),
    ]
    for metric, loss, expected in table:
        (v,) = torch.autograd.grad(loss, z)
        y, rest = metric.whiten(z, v)
        assert not rest.any()
        torch.testing.assert_close(y.view_as(z), expected, rtol=1e-4, atol=1e-5)
        atol = TOLERANCE[dtype] * max(1.0, float(v.abs().max()))
        combined = combine(metric, z, y, rest)
        torch.testing.assert_close(combined, v.double(), rtol=0, atol=atol)


# ---- extreme outputs, golden values ---------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_extreme_logits(dtype):
    z = torch.tensor([[1000.0, -1000.0, 0.0], [-1000.0, -1000.0, 1000.0]], dtype=dtype)
    for metric in (Categorical(), Bernoulli()):
        assert metric.factor(z).isfinite().all()
        for v in (
            torch.eye(3)[:2] - torch.eye(3)[2],
            normal(0, 2, 3),
            torch.zeros(2, 3),
        ):
            y, rest = metric.whiten(z, v.to(dtype))
            assert y.isfinite().all()
            torch.testing.assert_close(
                combine(metric, z, y, rest), v.to(dtype).double(), rtol=0, atol=1e-6
            )
            if not v.any():
                assert not rest.any()


def test_categorical_factor_of_tiny_probabilities():
    """Row j of (a, b) is sqrt(p q) (1, -1), also where p q underflows."""
    log_p = -330 * math.log(10)
    rows = Categorical().factor(torch.tensor([[log_p, 0.0], [0.0, log_p]]))
    expected = math.exp(0.5 * log_p) * torch.tensor([[[1.0, -1.0]], [[1.0, -1.0]]])
    torch.testing.assert_close(rows / rows[0, 0, 0], expected / expected[0, 0, 0])
    torch.testing.assert_close(rows.log2()[:, 0, 0], expected.log2()[:, 0, 0])
    tails = Categorical().factor(torch.tensor([[0.0, log_p, log_p + math.log(3.0)]]))
    torch.testing.assert_close(
        tails[0, 0] / tails[0, 0, 0], torch.tensor([1.0, -0.25, -0.75])
    )


def test_golden_softmax():
    z = torch.tensor([[1.0, 2.0, 3.0]]).log()
    rows = Categorical().factor(z)[0]
    a, b = math.sqrt(5), math.sqrt(5) / 5
    expected = torch.tensor([[a / 6, -a / 15, -a / 10], [0.0, b, -b]])
    torch.testing.assert_close(rows, expected, rtol=0, atol=1e-15)
    y, rest = Categorical().whiten(z, torch.tensor([[-5 / 6, 1 / 3, 1 / 2]]))
    torch.testing.assert_close(y, torch.tensor([[-a, 0.0]]), rtol=0, atol=1e-14)
    assert not rest.any()


def test_golden_output_factors():
    table = [
        (Bernoulli(), [0.7], [-0.3318122278318340], [0.4708639647425879]),
        (Poisson(), [0.4], [math.exp(0.4) - 3.0], [1.2214027581601699]),
        (
            Gaussian(learned="log_variance"),
            [0.3, -0.5],
            [-2.308209778980179, -1.1157468452861257],
            [1.2840254166877414, 0.7071067811865476],
        ),
    ]
    residuals = [
        [-0.7046880897187134],
        [-1.2347895010737757],
        [-1.7976355833628381, -1.5779043207786343],
    ]
    for (metric, z, v, diagonal), residual in zip(table, residuals, strict=True):
        rows = metric.factor(torch.tensor([z]))
        torch.testing.assert_close(rows[0], torch.tensor(diagonal).diag())
        y, rest = metric.whiten(torch.tensor([z]), torch.tensor([v]))
        torch.testing.assert_close(y, torch.tensor([residual]), rtol=1e-13, atol=0)
        assert not rest.any()
    law = torch.distributions.Normal(0.3, math.exp(-0.25))
    t = torch.tensor(1.7)
    rows = Gaussian(learned="log_std").factor(torch.tensor([[0.3, -0.25]]))
    torch.testing.assert_close(
        rows[0], torch.tensor([1 / law.stddev, math.sqrt(2)]).diag()
    )
    y, _ = Gaussian(COVARIANCE).whiten(
        torch.zeros(1, 3), (COVARIANCE.inverse() @ torch.tensor([t, 0.0, 1.0]))[None]
    )
    expected = torch.tensor([t, 0.0, 1.0]) @ COVARIANCE.inverse()
    torch.testing.assert_close(y.square().sum(), expected @ torch.tensor([t, 0.0, 1.0]))


# ---- reductions -----------------------------------------------------------------


def test_terms_are_what_a_mean_divides_by():
    z = normal(0, 3, 2, 4)
    labels = torch.zeros(3, 2, dtype=torch.long)
    ones = torch.ones(3, 2, 4)
    pairs = [
        (
            Categorical(),
            lambda r: F.cross_entropy(z.movedim(-1, 1), labels, reduction=r),
        ),
        (
            Bernoulli(),
            lambda r: F.binary_cross_entropy_with_logits(z, ones, reduction=r),
        ),
        (Poisson(), lambda r: F.poisson_nll_loss(z, ones, reduction=r)),
        (
            Gaussian(learned="log_variance"),
            lambda r: F.gaussian_nll_loss(
                z[..., :2], ones[..., :2], z[..., 2:].exp(), reduction=r
            ),
        ),
    ]
    for metric, loss in pairs:
        ratio = float(loss("sum") / loss("mean"))
        for each in (metric, Sampled(metric)):
            assert each.terms(z) == pytest.approx(ratio)
            assert isinstance(each.terms(z), int)
    assert Euclidean().terms(z) == 3
    assert Gaussian().terms(z) == 6
    assert OnManifold(geoopt.Sphere()).terms(z) == 3


def test_documented_scale_gives_the_hessian_of_mse_loss():
    z, t = normal(0, 3, 2, 2), normal(1, 3, 2, 2)
    whole = torch.autograd.functional.hessian(lambda o: F.mse_loss(o, t), z)
    expected = torch.stack([whole[i, ..., i, :, :].reshape(4, 4) for i in range(3)])
    metric = Euclidean(scale=2 / 4)
    weight = 1 / metric.terms(z)
    torch.testing.assert_close(weight * gram(metric.factor(z)), expected)


# ---- sampled rows ---------------------------------------------------------------


@cases
def test_sampled_rows_are_unbiased(metric, outputs):
    z = outputs(3)
    n, draws = len(z), 4000
    generator = torch.Generator().manual_seed(1)
    rows = Sampled(metric, draws, generator).factor(z)
    assert rows.shape == (n, draws, *z.shape[1:])
    rows = rows.reshape(n, draws, -1)
    rows = rows * math.sqrt(draws)
    outer = rows.unsqueeze(-1) * rows.unsqueeze(-2)
    exact = gram(metric.factor(z))
    deviation = outer.std(1) / math.sqrt(draws) + 1e-12 * exact.abs().amax()
    assert ((outer.mean(1) - exact).abs() <= 6 * deviation).all()
    mean_deviation = rows.std(1) / math.sqrt(draws) + 1e-12
    assert (rows.mean(1).abs() <= 6 * mean_deviation).all()


@cases
def test_sampled_examples_are_independent(metric, outputs):
    draws = 4000
    z = outputs(3)[:1].repeat(2, *[1] * (outputs(3).ndim - 1))
    rows = metric.sample(z, draws, torch.Generator().manual_seed(2))
    rows = rows.reshape(2, draws, -1)
    product = rows[0].unsqueeze(-1) * rows[1].unsqueeze(-2)
    # The exact deviation: that of few draws is far too small where events are rare.
    variance = metric.factor(z)[0].reshape(-1, rows.shape[-1]).square().sum(0)
    deviation = (variance.outer(variance) / draws).sqrt() + 1e-12
    assert (product.mean(0).abs() <= 6 * deviation).all()


@pytest.mark.parametrize("log_rate", [5.0, 13.0, 14.0, 30.0, 60.0])
def test_sampled_poisson_of_large_rates(log_rate):
    z = torch.full((1, 1), log_rate, dtype=torch.float32)
    rows = Poisson().sample(z, 4000, torch.Generator().manual_seed(0)).double()
    square = rows.square() / math.exp(log_rate)
    assert abs(float(square.mean()) - 1) <= 6 * float(square.std()) / math.sqrt(4000)


def test_sampled_rows_are_scores_of_targets():
    z = torch.tensor([[1.0, 2.0, 3.0]]).log()
    rows = Sampled(Categorical(), 4).factor(z)[0]
    targets = 2 * rows + torch.tensor([1.0, 2.0, 3.0]) / 6
    assert torch.equal(targets.round(), targets.round().clamp(0, 1))
    torch.testing.assert_close(targets, targets.round())
    torch.testing.assert_close(targets.sum(-1), torch.ones(4))


def test_sampled_follows_its_generator():
    z = normal(0, 5, 4)
    draw = [
        Sampled(Categorical(), 3, torch.Generator().manual_seed(s)).factor(z)
        for s in (0, 0, 1)
    ]
    assert torch.equal(draw[0], draw[1])
    assert not torch.equal(draw[0], draw[2])
    metric = Sampled(Categorical())
    torch.manual_seed(3)
    first = metric.factor(z)
    assert first.shape == (5, 1, 4)
    second = metric.factor(z)
    torch.manual_seed(3)
    assert torch.equal(first, metric.factor(z))
    assert not torch.equal(first, second)


def test_sampled_has_no_exact_residual():
    z, v = normal(0, 3, 4), normal(1, 3, 4)
    y, rest = Sampled(Categorical()).whiten(z, v)
    assert y is None
    assert torch.equal(rest, v)


# ---- meta device, dtype, gradients ----------------------------------------------


@cases
def test_runs_on_the_meta_device(metric, outputs):
    z = outputs(0).to("meta", torch.float32)
    for each in (metric, FactorOnly(metric)):
        y, rest = each.whiten(z, torch.empty_like(z))
        rows = each.factor(z)
        for result in (y, rest, rows, Sampled(each, 2).factor(z)):
            assert result.device.type == "meta"
            assert result.dtype == torch.float32
        assert rows.shape == metric.factor(outputs(0)).shape
        assert y.shape == rows.shape[:2]


@cases
def test_nothing_is_recorded_by_autograd(metric, outputs):
    z = outputs(0).requires_grad_()
    v = normal(1, *z.shape).requires_grad_()
    y, rest = metric.whiten(z, v)
    for result in (metric.factor(z), Sampled(metric).factor(z), y, rest):
        assert not result.requires_grad


@cases
def test_metrics_can_be_copied_and_shown(metric, outputs):
    z = outputs(0)
    assert torch.equal(copy.deepcopy(metric).factor(z), metric.factor(z))
    assert repr(metric).startswith(type(metric).__name__ + "(")


def test_representations():
    assert repr(Euclidean(0.5)) == "Euclidean(scale=0.5)"
    assert repr(Categorical()) == "Categorical()"
    assert repr(Gaussian(COVARIANCE)) == "Gaussian(covariance=(3, 3))"
    assert repr(Gaussian(learned="log_std")) == "Gaussian(learned='log_std')"
    assert repr(Sampled(Bernoulli(), 2)) == "Sampled(Bernoulli(), probes=2)"


# ---- refusals -------------------------------------------------------------------


@cases
def test_bad_outputs_are_refused(metric, outputs):
    z = outputs(0)
    for each in (metric, Sampled(metric)):
        with pytest.raises(EmptyBatchError, match="skip"):
            each.factor(z[:0])
        with pytest.raises(OutputMetricError, match="int64"):
            each.factor(z.long())
        with pytest.raises(ShapeError, match="batch dimension"):
            each.factor(torch.tensor(1.0))
        with pytest.raises(ShapeError, match="cotangent"):
            each.whiten(z, z.unsqueeze(0))


@pytest.mark.parametrize(
    ("metric", "shape", "match"),
    [
        (Categorical(), (3,), "C >= 2"),
        (Categorical(), (3, 1), "Bernoulli"),
        (Categorical(), (3, 0), "entries"),
        (Bernoulli(), (3, 0), "entries"),
        (Gaussian(), (3,), "unsqueeze"),
        (Gaussian(COVARIANCE), (3, 2), "covariance, 3"),
        (Gaussian(learned="log_std"), (3, 5), "even"),
        (OnManifold(geoopt.SymmetricPositiveDefinite()), (3, 4), "n, \\*point"),
        (OnManifold(geoopt.EuclideanStiefel()), (3, 4), "n, \\*point"),
    ],
)
def test_bad_shapes_are_refused(metric, shape, match):
    with pytest.raises(ShapeError, match=match) as caught:
        metric.factor(torch.zeros(shape))
    assert str(shape) in str(caught.value)


@pytest.mark.parametrize(
    ("make", "error"),
    [
        (lambda: Euclidean(0.0), OutputMetricError),
        (lambda: Euclidean(-1.0), OutputMetricError),
        (lambda: Euclidean(math.inf), OutputMetricError),
        (lambda: Euclidean(math.nan), OutputMetricError),
        (lambda: Gaussian(-torch.eye(2)), OutputMetricError),
        (lambda: Gaussian(torch.ones(2, 2)), OutputMetricError),
        (lambda: Gaussian(torch.tensor([[1.0, 0.5], [0.0, 1.0]])), OutputMetricError),
        (lambda: Gaussian(torch.full((2, 2), math.nan)), OutputMetricError),
        (lambda: Gaussian(torch.ones(2)), ShapeError),
        (lambda: Gaussian(2.0), ShapeError),
        (lambda: Gaussian(torch.ones(2, 3)), ShapeError),
        (lambda: Gaussian(COVARIANCE, learned="log_std"), OutputMetricError),
        (lambda: Gaussian(learned="variance"), OutputMetricError),
        (lambda: OnManifold(geoopt.Sphere), ManifoldContractError),
        (lambda: OnManifold(geoopt.CanonicalStiefel()), ManifoldContractError),
        (lambda: Sampled(Euclidean(), -1), OutputMetricError),
        (lambda: Sampled(Euclidean(), probes=1.5), OutputMetricError),
        (lambda: Sampled(Euclidean(), 0, gradient_rows=False), OutputMetricError),
        (lambda: Sampled(Euclidean(), per="layer"), OutputMetricError),
        (lambda: Sampled(Sampled(Euclidean())), OutputMetricError),
        (lambda: Sampled("categorical"), OutputMetricError),
    ],
)
def test_bad_arguments_are_refused(make, error):
    with pytest.raises(error):
        make()
