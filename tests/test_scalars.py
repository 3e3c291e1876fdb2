"""Parameters of shape () in every place that reads a parameter's shape."""

import copy
import pickle

import geoopt
import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, Scalars
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import MassError, ShapeError
from riemannian_modules.factors import DenseFactor
from riemannian_modules.mass import as_mass
from riemannian_modules.testing import check_metric, raise_failures

X = torch.linspace(-1.0, 1.0, 24, dtype=torch.float64).sin().view(6, 4)
Y = torch.arange(6) % 3


def passed(model: nn.Module, **options) -> rm.LayerwiseMetric:
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), **options)
    backward(metric)
    return metric


def backward(metric: rm.LayerwiseMetric) -> Tensor:
    with metric.record():
        z = metric.model(X)
    loss = F.cross_entropy(z, Y)
    metric.backward(loss, z)
    return loss.detach()


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_their_metrics_keep_every_law(blocks: str) -> None:
    for block in passed(MODELS["scalars"](), blocks=blocks).blocks.values():
        raise_failures(check_metric(block))


@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": 0.9, "nesterov": True}, {"weight_decay": 0.1}],
    ids=["plain", "momentum", "decay"],
)
def test_steps_and_their_report(options) -> None:
    model = MODELS["scalars"]()
    mass = {"scale": torch.tensor(0.3), "*": 0.1}
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=mass)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.5, **options)
    before, losses = model.scale.detach().clone(), []
    for _ in range(5):
        losses.append(float(backward(metric)))
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not torch.equal(model.scale, before)
    assert float(model.temperature.detach()) > 0.0
    assert "model" in str(optimizer.report)


def test_a_scalar_alone_has_the_gradient_of_calculus() -> None:
    # z = a x with the Euclidean output metric: g = mu + mean |x|^2.
    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.alpha = nn.Parameter(torch.tensor(0.5))

        def forward(self, x: Tensor) -> Tensor:
            return self.alpha * x

    model = Scale()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    with metric.record():
        z = model(X)
    metric.backward(0.5 * z.square().sum() / 6, z)
    size = X.square().sum() / 6
    found = metric.natural_gradient()["alpha"]
    torch.testing.assert_close(found, 0.5 * size / (0.1 + size))


def test_a_geoopt_optimizer_steps_in_their_metric() -> None:
    model = Scalars(3)
    rm.geometrize(model, {"scale": rm.manifolds.Euclidean()})
    metric = passed(model, blocks="tensor", mass=0.1)
    x, before = metric.natural_gradient(), model.scale.detach().clone()
    geoopt.optim.RiemannianSGD([model.scale, model.temperature], lr=0.5).step()
    torch.testing.assert_close(model.scale.detach(), before - 0.5 * x["scale"])
    assert float(model.temperature.detach()) > 0.0


def test_the_tree_and_the_product_hold_them() -> None:
    model = MODELS["scalars"]()
    metric = passed(model)
    lines = rm.nn.tree(model, metric).splitlines()
    (line,) = (line for line in lines if "temperature" in line)
    assert line.split()[-6:-2] == ["1", "Positive", "1", "0.01"]
    product = metric.manifold
    values = {n: p.detach().as_subclass(Tensor) for n, p in model.named_parameters()}
    back = product.unpack(product.pack(values))
    assert back["scale"].shape == back["temperature"].shape == ()
    assert torch.equal(back["scale"], values["scale"])


@pytest.mark.parametrize(
    "change", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))]
)
def test_copies_and_conversions(change) -> None:
    model = change(MODELS["scalars"]()).float().double()
    assert model.temperature.manifold.base.name == "Positive"
    passed(rm.project_(model))


def test_masses_and_factors_of_numbers() -> None:
    as_mass(torch.tensor(2.0), (), "a")
    with pytest.raises(MassError):
        as_mass(torch.ones(1), (), "a")
    assert DenseFactor(torch.ones(3)).shape == ()
    with pytest.raises(ShapeError, match=r"shape \(\)"):
        DenseFactor(torch.ones(()))


def test_a_manifold_of_numbers_with_a_factor() -> None:
    metric = passed(MODELS["scalars"](), blocks="tensor", mass=0.1)
    manifold = metric.model.temperature.manifold
    x = metric.model.temperature.detach().as_subclass(Tensor)
    u, batch = torch.tensor(0.3), torch.tensor([0.3, -0.2])
    block = metric.blocks["temperature"]
    torch.testing.assert_close(manifold.inner(x, u, u), block.inner(u, u))
    assert manifold.inner(x, u, keepdim=True).shape == ()
    found = manifold.inner(x, batch, batch)
    torch.testing.assert_close(found[1], block.inner(batch[1], batch[1]))
    torch.testing.assert_close(manifold.egrad2rgrad(x, u), block.sharp(u))


def test_a_pair_is_of_vectors() -> None:
    with pytest.raises(MassError, match="do not fit"):
        as_mass((torch.ones(2, 3), torch.tensor(1.0)), (2, 3), "a")


def test_masses_are_copies() -> None:
    own = torch.ones(2, 3)
    kept = as_mass(rm.Mass(diagonal=own), (2, 3), "a")
    pair = as_mass(rm.Mass(2.0, own[:, 0], own[0]), (2, 3), "a")
    own.mul_(5.0)
    ones = torch.ones(2, 3)
    torch.testing.assert_close(kept.elementwise(ones), ones)
    torch.testing.assert_close(pair.elementwise(ones), 2.0 * ones)
