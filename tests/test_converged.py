"""Residuals that are fitted exactly: what is left of the outputs is rounding."""

from collections.abc import Callable
from importlib import import_module

import pytest
import torch
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError

Change = Callable[[Tensor, Tensor, float], Tensor]


class JointDiagonal(nn.Module):
    """What is left beside the diagonals of symmetric matrices with one eigenbasis."""

    def __init__(self, examples: int = 10, start: float = 0.0) -> None:
        super().__init__()
        basis = torch.linalg.qr(torch.randn(8, 8).double())[0]
        values = torch.randn(examples, 8).double()
        self.data = basis @ values.diag_embed() @ basis.mT
        x = torch.linalg.qr(basis + start * torch.randn(8, 8))[0]
        x = x * torch.sign((x * basis).sum(0))
        x[:, 0] *= torch.linalg.det(x)
        self.x = nn.Parameter(x)
        self.change: Change | None = None
        self.amount = 0.0

    def forward(self, a: Tensor) -> Tensor:
        rotated = self.x.mT @ a @ self.x
        rest = rotated - rotated.diagonal(dim1=-2, dim2=-1).diag_embed()
        if self.change is not None:
            rest = self.change(rest, a, self.amount)
        return rest.flatten(1)


@pytest.fixture(autouse=True)
def replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that does not tell whether saved tensors have hooks."""
    products = import_module("riemannian_modules.rules.products")
    monkeypatch.setattr(products, "saved_as_they_are", lambda: False)


def squares(z: Tensor) -> Tensor:
    return z.square().sum(1).mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("curved", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_an_exact_fit_goes_down_to_rounding(
    seed: int, curved: bool, dtype: torch.dtype
) -> None:
    torch.manual_seed(seed)
    model = JointDiagonal(start=0.15).to(dtype)
    data = model.data.to(dtype)
    if curved:
        rm.geometrize(model, {"x": rm.manifolds.SpecialOrthogonal()})
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(2.0))
    optimizer = rm.optim.LevenbergMarquardt(metric)
    for _ in range(20):
        with metric.record():
            z = model(data)
        metric.backward(squares(z), z)
        optimizer.step(lambda: squares(model(data)))
    # Without a manifold zero is a solution, which is met more slowly.
    assert squares(model(data)).item() < 1e3 * torch.finfo(dtype).eps ** 2


def at_the_solution(examples: int = 10) -> tuple[JointDiagonal, rm.LayerwiseMetric]:
    torch.manual_seed(0)
    model = JointDiagonal(examples)
    assert 0.0 < model(model.data).abs().max().item() < 1e-13
    return model, rm.LayerwiseMetric(model, rm.output.Euclidean(), blocks="tensor")


def backward(model: JointDiagonal, metric: rm.LayerwiseMetric) -> None:
    with metric.record():
        z = model(model.data)
    metric.backward(squares(z), z)


@pytest.mark.parametrize("examples", [1, 8, 11])
def test_the_first_pass_at_a_solution_has_the_right_rows(examples: int) -> None:
    """With eight examples of 8 x 8 any dimension could be theirs."""
    model, metric = at_the_solution(examples)
    for _ in range(2):
        backward(model, metric)
        (part,) = metric.blocks["x"].parts

        def outputs(x: Tensor) -> Tensor:
            return torch.func.functional_call(model, {"x": x}, (model.data,))

        slopes = torch.func.jacrev(outputs)(model.x.detach()).reshape(-1, 64)
        rows = part.factor.to_dense()
        torch.testing.assert_close(
            rows.mT @ rows, slopes.mT @ slopes / examples, rtol=1e-9, atol=1e-11
        )


def random(rest: Tensor, a: Tensor, amount: float) -> Tensor:
    return rest * (torch.rand_like(rest) >= amount)


def statistic(rest: Tensor, a: Tensor, amount: float) -> Tensor:
    """The mean of the inputs of a batch, which leaves no trace in the graph."""
    return rest * (1.0 + amount * a.diagonal(dim1=-2, dim2=-1).mean())


def mean(rest: Tensor, a: Tensor, amount: float) -> Tensor:
    return rest - amount * rest.mean(0)


@pytest.mark.filterwarnings("ignore:.*called random operation:UserWarning")
@pytest.mark.parametrize("change", [random, statistic, mean])
@pytest.mark.parametrize("passes", [0, 4])
def test_what_is_refused_elsewhere_is_refused_at_a_solution(
    change: Change, passes: int
) -> None:
    """Also where nothing but the outputs of the replay could tell of it."""
    model, metric = at_the_solution()
    model.change, model.amount = (None if change is mean else change), 0.0
    for _ in range(passes):
        backward(model, metric)
    model.change, model.amount = change, 0.5
    with pytest.raises(LinearizationError):
        backward(model, metric)


@pytest.mark.parametrize("examples", [1, 10])
def test_a_module_that_changes_after_its_pass_is_refused(examples: int) -> None:
    """Where it is no attribute that changes, only the bits of the outputs tell."""
    model, metric = at_the_solution(examples)
    held = [1.0]
    model.change = lambda rest, a, amount: rest * held[0]
    for _ in range(4):
        backward(model, metric)
    with metric.record():
        z = model(model.data)
    held[0] = 1.5
    with pytest.raises(LinearizationError, match="recorded outputs"):
        metric.backward(squares(z), z)
