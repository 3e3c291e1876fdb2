"""Models of torch's own zoo, and the dense truth that the library is compared with.

Nothing here is shared with the structured path: Jacobians come from
``torch.func.jacrev`` of the whole model or from one call of autograd for every entry of
the outputs, and the solves are dense.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import geoopt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

import riemannian_modules as rm
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.output import OutputMetric
from riemannian_modules.testing.reference import dense_sharp

MASS = 0.1

# --- the truth


@dataclass(frozen=True)
class Truth:
    """What a pass must find: dense factors and the gradient, by parameter name."""

    rows: dict[str, Tensor]
    gradient: dict[str, Tensor]


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def func_jacobian(model: nn.Module, args: Sequence[Tensor]) -> dict[str, Tensor]:
    """Return ``{name: d outputs/d parameter}`` by torch.func, for the whole batch."""
    values = {n: p.detach().as_subclass(Tensor) for n, p in trainable(model).items()}

    def forward(parameters: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        outputs = torch.func.functional_call(model, parameters, tuple(args))
        return outputs if isinstance(outputs, tuple) else (outputs,)

    heads = torch.func.jacrev(forward)(values)
    flat = [
        {n: j.reshape(len(j), -1, values[n].numel()) for n, j in head.items()}
        for head in heads
    ]
    return {n: torch.cat([head[n] for head in flat], 1) for n in values}


def grad_jacobian(
    heads: Sequence[Tensor], parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the same by calling autograd for every entry of the outputs."""
    tensors, n = list(parameters.values()), len(heads[0])
    entries = torch.cat([z.reshape(n, -1) for z in heads], 1)
    rows = [gradient(entry, tensors) for entry in entries.reshape(-1)]
    return {
        name: torch.stack([row[i].reshape(-1) for row in rows]).view(n, -1, p.numel())
        for i, (name, p) in enumerate(parameters.items())
    }


def gradient(value: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return autograd's derivatives of a scalar, zero where there is none."""
    found = torch.autograd.grad(value, tensors, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(t) if g is None else g.to_dense()
        for t, g in zip(tensors, found, strict=True)
    ]


def weighted_rows(heads: Sequence[Tensor], metrics: Sequence[OutputMetric]) -> Tensor:
    """Return the rows of all heads, ``(n, r, entries of all heads)``."""
    n, blocks = len(heads[0]), []
    for z, metric in zip(heads, metrics, strict=True):
        L = metric.factor(z.detach())
        blocks.append(L.reshape(n, L.shape[1], -1) / metric.terms(z.detach()) ** 0.5)
    return torch.stack([torch.block_diag(*each) for each in zip(*blocks, strict=True)])


def truth(
    heads: Sequence[Tensor],
    metrics: Sequence[OutputMetric],
    loss: Tensor,
    parameters: Mapping[str, Tensor],
    jacobian: Mapping[str, Tensor] | None = None,
) -> Truth:
    """Return the dense factors, rows ordered by (output row, example)."""
    if jacobian is None:
        jacobian = grad_jacobian(heads, parameters)
    L = weighted_rows(heads, metrics)
    grads = gradient(loss, list(parameters.values()))
    rows = {
        name: torch.einsum("nro,nop->rnp", L.double(), j.double()).flatten(0, 1)
        for name, j in jacobian.items()
    }
    return Truth(rows, {n: g.double() for n, g in zip(parameters, grads, strict=True)})


# --- the comparison


def close(found: Tensor, expected: Tensor, scale: float, tolerance: float) -> bool:
    return float((found - expected).norm()) <= tolerance * scale


def wrong_factors(
    metric: rm.LayerwiseMetric, expected: Truth, tolerance: float = 1e-9
) -> list[str]:
    """Return the parameters whose factor is missing or not the dense one."""
    parts = {
        part.name: part for block in metric.blocks.values() for part in block.parts
    }
    scale = max(float(rows.norm()) for rows in expected.rows.values())
    wrong = []
    for name, rows in expected.rows.items():
        size = float(rows.norm())
        own = torch.zeros_like(rows)
        if name in parts and parts[name].factor is not None:
            own = parts[name].factor.to_dense()
        if own.shape != rows.shape or not close(
            own, rows, size + 1e-6 * scale, tolerance
        ):
            wrong.append(name)
    return wrong


def wrong_gradients(
    metric: rm.LayerwiseMetric,
    expected: Truth,
    tolerance: float = 1e-9,
    blocks: str = "model",
) -> list[str]:
    """Return the parameters whose gradients differ from the dense ones."""
    parameters = trainable(metric.model)
    scale = max(float(g.norm()) for g in expected.gradient.values())
    wrong = []
    for name, gradient in expected.gradient.items():
        own = parameters[name].grad
        own = torch.zeros_like(gradient) if own is None else own
        if not close(own, gradient, float(gradient.norm()) + 1e-6 * scale, tolerance):
            wrong.append(f"{name}.grad")
    found = metric.natural_gradient()
    for name, vector in dense_solve(metric, expected, blocks).items():
        own = found.get(name, torch.zeros_like(vector))
        if not close(
            own, vector, float(vector.norm()) + 1e-6 * scale / MASS, tolerance
        ):
            wrong.append(f"natural gradient of {name}")
    return wrong


def dense_solve(
    metric: rm.LayerwiseMetric, expected: Truth, blocks: str
) -> dict[str, Tensor]:
    """Return the natural gradient of every parameter, all matrices written out."""
    declared = {d.name: d for d in DeclaredParameters(metric.model, MASS)}
    groups: dict[str, list[str]] = {}
    for name in declared:
        layer = name.rpartition(".")[0]
        groups.setdefault(layer if blocks == "layer" else "", []).append(name)
    result: dict[str, Tensor] = {}
    for names in groups.values():
        if any(not isinstance(declared[n].manifold, geoopt.Euclidean) for n in names):
            spaces = {name: declared[name].space() for name in names}
            result.update(dense_sharp(spaces, expected.rows, expected.gradient))
            continue
        K = torch.cat([expected.rows[name] for name in names], 1)
        e = torch.cat([expected.gradient[name].reshape(-1) for name in names])
        x = torch.linalg.solve(K.mT @ K + MASS * torch.eye(len(e)).to(K), e)
        pieces = x.split([expected.gradient[name].numel() for name in names])
        for name, piece in zip(names, pieces, strict=True):
            result[name] = piece.view_as(expected.gradient[name])
    return result


# --- the zoo


@dataclass(frozen=True)
class Case:
    """A model and what it eats.

    Attributes:
        make: makes the model.
        batch: its arguments for n examples of t positions.
        functional: whether torch.func can differentiate it as a whole. (Not where a
            module has two names: functional_call leaves other tensors behind.)
    """

    make: Callable[[], nn.Module]
    batch: Callable[[int, int], tuple[Tensor, ...]]
    functional: bool = True


ZOO: dict[str, Case] = {}


def vectors(n: int, t: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 4),)


def sequences(n: int, t: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, t, 4),)


def images(n: int, t: int) -> tuple[Tensor, ...]:
    return (torch.randn(n, 2, 5, 5),)


def tokens(n: int, t: int) -> tuple[Tensor, ...]:
    return (torch.randint(0, 7, (n, t)),)


class Lambda(nn.Module):
    """A function between layers."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def chain(*parts: nn.Module | Callable[..., Tensor]) -> nn.Sequential:
    return nn.Sequential(
        *(part if isinstance(part, nn.Module) else Lambda(part) for part in parts)
    )


def mean(h: Tensor) -> Tensor:
    return h.mean(1)


def mean_first(h: Tensor) -> Tensor:
    return h.mean(0)


def swap(h: Tensor) -> Tensor:
    return h.transpose(0, 1)


def add(
    name: str, batch: Callable[[int, int], tuple[Tensor, ...]], **options: bool
) -> Callable[[Callable[[], nn.Module]], Callable[[], nn.Module]]:
    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        ZOO[name] = Case(make, batch, **options)
        return make

    return register


def evaluated(norm: nn.Module) -> nn.Module:
    """Return a BatchNorm in eval mode, with statistics that are not trivial."""
    with torch.no_grad():
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2.0)
        norm.weight.normal_()
    return norm.eval()


@add("Linear, Identity, Sequential", vectors)
def _() -> nn.Module:
    return chain(nn.Linear(4, 5), nn.Tanh(), nn.Identity(), nn.Linear(5, 3))


@add("Linear over positions", sequences)
def _() -> nn.Module:
    return chain(nn.Linear(4, 5), nn.GELU(), nn.Linear(5, 3))


@add("Linear, positions first", sequences)
def _() -> nn.Module:
    return chain(swap, nn.Linear(4, 4), nn.Tanh(), mean_first, nn.Linear(4, 3))


@add("Linear, folded", sequences)
def _() -> nn.Module:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x.flatten(0, 1)))
            return self.last(h).unflatten(0, x.shape[:2]).sum(1)

    return Folded()


@add("Linear, folded with positions first", sequences)
def _() -> nn.Module:
    class Folded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.first(x.transpose(0, 1).flatten(0, 1)))
            return self.last(h).unflatten(0, (x.shape[1], len(x))).sum(0)

    return Folded()


@add("Linear on a manifold", vectors)
def _() -> nn.Module:
    first = rm.nn.Linear(4, 3, manifold=rm.manifolds.Stiefel())
    return chain(first, nn.Tanh(), nn.Linear(3, 3))


@add("Bilinear", vectors)
def _() -> nn.Module:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.pair, self.last = nn.Bilinear(4, 3, 3), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.pair(x, torch.tanh(self.last(x)))

    return Pair()


@add("Conv1d", sequences)
def _() -> nn.Module:
    conv = nn.Conv1d(4, 4, 3, padding=1, groups=2)
    return chain(lambda x: x.mT, conv, nn.ReLU(), lambda h: h.sum(2), nn.Linear(4, 3))


@add("Conv2d, AvgPool2d, Flatten", images)
def _() -> nn.Module:
    return chain(
        nn.Conv2d(2, 3, 3, stride=2, padding=1, dilation=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 2, 2, padding="same", padding_mode="circular"),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(2, 3),
    )


@add("Conv2d of every position", lambda n, t: (torch.randn(n, t, 2, 3, 3),))
def _() -> nn.Module:
    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(2, 2, 2), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.conv(x.flatten(0, 1))).flatten(1)
            return self.last(h.unflatten(0, x.shape[:2]).mean(1))

    return Frames()


@add("Conv3d, MaxPool3d", lambda n, t: (torch.randn(n, 1, 3, 3, 3),))
def _() -> nn.Module:
    pool = nn.MaxPool3d(2)
    return chain(nn.Conv3d(1, 2, 2), nn.Tanh(), pool, nn.Flatten(), nn.Linear(2, 3))


@add("ConvTranspose1d", sequences)
def _() -> nn.Module:
    conv = nn.ConvTranspose1d(4, 3, 2, stride=2)
    return chain(lambda x: x.mT, conv, nn.Tanh(), lambda h: h.sum(2))


@add("ConvTranspose2d", images)
def _() -> nn.Module:
    conv = nn.ConvTranspose2d(2, 2, 3, stride=2, output_padding=1, groups=2)
    pool = nn.AdaptiveAvgPool2d(1)
    return chain(conv, nn.Tanh(), pool, nn.Flatten(), nn.Linear(2, 3))


@add("Embedding with padding", tokens)
def _() -> nn.Module:
    return chain(nn.Embedding(7, 4, padding_idx=0), nn.Tanh(), nn.Linear(4, 3))


@add("EmbeddingBag", tokens)
def _() -> nn.Module:
    bag = nn.EmbeddingBag(7, 4, mode="mean", padding_idx=2)
    return chain(bag, nn.Tanh(), nn.Linear(4, 3))


@add("EmbeddingBag with weights", lambda n, t: (*tokens(n, t), torch.randn(n, t)))
def _() -> nn.Module:
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag, self.last = nn.EmbeddingBag(7, 4, mode="sum"), nn.Linear(4, 3)

        def forward(self, i: Tensor, w: Tensor) -> Tensor:
            return self.last(torch.tanh(self.bag(i, per_sample_weights=w)))

    return Bags()


@add("LayerNorm", sequences)
def _() -> nn.Module:
    return chain(nn.Linear(4, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 3))


@add("RMSNorm, positions first", sequences)
def _() -> nn.Module:
    return chain(swap, nn.Linear(4, 4), nn.RMSNorm(4), nn.Linear(4, 3), mean_first)


@add("GroupNorm", images)
def _() -> nn.Module:
    norm = nn.GroupNorm(2, 4)
    last = nn.Linear(4, 3)
    return chain(nn.Conv2d(2, 4, 3), norm, nn.SiLU(), lambda h: h.mean((2, 3)), last)


@add("BatchNorm1d in eval mode", vectors)
def _() -> nn.Module:
    norm = evaluated(nn.BatchNorm1d(4))
    return chain(nn.Linear(4, 4), norm, nn.Tanh(), nn.Linear(4, 3))


@add("BatchNorm2d in eval mode", images)
def _() -> nn.Module:
    norm, last = evaluated(nn.BatchNorm2d(3)), nn.Linear(3, 3)
    return chain(nn.Conv2d(2, 3, 3), norm, nn.ReLU(), lambda h: h.mean((2, 3)), last)


@add("InstanceNorm2d", images)
def _() -> nn.Module:
    norm, last = nn.InstanceNorm2d(3, affine=True), nn.Linear(27, 3)
    return chain(nn.Conv2d(2, 3, 3), norm, nn.Tanh(), nn.Flatten(), last)


@add("PReLU", sequences)
def _() -> nn.Module:
    return chain(nn.Linear(4, 4), nn.PReLU(), mean, nn.PReLU(4), nn.Linear(4, 3))


class Attention(nn.Module):
    """Self-attention, or attention to a memory of another width."""

    def __init__(self, batch_first: bool, memory: bool = False) -> None:
        super().__init__()
        options = {"kdim": 3, "vdim": 3} if memory else {}
        self.attention = nn.MultiheadAttention(4, 2, batch_first=batch_first, **options)
        self.enter, self.last = nn.Linear(4, 4), nn.Linear(4, 3)
        self.batch_first = batch_first

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        h = self.enter(x)
        keys = h if memory is None else memory
        if not self.batch_first:
            h, keys = h.transpose(0, 1), keys.transpose(0, 1)
        h = self.attention(h, keys, keys)[0]
        return self.last(h if self.batch_first else h.transpose(0, 1))


@add("MultiheadAttention", sequences)
def _() -> nn.Module:
    return Attention(True)


@add("MultiheadAttention, positions first", sequences)
def _() -> nn.Module:
    return Attention(False)


@add(
    "MultiheadAttention to a memory",
    lambda n, t: (torch.randn(n, t, 4), torch.randn(n, 3, 3)),
)
def _() -> nn.Module:
    return Attention(True, memory=True)


@add("MultiheadAttention with its weights and a bias for the keys", sequences)
def _() -> nn.Module:
    class Weights(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(
                4, 2, add_bias_kv=True, add_zero_attn=True, batch_first=True
            )
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h, weights = self.attention(x, x, x)
            return self.last(h) + weights.square().sum(-1, keepdim=True)

    return Weights()


class Masked(nn.Module):
    """A causal mask for all and a padding mask for each."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(4, 1, batch_first=True)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        t = x.shape[1]
        causal = torch.ones(t, t, dtype=torch.bool, device=x.device).triu(1)
        h = self.attention(x, x, x, key_padding_mask=padding, attn_mask=causal)[0]
        return self.last(h)


def padded(n: int, t: int) -> tuple[Tensor, ...]:
    padding = torch.rand(n, t) < 0.4
    padding[:, 0] = False
    return torch.randn(n, t, 4), padding


@add("MultiheadAttention with masks", padded)
def _() -> nn.Module:
    return Masked()


@add("TransformerEncoderLayer", sequences)
def _() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 2, 5, dropout=0.0, batch_first=True)
    return chain(nn.Linear(4, 4), layer, mean, nn.Linear(4, 3))


@add("TransformerEncoderLayer, positions first, in eval mode", sequences)
def _() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 1, 5, norm_first=True).eval()
    return chain(swap, nn.Linear(4, 4), layer, swap, nn.Linear(4, 3))


@add("TransformerEncoder", sequences)
def _() -> nn.Module:
    layer = nn.TransformerEncoderLayer(4, 1, 3, dropout=0.0, batch_first=True)
    stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return chain(stack, mean, nn.Linear(4, 3))


@add(
    "TransformerDecoderLayer", lambda n, t: (torch.randn(n, t, 4), torch.randn(n, 2, 4))
)
def _() -> nn.Module:
    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerDecoderLayer(4, 2, 3, 0.0, batch_first=True)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            return self.last(self.layer(x, memory).mean(1))

    return Decoder()


class Recurrence(nn.Module):
    """A recurrent layer, of which outputs or final states are used."""

    def __init__(self, layer: nn.RNNBase, states: bool = False) -> None:
        super().__init__()
        self.layer, self.states = layer, states
        self.last = nn.Linear(6 if layer.bidirectional else 3, 3)

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        outputs, states = self.layer(x if first else x.transpose(0, 1))
        if self.states:
            return self.last((states[0] if isinstance(states, tuple) else states)[-1])
        return self.last(outputs if first else outputs.transpose(0, 1))


@add("RNN", sequences)
def _() -> nn.Module:
    return Recurrence(nn.RNN(4, 3, nonlinearity="relu", batch_first=True))


@add("GRU, positions first", sequences)
def _() -> nn.Module:
    return Recurrence(nn.GRU(4, 3))


@add("GRU, two layers, final state", sequences)
def _() -> nn.Module:
    return Recurrence(nn.GRU(4, 3, 2, batch_first=True), states=True)


@add("LSTM, bidirectional", sequences)
def _() -> nn.Module:
    return Recurrence(nn.LSTM(4, 3, bidirectional=True, batch_first=True))


@add("LSTM, projected, positions first", sequences)
def _() -> nn.Module:
    return Recurrence(nn.LSTM(4, 5, proj_size=3))


@add("LSTM with learned first states", sequences)
def _() -> nn.Module:
    class Started(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.start = nn.Linear(4, 3)
            self.layer = nn.LSTM(4, 3, batch_first=True)
            self.last = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.start(x[:, 0])).unsqueeze(0)
            outputs, (h, c) = self.layer(x, (h, 2.0 * h))
            return self.last(outputs.sum(1) + h[0] * c[0])

    return Started()


class Cells(nn.Module):
    """A cell in a loop."""

    def __init__(self, cell: nn.RNNCellBase) -> None:
        super().__init__()
        self.cell, self.last = cell, nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        state = None
        for step in x.unbind(1):
            state = self.cell(step, state)
        assert state is not None
        return self.last(state[0] if isinstance(state, tuple) else state)


@add("RNNCell", sequences)
def _() -> nn.Module:
    return Cells(nn.RNNCell(4, 3))


@add("GRUCell", sequences)
def _() -> nn.Module:
    return Cells(nn.GRUCell(4, 3))


@add("LSTMCell", sequences)
def _() -> nn.Module:
    return Cells(nn.LSTMCell(4, 3))


class Residual(nn.Module):
    """A block of a ResNet, with a shortcut that changes the width."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(2, 4, 3, padding=1, bias=False)
        self.bn1 = evaluated(nn.BatchNorm2d(4))
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn2 = evaluated(nn.BatchNorm2d(4))
        self.shortcut = nn.Conv2d(2, 4, 1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        h = self.relu(self.bn1(self.conv1(x)))
        h = self.bn2(self.conv2(h))
        h += self.shortcut(x)
        return self.relu(h)


@add("ResNet block", lambda n, t: (torch.randn(n, 2, 3, 3),))
def _() -> nn.Module:
    pool = nn.AdaptiveAvgPool2d(1)
    return chain(Residual(), pool, nn.Flatten(), nn.Linear(4, 3))


@add("DenseNet block", lambda n, t: (torch.randn(n, 2, 3, 3),))
def _() -> nn.Module:
    class Dense(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Conv2d(2 + k, 1, 3, padding=1) for k in range(3)
            )

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = torch.cat([x, torch.tanh(layer(x))], 1)
            return x

    return chain(Dense(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(5, 3))


@add("squeeze and excitation", images)
def _() -> nn.Module:
    class Squeeze(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.squeeze, self.excite = nn.Conv2d(2, 1, 1), nn.Conv2d(1, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            s = F.adaptive_avg_pool2d(x, 1)
            return x * torch.sigmoid(self.excite(torch.relu(self.squeeze(s))))

    return chain(nn.Conv2d(2, 2, 3), Squeeze(), nn.Flatten(), nn.Linear(18, 3))


@add("autoencoder tied by F.linear", vectors)
def _() -> nn.Module:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 2)
            self.shift = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.encoder(x))
            return F.linear(h, self.encoder.weight.t(), self.shift)

    return Tied()


@add("Embedding tied to the last layer", tokens)
def _() -> nn.Module:
    model = chain(nn.Embedding(7, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 7))
    model[3].weight = model[0].weight
    return model


@add("a layer under two names", vectors, functional=False)
def _() -> nn.Module:
    layer = nn.Linear(4, 4)
    return chain(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3))


@add("a block without a rule under two names", vectors, functional=False)
def _() -> nn.Module:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(4, 4)
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * F.linear(torch.tanh(self.inner(x)), self.inner.weight)

    block = Scaled()
    return chain(block, block, nn.Linear(4, 3))


@add("a block with two names, its weight used outside", vectors, functional=False)
def _() -> nn.Module:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(4, 4)
            self.blocks = nn.ModuleList([self.block])

        def forward(self, x: Tensor) -> Tensor:
            h = self.blocks[0](torch.tanh(self.block(x)))
            return F.linear(h, self.block.weight)

    return Twice()


@add("learned positions as a parameter", sequences)
def _() -> nn.Module:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions = nn.Parameter(torch.randn(1, 6, 4))
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(x + self.positions[:, : x.shape[1]]))

    return Positions()


@add("learned positions as an Embedding", tokens)
def _() -> nn.Module:
    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.tokens, self.positions = nn.Embedding(7, 4), nn.Embedding(6, 4)
            self.last = nn.Linear(4, 3)

        def forward(self, i: Tensor) -> Tensor:
            places = self.positions(torch.arange(i.shape[1], device=i.device))
            return self.last(torch.tanh(self.tokens(i) + places))

    return Positions()


@add("class token", sequences)
def _() -> nn.Module:
    class ClassToken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token = nn.Parameter(torch.randn(1, 1, 4))
            self.mix = nn.TransformerEncoderLayer(4, 1, 3, 0.0, batch_first=True)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            return self.last(self.mix(h)[:, 0])

    return ClassToken()


@add("mixture of two experts", vectors)
def _() -> nn.Module:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
            self.gate = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.gate(x).softmax(-1)
            both = torch.stack([self.experts["a"](x), self.experts["b"](x)], -1)
            return (both * weights.unsqueeze(1)).sum(-1)

    return Mixture()


@add("weight_norm", vectors)
def _() -> nn.Module:
    first = parametrizations.weight_norm(nn.Linear(4, 4))
    return chain(first, nn.Tanh(), nn.Linear(4, 3))


@add("spectral_norm in eval mode", images)
def _() -> nn.Module:
    conv = parametrizations.spectral_norm(nn.Conv2d(2, 2, 3)).eval()
    return chain(conv, nn.Tanh(), nn.Flatten(), nn.Linear(18, 3))


@add("orthogonal", vectors)
def _() -> nn.Module:
    first = parametrizations.orthogonal(nn.Linear(4, 4), use_trivialization=False)
    return chain(first, nn.Tanh(), nn.Linear(4, 3))


@add("pruning", vectors)
def _() -> nn.Module:
    first = nn.Linear(4, 4)
    prune.l1_unstructured(first, "weight", amount=0.5)
    return chain(first, nn.Tanh(), nn.Linear(4, 3))


@add("LazyLinear, LazyConv2d", images)
def _() -> nn.Module:
    model = chain(nn.LazyConv2d(2, 3), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
    model(torch.randn(2, 2, 5, 5))
    return model


@add("ParameterList, ParameterDict", vectors)
def _() -> nn.Module:
    class Holders(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrices = nn.ParameterList(torch.randn(4, 4) for _ in range(2))
            self.others = nn.ParameterDict({"shift": nn.Parameter(torch.randn(4))})
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            for matrix in self.matrices:
                x = torch.tanh(x @ matrix + self.others["shift"])
            return self.last(x)

    return Holders()


@add("checkpoint", vectors, functional=False)
def _() -> nn.Module:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = chain(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
            self.scale = nn.Parameter(torch.randn(4))
            self.last = nn.Linear(4, 3)

        def inner(self, x: Tensor) -> Tensor:
            return self.scale * self.block(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(checkpoint(self.inner, x, use_reentrant=False))

    return Checkpointed()


@add("two heads", sequences)
def _() -> nn.Module:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(4, 4)
            self.one, self.many = nn.Linear(4, 2), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = torch.tanh(self.body(x))
            return self.one(h.mean(1)), self.many(h)

    return Heads()


@add("two heads, one behind the other", sequences)
def _() -> nn.Module:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 3), nn.Linear(3, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.first(x.mean(1))
            # An output that is computed from another one must be a copy.
            return h.clone(), self.last(torch.tanh(h))

    return Heads()


@add("a module that returns a value and what it made of it", vectors)
def _() -> nn.Module:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            h = self.scale * x
            return h, torch.tanh(h)

    def join(both: tuple[Tensor, Tensor]) -> Tensor:
        return both[0] * both[1]

    return chain(nn.Linear(4, 4), Both(), join, nn.Linear(4, 3))


@add("Siamese views folded", lambda n, t: (torch.randn(n, t, 4),))
def _() -> nn.Module:
    class Siamese(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = chain(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 3))

        def forward(self, x: Tensor) -> Tensor:
            codes = self.encoder(torch.cat(x.unbind(1)))
            return torch.stack(codes.chunk(x.shape[1])).prod(0)

    return Siamese()


@add("prototypes", vectors)
def _() -> nn.Module:
    class Prototypes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Linear(4, 2)
            self.register_buffer("support", torch.randn(5, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.encoder(x) @ torch.tanh(self.encoder(self.support)).mT

    return Prototypes()


@add("a mix of layouts", sequences)
def _() -> nn.Module:
    """Batch first, positions first and folded layers of one width, one by one."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
            self.scale = nn.Parameter(torch.randn(4))
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.tanh(self.a(x)).transpose(0, 1)
            h = torch.tanh(self.b(h)) * self.scale
            h = self.c(h.flatten(0, 1)).unflatten(0, h.shape[:2])
            return self.last(h[-1])

    return Mixed()
