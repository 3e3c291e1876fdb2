"""The laws of the recursion: the factors of a model, and the gradient they explain."""

import pytest
import torch
import torch.nn.functional as F
from cases import BASES, MODELS, OUTPUTS, Tied, chain, inputs
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.testing import check_metric, check_module, raise_failures
from riemannian_modules.testing import strategies as rst

SEEDS = st.integers(0, 2**31 - 1)
PRECISIONS = [torch.float64, torch.float32]
BLOCKS = st.sampled_from(["tensor", "layer", "model"])
REDUCTIONS = st.sampled_from(["mean", "sum"])


def pulled_back(model: nn.Module, x: Tensor, output=None, **options):
    metric = rm.LayerwiseMetric(model, output or rm.output.Categorical(), **options)
    with metric.record():
        outputs = model(x)
    metric.pull_back(outputs)
    return metric


def rows(model: nn.Module, x: Tensor, output=None, **options) -> dict[str, Tensor]:
    metric = pulled_back(model, x, output, **options)
    parts = [part for block in metric.blocks.values() for part in block.parts]
    return {part.name: part.factor.to_dense() for part in parts}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, K in expected.items():
        torch.testing.assert_close(found[name], K, rtol=1e-12, atol=1e-13)


# ---- every law on every kind of model --------------------------------------------


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("base", BASES)
def test_every_law(base: str, output: str, dtype: torch.dtype) -> None:
    torch.set_default_dtype(dtype)
    case = OUTPUTS[output]
    model = chain(base, output)
    x = inputs(model, 3)
    reduction = ["mean", "sum"][len(base + output) % 2]
    loss = case.loss_for(model(x).detach(), reduction)
    raise_failures(check_module(model, x, case.metric(), loss, reduction=reduction))


@pytest.mark.parametrize("dtype", PRECISIONS, ids=str)
@given(data=st.data(), seed=SEEDS, blocks=BLOCKS, reduction=REDUCTIONS)
def test_every_law_on_random_chains(dtype, data, seed, blocks, reduction) -> None:
    model = data.draw(rst.modules(dtype=dtype))
    x = data.draw(rst.inputs_for(model, max_positions=2))
    case = OUTPUTS[data.draw(st.sampled_from(["categorical", "bernoulli", "gaussian"]))]
    loss = case.loss_for(model(x).detach(), reduction, seed)
    results = check_module(
        model,
        x,
        case.metric(),
        loss,
        blocks=blocks,
        reduction=reduction,
        generator=torch.Generator().manual_seed(seed),
    )
    raise_failures(results)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("positions", [(), (2,)], ids=str)
@pytest.mark.parametrize("model", MODELS)
def test_every_law_on_other_compositions(model: str, positions, reduction) -> None:
    net = MODELS[model]()
    x = inputs(net, 3, positions)
    loss = OUTPUTS["categorical"].loss_for(net(x).detach(), reduction)
    output = rm.output.Categorical()
    raise_failures(check_module(net, x, output, loss, reduction=reduction))


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("base", BASES)
def test_the_metrics_of_a_model_keep_the_laws_of_a_metric(base, blocks) -> None:
    model = chain(base)
    metric = pulled_back(model, inputs(model, 3), mass=0.1, blocks=blocks)
    for block in metric.blocks.values():
        raise_failures(check_metric(block))


# ---- composition -----------------------------------------------------------------


@given(data=st.data(), seed=SEEDS)
def test_grouping_of_modules_is_irrelevant(data, seed: int) -> None:
    torch.manual_seed(seed)
    layers = [
        nn.Linear(3, 4),
        nn.Tanh(),
        nn.Linear(4, 4),
        nn.Sigmoid(),
        nn.Linear(4, 3),
    ]
    x = torch.randn(2, 3)
    expected = rows(nn.Sequential(*layers), x)
    cut = data.draw(st.integers(1, 4))
    grouped = nn.Sequential(nn.Sequential(*layers[:cut]), nn.Sequential(*layers[cut:]))
    found = rows(grouped, x)
    for (_, one), (_, other) in zip(found.items(), expected.items(), strict=True):
        assert torch.equal(one, other)


@given(place=st.integers(0, 3), seed=SEEDS)
def test_the_identity_is_neutral_and_has_no_factor(place: int, seed: int) -> None:
    torch.manual_seed(seed)
    layers: list[nn.Module] = [nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)]
    x = torch.randn(2, 3)
    expected = list(rows(nn.Sequential(*layers), x).values())
    layers.insert(place, nn.Identity())
    found = rows(nn.Sequential(*layers), x)
    assert all(map(torch.equal, found.values(), expected))
    metric = pulled_back(nn.Sequential(*layers), x)
    assert str(place) not in metric.blocks


@pytest.mark.parametrize("kind", ["orthogonal", "diagonal"])
@given(seed=SEEDS)
def test_hidden_coordinates_do_not_matter(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    first, last = nn.Linear(3, 4), nn.Linear(4, 3)
    x = torch.randn(2, 3)
    expected = rows(nn.Sequential(first, nn.Tanh(), last), x)
    change = nn.Linear(4, 4, bias=False).requires_grad_(False)
    if kind == "orthogonal":
        change.weight.copy_(torch.linalg.qr(torch.randn(4, 4))[0])
    else:
        change.weight.copy_((1.0 + torch.rand(4)).diag())
    moved = nn.Linear(4, 3)
    with torch.no_grad():
        moved.weight.copy_(last.weight @ torch.linalg.inv(change.weight))
        moved.bias.copy_(last.bias)
    found = rows(nn.Sequential(first, nn.Tanh(), change, moved), x)
    for name in ("0.weight", "0.bias"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(found["3.bias"], expected["2.bias"])
    # A direction of the last weight and its image move the outputs alike.
    direction = torch.randn(3, 4)
    image = direction @ torch.linalg.inv(change.weight)
    torch.testing.assert_close(
        found["3.weight"] @ image.reshape(-1),
        expected["2.weight"] @ direction.reshape(-1),
        rtol=1e-11,
        atol=1e-13,
    )


class Untied(nn.Module):
    """The same function as ``Tied``, with a weight for each use."""

    def __init__(self, tied: Tied) -> None:
        super().__init__()
        self.first, self.second, self.outer = (
            nn.Linear(layer.in_features, layer.out_features)
            for layer in (tied.first, tied.second, tied.outer)
        )
        with torch.no_grad():
            for own, other in zip(self.children(), tied.children(), strict=True):
                own.weight.copy_(other.weight)
                own.bias.copy_(other.bias)

    forward = Tied.forward


@given(seed=SEEDS)
def test_a_shared_weight_has_the_sum_of_the_factors(seed: int) -> None:
    torch.manual_seed(seed)
    tied = Tied("euclidean", 3)
    x = torch.randn(2, 4)
    single = rows(Untied(tied), x)
    single["first.weight"] = single["first.weight"] + single.pop("second.weight")
    assert_same(rows(tied, x), single)


@given(seed=SEEDS)
def test_heads_stack(seed: int) -> None:
    torch.manual_seed(seed)
    model, x = (
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 6)),
        torch.randn(2, 3),
    )

    class Heads(rm.output.OutputMetric):
        def factor(self, outputs):
            one = rm.output.Categorical().factor(outputs[:, :3])
            other = rm.output.Euclidean().factor(outputs[:, 3:])
            return torch.cat([F.pad(one, (0, 3)), F.pad(other, (3, 0))], 1)

    class Head(rm.output.OutputMetric):
        def __init__(self, start, stop):
            self.part = slice(start, stop)

        def factor(self, outputs):
            return Heads().factor(outputs)[:, self.part]

    both = rows(model, x, Heads())
    parts = [rows(model, x, Head(0, 2)), rows(model, x, Head(2, 5))]
    for name, K in both.items():
        total = sum(part[name].mT @ part[name] for part in parts)
        torch.testing.assert_close(K.mT @ K, total, rtol=1e-12, atol=1e-14)


# ---- Gauss-Newton ----------------------------------------------------------------


def gauss_newton(model: nn.Module, x: Tensor) -> Tensor:
    """J^T H J / n with the Hessian of the cross-entropy, by autograd."""
    values = {n: p.detach() for n, p in model.named_parameters()}

    def forward(v):
        return torch.func.functional_call(model, v, (x,))

    jacobian = torch.func.jacrev(forward)(values)
    J = torch.cat([j.flatten(2) for j in jacobian.values()], -1)
    target = torch.zeros((), dtype=torch.long)
    H = torch.stack(
        [torch.func.hessian(lambda o: F.cross_entropy(o, target))(z) for z in model(x)]
    )
    return torch.einsum("noi,nop,npj->ij", J, H, J).detach() / len(x)


@given(seed=SEEDS, n=st.integers(1, 5), mass=st.floats(0.01, 1.0))
def test_blocks_are_those_of_the_gauss_newton_matrix(seed, n, mass) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3), nn.Tanh())
    x = torch.randn(n, 3)
    G = gauss_newton(model, x)
    for blocks, count in (("tensor", 4), ("layer", 2), ("model", 1)):
        metric = pulled_back(model, x, blocks=blocks, mass=mass)
        found = torch.block_diag(*[b.to_dense() for b in metric.blocks.values()])
        sizes = [b.dim for b in metric.blocks.values()]
        mask = torch.block_diag(*[torch.ones(s, s) for s in sizes])
        eye = torch.eye(len(G))
        torch.testing.assert_close(found, mask * G + mass * eye, rtol=1e-10, atol=1e-10)
        largest = torch.linalg.eigvals(torch.linalg.solve(found, G)).real.max()
        assert len(sizes) == count
        assert float(largest) <= count + 1e-10


@given(seed=SEEDS, n=st.integers(1, 5), mass=st.floats(0.01, 1.0))
def test_one_block_is_the_whole_gauss_newton_solve(seed, n, mass) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3))
    x, target = torch.randn(n, 3), torch.arange(n) % 3
    metric = rm.LayerwiseMetric(
        model, rm.output.Categorical(), mass=mass, blocks="model"
    )
    with metric.record():
        outputs = model(x)
    metric.backward(F.cross_entropy(outputs, target), outputs)
    g = torch.cat([p.grad.reshape(-1) for p in model.parameters()])
    expected = torch.linalg.solve(gauss_newton(model, x) + mass * torch.eye(len(g)), g)
    found = metric.natural_gradient()
    flat = torch.cat([found[n].reshape(-1) for n, _ in model.named_parameters()])
    torch.testing.assert_close(flat, expected, rtol=1e-9, atol=1e-10)


def test_one_layer_is_the_same_layerwise_and_jointly() -> None:
    layer, x = nn.Linear(3, 3), torch.randn(4, 3)
    found = []
    for blocks in ("layer", "model"):
        metric = pulled_back(layer, x, blocks=blocks)
        (block,) = metric.blocks.values()
        found.append(block.to_dense())
    assert torch.equal(*found)
