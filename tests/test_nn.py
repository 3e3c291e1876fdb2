"""Layers whose weight lives on a manifold."""

import copy
import io
import math
import pickle
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import riemannian_modules as rm
from riemannian_modules.errors import ShapeError
from riemannian_modules.manifolds import MetricManifold

CASES = {
    "Euclidean": (rm.manifolds.Euclidean(), 7, 4),
    "Stiefel wide": (rm.manifolds.Stiefel(), 7, 4),
    "Stiefel tall": (rm.manifolds.Stiefel(), 4, 7),
    "Stiefel square": (rm.manifolds.Stiefel(), 5, 5),
    "CanonicalStiefel wide": (rm.manifolds.CanonicalStiefel(), 7, 4),
    "CanonicalStiefel tall": (rm.manifolds.CanonicalStiefel(), 4, 7),
    "Sphere": (rm.manifolds.Sphere(), 7, 4),
    "PoincareBall": (rm.manifolds.PoincareBall(), 7, 4),
    "curved PoincareBall": (rm.manifolds.PoincareBall(c=2.0), 7, 4),
    "SPD": (rm.manifolds.SPD(), 5, 5),
}


@pytest.fixture(params=CASES.values(), ids=CASES)
def case(request: pytest.FixtureRequest) -> tuple[geoopt.Manifold, int, int]:
    manifold, inputs, outputs = request.param
    return copy.deepcopy(manifold), inputs, outputs


Case = tuple[geoopt.Manifold, int, int]


def test_the_weight_starts_on_its_manifold(case: Case) -> None:
    manifold, inputs, outputs = case
    for _ in range(5):
        layer = rm.nn.Linear(inputs, outputs, manifold=manifold)
        weight = layer.weight
        assert weight.shape == (outputs, inputs)
        assert isinstance(weight, geoopt.ManifoldParameter)
        assert isinstance(weight.manifold, MetricManifold)
        assert weight.manifold.base is manifold
        assert weight.requires_grad
        assert weight.is_leaf
        ok, reason = manifold.check_point_on_manifold(
            weight.detach(), explain=True, atol=1e-12, rtol=1e-12
        )
        assert ok, reason


def test_the_weight_starts_at_random(case: Case) -> None:
    manifold, inputs, outputs = case
    one, other = (rm.nn.Linear(inputs, outputs, manifold=manifold) for _ in range(2))
    assert not torch.equal(one.weight, other.weight)
    torch.manual_seed(5)
    one = rm.nn.Linear(inputs, outputs, manifold=manifold)
    torch.manual_seed(5)
    other = rm.nn.Linear(inputs, outputs, manifold=manifold)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)


def test_orthonormal_in_the_orientation_that_fits() -> None:
    wide = rm.nn.Linear(7, 4, manifold=rm.manifolds.Stiefel()).weight.detach()
    tall = rm.nn.Linear(4, 7, manifold=rm.manifolds.Stiefel()).weight.detach()
    eye = torch.eye(4)
    torch.testing.assert_close(wide @ wide.mT, eye, rtol=0.0, atol=1e-13)
    torch.testing.assert_close(tall.mT @ tall, eye, rtol=0.0, atol=1e-13)


def test_starting_points_have_a_useful_size() -> None:
    torch.manual_seed(0)
    rows = rm.nn.Linear(64, 32, manifold=rm.manifolds.Sphere()).weight.detach()
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(32))
    assert float(rows.mean(0).norm()) < 0.5, "the rows have no common direction"
    ball = rm.nn.Linear(64, 32, manifold=rm.manifolds.PoincareBall()).weight.detach()
    assert float(ball.norm(dim=1).max()) < 0.5, "far out every step is tiny"
    spd = rm.nn.Linear(64, 64, manifold=rm.manifolds.SPD()).weight.detach()
    values = torch.linalg.eigvalsh(spd)
    assert 0.05 < float(values[0]) < 1.0 < float(values[-1]) < 20.0


def test_a_euclidean_layer_starts_as_torch_s() -> None:
    torch.manual_seed(3)
    ours = rm.nn.Linear(7, 4)
    torch.manual_seed(3)
    theirs = nn.Linear(7, 4)
    assert torch.equal(ours.weight, theirs.weight)
    assert torch.equal(ours.bias, theirs.bias)
    assert isinstance(ours.weight.manifold.base, geoopt.Euclidean)


def test_it_is_a_linear_layer(case: Case) -> None:
    manifold, inputs, outputs = case
    layer = rm.nn.Linear(inputs, outputs, manifold=manifold)
    assert isinstance(layer, nn.Linear)
    assert isinstance(layer, rm.nn.RiemannianModule)
    x = torch.randn(2, 3, inputs)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_the_bias_is_euclidean_and_optional(case: Case) -> None:
    manifold, inputs, outputs = case
    layer = rm.nn.Linear(inputs, outputs, manifold=manifold)
    assert layer.bias.shape == (outputs,)
    assert isinstance(layer.bias.manifold.base, geoopt.Euclidean)
    assert float(layer.bias.detach().abs().max()) <= 1.0 / math.sqrt(inputs)
    bare = rm.nn.Linear(inputs, outputs, False, manifold=manifold)
    assert bare.bias is None
    assert list(bare.state_dict()) == ["weight"]
    x = torch.randn(3, inputs)
    assert torch.equal(bare(x), F.linear(x, bare.weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_and_device(case: Case, dtype: torch.dtype) -> None:
    manifold, inputs, outputs = case
    layer = rm.nn.Linear(inputs, outputs, manifold=manifold, dtype=dtype, device="cpu")
    assert layer.weight.dtype == layer.bias.dtype == dtype
    assert manifold.check_point_on_manifold(layer.weight.detach(), atol=1e-5, rtol=1e-5)
    meta = rm.nn.Linear(inputs, outputs, manifold=manifold, dtype=dtype, device="meta")
    assert meta.weight.is_meta
    assert meta.bias.is_meta
    assert meta.weight.dtype == dtype
    assert isinstance(meta.weight.manifold, MetricManifold)


def test_conversion_keeps_the_manifold(case: Case) -> None:
    manifold, inputs, outputs = case
    layer = rm.nn.Linear(inputs, outputs, manifold=manifold)
    weight = layer.weight
    layer.to(torch.float32)
    assert layer.weight is weight
    assert weight.dtype == layer.bias.dtype == torch.float32
    assert weight.manifold.base is manifold
    x = torch.randn(6, inputs, dtype=torch.float32)
    metric = rm.LayerwiseMetric(layer, output=rm.output.Euclidean(), mass=0.1)
    with metric.record():
        outputs_ = layer(x)
    metric.backward(outputs_.square().mean(), outputs_)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    optimizer.step()
    assert weight.dtype == torch.float32
    layer.double()
    with metric.record():
        outputs_ = layer(x.double())
    metric.backward(outputs_.square().mean(), outputs_)
    assert metric.natural_gradient()["weight"].dtype == torch.float64


@pytest.mark.parametrize(
    ("manifold", "inputs", "outputs", "words"),
    [
        (rm.manifolds.SPD(), 4, 5, "square"),
        (rm.manifolds.Stiefel(), 0, 5, "Stiefel"),
        (rm.manifolds.CanonicalStiefel(), 5, 0, "CanonicalStiefel"),
        (geoopt.EuclideanStiefel(), 5, 3, "Stiefel"),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_shapes_without_a_point_are_refused(
    manifold: geoopt.Manifold, inputs: int, outputs: int, words: str
) -> None:
    with pytest.raises(ShapeError, match=words) as caught:
        rm.nn.Linear(inputs, outputs, manifold=manifold)
    assert f"({outputs}, {inputs})" in str(caught.value)


def test_the_representation_says_where_the_weight_lives(case: Case) -> None:
    manifold, inputs, outputs = case
    layer = rm.nn.Linear(inputs, outputs, bias=False, manifold=manifold)
    text = repr(layer)
    assert f"in_features={inputs}, out_features={outputs}, bias=False" in text
    assert f"manifold={manifold.name}" in text


@pytest.mark.parametrize("through_file", [False, True])
def test_a_state_dict_travels(case: Case, through_file: bool) -> None:
    manifold, inputs, outputs = case
    layer = rm.nn.Linear(inputs, outputs, manifold=manifold)
    state: Any = layer.state_dict()
    assert list(state) == ["weight", "bias"]
    if through_file:
        buffer = io.BytesIO()
        plain = {k: v.detach().as_subclass(torch.Tensor) for k, v in state.items()}
        torch.save(plain, buffer)
        buffer.seek(0)
        state = torch.load(buffer, weights_only=True)
    other = rm.nn.Linear(inputs, outputs, manifold=manifold)
    other.load_state_dict(state)
    assert torch.equal(other.weight, layer.weight)
    assert torch.equal(other.bias, layer.bias)
    assert isinstance(other.weight.manifold, MetricManifold)


def test_a_state_dict_is_saved_without_the_classes_of_the_manifolds() -> None:
    layer = rm.nn.Linear(5, 4, manifold=rm.manifolds.Stiefel())
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    state = torch.load(buffer, weights_only=True)
    assert torch.equal(state["weight"], layer.weight)


def test_copies_and_pickles(case: Case) -> None:
    manifold, inputs, outputs = case
    layer = rm.nn.Linear(inputs, outputs, manifold=manifold)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin.weight, layer.weight)
        assert twin.weight is not layer.weight
        assert isinstance(twin.weight.manifold, MetricManifold)
        assert type(twin.weight.manifold.base) is type(manifold)
        assert set(twin.declared_manifolds) == {"weight", "bias"}
        rm.LayerwiseMetric(twin, output=rm.output.Euclidean())


def test_a_view_may_be_passed_for_a_manifold() -> None:
    view = MetricManifold(rm.manifolds.Sphere())
    with pytest.raises(rm.errors.ManifoldContractError, match="base"):
        rm.nn.Linear(3, 4, manifold=view)


def test_sequential_is_torch_s_chain() -> None:
    torch.manual_seed(0)
    layers = [rm.nn.Linear(5, 4, manifold=rm.manifolds.Stiefel()), nn.Tanh()]
    ours, theirs = rm.nn.Sequential(*layers), nn.Sequential(*layers)
    x = torch.randn(3, 5)
    assert isinstance(ours, nn.Sequential)
    assert torch.equal(ours(x), theirs(x))
    assert list(ours.state_dict()) == ["0.weight", "0.bias"]
    assert torch.equal(ours[:1](x), layers[0](x))


class Scale(rm.nn.RiemannianModule):
    """A user's layer: a row on the sphere."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.declare("row", F.normalize(torch.ones(size), dim=0), geoopt.Sphere())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.row


def test_a_module_declares_its_parameters() -> None:
    module = Scale(3)
    assert isinstance(module.row, geoopt.ManifoldParameter)
    assert isinstance(module.row.manifold, MetricManifold)
    assert module.declared_manifolds == {"row": module.row.manifold.base}
    assert [name for name, _ in module.named_parameters()] == ["row"]
    module.row = nn.Parameter(torch.ones(3))
    with pytest.raises(rm.errors.LostManifoldError, match="'row'"):
        rm.LayerwiseMetric(module, output=None)


def test_declaring_a_shape_that_does_not_fit() -> None:
    module = Scale(3)
    with pytest.raises(ValueError, match="matrices"):
        module.declare("frame", torch.ones(3), rm.manifolds.Stiefel())


@pytest.mark.parametrize(
    "manifold",
    [
        geoopt.PoincareBall(),
        geoopt.Stereographic(-1.0),
        rm.manifolds.Scaled(geoopt.PoincareBall(), 2.0),
        rm.manifolds.Reshaped(geoopt.PoincareBall(), (2, 3), (3, 2)),
    ],
    ids=repr,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_curved_weights_have_the_data_type_of_their_layer(
    manifold: geoopt.Manifold, dtype: torch.dtype
) -> None:
    """The tests' default, of which the curvatures are, is one of the two."""
    layer = rm.nn.Linear(3, 2, manifold=manifold, dtype=dtype)
    layer.reset_parameters()
    state = rm.nn.InitialState((2, 3), manifold, dtype=dtype)
    for point in (
        layer.weight,
        state.value,
        MetricManifold(manifold).random(2, 3, dtype=dtype),
    ):
        assert point.dtype == dtype
        assert point.manifold.check_point_on_manifold(point)
    assert float(layer.weight.detach().norm()) < 0.3


@pytest.mark.parametrize(
    "manifold", [rm.manifolds.SPD(), rm.manifolds.Scaled(rm.manifolds.SPD())], ids=repr
)
def test_positive_definite_parameters_must_be_square(manifold: Any) -> None:
    with pytest.raises(ShapeError, match="square"):
        rm.nn.Linear(3, 2, manifold=manifold)
    with pytest.raises(ShapeError, match="square"):
        rm.nn.InitialState((2, 3), manifold)
    with pytest.raises(ShapeError, match="square"):
        rm.manifolds.Product({"a": (manifold, (2, 3))})


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors is a no-op")
def test_a_layer_without_inputs_is_reset() -> None:
    layer = rm.nn.Linear(0, 3)
    layer.reset_parameters()
    assert torch.equal(layer.bias.detach(), torch.zeros(3))
