"""Steps that would end off an open manifold: refused, and nothing is changed."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import manifolds
from riemannian_modules.errors import NonFiniteError, NotOnManifoldError
from riemannian_modules.manifolds.boundary import definite, inside, singular
from riemannian_modules.manifolds.declaring import left_by_step, off_manifold
from riemannian_modules.optim.plan import arrived
from riemannian_modules.optim.trial import Trial
from riemannian_modules.retractions import Default, Exponential, Retraction

OPEN: dict[str, tuple[Callable[[], geoopt.Manifold], tuple[int, ...], Retraction]] = {
    "spd": (manifolds.SPD, (3, 3), Exponential()),
    "log_euclidean": (manifolds.LogEuclideanSPD, (3, 3), Default()),
    "positive": (manifolds.Positive, (3, 3), Exponential()),
    "scaled": (
        lambda: manifolds.Scaled(manifolds.LogEuclideanSPD(), 2.0),
        (3, 3),
        Default(),
    ),
    "reshaped": (
        lambda: manifolds.Reshaped(manifolds.SPD(), (9,), (3, 3)),
        (9,),
        Exponential(),
    ),
    "product": (
        lambda: manifolds.Product(
            {"a": (manifolds.Sphere(), (2,)), "b": (manifolds.Positive(), (3,))}
        ),
        (5,),
        Exponential(),
    ),
}


class Weight(nn.Module):
    """A linear function of a point."""

    def __init__(self, manifold: geoopt.Manifold, shape: tuple[int, ...]) -> None:
        super().__init__()
        start = manifold.origin(*shape).as_subclass(Tensor)
        self.point = geoopt.ManifoldParameter(start, manifold=manifold)
        self.rate = torch.linspace(0.1, 1.0, start.numel()).view(shape)

    def forward(self, x: Tensor) -> Tensor:
        point = self.point.as_subclass(Tensor)
        return x * (point * self.rate).sum()


def problem(
    kind: str,
) -> tuple[Weight, rm.LayerwiseMetric, Retraction, Callable[[], Tensor]]:
    """A loss without a floor, so steep that the first step is much too long."""
    make, shape, retraction = OPEN[kind]
    model = Weight(make(), shape)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1e-3)
    x = torch.ones(2, 1)

    def loss() -> Tensor:
        return 4e3 * model(x).mean()

    with metric.record():
        outputs = model(x)
    metric.backward(4e3 * outputs.mean(), outputs)
    return model, metric, retraction, loss


def plain(model: Weight) -> Tensor:
    return model.point.detach().as_subclass(Tensor).clone()


@pytest.mark.parametrize("kind", OPEN)
def test_a_step_off_the_manifold_is_refused(kind: str) -> None:
    model, metric, retraction, _ = problem(kind)
    optimizer = rm.optim.RiemannianSGD(
        metric, lr=1.0, momentum=0.5, retraction=retraction
    )
    before = plain(model)
    numbers = "entry is 0" if kind in {"positive", "product"} else "begin at .* largest"
    with pytest.raises(NotOnManifoldError, match=rf"'point'.*{numbers}.*lower the"):
        optimizer.step()
    assert torch.equal(plain(model), before)
    assert not optimizer.state
    optimizer.param_groups[0]["lr"] = 1e-6
    optimizer.step()
    assert not torch.equal(plain(model), before)
    assert off_manifold(OPEN[kind][0](), plain(model), torch.float64) is None


@pytest.mark.parametrize("kind", ["LineSearch", "TrustRegion", "LevenbergMarquardt"])
@pytest.mark.parametrize("name", OPEN)
def test_a_trial_point_off_the_manifold_is_one_more_that_is_too_bad(
    kind: str, name: str
) -> None:
    model, metric, retraction, loss = problem(name)
    optimizer = getattr(rm.optim, kind)(metric, retraction=retraction)
    start, manifold, seen = float(loss().detach()), OPEN[name][0](), []

    def closure() -> Tensor:
        seen.append(plain(model))
        assert off_manifold(manifold, seen[-1], torch.float64) is None
        return loss()

    reached = optimizer.step(closure)
    assert reached < start
    assert len(seen) < optimizer.report.trials
    assert torch.equal(plain(model), seen[-1])


def test_gauss_newton_shortens_a_step_off_the_manifold() -> None:
    model, metric, retraction, _ = problem("log_euclidean")
    optimizer = rm.optim.GaussNewton(metric, retraction=retraction)
    seen = []

    def outputs() -> Tensor:
        seen.append(plain(model))
        assert definite(seen[-1])
        return model(torch.ones(2, 1))

    optimizer.step(outputs, lambda z: 4e3 * z.mean())
    assert optimizer.report.accepted
    assert len(seen) < 1 + optimizer.report.trials


def test_the_search_says_that_a_manifold_may_have_been_left() -> None:
    model, metric, retraction, loss = problem("positive")
    optimizer = rm.optim.LineSearch(metric, retraction=retraction, lr=1e30)
    before = plain(model)
    with pytest.raises(NonFiniteError, match="or a manifold left"):
        optimizer.step(loss)
    assert torch.equal(plain(model), before)


@pytest.mark.parametrize("kind", [manifolds.SPD, manifolds.LogEuclideanSPD])
def test_a_step_whose_retraction_fails_has_no_end_point(
    kind: Callable[[], geoopt.Manifold],
) -> None:
    model = Weight(kind(), (3, 3))
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1e-3)
    with metric.record():
        outputs = model(torch.ones(2, 1))
    metric.backward(outputs.mean(), outputs)

    @dataclasses.dataclass(frozen=True)
    class Failing(Default):
        def __call__(self, manifold: Any, point: Tensor, tangent: Tensor) -> Tensor:
            return torch.linalg.cholesky(-point)

    optimizer = rm.optim.RiemannianSGD(metric, lr=1.0, retraction=Failing())
    before = plain(model)
    with pytest.raises(NonFiniteError, match="no finite end point"):
        optimizer.step()
    trial = Trial(metric.gradients.moving(), Failing())
    trial.move({"point": torch.eye(3)})
    assert trial.value(lambda: 0.0) == math.inf
    assert torch.equal(plain(model), before)


def test_a_refused_trial_leaves_the_parameters_and_is_forgotten() -> None:
    model, metric, _, _ = problem("positive")
    trial = Trial(metric.gradients.moving(), Exponential())
    start, u = plain(model), torch.full((3, 3), -1.0)
    trial.move({"point": u})
    near = plain(model)
    assert trial.value(lambda: 5.0) == 5.0
    for length in (1e4, math.nan):
        trial.move({"point": length * u})
        assert trial.value(lambda: 5.0) == math.inf
        assert torch.equal(plain(model), near)
    trial.restore()
    assert torch.equal(plain(model), start)
    assert trial.value(lambda: 5.0) == 5.0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("n", [1, 2, 5, 40])
def test_what_is_definite_has_no_least_eigenvalue_of_rounding(
    n: int, dtype: torch.dtype
) -> None:
    wide = torch.promote_types(dtype, torch.float32)
    eps, passed = torch.finfo(wide).eps, 0
    assert definite(torch.eye(n, dtype=dtype).expand(3, n, n))
    for least in (-1.0, 0.0, *(2.0**k for k in range(14))):
        basis = torch.linalg.qr(torch.randn(20, n, n))[0]
        values = torch.full((n,), 1.0 if least % 3 else 0.1)
        values[0], values[-1] = least * eps, values[0] if n == 1 else 1.0
        x = ((basis * values) @ basis.mT).to(wide)
        x = 0.5 * (x + x.mT)
        for each in x:
            if definite(each):
                passed += 1
                assert singular(each) is None
    assert passed > 20
    assert not definite(torch.full((n, n), math.nan, dtype=dtype))
    bad = torch.eye(n, dtype=dtype).repeat(3, 1, 1)
    bad[1, 0, 0] = 0.0
    assert not definite(bad)


def test_near_the_boundary_the_check_of_the_manifold_decides() -> None:
    eps = torch.finfo(torch.float64).eps
    x = torch.diag(torch.tensor([1.0, 1.0, 1.0, 10.0 * eps]))
    assert singular(x) is None
    assert not definite(x)
    for manifold in (manifolds.SPD(), manifolds.LogEuclideanSPD()):
        assert left_by_step(manifold, x) is None
        assert left_by_step(manifold, x - 9.0 * eps * torch.eye(4)) is not None


def test_devices_that_are_not_waited_for_get_a_flag() -> None:
    model, metric, _, _ = problem("spd")
    optimizer = rm.optim.RiemannianSGD(metric, lr=1.0)
    plans = rm.optim.plan.plans_of(optimizer, metric)
    fine, low = torch.eye(3), torch.diag(torch.tensor([1.0, 1.0, -1e-3]))
    total = [torch.tensor(1.0, dtype=torch.float32), torch.tensor(2.0)]
    assert arrived(plans, {"point": fine}, total)
    assert arrived(plans, {"point": None}, total)
    assert not arrived(plans, {"point": low}, total)
    assert not arrived(plans, {"point": math.nan * fine}, total)
    assert not arrived(plans, {"point": math.inf * fine}, total)
    assert not arrived(plans, {"point": fine}, [*total, torch.tensor(math.nan)])
    assert plain(model).equal(fine)


def test_only_open_manifolds_that_steps_leave_are_looked_at() -> None:
    x = torch.full((4,), -1.0)
    assert inside(manifolds.Sphere(), x) is None
    assert inside(manifolds.Product({"a": (manifolds.Sphere(), (4,))}), x) is None
    assert left_by_step(manifolds.Sphere(), x) is None
    assert left_by_step(manifolds.SPD(), torch.empty(3, 3, device="meta")) is None


LONG = {
    "ball": (manifolds.PoincareBall, (4,)),
    "lorentz": (manifolds.Lorentz, (4,)),
    "birkhoff": (manifolds.BirkhoffPolytope, (3, 3)),
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("length", [1.0, 1e2, 1e4, 1e8, 1e16, 1e30])
def test_no_step_leads_out_of_the_other_open_manifolds(
    kind: str, length: float
) -> None:
    make, shape = LONG[kind]
    manifold = make()
    x = manifold.random(*shape).as_subclass(Tensor)
    u = manifold.proju(x, length * torch.randn(shape))
    y = manifold.retr(x, u)
    if bool(y.isfinite().all()):
        assert off_manifold(manifold, y, y.dtype) is None


def test_a_mixture_never_sees_a_covariance_that_is_none() -> None:
    """The steps grow until rounding decides the sign of an eigenvalue."""
    torch.manual_seed(0)
    centres = torch.randn(3, 4)
    x = centres.repeat(50, 1) + 0.1 * torch.randn(150, 4)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mean = nn.Parameter(centres.clone())
            start = 0.5 * torch.eye(4).repeat(3, 1, 1)
            self.spread = geoopt.ManifoldParameter(start, manifold=manifolds.SPD())

        def forward(self, x: Tensor) -> Tensor:
            lower = torch.linalg.cholesky(self.spread.as_subclass(Tensor))
            away = (x[:, None] - self.mean).unsqueeze(-1)
            y = torch.linalg.solve_triangular(lower, away, upper=False).squeeze(-1)
            logs = lower.diagonal(dim1=-1, dim2=-2).log().sum(-1)
            return -0.5 * y.square().sum(-1) - logs

    model = Mixture()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=1e-1)
    optimizer = rm.optim.RiemannianSGD(metric, floor=None)

    def train() -> None:
        for _ in range(40):
            with metric.record():
                z = model(x)
            metric.backward(-z.logsumexp(1).mean(), z)
            optimizer.step()

    with pytest.raises(NotOnManifoldError, match=r"'spread'.*begin at"):
        train()
    model(x)
