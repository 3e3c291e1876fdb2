"""Models with recurrent layers and attention, against the dense Jacobian."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from sequence_cases import STEPS, N
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import DenseFactor, LinearFactor, MetricFactor
from riemannian_modules.testing import check_module, raise_failures
from riemannian_modules.testing.reference import dense_factor

# ---- models ----------------------------------------------------------------------


class Encoder(nn.Module):
    """One or two layers of a transformer's encoder and a head at every token."""

    def __init__(self, layers: int = 1, dropout: float = 0.0, **options: Any) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(4, 2, 5, dropout, **options)
        self.first = not options.get("batch_first", False)
        self.core = (
            layer
            if layers == 1
            else nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        )
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = self.core(x.transpose(0, 1) if self.first else x)
        return self.head(z.transpose(0, 1) if self.first else z)


class Decoder(nn.Module):
    """A causal layer of a decoder, with a memory of another length."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.memory = nn.Linear(4, 4)
        self.core = nn.TransformerDecoderLayer(4, 2, 5, 0.0, **options)
        self.head = nn.Linear(4, 3)
        self.first = not options.get("batch_first", False)

    def forward(self, x: Tensor) -> Tensor:
        memory = torch.tanh(self.memory(x[:, :2]))
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1]).to(x.dtype)
        if self.first:
            x, memory = x.transpose(0, 1), memory.transpose(0, 1)
        z = self.core(x, memory, tgt_mask=mask, tgt_is_causal=True)
        return self.head(z.transpose(0, 1) if self.first else z)


class Language(nn.Module):
    """An LSTM over tokens whose embedding is also the output's weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.core = nn.LSTM(3, 3, batch_first=True)
        self.head = nn.Linear(3, 5)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(self.embedding(x))[0])


class Loop(nn.Module):
    """A cell in a loop of the user's."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.LSTMCell(4, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(len(x), 3)
        for each in x.unbind(1):
            h, c = self.core(each, (h, c))
        return self.head(h)


class Ends(nn.Module):
    """Only the states at the end of a GRU in two layers."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.core = nn.GRU(4, 2, 2, batch_first=True, **options)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.core(x)[1].transpose(0, 1).flatten(1))


def model_and_input(name: str) -> tuple[nn.Module, Tensor]:
    kind, *flags = name.split()
    options = {flag.replace("-", "_"): True for flag in flags}
    make: dict[str, Callable[..., nn.Module]] = {
        "encoder": Encoder,
        "encoders": lambda **o: Encoder(2, **o),
        "decoder": Decoder,
        "language": Language,
        "loop": Loop,
        "ends": Ends,
    }
    model = make[kind](**options)
    x = torch.randn(N, STEPS, 4)
    return model, torch.randint(5, (N, STEPS)) if kind == "language" else x


def cross_entropy(outputs: Tensor) -> Tensor:
    flat = outputs.flatten(0, -2)
    target = torch.arange(len(flat), device=flat.device) % flat.shape[-1]
    return F.cross_entropy(flat, target)


def factors(model: nn.Module, x: Tensor) -> dict[str, MetricFactor]:
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    with metric.record():
        outputs = model(x)
    metric.backward(cross_entropy(outputs), outputs)
    return {
        part.name: part.factor
        for block in metric.blocks.values()
        for part in block.parts
        if part.factor is not None
    }


def assert_dense(model: nn.Module, x: Tensor) -> dict[str, MetricFactor]:
    """Compare the factors with the dense Jacobian, and return them."""
    found = factors(model, x)
    dense = dense_factor(model, rm.output.Categorical(), x)
    scale = max(float(rows.norm()) for rows in dense.values())
    for each, factor in found.items():
        size = max(float(dense[each].norm()), 1e-2 * scale)
        assert float((factor.to_dense() - dense[each]).norm()) < 1e-10 * size, each
    return found


FLAGS = ["", " norm-first", " batch-first", " norm-first batch-first"]
MODELS = [
    *(f"encoder{flags}" for flags in FLAGS),
    *(f"decoder{flags}" for flags in FLAGS),
    "encoders batch-first",
    "language",
    "loop",
    "ends",
]


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # of the reference
@pytest.mark.parametrize("name", MODELS)
def test_models(name: str) -> None:
    model, x = model_and_input(name)
    sequential = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)
    known = {
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, sequential)
        for name, _ in module.named_parameters()
    }
    assert known
    found = assert_dense(model, x)
    assert not [each for each in known if isinstance(found[each], DenseFactor)]
    output, generator = rm.output.Categorical(), torch.Generator().manual_seed(1)
    # The checks push forward, too, which torch's fused attention cannot.
    with sdpa_kernel(SDPBackend.MATH):
        raise_failures(
            check_module(model, x, output, cross_entropy, generator=generator)
        )


# ---- manifolds -------------------------------------------------------------------


def on(manifold: geoopt.Manifold, value: Tensor) -> geoopt.ManifoldParameter:
    point = manifold.projx(value.detach().as_subclass(Tensor))
    return geoopt.ManifoldParameter(point, manifold=manifold)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("manifold", [rm.manifolds.Stiefel, rm.manifolds.Sphere])
@pytest.mark.parametrize("name", ["encoder", "decoder batch-first", "loop", "ends"])
def test_weights_on_manifolds(
    name: str, manifold: Callable[[], geoopt.Manifold]
) -> None:
    model, x = model_and_input(name)
    for module in model.core.modules():
        for attribute in ("in_proj_weight", "weight_hh", "weight_hh_l1"):
            if isinstance(getattr(module, attribute, None), nn.Parameter):
                own = on(manifold(), getattr(module, attribute))
                setattr(module, attribute, own)
    assert any(isinstance(p, geoopt.ManifoldParameter) for p in model.parameters())
    output, generator = rm.output.Categorical(), torch.Generator().manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        raise_failures(
            check_module(model, x, output, cross_entropy, generator=generator)
        )


# ---- what the rules refuse -------------------------------------------------------


class Learned(nn.Module):
    """Attention with learned tokens, which come between its projections."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.MultiheadAttention(4, 2, 0.3, add_bias_kv=True, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.core(x, x, x, need_weights=False)[0].sum(1)


@pytest.fixture
def hidden_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a torch that does not tell whether saved tensors have hooks."""
    products = import_module("riemannian_modules.rules.products")
    monkeypatch.setattr(products, "saved_as_they_are", lambda: False)


@pytest.mark.usefixtures("hidden_products")
def test_dropout_inside_attention_names_parameter_and_remedy() -> None:
    model = Learned()
    x = torch.randn(N, STEPS, 4)
    pattern = r"'core\.in_proj_weight'.*drops out.*dropout = 0\.0.*eval\(\)"
    with pytest.raises(LinearizationError, match=pattern):
        factors(model, x)
    # What the message says helps.
    model.core.dropout = 0.0
    assert isinstance(factors(model, x)["core.in_proj_weight"], LinearFactor)
    model.core.dropout = 0.3
    model.core.eval()
    assert isinstance(factors(model, x)["core.in_proj_weight"], LinearFactor)


@pytest.mark.usefixtures("hidden_products")
def test_dropout_between_layers_names_parameter_and_remedy() -> None:
    model, x = Ends(dropout=0.3), torch.randn(N, STEPS, 4)
    pattern = r"'core\.\w+'.*drops out.*dropout = 0\.0.*eval\(\)"
    with pytest.raises(LinearizationError, match=pattern):
        factors(model, x)
    model.core.dropout = 0.0
    assert isinstance(factors(model, x)["core.weight_hh_l1"], LinearFactor)


class Packed(nn.Module):
    """A GRU that skips the padding."""

    def __init__(self) -> None:
        super().__init__()
        self.core, self.head = nn.GRU(4, 2, batch_first=True), nn.Linear(2, 3)

    def forward(self, x: Tensor) -> Tensor:
        lengths = torch.arange(len(x)).remainder(2).add(2)
        packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        return self.head(self.core(packed)[1][0])


def assert_packed(model: nn.Module, x: Tensor) -> None:
    # One row after the other, as torch.func cannot pack.
    found, outputs = factors(model, x), model(x)
    scale = outputs.shape[:-1].numel() ** -0.5
    L = rm.output.Categorical().factor(outputs.detach()) * scale
    alone = torch.eye(len(x)).view(len(x), -1, *[1] * (outputs.ndim - 1))
    rows = [
        torch.autograd.grad(outputs, model.parameters(), l, retain_graph=True)
        for l in (L.movedim(1, 0).unsqueeze(1) * alone).flatten(0, 1)
    ]
    for (name, _), column in zip(
        model.named_parameters(), zip(*rows, strict=True), strict=True
    ):
        dense = torch.stack(column).flatten(1)
        torch.testing.assert_close(found[name].to_dense(), dense, atol=1e-12, rtol=0)


def test_packed_sequences_inside_a_model() -> None:
    # The model as a whole explains them: it sees a batch.
    with pytest.warns(UserWarning, match="'core'.*packed sequences") as caught:
        assert_packed(Packed(), torch.randn(4, STEPS, 4))
    assert [each.filename for each in caught] == [__file__]


def test_packed_sequences_are_warned_of_once() -> None:
    model = Packed()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())

    def pull_back(*sizes: int) -> None:
        for n in sizes:
            with metric.record():
                outputs = model(torch.randn(n, STEPS, 4))
            metric.pull_back(outputs)

    with pytest.warns(UserWarning, match="instead of its last state") as caught:
        pull_back(4, 5, 1, 4)
    assert len(caught) == 1


def test_the_last_of_padded_outputs_is_the_state_of_packed_ones() -> None:
    model, x = Packed(), torch.randn(4, STEPS, 4)
    lengths = torch.arange(4).remainder(2).add(2)
    last = model.core(x)[0][torch.arange(4), lengths - 1]
    torch.testing.assert_close(model.head(last), model(x))


class Padded(nn.Module):
    """A class at every position of packed sequences, which are padded again."""

    def __init__(self, *, total: bool) -> None:
        super().__init__()
        self.core = nn.LSTM(4, 3, batch_first=True)
        self.head = nn.Linear(3, 2)
        self.total = total

    def forward(self, x: Tensor) -> Tensor:
        lengths = x.any(2).sum(1)
        packed = pack_padded_sequence(x, lengths, True, enforce_sorted=False)
        length = x.shape[1] if self.total else None
        h, _ = pad_packed_sequence(self.core(packed)[0], True, total_length=length)
        return self.head(h)


def of_lengths(*lengths: int) -> Tensor:
    there = torch.arange(STEPS) < torch.tensor(lengths).unsqueeze(1)
    return torch.randn(len(lengths), STEPS, 4) * there.unsqueeze(2)


@pytest.mark.filterwarnings("ignore:.*packed sequences")
@pytest.mark.parametrize("lengths", [(3, 1, STEPS, 2), (3, 1, 3, 2), (2, 2)])
def test_packed_sequences_padded_again(lengths: tuple[int, ...]) -> None:
    assert_packed(Padded(total=True), of_lengths(*lengths))


def test_packed_sequences_padded_to_the_longest() -> None:
    words = r"'core\.weight_ih_l0'.*\(3, 2\) and \(1, 2\).*total_length=x\.shape\[1\]"
    with pytest.raises(LinearizationError, match=words):
        factors(Padded(total=False), of_lengths(3, 1, STEPS, 2))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", ["loop", "ends", "encoder"])
def test_a_hook_that_changes_the_output_is_explained_from_above(name: str) -> None:
    model, x = model_and_input(name)

    def doubled(module: nn.Module, args: Any, output: Any) -> Any:
        return tuple(None if each is None else 2.0 * each for each in output)

    getattr(model.core, "self_attn", model.core).register_forward_hook(doubled)
    assert_dense(model, x)


@pytest.mark.parametrize("name", ["loop", "ends", "encoder batch-first"])
def test_on_the_meta_device(name: str) -> None:
    model, x = model_and_input(name)
    found = factors(model.to("meta"), x.to("meta"))
    for each, parameter in model.named_parameters():
        assert found[each].shape == tuple(parameter.shape)
        assert found[each].row_sum().is_meta
