"""Bad input: its own error, which names the layer and the remedy, and no change."""

import copy
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import riemannian_modules as rm
from riemannian_modules import errors
from riemannian_modules.testing.reference import dense_natural_gradient

REMEDY = re.compile(
    r"\b(use|call|pass|build|raise|lower|load|skip|check|put|freeze|give|hand|run|"
    r"choose|declare|register_rule|subclass|try|needs|must)\b",
    re.IGNORECASE,
)


def content(tensor: Tensor | None) -> bytes | None:
    """Every bit of a tensor, so that NaN equals NaN and 0.0 differs from -0.0."""
    if tensor is None:
        return None
    plain = tensor.detach().as_subclass(torch.Tensor).contiguous()
    return plain.numpy().tobytes()


def snapshot(
    metric: rm.LayerwiseMetric | None, optimizer: rm.optim.RiemannianSGD | None
) -> dict[str, Any]:
    """Everything that a refused call must leave alone."""
    state: dict[str, Any] = {}
    if metric is not None:
        state["version"] = metric.version
        state["passes"] = metric.passes
        state["blocks"] = {name: id(block) for name, block in metric.blocks.items()}
        for name, p in metric.model.named_parameters():
            state[name] = (content(p), content(p.grad), id(p.grad))
        for declared in metric.parameters:
            state[f"mass of {declared.name}"] = declared.mass
            view = declared.view
            state[f"view of {declared.name}"] = None if view is None else view.metric
    if optimizer is not None:
        groups = copy.deepcopy(optimizer.state_dict())
        state["groups"] = [
            {
                key: content(value) if isinstance(value, Tensor) else value
                for key, value in group.items()
            }
            for group in groups["param_groups"]
        ]
        state["buffers"] = {
            index: {key: content(value) for key, value in entries.items()}
            for index, entries in groups["state"].items()
        }
    return state


@contextmanager
def refused(
    error: type[Exception],
    *words: str,
    metric: rm.LayerwiseMetric | None = None,
    optimizer: rm.optim.RiemannianSGD | None = None,
) -> Iterator[None]:
    """The body raises ``error``, says all ``words`` and a remedy, changes nothing."""
    assert issubclass(error, errors.RiemannianModulesError | ValueError | TypeError)
    before = snapshot(metric, optimizer)
    with pytest.raises(error) as caught:
        yield
    message = str(caught.value)
    assert type(caught.value) is error, f"{caught.type.__name__}: {message}"
    for word in words:
        assert word in message, f"{word!r} is not in: {message}"
    assert REMEDY.search(message), f"no remedy in: {message}"
    assert "''" not in message, f"a name is missing in: {message}"
    assert snapshot(metric, optimizer) == before


X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 0, 1, 2])

State = tuple[nn.Module, rm.LayerwiseMetric, rm.optim.RiemannianSGD]


def chain() -> nn.Sequential:
    return rm.nn.Sequential(
        rm.nn.Linear(5, 4, manifold=rm.manifolds.Stiefel()),
        nn.Tanh(),
        nn.Linear(4, 3),
    )


def backward(metric: rm.LayerwiseMetric, x: Tensor = X) -> None:
    with metric.record():
        outputs = metric.model(x)
    metric.backward(F.cross_entropy(outputs, TARGET), outputs)


def trained(model: nn.Module | None = None, steps: int = 2, **options: Any) -> State:
    """A model after some steps, with gradients, momentum and a bound metric."""
    model = chain() if model is None else model
    metric = rm.LayerwiseMetric(
        model, output=rm.output.Categorical(), mass=0.1, **options
    )
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1, momentum=0.9)
    for _ in range(steps):
        backward(metric)
        optimizer.step()
    return model, metric, optimizer


@pytest.fixture
def state() -> State:
    return trained()


# --- values that are not finite


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_nonfinite_inputs_are_named(state: State, value: float) -> None:
    model, metric, optimizer = state
    x = X.clone()
    x[3, 1] = value
    with metric.record():
        outputs = model(x)
    with refused(
        errors.NonFiniteError, "input", "'0'", metric=metric, optimizer=optimizer
    ):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_outputs_behind_the_last_layer(state: State, value: float) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
        outputs = outputs + torch.tensor([0.0, value, 0.0])
    with refused(
        errors.NonFiniteError,
        "outputs",
        "behind the last layer",
        "(6, 3)",
        metric=metric,
        optimizer=optimizer,
    ):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)
    with refused(errors.NonFiniteError, "outputs", metric=metric, optimizer=optimizer):
        metric.pull_back(outputs)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nonfinite_loss(state: State, value: float) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
    with refused(errors.NonFiniteError, "loss", metric=metric, optimizer=optimizer):
        metric.backward(outputs.sum() * value, outputs)


def test_nonfinite_derivative_of_a_finite_loss(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
    loss = (outputs - outputs.detach()).norm(dim=-1).pow(0.5).sum()
    assert loss.isfinite()
    with refused(
        errors.NonFiniteError,
        "derivative of the loss",
        "(6, 3)",
        metric=metric,
        optimizer=optimizer,
    ):
        metric.backward(loss, outputs)


class Root(nn.Module):
    """A square root whose derivative at zero is infinite, its value finite."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (x - x.detach()).square().sqrt()


def test_nonfinite_derivative_inside_the_model() -> None:
    model = nn.Sequential(nn.Linear(5, 4), Root(), nn.Linear(4, 3))
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    with refused(errors.NonFiniteError, "'0.", "gradient", metric=metric):
        backward(metric)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["0.weight", "2.bias"])
def test_nonfinite_parameter(state: State, name: str, value: float) -> None:
    model, metric, optimizer = state
    with torch.no_grad():
        model.get_parameter(name).view(-1)[1] = value
    with (
        refused(errors.NonFiniteError, f"'{name}'", metric=metric, optimizer=optimizer),
        metric.record(),
    ):
        model(X)


def test_nonfinite_parameter_at_construction() -> None:
    model = chain()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with refused(errors.NonFiniteError, "'2.weight'"):
        rm.LayerwiseMetric(model, output=rm.output.Categorical())


def test_nonfinite_parameter_of_a_model_that_is_one_layer() -> None:
    model = nn.Linear(5, 3)
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    with metric.record():
        outputs = model(X * float("nan"))
    with refused(errors.NonFiniteError, "input of the model", metric=metric):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)


# --- masses


BAD_MASSES = {
    "zero": (0.0, ("'0.weight'", "0.0", "positive")),
    "negative": (-1.0, ("'0.weight'", "-1.0")),
    "nan": (float("nan"), ("'0.weight'", "nan")),
    "infinite": (float("inf"), ("'0.weight'", "inf")),
    "text": ("1", ("'0.weight'", "str")),
    "none": (None, ("'0.weight'", "NoneType")),
    "no such name": ({"*": 1.0, "5.weight": 2.0}, ("5.weight", "'0.weight'")),
    "missing": ({"*.weight": 1.0}, ("'0.bias'", "'2.bias'")),
    "misspelt": ({"*.wieght": 1.0, "*.bias": 1.0}, ("wieght", "'2.weight'")),
    "in a mapping": ({"*.weight": 1.0, "*.bias": 0.0}, ("'0.bias'", "0.0")),
    "shape": (
        {"2.weight": torch.ones(4, 3), "*": 1.0},
        ("'2.weight'", "(4, 3)", "(3, 4)"),
    ),
    "row and column": (
        {"2.weight": (torch.ones(4), torch.ones(3)), "*": 1.0},
        ("'2.weight'", "(4,)", "(3,)", "(3, 4)"),
    ),
    "row of a bias": (
        {"2.bias": (torch.ones(3), torch.ones(3)), "*": 1.0},
        ("'2.bias'", "(3,)"),
    ),
    "entry": (
        {"2.weight": torch.tensor([[0.0] + [1.0] * 3] * 3), "*": 1.0},
        ("'2.weight'", "0.0"),
    ),
    "nan entry": (
        {"2.weight": torch.full((3, 4), torch.nan), "*": 1.0},
        ("'2.weight'", "nan"),
    ),
    "row entry": (
        {"2.weight": (torch.tensor([1.0, -2.0, 1.0]), torch.ones(4)), "*": 1.0},
        ("'2.weight'", "-2.0"),
    ),
    "diagonal on a manifold": (
        {"0.weight": torch.ones(4, 5), "*": 1.0},
        ("'0.weight'", "Stiefel"),
    ),
    "negative Mass": (rm.Mass(scalar=-1.0), ("'0.weight'", "-1.0")),
    "Mass of another shape": (
        {"2.weight": rm.Mass(diagonal=torch.ones(2)), "*": 1.0},
        ("'2.weight'", "(2,)", "(3, 4)"),
    ),
}


@pytest.mark.parametrize(("mass", "words"), BAD_MASSES.values(), ids=BAD_MASSES)
def test_bad_masses(mass: Any, words: tuple[str, ...]) -> None:
    with refused(errors.MassError, *words):
        rm.LayerwiseMetric(chain(), output=rm.output.Categorical(), mass=mass)


@pytest.mark.parametrize(("mass", "words"), BAD_MASSES.values(), ids=BAD_MASSES)
def test_a_bad_mass_is_not_set(mass: Any, words: tuple[str, ...]) -> None:
    _, metric, optimizer = trained()
    with refused(errors.MassError, *words, metric=metric, optimizer=optimizer):
        metric.set_mass(mass)


def test_a_model_without_parameters() -> None:
    with refused(errors.MassError, "no trainable parameters"):
        rm.LayerwiseMetric(nn.Tanh(), output=rm.output.Categorical())


@pytest.mark.parametrize("option", ["blocks", "reduction"])
def test_unknown_options(option: str) -> None:
    with refused(ValueError, "rows", option):
        rm.LayerwiseMetric(chain(), output=None, **{option: "rows"})


# --- points off their manifold, and lost manifolds


def push_off(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight.mul_(1.1)


def test_a_point_pushed_off_between_steps(state: State) -> None:
    model, metric, optimizer = state
    push_off(model)
    with (
        refused(
            errors.NotOnManifoldError,
            "'0.weight'",
            "(4, 5)",
            "Stiefel",
            metric=metric,
            optimizer=optimizer,
        ),
        metric.record(),
    ):
        model(X)
    with torch.no_grad():
        weight = model[0].weight
        weight.data.copy_(weight.manifold.projx(weight.data))
    backward(metric)
    optimizer.step()


def test_a_point_pushed_off_between_backward_and_step(state: State) -> None:
    model, metric, optimizer = state
    backward(metric)
    push_off(model)
    with refused(
        errors.NotOnManifoldError, "'0.weight'", metric=metric, optimizer=optimizer
    ):
        optimizer.step()


def test_a_point_off_its_manifold_at_construction() -> None:
    model = chain()
    push_off(model)
    with refused(errors.NotOnManifoldError, "'0.weight'", "(4, 5)", "Stiefel"):
        rm.LayerwiseMetric(model, output=rm.output.Categorical())


@pytest.mark.parametrize(
    ("manifold", "bad"),
    [
        (rm.manifolds.Sphere(), 1.5),
        (rm.manifolds.PoincareBall(), 1e3),
        (rm.manifolds.SPD(), -1.0),
        (rm.manifolds.CanonicalStiefel(), 0.5),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_every_manifold_is_watched(manifold: geoopt.Manifold, bad: float) -> None:
    model = rm.nn.Sequential(rm.nn.Linear(4, 4, manifold=manifold), nn.Linear(4, 3))
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    with torch.no_grad():
        model[0].weight.mul_(bad)
    with (
        refused(errors.NotOnManifoldError, "'0.weight'", "(4, 4)", metric=metric),
        metric.record(),
    ):
        model(X[:, :4])


def test_assigning_a_state_dict_loses_the_manifold(state: State) -> None:
    model, metric, optimizer = state
    loaded = {name: value.clone() for name, value in chain().state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    with (
        refused(
            errors.LostManifoldError,
            "'0.weight'",
            "Stiefel",
            "assign=True",
            metric=metric,
            optimizer=optimizer,
        ),
        metric.record(),
    ):
        model(X)


def test_a_lost_manifold_between_backward_and_step(state: State) -> None:
    model, metric, optimizer = state
    backward(metric)
    loaded = {name: value.clone() for name, value in chain().state_dict().items()}
    model.load_state_dict(loaded, assign=True)
    with refused(
        errors.LostManifoldError, "'0.weight'", metric=metric, optimizer=optimizer
    ):
        optimizer.step()


def test_a_manifold_lost_before_the_metric_is_built() -> None:
    model = chain()
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())
    with refused(errors.LostManifoldError, "'0.weight'", "Stiefel"):
        rm.LayerwiseMetric(model, output=rm.output.Categorical())


def test_a_lost_manifold_of_a_model_that_is_one_layer() -> None:
    model = rm.nn.Linear(5, 3, manifold=rm.manifolds.Stiefel())
    model.weight = nn.Parameter(model.weight.detach().clone())
    with refused(errors.LostManifoldError, "'weight'", "Stiefel"):
        rm.LayerwiseMetric(model, output=rm.output.Categorical())


def test_loading_without_assign_keeps_everything(state: State) -> None:
    model, metric, optimizer = state
    other = chain()
    model.load_state_dict(other.state_dict())
    backward(metric)
    optimizer.step()
    assert isinstance(model[0].weight.manifold, rm.manifolds.MetricManifold)


@pytest.mark.parametrize("name", ["0.weight", "2.weight", "2.bias"])
def test_a_replaced_parameter(state: State, name: str) -> None:
    model, metric, optimizer = state
    layer, _, attribute = name.rpartition(".")
    value = model.get_parameter(name).detach().clone()
    setattr(model.get_submodule(layer), attribute, nn.Parameter(value))
    with (
        refused(
            errors.LostManifoldError,
            f"'{name}'",
            metric=metric,
            optimizer=optimizer,
        ),
        metric.record(),
    ):
        model(X)


def test_a_removed_parameter(state: State) -> None:
    model, metric, optimizer = state
    del model[2].weight
    with (
        refused(
            errors.LostManifoldError,
            "'2.weight'",
            "gone",
            metric=metric,
            optimizer=optimizer,
        ),
        metric.record(),
    ):
        model(X)


def test_a_parameter_frozen_after_the_metric_was_built(state: State) -> None:
    model, metric, optimizer = state
    model[2].weight.requires_grad_(False)
    with (
        refused(
            errors.LinearizationError,
            "'2.weight'",
            "requires_grad",
            metric=metric,
            optimizer=optimizer,
        ),
        metric.record(),
    ):
        model(X)


# --- manifolds that break their contract


BROKEN = {
    "CanonicalStiefel": (geoopt.Stiefel, "riemannian_modules.manifolds"),
    "Scaled": (lambda: geoopt.Scaled(geoopt.Sphere(), 2.0), "mass"),
}


@pytest.mark.parametrize(("make", "remedy"), BROKEN.values(), ids=BROKEN)
def test_broken_manifolds_of_a_parameter(
    make: Callable[[], geoopt.Manifold], remedy: str
) -> None:
    model = nn.Linear(3, 5)
    point = torch.eye(3).repeat(2, 1)[:5] if remedy == "mass" else torch.eye(5, 3)
    model.weight = geoopt.ManifoldParameter(point, manifold=make())
    with refused(errors.ManifoldContractError, "weight", "geoopt", remedy):
        rm.LayerwiseMetric(model, output=rm.output.Categorical())


@pytest.mark.parametrize(("make", "remedy"), BROKEN.values(), ids=BROKEN)
def test_broken_manifolds_of_a_layer(
    make: Callable[[], geoopt.Manifold], remedy: str
) -> None:
    with refused(errors.ManifoldContractError, "geoopt", remedy):
        rm.nn.Linear(3, 5, manifold=make())


def test_a_manifold_that_is_none() -> None:
    with refused(errors.ManifoldContractError, "str", "geoopt.Manifold"):
        rm.nn.Linear(3, 5, manifold="Stiefel")


# --- shapes


def test_an_empty_batch(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X[:0])
    for call in (
        lambda: metric.backward(outputs.sum(), outputs),
        lambda: metric.pull_back(outputs),
    ):
        with refused(
            errors.EmptyBatchError, "(0, 3)", metric=metric, optimizer=optimizer
        ):
            call()


def test_outputs_without_a_batch(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        total = model(X).sum()
    with refused(errors.EmptyBatchError, "()", metric=metric, optimizer=optimizer):
        metric.backward(total, total)


def test_a_loss_for_each_example(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
    loss = F.cross_entropy(outputs, TARGET, reduction="none")
    with refused(
        errors.ShapeError, "(6,)", "scalar", metric=metric, optimizer=optimizer
    ):
        metric.backward(loss, outputs)


class TimeFirst(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.transpose(0, 1)).mean(0)


def test_a_layer_whose_first_dimension_is_not_the_batch_is_fine() -> None:
    model = TimeFirst()
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    x = torch.randn(6, 4, 5)
    for _ in range(2):
        backward(metric, x)
    assert_dense(metric, x)


def test_an_input_without_a_batch() -> None:
    model = nn.Linear(5, 3)
    metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean())
    with metric.record():
        outputs = model(X[0])
    with refused(errors.LinearizationError, "the model", "(5,)", metric=metric):
        metric.backward(outputs.sum(), outputs)


WRONG_OUTPUTS = {
    "one class": (rm.output.Categorical(), 1, ("(6, 1)", "Bernoulli")),
    "odd": (rm.output.Gaussian(learned="log_std"), 3, ("(6, 3)", "even")),
    "covariance": (rm.output.Gaussian(torch.eye(2)), 3, ("(6, 3)", "2")),
}


@pytest.mark.parametrize(
    ("output", "width", "words"), WRONG_OUTPUTS.values(), ids=WRONG_OUTPUTS
)
def test_outputs_that_the_metric_cannot_measure(
    output: rm.output.OutputMetric, width: int, words: tuple[str, ...]
) -> None:
    model = nn.Linear(5, width)
    metric = rm.LayerwiseMetric(model, output=output)
    with metric.record():
        outputs = model(X)
    with refused(errors.ShapeError, *words, metric=metric):
        metric.backward(outputs.square().mean(), outputs)
    with refused(errors.ShapeError, *words, metric=metric):
        metric.pull_back(outputs)


def test_outputs_without_a_class_dimension(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)[:, 0]
    with refused(errors.ShapeError, "(6,)", metric=metric, optimizer=optimizer):
        metric.backward(outputs.mean(), outputs)


# --- slips of the pen


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (rm.output.Categorical, ("class", "Categorical()")),
        ("categorical", ("'categorical'", "Categorical()")),
        ([rm.output.Categorical(), rm.output.Euclidean], ("class", "Euclidean()")),
        ({"a": "gaussian"}, ("'gaussian'", "instance")),
        (F.cross_entropy, ("function", "instance")),
        (3.0, ("float", "instance")),
    ],
    ids=["class", "name", "class-inside", "name-inside", "function", "number"],
)
def test_what_is_no_output_metric(output: Any, words: tuple[str, ...]) -> None:
    with refused(TypeError, *words):
        rm.LayerwiseMetric(chain(), output)


@pytest.mark.parametrize("output", [[], {}, ()])
def test_no_output_metrics(output: Any) -> None:
    with refused(errors.OutputMetricError, "names no output metric"):
        rm.LayerwiseMetric(chain(), output)


def test_what_is_no_model() -> None:
    output = rm.output.Categorical()
    for wrong in (lambda x: x, chain().parameters(), chain, None):
        with refused(TypeError, type(wrong).__name__, "torch.nn.Module"):
            rm.LayerwiseMetric(wrong, output)


@pytest.mark.filterwarnings("ignore")
def test_a_scripted_model() -> None:
    traced = torch.jit.trace(nn.Linear(5, 3), X)
    for model in (traced, nn.Sequential(traced, nn.Linear(3, 3))):
        with refused(TypeError, "torch.jit"):
            rm.LayerwiseMetric(model, rm.output.Categorical())


def test_loss_and_outputs_the_wrong_way_round(state: State) -> None:
    model, metric, optimizer = state
    for several in (False, True):
        with metric.record():
            outputs = model(X)
        loss = F.cross_entropy(outputs, TARGET)
        wrong = (outputs, outputs) if several else outputs
        with refused(
            errors.ShapeError,
            "wrong way round",
            "metric.backward(loss, outputs)",
            metric=metric,
            optimizer=optimizer,
        ):
            metric.backward(wrong, loss)
        metric.backward(loss, outputs)


@pytest.mark.parametrize("kind", [Tensor.item, str, lambda loss: (loss,), vars])
def test_a_loss_that_is_no_tensor(state: State, kind: Callable[[Tensor], Any]) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
    loss = F.cross_entropy(outputs, TARGET)
    wrong = kind(loss)
    with refused(
        TypeError,
        type(wrong).__name__,
        "before .item()",
        metric=metric,
        optimizer=optimizer,
    ):
        metric.backward(wrong, outputs)
    metric.backward(loss, outputs)


def test_an_optimizer_without_a_metric() -> None:
    model = chain()
    for wrong in (model.parameters(), list(model.parameters()), model):
        with refused(TypeError, type(wrong).__name__, "RiemannianSGD(metric, lr=...)"):
            rm.optim.RiemannianSGD(wrong, lr=0.1)


def test_what_is_no_retraction(state: State) -> None:
    _, metric, optimizer = state
    for wrong, words in (
        (rm.retractions.Exponential, ("the class Exponential", "Exponential()")),
        ("exponential", ("'exponential'", "instance")),
        (torch.add, ("instance", "Exponential()")),
    ):
        with refused(TypeError, *words, metric=metric, optimizer=optimizer):
            rm.optim.RiemannianSGD(metric, retraction=wrong)


@pytest.mark.parametrize("kind", ["cross entropy", "sum"])
def test_a_graph_that_loss_backward_has_freed(state: State, kind: str) -> None:
    """The sum keeps nothing that could be freed: the graph of the model does."""
    model, metric, optimizer = state
    for fresh in (metric, rm.LayerwiseMetric(model, rm.output.Categorical())):
        with fresh.record():
            outputs = model(X)
        loss = outputs.sum() if kind == "sum" else F.cross_entropy(outputs, TARGET)
        loss.backward()
        with refused(
            errors.NotRecordedError,
            "freed",
            "instead of loss.backward()",
            metric=fresh,
            optimizer=optimizer,
        ):
            fresh.backward(loss, outputs)
        with refused(errors.NotRecordedError, "freed", metric=fresh):
            fresh.pull_back(outputs)
        backward(fresh)


def test_a_graph_that_loss_backward_has_kept(state: State) -> None:
    model, metric, _ = state
    with metric.record():
        outputs = model(X)
    loss = F.cross_entropy(outputs, TARGET)
    loss.backward(retain_graph=True)
    metric.backward(loss, outputs)
    expected = torch.autograd.grad(
        F.cross_entropy(model(X), TARGET), [*model.parameters()]
    )
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_another_error_of_torch_comes_as_it_is(state: State) -> None:
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            raise RuntimeError("of the user's own")

    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
    before = snapshot(metric, optimizer)
    with pytest.raises(RuntimeError, match="of the user's own"):
        metric.backward(Broken.apply(outputs).sum(), outputs)
    assert snapshot(metric, optimizer) == before


def test_outputs_of_two_calls(state: State) -> None:
    """Also where the graph was seen before, and the model itself is not recorded."""
    model, metric, optimizer = state
    for fresh in (metric, rm.LayerwiseMetric(model, rm.output.Categorical())):
        with fresh.record():
            outputs = torch.cat([model(X[:4]), model(X[4:])])
        with refused(
            errors.LinearizationError,
            "'0.weight'",
            "2 times, with 4 + 2 examples",
            "all 6 examples",
            metric=fresh,
            optimizer=optimizer,
        ):
            fresh.backward(F.cross_entropy(outputs, TARGET), outputs)


# --- passes that were not recorded


def test_no_record_scope(state: State) -> None:
    model, metric, optimizer = state
    outputs = model(X)
    with refused(errors.NotRecordedError, "record", metric=metric, optimizer=optimizer):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)
    with refused(errors.NotRecordedError, "record", metric=metric, optimizer=optimizer):
        metric.pull_back(outputs)


def test_recording_without_gradients(state: State) -> None:
    model, metric, optimizer = state
    with metric.record(), torch.no_grad():
        outputs = model(X)
    with refused(
        errors.NotRecordedError, "gradients", metric=metric, optimizer=optimizer
    ):
        metric.backward(outputs.sum(), outputs)


def test_outputs_of_another_pass(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        model(X)
    others = model(X)
    with refused(errors.NotRecordedError, "record", metric=metric, optimizer=optimizer):
        metric.backward(F.cross_entropy(others, TARGET), others)


def test_a_loss_of_other_outputs(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
    for loss in (model(X).sum(), outputs.detach().sum(), torch.zeros(())):
        with refused(
            errors.NotRecordedError,
            "does not depend",
            metric=metric,
            optimizer=optimizer,
        ):
            metric.backward(loss, outputs)


def test_a_second_backward_needs_a_second_record(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
    loss = F.cross_entropy(outputs, TARGET)
    metric.backward(loss, outputs)
    with refused(errors.NotRecordedError, "record", metric=metric, optimizer=optimizer):
        metric.backward(loss, outputs)


def test_a_gradient_is_asked_for_too_early() -> None:
    metric = rm.LayerwiseMetric(chain(), output=rm.output.Categorical())
    with refused(errors.NotRecordedError, "backward", metric=metric):
        metric.natural_gradient()
    optimizer = rm.optim.RiemannianSGD(metric)
    with refused(
        errors.NotRecordedError, "backward", metric=metric, optimizer=optimizer
    ):
        optimizer.step()
    with refused(errors.NotRecordedError, "step", metric=metric):
        _ = optimizer.report


def test_no_gradient_after_a_pull_back(state: State) -> None:
    model, metric, optimizer = state
    backward(metric)
    with metric.record():
        outputs = model(X)
    metric.pull_back(outputs)
    with refused(
        errors.NotRecordedError, "backward", metric=metric, optimizer=optimizer
    ):
        metric.natural_gradient()
    with refused(
        errors.NotRecordedError, "backward", metric=metric, optimizer=optimizer
    ):
        optimizer.step()


@pytest.mark.parametrize("plain", [False, True])
def test_a_step_without_a_backward(state: State, plain: bool) -> None:
    model, metric, optimizer = state
    if plain:
        F.cross_entropy(model(X), TARGET).backward()
    with refused(
        errors.NotRecordedError,
        "metric.backward(loss, outputs)",
        metric=metric,
        optimizer=optimizer,
    ):
        optimizer.step()


# --- graphs that the recursion cannot explain


class Leaky(nn.Module):
    """The first weight enters the outputs a second time, past its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.linear(self.first(x), self.first.weight))


def test_a_weight_used_past_its_layer_is_explained_by_the_model() -> None:
    model = Leaky()
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    for _ in range(2):
        backward(metric)
    assert_dense(metric, X)


def assert_dense(metric: rm.LayerwiseMetric, x: Tensor) -> None:
    expected = dense_natural_gradient(
        metric.model,
        rm.output.Categorical(),
        x,
        lambda z: F.cross_entropy(z, TARGET),
        mass=0.1,
    )
    found = metric.natural_gradient()
    for name, vector in expected.items():
        torch.testing.assert_close(found[name], vector, rtol=1e-8, atol=1e-9)


class Stray(nn.Module):
    """Differentiates by its input, and uses a weight that its own list holds."""

    def __init__(self, gate: float) -> None:
        super().__init__()
        self.net = nn.Linear(5, 3)
        self.alias = [self.net.weight]
        self.gate = gate

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        # As a function of the weight: a product would be found in the graph.
        other = F.linear(x, self.alias[0].tanh())
        u = self.net(x).square() + self.gate * other.square()
        (slope,) = torch.autograd.grad(u.sum(), x, create_graph=True)
        return self.net(slope)


@pytest.mark.parametrize("gate", [1.0, 0.0])
def test_a_parameter_that_a_replay_cannot_replace(gate: float) -> None:
    """Also while it changes nothing: with an open gate the graph would be the same."""
    metric = rm.LayerwiseMetric(Stray(gate), output=rm.output.Categorical())
    for _ in range(2):
        with refused(
            errors.LinearizationError,
            "the model uses",
            "'net.weight'",
            "a list",
            metric=metric,
        ):
            backward(metric)


def test_a_function_transform_outside_of_the_model(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = torch.func.vmap(model)(X)
    with refused(
        errors.LinearizationError,
        "'0.weight'",
        "vmap",
        "forward of a module",
        metric=metric,
        optimizer=optimizer,
    ):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)
    with metric.record():
        outputs = model[2](torch.func.vmap(model[0])(X))
    with refused(
        errors.LinearizationError,
        "'0.weight'",
        "function transform",
        metric=metric,
        optimizer=optimizer,
    ):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(5, 5), nn.Linear(5, 3)
        self.reentrant: bool | None = True

    def forward(self, x: Tensor) -> Tensor:
        h = x.clone().requires_grad_()
        if self.reentrant is not None:
            h = checkpoint(self.first, h, use_reentrant=self.reentrant)
        return self.last(h)


def test_a_reentrant_checkpoint() -> None:
    model = Checkpointed()
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    with refused(errors.LinearizationError, "use_reentrant=False", metric=metric):
        backward(metric)
    model.reentrant = False
    backward(metric)
    expected = torch.autograd.grad(
        F.cross_entropy(model(X), TARGET), [*model.parameters()]
    )
    for p, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_a_reentrant_checkpoint_in_the_loss(state: State) -> None:
    model, metric, optimizer = state
    with metric.record():
        outputs = model(X)
    loss = checkpoint(F.cross_entropy, outputs, TARGET, use_reentrant=True)
    with refused(
        errors.LinearizationError,
        "use_reentrant=False",
        metric=metric,
        optimizer=optimizer,
    ):
        metric.backward(loss, outputs)


def test_weight_decay_in_the_loss() -> None:
    model = chain()
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    with metric.record():
        outputs = model(X)
    loss = F.cross_entropy(outputs, TARGET) + 1e-2 * model[2].weight.square().sum()
    with refused(errors.LinearizationError, "'2.weight'", "optimizer", metric=metric):
        metric.backward(loss, outputs)


def test_a_layer_called_before_the_recorded_scope(state: State) -> None:
    model, metric, optimizer = state
    hidden = model[0](X)
    with metric.record():
        outputs = model[2](model[1](hidden))
    with refused(
        errors.LinearizationError,
        "'0.weight'",
        "outside",
        metric=metric,
        optimizer=optimizer,
    ):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)


def test_a_layer_called_before_and_inside_the_recorded_scope() -> None:
    model = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 3))
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    hidden = model[0](X)
    with metric.record():
        outputs = model(hidden)
    with refused(errors.LinearizationError, "'0.weight'", metric=metric):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)


def test_a_loss_that_sees_hidden_values() -> None:
    model = chain()
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    with metric.record():
        hidden = model[0](X)
        outputs = model[2](model[1](hidden))
    loss = F.cross_entropy(outputs, TARGET) + hidden.square().mean()
    with refused(errors.LinearizationError, "'0.weight'", "loss", metric=metric):
        metric.backward(loss, outputs)


@pytest.mark.parametrize("affine", [False, True])
def test_batchnorm_in_training_mode(affine: bool) -> None:
    norm = nn.BatchNorm1d(4, affine=affine)
    other, kept = nn.BatchNorm1d(4, affine=affine), nn.BatchNorm1d(4).eval()
    model = nn.Sequential(nn.Linear(5, 4), norm, other, kept, nn.Linear(4, 3))
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    words = ("'1' (BatchNorm1d)", "'2' (BatchNorm1d)", "GroupNorm", "model.train(): ")
    with refused(errors.LinearizationError, *words, metric=metric), metric.record():
        model(X)
    with pytest.raises(errors.LinearizationError) as caught, metric.record():
        model(X)
    assert "'3'" not in str(caught.value)
    remedy = str(caught.value).rpartition("model.train(): ")[2]
    exec(remedy, {"torch": torch, "model": model})
    assert model.training
    backward(metric)


def test_batchnorm_in_evaluation_mode_works() -> None:
    norm = nn.BatchNorm1d(4, affine=False).eval()
    model = nn.Sequential(nn.Linear(5, 4), norm, nn.Linear(4, 3))
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    backward(metric)


class Images(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 2, 3)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.convolution(x).flatten(1))


def test_a_layer_whose_replay_differs() -> None:
    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(5))

        def forward(self, x: Tensor) -> Tensor:
            return torch.maximum(self.scale, F.dropout(x, 0.5))

    model = nn.Sequential(Noisy(), nn.Linear(5, 3))
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    with refused(
        errors.LinearizationError, "'0.scale'", "layer '0'", "dropout", metric=metric
    ):
        backward(metric)


def test_images() -> None:
    model = Images()
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    x = torch.randn(6, 1, 4, 4)
    backward(metric, x)
    assert_dense(metric, x)


def test_a_frozen_layer_without_a_rule_works() -> None:
    model = Images()
    model.convolution.requires_grad_(False)
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
    with metric.record():
        outputs = model(torch.randn(6, 1, 4, 4))
    metric.backward(F.cross_entropy(outputs, TARGET), outputs)
    assert sorted(metric.natural_gradient()) == ["head.bias", "head.weight"]


def test_an_input_changed_in_place(state: State) -> None:
    model, metric, optimizer = state
    x = X.clone()
    with metric.record():
        outputs = model(x)
    x.mul_(2.0)
    with refused(
        errors.LinearizationError,
        "'0'",
        "in place",
        metric=metric,
        optimizer=optimizer,
    ):
        metric.backward(F.cross_entropy(outputs, TARGET), outputs)


def test_a_hidden_value_changed_in_place_after_use() -> None:
    class Reused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(5, 5)
            self.frozen = nn.Linear(5, 3).requires_grad_(False)
            self.last = nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            hidden = self.first(x)
            outputs = self.last(hidden.detach())
            hidden.mul_(2.0)
            return outputs + self.frozen(hidden)

    metric = rm.LayerwiseMetric(Reused(), output=rm.output.Categorical())
    with refused(errors.LinearizationError, "'last'", "in place", metric=metric):
        backward(metric)


def test_an_inplace_activation_on_a_layer_output_works() -> None:
    plain = nn.Sequential(nn.Linear(5, 4), nn.ReLU(), nn.Linear(4, 3))
    inplace = copy.deepcopy(plain)
    inplace[1] = nn.ReLU(inplace=True)
    found = []
    for model in (plain, inplace):
        metric = rm.LayerwiseMetric(model, output=rm.output.Categorical())
        backward(metric)
        found.append(metric.natural_gradient())
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=0.0, atol=0.0)


# --- steps that cannot be taken


class Switch(nn.Module):
    """The identity, or on demand a root with an infinite derivative at zero."""

    singular = False

    def forward(self, x: Tensor) -> Tensor:
        offset = 0.0 if self.singular else 1.0
        return x.detach() + (x - x.detach() + offset).square().sqrt() - offset


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_a_gram_matrix_that_is_not_finite(blocks: str) -> None:
    model = nn.Sequential(nn.Linear(5, 30), Switch(), nn.Linear(30, 3))
    _, metric, optimizer = trained(model, blocks=blocks)
    model[1].singular = True
    backward(metric)
    words = {"tensor": "'0.weight'", "layer": "'0'", "model": "'model'"}[blocks]
    with refused(
        errors.NotPositiveDefiniteError,
        words,
        "rank 12",
        "not finite",
        "0.1",
        metric=metric,
        optimizer=optimizer,
    ):
        optimizer.step()
    with refused(errors.NotPositiveDefiniteError, words, metric=metric):
        metric.natural_gradient()


class Spoiled(rm.output.OutputMetric):
    """Rows that are NaN, on demand."""

    spoiled = False

    def factor(self, outputs: Tensor) -> Tensor:
        rows = rm.output.Categorical().factor(outputs)
        return rows * torch.nan if self.spoiled else rows

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[None, Tensor]:
        return None, cotangent


def test_an_output_metric_that_is_not_finite() -> None:
    output = Spoiled()
    model = nn.Sequential(nn.Linear(5, 3))
    metric = rm.LayerwiseMetric(model, output=output, mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, momentum=0.9)
    backward(metric)
    optimizer.step()
    output.spoiled = True
    with refused(
        errors.NonFiniteError, "Spoiled", "(6, 3)", metric=metric, optimizer=optimizer
    ):
        backward(metric)
    with metric.record():
        outputs = model(X)
    with refused(errors.NonFiniteError, "Spoiled", metric=metric):
        metric.pull_back(outputs)
    output.spoiled = False
    backward(metric)
    optimizer.step()


class OwnMetric(rm.output.OutputMetric):
    """Rows and a whitened residual of any kind."""

    def __init__(self, rows: Any, y: Tensor | None = None, rest: Any = None) -> None:
        self.rows, self.y, self.rest = rows, y, rest

    def factor(self, outputs: Tensor) -> Tensor:
        return self.rows

    def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[Tensor | None, Any]:
        return self.y, cotangent if self.rest is None else self.rest


WRONG_ROWS = {
    "no example dimension": torch.ones(2, 3),
    "rows first": torch.ones(2, 6, 3),
    "another output": torch.ones(6, 2, 4),
    "a scalar": torch.ones(()),
    "a matrix for all": torch.eye(3),
    "a vector": torch.ones(6),
    "no rows at all": None,
}


@pytest.mark.parametrize("rows", WRONG_ROWS.values(), ids=WRONG_ROWS)
def test_an_output_metric_with_rows_of_another_shape(rows: Tensor | None) -> None:
    metric = rm.LayerwiseMetric(nn.Linear(5, 3), output=OwnMetric(rows))
    with refused(
        errors.ShapeError, "OwnMetric", "(6, 3)", "('n', 'r', 3)", metric=metric
    ):
        backward(metric)


@pytest.mark.parametrize(
    ("y", "rest"),
    [(torch.ones(2, 6), None), (torch.ones(6, 3), None), (None, torch.ones(3))],
)
def test_an_output_metric_with_a_residual_of_another_shape(
    y: Tensor | None, rest: Tensor | None
) -> None:
    output = OwnMetric(torch.ones(6, 2, 3), y, rest)
    metric = rm.LayerwiseMetric(nn.Linear(5, 3), output=output)
    with refused(errors.ShapeError, "OwnMetric", "(6, 2)", "(6, 3)", metric=metric):
        backward(metric)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_gradient_made_nan_by_the_user(momentum: float) -> None:
    model, metric, optimizer = trained()
    optimizer.param_groups[0]["momentum"] = momentum
    backward(metric)
    model[2].weight.grad[0, 0] = torch.nan
    with refused(
        errors.NonFiniteError,
        "'2.weight'",
        "holds NaN",
        metric=metric,
        optimizer=optimizer,
    ):
        optimizer.step()


MANIFOLDS = [
    rm.manifolds.SPD(),
    rm.manifolds.PoincareBall(),
    rm.manifolds.Sphere(),
    rm.manifolds.Stiefel(),
]


@pytest.mark.parametrize("lr", [1e200, 1e308])
@pytest.mark.parametrize("manifold", MANIFOLDS, ids=lambda m: m.name)
def test_a_step_that_leaves_the_numbers(manifold: geoopt.Manifold, lr: float) -> None:
    first = rm.nn.Linear(5, 5, manifold=manifold)
    model = rm.nn.Sequential(first, nn.Tanh(), nn.Linear(5, 3))
    _, metric, optimizer = trained(model)
    optimizer.param_groups[0]["lr"] = lr
    backward(metric)
    before = snapshot(metric, optimizer)
    try:
        optimizer.step()
    except errors.NonFiniteError as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "lower the learning rate" in message.lower()
        assert "'0" in message or "'2" in message
        assert snapshot(metric, optimizer) == before
    else:
        # A bounded manifold may have a point in any direction, however far.
        with metric.record():
            assert first.weight.isfinite().all()


@pytest.mark.parametrize("lr", [float("inf"), float("nan")])
@pytest.mark.parametrize(
    "manifold", [*MANIFOLDS, rm.manifolds.Euclidean()], ids=lambda m: m.name
)
def test_a_step_without_a_finite_rate(manifold: geoopt.Manifold, lr: float) -> None:
    first = rm.nn.Linear(5, 5, manifold=manifold)
    _, metric, optimizer = trained(rm.nn.Sequential(first, nn.Linear(5, 3)))
    optimizer.param_groups[0]["lr"] = lr
    backward(metric)
    with refused(
        errors.NonFiniteError,
        "'0.weight'",
        str(lr),
        "lower the learning rate",
        metric=metric,
        optimizer=optimizer,
    ):
        optimizer.step()


@pytest.mark.parametrize("lr", [1e3, 1e6, 1e9, 1e12, 1e15, 1e20])
def test_a_step_too_large_for_spd_matrices(lr: float) -> None:
    first = rm.nn.Linear(5, 5, manifold=rm.manifolds.SPD())
    _, metric, optimizer = trained(rm.nn.Sequential(first, nn.Linear(5, 3)))
    optimizer.param_groups[0]["lr"] = lr
    backward(metric)
    before = snapshot(metric, optimizer)
    try:
        optimizer.step()
    except (errors.NonFiniteError, errors.NotOnManifoldError) as error:
        message = str(error)
    else:
        message = ""
    if message:
        assert "'0.weight'" in message
        assert "learning rate" in message
        assert snapshot(metric, optimizer) == before
    else:
        values = torch.linalg.eigvalsh(first.weight.detach())
        assert values[0] > 0.0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -0.1}, "lr=-0.1"),
        ({"momentum": 1.0}, "momentum=1.0"),
        ({"momentum": -0.1}, "momentum=-0.1"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"lr": float("nan")}, "lr=nan"),
        ({"nesterov": True}, "nesterov"),
        ({"nesterov": True, "momentum": 0.5, "dampening": 0.1}, "nesterov"),
    ],
    ids=str,
)
def test_bad_hyperparameters(options: dict[str, Any], words: str) -> None:
    _, metric, _ = trained(steps=1)
    with pytest.raises(ValueError, match=re.escape(words)):
        rm.optim.RiemannianSGD(metric, **options)


def test_an_optimizer_of_foreign_parameters(state: State) -> None:
    _, metric, optimizer = state
    with refused(ValueError, "(2, 3)", "metric", metric=metric, optimizer=optimizer):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 3))]})
    with refused(ValueError, "(7,)", "metric", metric=metric):
        rm.optim.RiemannianSGD(metric, [nn.Parameter(torch.zeros(7))])


def test_a_retraction_that_does_not_fit(state: State) -> None:
    model, metric, _ = state
    optimizer = rm.optim.RiemannianSGD(
        metric, momentum=0.5, retraction=rm.retractions.Cayley()
    )
    backward(metric)
    optimizer.step()
    sphere = rm.nn.Sequential(rm.nn.Linear(5, 3, manifold=rm.manifolds.Sphere()))
    other = rm.LayerwiseMetric(sphere, output=rm.output.Categorical())
    optimizer = rm.optim.RiemannianSGD(other, retraction=rm.retractions.Cayley())
    backward(other)
    with refused(
        errors.ManifoldContractError,
        "Sphere",
        "Default",
        metric=other,
        optimizer=optimizer,
    ):
        optimizer.step()
    assert model is metric.model


def test_vectors_of_a_block_must_be_named(state: State) -> None:
    _, metric, _ = state
    with refused(errors.ShapeError, "'2'", "'2.weight'", "'2.bias'"):
        metric.blocks["2"].sharp(torch.zeros(3, 4))
