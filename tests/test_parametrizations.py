"""Weights that another module computes, and computes otherwise while it trains."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import spectral_norm as older_spectral_norm
from zoo_models import grad_jacobian, trainable

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError

normed = parametrizations.spectral_norm


def convolution() -> nn.Module:
    conv = normed(nn.Conv1d(1, 8, 3))
    return nn.Sequential(
        nn.Unflatten(1, (1, 5)), conv, nn.Tanh(), nn.Flatten(), nn.Linear(24, 3)
    )


def linear() -> nn.Module:
    """Two of them, that converge slowly."""
    inner = normed(nn.Linear(16, 16)), nn.Tanh(), nn.Linear(16, 3)
    return nn.Sequential(normed(nn.Linear(5, 16)), nn.Tanh(), *inner)


def older() -> nn.Module:
    first = older_spectral_norm(nn.Linear(5, 16))
    return nn.Sequential(first, nn.Tanh(), nn.Linear(16, 3))


class Layer(nn.Module):
    """A layer of several kinds that has a rule which runs a part of it again."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.last = kind, nn.Linear(6, 3)
        if kind == "cell":
            self.layer: nn.Module = normed(nn.GRUCell(5, 6), "weight_hh")
            return
        self.enter = nn.Linear(5, 18)
        self.layer = nn.MultiheadAttention(6, 2, batch_first=True)
        if kind == "packed":
            normed(self.layer, "in_proj_weight")
        else:
            normed(self.layer.out_proj)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "cell":
            return self.last(self.layer(x, torch.tanh(F.pad(x, (0, 1)))))
        h = self.enter(x).unflatten(1, (3, 6))
        return self.last(self.layer(h, h, h)[0].sum(1))


class Twice(nn.Module):
    """Calls one layer two times, with two weights while it trains."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = normed(nn.Linear(16, 16)), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(F.pad(x, (0, 11)))
        return self.last(torch.tanh(self.layer(torch.tanh(h))))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "convolution": convolution,
    "linear": linear,
    "older": older,
    "cell": lambda: Layer("cell"),
    "attention, inputs": lambda: Layer("packed"),
    "attention, output": lambda: Layer("output"),
}


def metric_of(model: nn.Module) -> rm.LayerwiseMetric:
    return rm.LayerwiseMetric(model, rm.output.Euclidean(), reduction="sum", mass=0.1)


def state(model: nn.Module) -> list[object]:
    modes = [each.training for each in model.modules()]
    return [*modes, *(value.tolist() for value in model.state_dict().values())]


def errors(metric: rm.LayerwiseMetric, dense: dict[str, Tensor], n: int) -> list[float]:
    """Of every factor, against autograd on the very same graph."""
    parts = [part for block in metric.blocks.values() for part in block.parts]
    assert {part.name for part in parts} == set(dense)
    found = []
    for part in parts:
        rows = part.factor.to_dense().flatten(1).unflatten(0, (-1, n)).transpose(0, 1)
        largest = max(float(each.norm()) for each in dense.values())
        found.append(float((rows - dense[part.name]).norm()) / largest)
    return found


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("name", MODELS)
def test_spectral_norms_that_train(name: str) -> None:
    torch.manual_seed(0)
    model, n = MODELS[name](), 4
    metric = metric_of(model)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.05)
    for _ in range(3):
        before = state(model)
        with metric.record():
            z = model(torch.randn(n, 5))
        during = state(model)
        assert during != before, "nothing moved: the case is none"
        dense = grad_jacobian([z], trainable(model))
        metric.backward(z.square().sum(), z)
        assert max(errors(metric, dense, n)) < 1e-12
        assert state(model) == during
        optimizer.step()


def test_two_uses_in_a_pass_are_refused_with_the_remedy() -> None:
    torch.manual_seed(0)
    model, n = Twice(), 4
    metric = metric_of(model)
    for still in (False, True):
        if still:
            model.layer.parametrizations.eval()
        with metric.record():
            z = model(torch.randn(n, 5))
        before = state(model)
        if still:
            dense = grad_jacobian([z], trainable(model))
            metric.backward(z.square().sum(), z)
            assert max(errors(metric, dense, n)) < 1e-12
        else:
            with pytest.raises(LinearizationError, match=r"_SpectralNorm.*\.eval\(\)"):
                metric.backward(z.square().sum(), z)
        assert state(model) == before


class DropsOut(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return F.dropout(weight, 0.5, self.training)


def test_a_weight_that_drops_out_is_refused_with_the_remedy() -> None:
    torch.manual_seed(0)
    first = nn.Linear(5, 16)
    parametrize.register_parametrization(first, "weight", DropsOut())
    model = nn.Sequential(first, nn.Tanh(), nn.Linear(16, 3))
    metric = metric_of(model)
    with metric.record():
        z = model(torch.randn(4, 5))
    with pytest.raises(LinearizationError, match=r"DropsOut.*parametrizations\.eval"):
        metric.backward(z.square().sum(), z)
    assert all(each.training for each in model.modules())
