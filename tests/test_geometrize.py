"""Manifolds declared by name, and manifolds of tensors in another shape."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import LayerMetric, Mass, Part, TangentSpace, manifolds
from riemannian_modules.errors import (
    LostManifoldError,
    ManifoldContractError,
    NonFiniteError,
    NotOnManifoldError,
    ShapeError,
)
from riemannian_modules.factors import DenseFactor
from riemannian_modules.manifolds import MetricManifold, Reshaped
from riemannian_modules.manifolds.riesz import dimension, flat, root, root_adjoint
from riemannian_modules.mass import as_masses
from riemannian_modules.retractions import Default, Exponential, Projection
from riemannian_modules.testing import (
    check_base_manifold,
    check_metric,
    check_retraction,
    raise_failures,
)
from riemannian_modules.testing.reference import dense_natural_gradient

SEEDS = st.integers(0, 2**31 - 1)
FEW = settings(max_examples=max(2, settings.default.max_examples // 5))
Shape = tuple[int, ...]


class Net(nn.Module):
    """A model that was written without this library."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(1, 4, 3),
            nn.Tanh(),
            nn.Conv2d(4, 6, 2, groups=2, bias=False),
            nn.Flatten(),
        )
        self.norm = nn.LayerNorm(6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.body(x)))


def base(model: nn.Module, name: str) -> geoopt.Manifold:
    parameter = model.get_parameter(name)
    assert isinstance(parameter, geoopt.ManifoldParameter)
    assert isinstance(parameter.manifold, MetricManifold)
    return parameter.manifold.base


def plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor)


# ---- geometrize ------------------------------------------------------------------


def test_patterns_declare_manifolds() -> None:
    model = Net()
    before = dict(model.named_parameters())
    values = {name: plain(p).clone() for name, p in before.items()}
    out = rm.geometrize(
        model,
        {
            "body.*.weight": manifolds.Stiefel(),
            "head.weight": manifolds.Sphere(),
            "norm.weight": manifolds.Positive(),
        },
    )
    assert out is model
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is before[name] for name in before)
    assert isinstance(base(model, "body.0.weight"), Reshaped)
    assert isinstance(base(model, "head.weight"), geoopt.Sphere)
    for name in ("body.0.bias", "norm.bias", "head.bias"):
        assert type(after[name]) is nn.Parameter
        assert torch.equal(after[name], values[name])
    rows = plain(model.head.weight)
    torch.testing.assert_close(rows, F.normalize(values["head.weight"], dim=1))
    filters = plain(model.body[0].weight).flatten(1)
    torch.testing.assert_close(filters @ filters.mT, torch.eye(4))
    views = [p.manifold for p in after.values() if isinstance(p, geoopt.ManifoldTensor)]
    assert len({id(view) for view in views}) == 4, "one metric for each parameter"


@pytest.mark.parametrize("retraction", [Default(), Projection()])
def test_the_metric_of_a_declared_model(retraction: Any) -> None:
    model = rm.geometrize(
        Net(), {"*.weight": manifolds.Sphere()} | {"*.bias": manifolds.Euclidean()}
    )
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    x, target = torch.randn(5, 1, 4, 4), torch.arange(5) % 3
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.05, retraction=retraction)
    for _ in range(2):
        with metric.record():
            outputs = model(x)
        metric.backward(F.cross_entropy(outputs, target), outputs)
        found = metric.natural_gradient()
        for name, parameter in model.named_parameters():
            space = TangentSpace(base(model, name), plain(parameter))
            torch.testing.assert_close(
                space.project(found[name]), found[name], rtol=1e-9, atol=1e-12
            )
        optimizer.step()
    rm.LayerwiseMetric(model, output=None)  # every value is still on its manifold


def test_the_gradient_on_filters_is_the_dense_one() -> None:
    model = nn.Sequential(nn.Conv2d(1, 3, 2), nn.Tanh(), nn.Flatten(), nn.Linear(12, 3))
    rm.geometrize(model, {"0.weight": manifolds.Stiefel()})
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    with metric.record():
        outputs = model(torch.randn(4, 1, 3, 3))
    metric.backward(F.cross_entropy(outputs, torch.arange(4) % 3), outputs)
    block = metric.blocks["0"]
    gradient = {n: model.get_parameter(n).grad for n in ("0.weight", "0.bias")}
    dense = block.to_dense()
    right = torch.stack(
        [sum((gradient[n] * b[n]).sum() for n in gradient) for b in block.basis()]
    )
    x = metric.natural_gradient()
    found = torch.stack(
        [block.inner({n: x[n] for n in gradient}, b) for b in block.basis()]
    )
    torch.testing.assert_close(found, right, rtol=1e-9, atol=1e-12)
    solved = torch.linalg.solve(dense, right)
    for n in gradient:
        expected = sum(c * b[n] for c, b in zip(solved, block.basis(), strict=True))
        torch.testing.assert_close(x[n], expected, rtol=1e-9, atol=1e-12)


SINGULAR = {
    "spd": (manifolds.SPD(), (3, 3)),
    "log-euclidean": (manifolds.LogEuclideanSPD(), (3, 3)),
    "scaled": (manifolds.Scaled(manifolds.SPD(), 2.0), (3, 3)),
    "reshaped": (Reshaped(manifolds.SPD(), (6, 3), (2, 3, 3)), (6, 3)),
    "product": (
        geoopt.ProductManifold((manifolds.Sphere(), 2), (manifolds.SPD(), (2, 2))),
        (2, 6),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", SINGULAR)
def test_singular_matrices_are_refused(name: str, dtype: torch.dtype) -> None:
    manifold, shape = SINGULAR[name]
    layer = nn.Linear(shape[1], shape[0], dtype=dtype)
    with torch.no_grad():
        layer.weight.fill_(1.0)  # matrices of ones have rank one
        if name == "product":
            layer.weight[:, :2] = torch.tensor([1.0, 0.0])
    with pytest.raises(NotOnManifoldError, match="not positive definite"):
        rm.geometrize(layer, {"weight": manifold}, project=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", [manifolds.SPD, manifolds.LogEuclideanSPD])
def test_an_ordinary_weight_trains_as_a_positive_definite_one(kind, dtype) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).to(dtype)
    rm.geometrize(model, {"0.weight": kind()})
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.3)
    x, target, losses = torch.randn(12, 4, dtype=dtype), torch.arange(12) % 3, []
    for _ in range(10):
        with metric.record():
            outputs = model(x)
        loss = F.cross_entropy(outputs, target)
        metric.backward(loss, outputs)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.mark.parametrize("name", ["first.weight", "second.weight", "*.weight"])
def test_shared_parameters_stay_shared(name: str) -> None:
    model = rm.geometrize(Tied(), {name: manifolds.Stiefel()})
    assert model.first.weight is model.second.weight
    assert isinstance(base(model, "second.weight"), manifolds.Stiefel)
    assert set(model.first.declared_manifolds) == {"weight"}
    assert set(model.second.declared_manifolds) == {"weight"}
    assert len(list(model.parameters())) == 3


def test_a_module_in_two_places() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    rm.geometrize(model, {"2.weight": manifolds.Sphere()})
    assert isinstance(base(model, "0.weight"), geoopt.Sphere)


def test_an_optimizer_built_before_holds_the_same_parameters() -> None:
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    rm.geometrize(model, {"weight": manifolds.Stiefel()})
    assert optimizer.param_groups[0]["params"][0] is model.weight
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    with pytest.raises(NotOnManifoldError, match="project_"):
        rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    with pytest.raises(LostManifoldError, match=r"'weight'.*Euclidean.*Stiefel.*anew"):
        metric.parameters.verify()


def test_graphs_recorded_before_still_work() -> None:
    model = nn.LSTM(3, 4)
    outputs, _ = model(torch.randn(5, 2, 3))
    rm.geometrize(model, {"weight_hh_l0": manifolds.Sphere()}, project=True)
    assert model._flat_weights[1] is model.weight_hh_l0
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        outputs.sum().backward()
    model(torch.randn(5, 2, 3))[0].sum().backward()
    assert model.weight_hh_l0.grad.norm() > 0


def test_frozen_parameters_stay_frozen() -> None:
    model = nn.Linear(4, 3)
    model.weight.requires_grad_(False)
    rm.geometrize(model, {"weight": manifolds.Stiefel()})
    assert not model.weight.requires_grad


def test_a_layer_of_this_library_may_be_declared_anew() -> None:
    model = rm.nn.Linear(4, 3, manifold=manifolds.Sphere())
    rm.geometrize(model, {"weight": manifolds.Stiefel()})
    assert isinstance(base(model, "weight"), manifolds.Stiefel)
    assert isinstance(model.declared_manifolds["weight"], manifolds.Stiefel)
    assert isinstance(model.declared_manifolds["bias"], geoopt.Euclidean)


def test_geoopt_s_optimizers_step_on_the_manifolds() -> None:
    model = rm.geometrize(Net(), {"*.weight": manifolds.Sphere()})
    optimizer = geoopt.optim.RiemannianAdam(model.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(5, 1, 4, 4)).square().mean().backward()
        optimizer.step()
    rm.LayerwiseMetric(model, output=None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_narrow_values_are_projected_in_float32(dtype: torch.dtype) -> None:
    model = nn.Linear(6, 4).to(dtype)
    rm.geometrize(model, {"weight": manifolds.Stiefel()})
    weight = plain(model.weight)
    assert weight.dtype == dtype
    error = (weight.double() @ weight.double().mT - torch.eye(4)).abs().max()
    assert float(error) < 10.0 * torch.finfo(dtype).eps


def test_on_the_meta_device() -> None:
    model = Net().to("meta")
    rm.geometrize(model, {"*.weight": manifolds.Sphere()})
    assert isinstance(base(model, "head.weight"), geoopt.Sphere)
    assert model.head.weight.is_meta
    rm.project_(model)


# ---- what it refuses, and that it then changes nothing ---------------------------


def content(model: nn.Module) -> list[tuple[str, type, bytes]]:
    return [
        (name, type(p), plain(p).numpy().tobytes())
        for name, p in model.named_parameters()
    ]


@pytest.mark.parametrize(
    ("patterns", "error", "words"),
    [
        ({"*.wieght": manifolds.Sphere()}, ValueError, r"\['\*.wieght'\].*'head.bias'"),
        (
            {"*.weight": manifolds.Sphere(), "head.*": manifolds.Euclidean()},
            ValueError,
            r"'head.weight' is matched by the patterns \['\*.weight', 'head.\*'\]",
        ),
        (
            {"*.weight": manifolds.Euclidean(), "head.bias": manifolds.Stiefel()},
            ShapeError,
            r"'head.bias' of shape \(3,\).*Stiefel",
        ),
        ({"head.weight": manifolds.SPD()}, ShapeError, "'head.weight'.*square"),
        (
            {"head.weight": manifolds.Scaled(manifolds.SPD(), 2.0)},
            ShapeError,
            "'head.weight'.*square",
        ),
        ({"body.0.weight": manifolds.SPD()}, ShapeError, r"'body.0.weight'.*\(4, 9\)"),
        ({"head.weight": geoopt.Lorentz()}, ManifoldContractError, "'head.weight'"),
        ({"head.weight": "Stiefel"}, ManifoldContractError, "'head.weight'.*str"),
        (
            {"head.weight": MetricManifold(manifolds.Sphere())},
            ManifoldContractError,
            "'head.weight'.*base",
        ),
        (
            {"head.weight": Reshaped(manifolds.Sphere(), (3, 5), (15,))},
            ShapeError,
            "'head.weight'",
        ),
    ],
)
def test_declarations_that_are_refused(
    patterns: Any, error: type[Exception], words: str
) -> None:
    model = Net()
    before = content(model)
    with pytest.raises(error, match=words):
        rm.geometrize(model, patterns)
    assert content(model) == before
    assert not any(hasattr(m, "declared_manifolds") for m in model.modules())


def test_a_shared_parameter_matched_by_both_its_names() -> None:
    patterns = {"first.weight": manifolds.Sphere(), "second.*": manifolds.Euclidean()}
    with pytest.raises(
        ValueError, match=r"'first.weight' = 'second.weight' is matched"
    ):
        rm.geometrize(Tied(), patterns)


def test_values_off_the_manifold() -> None:
    model = Net()
    before = content(model)
    with pytest.raises(NotOnManifoldError, match=r"'head.weight'.*project=True"):
        rm.geometrize(model, {"head.weight": manifolds.Sphere()}, project=False)
    assert content(model) == before
    rm.geometrize(model, {"head.weight": manifolds.Euclidean()}, project=False)
    with torch.no_grad():
        model.head.weight.copy_(F.normalize(model.head.weight, dim=1))
    value = plain(model.head.weight).clone()
    rm.geometrize(model, {"head.weight": manifolds.Sphere()}, project=False)
    assert torch.equal(model.head.weight, value)


@pytest.mark.parametrize(
    ("value", "error"), [(float("nan"), NonFiniteError), (0.0, NotOnManifoldError)]
)
def test_values_without_a_projection(value: float, error: type[Exception]) -> None:
    model = Net()
    with torch.no_grad():
        model.head.weight[1] = value
    before = content(model)
    with pytest.raises(error, match=r"'head.weight'.*\b(give|load)\b"):
        rm.geometrize(model, {"*.weight": manifolds.Sphere()})
    assert content(model) == before


def test_parameters_that_cannot_be_declared() -> None:
    lazy = nn.LazyLinear(3)
    with pytest.raises(ValueError, match=r"'weight' has no shape yet; run"):
        rm.geometrize(lazy, {"weight": manifolds.Sphere()})
    model = nn.Linear(3, 2, dtype=torch.complex128)
    with pytest.raises(ValueError, match=r"'weight'.*complex128"):
        rm.geometrize(model, {"weight": manifolds.Sphere()})


# ---- project_ --------------------------------------------------------------------


@FEW
@given(seed=SEEDS, size=st.floats(1e-6, 2.0))
def test_projecting_puts_every_parameter_back(seed: int, size: float) -> None:
    torch.manual_seed(seed)
    model = rm.geometrize(Net(), {"body.*.weight": manifolds.Stiefel()})
    model.head = rm.nn.Linear(6, 3, manifold=manifolds.Sphere())
    model.norm.weight = geoopt.ManifoldParameter(
        torch.ones(6), manifold=manifolds.Positive()
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(size * torch.rand_like(parameter))
    values = {name: plain(p).clone() for name, p in model.named_parameters()}
    parameters = dict(model.named_parameters())
    assert rm.project_(model) is model
    assert dict(model.named_parameters()) == parameters
    rm.LayerwiseMetric(model, output=None)
    for name, parameter in parameters.items():
        manifold = manifolds.base_of(getattr(parameter, "manifold", geoopt.Euclidean()))
        torch.testing.assert_close(plain(parameter), manifold.projx(values[name]))
    again = {name: plain(p).clone() for name, p in parameters.items()}
    rm.project_(model)
    for name, parameter in parameters.items():
        torch.testing.assert_close(plain(parameter), again[name], rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    ("value", "error"), [(float("inf"), NonFiniteError), (0.0, NotOnManifoldError)]
)
def test_projecting_what_has_no_projection(
    value: float, error: type[Exception]
) -> None:
    model = rm.geometrize(Net(), {"*.weight": manifolds.Sphere()})
    with torch.no_grad():
        model.body[0].weight.mul_(2.0)
        model.head.weight[1] = value
    before = content(model)
    with pytest.raises(error, match=r"'head.weight'"):
        rm.project_(model)
    assert content(model) == before


# ---- views of convolutions -------------------------------------------------------

CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], Shape]] = {
    "1d": (lambda: nn.Conv1d(3, 4, 2), (4, 6)),
    "2d": (lambda: nn.Conv2d(3, 4, (2, 3)), (4, 18)),
    "3d": (lambda: nn.Conv3d(2, 4, 2), (4, 16)),
    "grouped": (lambda: nn.Conv2d(4, 6, 3, groups=2), (2, 3, 18)),
    "depthwise": (lambda: nn.Conv2d(4, 4, 3, groups=4), (4, 1, 9)),
    "transposed": (lambda: nn.ConvTranspose2d(3, 4, 2), (3, 16)),
    "transposed, grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), (2, 2, 12)),
}


@pytest.mark.parametrize(("make", "view"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
@pytest.mark.parametrize("kind", [manifolds.Stiefel, manifolds.Sphere])
def test_filters_are_what_a_convolution_has(
    kind: Callable[[], geoopt.Manifold], make: Callable[[], nn.Module], view: Shape
) -> None:
    model = rm.geometrize(make(), {"weight": kind()})
    manifold = base(model, "weight")
    assert isinstance(manifold, Reshaped)
    assert manifold.view == view
    assert manifold.shape == model.weight.shape
    filters = plain(model.weight).reshape(view)
    torch.testing.assert_close(filters.norm(dim=-1), torch.ones(view[:-1]))
    raise_failures(check_base_manifold(manifold, plain(model.weight)))


@pytest.mark.parametrize("kind", ["1d", "2d", "3d", "grouped", "depthwise"])
def test_orthonormal_filters_bound_the_gain(kind: str) -> None:
    model = rm.geometrize(CONVOLUTIONS[kind][0](), {"weight": manifolds.Stiefel()})
    with torch.no_grad():
        model.bias.zero_()
    dims = model.weight.ndim - 2
    x = torch.randn(1, model.in_channels, *(5,) * dims, requires_grad=True)
    for _ in range(30):  # power iteration
        (g,) = torch.autograd.grad(model(x).square().sum() / 2, x)
        gain = g.norm().sqrt()
        x = (g / g.norm()).requires_grad_()
    assert float(gain) <= math.sqrt(math.prod(model.kernel_size)) + 1e-9


def test_other_views_are_the_user_s_choice() -> None:
    model = nn.Conv2d(2, 4, 3)
    kernels = Reshaped(manifolds.Stiefel(), (4, 2, 3, 3), (8, 3, 3))
    rm.geometrize(model, {"weight": kernels, "bias": manifolds.Euclidean()})
    assert base(model, "weight") is kernels
    flat_ = nn.Conv2d(2, 4, 3)
    rm.geometrize(flat_, {"weight": manifolds.Positive()})
    assert isinstance(base(flat_, "weight"), manifolds.Positive)
    linear = nn.Linear(4, 3)
    rm.geometrize(linear, {"weight": manifolds.Stiefel()})
    assert isinstance(base(linear, "weight"), manifolds.Stiefel)


def test_packed_projections_of_attention() -> None:
    model = nn.MultiheadAttention(4, 2)
    packed = Reshaped(manifolds.SpecialOrthogonal(), (12, 4), (3, 4, 4))
    rm.geometrize(model, {"in_proj_weight": packed})
    for q in plain(model.in_proj_weight).split(4):
        torch.testing.assert_close(q @ q.mT, torch.eye(4))


# ---- the reshaped manifold -------------------------------------------------------

RESHAPED: dict[str, tuple[Callable[[], geoopt.Manifold], Shape, Shape]] = {
    "stiefel": (manifolds.Stiefel, (3, 2, 2, 2), (3, 8)),
    "stiefel, tall": (manifolds.Stiefel, (6, 2, 2), (6, 4)),
    "stiefel, groups": (manifolds.Stiefel, (4, 2, 3), (2, 2, 6)),
    "canonical": (manifolds.CanonicalStiefel, (3, 2, 2), (3, 4)),
    "sphere": (manifolds.Sphere, (3, 2, 2), (3, 4)),
    "sphere, whole": (manifolds.Sphere, (3, 2, 2), (12,)),
    "ball": (manifolds.PoincareBall, (3, 2, 2), (3, 4)),
    "spd": (manifolds.SPD, (9,), (3, 3)),
    "rotations": (manifolds.SpecialOrthogonal, (6, 2), (3, 2, 2)),
    "oblique": (manifolds.Oblique, (2, 3, 2), (6, 2)),
    "grassmann": (manifolds.Grassmann, (2, 3, 2), (2, 6)),
    "positive": (manifolds.Positive, (2, 3), (6,)),
    "euclidean": (manifolds.Euclidean, (2, 3), (3, 2)),
    "fixed rank": (lambda: manifolds.FixedRank(2), (3, 2, 2), (3, 4)),
    "lorentz": (manifolds.Lorentz, (2, 2, 2), (2, 4)),
    "scaled": (lambda: manifolds.Scaled(manifolds.Stiefel(), 0.5), (3, 2, 2), (3, 4)),
}
CASES = pytest.mark.parametrize(
    ("make", "shape", "view"), RESHAPED.values(), ids=RESHAPED
)


def draw(manifold: Reshaped, batch: Shape = ()) -> Tensor:
    return plain(manifold.random(*batch, *manifold.shape))


@CASES
@FEW
@given(seed=SEEDS)
def test_every_check_passes(make: Any, shape: Shape, view: Shape, seed: int) -> None:
    generator = torch.manual_seed(seed)
    manifold = Reshaped(make(), shape, view)
    point = draw(manifold)
    raise_failures(check_base_manifold(manifold, point, generator=generator))
    for retraction in (Default(), Exponential()):
        try:
            retraction(manifold, point, torch.zeros_like(point))
        except (NotImplementedError, ManifoldContractError):
            continue
        raise_failures(
            check_retraction(manifold, retraction, point, generator=generator)
        )


@CASES
@pytest.mark.parametrize("ahead", [(), (3,), (2, 3)])
def test_it_is_the_base_in_another_shape(
    make: Any, shape: Shape, view: Shape, ahead: Shape
) -> None:
    base, manifold = make(), Reshaped(make(), shape, view)
    x = draw(manifold)
    e = torch.randn(*ahead, *shape)
    p, f = x.reshape(view), e.reshape(*ahead, *view)
    u = 0.1 * manifold.proju(x, e)
    a = 0.1 * base.proju(p, f)

    def same(ours: Tensor, theirs: Tensor) -> None:
        assert ours.shape == (*theirs.shape[: len(ahead)], *shape)
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs)

    same(u, a)
    same(manifold.projx(e), base.projx(f))
    same(manifold.egrad2rgrad(x, e), base.egrad2rgrad(p, f.clone()))
    same(flat(manifold, x, u), flat(base, p, a))
    y, q = manifold.retr(x, u), base.retr(p, a)
    same(y, q)
    same(manifold.transp(x, y, u), base.transp(p, q, a))
    for pair in zip(
        manifold.retr_transp(x, u, u), base.retr_transp(p, a, a), strict=True
    ):
        same(*pair)
    same(manifold.transp_follow_retr(x, u, u), base.transp_follow_retr(p, a, a))
    total = base.inner(p, a, keepdim=True).reshape(*ahead, -1).sum(-1)
    torch.testing.assert_close(manifold.inner(x, u), total)
    kept = manifold.inner(x, u, u, keepdim=True)
    assert kept.shape == (*ahead, *(1,) * len(shape))
    torch.testing.assert_close(kept.reshape(ahead), total)
    parts = base.component_inner(p, a).expand_as(a)
    same(manifold.component_inner(x, u), parts)
    assert dimension(manifold, x) == dimension(base, p)
    if "FixedRank" not in base.name:
        same(manifold.expmap(x, u), base.expmap(p, a))
        for pair in zip(
            manifold.expmap_transp(x, u, u), base.expmap_transp(p, a, a), strict=True
        ):
            same(*pair)
        follow = manifold.transp_follow_expmap(x, u, u)
        same(follow, base.transp_follow_expmap(p, a, a))
    if "Stiefel" not in base.name and "FixedRank" not in base.name:
        same(manifold.logmap(x, y), base.logmap(p, q))
        squares = base.dist(p, q, keepdim=True).square().reshape(*ahead, -1).sum(-1)
        torch.testing.assert_close(manifold.dist(x, y), squares.sqrt())
        assert manifold.dist(x, y, keepdim=True).shape == kept.shape


@CASES
def test_points_and_roots(make: Any, shape: Shape, view: Shape) -> None:
    manifold = Reshaped(make(), shape, view)
    for point in (manifold.random(2, *shape), manifold.random(shape)):
        assert point.manifold is manifold
        assert tuple(point.shape[-len(shape) :]) == shape
        assert manifold.check_point_on_manifold(point)
    if "FixedRank" not in manifold.name:
        origin = manifold.origin(*shape, dtype=torch.float32)
        assert origin.shape == shape
        assert origin.dtype == torch.float32
    x = draw(manifold)
    e, z = torch.randn(2, *shape)
    there = root(manifold, x, root_adjoint(manifold, x, e))
    torch.testing.assert_close(there, manifold.egrad2rgrad(x, e))
    torch.testing.assert_close(
        (root(manifold, x, z) * e).sum(), (z * root_adjoint(manifold, x, e)).sum()
    )
    if not isinstance(manifold.base, geoopt.Euclidean | manifolds.Positive):
        assert not manifold.check_point_on_manifold(-3.0 * x - 1.0)
    space = TangentSpace(manifold, x, Mass(scalar=0.3))
    factor = DenseFactor(torch.randn(4, *shape))
    raise_failures(check_metric(LayerMetric([Part("w", space, factor)])))


@CASES
def test_it_is_copied_and_pickled(make: Any, shape: Shape, view: Shape) -> None:
    manifold = Reshaped(make(), shape, view)
    x = draw(manifold)
    for twin in (copy.deepcopy(manifold), pickle.loads(pickle.dumps(manifold))):
        assert repr(twin) == repr(manifold)
        assert twin.base is not manifold.base
        assert torch.equal(twin.projx(x), manifold.projx(x))
        if hasattr(manifold, "invariant"):
            assert twin.invariant.__self__ is twin
            assert torch.equal(twin.invariant(x), manifold.invariant(x))
    assert f"{shape} as {view}" in repr(manifold)
    assert isinstance(manifold, manifolds.Quotient) == (
        manifold.base.name == "Grassmann"
    )


@pytest.mark.parametrize("view", [(-1, 6), (4, -1), (2, 2, -1)])
def test_one_side_of_a_view_may_be_left_open(view: Shape) -> None:
    manifold = Reshaped(manifolds.Sphere(), (4, 2, 3), view)
    assert math.prod(manifold.view) == 24
    assert all(side > 0 for side in manifold.view)


@pytest.mark.parametrize(
    ("view", "words"),
    [
        ((5, 5), r"\(4, 2, 3\) cannot be viewed as \(5, 5\).*24 entries"),
        ((-1, 5), "cannot be viewed"),
        ((-1, -1), "cannot be viewed"),
        ((-1, 0), "cannot be viewed"),
        ((24,), r"Stiefel has the shape \(24,\)"),
    ],
)
def test_views_that_do_not_fit(view: Shape, words: str) -> None:
    with pytest.raises(ShapeError, match=words):
        Reshaped(manifolds.Stiefel(), (4, 2, 3), view)


def test_bases_and_groups_that_are_refused() -> None:
    with pytest.raises(ManifoldContractError, match="base"):
        Reshaped(MetricManifold(manifolds.Sphere()), (4,), (2, 2))
    with pytest.raises(ManifoldContractError, match="geoopt"):
        Reshaped(geoopt.Lorentz(), (4,), (2, 2))
    for groups in (0, 3):
        with pytest.raises(ShapeError, match="groups"):
            Reshaped.filters(manifolds.Sphere(), (4, 2, 3), groups)
    with pytest.raises(ShapeError, match="filters"):
        Reshaped.filters(manifolds.Sphere(), (4,))


def test_a_view_as_a_number() -> None:
    manifold = Reshaped(manifolds.Positive(), (1,), ())
    x, y, u = torch.rand(3, 4, 1) + 0.5
    torch.testing.assert_close(manifold.inner(x, u), (u / x).square().squeeze(-1))
    torch.testing.assert_close(manifold.dist(x, y), (y / x).log().abs().squeeze(-1))


def test_names_with_brackets_match_themselves() -> None:
    model = nn.ModuleDict({"a[0]": nn.Linear(3, 2), "a0": nn.Linear(3, 2)})
    rm.geometrize(model, {"a[0].weight": manifolds.Sphere()})
    assert isinstance(base(model, "a[0].weight"), manifolds.Sphere)
    assert type(model["a0"].weight) is nn.Parameter
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    masses = as_masses({"a[0].weight": 2.0, "*": 1.0}, shapes)
    assert masses["a[0].weight"].scalar == 2.0
    assert masses["a0.weight"].scalar == 1.0


def test_shapes_of_points_are_checked() -> None:
    manifold = Reshaped(manifolds.Sphere(), (4, 2, 3), (4, 6))
    assert manifold.check_point(torch.ones(5, 4, 2, 3))
    for shape in ((4, 6), (2, 3), (4, 2, 3, 1)):
        assert not manifold.check_point(torch.ones(shape))
    with pytest.raises(ValueError, match=r"\(4, 2, 3\)"):
        geoopt.ManifoldParameter(torch.ones(4, 6), manifold=manifold)


def test_the_dense_reference_on_a_reshaped_weight() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    whole = Reshaped(manifolds.Sphere(), (3, 4), (12,))
    rm.geometrize(model, {"0.weight": whole})
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    x, target = torch.randn(5, 4), torch.arange(5) % 3

    def loss(outputs: Tensor) -> Tensor:
        return F.cross_entropy(outputs, target)

    with metric.record():
        outputs = model(x)
    metric.backward(loss(outputs), outputs)
    expected = dense_natural_gradient(model, rm.output.Categorical(), x, loss, mass=0.1)
    for name, vector in metric.natural_gradient().items():
        torch.testing.assert_close(vector, expected[name], rtol=1e-9, atol=1e-12)
