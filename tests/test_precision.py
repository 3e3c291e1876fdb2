"""What float32 and bfloat16 cost: the push-through form keeps its digits."""

import copy
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import precision

MASSES = [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6]
Digits = tuple[nn.Module, Tensor, Tensor]


@pytest.fixture(scope="module")
def digits() -> Digits:
    """A float32 MLP on scikit-learn's digits after 30 steps of Adam, and a batch."""
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    x = torch.tensor(data.data / 16.0, dtype=torch.float32)
    y = torch.tensor(data.target)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(64, 64, dtype=torch.float32),
            nn.Tanh(),
            nn.Linear(64, 64, dtype=torch.float32),
            nn.Tanh(),
            nn.Linear(64, 10, dtype=torch.float32),
        )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for start in range(0, 30 * 32, 32):
        optimizer.zero_grad()
        batch = slice(start, start + 32)
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        optimizer.step()
    return model, x[1000:1032], y[1000:1032]


def pulled_back(digits: Digits, dtype: torch.dtype, **options: Any) -> Any:
    model, x, y = digits
    metric = rm.LayerwiseMetric(
        copy.deepcopy(model).to(dtype), output=rm.output.Categorical(), **options
    )
    with metric.record():
        logits = metric.model(x.to(dtype))
    metric.backward(F.cross_entropy(logits, y), logits)
    return metric


def subtracting(metric: rm.LayerwiseMetric, refinements: int) -> dict[str, Tensor]:
    """The natural gradient by the Woodbury form that subtracts."""
    found: dict[str, Tensor] = {}
    for block in metric.blocks.values():
        covector = {part.name: grad(metric, part.name) for part in block.parts}
        solution = block.solve(covector=covector, refinements=refinements)
        assert solution.branch == "woodbury"
        found |= solution.vectors
    return found


def grad(metric: rm.LayerwiseMetric, name: str) -> Tensor:
    gradient = metric.model.get_parameter(name).grad
    assert gradient is not None
    return gradient


def error(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> float:
    squares = sum(
        float((found[n].double() - v).square().sum()) for n, v in exact.items()
    )
    return (squares / sum(float(v.square().sum()) for v in exact.values())) ** 0.5


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("mass", MASSES)
def test_a_float32_step_with_independent_rows_is_accurate_for_every_mass(
    digits: Digits, mass: float, blocks: str
) -> None:
    exact = pulled_back(digits, torch.float64, mass=mass, blocks=blocks)
    metric = pulled_back(digits, torch.float32, mass=mass, blocks=blocks)
    found = metric.natural_gradient()
    assert {v.dtype for v in found.values()} == {torch.float32}
    assert error(found, exact.natural_gradient()) <= 1e-5


def rounding(exact: rm.LayerwiseMetric) -> dict[str, float]:
    """Return ``eps |K| (|a| / |x| + 1)`` of every block, ``a = y - K x``, for float32.

    Norms of parameters are those of the massed base metric.
    """
    y = exact._found.residual
    bounds = {}
    for name, block in exact.blocks.items():
        x = block.solve(residual=y).vectors
        base = sum((p.space.flat(x[p.name]) * x[p.name]).sum() for p in block.parts)
        size = float(block.gram_spectrum().sum()) ** 0.5
        left = float((y - block.image(x)).norm()) / float(base) ** 0.5
        bounds[name] = torch.finfo(torch.float32).eps * size * (left + 1.0)
    return bounds


SMALL = {
    "narrow": [5, 4, 3],  # the last layer's 15 dimensions hold 10 independent rows
    "wide": [20, 30, 3],
    "deep": [20, 30, 30, 3],
    "linear": [20, 3],
}


@pytest.mark.parametrize("mass", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize("n", [6, 12, 24])
@pytest.mark.parametrize("sizes", SMALL)
def test_a_float32_step_is_as_accurate_as_its_rows_allow(sizes, n, mass) -> None:
    layers: list[nn.Module] = []
    for before, after in pairwise(SMALL[sizes]):
        layers += [nn.Linear(before, after, dtype=torch.float32), nn.Tanh()]
    case = (
        nn.Sequential(*layers[:-1]),
        torch.randn(n, SMALL[sizes][0], dtype=torch.float32),
        torch.arange(n) % 3,
    )
    exact = pulled_back(case, torch.float64, mass=mass)
    metric = pulled_back(case, torch.float32, mass=mass)
    found, expected = metric.natural_gradient(), exact.natural_gradient()
    residual = metric._found.residual.double()
    for name, bound in rounding(exact).items():
        own = [part.name for part in exact.blocks[name].parts]
        wanted = {each: expected[each] for each in own}
        assert error(found, wanted) <= bound
        # Rows that were rounded to float32 cost as much in float64: K is all there is.
        same = metric.blocks[name].double().solve(residual=residual).vectors
        assert error(found, wanted) <= 30.0 * error(same, wanted)


def test_without_independent_rows_the_error_grows_like_the_inverse_mass() -> None:
    model = nn.Linear(4, 3, dtype=torch.float32)
    case = model, torch.randn(24, 4, dtype=torch.float32), torch.arange(24) % 3
    bounds, errors = [], []
    for mass in (1e-3, 1e-5):
        exact = pulled_back(case, torch.float64, mass=mass)
        metric = pulled_back(case, torch.float32, mass=mass)
        bounds += rounding(exact).values()
        errors.append(error(metric.natural_gradient(), exact.natural_gradient()))
    assert 50.0 < bounds[1] / bounds[0] < 150.0
    assert errors[1] > 3.0 * errors[0]


@pytest.mark.parametrize("mass", [1e-2, 1e-4, 1e-6])
@pytest.mark.parametrize(
    ("sizes", "n"), [([5, 4, 3], 8), ([5, 4, 3], 24), ([20, 30, 10], 100)]
)
def test_dependent_rows_keep_the_digits_that_the_metric_sees(sizes, n, mass) -> None:
    (i, h, o), single = sizes, {"dtype": torch.float32}
    model = nn.Sequential(
        nn.Linear(i, h, **single), nn.Tanh(), nn.Linear(h, o, **single)
    )
    case = model, torch.randn(n, i, **single), torch.arange(n) % o
    options = {"mass": mass, "solver": "cholesky"}
    exact = pulled_back(case, torch.float64, **options)
    metric = pulled_back(case, torch.float32, **options)
    assert {each.branch for each in metric.solve().values()} == {"push-through"}
    found, wanted = metric.natural_gradient(), exact.natural_gradient()
    for block in exact.blocks.values():
        own = {part.name: wanted[part.name] for part in block.parts}
        off = {name: found[name].double() - x for name, x in own.items()}
        assert block.norm(off) <= 1e-5 * block.norm(own)


@pytest.mark.parametrize("blocks", ["layer", "model"])
def test_the_subtracting_form_in_float32_is_not(digits: Digits, blocks: str) -> None:
    exact = pulled_back(digits, torch.float64, mass=1e-6, blocks=blocks)
    metric = pulled_back(
        digits, torch.float32, mass=1e-6, blocks=blocks, precision=torch.float32
    )
    expected = exact.natural_gradient()
    assert error(subtracting(metric, 0), expected) > 0.1
    # The covector is fine: in float64 the same form solves for it.
    assert error(subtracting(exact, 1), expected) < 1e-6


def test_one_refinement_recovers_digits(digits: Digits) -> None:
    exact = pulled_back(digits, torch.float64, mass=1e-4).natural_gradient()
    metric = pulled_back(digits, torch.float32, mass=1e-4)
    assert error(subtracting(metric, 1), exact) < 0.5 * error(
        subtracting(metric, 0), exact
    )


def test_the_small_matrix_in_float64_pays(digits: Digits) -> None:
    exact = pulled_back(digits, torch.float64, mass=1e-6).natural_gradient()
    errors = [
        error(
            pulled_back(
                digits, torch.float32, mass=1e-6, precision=precision
            ).natural_gradient(),
            exact,
        )
        for precision in (torch.float32, torch.float64)
    ]
    assert errors[1] < 0.2 * errors[0]


@pytest.mark.parametrize("blocks", ["layer", "model"])
def test_an_optimizer_step_in_float32(digits: Digits, blocks: str) -> None:
    moved = []
    for dtype in (torch.float64, torch.float32):
        metric = pulled_back(digits, dtype, mass=1e-6, blocks=blocks)
        before = {n: p.detach().clone() for n, p in metric.model.named_parameters()}
        rm.optim.RiemannianSGD(metric, lr=1e-3).step()
        after = dict(metric.model.named_parameters())
        moved.append({n: after[n].detach() - v for n, v in before.items()})
    # The parameters themselves are rounded to 6e-8 of their size.
    assert error(moved[1], moved[0]) < 1e-3


@pytest.mark.parametrize(
    ("manifold", "shape"),
    [
        (rm.manifolds.Stiefel(), (64, 32)),
        (rm.manifolds.CanonicalStiefel(), (64, 32)),
        (rm.manifolds.Sphere(), (64, 32)),
        (rm.manifolds.PoincareBall(), (64, 32)),
        (rm.manifolds.SPD(), (64, 64)),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
@pytest.mark.parametrize("mass", [1.0, 1e-6])
def test_float32_on_manifolds(
    digits: Digits, manifold: Any, shape: tuple[int, int], mass: float
) -> None:
    _, x, y = digits
    torch.manual_seed(1)
    first = rm.nn.Linear(*shape, manifold=manifold, dtype=torch.float32)
    last = nn.Linear(shape[1], 10, dtype=torch.float32)
    model = rm.nn.Sequential(first, nn.Tanh(), last)
    # Both precisions measure at the same point, which float32 has rounded.
    wide = pulled_back((model, x, y), torch.float32, mass=mass)
    found = wide.natural_gradient()
    exact = {}
    for name, block in wide.blocks.items():
        twice = block.double()
        residual = wide._found.residual.double()
        exact.update(twice.solve(residual=residual).vectors)
        assert block.rank < block.dim, name
    assert error(found, exact) <= 1e-5


def test_bfloat16_models_step(digits: Digits) -> None:
    model, x, y = digits
    rounded = copy.deepcopy(model).bfloat16(), x.bfloat16(), y
    metric = pulled_back(rounded, torch.bfloat16, mass=1e-2)
    exact = pulled_back(rounded, torch.float64, mass=1e-2)
    found = metric.natural_gradient()
    assert {v.dtype for v in found.values()} == {torch.bfloat16}
    for block in metric.blocks.values():
        assert block.inverse.factor.lower.dtype in (torch.float32, torch.float64)
    # Half a unit in the last place of bfloat16 is 2e-3; a chain of layers, rows and
    # costates rounds several times.
    assert error(found, exact.natural_gradient()) < 0.05
    before = {n: p.detach().clone() for n, p in metric.model.named_parameters()}
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5, momentum=0.9)
    optimizer.step()
    for name, p in metric.model.named_parameters():
        assert p.dtype == torch.bfloat16
        assert not torch.equal(p.detach(), before[name])
        assert p.isfinite().all()
    assert all(block.residual < 0.1 for block in optimizer.report)


def test_a_small_mass_asks_for_float64(digits: Digits) -> None:
    metric = pulled_back(digits, torch.float32, mass=1e-6)
    metric.natural_gradient()
    for block in metric.blocks.values():
        assert block.inverse.factor.lower.dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_large_rank_is_factorised_in_the_precision_of_the_model(
    dtype: torch.dtype,
) -> None:
    x = torch.randn(2049, 2100, dtype=dtype)
    model = nn.Linear(2100, 1, bias=False, dtype=dtype)
    metric = rm.LayerwiseMetric(
        model, output=rm.output.Euclidean(), mass=1e-1, solver="cholesky"
    )
    with metric.record():
        outputs = model(x)
    metric.backward(outputs.square().mean(), outputs)
    vector = metric.natural_gradient()["weight"]
    block = metric.blocks["model"]
    assert block.inverse.form == "dual"
    assert block.inverse.factor.lower.dtype == dtype
    flat = x.double()
    covector = 2.0 * flat.mT @ (flat @ model.weight.detach().double().mT) / 2049
    residual = flat.mT @ (flat @ vector.double().mT) / 2049 + 0.1 * vector.double().mT
    error = float((residual - covector).norm() / covector.norm())
    assert error < (1e-4 if dtype == torch.float32 else 1e-12)


def test_the_precision_can_be_chosen(digits: Digits) -> None:
    metric = pulled_back(digits, torch.float32, mass=1e-2, precision=torch.float32)
    metric.natural_gradient()
    for block in metric.blocks.values():
        assert block.inverse.factor.lower.dtype == torch.float32


def test_autocast_does_not_round_the_small_matrix(digits: Digits) -> None:
    model, x, y = digits
    exact = pulled_back(digits, torch.float64, mass=1e-2).natural_gradient()
    metric = rm.LayerwiseMetric(
        copy.deepcopy(model), output=rm.output.Categorical(), mass=1e-2
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with metric.record():
            logits = metric.model(x)
        loss = F.cross_entropy(logits.float(), y)
    metric.backward(loss, logits)
    assert error(metric.natural_gradient(), exact) < 0.1


@pytest.mark.parametrize("gap", [0.0, 20.0, 40.0, 60.0, 100.0, 200.0])
def test_the_velocity_of_outputs_that_hardly_move(gap: float) -> None:
    # The whitened residual is exp(gap / 2), and of it next to nothing is left.
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(3, 4).double()
    with torch.no_grad():
        model.bias.copy_(torch.tensor([gap, 0.0, 0.0]))
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=1e-2)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    with metric.record():
        z = model(x)
    metric.backward(F.cross_entropy(z, torch.tensor([1, 2, 1])), z)
    (solution,) = metric.solve().values()
    (block,) = metric.blocks.values()
    measured = block.image(solution.vectors)
    assert (solution.velocity - measured).norm() <= 1e-7 * measured.norm()
    optimizer.step()
    assert all(0.0 <= block.residual <= 1e-7 for block in optimizer.report)


@pytest.mark.parametrize("solver", ["auto", "cg"])
@pytest.mark.parametrize("mass", [1e-2, 1e-6, 1e-10])
def test_rows_that_are_nearly_normal_to_their_manifold(solver, mass: float) -> None:
    # Projecting them cancels, so that the trace of the small matrix may be negative.
    negative = 0
    for seed in range(10):
        torch.manual_seed(seed)
        layer = rm.nn.Linear(64, 1, bias=False, manifold=rm.manifolds.Sphere())
        layer.to(torch.float32)
        metric = rm.LayerwiseMetric(
            layer, rm.output.Euclidean(), mass=mass, solver=solver
        )
        x = torch.randn(8, 1, dtype=torch.float32) @ layer.weight.detach()
        with metric.record():
            z = layer(x)
        metric.backward((z - 1.0).square().sum(1).mean() / 2, z)
        (block,) = metric.blocks.values()
        found = metric.solve()[block.name].vectors["weight"].double()
        negative += block.inverse.trace < 0.0
        y = metric.linearization.residual.double()
        expected = block.double().solve(residual=y).vectors["weight"]
        # What cancelled was of the size of the gradient.
        size = (layer.weight.grad.norm() / mass).double()
        assert (found - expected).norm() <= 1e-6 * size
    assert negative > 0


def test_steps_of_rows_that_are_nearly_normal_to_their_manifold() -> None:
    for seed in range(10):
        torch.manual_seed(seed)
        layer = rm.nn.Linear(64, 1, bias=False, manifold=rm.manifolds.Sphere())
        layer.to(torch.float32)
        metric = rm.LayerwiseMetric(layer, rm.output.Euclidean(), mass=1e-2)
        x = torch.randn(8, 1, dtype=torch.float32) @ layer.weight.detach()
        start = layer.weight.detach().clone()

        def backward(
            layer: nn.Module = layer, metric: Any = metric, x: Tensor = x
        ) -> Tensor:
            with metric.record():
                z = layer(x)
            loss = (z - 1.0).square().sum(1).mean() / 2
            metric.backward(loss, z)
            return loss.detach()

        def loss(layer: nn.Module = layer, x: Tensor = x) -> Tensor:
            return (layer(x) - 1.0).square().sum(1).mean() / 2

        backward()
        rm.optim.RiemannianSGD(metric, lr=0.1).step()
        assert (layer.weight - start).norm() < 1e-3
        before = backward()
        assert rm.optim.LevenbergMarquardt(metric).step(loss) <= before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", ["tiny", "one", "max"])
def test_sums_of_products_have_the_range_of_float64(
    dtype: torch.dtype, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(precision, "_PIECE", 16)
    info = torch.finfo(dtype)
    size = {"tiny": 8.0 * info.tiny, "one": 1.0, "max": info.max / 8.0}[scale]
    u, v = (size * torch.rand(2, 5, 8).double() + size).to(dtype)
    expected = (u.double() * v.double()).sum()
    # bfloat16 is summed in itself where that holds the products.
    rtol = 4.0 * info.eps
    torch.testing.assert_close(precision.dot(u, v), expected, rtol=rtol, atol=0.0)
    torch.testing.assert_close(precision.wide_dot(u, v), expected, rtol=1e-14, atol=0.0)
    w = -v.flip(0)
    mixed = (u.double() * w.double()).sum()
    assert torch.isfinite(precision.dot(u, w))
    torch.testing.assert_close(precision.dot(u, w), mixed, rtol=rtol, atol=0.0)


def test_sums_of_products_pass_on_what_is_no_number() -> None:
    u = torch.tensor([float("nan"), 1.0])
    assert precision.dot(u, u).isnan()
    assert precision.dot(torch.zeros(0), torch.zeros(0)) == 0.0
    assert precision.dot(torch.full((2,), float("inf")), torch.ones(2)).isposinf()
    assert precision.dot(*torch.ones(2, 3, device="meta")).dtype == torch.float64


@pytest.mark.parametrize("scale", [1.0, 1e25])
def test_sums_of_products_under_vmap(scale: float) -> None:
    # Nothing can be read there.
    u = scale * torch.randn(3, 5, dtype=torch.float32)
    found = torch.func.vmap(precision.dot)(u, u)
    torch.testing.assert_close(found, u.double().square().sum(1), rtol=1e-12, atol=0.0)
    space = rm.TangentSpace(geoopt.Euclidean(), u[0])
    metric = rm.LayerMetric([rm.Part("w", space)])
    found = torch.func.vmap(lambda v: metric.inner(v, u[1]))(u)
    wanted = u.double() @ u[1].double()
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * scale**2)
