"""What all optimizers that look at the loss keep: their state, the gradient given."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.optim import (
    GaussNewton,
    LevenbergMarquardt,
    LineSearch,
    StrongWolfe,
    TrustRegion,
)

Make = Callable[[rm.LayerwiseMetric], Any]
SEARCHING: dict[str, Make] = {
    "Levenberg-Marquardt": LevenbergMarquardt,
    "trust region": TrustRegion,
    "Armijo": LineSearch,
    "strong Wolfe": lambda metric: LineSearch(metric, StrongWolfe()),
}
ALL: dict[str, Make] = {**SEARCHING, "Gauss-Newton": GaussNewton}


class Problem:
    """A model, its metric, and a step of any optimizer."""

    def __init__(
        self, model: nn.Module, x: Tensor, y: Tensor, sampled: bool = False, **options
    ) -> None:
        self.model, self.x, self.y = model, x, y
        output = rm.output.Euclidean(2.0 / y[0].numel())
        if sampled:
            output = rm.output.Sampled(output)
        self.metric = rm.LayerwiseMetric(model, output, **options)

    def loss(self) -> Tensor:
        return F.mse_loss(self.model(self.x), self.y)

    def loss_at(self, values: list[Tensor]) -> Tensor:
        names = [name for name, _ in self.model.named_parameters()]
        point = dict(zip(names, values, strict=True))
        z = torch.func.functional_call(self.model, point, (self.x,))
        return F.mse_loss(z, self.y).detach()

    def backward(self) -> None:
        with self.metric.record():
            z = self.model(self.x)
        self.metric.backward(F.mse_loss(z, self.y), z)

    def step(self, optimizer: Any, closure: Callable[[], Any] | None = None) -> float:
        def loss(z: Tensor) -> Any:
            # With a graph it is that of the start.
            start = z.requires_grad or closure is None
            return F.mse_loss(z, self.y) if start else closure()

        if isinstance(optimizer, GaussNewton):
            return optimizer.step(lambda: self.model(self.x), loss)
        return optimizer.step(self.loss if closure is None else closure)

    def values(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def linear(dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    x = torch.randn(60, 5, dtype=dtype)
    return Problem(nn.Linear(5, 1).to(dtype), x, x.sum(1, keepdim=True), mass=1e-3)


def curved(manifold: Any = None, **options: Any) -> Problem:
    torch.manual_seed(0)
    first = rm.nn.Linear(4, 5, manifold=manifold)
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(5, 2))
    return Problem(model, torch.randn(9, 4), torch.randn(9, 2), mass=0.1, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_they_go_on_after_the_minimum(name: str, dtype: torch.dtype) -> None:
    problem = linear(dtype)
    optimizer = ALL[name](problem.metric)
    for index in range(60):
        if index == 30:
            problem.y = problem.y + 1.0
        problem.backward()
        final = problem.step(optimizer)
    assert final < 1e-9
    for declared in problem.metric.parameters:
        assert 1e-12 < declared.mass.scalar < 1e6


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("name", SEARCHING)
def test_a_closure_that_goes_backward_changes_nothing(name: str, plain: bool) -> None:
    problem = curved()
    optimizer = SEARCHING[name](problem.metric)

    def closure() -> Tensor:
        if plain:
            problem.model.zero_grad()
            loss = problem.loss()
            loss.backward()
            return loss
        problem.backward()
        return problem.loss()

    with pytest.raises(rm.errors.NotRecordedError, match="only evaluates the loss"):
        optimizer.step(closure)
    problem.backward()
    before, mass = problem.values(), problem.metric.state_dict()
    passes = problem.metric.passes
    with pytest.raises(
        TypeError, match=r"only evaluates the loss.* go backward before"
    ):
        optimizer.step(closure)
    assert all(map(torch.equal, before, problem.values()))
    assert (problem.metric.state_dict(), problem.metric.passes) == (mass, passes)
    # It took the gradients away by itself.
    problem.backward()
    assert problem.step(optimizer) < float(problem.loss_at(before))


class Refusing(rm.retractions.Retraction):
    """Goes straight on, and raises at the second point that a parameter is put to."""

    def __init__(self, error: type[BaseException], parameters: int) -> None:
        self.error, self.left = error, parameters

    def order(self, manifold: Any) -> int:
        return 1

    def __call__(self, manifold: Any, x: Tensor, u: Tensor) -> Tensor:
        self.left -= 1
        if self.left < 0:
            raise self.error("outside of the injectivity radius")
        return x + u


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ALL)
def test_an_error_at_the_second_point_puts_the_parameters_back(
    name: str, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = curved()
    optimizer = ALL[name](problem.metric)
    optimizer.retraction = Refusing(error, len(problem.values()))
    problem.backward()
    before, mass = problem.values(), problem.metric.state_dict()["mass"]
    start = float(problem.loss().detach())
    monkeypatch.setattr(F, "mse_loss", higher(start))
    with pytest.raises(error, match="injectivity"):
        problem.step(optimizer)
    assert all(map(torch.equal, before, problem.values()))
    assert problem.metric.state_dict()["mass"] == mass


@pytest.mark.parametrize("name", ALL)
def test_an_error_between_the_points_puts_the_parameters_back(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = curved()
    optimizer = ALL[name](problem.metric)
    problem.backward()
    before = problem.values()

    def interrupted(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(problem.metric, "joint_loss", interrupted)
    monkeypatch.setattr("riemannian_modules.optim.output_map.OutputMap.total", later())
    with pytest.raises(KeyboardInterrupt):
        problem.step(optimizer)
    assert all(map(torch.equal, before, problem.values()))


@pytest.mark.parametrize("manifold", [None, rm.manifolds.Stiefel()], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_an_error_in_the_loss_puts_the_parameters_back(
    name: str, manifold: Any
) -> None:
    problem = curved(manifold)
    optimizer = ALL[name](problem.metric)
    problem.backward()
    before = problem.values()
    with pytest.raises(ZeroDivisionError):
        problem.step(optimizer, lambda: 1 / 0)
    assert all(map(torch.equal, before, problem.values()))
    problem.metric.parameters.require_unmoved(problem.model.parameters())


@pytest.mark.parametrize("manifold", [None, rm.manifolds.Stiefel()], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_a_saved_run_goes_on_the_same(name: str, manifold: Any) -> None:
    runs = []
    for interrupted in (False, True):
        sampled = name == "Gauss-Newton"
        problem = curved(manifold, blocks="layer", sampled=sampled)
        metric, optimizer = problem.metric, ALL[name](problem.metric)
        for index in range(8):
            problem.backward()
            problem.step(optimizer)
            if interrupted and index == 3:
                saved = copy.deepcopy([metric.state_dict(), optimizer.state_dict()])
                metric.set_mass(7.0)
                optimizer = ALL[name](metric)
                # These two find masses, which are in their own state.
                if name not in {"Levenberg-Marquardt", "Gauss-Newton"}:
                    metric.load_state_dict(saved[0])
                optimizer.load_state_dict(saved[1])
        runs.append(problem.values())
    assert all(map(torch.equal, *runs))


@pytest.mark.parametrize("manifold", [None, rm.manifolds.Stiefel()], ids=str)
@pytest.mark.parametrize("name", ALL)
def test_where_the_gradient_is_zero_nothing_moves(name: str, manifold: Any) -> None:
    problem = curved(manifold, sampled=name == "Gauss-Newton")
    optimizer = ALL[name](problem.metric)
    before, mass = problem.values(), problem.metric.state_dict()["mass"]

    def flat(z: Tensor) -> Tensor:
        return (0.0 * z).sum() + 1.0

    def outputs() -> Tensor:
        return problem.model(problem.x)

    with problem.metric.record():
        z = outputs()
    problem.metric.backward(flat(z), z)
    if isinstance(optimizer, GaussNewton):
        assert optimizer.step(outputs, flat) == 1.0
        assert (optimizer.report.trials, optimizer.report.mass) == (0, 1.0)
    else:
        assert optimizer.step(lambda: flat(outputs())) == 1.0
    assert not optimizer.report.accepted
    assert all(map(torch.equal, before, problem.values()))
    assert problem.metric.state_dict()["mass"] == mass


@pytest.mark.parametrize("name", ALL)
def test_they_ask_for_what_they_need(name: str) -> None:
    problem = curved()
    optimizer = ALL[name](problem.metric)
    kind = type(optimizer)
    first = "pull_back" if name == "Gauss-Newton" else "before every"
    with pytest.raises(rm.errors.NotRecordedError, match=first):
        problem.step(optimizer)
    problem.backward()
    if name in SEARCHING:
        with pytest.raises(TypeError, match="needs a function"):
            optimizer.step()
        problem.step(optimizer)
        with pytest.raises(rm.errors.NotRecordedError, match="before every"):
            problem.step(optimizer)
    with pytest.raises(TypeError, match=rf"{kind.__name__}\(metric\)"):
        kind(problem.model.parameters())
    with pytest.raises(ValueError, match="no further groups"):
        optimizer.add_param_group({"params": []})
    with pytest.raises(TypeError, match="state_dict"):
        copy.deepcopy(optimizer)


def higher(start: float) -> Callable[[Tensor, Tensor], Tensor]:
    """A loss that is higher wherever it is not what it was."""
    mse_loss = F.mse_loss

    def loss(z: Tensor, y: Tensor) -> Tensor:
        found = mse_loss(z, y)
        return found if float(found.detach()) == start else found + 10.0

    return loss


def later() -> Callable[..., float]:
    """What counts the loss of all processes, and is interrupted at the second one."""
    calls = []

    def total(self: Any, value: float) -> float:
        calls.append(value)
        if len(calls) > 1:
            raise KeyboardInterrupt
        return value

    return total


@pytest.mark.parametrize("what", [None, "a", [1.0], 1j, "vector", "complex"])
@pytest.mark.parametrize("name", SEARCHING)
def test_a_closure_that_returns_no_number(name: str, what: Any) -> None:
    problem = curved()
    optimizer = SEARCHING[name](problem.metric)
    values = {"vector": torch.ones(3), "complex": torch.tensor(1j)}
    found = values.get(what, what) if isinstance(what, str) else what
    problem.backward()
    before = problem.values()
    with pytest.raises(TypeError, match="the closure returned"):
        problem.step(optimizer, lambda: found)
    assert all(map(torch.equal, before, problem.values()))
    # The same pass serves a step that is right.
    start = float(problem.loss().detach())
    assert problem.step(optimizer) < start


@pytest.mark.parametrize("name", SEARCHING)
def test_a_changed_gradient_is_what_counts(name: str) -> None:
    problem = curved()
    optimizer = SEARCHING[name](problem.metric)
    problem.backward()
    problem.model[0].weight.grad.zero_()
    problem.model[0].bias.grad.zero_()
    before = problem.values()
    problem.step(optimizer)
    moved = [
        not torch.equal(*pair) for pair in zip(before, problem.values(), strict=True)
    ]
    assert moved == [False, False, True, True]


@pytest.mark.parametrize("name", SEARCHING)
def test_a_parameter_without_gradient_stands_still(name: str) -> None:
    whole, part = curved(blocks="model"), curved(blocks="model")
    optimizer = SEARCHING[name](whole.metric)
    whole.backward()
    whole.model[0].weight.grad = None
    before = whole.values()
    start = float(whole.loss().detach())
    assert whole.step(optimizer) < start
    assert torch.equal(before[0], whole.model[0].weight)
    # The others move as where it cannot: in the metric in which it stands still.
    other = SEARCHING[name](part.metric)
    part.backward()
    part.model[0].weight.grad = None
    alone = other._descent(other._moving())
    frozen = curved(blocks="model")
    frozen.model[0].weight.requires_grad_(False)
    metric = rm.LayerwiseMetric(
        frozen.model, output=part.metric.output, blocks="model", mass=0.1
    )
    with metric.record():
        z = frozen.model(frozen.x)
    metric.backward(F.mse_loss(z, frozen.y), z)
    for key, vector in metric.natural_gradient().items():
        torch.testing.assert_close(alone[key], -vector)


def test_gauss_newton_puts_its_mass_back() -> None:
    problem = curved()
    optimizer = GaussNewton(problem.metric)
    problem.backward()
    calls = []

    def outputs() -> Tensor:
        calls.append(1)
        if len(calls) > 7:
            raise RuntimeError("out of memory")
        return problem.model(problem.x)

    def rising(z: Tensor) -> Tensor:
        # Higher wherever it is looked at again.
        return F.mse_loss(z, problem.y) + 10.0 * (len(calls) % 6 != 1)

    before = problem.values()
    with pytest.raises(RuntimeError, match="out of memory"):
        optimizer.step(outputs, rising)
    assert len(calls) > 6
    assert all(map(torch.equal, before, problem.values()))
    assert optimizer.param_groups[0]["scale"] == 1.0
    assert all(d.mass.scalar == 0.1 for d in problem.metric.parameters)


def test_no_small_matrix_is_made_for_a_bound_on_memory() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 60), nn.Tanh(), nn.Linear(60, 3))
    x, y = torch.randn(300, 4), torch.arange(300) % 3
    metric = rm.LayerwiseMetric(
        model, rm.output.Categorical(), mass=1.0, blocks="model", max_memory="2MiB"
    )
    optimizer = LevenbergMarquardt(metric)
    for _ in range(3):
        with metric.record():
            z = model(x)
        metric.backward(F.cross_entropy(z, y), z)
        optimizer.step(lambda: F.cross_entropy(model(x), y))
        assert optimizer.report.accepted
    assert optimizer.report.mass < 1.0
    for block in metric.blocks.values():
        assert "factor" not in vars(block.inverse)


def test_clip_is_of_the_metric_whatever_the_curvature_is_taken_for() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 3))
    output = rm.output.Sampled(rm.output.Categorical(), gradient_rows=False)
    metric = rm.LayerwiseMetric(model, output, mass=1e-4)
    optimizer = rm.optim.RiemannianSGD(metric, clip=0.01)
    x, y = torch.randn(20, 4), torch.arange(20) % 3
    inflated = []
    for _ in range(12):
        with metric.record():
            z = model(x)
        metric.backward(F.cross_entropy(z, y), z)
        optimizer.step()
        motion = optimizer.report.motion
        inflated.append(float(motion.inflation))
        assert float(motion.norm) == pytest.approx(0.01, rel=1e-6)
    assert max(inflated) > 1.5
