"""On a CUDA device every model and manifold has the natural gradient of the CPU."""

import copy
from functools import partial

import pytest
import torch
from cases import BASES, OUTPUTS, chain, inputs
from test_zoo import loss_of, move, outputs_of
from torch import Tensor, nn
from zoo_models import MASS, ZOO

import riemannian_modules as rm

pytestmark = pytest.mark.gpu

# torch's own kernel for weight_norm rounds float64 to 2e-8 (2.11, H100), so that the
# models differ already.
ROUNDED = {"weight_norm": 1e-5}


def natural_gradient(
    model: nn.Module, args: tuple[Tensor, ...], metric: rm.LayerwiseMetric
) -> dict[str, Tensor]:
    with metric.record():
        heads = outputs_of(model, args)
    metric.backward(loss_of(heads), heads if len(heads) > 1 else heads[0])
    return {name: x.cpu() for name, x in metric.natural_gradient().items()}


def metric_of(model: nn.Module, heads: int) -> rm.LayerwiseMetric:
    outputs = [rm.output.Categorical() for _ in range(heads)]
    output = outputs if heads > 1 else outputs[0]
    return rm.LayerwiseMetric(model, output=output, mass=MASS)


def moved(value: Tensor) -> Tensor:
    return value.to("cuda")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ZOO)
def test_the_zoo(name: str) -> None:
    case = ZOO[name]
    model, twin = case.make(), case.make()
    twin.load_state_dict(model.state_dict())
    heads = len(outputs_of(model, case.batch(2, 2)))
    twin.to("cuda")
    metric, other = metric_of(model, heads), metric_of(twin, heads)
    for n, t in [(3, 2), (5, 4), (5, 4)]:
        args = case.batch(n, t)
        expected = natural_gradient(model, args, metric)
        found = natural_gradient(twin, tuple(map(moved, args)), other)
        for parameter, x in expected.items():
            torch.testing.assert_close(
                found[parameter].as_subclass(Tensor),
                x.as_subclass(Tensor),
                rtol=ROUNDED.get(name, 1e-7),
                atol=1e-9,
                msg=partial("{} of {} x {}: {}".format, parameter, n, t),
            )
        move(model)
        with torch.no_grad():
            pairs = zip(twin.parameters(), model.parameters(), strict=True)
            for there, here in pairs:
                there.copy_(here.to("cuda"))


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("base", BASES)
def test_every_manifold(base: str, blocks: str) -> None:
    model = chain(base)
    x = inputs(model, 3)
    loss = OUTPUTS["categorical"].loss_for(model(x).detach())
    found = []
    for each, data in ((model, x), (copy.deepcopy(model).to("cuda"), moved(x))):
        metric = rm.LayerwiseMetric(
            each, rm.output.Categorical(), mass=0.1, blocks=blocks
        )
        optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
        for _ in range(2):
            with metric.record():
                z = each(data)
            here = loss if data is x else lambda z: loss(z.cpu())
            metric.backward(here(z), z)
            optimizer.step()
        found.append([p.detach().cpu() for p in each.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(
            one.as_subclass(Tensor), other.as_subclass(Tensor), rtol=1e-8, atol=1e-9
        )
