"""The Poincare ball in plain formulas: geoopt's values and all transforms."""

import math
import sys
import warnings
from typing import Any

import geoopt
import pytest
import torch
from torch import Tensor, nn

import riemannian_modules as rm

Ball = rm.manifolds.PoincareBall


def inside(c: float, *shape: int) -> Tensor:
    v = torch.randn(*shape, dtype=torch.float64)
    sizes = 0.8 * torch.rand(*shape[:-1], 1, dtype=torch.float64)
    return v / v.norm(dim=-1, keepdim=True) * sizes / c**0.5


def calls(c: float) -> dict[str, tuple[Any, ...]]:
    x, y, z = (inside(c, 5, 3) for _ in range(3))
    u, v = torch.randn(2, 5, 3, dtype=torch.float64)
    t = torch.rand(5, 1, dtype=torch.float64)
    unit = u / Ball(c).norm(x, u, keepdim=True)
    return {
        "lambda_x": (x,),
        "norm": (x, u),
        "egrad2rgrad": (x, u),
        "projx": (5.0 * x,),
        "retr": (x, u),
        "dist": (x, y),
        "dist2": (x, y),
        "dist0": (x,),
        "dist2plane": (x, y, u),
        "expmap": (x, u),
        "expmap0": (u,),
        "logmap": (x, y),
        "logmap0": (x,),
        "geodesic": (t, x, y),
        "geodesic_unit": (t, x, unit),
        "transp": (x, y, v),
        "transp0": (x, u),
        "transp0back": (x, u),
        "mobius_add": (x, y),
        "mobius_sub": (x, y),
        "mobius_coadd": (x, y),
        "mobius_cosub": (x, y),
        "gyration": (x, y, z),
        "mobius_scalar_mul": (t, x),
        "mobius_pointwise_mul": (u, x),
        "mobius_matvec": (torch.randn(4, 3, dtype=torch.float64), x),
        "mobius_fn_apply": (torch.sin, x),
        "mobius_fn_apply_chain": (x, torch.sin, torch.cos),
    }


@pytest.mark.parametrize("c", [1.0, 0.3])
def test_the_formulas_have_the_values_of_geoopt(c: float) -> None:
    torch.manual_seed(0)
    curvature = torch.tensor(c, dtype=torch.float64)
    ours, theirs = Ball(curvature.clone()), geoopt.PoincareBall(curvature.clone())
    close = {"rtol": 1e-10, "atol": 1e-12}
    for name, args in calls(c).items():
        found, wanted = getattr(ours, name)(*args), getattr(theirs, name)(*args)
        torch.testing.assert_close(found, wanted, **close, msg=name)
        if name not in {"mobius_matvec", "mobius_fn_apply_chain"}:
            turned = [a.mT if isinstance(a, Tensor) else a for a in args]
            other = getattr(ours, name)(*turned, dim=0)
            other = other.mT if other.ndim == 2 else other
            torch.testing.assert_close(other, wanted, **close, msg=f"{name}, dim=0")
    x, y, u = calls(c)["dist2plane"]
    for options in ({"signed": True}, {"scaled": True, "keepdim": True}):
        torch.testing.assert_close(
            ours.dist2plane(x, y, u, **options),
            theirs.dist2plane(x, y, u, **options),
            **close,
        )
    inner = ours.inner(x, u, y)
    torch.testing.assert_close(inner, theirs.inner(x, u, y, keepdim=True)[:, 0])


@pytest.mark.parametrize("radius", [0.1, 0.999, 1.0 - 1e-5])
@pytest.mark.parametrize("step", [1e-9, 1e-3, 0.9])
def test_near_points_keep_their_distance(radius: float, step: float) -> None:
    """Along a radius, where the distance has a closed form."""
    ball = Ball(torch.tensor(1.0, dtype=torch.float64))
    x = torch.tensor([radius, 0.0], dtype=torch.float64)
    y = torch.tensor([radius - step * (1.0 - radius), 0.0], dtype=torch.float64)
    gap = float(x[0] - y[0])
    wanted = 2.0 * math.atanh(gap / (1.0 - float(x[0]) * float(y[0])))
    assert float(ball.dist(x, y)) == pytest.approx(wanted, rel=1e-10)
    assert float(ball.dist2(x, y)) == pytest.approx(wanted**2, rel=1e-10)
    u = ball.logmap(x, y)
    assert float(ball.norm(x, u)) == pytest.approx(wanted, rel=1e-10)
    v = torch.tensor([0.3, -0.7], dtype=torch.float64)
    there = ball.transp(x, y, v)
    assert float(ball.norm(y, there)) == pytest.approx(float(ball.norm(x, v)), 1e-10)
    torch.testing.assert_close(ball.transp(y, x, there), v, rtol=1e-10, atol=1e-12)


def test_the_squared_distance_has_two_derivatives_between_equal_points() -> None:
    ball = Ball(torch.tensor(1.0, dtype=torch.float64))
    x = torch.tensor([0.3, -0.4], dtype=torch.float64)
    found = torch.func.hessian(lambda y: ball.dist2(x, y))(x)
    metric = 2.0 * float(ball.lambda_x(x)) ** 2 * torch.eye(2, dtype=torch.float64)
    torch.testing.assert_close(found, metric)


@pytest.mark.parametrize("verb", ["dist", "logmap", "expmap", "transp", "mobius_add"])
def test_every_transform_after_reverse_passes(verb: str) -> None:
    torch.manual_seed(0)
    ball = Ball(torch.tensor(1.0, dtype=torch.float64))
    x, y, v = (inside(1.0, 6, 3) for _ in range(3))
    more = (v,) if verb == "transp" else ()

    def total(x: Tensor, y: Tensor) -> Tensor:
        found: Tensor = getattr(ball, verb)(x, y, *more).sin().sum()
        return found

    for _ in range(3):
        a, b = (each.clone().requires_grad_() for each in (x, y))
        expected = torch.autograd.grad(total(a, b), (a, b))
        slope = torch.func.jvp(total, (x, y), (v, x))[1]
        wanted = (expected[0] * v).sum() + (expected[1] * x).sum()
        torch.testing.assert_close(slope, wanted)

        def one(*each: Tensor) -> Tensor:
            found: Tensor = getattr(ball, verb)(*each).sin().sum()
            return found

        mapped = torch.func.vmap(torch.func.grad(one))(x, y, *more)
        torch.testing.assert_close(mapped, expected[0])


class Distances(nn.Module):
    def __init__(self, ball: geoopt.PoincareBall) -> None:
        super().__init__()
        self.ball = ball
        self.points = nn.Parameter(inside(1.0, 6, 2))

    def forward(self, pairs: Tensor) -> Tensor:
        x, y = self.points[pairs[:, 0]], self.points[pairs[:, 1]]
        found: Tensor = self.ball.dist(x, y).unsqueeze(1)
        return found


@pytest.mark.filterwarnings("error")
def test_distances_are_differentiated_all_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ball = Ball(torch.tensor(1.0, dtype=torch.float64))
    torch.manual_seed(0)
    model = Distances(ball)
    rm.geometrize(model, {"points": ball})
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(2.0))
    pairs = torch.triu_indices(6, 6, 1).T
    # Else the look-ups are found in the graph, and nothing is replayed.
    lookups = sys.modules["riemannian_modules.rules.lookups"]
    monkeypatch.setattr(lookups, "saved_as_they_are", lambda: False)
    looped: list[int] = []
    replay = sys.modules["riemannian_modules.rules.single"].Replay
    plain = replay._rows_in_a_loop

    def spy(self: Any, which: Any, scale: float = 1.0) -> Any:
        looped.append(len(which))
        return plain(self, which, scale)

    monkeypatch.setattr(replay, "_rows_in_a_loop", spy)
    for _ in range(4):
        with metric.record():
            z = model(pairs)
        metric.backward((z - 1.0).square().mean(), z)
    assert max(looped) <= 3, "some examples are compared, in the first pass"


class Unmapped(torch.autograd.Function):
    """Twice a tensor, without a rule for vmap."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2.0 * x

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return 2.0 * gradient


class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        return Unmapped.apply(x * self.scale.square())


@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_over_examples_is_said_once(compiled: bool) -> None:
    scales = Scales()
    if compiled:
        scales.compile(backend="eager")
    model = nn.Sequential(scales, nn.Linear(3, 2))
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(2.0))
    x = torch.randn(4, 3)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(3):
            with metric.record():
                z = model(x)
            metric.backward(z.square().mean(), z)
    told = [str(w.message) for w in said if "one by one" in str(w.message)]
    assert len(told) == (not compiled)
    for part in ("layer '0'", "vmap (", "manifolds.PoincareBall"):
        assert compiled or part in told[0]
