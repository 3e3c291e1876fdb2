"""Parameters that meet constants, or one another, before they meet the examples."""

from collections.abc import Callable
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from test_shared_parameters import LONG, SIZES, WIDTH, Tokens, gap, needs_hooks
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError

# All of them drop out at random, so that a replay would be refused.
pytestmark = needs_hooks


class Two(Tokens):
    """Two parameters and a constant of the same shape."""

    how: ClassVar[Callable[[Tensor, Tensor, Tensor], Tensor]]

    def build(self) -> None:
        self.own, self.other = (nn.Parameter(torch.randn(LONG, WIDTH)) for _ in "ab")
        self.register_buffer("still", torch.randn(LONG, WIDTH))

    def add(self, h: Tensor) -> Tensor:
        t = type(self).how(self.own, self.other, self.still)
        return h + t[: h.shape[1]]


SUMS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "constant": lambda p, q, c: (p + c) + q,
    "each other": lambda p, q, c: p + q,
    "difference": lambda p, q, c: torch.sub(p, c, alpha=0.5) - q,
    "product": lambda p, q, c: p * q,
    "square": lambda p, q, c: p * p + q,
    "two ways": lambda p, q, c: p.tanh() + p * c + q,
    "several steps": lambda p, q, c: ((p + c) * q - c) * 0.5 + p,
    "of other shapes": lambda p, q, c: p[0] + q[:, :1] * c,
    "masked": lambda p, q, c: torch.where(c > 0, p, q).masked_fill(c > 1, 3.0),
    "at random": lambda p, q, c: F.dropout(p + q, 0.5),
}


@pytest.mark.parametrize("name", SUMS)
def test_sums_and_products_of_parameters(name: str) -> None:
    torch.manual_seed(0)
    model = type("Model", (Two,), {"how": staticmethod(SUMS[name])})
    assert gap(model(), [*SIZES, (9, 9), (4, 9)]) < 1e-9


@pytest.mark.parametrize("name", ["constant", "two ways"])
def test_where_the_graph_stays(name: str) -> None:
    torch.manual_seed(0)
    model = type("Model", (Two,), {"how": staticmethod(SUMS[name])})
    assert gap(model(), [(4, 5)] * 6, static_graph=True) < 1e-9


class Given(Two):
    """Meets the input itself, of which the graph shows nothing."""

    def forward(self, x: Tensor) -> Tensor:
        own, other = self.own[: x.shape[1], :3], self.other[: x.shape[1], :3]
        h = (x + own) * other + own.exp()
        return self.last(torch.tanh(F.dropout(self.enter(h) + self.still[0], 0.3)))


class Scaling(Two):
    def add(self, h: Tensor) -> Tensor:
        return h * (self.own + self.other)[: h.shape[1]]


class Late(Two):
    """The same sum in several places, of which one comes back as another sum."""

    def add(self, h: Tensor) -> Tensor:
        t = (self.own + self.other)[: h.shape[1]]
        h = torch.tanh(h * t) + t
        return h + (t + self.own[: h.shape[1]])


@pytest.mark.parametrize("model", [Given, Scaling, Late])
def test_where_examples_come_in(model: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    assert gap(model(), [(4, 5), (3, 3), (1, 4), (5, 1)]) < 1e-9


class Scores(Tokens):
    """A bias for the distance of two tokens, and masks, of all or of each example."""

    def __init__(self, mask: str) -> None:
        self.mask = mask
        super().__init__()

    def build(self) -> None:
        self.bias = nn.Embedding(2 * LONG, 2)
        self.slope = nn.Parameter(torch.randn(2, 1, 1))

    def add(self, h: Tensor) -> Tensor:
        n, length, _ = h.shape
        far = torch.arange(length)[:, None] - torch.arange(length) + LONG
        bias = self.bias(far).permute(2, 0, 1).unsqueeze(0)
        mask = torch.zeros(1, 1, length, length)
        if "causal" in self.mask:
            mask = torch.full_like(mask, -1e4).triu(1)
        if "padding" in self.mask:
            mask = mask - 1e4 * (torch.rand(n, 1, 1, length) < 0.3)
        bias = bias + self.slope * (far - LONG).abs()
        if "chosen" in self.mask:
            bias = torch.where(mask == 0, bias, -1e4)
        elif "filled" in self.mask:
            bias = bias.masked_fill(mask < 0, -1e4)
        else:
            bias = bias + mask
        q = h.unflatten(2, (2, -1)).transpose(1, 2)
        scores = F.dropout(q, 0.1) @ q.mT + bias
        return (F.dropout(scores.softmax(-1), 0.1) @ q).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("how", ["", " chosen", " filled"])
@pytest.mark.parametrize("mask", ["causal", "padding", "causal and padding"])
def test_biases_of_attention(mask: str, how: str) -> None:
    torch.manual_seed(0)
    assert gap(Scores(mask + how), [(4, 5), (3, 3), (2, 2), (1, 4), (3, 5)]) < 1e-9


def test_masks_that_come_and_go() -> None:
    torch.manual_seed(0)
    model = Scores("causal")
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    for mask in ("causal", "padding", "causal", "padding", "causal"):
        model.mask = mask
        # The dense reference is that of each pass.
        assert gap_of(metric, model, (4, 5)) < 1e-9


def gap_of(
    metric: rm.LayerwiseMetric, model: nn.Module, size: tuple[int, int]
) -> float:
    n, length = size
    with metric.record():
        z = model(torch.randn(n, length, 3))
    rows = [
        torch.autograd.grad(
            z, list(model.parameters()), one, retain_graph=True, materialize_grads=True
        )
        for one in torch.eye(z.numel()).view(-1, *z.shape)
    ]
    metric.backward(z.square().mean(), z)
    worst = 0.0
    named = dict(model.named_parameters())
    for block in metric.blocks.values():
        for part in block.parts:
            index = [id(p) for p in named.values()].index(id(named[part.name]))
            dense = torch.stack([row[index] for row in rows]).flatten(1)
            own = part.factor.to_dense().flatten(1)
            gram, expected = own.mT @ own, dense.mT @ dense / n
            worst = max(worst, float((gram - expected).norm() / expected.norm()))
    return worst


def test_later_passes_know_the_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    model = type("Model", (Two,), {"how": staticmethod(SUMS["constant"])})()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    for _ in range(2):
        assert gap_of(metric, model, (4, 5)) < 1e-9
    monkeypatch.setattr(metric._recorder, "_explore", None)
    assert gap_of(metric, model, (4, 5)) < 1e-9


def test_what_an_unknown_operation_lies_behind_is_refused() -> None:
    torch.manual_seed(0)
    model = type(
        "Model", (Two,), {"how": staticmethod(lambda p, q, c: p.sort(0)[0] + q)}
    )
    with pytest.raises(LinearizationError, match="'own'"):
        gap(model(), [(4, 5)])
