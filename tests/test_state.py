"""What survives saving, loading, copying, converting and rewriting a model."""

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from mutants import state as mutants
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import riemannian_modules as rm
from riemannian_modules import manifolds
from riemannian_modules.errors import (
    LinearizationError,
    LostManifoldError,
    MassError,
    NotOnManifoldError,
    NotRecordedError,
)
from riemannian_modules.manifolds import MetricManifold, base_of

X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 0, 1, 2])
KEPT = {"0.weight": "Stiefel", "2.weight": "PoincareBall"}


def library() -> nn.Module:
    return rm.nn.Sequential(
        rm.nn.Linear(5, 4, manifold=manifolds.Stiefel()),
        nn.Tanh(),
        rm.nn.Linear(4, 3, manifold=manifolds.PoincareBall(c=0.7)),
    )


def declared() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    patterns = {
        "0.weight": manifolds.Stiefel(),
        "2.weight": manifolds.PoincareBall(c=0.7),
    }
    return rm.geometrize(model, patterns)


MAKERS = {"library": library, "declared": declared}


@pytest.fixture(params=MAKERS.values(), ids=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[], nn.Module]:
    return request.param


Make = Callable[[], nn.Module]
State = tuple[nn.Module, rm.LayerwiseMetric, rm.optim.RiemannianSGD]


def backward(metric: rm.LayerwiseMetric, x: Tensor = X, model: Any = None) -> None:
    with metric.record():
        outputs = (metric.model if model is None else model)(x)
    target = TARGET.to(x.device)
    metric.backward(F.cross_entropy(outputs, target), outputs)


def equip(model: nn.Module, momentum: float = 0.9, **options: Any) -> State:
    options = {"mass": 0.1, **options}
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), **options)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.05, momentum=momentum)
    return model, metric, optimizer


def trained(model: nn.Module, steps: int = 2, **options: Any) -> State:
    state = equip(model, **options)
    for _ in range(steps):
        backward(state[1])
        state[2].step()
    return state


def bases(model: nn.Module) -> dict[str, str]:
    """The curved base manifolds of the parameters that have a MetricManifold."""
    found = {
        name: base_of(p.manifold)
        for name, p in model.named_parameters()
        if isinstance(p, geoopt.ManifoldParameter)
        and isinstance(p.manifold, MetricManifold)
    }
    return {
        name: manifold.name
        for name, manifold in found.items()
        if not isinstance(manifold, geoopt.Euclidean)
    }


def distance(one: nn.Module, other: nn.Module) -> float:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((a - b).detach().abs().max()) for a, b in pairs)


def goes_on(model: nn.Module, x: Tensor = X) -> None:
    """A metric and an optimizer of this model, built anew, take a step."""
    before = copy.deepcopy(model)
    _, metric, optimizer = equip(model)
    backward(metric, x)
    optimizer.step()
    assert distance(model, before) > 0.0
    metric.parameters.verify()


def saved(content: Any, *, safe: bool) -> Any:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=safe)


# ---- state dictionaries ----------------------------------------------------------


def test_a_state_has_plain_tensors(make: Make) -> None:
    model, *_ = trained(make())
    state = model.state_dict()
    assert all(type(value) is Tensor for value in state.values())
    assert all(torch.equal(saved(state, safe=True)[k], state[k]) for k in state)


def test_loading_keeps_parameters_metric_and_optimizer(make: Make) -> None:
    model, metric, optimizer = trained(make())
    other, *_ = trained(make(), steps=1)
    before = list(model.parameters())
    model.load_state_dict(saved(other.state_dict(), safe=True))
    assert distance(model, other) == 0.0
    assert [id(p) for p in model.parameters()] == [id(p) for p in before]
    assert bases(model) == KEPT
    backward(metric)
    optimizer.step()


@pytest.mark.parametrize("tensors", ["plain", "parameters", "of another model"])
def test_assigning_keeps_the_manifolds(make: Make, tensors: str) -> None:
    model, metric, optimizer = trained(make())
    backward(metric)
    other = make()
    state: Any = other.state_dict()
    if tensors == "parameters":
        state = {name: nn.Parameter(value.clone()) for name, value in state.items()}
    if tensors == "of another model":
        state = dict(other.named_parameters())
    model.load_state_dict(state, assign=True)
    assert bases(model) == KEPT
    for name, value in state.items():
        assert model.get_parameter(name).data_ptr() == value.data_ptr()
        assert model.get_parameter(name).requires_grad
    goes_on(model)
    for call in (optimizer.step, lambda: backward(metric)):
        with pytest.raises(LostManifoldError, match=r"'0.weight'.*assign=True.*anew"):
            call()


def test_assigning_to_a_frozen_parameter_leaves_it_frozen(make: Make) -> None:
    model = make()
    model[0].weight.requires_grad_(False)
    model.load_state_dict(make().state_dict(), assign=True)
    assert not model[0].weight.requires_grad
    assert bases(model) == KEPT


def test_assigning_fills_a_model_on_the_meta_device(make: Make) -> None:
    real = make()
    model = make().to("meta")
    model.load_state_dict(real.state_dict(), assign=True)
    assert bases(model) == KEPT
    assert distance(model, real) == 0.0
    goes_on(model)


def test_values_from_elsewhere_are_checked_and_projected(make: Make) -> None:
    model, metric, _ = trained(make())
    state = {name: 1.3 * value for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    with pytest.raises(NotOnManifoldError, match=r"'0.weight'.*project_\(model\)"):
        backward(metric)
    rm.project_(model)
    backward(metric)
    model.load_state_dict(state, assign=True)
    with pytest.raises(NotOnManifoldError, match=r"'0.weight'.*project_\(model\)"):
        equip(model)


def test_a_state_of_another_architecture(make: Make) -> None:
    model = make()
    state = {**model.state_dict(), "0.weight": torch.ones(5, 5)}
    for assign in (False, True):
        with pytest.raises(RuntimeError, match="size mismatch"):
            model.load_state_dict(state, assign=assign)
    assert bases(model) == KEPT


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 5), nn.Linear(5, 5)
        self.second.weight = self.first.weight
        self.last = nn.Linear(5, 3)
        rm.geometrize(self, {"first.weight": manifolds.Stiefel()})

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_a_shared_parameter_that_assigning_split() -> None:
    model = Tied()
    model.load_state_dict(model.state_dict(), assign=True)
    assert model.first.weight is not model.second.weight, "torch shares them no more"
    with pytest.raises(
        LinearizationError, match=r"'first.weight' and 'second.weight'.*same memory"
    ):
        equip(model)
    model.second.weight = model.first.weight
    goes_on(model)


def test_a_shared_parameter_is_loaded_and_copied() -> None:
    model = Tied()
    other = Tied()
    model.load_state_dict(other.state_dict())
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.first.weight is twin.second.weight
        assert bases(twin) == {"first.weight": "Stiefel"}
        goes_on(twin)


# ---- copies ----------------------------------------------------------------------

COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": lambda model: saved(model, safe=False),
}


@pytest.mark.parametrize("copier", COPIES.values(), ids=COPIES)
def test_copies_keep_the_manifolds(make: Make, copier: Callable[[Any], Any]) -> None:
    model, metric, optimizer = trained(make())
    twin = copier(model)
    assert bases(twin) == KEPT
    assert distance(model, twin) == 0.0
    for name in KEPT:
        view, own = (m.get_parameter(name).manifold for m in (twin, model))
        assert view is not own
        assert view.base is not own.base
        assert view.metric is None
        assert own.metric is not None
    assert float(twin[2].weight.manifold.base.c) == pytest.approx(0.7, rel=1e-15)
    goes_on(twin)
    backward(metric)
    optimizer.step()
    twin.load_state_dict(model.state_dict(), assign=True)
    assert bases(twin) == KEPT, "a copy remembers as well"
    twin[0].weight = nn.Parameter(twin[0].weight.detach().clone())
    with pytest.raises(LostManifoldError, match=r"'0.weight'.*Stiefel"):
        equip(twin)


def test_a_pickle_is_small(make: Make) -> None:
    model, metric, _ = trained(make())
    backward(metric, X.repeat(1000, 1)[:6])
    fresh = len(pickle.dumps(make()))
    assert len(pickle.dumps(model)) < fresh + 3000, "gradients at most"


def test_another_process_goes_on_where_this_one_stopped(
    make: Make, tmp_path: Path
) -> None:
    model, metric, optimizer = trained(make())
    metric.set_mass(0.3)
    file = tmp_path / "state.pt"
    states = {"metric": metric.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({"model": model.state_dict(), **states}, file)
    torch.save(model, tmp_path / "model.pt")
    script = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parent), *sys.path]!r}
torch.set_default_dtype(torch.float64)
torch.set_num_threads(1)
import test_state
fresh = test_state.{make.__name__}()
states = torch.load({str(file)!r}, weights_only=True)
fresh.load_state_dict(states["model"])
pickled = torch.load({str(tmp_path / "model.pt")!r}, weights_only=False)
for number, model in enumerate([fresh, pickled]):
    _, metric, optimizer = test_state.equip(model)
    metric.load_state_dict(states["metric"])
    optimizer.load_state_dict(states["optimizer"])
    for _ in range(2):
        test_state.backward(metric)
        optimizer.step()
    torch.save([metric.version, model.state_dict()], {str(tmp_path)!r} + f"/{{number}}")
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True)
    for _ in range(2):
        backward(metric)
        optimizer.step()
    for number in range(2):
        version, state = torch.load(tmp_path / str(number), weights_only=True)
        assert version == metric.version
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=0.0, atol=1e-14)


# ---- the state of a metric -------------------------------------------------------


def test_a_metric_s_state_has_masses_and_version() -> None:
    model, metric, _ = trained(
        declared(),
        mass={
            "0.weight": 0.3,
            "0.bias": torch.rand(4) + 0.5,
            "2.*": 2.0,
        },
    )
    state = saved(metric.state_dict(), safe=True)
    assert state["version"] == metric.version == 2
    other = equip(copy.deepcopy(model))[1]
    other.load_state_dict(state)
    assert other.version == 2
    for first, second in zip(metric.parameters, other.parameters, strict=True):
        assert first.mass.scalar == second.mass.scalar
    kept = other.parameters["0.bias"].mass.diagonal
    assert torch.equal(kept, metric.parameters["0.bias"].mass.diagonal)
    assert kept is not metric.parameters["0.bias"].mass.diagonal
    for m in (metric, other):
        backward(m)
    for name, vector in metric.natural_gradient().items():
        assert torch.equal(vector, other.natural_gradient()[name])
    assert other.version == 3


def test_a_rank_one_mass_in_a_state() -> None:
    row, column = torch.rand(3) + 0.5, torch.rand(4) + 0.5
    metric = rm.LayerwiseMetric(
        nn.Linear(4, 3), output=None, mass={"weight": (row, column), "bias": 1.0}
    )
    other = rm.LayerwiseMetric(nn.Linear(4, 3), output=None)
    other.load_state_dict(saved(metric.state_dict(), safe=True))
    assert torch.equal(other.parameters["weight"].mass.row, row)
    assert torch.equal(other.parameters["weight"].mass.column, column)


def test_a_metric_s_state_of_another_model() -> None:
    metric = rm.LayerwiseMetric(nn.Linear(4, 3), output=None, mass=0.3)
    other = rm.LayerwiseMetric(nn.Sequential(nn.Linear(4, 3)), output=None)
    with pytest.raises(MassError, match=r"'0.weight'"):
        other.load_state_dict(metric.state_dict())
    assert other.version == 0
    assert other.parameters["0.weight"].mass.scalar == 1e-2


def test_a_model_that_is_built_anew_without_its_manifolds() -> None:
    model = rm.nn.Linear(4, 3, manifold=manifolds.Stiefel())
    metric = rm.LayerwiseMetric(model, output=None, mass=0.3)
    state = saved(metric.state_dict(), safe=True)
    plain = nn.Linear(4, 3)
    plain.load_state_dict(model.state_dict())
    other = rm.LayerwiseMetric(plain, output=None)
    with pytest.raises(
        LostManifoldError, match=r"'weight' is on Euclidean, and was on Stiefel"
    ):
        other.load_state_dict(state)
    assert other.parameters["weight"].mass.scalar == 1e-2
    rm.geometrize(plain, {"weight": manifolds.Stiefel()})
    rm.LayerwiseMetric(plain, output=None).load_state_dict(state)
    # Saved before there were names of manifolds, or on purpose without.
    del state["manifolds"]
    other = rm.LayerwiseMetric(nn.Linear(4, 3), output=None)
    other.load_state_dict(state)
    assert other.parameters["weight"].mass.scalar == 0.3


# ---- conversions -----------------------------------------------------------------


@contextmanager
def conversion(kind: str) -> Iterator[None]:
    """What torch does with parameters in ``model.to``."""
    switch = {
        "overwrite": torch.__future__.set_overwrite_module_params_on_conversion,
        "swap": torch.__future__.set_swap_module_params_on_conversion,
    }.get(kind, lambda on: None)
    switch(True)
    try:
        yield
    finally:
        switch(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_metric_goes_on_after_a_conversion(make: Make, dtype: torch.dtype) -> None:
    model, metric, optimizer = trained(make(), momentum=0.0)
    parameters = list(model.parameters())
    model.to(dtype)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert bases(model) == KEPT
    backward(metric, X.to(dtype))
    optimizer.step()
    assert all(p.dtype == dtype for p in model.parameters())
    if dtype == torch.float32:
        model.double()
        backward(metric)
        optimizer.step()
        goes_on(rm.project_(model))


def test_a_gradient_from_before_a_conversion(make: Make) -> None:
    _, metric, optimizer = trained(make(), momentum=0.0)
    backward(metric)
    metric.model.float()
    with pytest.raises(NotRecordedError, match=r"changed after metric.backward"):
        optimizer.step()


def test_a_value_rounded_for_a_while(make: Make) -> None:
    model, metric, optimizer = trained(make(), momentum=0.0)
    model.bfloat16()
    model.double()
    with pytest.raises(NotOnManifoldError, match=r"'0.weight'.*project_"):
        backward(metric)
    rm.project_(model)
    backward(metric)
    optimizer.step()


def test_a_value_set_through_data(make: Make) -> None:
    model, metric, optimizer = trained(make())
    backward(metric)
    model[0].weight.data = 1.1 * model[0].weight.data
    with pytest.raises(NotOnManifoldError, match=r"'0.weight'"):
        optimizer.step()
    rm.project_(model)
    with pytest.raises(NotRecordedError, match=r"'0.weight'.*record"):
        optimizer.step()
    backward(metric)
    optimizer.step()


def test_parameters_written_as_one_vector(make: Make) -> None:
    model, metric, optimizer = trained(make())
    vector = nn.utils.parameters_to_vector(model.parameters())
    nn.utils.vector_to_parameters(vector.clone(), model.parameters())
    assert bases(model) == KEPT
    backward(metric)
    optimizer.step()


@pytest.mark.parametrize("kind", ["overwrite", "swap"])
def test_conversions_that_replace_parameters(make: Make, kind: str) -> None:
    model, metric, _ = trained(make(), momentum=0.0)
    model.zero_grad()
    metric = equip(model, momentum=0.0)[1]
    with conversion(kind):
        model.to(torch.float32)
    if make is declared:
        assert bases(model) == {}
        for call in (lambda: backward(metric, X.float()), lambda: equip(model)):
            with pytest.raises(
                LostManifoldError, match=r"'0.weight'.*Stiefel.*project_\(model\)"
            ):
                call()
        rm.project_(model)
    assert bases(model) == KEPT
    goes_on(model, X.float())


@pytest.mark.parametrize("assign", [False, True])
def test_loading_that_swaps_parameters(make: Make, assign: bool) -> None:
    model, other = make(), make()
    parameters = list(model.parameters())
    with conversion("swap"):
        model.load_state_dict(other.state_dict(), assign=assign)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert bases(model) == KEPT
    assert distance(model, other) == 0.0
    goes_on(model)


@pytest.mark.parametrize("how", ["to", "to_empty"])
def test_a_move_to_the_meta_device(make: Make, how: str) -> None:
    model = make()
    model.to("meta") if how == "to" else model.to_empty(device="meta")
    assert all(p.is_meta for p in model.parameters())
    if make is declared:
        with pytest.raises(LostManifoldError, match=r"'0.weight'.*project_\(model\)"):
            equip(model)
        rm.project_(model)
    assert bases(model) == KEPT
    _, metric, optimizer = equip(model)
    for _ in range(2):
        with metric.record():
            outputs = model(X.to("meta"))
        metric.backward(F.cross_entropy(outputs, TARGET.to("meta")), outputs)
        optimizer.step()
    assert float(model[2].weight.manifold.base.c) == pytest.approx(0.7, rel=1e-15)
    model.to_empty(device="cpu")
    model.load_state_dict(make().state_dict())
    assert bases(model) == KEPT, "loading restores them, too"
    goes_on(model)


def test_shared_memory(make: Make) -> None:
    model, metric, optimizer = trained(make())
    model.share_memory()
    assert bases(model) == KEPT
    backward(metric)
    optimizer.step()


def test_gradients_survive_a_restoring_conversion() -> None:
    model, metric, _ = trained(library())
    backward(metric)
    gradient = model[0].weight.grad.clone()
    with conversion("overwrite"):
        model.to(torch.float32)
    torch.testing.assert_close(model[0].weight.grad, gradient.float())
    assert bases(model) == KEPT


def line(dtype: torch.dtype) -> geoopt.Sphere:
    """Unit vectors in a plane of three dimensions: a manifold with a matrix."""
    return geoopt.Sphere(torch.eye(5, 3, dtype=dtype))


@pytest.mark.parametrize("view", [False, True])
def test_matrices_of_a_manifold_follow_the_data_type(view: bool) -> None:
    law_matrices(view=view)


def law_matrices(*, view: bool = True) -> None:
    model = nn.Linear(5, 3)
    rm.geometrize(model, {"weight": line(torch.float64)})
    model.float()
    weight, manifold = model.weight, model.weight.manifold
    value = weight.detach().as_subclass(Tensor)
    if view:
        assert manifold.check_point_on_manifold(value, atol=1e-5)
        for tensor in (
            manifold.proju(value, value),
            manifold.egrad2rgrad(value, value),
            manifold.retr(value, manifold.proju(value, torch.randn_like(value))),
        ):
            assert tensor.dtype == torch.float32
    metric = equip(model, momentum=0.0)[1]
    backward(metric, X.float())
    model.double()
    rm.project_(model)
    backward(metric)
    assert metric.natural_gradient()["weight"].dtype == torch.float64


def test_curvatures_are_not_rounded() -> None:
    law_curvature()


def law_curvature() -> None:
    model = declared()
    c = float(model[2].weight.manifold.base.c)
    model.to(torch.bfloat16)
    _, metric, _ = equip(model)
    backward(metric, X.bfloat16())
    value = model[2].weight.detach()
    model[2].weight.manifold.proju(value, value)
    model.double()
    rm.project_(model)
    backward(metric)
    assert float(model[2].weight.manifold.base.c) == c
    rm.geometrize(model.to("meta"), {"2.weight": model[2].declared_manifolds["weight"]})
    value = model[2].weight.detach()
    model[2].weight.manifold.egrad2rgrad(value, value)
    rm.LayerwiseMetric(rm.project_(model), output=None)
    assert float(model[2].weight.manifold.base.c) == c


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["data", "overwrite"])
def test_a_move_to_a_cuda_device_and_back(make: Make, kind: str) -> None:
    model, metric, optimizer = trained(make(), momentum=0.0)
    with conversion(kind):
        model.to("cuda")
        rm.project_(model)
        if kind == "overwrite":
            metric, optimizer = equip(model, momentum=0.0)[1:]
        assert bases(model) == KEPT
        assert all(p.is_cuda for p in model.parameters())
        backward(metric, X.cuda())
        optimizer.step()
        assert model[2].weight.manifold.base.c.is_cuda
        model.cpu()
        rm.project_(model)
        goes_on(model)
    plane = rm.geometrize(nn.Linear(5, 3), {"weight": line(torch.float64)}).cuda()
    metric = equip(plane, momentum=0.0)[1]
    backward(metric, X.cuda())
    assert metric.natural_gradient()["weight"].is_cuda


# ---- averages --------------------------------------------------------------------


@pytest.mark.parametrize("moving", [False, True])
def test_averaged_models_leave_the_manifold_and_are_put_back(
    make: Make, moving: bool
) -> None:
    model, metric, optimizer = trained(make())
    average = get_ema_multi_avg_fn(0.9) if moving else None
    averaged = AveragedModel(model, multi_avg_fn=average)
    for _ in range(5):
        averaged.update_parameters(model)
        backward(metric)
        optimizer.step()
    inside = {f"module.{name}": base for name, base in KEPT.items()}
    assert bases(averaged) == inside
    with pytest.raises(NotOnManifoldError, match=r"'0.weight'.*project_\(model\)"):
        equip(averaged.module)
    before = averaged.module[0].weight.detach().clone()
    rm.project_(averaged)
    moved = float((averaged.module[0].weight - before).detach().norm())
    assert 0.0 < moved < 0.1
    goes_on(averaged.module)
    backward(metric)
    optimizer.step()
    averaged.update_parameters(model)


# ---- rewritten modules -----------------------------------------------------------


class Half(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 0.5 * weight

    def right_inverse(self, weight: Tensor) -> Tensor:
        return weight


class Split(nn.Module):
    """A parametrization with two originals."""

    def forward(self, size: Tensor, direction: Tensor) -> Tensor:
        return size * direction

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        size = weight.detach().as_subclass(Tensor).norm(dim=1, keepdim=True)
        return size, weight.detach().as_subclass(Tensor) / size


ORIGINAL = "0.parametrizations.weight.original"


def test_a_parametrization_keeps_the_manifold_of_the_original(make: Make) -> None:
    model, metric, _ = trained(make())
    parametrize.register_parametrization(model[0], "weight", Half())
    assert bases(model) == {ORIGINAL: "Stiefel", "2.weight": "PoincareBall"}
    with pytest.raises(LostManifoldError, match=r"'0.weight'.*gone.*anew"):
        backward(metric)
    goes_on(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert ORIGINAL in bases(model)
    model.load_state_dict(state, assign=True)
    for twin in (model, copy.deepcopy(model)):
        assert bases(twin)[ORIGINAL] == "Stiefel"
        goes_on(twin)
    original = model.get_parameter(ORIGINAL).detach().as_subclass(Tensor)
    model[0].parametrizations.weight.original = nn.Parameter(original)
    with pytest.raises(LostManifoldError, match=rf"'{ORIGINAL}'.*Stiefel"):
        equip(model)
    rm.project_(model)
    parametrize.remove_parametrizations(model[0], "weight")
    with pytest.raises(NotOnManifoldError, match=r"'0.weight'.*project_"):
        equip(model)
    goes_on(rm.project_(model))


def test_a_parametrization_of_torch(make: Make) -> None:
    model = make()
    parametrizations.orthogonal(model[0])
    assert bases(model)[ORIGINAL] == "Stiefel"
    goes_on(model)


def test_a_parametrization_with_two_originals_has_no_manifold(make: Make) -> None:
    model = make()
    parametrize.register_parametrization(model[0], "weight", Split())
    with pytest.raises(LostManifoldError, match=rf"'{ORIGINAL}'.*Stiefel.*gone"):
        equip(model)
    rm.project_(model)
    with pytest.raises(LostManifoldError, match=rf"'{ORIGINAL}'"):
        equip(model)


def test_what_is_parametrized_may_be_declared() -> None:
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    parametrizations.weight_norm(model[0])
    rm.geometrize(model, {"0.parametrizations.weight.original1": manifolds.Sphere()})
    assert bases(model) == {"0.parametrizations.weight.original1": "Sphere"}
    goes_on(model)
    model.load_state_dict(model.state_dict(), assign=True)
    assert bases(model) == {"0.parametrizations.weight.original1": "Sphere"}


def test_pruning_keeps_the_manifold_of_the_original(make: Make) -> None:
    model, metric, _ = trained(make())
    prune.random_unstructured(model[0], "weight", 0.3)
    assert bases(model)["0.weight_orig"] == "Stiefel"
    with pytest.raises(LostManifoldError, match=r"'0.weight'.*gone"):
        backward(metric)
    _, metric, optimizer = equip(model)  # torch cannot copy a pruned module
    backward(metric)
    optimizer.step()
    metric.parameters.verify()
    model[0].weight_orig = nn.Parameter(model[0].weight_orig.detach().clone())
    with pytest.raises(LostManifoldError, match=r"'0.weight_orig'.*Stiefel"):
        rm.LayerwiseMetric(model, output=None)
    rm.LayerwiseMetric(rm.project_(model), output=None)


def test_a_functional_call_with_other_tensors(make: Make) -> None:
    model, metric, optimizer = trained(make())
    values = {name: p.detach().clone() for name, p in model.named_parameters()}

    def call(tensors: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
        return lambda x: torch.func.functional_call(model, tensors, (x,))

    with pytest.raises(NotRecordedError):
        backward(metric, model=call(values))
    assert bases(model) == KEPT
    backward(metric, model=call(dict(model.named_parameters())))
    optimizer.step()


def test_a_parameter_put_in_another_s_place(make: Make) -> None:
    model = make()
    view = MetricManifold(manifolds.Sphere())
    weight = manifolds.Sphere().projx(model[0].weight.detach())
    model[0].weight = geoopt.ManifoldParameter(weight, manifold=view)
    with pytest.raises(LostManifoldError, match=r"'0.weight'.*Stiefel.*on Sphere"):
        equip(model)


# ---- optimizers ------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_a_momentum_travels(make: Make, nesterov: bool) -> None:
    model, metric, optimizer = trained(make())
    optimizer.param_groups[0]["nesterov"] = nesterov
    state = saved(optimizer.state_dict(), safe=True)
    assert len(state["state"]) == 4
    twin, other, heir = equip(copy.deepcopy(model))
    heir.load_state_dict(state)
    for _ in range(3):
        for m, o in ((metric, optimizer), (other, heir)):
            backward(m)
            o.step()
    assert distance(model, twin) == 0.0
    heir.load_state_dict(pickle.loads(pickle.dumps(state)))


# ---- mistakes are found ----------------------------------------------------------


def law_assign() -> None:
    test_assigning_keeps_the_manifolds(declared, "plain")


def law_overwrite() -> None:
    test_conversions_that_replace_parameters(library, "overwrite")


def law_restored() -> None:
    test_conversions_that_replace_parameters(declared, "overwrite")


def law_rounded() -> None:
    test_a_value_rounded_for_a_while(library)


def law_data() -> None:
    test_a_value_set_through_data(library)


def law_widened() -> None:
    torch.manual_seed(0)
    test_a_metric_goes_on_after_a_conversion(library, torch.float32)


LAWS = {
    "assign": law_assign,
    "overwrite": law_overwrite,
    "restored": law_restored,
    "curvature": law_curvature,
    "matrices": law_matrices,
    "rounded": law_rounded,
    "data": law_data,
    "widened": law_widened,
}


@pytest.mark.parametrize(("law", "target", "mistake"), mutants.KEEPING)
def test_wrong_state_keeping_is_found(
    law: str, target: str, mistake: Callable[..., Any], monkeypatch: Any
) -> None:
    LAWS[law]()
    monkeypatch.setattr(target, mistake)
    caught = (AssertionError, RuntimeError, ValueError, pytest.fail.Exception)
    with pytest.raises(caught):
        LAWS[law]()
