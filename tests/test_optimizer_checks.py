"""check_optimizer passes what is right, and rejects what is not, law by law."""

from typing import Any

import geoopt
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mutants import optimizers as mutants
from torch import nn

import riemannian_modules as rm
from riemannian_modules.interop.geoopt_optimizers import (
    FletcherReeves,
    load_state_,
    seed_momentum_,
)
from riemannian_modules.testing import check_optimizer, failures, raise_failures

GRADIENTS_OFF = {
    "closure_enables_grad": "geoopt calls closures as it finds gradients switched"
}
NAN = {"bad_data": "the optimizer steps to NaN and says nothing"}


def metric(model: nn.Module, **options: Any) -> rm.LayerwiseMetric:
    options = {"output": rm.output.Euclidean(), "mass": 0.5, **options}
    return rm.LayerwiseMetric(model, **options)


def viewed(model: nn.Module) -> rm.LayerwiseMetric:
    return metric(model, blocks="tensor")


def rsgd(**options: Any) -> Any:
    return lambda model, groups: rm.optim.RiemannianSGD(
        metric(model), groups, **options
    )


OURS = {
    "plain": rsgd(lr=0.5),
    "nesterov": rsgd(lr=0.2, momentum=0.6, nesterov=True),
    "decay": rsgd(lr=0.3, weight_decay=0.01, momentum=0.3, dampening=0.2),
}


@pytest.mark.parametrize("name", OURS)
def test_the_library_s_optimizer(name: str) -> None:
    raise_failures(check_optimizer(OURS[name]))


@settings(max_examples=5, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32 - 1),
    manifold=st.sampled_from(
        [
            rm.manifolds.Stiefel(),
            rm.manifolds.Sphere(),
            rm.manifolds.Euclidean(),
            rm.manifolds.Oblique(),
            rm.manifolds.Grassmann(),
        ]
    ),
)
def test_the_library_s_optimizer_on_any_problem(seed: int, manifold: Any) -> None:
    generator = torch.Generator().manual_seed(seed)
    results = check_optimizer(OURS["plain"], manifold=manifold, generator=generator)
    raise_failures(results)


def adam(model: nn.Module, groups: Any) -> Any:
    class Loading(geoopt.optim.RiemannianAdam):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            for each in self.state.values():
                each["step"] = int(each["step"])

    return Loading(groups, lr=0.1), viewed(model)


@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_geoopt_s_sgd_in_the_layer_metric(momentum: float) -> None:
    def factory(model: nn.Module, groups: Any) -> Any:
        made = geoopt.optim.RiemannianSGD(groups, lr=0.2, momentum=momentum)
        seed_momentum_(made)
        return made, viewed(model)

    # A seeded buffer is a state, also of a parameter without a gradient.
    known = {"no_gradient": "the buffer is there before the first gradient"}
    seeded = known if momentum else {}
    found = check_optimizer(factory)
    raise_failures(found, expected_failures=GRADIENTS_OFF | seeded)


def test_geoopt_s_adam_in_the_layer_metric() -> None:
    raise_failures(check_optimizer(adam), expected_failures=GRADIENTS_OFF)


def test_geoopt_s_optimizers_by_themselves() -> None:
    for kind in (geoopt.optim.RiemannianSGD, geoopt.optim.RiemannianAdam):
        found = check_optimizer(lambda model, groups, kind=kind: kind(groups, lr=0.1))
        known = GRADIENTS_OFF | NAN
        names = {result.name for result in failures(found)}
        assert names - {"state_round_trip"} == set(known)


def test_torch_s_optimizers() -> None:
    for kind in (torch.optim.SGD, torch.optim.Adam, torch.optim.RMSprop):
        found = check_optimizer(
            lambda model, groups, kind=kind: kind(groups, lr=0.05),
            manifold=geoopt.Euclidean(),
        )
        raise_failures(found, expected_failures=NAN)
    off = check_optimizer(lambda model, groups: torch.optim.SGD(groups, lr=0.05))
    assert "on_manifold" in {result.name for result in failures(off)}


def test_a_line_search() -> None:
    def factory(model: nn.Module, groups: Any) -> Any:
        flat = [p for group in groups for p in group["params"]]
        return geoopt.optim.RiemannianLineSearch(flat)

    known = {
        **GRADIENTS_OFF,
        **NAN,
        "state_round_trip": "the last losses and step lengths are not in its state",
        "group_rates": "it has one group and no rate",
        "schedule": "it has no rate",
    }
    raise_failures(
        check_optimizer(factory, closures=True, steps=10), expected_failures=known
    )


@pytest.mark.parametrize("law", mutants.OPTIMIZERS)
def test_the_law_rejects_its_mutant(law: str) -> None:
    found = {r.name: r for r in check_optimizer(mutants.OPTIMIZERS[law])}
    assert law in found
    assert not found[law].passed


def test_what_the_mutants_are_made_of_is_right() -> None:
    raise_failures(check_optimizer(mutants.GOOD))
    found = {r.name for r in failures(check_optimizer(mutants.ALSO_BAD_DATA))}
    assert "bad_data" in found


def test_every_law_has_a_mutant() -> None:
    found = {r.name for r in check_optimizer(OURS["plain"])}
    assert found == set(mutants.OPTIMIZERS)


# ---- the ways around geoopt's defects --------------------------------------------


def test_the_first_momentum_is_the_first_riemannian_gradient() -> None:
    x = geoopt.Sphere().random(3, 4).data
    e = torch.randn(3, 4)
    ends = []
    for seeded in (False, True):
        for normal in (0.0, 5.0):
            point = geoopt.ManifoldParameter(x.clone(), manifold=geoopt.Sphere())
            optimizer = geoopt.optim.RiemannianSGD([point], lr=0.1, momentum=0.9)
            if seeded:
                seed_momentum_(optimizer)
            # A normal part of the gradient says how the loss goes on off the sphere.
            point.grad = e + normal * x
            optimizer.step()
            ends.append(point.detach().clone())
    step = -0.1 * geoopt.Sphere().proju(x, e)
    wanted = geoopt.Sphere().retr(x, step)
    assert not torch.allclose(ends[0], ends[1])
    torch.testing.assert_close(ends[2], wanted)
    torch.testing.assert_close(ends[3], wanted)


def test_an_integer_stays_an_integer() -> None:
    point = geoopt.ManifoldParameter(torch.eye(2), manifold=geoopt.Sphere())
    optimizer = geoopt.optim.RiemannianAdam([point])
    point.grad = torch.randn(2, 2)
    optimizer.step()
    state = optimizer.state_dict()
    optimizer.load_state_dict(state)
    assert torch.is_tensor(optimizer.state[point]["step"])
    load_state_(optimizer, state)
    assert optimizer.state[point]["step"] == 1
    assert type(optimizer.state[point]["step"]) is int


def test_fletcher_reeves_divides_by_the_length_where_it_was() -> None:
    sphere = geoopt.Sphere()
    point = geoopt.ManifoldParameter(sphere.random(4), manifold=sphere)
    method, target = FletcherReeves(), torch.randn(4)
    betas, lengths = [], []

    def spy(params: Any, states: Any, **options: Any) -> float:
        betas.append(method(params, states, **options))
        lengths.append(float(states[point]["grad"].detach().square().sum()))
        return betas[-1]

    optimizer = geoopt.optim.RiemannianLineSearch(
        [point], cg_method=spy, line_search_method="wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        loss = (point * target).sum() + (point**3).sum()
        loss.backward()
        return float(loss.detach())

    for _ in range(4):
        optimizer.step(closure)
    assert betas[0] == 0.0
    for i in range(1, len(betas)):
        assert betas[i] == pytest.approx(lengths[i] / lengths[i - 1], rel=1e-9)
