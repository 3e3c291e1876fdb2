"""Rules of torch's own layers: their factors are the rows of the dense Jacobian."""

import copy
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from mutants.rules import RULES
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import factors as fs
from riemannian_modules.testing import check_rule, failures, raise_failures
from riemannian_modules.testing.reference import dense_natural_gradient

CONVOLUTIONS = {
    (1, False): nn.Conv1d,
    (2, False): nn.Conv2d,
    (3, False): nn.Conv3d,
    (1, True): nn.ConvTranspose1d,
    (2, True): nn.ConvTranspose2d,
    (3, True): nn.ConvTranspose3d,
}


def seeded(seed: int = 3) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(layer: nn.Module, *inputs: Tensor, **options: Any) -> None:
    raise_failures(check_rule(layer, *inputs, generator=seeded(), **options))


def factor_of(metric: rm.LayerwiseMetric, name: str) -> fs.MetricFactor:
    parts = [part for block in metric.blocks.values() for part in block.parts]
    factor = next(part.factor for part in parts if part.name == name)
    assert factor is not None
    return factor


def pulled_back(
    model: nn.Module, *inputs: Tensor, loss: bool = True
) -> rm.LayerwiseMetric:
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    with metric.record():
        outputs = model(*inputs)
    if loss:
        metric.backward(outputs.square().mean(), outputs)
    else:
        metric.pull_back(outputs)
    return metric


def assert_rows(model: nn.Module, *inputs: Tensor) -> rm.LayerwiseMetric:
    """Compare every factor of a model with outputs ``(n, d)`` with the Jacobian."""
    metric = pulled_back(model, *inputs)
    z = model(*inputs)
    scale = len(z) ** -0.5
    for name, parameter in model.named_parameters():
        rows = [
            torch.autograd.grad(e, parameter, retain_graph=True, allow_unused=True)[0]
            for e in z.mT.reshape(-1)
        ]
        zero = torch.zeros_like(parameter)
        K = torch.stack([(zero if r is None else r).reshape(-1) for r in rows]) * scale
        torch.testing.assert_close(
            factor_of(metric, name).to_dense(), K, rtol=1e-10, atol=1e-12
        )
    return metric


class Head(nn.Module):
    """Two outputs of everything that is left of an example."""

    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.body(x)).flatten(1)
        head = torch.arange(1.0, 1.0 + 2 * y.shape[1]).sin().view(-1, 2)
        return y @ head.to(y)


# ---- nothing to see --------------------------------------------------------------


class Context(nn.Module):
    """What an example says by itself, and by a context of any number of vectors."""

    def __init__(self, inner: nn.Module, own: Tensor) -> None:
        super().__init__()
        self.inner, self.own, self.head = inner, own, nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(x).sum(1) + self.own)


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("n", [1, 4, 5])
def context_steps(model: nn.Module, x: Tensor, blocks: Any) -> dict[str, Tensor]:
    output = rm.output.Categorical()
    metric = rm.LayerwiseMetric(model, output, mass=0.1, blocks=blocks)
    for _ in range(3):
        with metric.record():
            z = model(x)
        metric.backward(z.square().mean(), z)
        found = metric.natural_gradient()
    return found


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("n", [1, 4, 5])
@pytest.mark.parametrize("kind", ["linear", "embedding", "norm"])
def test_an_empty_context(kind: str, n: int, blocks: Any) -> None:
    makers: dict[str, tuple[nn.Module, Tensor]] = {
        "linear": (nn.Linear(4, 4), torch.randn(n, 0, 4)),
        "embedding": (nn.Embedding(5, 4), torch.zeros(n, 0, dtype=torch.long)),
        "norm": (nn.LayerNorm(4), torch.randn(n, 0, 4)),
    }
    inner, x = makers[kind]
    model, output = Context(inner, torch.randn(n, 4)), rm.output.Categorical()
    found = context_steps(model, x, blocks)
    expected = dense_natural_gradient(
        model, output, x, lambda z: z.square().mean(), mass=0.1, blocks=blocks
    )
    for name, vector in expected.items():
        torch.testing.assert_close(found[name], vector, rtol=1e-8, atol=1e-9)


class Shift(nn.Module):
    def __init__(self, bias: Tensor) -> None:
        super().__init__()
        self.bias = nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.bias.expand(*x.shape[:2], -1)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("n", [1, 4])
def test_a_weight_without_entries(n: int, blocks: Any) -> None:
    model, x = Context(nn.Linear(0, 4), torch.randn(n, 4)), torch.randn(n, 2, 0)
    plain = copy.deepcopy(model)
    plain.inner = Shift(model.inner.bias)
    found, wanted = (context_steps(each, x, blocks) for each in (model, plain))
    assert found.pop("inner.weight").shape == (4, 0)
    for name, vector in wanted.items():
        torch.testing.assert_close(found[name], vector, rtol=1e-8, atol=1e-9)


# ---- convolutions ----------------------------------------------------------------


@st.composite
def convolutions(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    dims = draw(st.sampled_from([1, 2, 2, 3]))
    transposed = draw(st.booleans())
    groups = draw(st.sampled_from([1, 1, 2]))
    channels = groups * draw(st.integers(1, 2))
    out = groups * draw(st.integers(1, 3 if dims < 3 else 1))

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    kernel, stride, dilation = each(1, 3 if dims < 3 else 2), each(1, 2), each(1, 2)
    size = each(1, 4) if transposed else each(3, 5)
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    if transposed:
        options["padding"] = each(0, 1)
        room = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, r)) for r in room)
    else:
        modes = ["zeros", "zeros", "circular", "reflect", "replicate"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        same = draw(st.booleans())
        options["padding"] = "same" if same else draw(st.just("valid") | st.just(1))
        stride = (1,) * dims if same else stride
        reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        assume(all(r < s for r, s in zip(reach, size, strict=True)))
    kind = CONVOLUTIONS[dims, transposed]
    layer = kind(channels, out, kernel, stride, dilation=dilation, **options)
    x = torch.randn(draw(st.sampled_from([2, 4])), channels, *size)
    try:
        empty = layer(x).numel() == 0
    except RuntimeError:
        empty = True
    assume(not empty)
    return layer, x


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@settings(max_examples=25)
@given(convolutions())
def test_convolutions(case: tuple[nn.Module, Tensor]) -> None:
    check(*case)


@pytest.mark.parametrize("transposed", [False, True])
def test_convolutions_in_float32(transposed: bool) -> None:
    layer = CONVOLUTIONS[2, transposed](4, 6, 3, stride=2, padding=1, groups=2).float()
    check(layer, torch.randn(4, 4, 5, 4, dtype=torch.float32))


def test_an_output_size_in_the_call() -> None:
    layer = nn.ConvTranspose1d(2, 3, 3, stride=2)
    for size in (7, 8):
        check(layer, torch.randn(4, 2, 3), options={"output_size": [size]})


@pytest.mark.parametrize("order", [["output_size", "input"], ["input", "output_size"]])
def test_keywords_in_any_order(order: list[str]) -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.ConvTranspose1d(2, 3, 3, stride=2)

        def forward(self, x: Tensor) -> Tensor:
            given = {"input": x, "output_size": [8]}
            return self.conv(**{name: given[name] for name in order}).sum(2)

    metric = assert_rows(ByName(), torch.randn(4, 2, 3))
    assert isinstance(factor_of(metric, "conv.weight"), fs.ConvolutionFactor)


def test_a_layer_that_names_its_input_otherwise() -> None:
    class ByName(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.RMSNorm(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x=x)

    assert_rows(ByName(), torch.randn(4, 3))


@pytest.mark.parametrize("channels", [1, 3])
def test_an_unbatched_convolution(channels: int) -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, channels, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x[0]).square().flatten().unsqueeze(0)

    metric = assert_rows(Single(), torch.randn(1, 2, 4))
    assert isinstance(factor_of(metric, "conv.weight"), fs.ConvolutionFactor)


def test_channels_last_and_strided_inputs() -> None:
    x = torch.randn(3, 5, 4, 2).permute(0, 3, 1, 2)
    assert not x.is_contiguous()
    assert_rows(Head(nn.Conv2d(2, 3, 2)), x)
    assert_rows(Head(nn.ConvTranspose2d(2, 3, 2)), x[:, :, ::2])


def test_a_convolution_at_two_sizes() -> None:
    class Pyramid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 2, 2)
            self.last = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            for _ in range(2):
                x = torch.tanh(self.conv(x))
            return self.last(x.sum(-1) + self.conv(x[..., :2]).sum(-1))

    metric = assert_rows(Pyramid(), torch.randn(4, 2, 5))
    factor = factor_of(metric, "conv.weight")
    assert isinstance(factor, fs.SumFactor)
    assert len(factor.parts) == 3
    assert factor.narrow(0, 4).rank == 4


def test_a_subclass_that_computes_otherwise_is_replayed() -> None:
    class Standardised(nn.Conv2d):
        def _conv_forward(self, x, weight, bias):  # type: ignore[no-untyped-def]
            return super()._conv_forward(x, weight / weight.norm(), bias)

    metric = pulled_back(
        Head(Standardised(2, 3, 2)), torch.randn(4, 2, 3, 3), loss=False
    )
    assert isinstance(factor_of(metric, "body.0.weight"), fs.DenseFactor)
    assert_rows(Head(Standardised(2, 3, 2)), torch.randn(4, 2, 3, 3))


def test_a_reparametrised_layer_is_replayed() -> None:
    layer = nn.utils.parametrizations.weight_norm(nn.Conv1d(2, 3, 2))
    assert_rows(Head(layer), torch.randn(4, 2, 4))


# ---- normalisations and PReLU ----------------------------------------------------


def settled(layer: nn.Module, *size: int) -> nn.Module:
    """Return the layer in eval mode with statistics and weights of some data."""
    layer(torch.randn(9, *size) * 2.0 + 1.0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn_like(parameter))
    return layer.eval()


NORMS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(3), (3,)),
    "layer-positions": (lambda: nn.LayerNorm(3), (2, 3)),
    "layer-two-dims": (lambda: nn.LayerNorm((2, 3)), (2, 2, 3)),
    "layer-without-bias": (lambda: nn.LayerNorm(3, bias=False), (2, 3)),
    "rms": (lambda: nn.RMSNorm(3), (2, 3)),
    "rms-eps": (lambda: nn.RMSNorm((2, 3), eps=0.1), (2, 3)),
    "group": (lambda: nn.GroupNorm(2, 4), (4, 3)),
    "group-flat": (lambda: nn.GroupNorm(2, 4), (4,)),
    "instance": (lambda: nn.InstanceNorm2d(2, affine=True), (2, 3, 2)),
    "instance-running": (
        lambda: nn.InstanceNorm1d(2, affine=True, track_running_stats=True),
        (2, 4),
    ),
    "batch-1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "batch-1d-positions": (lambda: nn.BatchNorm1d(3), (3, 2)),
    "batch-2d": (lambda: nn.BatchNorm2d(3), (3, 2, 2)),
    "batch-3d": (lambda: nn.BatchNorm3d(2, momentum=None), (2, 2, 1, 2)),
    "prelu": (nn.PReLU, (3,)),
    "prelu-channels": (lambda: nn.PReLU(3), (3, 2)),
    "prelu-features": (lambda: nn.PReLU(3), (3,)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("name", NORMS)
def test_normalisations(name: str, dtype: torch.dtype) -> None:
    make, size = NORMS[name]
    layer = settled(make(), *size).to(dtype)
    check(layer, torch.randn(4, *size, dtype=dtype))


def test_instance_norm_in_training_mode_keeps_its_statistics() -> None:
    layer = nn.InstanceNorm1d(2, affine=True, track_running_stats=True)
    model = Head(layer)
    model(torch.randn(4, 2, 5))
    twin = copy.deepcopy(layer)
    x = torch.randn(4, 2, 5)
    pulled_back(model, x)
    twin(x)
    assert torch.equal(layer.running_mean, twin.running_mean)


def test_an_unbatched_instance_norm() -> None:
    class Single(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.InstanceNorm1d(2, affine=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x[0]).square().flatten().unsqueeze(0)

    assert_rows(Single(), torch.randn(1, 2, 4))


def test_only_what_is_trainable_is_made() -> None:
    for layer in (nn.LayerNorm(3), nn.Conv1d(3, 3, 1), nn.GroupNorm(3, 3)):
        for frozen in ("weight", "bias"):
            model = Head(layer.requires_grad_(True))
            layer.get_parameter(frozen).requires_grad_(False)
            metric = pulled_back(model, torch.randn(4, 3, 3))
            names = {p.name for block in metric.blocks.values() for p in block.parts}
            assert names == {"body.0.weight", "body.0.bias"} - {f"body.0.{frozen}"}


def test_batch_norm_of_the_batch_is_refused() -> None:
    for layer in (nn.BatchNorm1d(3), nn.BatchNorm1d(3, track_running_stats=False)):
        model = Head(layer)
        model(torch.randn(4, 3))
        if layer.running_mean is None:
            model.eval()
        with pytest.raises(rm.errors.LinearizationError, match="batch"):
            pulled_back(model, torch.randn(4, 3))


# ---- embeddings ------------------------------------------------------------------


@st.composite
def embeddings(draw: st.DrawFn) -> tuple[nn.Module, Tensor]:
    vocabulary, width = draw(st.integers(1, 9)), draw(st.integers(1, 3))
    padding = draw(st.none() | st.integers(0, vocabulary - 1))
    n, places = draw(st.sampled_from([2, 4])), draw(st.integers(1, 5))
    tokens = torch.randint(vocabulary, (n, places))
    if draw(st.booleans()):
        return nn.Embedding(vocabulary, width, padding_idx=padding), tokens
    mode = draw(st.sampled_from(["sum", "mean"]))
    layer = nn.EmbeddingBag(vocabulary, width, mode=mode, padding_idx=padding)
    return layer, tokens


@pytest.mark.slow
@settings(max_examples=25)
@given(embeddings())
def test_embeddings(case: tuple[nn.Module, Tensor]) -> None:
    check(*case)


def test_embeddings_of_single_tokens_and_in_float32() -> None:
    check(nn.Embedding(5, 3), torch.randint(5, (4,)))
    check(nn.Embedding(5, 3).float(), torch.randint(5, (4, 2, 2)))


def test_weighted_bags() -> None:
    layer = nn.EmbeddingBag(5, 2, mode="sum", padding_idx=2)
    options = {"per_sample_weights": torch.randn(4, 3)}
    check(layer, torch.randint(5, (4, 3)), options=options)


class Bags(nn.Module):
    def __init__(self, folded: bool = False, **options: Any) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(6, 3, **options)
        self.folded = folded

    def forward(self, offsets: Tensor, tokens: Tensor) -> Tensor:
        weights = torch.arange(1.0, 1.0 + len(tokens))
        own = weights if self.bag.mode == "sum" else None
        y = torch.tanh(self.bag(tokens, offsets, per_sample_weights=own))
        if self.folded:
            y = y.unflatten(0, (-1, 2)).flatten(1)
        return y * torch.arange(1.0, 1.0 + y.numel()).view_as(y)


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize("mode", ["sum", "mean"])
@pytest.mark.parametrize("last", [False, True])
def test_bags_given_by_offsets(mode: str, folded: bool, last: bool) -> None:
    model = Bags(folded, mode=mode, include_last_offset=last, padding_idx=1)
    offsets = torch.tensor([0, 3, 3, 7, 11][: 5 if last else 4])
    metric = assert_rows(model, offsets, torch.randint(6, (11,)))
    assert isinstance(factor_of(metric, "bag.weight"), fs.EmbeddingFactor)


def test_bags_of_the_largest_are_replayed() -> None:
    class Largest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bag = nn.EmbeddingBag(6, 3, mode="max")

        def forward(self, tokens: Tensor) -> Tensor:
            return self.bag(tokens).square()

    metric = assert_rows(Largest(), torch.randint(6, (4, 3)))
    assert isinstance(factor_of(metric, "bag.weight"), fs.DenseFactor)


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_change_nothing(kind: Any) -> None:
    tokens = torch.randint(6, (4, 3))
    found = []
    for sparse in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(kind(6, 4, sparse=sparse), nn.Flatten(), nn.LazyLinear(2))
        model(tokens)
        metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
        with metric.record():
            z = model(tokens)
        metric.backward(z.square().mean(), z)
        found.append(metric.natural_gradient()["0.weight"])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"max_norm": 1.0}, "PoincareBall"),
        ({"scale_grad_by_freq": True}, "set it to False"),
    ],
)
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_options_that_change_the_gradient_are_refused(
    kind: Any, options: dict[str, Any], remedy: str
) -> None:
    layer = kind(5, 2, **options)
    call = rm.rules.Call(
        layer, (torch.zeros(2, 1).long(),), {}, (0,), (None,), (), 2, ("weight",), "it"
    )
    entry = rm.rules.entry_of(layer)
    assert entry is not None
    with pytest.raises(rm.errors.LinearizationError, match=remedy):
        entry.rule(call)


# ---- where the examples are, and shared layers -----------------------------------


def test_examples_in_the_second_dimension() -> None:
    check(nn.Embedding(5, 3, padding_idx=0), torch.randint(5, (3, 4)), dim=1)
    check(nn.LayerNorm(3), torch.randn(2, 4, 3), dim=1)
    check(nn.RMSNorm(3), torch.randn(2, 4, 3), dim=1)


def test_examples_where_a_layer_mixes_are_replayed() -> None:
    class Sideways(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv1d(2, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x.mT.unsqueeze(0))[0].mT.square()

    metric = assert_rows(Sideways(), torch.randn(5, 2))
    assert isinstance(factor_of(metric, "conv.weight"), fs.DenseFactor)


def test_a_single_example() -> None:
    assert_rows(Head(nn.Conv2d(2, 1, 2), nn.GroupNorm(1, 1)), torch.randn(1, 2, 3, 3))
    assert_rows(Head(nn.Embedding(5, 1)), torch.randint(5, (1, 1)))
    assert_rows(Head(nn.Embedding(5, 1), nn.LayerNorm(1)), torch.randint(5, (1, 3)))


class Language(nn.Module):
    """An embedding that is also the weight of the last layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 3)
        self.norm = nn.LayerNorm(3)
        self.last = nn.Linear(3, 7, bias=False)
        self.last.weight = self.embedding.weight

    def forward(self, tokens: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.embedding(tokens)))
        return self.last(y).sum(1)


def test_a_tied_embedding_keeps_its_structure() -> None:
    metric = assert_rows(Language(), torch.randint(7, (4, 3)))
    factor = factor_of(metric, "embedding.weight")
    assert isinstance(factor, fs.SumFactor)
    kinds = {type(part) for part in factor.parts}
    assert kinds == {fs.EmbeddingFactor, fs.LinearFactor}


def small_network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 3, 3, padding="same"),
        nn.BatchNorm2d(3),
        nn.PReLU(3),
        nn.Conv2d(3, 4, 2, stride=2, bias=False),
        nn.GroupNorm(2, 4),
        nn.Flatten(),
        nn.Linear(16, 3),
    )


@pytest.mark.slow
@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_the_laws_of_a_convolutional_network(blocks: Any) -> None:
    model = settled(small_network(), 1, 4, 4)
    x = torch.randn(4, 1, 4, 4)
    target = torch.arange(4) % 3
    raise_failures(
        rm.testing.check_module(
            model,
            x,
            rm.output.Categorical(),
            lambda z: F.cross_entropy(z, target[: len(z)]),
            blocks=blocks,
            generator=seeded(),
        )
    )


@pytest.mark.parametrize("kind", ["images", "tokens", "bags"])
def test_layers_run_on_meta(kind: str) -> None:
    with torch.device("meta"):
        if kind == "images":
            body = [nn.Conv2d(2, 4, 3, groups=2, padding="same"), nn.GroupNorm(2, 4)]
            body += [nn.ConvTranspose2d(4, 2, 2, stride=2), nn.PReLU(2)]
            x, width = torch.empty(5, 2, 4, 4), 128
        elif kind == "tokens":
            body = [nn.Embedding(50, 4, padding_idx=3), nn.LayerNorm(4)]
            x, width = torch.empty(5, 3, dtype=torch.long), 12
        else:
            body = [nn.EmbeddingBag(4, 3, mode="mean"), nn.RMSNorm(3)]
            x, width = torch.empty(5, 3, dtype=torch.long), 3
        model = nn.Sequential(*body, nn.Flatten(), nn.Linear(width, 2))
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    for _ in range(2):
        with metric.record():
            z = model(x)
        metric.backward(z.square().mean(), z)
        optimizer.step()
    assert all(p.grad is not None and p.grad.is_meta for p in model.parameters())


# ---- the check itself ------------------------------------------------------------


@pytest.mark.parametrize(
    ("law", "make"),
    [(law, make) for law, makes in RULES.items() for make in makes],
    ids=[f"{law}-{i}" for law, makes in RULES.items() for i, _ in enumerate(makes)],
)
def test_a_wrong_rule_breaks_the_law(law: str, make: Any) -> None:
    layer, inputs = make()
    results = check_rule(layer, *inputs, generator=seeded(2))
    assert law in {result.name for result in failures(results)}


def test_the_right_rule_keeps_every_law() -> None:
    results = check_rule(nn.Linear(8, 3), torch.randn(4, 8), generator=seeded(2))
    raise_failures(results)
    refused_before = {"gradient", "narrow"}
    assert {result.name for result in results} == set(RULES) | refused_before
    assert all(math.isfinite(result.value) for result in results)
