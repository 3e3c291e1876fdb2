"""Layer norms, whose forward derivative torch does not differentiate right."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import jvp

import riemannian_modules as rm
from riemannian_modules.twice import DifferentiableTwice


class Written(nn.LayerNorm):
    """The same layer in operations that can be differentiated."""

    def forward(self, x: Tensor) -> Tensor:
        dims = tuple(range(-len(self.normalized_shape), 0))
        variance, mean = torch.var_mean(x, dims, correction=0, keepdim=True)
        return (x - mean) / (variance + self.eps).sqrt() * self.weight + self.bias


def model(kind: type[nn.LayerNorm]) -> nn.Sequential:
    torch.manual_seed(0)
    norm = kind(4)
    nn.init.normal_(norm.weight)
    return nn.Sequential(nn.Linear(3, 4), norm, nn.Tanh(), nn.Linear(4, 3)).double()


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_rates_of_models_with_layer_norms(blocks: str) -> None:
    found = []
    x, y = torch.randn(9, 3).double(), torch.arange(9) % 3
    for kind in (nn.LayerNorm, Written):
        net = model(kind)
        metric = rm.LayerwiseMetric(
            net, rm.output.Categorical(), mass=0.1, blocks=blocks
        )
        with metric.record():
            z = net(x)
        metric.backward(F.cross_entropy(z, y), z)
        rate = rm.contraction.rate(
            metric, lambda z: F.cross_entropy(z, y), x, kind="true"
        )
        found.append(rate.value)
    assert found[0] == pytest.approx(found[1], rel=1e-8)


def test_bending_outputs() -> None:
    net, x = model(nn.LayerNorm), torch.randn(5, 3).double()
    metric = rm.functional.FunctionalMetric(
        net, lambda net, x: net(x), rm.output.Euclidean()
    )
    z = metric(x)
    metric.backward(0.5 * z.square().sum(1).mean(), z)
    d = {name: torch.randn_like(p) for name, p in net.named_parameters()}
    exact, differences = metric.bend(d), metric.bend(d, spacing=1e-3)
    torch.testing.assert_close(exact, differences, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(4,), (3, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_a_layer_norm_written_out(shape: tuple[int, ...], affine: bool) -> None:
    layer = nn.LayerNorm(shape, elementwise_affine=affine).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x, u = (torch.randn(5, 3, 4).double() for _ in range(2))
    expected = layer(x)
    with DifferentiableTwice():
        torch.testing.assert_close(layer(x), expected)

        def slope(x: Tensor) -> Tensor:
            found: Tensor = jvp(layer, (x,), (u,))[1]
            return found

        second = jvp(slope, (x,), (u,))[1]
    h = 1e-4
    difference = (layer(x + h * u) - 2.0 * layer(x) + layer(x - h * u)) / h**2
    torch.testing.assert_close(second, difference, rtol=1e-4, atol=1e-5)
