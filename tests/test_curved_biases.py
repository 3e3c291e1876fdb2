"""Biases and scales of every kind of layer, on manifolds of vectors."""

from collections.abc import Callable

import pytest
import torch
from cases import OUTPUTS, place
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import riemannian_modules as rm
from riemannian_modules.testing import check_module, raise_failures
from riemannian_modules.testing.strategies import VECTOR_MANIFOLDS


class Read(nn.Module):
    """A layer that reads a sequence, and a readout."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(self.layer, nn.MultiheadAttention):
            found = self.layer(x, x, x, need_weights=False)
        elif isinstance(self.layer, nn.LSTMCell):
            found = self.layer(x[:, 0])
        elif isinstance(self.layer, nn.Conv1d):
            found = self.layer(x.mT).mT
        else:
            found = self.layer(x)
        hidden = found[0] if isinstance(found, tuple) else found
        return self.last(hidden if hidden.ndim == 2 else hidden.sum(1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...]]] = {
    "linear": (lambda: nn.Linear(4, 4), ("bias",)),
    "convolution": (lambda: nn.Conv1d(4, 4, 2, groups=2), ("bias",)),
    "layer-norm": (lambda: nn.LayerNorm(4), ("weight", "bias")),
    "recurrent": (
        lambda: nn.GRU(4, 4, batch_first=True),
        ("bias_ih_l0", "bias_hh_l0"),
    ),
    "cell": (lambda: nn.LSTMCell(4, 4), ("bias_ih", "bias_hh")),
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        ("in_proj_bias", "out_proj.bias"),
    ),
}


@pytest.mark.parametrize("kind", VECTOR_MANIFOLDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_the_gradient_is_the_dense_one(layer: str, kind: str) -> None:
    make, names = LAYERS[layer]
    model = Read(make())
    for name in (*(f"layer.{name}" for name in names), "last.bias"):
        place(model, name, VECTOR_MANIFOLDS[kind]())
    x = torch.randn(2, 3, 4)
    loss = OUTPUTS["categorical"].loss_for(model(x).detach())
    blocks = ["layer", "model"][len(layer + kind) % 2]
    with sdpa_kernel(SDPBackend.MATH):  # the reference's Jacobians need it
        results = check_module(model, x, rm.output.Categorical(), loss, blocks=blocks)
    raise_failures(results)
