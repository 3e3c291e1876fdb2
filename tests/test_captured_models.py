"""Steps of models, manifolds, outputs and solvers of every kind, captured and usual."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import geoopt
import pytest
import torch
from cases import OUTPUTS
from manifold_cases import OURS, Case
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.conjugate import ConjugateGradients
from riemannian_modules.errors import NotCapturedWarning
from riemannian_modules.functional import DifferentialOperator, FunctionalMetric, Jet
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.nn import FixedPoint, Gate, Heads, Join, Recurrent, Residual
from riemannian_modules.nn import Sequential as Chain
from riemannian_modules.optim import CapturedStep, RiemannianSGD
from riemannian_modules.output import Categorical, Euclidean, Sampled

# The first one finds no gradients, which is another kind; five more are usual ones.
STEPS = 8
FULL = STEPS - 7


@dataclass(frozen=True)
class Steps:
    """What steps have left."""

    losses: list[Tensor]
    parameters: list[Tensor]
    replayed: int

    def equal(self, other: "Steps") -> bool:
        pairs = zip(
            self.losses + self.parameters,
            other.losses + other.parameters,
            strict=True,
        )
        return all(torch.equal(a, b) for a, b in pairs)


def squares(values: Any) -> Tensor:
    return torch.as_tensor(0.5 * (values - 0.3).square().sum() / len(values))


def entropy(outputs: Any) -> Tensor:
    heads = outputs.values() if isinstance(outputs, dict) else [outputs]
    return torch.stack([-z.log_softmax(-1)[..., 0].mean() for z in heads]).sum()


def steps_of(
    metric: ModelMetric,
    forward: Callable[[Tensor], Any],
    loss: Callable[[Any], Tensor],
    batches: list[Tensor],
    lr: float | None,
    captured: bool,
) -> Steps:
    optimizer = RiemannianSGD(metric, lr=lr)

    def step(x: Tensor) -> Tensor:
        outputs = forward(x)
        value = loss(outputs)
        metric.backward(value, outputs)
        optimizer.step()
        return value

    taken = CapturedStep(optimizer, step) if captured else None
    torch.manual_seed(5)
    losses = [(taken or step)(x).detach() for x in batches]
    parameters = [p.detach() for p in metric.model.parameters()]
    return Steps(losses, parameters, 0 if taken is None else taken.replayed)


def layerwise(
    model: nn.Module,
    output: Any,
    loss: Callable[[Any], Tensor],
    batches: list[Tensor],
    lr: float | None = 0.05,
    **options: Any,
) -> Steps:
    """Take usual and captured steps, which must leave the same; return the latter."""

    def take(captured: bool) -> Steps:
        own = copy.deepcopy(model)
        metric = rm.LayerwiseMetric(
            own, copy.deepcopy(output), mass=0.1, static_graph=True, **options
        )

        def forward(x: Tensor) -> Any:
            with metric.record():
                return own(x)

        return steps_of(metric, forward, loss, batches, lr, captured)

    found = take(True)
    assert found.equal(take(False))
    return found


def drawn(*shape: int, steps: int = STEPS) -> list[Tensor]:
    return [torch.randn(shape) for _ in range(steps)]


def perceptron(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for a, b in pairwise(widths):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


# --- conjugate gradients

FIXED = {
    "float64": (torch.float64, ConjugateGradients()),
    "float32": (torch.float32, ConjugateGradients()),
    "no preconditioner": (torch.float64, ConjugateGradients(pivots=0)),
    "pivots": (torch.float64, ConjugateGradients(pivots=16)),
}


@pytest.mark.parametrize("kind", FIXED)
def test_conjugate_gradients_of_one_problem_are_replayed(kind: str) -> None:
    dtype, solver = FIXED[kind]
    torch.set_default_dtype(dtype)
    batches = drawn(24, 12, steps=1) * STEPS
    model = perceptron(12, 16, 6)
    # So short that their number of iterations stays.
    found = layerwise(model, Categorical(), entropy, batches, 1e-6, solver=solver)
    assert found.replayed == FULL


@pytest.mark.filterwarnings("ignore::riemannian_modules.errors.NotCapturedWarning")
def test_another_number_of_iterations_is_not_replayed() -> None:
    model, near = perceptron(8, 12, 4), drawn(16, 8, steps=1)[0]
    batches = [near] * 8 + [30.0 * near, 1e-3 * near, near]
    found = layerwise(model, Categorical(), entropy, batches, 1e-6, solver="cg")
    assert 0 < found.replayed < len(batches) - 5


def test_the_solver_that_costs_less_is_chosen_within_captured_steps() -> None:
    torch.set_default_dtype(torch.float32)
    model = perceptron(64, 128, 10)
    metric = rm.LayerwiseMetric(copy.deepcopy(model), Categorical(), mass=0.1)
    batches = drawn(96, 64, steps=1) * STEPS
    with metric.record():
        outputs = metric.model(batches[0])
    metric.backward(entropy(outputs), outputs)
    optimizer = RiemannianSGD(metric, lr=1e-6)
    optimizer.step()
    assert "cg" in {block.solution.branch for block in optimizer.report}
    assert layerwise(model, Categorical(), entropy, batches, 1e-6).replayed > 0


def test_what_has_not_converged_is_a_warning_in_each_step() -> None:
    solver = ConjugateGradients(iterations=1, pivots=0)
    with (
        pytest.warns(NotCapturedWarning, match="reads a number"),
        pytest.warns(rm.errors.NotConvergedWarning),
    ):
        found = layerwise(
            perceptron(4, 5, 3),
            Categorical(),
            entropy,
            drawn(6, 4),
            solver=solver,
            max_memory=1 << 14,
        )
    assert found.replayed == 0


# --- functions of a model


def heat(u: Jet, z: Tensor) -> Tensor:
    return u.d(0) - u.d(1, 1) / 4.0


@pytest.mark.parametrize("lr", [None, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_differential_operators_are_captured(
    dtype: torch.dtype, lr: float | None
) -> None:
    torch.set_default_dtype(dtype)
    model, batches = perceptron(2, 6, 1), drawn(8, 2)

    def take(captured: bool) -> Steps:
        own = copy.deepcopy(model)
        operator = DifferentialOperator(heat)
        metric = FunctionalMetric(own, operator, Euclidean(), mass=0.1)
        return steps_of(metric, metric, squares, batches, lr, captured)

    found = take(True)
    assert found.equal(take(False))
    assert found.replayed == FULL


# --- outputs, manifolds and compositions

KINDS = ["euclidean", "bernoulli", "poisson", "on-sphere", "on-spd"]


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_output_metrics_are_captured(kind: str, sampled: bool) -> None:
    case = OUTPUTS[kind]
    model = perceptron(4, 5, case.width)
    if case.head is not None:
        model.append(case.head())
    metric = Sampled(case.metric(), probes=1) if sampled else case.metric()
    found = layerwise(model, metric, squares, drawn(6, 4))
    assert found.replayed == FULL


class Curved(nn.Module):
    """A product with a point of a manifold."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        manifold = case.make()
        self.point = geoopt.ManifoldParameter(case.draw(manifold), manifold=manifold)
        rows = case.shape[0]
        self.first, self.last = nn.Linear(4, rows), nn.Linear(self._flat().shape[1], 3)

    def _flat(self) -> Tensor:
        return self.point.reshape(len(self.point), -1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(torch.tanh(self.first(x)) @ self._flat()))


# How often a point of a Birkhoff polytope is balanced depends on the step. Every second
# one of the others: the shipped ones have near relatives beside them.
STEADY = [case for case in OURS if "Birkhoff" not in case.name][::2]


@pytest.mark.parametrize("case", STEADY, ids=lambda case: case.name)
def test_steps_on_manifolds_are_captured(case: Case) -> None:
    model = Curved(case)
    output = Sampled(Categorical(), probes=1)
    assert layerwise(model, output, entropy, drawn(6, 4), 0.02).replayed > 0


def cell() -> nn.Module:
    return Chain(Join(nn.Linear(4, 3), small(3, 3)), nn.Tanh())


def small(a: int, b: int) -> nn.Linear:
    layer = nn.Linear(a, b)
    with torch.no_grad():
        layer.weight.mul_(0.1)
    return layer


COMPOSED: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "residual": (lambda: Chain(Residual(perceptron(4, 4)), nn.Linear(4, 3)), (5, 4)),
    "gate": (
        lambda: Chain(Gate(gate=nn.Linear(4, 1), value=nn.Linear(4, 3))),
        (5, 4),
    ),
    "recurrent": (lambda: Chain(Recurrent(cell(), 3), nn.Linear(3, 3)), (4, 3, 4)),
    "fixed point": (lambda: Chain(FixedPoint(cell(), 3), nn.Linear(3, 3)), (5, 4)),
    "heads": (
        lambda: Heads({"a": nn.Linear(4, 3), "b": nn.Linear(4, 2)}),
        (5, 4),
    ),
}


@pytest.mark.parametrize("kind", COMPOSED)
def test_compositions_are_captured(kind: str) -> None:
    make, shape = COMPOSED[kind]
    model = make()
    output: Any = Categorical()
    if kind == "heads":
        output = {"a": Categorical(), "b": Categorical()}
    batches = drawn(*shape, steps=1) * STEPS
    found = layerwise(model, output, entropy, batches, 1e-6)
    assert found.replayed == FULL


# --- tokens


def words(seed: int, count: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, count, (6, 3), generator=generator)


def language() -> nn.Module:
    return nn.Sequential(nn.Embedding(9, 4), nn.Flatten(), nn.Linear(12, 3))


def test_tokens_that_stay_are_captured() -> None:
    found = layerwise(language(), Categorical(), entropy, [words(0)] * STEPS)
    assert found.replayed == FULL


def test_a_number_of_tokens_that_varies_is_not_captured() -> None:
    batches = [words(seed, 2 + seed % 7) for seed in range(16)]
    with pytest.warns(NotCapturedWarning, match="tokens.py.*differs from step to step"):
        found = layerwise(language(), Categorical(), entropy, batches)
    assert found.replayed == 0
