"""With no factor and mass 1 nothing can be told from the base manifold."""

import copy
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from manifold_cases import GEOOPT, OURS, Case
from test_geoopt_contract import CARRIERS, named
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.manifolds import MetricManifold

X = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
TARGET = torch.tensor([0, 1, 2, 0, 1, 2, 1])


def views(case: Case, point: Tensor, mass: float = 1.0) -> list[MetricManifold]:
    """One that never met a metric, and one with a metric without a factor."""
    bare, bound = MetricManifold(case.make()), MetricManifold(case.make())
    space = rm.TangentSpace(bound.base, point, rm.Mass(scalar=mass), "w")
    bound.bind(rm.LayerMetric([rm.Part("w", space)]))
    return [bare, bound] if mass == 1.0 else [bound]


def answers(manifold: geoopt.Manifold, x: Tensor, e: Tensor) -> dict[str, Any]:
    """What every method of geoopt's interface says."""
    u = 0.1 * manifold.proju(x, e)
    v = manifold.proju(x, e.flip(-1))
    y = manifold.retr(x, u)
    calls: dict[str, tuple[Any, ...]] = {
        "projx": (x + 0.1 * e,),
        "proju": (x, e),
        "egrad2rgrad": (x, e.clone()),
        "retr": (x, u),
        "expmap": (x, u),
        "logmap": (x, y),
        "dist": (x, y),
        "dist2": (x, y),
        "transp": (x, y, v),
        "retr_transp": (x, u, v),
        "expmap_transp": (x, u, v),
        "transp_follow_retr": (x, u, v),
        "transp_follow_expmap": (x, u, v),
        "component_inner": (x, u, v),
        "check_point": (x,),
        "check_vector": (u,),
        "check_point_on_manifold": (x,),
        "check_vector_on_tangent": (x, u),
        "unpack_tensor": (x,),
    }
    found: dict[str, Any] = {}
    for name, arguments in calls.items():
        try:
            found[name] = getattr(manifold, name)(*arguments)
        except NotImplementedError:
            found[name] = "not implemented"
    found["one vector"] = manifold.component_inner(x, u)
    found["wrong point"] = manifold.check_point_on_manifold(5.0 * x + 1.0)
    found["inner"] = manifold.inner(x, u, v, keepdim=True)
    found["norm"] = manifold.norm(x, u, keepdim=True)
    found["kept dist"] = (
        manifold.dist(x, y, keepdim=True) if torch.is_tensor(found["dist"]) else None
    )
    found["properties"] = (manifold.ndim, manifold.device, manifold.dtype)
    found["representation"] = manifold.extra_repr()
    return found


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("case", CARRIERS, ids=named)
def test_every_method_is_the_base_s(case: Case, batch: tuple[int, ...]) -> None:
    base = case.make()
    x = case.draw(base, batch).detach().as_subclass(Tensor)
    e = torch.randn_like(x)
    wanted = answers(base, x, e)
    for view in views(case, x):
        found = answers(view, x, e)
        if view.metric is not None:
            found["representation"] = wanted["representation"]
        wrong = [name for name, value in wanted.items() if not same(found[name], value)]
        assert not wrong


@pytest.mark.parametrize("case", CARRIERS, ids=named)
def test_random_points_are_the_base_s(case: Case) -> None:
    base = case.make()
    x = case.draw(base).detach().as_subclass(Tensor)
    if case.random is not None or type(base) is geoopt.ProductManifold:
        return
    for view in views(case, x):
        for verb in ("random", "origin"):
            torch.manual_seed(7)
            wanted = getattr(base, verb)(2, *case.shape)
            torch.manual_seed(7)
            found = getattr(view, verb)(2, *case.shape)
            assert torch.equal(found.detach(), wanted.detach())
            assert found.manifold is view


@pytest.mark.parametrize("case", CARRIERS, ids=named)
def test_whatever_else_a_base_can_do(case: Case) -> None:
    base = case.make()
    for view in views(case, case.draw(base).detach().as_subclass(Tensor)):
        missing = [n for n in dir(base) if n[0] != "_" and not hasattr(view, n)]
        assert not missing
        with pytest.raises(AttributeError, match="no_such_thing"):
            view.no_such_thing  # noqa: B018


def test_methods_of_the_poincare_ball() -> None:
    base = geoopt.PoincareBall()
    view = MetricManifold(geoopt.PoincareBall())
    x, y = base.random(3, 2), base.random(3, 2)
    assert torch.equal(view.mobius_add(x, y), base.mobius_add(x, y))
    assert torch.equal(view.dist0(x), base.dist0(x))
    assert torch.equal(
        view.expmap(x, y, project=False), base.expmap(x, y, project=False)
    )
    assert float(view.c) == 1.0
    space = rm.TangentSpace(view.base, x.data, name="w")
    factor = rm.factors.DenseFactor(torch.randn(2, 3, 2))
    view.bind(rm.LayerMetric([rm.Part("w", space, factor)]))
    assert torch.equal(view.mobius_add(x, y), base.mobius_add(x, y))
    for verb in ("dist0", "logmap0", "geodesic_unit"):
        with pytest.raises(NotImplementedError, match=rf"{verb}.*release\(\)"):
            getattr(view, verb)(x)


@pytest.mark.parametrize("case", CARRIERS, ids=named)
def test_a_mass_alone_scales_the_base(case: Case) -> None:
    base, mass = case.make(), 2.5
    x = case.draw(base).detach().as_subclass(Tensor)
    e = torch.randn_like(x)
    (view,) = views(case, x, mass)
    wanted, found = answers(base, x, e), answers(view, x, e)
    factors = {"inner": mass, "component_inner": mass, "one vector": mass}
    factors |= {"norm": mass**0.5, "dist": mass**0.5, "kept dist": mass**0.5}
    factors |= {"dist2": mass, "egrad2rgrad": 1.0 / mass}
    for name, value in wanted.items():
        if isinstance(value, Tensor):
            factor = factors.get(name, 1.0)
            torch.testing.assert_close(found[name], factor * value, msg=name)


@pytest.mark.parametrize("make", [geoopt.PoincareBall, rm.manifolds.Lorentz])
def test_a_mass_scales_what_else_a_base_measures(make: Any) -> None:
    base = make()
    mass, t = 4.0, torch.tensor([[0.7], [0.2]])
    x = base.random(2, 3).data
    view = MetricManifold(base)
    space = rm.TangentSpace(view.base, x, rm.Mass(scalar=mass), "w")
    view.bind(rm.LayerMetric([rm.Part("w", space)]))
    u = base.proju(x, torch.randn(2, 3))
    y = view.geodesic_unit(t, x, u / view.norm(x, u).unsqueeze(-1))
    torch.testing.assert_close(view.dist(x, y, keepdim=True), t)
    torch.testing.assert_close(view.dist0(x), 2.0 * base.dist0(x))
    if isinstance(base, geoopt.PoincareBall):
        p = 0.1 * torch.randn(3)
        torch.testing.assert_close(
            view.dist2plane(x, p, u), 2.0 * base.dist2plane(x, p, u)
        )
        assert torch.equal(view.geodesic(t, x, y), base.geodesic(t, x, y))
    else:
        torch.testing.assert_close(view.inner0(u), mass * base.inner0(u))


def test_a_diagonal_mass_is_another_flat_metric() -> None:
    diagonal = torch.tensor([[1.0, 4.0], [9.0, 2.0]])
    x, u, v = torch.randn(3, 2, 2).unbind()
    view = MetricManifold(geoopt.Euclidean(ndim=2))
    space = rm.TangentSpace(view.base, x, rm.Mass(diagonal=diagonal), "w")
    view.bind(rm.LayerMetric([rm.Part("w", space)]))
    torch.testing.assert_close(view.inner(x, u, v), (diagonal * u * v).sum())
    torch.testing.assert_close(view.norm(x, u), (diagonal * u * u).sum().sqrt())
    torch.testing.assert_close(view.egrad2rgrad(x, u), u / diagonal)
    wanted = (diagonal * (u - x).square()).sum()
    torch.testing.assert_close(view.dist(x, u), wanted.sqrt())
    torch.testing.assert_close(view.dist2(x, u), wanted)
    torch.testing.assert_close(view.logmap(x, u), u - x)


# ---- trajectories ----------------------------------------------------------------

Optimizer = Callable[[list[Any]], torch.optim.Optimizer]
OPTIMIZERS: dict[str, Optimizer] = {
    "sgd": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.05),
    "momentum": lambda p: geoopt.optim.RiemannianSGD(p, lr=0.05, momentum=0.8),
    "nesterov": lambda p: geoopt.optim.RiemannianSGD(
        p, lr=0.05, momentum=0.8, nesterov=True, weight_decay=0.1
    ),
    "adam": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.05, stabilize=2),
    "amsgrad": lambda p: geoopt.optim.RiemannianAdam(p, lr=0.05, amsgrad=True),
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("case", CARRIERS, ids=named)
def test_geoopt_s_optimizers_go_the_same_way(case: Case, kind: str) -> None:
    base = case.make()
    x = case.draw(base).detach().as_subclass(Tensor)
    target = torch.randn_like(x)
    ends = []
    for manifold in (base, *views(case, x)):
        parameter = geoopt.ManifoldParameter(x.clone(), manifold=manifold)
        optimizer = OPTIMIZERS[kind]([parameter])
        for _ in range(5):
            optimizer.zero_grad()
            (parameter * target).sum().backward()
            optimizer.step()
        ends.append(parameter.detach().as_subclass(Tensor))
    assert not torch.equal(ends[0], x)
    for end in ends[1:]:
        assert torch.equal(end, ends[0])


def chain(manifold: geoopt.Manifold, shape: tuple[int, int]) -> nn.Sequential:
    out, width = shape
    return rm.nn.Sequential(
        nn.Linear(5, width, dtype=torch.float64),
        nn.Tanh(),
        rm.nn.Linear(width, out, manifold=manifold),
        nn.Tanh(),
        nn.Linear(out, 3, dtype=torch.float64),
    )


WEIGHTS = [c for c in OURS if len(c.shape) == 2]


@pytest.mark.parametrize("case", WEIGHTS, ids=named)
def test_the_library_s_optimizer_goes_geoopt_s_way(case: Case) -> None:
    model = chain(case.make(), case.shape)
    twin = copy.deepcopy(model)
    metric = rm.LayerwiseMetric(model, output=None, mass=1.0)
    ours = rm.optim.RiemannianSGD(metric, lr=0.05)
    theirs = geoopt.optim.RiemannianSGD(twin.parameters(), lr=0.05)
    for _ in range(10):
        with metric.record():
            z = model(X)
        metric.backward(F.cross_entropy(z, TARGET), z)
        ours.step()
        theirs.zero_grad()
        F.cross_entropy(twin(X), TARGET).backward()
        theirs.step()
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.detach(), other.detach(), rtol=0.0, atol=1e-12)


def test_the_cases_are_all_that_is_shipped() -> None:
    assert set(CARRIERS) >= set(OURS)
    assert len(CARRIERS) > len(OURS)
    refused = {case.name for case in GEOOPT} - {c.name for c in CARRIERS}
    assert "Lorentz" not in {c.name for c in CARRIERS if c in GEOOPT}
    assert {"UpperHalf", "BoundedDomain"} <= refused
