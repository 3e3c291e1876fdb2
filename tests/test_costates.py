"""Backpropagation as constrained optimisation, and the Riccati sweep of a chain."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import action as mutants
from torch import Tensor, nn
from torch.func import functional_call, jacrev

import riemannian_modules as rm
from riemannian_modules import action as ac
from riemannian_modules.errors import LinearizationError, ShapeError

EPS = torch.finfo(torch.float64).eps
seeds = st.integers(0, 2**31)


def chain(depth: int = 3) -> rm.nn.Sequential:
    widths = [3, 4, 5, 3, 4][: depth + 1]
    layers: list[nn.Module] = []
    for index, (a, b) in enumerate(itertools.pairwise(widths)):
        if index == 1:
            layers.append(rm.nn.Linear(a, b, manifold=rm.manifolds.Stiefel()))
        else:
            layers.append(nn.Linear(a, b, bias=index != 0))
        layers.append((nn.Tanh(), nn.Softplus(), nn.LayerNorm(b))[index % 3])
    return rm.nn.Sequential(*layers[:-1])


def half_square(z: Tensor) -> Tensor:
    return 0.5 * (z - 1.0).square().sum(-1).mean()


def recorded(seed: int, depth: int = 3) -> ac.RecordedPass:
    torch.manual_seed(seed)
    return ac.record_pass(chain(depth), torch.randn(4, 3), half_square)


@given(seeds, st.integers(1, 4))
@settings(max_examples=10)
def test_autograd_satisfies_the_conditions(seed: int, depth: int) -> None:
    found = recorded(seed, depth)
    residuals = ac.kkt_residuals(found)
    assert residuals.largest <= 50 * EPS * depth
    assert len(residuals.forward) == len(found.modules)
    assert "module 0" in str(residuals)


@given(seeds)
@settings(max_examples=5)
def test_the_librarys_gradient_satisfies_them(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = chain(), torch.randn(4, 3)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean())
    with metric.record():
        z = model(x)
    metric.backward(half_square(z), z)
    found = ac.record_pass(model, x, half_square)
    own = tuple(
        {name: p.grad for name, p in module.named_parameters()} for module in model
    )
    given = ac.RecordedPass(
        found.modules, found.loss, found.states, found.costates, own
    )
    assert ac.kkt_residuals(given).largest <= 50 * EPS * len(found.modules)


@pytest.mark.parametrize("mutant", mutants.PASSES, ids=lambda f: f.__name__)
def test_what_was_changed_is_found(mutant) -> None:
    found, where = mutant(recorded(1))
    residuals = ac.kkt_residuals(found)
    part = getattr(residuals, where)
    assert (part if isinstance(part, float) else max(part)) > 1e-7
    if where == "adjoint":
        # Costate 1 is the result of module 1 and what module 0 starts from.
        assert residuals.adjoint[1] > 1e-7
        assert max(residuals.adjoint[2:]) <= 200 * EPS


def test_another_model_is_found() -> None:
    found = recorded(2)
    with torch.no_grad():
        next(found.modules[2].parameters()).add_(1e-6)
    residuals = ac.kkt_residuals(found)
    assert residuals.forward[2] > 1e-8
    assert residuals.forward[0] == 0.0


@given(seeds, st.integers(1, 4))
@settings(max_examples=10)
def test_pairings_are_the_same_in_every_depth(seed: int, depth: int) -> None:
    found = recorded(seed, depth)
    values = torch.tensor(ac.pairings(found, torch.randn(4, 3)))
    scale = float(found.costates[0].norm()) * 10
    assert (values - values[0]).abs().max() <= 50 * EPS * depth * scale
    wrong, _ = mutants.wrong_costate(found)
    bad = ac.pairings(wrong, torch.randn(4, 3))
    if depth > 1:
        assert abs(bad[1] - bad[0]) > 200 * EPS * depth * scale


def test_hamiltonians_and_their_derivatives() -> None:
    found = recorded(3)
    for a, value in enumerate(ac.hamiltonians(found)):
        module = found.modules[a]
        own = {n: p.detach() for n, p in module.named_parameters()}

        def energy(z, costate, w, module=module):
            return (costate * functional_call(module, w, (z,))).sum()

        at = (found.states[a], found.costates[a + 1], own)
        assert value == pytest.approx(float(energy(*at)), rel=1e-13)
        slopes = torch.func.grad(energy, argnums=(0, 1, 2))(*at)
        torch.testing.assert_close(slopes[0], found.costates[a])
        torch.testing.assert_close(slopes[1], found.states[a + 1])
        torch.testing.assert_close(slopes[2], found.gradients[a])


def test_a_shared_parameter_has_a_gradient_in_each_use() -> None:
    layer = nn.Linear(3, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(4, 3)
    found = ac.record_pass(model, x, half_square)
    half_square(model(x)).backward()
    both = found.gradients[0]["weight"] + found.gradients[2]["weight"]
    torch.testing.assert_close(both, layer.weight.grad)
    assert ac.kkt_residuals(found).largest <= 200 * EPS


def test_passes_that_are_refused() -> None:
    with pytest.raises(ShapeError, match="at least one module"):
        ac.record_pass([], torch.ones(1), half_square)
    with pytest.raises(ShapeError, match="real numbers"):
        ac.record_pass([nn.Tanh()], torch.ones(1).long(), half_square)
    found = recorded(1)
    lost = ac.RecordedPass(
        found.modules,
        found.loss,
        found.states,
        found.costates,
        ({}, *found.gradients[1:]),
    )
    with pytest.raises(LinearizationError, match="module 0"):
        ac.kkt_residuals(lost)


@pytest.mark.parametrize("first", [False, True])
def test_a_module_may_overwrite_its_input(first: bool) -> None:
    relu = nn.ReLU(inplace=True)
    model = [relu] if first else [nn.Linear(3, 4), relu]
    x = torch.randn(4, 3)
    before = x.clone()
    found = ac.record_pass(model, x, half_square)
    assert torch.equal(x, before)
    assert float(found.states[-2].min()) < 0
    assert ac.kkt_residuals(found).largest <= 50 * EPS
    pushed = ac.pairings(found, torch.randn(4, 3))
    assert pushed[-1] == pytest.approx(pushed[0], rel=1e-12)


@pytest.mark.parametrize("inside", [False, True])
def test_running_statistics_are_named(inside: bool) -> None:
    norm = nn.BatchNorm1d(4)
    last = nn.Sequential(nn.Tanh(), norm) if inside else norm
    x = torch.randn(5, 3)
    model = [nn.Linear(3, 4), last]
    found = ac.record_pass(model, x, half_square)
    mean = norm.running_mean.clone()
    where = r"'1' in module 1 \(BatchNorm" if inside else r"module 1 \(BatchNorm"
    for function in (
        ac.kkt_residuals,
        ac.hamiltonians,
        lambda each: ac.pairings(each, x),
    ):
        with pytest.raises(LinearizationError, match=where):
            function(found)
    assert torch.equal(norm.running_mean, mean)
    last.eval()
    found = ac.record_pass(model, x, half_square)
    assert ac.kkt_residuals(found).largest <= 50 * EPS


# --- the sweep


def problem(seed: int, output, loss, masses=0.2, reduction="mean"):
    torch.manual_seed(seed)
    model, x = chain(), torch.randn(4, 3)
    metric = rm.LayerwiseMetric(
        model, output, mass=masses, blocks="model", reduction=reduction
    )
    with metric.record():
        z = model(x)
    value = loss(z)
    (costate,) = torch.autograd.grad(value, z, retain_graph=True)
    metric.backward(value, z)
    return metric, x, costate


PROBLEMS = {
    "euclidean": (rm.output.Euclidean(), half_square, 0.2),
    "categorical": (
        rm.output.Categorical(),
        lambda z: F.cross_entropy(z, torch.tensor([0, 1, 2, 0])),
        {"0.*": 0.1, "*": 0.5},
    ),
    "sum": (
        rm.output.Categorical(),
        lambda z: F.cross_entropy(z, torch.tensor([0, 1, 2, 0]), reduction="sum"),
        0.3,
    ),
}


@pytest.mark.parametrize("name", PROBLEMS)
@given(seeds)
@settings(max_examples=4)
def test_the_sweep_is_the_joint_natural_gradient(name: str, seed: int) -> None:
    output, loss, masses = PROBLEMS[name]
    reduction = "sum" if name == "sum" else "mean"
    metric, x, costate = problem(seed, output, loss, masses, reduction)
    sweep = ac.riccati_sweep(metric, x, costate)
    wanted = metric.natural_gradient()
    assert set(sweep.vectors) == set(wanted)
    for name, vector in wanted.items():
        scale = float(vector.abs().max())
        torch.testing.assert_close(
            sweep.vectors[name], vector, rtol=0, atol=1e-9 * scale
        )


@given(seeds)
@settings(max_examples=4)
def test_a_response_costs_less_than_none(seed: int) -> None:
    metric, x, costate = problem(seed, rm.output.Euclidean(), half_square)
    sweep = ac.riccati_sweep(metric, x, costate)
    assert len(sweep.riccati) == len(metric.model) + 1
    for P, Q in zip(sweep.riccati, sweep.lyapunov, strict=True):
        scale = float(torch.linalg.matrix_norm(Q, ord=2))
        assert torch.linalg.eigvalsh(P).min() >= -1e-12 * scale
        assert torch.linalg.eigvalsh(Q - P).min() >= -1e-12 * scale
    # Without parameters above there is no response.
    torch.testing.assert_close(sweep.riccati[-1], sweep.lyapunov[-1])


def test_lyapunov_matrices_make_the_layerwise_metric() -> None:
    metric, x, costate = problem(0, rm.output.Euclidean(), half_square)
    sweep = ac.riccati_sweep(metric, x, costate)
    z = metric.model[:2](x).detach()
    third = metric.model[2]
    own = {"weight": third.weight.detach().as_subclass(Tensor)}
    bias = {"bias": third.bias.detach()}
    B = jacrev(lambda w: functional_call(third, {**w, **bias}, (z,)).flatten())(own)
    B = B["weight"].flatten(1)
    part = next(p for p in metric.blocks["model"].parts if p.name == "2.weight")
    K = part.factor.to_dense()
    torch.testing.assert_close(B.mT @ sweep.lyapunov[3] @ B, K.mT @ K)


def test_layer_by_layer_is_not_the_sweep() -> None:
    torch.manual_seed(0)
    model, x = chain(), torch.randn(4, 3)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.2)
    with metric.record():
        z = model(x)
    value = half_square(z)
    (costate,) = torch.autograd.grad(value, z, retain_graph=True)
    metric.backward(value, z)
    sweep = ac.riccati_sweep(metric, x, costate).vectors
    alone = mutants.without_response(metric, x, costate)
    weight = sweep["0.weight"]
    assert (alone["0.weight"] - weight).norm() > 0.05 * weight.norm()


def test_the_sweep_of_a_chain_that_overwrites_its_input() -> None:
    torch.manual_seed(0)
    sweeps = []
    for inplace in (False, True):
        model = nn.Sequential(nn.ReLU(inplace=inplace), nn.Linear(3, 2))
        nn.init.constant_(model[1].weight, 0.5)
        nn.init.zeros_(model[1].bias)
        metric = rm.LayerwiseMetric(model, rm.output.Euclidean())
        x = torch.linspace(-1.0, 1.0, 12).sin().view(4, 3)
        sweeps.append(ac.riccati_sweep(metric, x, torch.ones(4, 2)).vectors)
    assert all(torch.equal(sweeps[1][name], x) for name, x in sweeps[0].items())


def test_models_that_are_no_chain() -> None:
    metric = rm.LayerwiseMetric(nn.Linear(2, 2), rm.output.Euclidean())
    with pytest.raises(LinearizationError, match="is no nn"):
        ac.riccati_sweep(metric, torch.ones(1, 2), torch.ones(1, 2))
    layer = nn.Linear(2, 2)
    shared = rm.LayerwiseMetric(nn.Sequential(layer, layer), rm.output.Euclidean())
    with pytest.raises(LinearizationError, match="share a parameter"):
        ac.riccati_sweep(shared, torch.ones(1, 2), torch.ones(1, 2))
