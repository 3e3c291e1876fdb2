"""Estimators of the constants against dense matrices, and what the audit says."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import riemannian_modules as rm
from riemannian_modules import contraction as c
from riemannian_modules.contraction import Side, Verdict
from riemannian_modules.contraction.chain import output_norm, slope
from riemannian_modules.errors import ContractionError, NotRecordedError

seeds = st.integers(0, 2**31)
OUTPUTS = {
    "euclidean": (rm.output.Euclidean(), lambda z, t: 0.5 * (z - t).square().sum(-1)),
    "categorical": (
        rm.output.Categorical(),
        lambda z, t: F.cross_entropy(z, t.softmax(-1), reduction="none"),
    ),
    "sampled": (
        rm.output.Sampled(rm.output.Categorical(), probes=1),
        lambda z, t: F.cross_entropy(z, t.softmax(-1), reduction="none"),
    ),
}


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def recorded(output, losses, *, blocks="layer", mass=0.3, n=5, model=None):
    model = network() if model is None else model
    x, t = torch.randn(n, 3), torch.randn(n, 2)
    metric = rm.LayerwiseMetric(model, output, mass=mass, blocks=blocks)
    with metric.record():
        z = model(x)
    metric.backward(losses(z, t).mean(), z)
    return metric, x, t, losses


def rows_of(model: nn.Module, function) -> Tensor:
    """The Jacobian of a function of the parameters, one column for each."""
    parameters = {name: p.detach() for name, p in model.named_parameters()}
    found = jacrev(lambda p: function(lambda x: functional_call(model, p, (x,))))(
        parameters
    )
    count = next(iter(found.values())).shape[0]
    return torch.cat([j.reshape(count, -1) for j in found.values()], 1)


def dense(metric: rm.LayerwiseMetric) -> Tensor:
    return torch.block_diag(*[b.to_dense() for b in metric.blocks.values()])


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@given(seeds)
@settings(max_examples=3)
def test_dual_norms_of_single_examples(name: str, blocks: str, seed: int) -> None:
    torch.manual_seed(seed)
    metric, x, t, losses = recorded(*OUTPUTS[name], blocks=blocks)
    e = rows_of(metric.model, lambda f: losses(f(x), t))
    wanted = (e * torch.linalg.solve(dense(metric), e.mT).mT).sum(1).sqrt()
    torch.testing.assert_close(c.example_norms(metric), wanted, rtol=1e-9, atol=0)
    some = c.example_norms(metric, [3, 1])
    torch.testing.assert_close(some, wanted[[3, 1]], rtol=1e-9, atol=0)
    found = c.loss_lipschitz(metric)
    assert found.value == pytest.approx(float(wanted.max()), rel=1e-9)
    assert (found.side, found.verdict) == (Side.LOWER, Verdict.EVIDENCE)


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@given(seeds)
@settings(max_examples=3)
def test_sensitivities(blocks: str, seed: int) -> None:
    torch.manual_seed(seed)
    output, losses = OUTPUTS["euclidean"]
    metric, x, _, _ = recorded(output, losses, blocks=blocks, mass=0.3)
    J = rows_of(metric.model, lambda f: f(x).flatten()).view(5, 2, -1)
    sizes = {d.name: d.tensor.numel() for d in metric.parameters}
    pieces = dict(zip(sizes, J.split(list(sizes.values()), -1), strict=True))
    groups = [
        torch.cat([pieces[part.name] for part in block.parts], -1)
        for block in metric.blocks.values()
    ]
    largest = max(torch.linalg.matrix_norm(K, ord=2).max() for K in groups)
    whole = max(torch.linalg.matrix_norm(K).max() for K in groups)
    assert c.sensitivity(metric).value == pytest.approx(float(largest), rel=1e-10)
    frobenius = c.sensitivity(metric, norm="frobenius")
    assert frobenius.value == pytest.approx(float(whole), rel=1e-10)
    assert frobenius.side is Side.LOWER
    assert c.mass_constant(metric).value == 0.3
    # |dl_i| <= |K_i| |y_i| / sqrt(mu)
    limit = largest * c.residual_norm(metric).value / math.sqrt(0.3)
    blocks_moved = math.sqrt(len(metric.blocks))
    assert c.loss_lipschitz(metric).value <= limit * blocks_moved


def test_masses_that_differ_are_absorbed() -> None:
    output, losses = OUTPUTS["euclidean"]
    torch.manual_seed(3)
    model = network()
    mass = {"0.*": 0.3, "2.*": 1.2}
    metric, *_ = recorded(output, losses, mass=mass, model=model)
    assert c.mass_constant(metric).value == 1.0
    spectra = [block.gram_spectrum()[0] for block in metric.blocks.values()]
    # One example's factor is no longer than the whole batch's, times sqrt(n).
    assert c.sensitivity(metric).value >= math.sqrt(float(max(spectra)))
    assert c.sensitivity(metric).value <= math.sqrt(5 * float(max(spectra)))


def test_whitened_residual() -> None:
    metric, x, t, _ = recorded(*OUTPUTS["euclidean"])
    wanted = (metric.model(x) - t).detach().norm(dim=1).max()
    assert c.residual_norm(metric).value == pytest.approx(float(wanted), rel=1e-12)
    # The gradient's rows are as long as the exact residual.
    sampled, x, t, losses = recorded(*OUTPUTS["sampled"])
    exact = rm.LayerwiseMetric(sampled.model, OUTPUTS["categorical"][0])
    with exact.record():
        z = exact.model(x)
    exact.backward(losses(z, t).mean(), z)
    found = c.residual_norm(sampled).value
    assert found == pytest.approx(c.residual_norm(exact).value, rel=1e-9)
    output = rm.output.Sampled(rm.output.Categorical(), gradient_rows=False)
    metric, *_ = recorded(output, losses)
    with pytest.raises(ContractionError, match="no whitened residual"):
        c.residual_norm(metric)


def test_what_estimators_refuse() -> None:
    model = network()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean())
    for estimate in (c.loss_lipschitz, c.sensitivity, c.residual_norm):
        with pytest.raises(NotRecordedError):
            estimate(metric)
    with metric.record():
        z = model(torch.randn(4, 3))
    metric.pull_back(z)
    with pytest.raises(NotRecordedError, match="no loss"):
        c.loss_lipschitz(metric)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), reduction="sum")
    with metric.record():
        z = model(torch.randn(4, 3))
    metric.backward(z.square().sum(), z)
    with pytest.raises(ContractionError, match="reduction='mean'"):
        c.loss_lipschitz(metric)
    metric, *_ = recorded(*OUTPUTS["euclidean"])
    with pytest.raises(ContractionError, match="example 5"):
        c.example_norms(metric, [5])
    with pytest.raises(ContractionError, match="spectral"):
        c.sensitivity(metric, norm="nuclear")


# --- the product of norms


@given(seeds, st.sampled_from(["spectral", "frobenius"]), st.booleans())
@settings(max_examples=15)
def test_products_of_norms_dominate(seed: int, norm: str, joint: bool) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Linear(3, 4), nn.LeakyReLU(2.0), nn.Linear(4, 3, bias=False), nn.Tanh()
    )
    output = rm.output.Categorical()
    x = torch.randn(4, 3)
    bound = c.chain_sensitivity(
        model, output, float(x.norm(dim=1).max()), radius=0.5, joint=joint, norm=norm
    )
    assert (bound.side, bound.verdict) == (Side.UPPER, Verdict.CERTIFIED)
    with torch.no_grad():
        for parameter in model.parameters():
            move = torch.randn_like(parameter)
            parameter.add_(0.5 * move / move.norm())
    blocks = "model" if joint else "layer"
    metric = rm.LayerwiseMetric(model, output, mass=1.0, blocks=blocks)
    with metric.record():
        z = model(x)
    metric.backward(F.cross_entropy(z, torch.zeros(4).long()), z)
    assert c.sensitivity(metric, norm=norm).value <= bound.value * (1 + 1e-12)


def test_the_product_of_norms_is_attained() -> None:
    layer = nn.Linear(2, 2, bias=False)
    chain = [layer, nn.Linear(2, 1, bias=False)]
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
        chain[1].weight.copy_(torch.tensor([[3.0, 0.0]]))
    found = c.chain_sensitivity(chain, rm.output.Euclidean(), 5.0)
    assert found.value == pytest.approx(max(3.0 * 5.0, 10.0))
    both = c.chain_sensitivity(chain, rm.output.Euclidean(), 5.0, joint=True)
    assert both.value == pytest.approx(math.hypot(15.0, 10.0))


def ones(inputs: int = 1, factor: float = 1.0) -> nn.Linear:
    layer = nn.Linear(inputs, 1, bias=False)
    with torch.no_grad():
        layer.weight.fill_(factor)
    return layer


def measured(model: nn.Module, x: torch.Tensor, **options) -> float:
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1.0, **options)
    with metric.record():
        z = model(x)
    metric.backward(z.square().sum(), z)
    return c.sensitivity(metric).value


@given(seeds, st.booleans(), st.booleans(), st.booleans())
@settings(max_examples=15)
def test_the_uses_of_one_parameter_add_up(seed, whole, joint, bias) -> None:
    """A layer that is there twice, and two with one weight."""
    torch.manual_seed(seed)
    layer, other = nn.Linear(3, 3, bias=bias), nn.Linear(3, 3, bias=bias)
    if not whole:
        other.weight = layer.weight
    model = nn.Sequential(layer, nn.Tanh(), layer if whole else other, nn.Linear(3, 1))
    x = torch.randn(4, 3)
    size = float(x.norm(dim=1).max())
    bound = c.chain_sensitivity(model, 1.0, size, joint=joint).value
    assert measured(model, x, blocks="model" if joint else "tensor") <= bound


def test_a_layer_that_is_there_twice_attains_the_sum() -> None:
    layer = ones()
    other = ones()
    other.weight = layer.weight
    for second in (layer, other):
        bound = c.chain_sensitivity([layer, second], 1.0, 1.0).value
        assert 2.0 <= bound <= 2.0 * (1 + 1e-13)
    assert measured(nn.Sequential(layer, layer), torch.ones(1, 1)) == pytest.approx(2.0)


def test_a_bias_acts_at_every_position() -> None:
    model = nn.Sequential(nn.Linear(1, 1), nn.Flatten(), ones(9))
    x = torch.zeros(2, 9, 1)
    with pytest.raises(ContractionError, match="positions="):
        c.chain_sensitivity(model, 1.0, 0.0)
    bound = c.chain_sensitivity(model, 1.0, 0.0, positions=9)
    assert measured(model, x) == pytest.approx(9.0)
    assert 9.0 <= bound.value <= 9.0 * (1 + 1e-13)
    assert "9 position" in bound.where
    first = nn.Sequential(nn.Flatten(), ones(9))
    assert c.chain_sensitivity(first, 1.0, 1.0).value == 1.0
    output = rm.output.Euclidean()
    plain = nn.Sequential(nn.Linear(1, 1))
    bound = c.chain_sensitivity(plain, output, 0.0, positions=4, norm="frobenius")
    assert bound.value == 4.0
    with pytest.raises(ContractionError, match="positions"):
        c.chain_sensitivity(plain, 1.0, 1.0, positions=0)


@given(st.lists(st.floats(-30.0, 30.0), min_size=2, max_size=6))
def test_norms_of_output_factors(logits: list[float]) -> None:
    z = torch.tensor([logits])
    entries = len(logits)
    outputs = (rm.output.Categorical(), rm.output.Bernoulli(), rm.output.Euclidean(4.0))
    for output in outputs:
        L = output.factor(z)[0]
        spectral = torch.linalg.matrix_norm(L, ord=2)
        assert spectral <= output_norm(output, entries) * (1 + 1e-12)
        assert L.norm() <= output_norm(output, entries, "frobenius") * (1 + 1e-12)


@pytest.mark.parametrize(
    "module",
    [
        nn.Tanh(),
        nn.ReLU(),
        nn.LeakyReLU(-3.0),
        nn.Softsign(),
        nn.Tanhshrink(),
        nn.Hardtanh(),
        nn.Hardtanh(0.0, 3.0),
    ],
    ids=lambda m: type(m).__name__,
)
def test_slopes(module: nn.Module) -> None:
    x = torch.linspace(-8.0, 8.0, 4001)
    steepest = (module(x).diff() / x.diff()).abs().max()
    assert module(torch.zeros(())) == 0.0
    assert steepest <= slope(module) * (1 + 1e-12)
    assert steepest >= 0.9 * slope(module)


def test_linear_layers_that_do_more_are_refused_in_chains() -> None:
    class Twice(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2.0 * super().forward(x)

    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda module, args, out: 2.0 * out)
    for layer in (Twice(2, 2), hooked):
        with pytest.raises(ContractionError, match="not known"):
            c.chain_sensitivity([layer], 1.0, 1.0)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    complex_weights = nn.Linear(2, 2, dtype=torch.complex128)
    for layer in (parametrised, complex_weights):
        with pytest.raises(ContractionError, match="computed from other"):
            c.chain_sensitivity([layer], 1.0, 1.0)


def hooked(module: nn.Module) -> nn.Module:
    module.register_forward_hook(lambda module, args, out: 2.0 * out)
    return module


def replaced(module: nn.Module) -> nn.Module:
    module.forward = lambda x: 2.0 * x  # type: ignore[method-assign]
    return module


@pytest.mark.parametrize(
    "module",
    [
        hooked(nn.ReLU()),
        replaced(nn.Tanh()),
        nn.Hardtanh(5.0, 6.0),
        nn.Hardtanh(-2.0, -1.0),
        nn.LeakyReLU(math.nan),
        nn.Flatten(0),
    ],
    ids=str,
)
def test_what_has_no_slope(module: nn.Module) -> None:
    assert slope(module) is None
    with pytest.raises(ContractionError, match="not known"):
        c.chain_sensitivity([module, nn.Linear(1, 1)], 1.0, 1.0)


def test_chains_that_are_refused() -> None:
    with pytest.raises(ContractionError, match="layer 1 of the chain is a Sigmoid"):
        c.chain_sensitivity([nn.Linear(2, 2), nn.Sigmoid()], 1.0, 1.0)
    with pytest.raises(ContractionError, match="no linear layer"):
        c.chain_sensitivity([nn.Tanh()], 1.0, 1.0)
    with pytest.raises(ContractionError, match="no bound is known"):
        c.chain_sensitivity([nn.Linear(2, 2)], rm.output.Poisson(), 1.0)
    with pytest.raises(ContractionError, match="Dropout"):
        c.chain_sensitivity([nn.Linear(2, 2), nn.Dropout()], 1.0, 1.0)
    ball = rm.nn.Linear(2, 2, manifold=rm.manifolds.PoincareBall())
    with pytest.raises(ContractionError, match="Poincare"):
        c.chain_sensitivity([ball], 1.0, 1.0)
    stiefel = rm.nn.Linear(2, 2, manifold=rm.manifolds.Stiefel())
    assert c.chain_sensitivity([stiefel], 1.0, 1.0).value > 0


# --- curvature and audit


@given(seeds)
@settings(max_examples=5)
def test_frozen_curvature(seed: int) -> None:
    """For a linear model and squared loss the Hessian is the metric without mass."""
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    output, losses = OUTPUTS["euclidean"]
    metric, x, t, _ = recorded(output, losses, model=model, mass=0.5, n=7)
    found = c.frozen_curvature(
        metric, x, t, lambda z, y: losses(z, y).mean(), weight_decay=0.1
    )
    spectrum = metric.blocks["model"].gram_spectrum()
    wanted = spectrum / (1 + spectrum) + 0.1
    assert found[0].value == pytest.approx(float(wanted.min()), rel=1e-9)
    assert found[1].value == pytest.approx(float(wanted.max()), rel=1e-9)
    assert found[0].kind == "frozen"
    assert found[0].where == "at this point"


def audited(**options) -> tuple[rm.LayerwiseMetric, c.Audit]:
    torch.manual_seed(0)
    output, losses = OUTPUTS["categorical"]
    metric, x, t, _ = recorded(output, losses, n=20)
    marks = [torch.randn_like(d.tensor) for d in metric.parameters]
    for declared, mark in zip(metric.parameters, marks, strict=True):
        declared.tensor.grad = mark
    found = c.audit(metric, x, t, lambda z, y: losses(z, y).mean(), **options)
    for declared, mark in zip(metric.parameters, marks, strict=True):
        assert declared.tensor.grad is mark
    return metric, found


def test_an_audit_of_measured_constants_is_evidence() -> None:
    metric, found = audited(weight_decay=9.0, loss_bound=5.0, t=3.0)
    assert {c.symbol for c in found.constants} == {"L_G", "kappa", "mu", "lambda"}
    values = {k.symbol: k.value for k in found.constants}
    assert values["L_G"] == c.loss_lipschitz(metric).value
    expected = c.stability_bound(values["L_G"], values["lambda"], 20, 3.0).value
    assert found["stability"].value == pytest.approx(expected, rel=1e-12)
    for bound in found.bounds.values():
        assert bound.verdict is not Verdict.CERTIFIED
        assert not bound.guarantees
    text = str(found)
    for word in ("evidence", "lower bound", "order only", "not certified", "assumes:"):
        assert word in text
    rows = text.splitlines()
    assert len(rows) > 3 + len(found.constants) + len(found.bounds)


def test_a_region_that_the_caller_names_does_not_mend_estimates() -> None:
    _, found = audited(rate=0.5, region="a ball")
    assert found["stability"].verdict is Verdict.EVIDENCE
    assert found["stability"].side is Side.ESTIMATE


def test_a_network_without_decay_has_no_bound() -> None:
    _, found = audited()
    assert math.isinf(found["stability"].value)
    assert found.order is None
    assert "vacuous" in str(found)


def test_audits_that_are_refused() -> None:
    x, t = torch.randn(4, 3), torch.randn(4, 2)
    with pytest.raises(ContractionError, match="output="):
        c.audit(network(), x, t, F.mse_loss)
    layer = rm.nn.Linear(3, 2, manifold=rm.manifolds.Stiefel())
    with pytest.raises(ContractionError, match="Euclidean"):
        c.audit(layer, x, t, F.mse_loss, output=rm.output.Euclidean())
    found = c.audit(layer, x, t, F.mse_loss, output=rm.output.Euclidean(), rate=0.5)
    assert found["stability"].value > 0
    metric = rm.LayerwiseMetric(network(), rm.output.Euclidean())
    with pytest.raises(NotRecordedError):
        c.frozen_curvature(metric, x, t, F.mse_loss)


@pytest.mark.parametrize(("seed", "dtype"), [(28, torch.float32), (45, torch.float64)])
def test_frozen_curvature_of_a_singular_hessian_certifies_nothing(seed, dtype) -> None:
    torch.manual_seed(seed)
    model = nn.Linear(6, 1, bias=False).to(dtype)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1e-6)
    x, t = torch.randn(3, 6).to(dtype), torch.randn(3, 1).to(dtype)
    with metric.record():
        z = model(x)
    metric.pull_back(z)

    def half(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return 0.5 * (z - t).square().mean()

    rate, smoothness = c.frozen_curvature(metric, x, t, half)
    assert rate.verdict is Verdict.NOT_CERTIFIED
    assert rate.value <= 0.0
    assert smoothness.value >= 1.0 - 1e-3
    decays, _ = c.frozen_curvature(metric, x, t, half, weight_decay=0.1)
    assert decays.verdict is Verdict.CERTIFIED
    assert decays.value <= 0.1


def test_frozen_curvature_wants_a_scalar_loss() -> None:
    output, losses = OUTPUTS["euclidean"]
    metric, x, t, _ = recorded(output, losses, model=nn.Linear(3, 2), mass=0.5, n=7)
    with pytest.raises(ContractionError, match="one finite number"):
        c.frozen_curvature(metric, x, t, losses)
