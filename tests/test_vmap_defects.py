"""What torch.func.vmap differentiates wrongly: autograd has the last word."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacfwd, jacrev, jvp

import riemannian_modules as rm
from riemannian_modules.rules.agree import agree, combinations

torch_vmap_is_wrong_for_them = {"cdist"}


class LogDet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 4))

    def forward(self, x: Tensor) -> Tensor:
        matrix = torch.sin(x @ self.w).view(-1, 2, 2) + 2.0 * torch.eye(2).to(x)
        return torch.linalg.slogdet(matrix)[1].unsqueeze(1)


class Solve(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2, 2) + 3.0 * torch.eye(2))

    def forward(self, x: Tensor) -> Tensor:
        matrix = self.w.expand(len(x), 2, 2)
        return torch.linalg.solve(matrix, x.unsqueeze(-1)).squeeze(-1)


class Centers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(5, 2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.exp(-torch.cdist(x, self.w))


def equilibrium() -> nn.Module:
    inner = nn.Linear(3, 3)
    inner.weight.data.mul_(0.3)
    both = rm.nn.Join(nn.Linear(2, 3), inner)
    fixed = rm.nn.FixedPoint(rm.nn.Sequential(both, nn.Tanh()), 3)
    return nn.Sequential(fixed, nn.Linear(3, 2))


MODELS: dict[str, Any] = {
    "slogdet": LogDet,
    "solve": Solve,
    "cdist": Centers,
    "fixed point": equilibrium,
}


def rows_of(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The rows of the Euclidean metric by autograd, one output entry at a time."""
    z, parameters = model(x), dict(model.named_parameters())
    found: dict[str, list[Tensor]] = {name: [] for name in parameters}
    for j in range(z.shape[1]):
        for i in range(len(x)):
            grads = torch.autograd.grad(
                z[i, j], list(parameters.values()), retain_graph=True
            )
            for name, grad in zip(parameters, grads, strict=True):
                found[name].append(grad.flatten() / len(x) ** 0.5)
    return {name: torch.stack(rows) for name, rows in found.items()}


def require_rows(metric: Any, x: Tensor) -> None:
    expected = rows_of(metric.model, x)
    for block in metric.blocks.values():
        for part in block.parts:
            found = part.factor.to_dense()
            torch.testing.assert_close(
                found.mT @ found,
                expected[part.name].mT @ expected[part.name],
                rtol=1e-9,
                atol=1e-11,
            )


@pytest.mark.parametrize("name", MODELS)
def test_a_layerwise_metric_has_the_rows_of_autograd(name: str) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), torch.randn(6, 2).double()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), blocks="tensor")
    for _ in range(2):
        with metric.record():
            z = model(x)
        metric.backward(0.5 * z.square().sum(1).mean(), z)
        require_rows(metric, x)


@pytest.mark.parametrize("examples", [1, 2, 6])
@pytest.mark.parametrize("name", MODELS)
def test_a_functional_metric_has_the_gradient_of_autograd(
    name: str, examples: int
) -> None:
    torch.manual_seed(0)
    model, x = MODELS[name]().double(), torch.randn(examples, 2).double()
    metric = rm.functional.FunctionalMetric(
        model,
        lambda net, x: net(x.unsqueeze(0))[0],
        rm.output.Euclidean(),
        blocks="tensor",
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for _ in range(2):
            z = metric(x)
            metric.backward(0.5 * z.square().sum(1).mean(), z)
    told = [str(each.message) for each in said if "one by one" in str(each.message)]
    assert len(told) <= (name in torch_vmap_is_wrong_for_them)
    require_rows(metric, x)
    loss = 0.5 * model(x).square().sum(1).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    for parameter, e in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, e, rtol=1e-9, atol=1e-12)


class Attention(nn.Module):
    """The derivative by the bias of its keys is nothing but rounding."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        scores = torch.softmax(self.q(x) @ self.k(x).mT / 4.0, -1)
        y: Tensor = (scores @ self.v(x)).mean(-2)
        return y


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("examples", [4, 9])
def test_rounding_is_no_reason_to_go_one_by_one(examples: int) -> None:
    torch.manual_seed(0)
    model, x = Attention().double(), torch.randn(examples, 7, 16).double()
    metric = rm.functional.FunctionalMetric(
        model, lambda net, x: net(x), rm.output.Euclidean()
    )
    z = metric(x)
    metric.backward(0.5 * z.square().sum(1).mean(), z)


def nothing(net: Any, z: Tensor) -> Tensor:
    """Three second derivatives that cancel: what is left is rounding."""
    along = torch.eye(2).double()[1]

    def slope(y: Tensor) -> Any:
        return jvp(net, (y,), (along,))[1]

    by_parts = jacrev(jacrev(net))(z)[:, 1, 1]
    found: Tensor = jvp(slope, (z,), (along,))[1] - 2.0 * by_parts
    return found + jacfwd(jacrev(net))(z)[:, 1, 1]


@pytest.mark.filterwarnings("error:torch.func.vmap gives other derivatives")
@pytest.mark.parametrize("seed", range(3))
def test_terms_that_cancel_are_no_reason_either(seed: int) -> None:
    torch.manual_seed(seed)
    layers = [nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 1)]
    model = nn.Sequential(*layers).double()
    metric = rm.functional.FunctionalMetric(model, nothing)
    values = metric(torch.rand(10, 2).double())
    metric.backward(0.5 * values.square().mean(), values)


def test_what_is_more_than_rounding_of_the_terms_is_found() -> None:
    terms = torch.randn(3, 4, 50).double()

    def scaled(scale: float) -> dict[str, Tensor]:
        # The sum of the terms and their opposites, in another order.
        both = scale * torch.cat([terms, -terms.flip(-1)], -1)
        return {"w": both.cumsum(-1)[..., -1]}

    rounding = float(scaled(1.0)["w"].abs().max())
    assert 0.0 < rounding < 1e-13
    for factor, same in ((0.0, True), (2.0, True), (1e3, False)):
        assert agree({"w": scaled(1.0)["w"] + factor * rounding}, scaled) is same


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_wrong_row_among_many_is_found(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    rank = 500
    jacobian = torch.randn(30, 7, dtype=dtype)
    jacobian[0] *= 0.1
    cotangents = torch.randn(rank, 30, dtype=dtype)
    cotangents[::3, 1:] = 0.0
    drawn = torch.get_rng_state()
    weights = combinations(cotangents)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert torch.equal(weights, combinations(cotangents))
    assert len(weights) == 3

    def scaled(scale: float) -> dict[str, Tensor]:
        return {"w": ((scale * weights @ cotangents) @ jacobian).unsqueeze(0)}

    right = (cotangents @ jacobian).unsqueeze(0)
    assert agree({"w": right}, scaled, weights)
    # Also one of the small ones, and one that no finite bound could tell.
    for row, value in [(0, 0.0), (3, 1e30), (250, torch.inf), (498, -1.0)]:
        wrong = right.clone()
        wrong[0, row] = value
        assert not agree({"w": wrong}, scaled, weights)


class OneWrongSlope(torch.autograd.Function):
    """The sine, with a forward mode that is wrong for one of its entries."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.sin()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> Tensor:
        return cotangent * ctx.saved_tensors[0].cos()

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        slope = ctx.saved_tensors[0].cos()
        wrong = torch.arange(slope.shape[-1]) == 17
        return tangent * torch.where(wrong, slope.abs() + 1.0, slope)


class Waves(nn.Module):
    """More outputs for each example than parameters, so that these are told apart."""

    def __init__(self, wrong: bool) -> None:
        super().__init__()
        self.w, self.wrong = nn.Parameter(torch.randn(2).double()), wrong

    def forward(self, x: Tensor) -> Tensor:
        phase: Tensor = torch.stack([x, x.square()], -1) @ self.w
        return OneWrongSlope.apply(phase) if self.wrong else phase.sin()


def waves(wrong: bool, way: str) -> tuple[Any, Tensor, Tensor]:
    """Return a metric of 60 outputs and 2 parameters, its points and their values."""
    torch.manual_seed(0)
    model, x = Waves(wrong), torch.rand(2, 60).double()
    if way == "layerwise":
        layerwise = rm.LayerwiseMetric(model, rm.output.Euclidean())
        with layerwise.record():
            return layerwise, x, model(x)
    functional = rm.functional.FunctionalMetric(
        model, lambda net, x: net(x), rm.output.Euclidean()
    )
    return functional, x, functional(x)


def test_a_wrong_forward_mode_of_one_output_is_found() -> None:
    metric, x, z = waves(True, "functional")
    with pytest.warns(UserWarning, match="one by one"):
        metric.backward(0.5 * z.square().sum(1).mean(), z)
    require_rows(metric, x)


@pytest.mark.parametrize("way", ["functional", "layerwise"])
def test_looking_at_many_rows_takes_few_passes(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric, x, z = waves(False, way)
    taken = []
    grad = torch.autograd.grad

    def counted(*args: Any, **kwargs: Any) -> Any:
        taken.append(args)
        return grad(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", counted)
        metric.backward(0.5 * z.square().sum(1).mean(), z)
    # Three sums of the 60 rows of each of two examples, and some for the gradient.
    assert 6 <= len(taken) <= 20
    require_rows(metric, x)
