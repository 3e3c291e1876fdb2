"""MetricManifold keeps geoopt's contract, with and without a factor."""

import copy
import io
import pickle

import geoopt
import pytest
import torch
from torch import Tensor

import riemannian_modules as rm
from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds import MetricManifold
from riemannian_modules.testing import check_base_manifold, failures

MASS = 0.3
BASES: dict[str, geoopt.Manifold] = {
    "Euclidean": rm.manifolds.Euclidean(),
    "Stiefel": rm.manifolds.Stiefel(),
    "CanonicalStiefel": rm.manifolds.CanonicalStiefel(),
    "Sphere": rm.manifolds.Sphere(),
    "PoincareBall": rm.manifolds.PoincareBall(c=torch.tensor(1.0, dtype=torch.float64)),
    "SPD": rm.manifolds.SPD(),
}
SHAPES = {"SPD": (4, 4)}


def point_on(name: str) -> Tensor:
    size = SHAPES.get(name, (3, 4))
    if name == "SPD":
        a = torch.randn(size)
        return a @ a.mT + torch.eye(4)
    if name == "PoincareBall":
        return torch.as_tensor(BASES[name].projx(0.3 * torch.randn(size))).detach()
    point = BASES[name].random(*size, dtype=torch.float64)
    return point.detach().as_subclass(torch.Tensor)


def bound(name: str, rank: int = 5) -> tuple[MetricManifold, Tensor, rm.LayerMetric]:
    base, x = BASES[name], point_on(name)
    space = rm.TangentSpace(base, x, rm.Mass(scalar=MASS), "w")
    factor = rm.factors.DenseFactor(torch.randn(rank, *x.shape))
    metric = rm.LayerMetric([rm.Part("w", space, factor)])
    manifold = MetricManifold(base)
    manifold.bind(metric)
    return manifold, x, metric


def tangents(name: str, x: Tensor, count: int = 2) -> list[Tensor]:
    return [BASES[name].proju(x, torch.randn_like(x)) for _ in range(count)]


@pytest.mark.parametrize("name", BASES)
def test_inner_and_sharp_are_those_of_the_metric(name: str) -> None:
    manifold, x, metric = bound(name)
    u, v = tangents(name, x)
    e = torch.randn_like(x)
    assert manifold.metric is metric
    torch.testing.assert_close(manifold.inner(x, u, v), metric.inner(u, v))
    torch.testing.assert_close(manifold.inner(x, u), metric.inner(u, u))
    torch.testing.assert_close(manifold.egrad2rgrad(x, e), metric.sharp(e))
    assert float(manifold.norm(x, u)) == pytest.approx(float(metric.norm(u)))


@pytest.mark.parametrize("moved", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_the_riesz_identity(name: str, moved: bool) -> None:
    manifold, x, metric = bound(name)
    if moved:
        x = BASES[name].retr(x, 0.3 * tangents(name, x, 1)[0])
    e = torch.randn_like(x)
    before = e.clone()
    gradient = manifold.egrad2rgrad(x, e)
    assert torch.equal(e, before)
    for v in tangents(name, x, 4):
        expected = (e * v).sum()
        torch.testing.assert_close(
            manifold.inner(x, gradient, v), expected, rtol=1e-9, atol=1e-9
        )
        rows = metric.parts[0].factor.to_dense()
        base = BASES[name].inner(x, gradient, v, keepdim=True).sum()
        by_hand = MASS * base + (rows @ gradient.flatten()) @ (rows @ v.flatten())
        torch.testing.assert_close(by_hand, expected, rtol=1e-9, atol=1e-9)
    tangent = BASES[name].proju(x, gradient)
    torch.testing.assert_close(gradient, tangent, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", BASES)
def test_normal_covectors_do_not_move(name: str) -> None:
    manifold, x, _ = bound(name)
    normal = torch.randn_like(x)
    normal = normal - BASES[name].proju(x, normal)
    if name in ("Euclidean", "PoincareBall"):
        assert float(normal.norm()) < 1e-12
        return
    assert float(normal.norm()) > 1e-3
    assert float(manifold.egrad2rgrad(x, normal).norm()) < 1e-10


@pytest.mark.parametrize("name", BASES)
def test_without_a_factor_it_is_the_base(name: str) -> None:
    base, x = BASES[name], point_on(name)
    manifold = MetricManifold(base)
    u, v = tangents(name, x)
    e = torch.randn_like(x)
    kept = base.inner(x, u, v, keepdim=True)
    assert torch.equal(manifold.inner(x, u, v, keepdim=True), kept)
    # Without keepdim geoopt's Poincare ball mixes up the points of a batch.
    shape = kept.shape[: kept.ndim - base.ndim]
    assert torch.equal(manifold.inner(x, u, v), kept.reshape(shape))
    if name != "PoincareBall":
        assert torch.equal(manifold.inner(x, u, v), base.inner(x, u, v))
    assert torch.equal(manifold.egrad2rgrad(x, e), base.egrad2rgrad(x, e.clone()))
    assert manifold.metric is None
    assert not failures(check_base_manifold(manifold, x))


@pytest.mark.parametrize("with_factor", [False, True])
@pytest.mark.parametrize("name", BASES)
def test_points_and_vectors_are_the_base_s(name: str, with_factor: bool) -> None:
    base = BASES[name]
    manifold, x, _ = bound(name)
    if not with_factor:
        manifold.release()
    u, v = (0.1 * w for w in tangents(name, x))
    y = base.retr(x, u)
    ambient = x + 0.01 * torch.randn_like(x)
    assert torch.equal(manifold.retr(x, u), y)
    assert torch.equal(manifold.expmap(x, u), base.expmap(x, u))
    assert torch.equal(manifold.projx(ambient), base.projx(ambient))
    assert torch.equal(manifold.proju(x, ambient), base.proju(x, ambient))
    assert torch.equal(manifold.transp(x, y, v), base.transp(x, y, v))
    point, moved = manifold.retr_transp(x, u, v)
    assert torch.equal(point, y)
    assert torch.equal(moved, base.retr_transp(x, u, v)[1])
    assert manifold.check_point_on_manifold(x)
    assert manifold.check_vector_on_tangent(x, u)
    assert manifold.check_point(x)
    assert manifold.ndim == (x.ndim if with_factor else base.ndim)
    assert base.name in manifold.name
    if name != "Euclidean":
        off = -x if name == "SPD" else 5.0 * x + 1.0
        assert not manifold.check_point_on_manifold(off)
    if name not in ("Euclidean", "PoincareBall"):
        assert not manifold.check_vector_on_tangent(x, torch.randn_like(x))


@pytest.mark.parametrize("name", ["Euclidean", "Sphere", "PoincareBall", "SPD"])
def test_geodesics_of_a_factor_are_refused(name: str) -> None:
    manifold, x, _ = bound(name)
    y = BASES[name].retr(x, 0.1 * tangents(name, x, 1)[0])
    for verb in (manifold.dist, manifold.logmap):
        with pytest.raises(NotImplementedError, match=r"release\(\)"):
            verb(x, y)
    manifold.release()
    assert torch.equal(manifold.dist(x, y), BASES[name].dist(x, y))
    assert torch.equal(
        manifold.dist(x, y, keepdim=True), BASES[name].dist(x, y, keepdim=True)
    )
    assert torch.equal(manifold.logmap(x, y), BASES[name].logmap(x, y))


@pytest.mark.parametrize("name", BASES)
def test_keepdim_makes_a_number_that_broadcasts(name: str) -> None:
    manifold, x, metric = bound(name)
    u, v = tangents(name, x)
    kept = manifold.inner(x, u, v, keepdim=True)
    assert kept.shape == (1, 1)
    assert float(kept) == pytest.approx(float(metric.inner(u, v)))
    assert manifold.inner(x, u, v).shape == ()
    assert manifold.component_inner(x, u, v).expand_as(x).shape == x.shape


@pytest.mark.parametrize("name", BASES)
def test_copies_and_pickles_drop_the_factor(name: str) -> None:
    manifold, x, metric = bound(name)
    twins = [copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold))]
    buffer = io.BytesIO()
    torch.save(manifold, buffer)
    buffer.seek(0)
    twins.append(torch.load(buffer, weights_only=False))
    for twin in twins:
        assert twin.metric is None
        assert type(twin.base) is type(manifold.base)
        assert twin.base is not manifold.base
        assert twin != manifold
        e = torch.randn_like(x)
        assert torch.equal(
            twin.egrad2rgrad(x, e), manifold.base.egrad2rgrad(x, e.clone())
        )
        twin.bind(metric)
        assert twin.metric is metric
    assert manifold.metric is metric


def test_a_pickle_does_not_hold_the_factor_s_activations() -> None:
    manifold, _, _ = bound("Stiefel", rank=20_000)
    assert len(pickle.dumps(manifold)) < 10_000


@pytest.mark.parametrize("name", BASES)
def test_parameters_keep_their_manifold_when_copied(name: str) -> None:
    manifold, x, metric = bound(name)
    parameter = geoopt.ManifoldParameter(x.clone(), manifold=manifold)
    for twin in (copy.deepcopy(parameter), pickle.loads(pickle.dumps(parameter))):
        assert isinstance(twin, geoopt.ManifoldParameter)
        assert isinstance(twin.manifold, MetricManifold)
        assert type(twin.manifold.base) is type(manifold.base)
        assert twin.manifold.metric is None
        assert torch.equal(twin, parameter)
        assert twin.requires_grad
    assert manifold.metric is metric


def test_shared_manifolds_stay_shared_in_a_copy() -> None:
    manifold = MetricManifold(rm.manifolds.Sphere())
    first, second = copy.deepcopy([manifold, manifold])
    assert first is second
    assert hash(first) != hash(manifold)


@pytest.mark.parametrize("name", ["Euclidean", "Stiefel", "Sphere"])
def test_random_points_carry_the_view(name: str) -> None:
    manifold = MetricManifold(BASES[name])
    for point in (
        manifold.random(3, 4, dtype=torch.float32),
        manifold.origin(3, 4, dtype=torch.float32),
    ):
        assert point.manifold is manifold
        assert point.dtype == torch.float32
        assert BASES[name].check_point_on_manifold(point, atol=1e-5)


def test_the_representation_shows_the_rank() -> None:
    manifold, _, _ = bound("Sphere", rank=7)
    assert "Metric(Sphere)" in repr(manifold)
    assert "rank=7" in repr(manifold)
    manifold.release()
    assert "rank" not in repr(manifold)


def test_buffers_of_the_base_are_registered() -> None:
    manifold = MetricManifold(rm.manifolds.PoincareBall(c=0.5))
    assert {p.dtype for p in manifold.base.buffers()} | {
        p.dtype for p in manifold.base.parameters()
    }
    twin = copy.deepcopy(manifold)
    assert float(twin.base.c) == 0.5


@pytest.mark.parametrize(
    "base", [geoopt.Stiefel(), MetricManifold(rm.manifolds.Sphere()), "Sphere"]
)
def test_bases_that_are_refused(base: object) -> None:
    with pytest.raises(ManifoldContractError, match=r"use|base|subclass"):
        MetricManifold(base)


def test_a_bound_manifold_serves_geoopt_tensors() -> None:
    manifold, x, metric = bound("Sphere")
    point = geoopt.ManifoldTensor(x.clone(), manifold=manifold)
    u, v = tangents("Sphere", x)
    torch.testing.assert_close(point.inner(u, v), metric.inner(u, v))
    torch.testing.assert_close(point.proju(x + u), BASES["Sphere"].proju(x, x + u))


def test_inner_is_in_the_precision_of_the_vectors() -> None:
    base = rm.manifolds.Sphere()
    x = base.random(3, 4, dtype=torch.float32).detach().as_subclass(torch.Tensor)
    factor = rm.factors.DenseFactor(torch.randn(5, 3, 4, dtype=torch.float32))
    manifold = MetricManifold(base)
    manifold.bind(rm.LayerMetric([rm.Part("w", rm.TangentSpace(base, x), factor)]))
    u = base.proju(x, torch.randn_like(x))
    assert manifold.inner(x, u).dtype == torch.float32
    assert manifold.egrad2rgrad(x, u).dtype == torch.float32


def test_two_parameters_cannot_share_a_metric() -> None:
    view = MetricManifold(rm.manifolds.Sphere())

    class Shared(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for name in ("a", "b"):
                point = rm.manifolds.Sphere().random(2, 3).data
                setattr(self, name, geoopt.ManifoldParameter(point, manifold=view))

    with pytest.raises(ManifoldContractError, match="'a' and 'b' share"):
        rm.LayerwiseMetric(Shared(), output=None)
