"""Certificates of the compositions of nn, against the systems that they speak about."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from riemannian_modules import nn as rnn
from riemannian_modules.contraction import (
    Rate,
    Side,
    Verdict,
    product,
    register_lipschitz,
)
from riemannian_modules.contraction.gains import known
from riemannian_modules.errors import ContractionError

SEEDS = st.integers(0, 2**31 - 1)


def scaled(module: nn.Module, factor: float) -> nn.Module:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(factor)
    return module


def linear(matrix: list[list[float]]) -> nn.Linear:
    layer = nn.Linear(len(matrix[0]), len(matrix), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(matrix))
    return layer


def cell(size: int = 3, factor: float = 0.5) -> nn.Module:
    both = rnn.Join(nn.Linear(2, size), scaled(nn.Linear(size, size), factor))
    return rnn.Sequential(both, nn.Tanh())


# ---- maps: two states under the same input ----


@given(SEEDS, st.floats(0.1, 1.5))
def test_fixed_points_attract_as_certified(seed: int, factor: float) -> None:
    torch.manual_seed(seed)
    layer = rnn.FixedPoint(cell(factor=factor), 3)
    found = layer.certificate()
    x, z, other = torch.randn(4, 2), torch.randn(4, 3), torch.randn(4, 3)
    before, after = (z - other), layer.step(x, z) - layer.step(x, other)
    assert bool((after.norm(dim=1) <= found.value * before.norm(dim=1) + 1e-12).all())
    assert found.contracts == (found.value < 1)
    if found.contracts:
        seen = layer.certificate(bounds="measured", at=x)
        assert seen.verdict is Verdict.EVIDENCE
        assert seen.value <= found.value


def test_a_linear_map_attains_its_factor() -> None:
    layer = rnn.FixedPoint(rnn.Join(nn.Linear(2, 2), linear([[0.0, 0.8], [0.1, 0.0]])))
    found = layer.certificate()
    assert found.value == pytest.approx(0.8, abs=1e-12)
    assert found.contracts
    with pytest.raises(ContractionError, match="no place"):
        layer.certificate([1.0])


@given(SEEDS)
def test_recurrences_forget_their_state_as_certified(seed: int) -> None:
    torch.manual_seed(seed)
    layer = rnn.Recurrent(cell(), 3)
    found = layer.certificate()
    x = torch.randn(2, 5, 2)
    states = [layer(x, torch.randn(2, 3)) for _ in range(2)]
    distance = (states[0] - states[1]).norm(dim=-1)
    assert found.contracts
    ahead = distance[:, 1:] <= found.value * distance[:, :-1] + 1e-12
    assert bool(ahead.all())
    seen = layer.certificate(bounds="measured", at=x)
    assert seen.value <= found.value
    unknown = rnn.Recurrent(nn.GRUCell(2, 3), 3)
    assert unknown.certificate().verdict is Verdict.NOT_CERTIFIED
    measured = unknown.certificate(bounds="measured", at=x)
    assert measured.verdict in {Verdict.EVIDENCE, Verdict.NOT_CERTIFIED}


@given(SEEDS, st.floats(0.2, 2.0))
def test_feedback_loops(seed: int, factor: float) -> None:
    torch.manual_seed(seed)
    loop = rnn.Feedback(
        nn.Sequential(nn.Linear(2, 3), nn.Tanh()), scaled(nn.Linear(3, 2), factor)
    )
    found = loop.certificate()
    gain = found.limits["loop gain"]
    assert found.value == pytest.approx(math.sqrt(gain))
    assert found.contracts == (gain < 1)
    x, y, other = torch.randn(4, 2), torch.randn(4, 3), torch.randn(4, 3)
    after = (loop.step(x, y) - loop.step(x, other)).norm(dim=1)
    assert bool((after <= gain * (y - other).norm(dim=1) + 1e-12).all())
    # Both at once, in the metric of the certificate.
    w = found.weights
    b, c = torch.randn(4, 2), torch.randn(4, 2)

    def distance(y: Tensor, b: Tensor) -> Tensor:
        terms = w["ahead"] * y.square().sum(1) + w["back"] * b.square().sum(1)
        return terms.sqrt()

    before = distance(y - other, b - c)
    after = distance(
        loop.ahead(x + b) - loop.ahead(x + c), loop.back(y) - loop.back(other)
    )
    assert bool((after <= found.value * before + 1e-12).all())
    if found.contracts:
        assert loop.certificate(bounds="measured", at=x).value <= found.value + 1e-9


@given(SEEDS, st.floats(0.05, 0.5))
def test_residual_iterations(seed: int, scale: float) -> None:
    torch.manual_seed(seed)
    A = torch.randn(3, 3)
    A = A - A.mT - 0.5 * A @ A.mT - 0.2 * torch.eye(3)
    block = rnn.Residual(linear(A.tolist()), scale=scale)
    found = block.certificate()
    true = float(torch.linalg.matrix_norm(torch.eye(3) + scale * A, 2))
    assert true <= found.value + 1e-12
    rate = -float(torch.linalg.eigvalsh((A + A.mT) / 2)[-1])
    norm = float(torch.linalg.matrix_norm(A, 2))
    formula = math.sqrt(1 - 2 * scale * rate + scale**2 * norm**2)
    assert found.value == pytest.approx(min(formula, 1 + scale * norm), abs=1e-9)
    given_rate = block.certificate({"module": rate * 0.999})
    assert found.value <= given_rate.value + 1e-12


def test_a_residual_that_attains_its_factor() -> None:
    """A rotation and a decay: ``A`` is normal, all directions are alike."""
    block = rnn.Residual(linear([[-1.0, 2.0], [-2.0, -1.0]]), scale=0.2)
    found = block.certificate()
    true = float(torch.linalg.matrix_norm(torch.tensor([[0.8, 0.4], [-0.4, 0.8]]), 2))
    assert found.value == pytest.approx(true, abs=1e-12)
    assert found.contracts


def test_a_measured_residual_is_measured_throughout() -> None:
    """No rule is needed for the branch: norms of operators have no part in it."""

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * x

    block, x = rnn.Residual(Product(), scale=-0.25), torch.tensor([[0.5, 1.0]])
    assert math.isinf(block.certificate().value)
    seen = block.certificate(bounds="measured", at=x)
    assert seen.value == pytest.approx(0.75)
    assert seen.verdict is Verdict.EVIDENCE


def test_a_subclass_with_a_forward_of_its_own_does_not_grow_like_its_weight() -> None:
    class Negative(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    @register_lipschitz(Negative)
    def norm(module: Negative, argument: int):
        return known(2.0, "norm of its weight")

    branch = Negative(2, 2, bias=False)
    with torch.no_grad():
        branch.weight.copy_(-2.0 * torch.eye(2))
    block = rnn.Residual(branch, scale=0.25)
    x = torch.eye(2)
    assert torch.equal(block(x), 1.5 * x)
    assert block.certificate().value >= 1.5


def test_residuals_with_shortcuts_and_signs() -> None:
    half = linear([[0.5, 0.0], [0.0, 0.5]])
    block = rnn.Residual(linear([[0.3, 0.0], [0.0, 0.3]]), shortcut=half)
    assert block.certificate().value == pytest.approx(0.8)
    with pytest.raises(ContractionError, match="only sizes"):
        block.certificate([1.0])
    seen = block.certificate(bounds="measured", at=torch.zeros(1, 2))
    assert seen.verdict is Verdict.EVIDENCE
    backwards = rnn.Residual(nn.Tanh(), scale=-0.5)
    assert backwards.certificate().value == pytest.approx(1.5)
    with pytest.raises(ContractionError, match="sign"):
        backwards.certificate([1.0])
    other = Rate(1.0, metric="P")
    with pytest.raises(ContractionError, match="P metric"):
        rnn.Residual(nn.Tanh()).certificate([other])
    evidence = Rate(1.0, side=Side.ESTIMATE, verdict=Verdict.EVIDENCE)
    tanh = rnn.Residual(nn.Tanh(), scale=0.5).certificate([evidence])
    assert tanh.verdict is Verdict.EVIDENCE


# ---- driven states: x_i' = h_i(x_i) + f_i(x_(i-1)) ----


def slope_of(chain: rnn.Sequential, rates: list[float]) -> Tensor:
    """The Jacobian of a chain of linear children whose h_i are decays."""
    layers = list(chain)
    sizes = [layer.out_features for layer in layers]
    blocks = []
    for i, size in enumerate(sizes):
        row = [torch.zeros(size, other) for other in sizes]
        row[i] = -rates[i] * torch.eye(size)
        if i:
            row[i - 1] = layers[i].weight.detach()
        blocks.append(torch.cat(row, 1))
    return torch.cat(blocks)


@settings(max_examples=10)
@given(SEEDS, st.booleans())
def test_chains_of_driven_states(seed: int, designed: bool) -> None:
    torch.manual_seed(seed)
    chain = rnn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2), nn.Linear(2, 4))
    rates = (0.5 + torch.rand(3)).tolist()
    target = 0.8 * min(rates) if designed else None
    found = chain.certificate(rates, target=target)
    assert found.contracts
    if designed:
        assert found.value == pytest.approx(target, abs=1e-9)
    J = slope_of(chain, rates)
    sizes = torch.tensor([layer.out_features for layer in chain])
    d = torch.tensor(list(found.weights.values())).repeat_interleave(sizes)
    S = J * d.sqrt()[:, None] / d.sqrt()[None, :]
    true = -float(torch.linalg.eigvalsh((S + S.mT) / 2)[-1])
    assert found.value <= true + 1e-9
    seen = chain.certificate(rates, bounds="measured", at=torch.randn(2, 2))
    assert seen.verdict is Verdict.EVIDENCE


def test_branches_and_heads() -> None:
    branches = rnn.Parallel(nn.Linear(2, 3), nn.Linear(2, 3))
    assert branches.certificate([1.0, 2.0]).value == 1.0
    assert rnn.Join(nn.Tanh(), nn.Tanh()).certificate([2.0, 3.0]).value == 2.0
    gate = rnn.Gate(nn.Linear(2, 1), nn.Linear(2, 3))
    assert gate.certificate({"gate": 1.0, "value": 2.0}).value == 1.0
    heads = rnn.Heads({"a": nn.Linear(3, 1), "b": nn.Linear(3, 2)}, trunk=nn.Tanh())
    found = heads.certificate({"trunk": 2.0, "a": 1.0, "b": 1.0})
    assert found.contracts
    assert 0.98 < found.value < 1.0
    x = torch.randn(2, 3)
    seen = heads.certificate([2.0, 1.0, 1.0], bounds="measured", at=x)
    assert seen.verdict is Verdict.EVIDENCE
    bare = rnn.Heads(nn.Linear(3, 1), nn.Linear(3, 2))
    assert bare.certificate([1.0, 3.0]).value == 1.0
    with pytest.raises(ContractionError, match="rename"):
        rnn.Heads({"trunk": nn.Tanh()}, trunk=nn.Tanh()).certificate([1.0, 1.0])


def test_a_child_that_is_there_twice_counts_twice() -> None:
    one = linear([[0.3, 0.0], [0.0, 0.3]])
    chain = rnn.Sequential(one, nn.Tanh(), one)
    with pytest.raises(ContractionError, match="3 children"):
        chain.certificate([1.0, 1.0])
    found = chain.certificate([1.0, 1.0, 1.0])
    other = rnn.Sequential(one, nn.Tanh(), linear([[0.3, 0.0], [0.0, 0.3]]))
    assert found.value == other.certificate([1.0, 1.0, 1.0]).value
    assert list(found.weights) == ["0", "1", "2"]


def test_compositions_that_do_more_are_refused() -> None:
    class Strong(rnn.Residual):
        def forward(self, x: Tensor) -> Tensor:
            return 5.0 * super().forward(x)

    class Shifted(rnn.FixedPoint):
        def step(self, x: Tensor, z: Tensor) -> Tensor:
            return 3.0 * super().step(x, z)

    small = linear([[-0.5, 0.0], [0.0, -0.5]])
    hooked = rnn.Residual(small)
    assert hooked.certificate().contracts
    hooked.register_forward_hook(lambda module, args, out: 5.0 * out)
    replaced = rnn.Residual(small)
    replaced.forward = lambda x: 5.0 * x  # type: ignore[method-assign]
    for module in (Strong(small), Shifted(cell(), 3), hooked, replaced):
        with pytest.raises(ContractionError, match="another system"):
            module.certificate()

    class Same(rnn.Residual):
        pass

    assert Same(small).certificate().contracts


def test_iterations_of_what_works_in_place_are_not_certified() -> None:
    steep = nn.LeakyReLU(0.1, inplace=True)
    chain = rnn.Sequential(steep, linear([[0.5]]))
    for module in (
        rnn.Residual(chain),
        rnn.Residual(nn.Tanh(), shortcut=chain),
        rnn.FixedPoint(rnn.Join(chain, linear([[0.1]]))),
        rnn.Feedback(chain, linear([[0.1]])),
        rnn.Recurrent(rnn.Join(chain, linear([[0.1]])), 1),
    ):
        assert module.certificate().verdict is Verdict.NOT_CERTIFIED


def test_unknown_below_is_unknown_above() -> None:
    chain = rnn.Sequential(nn.Tanh(), nn.GELU(approximate="tanh"))
    assert chain.certificate([1.0, 1.0]).verdict is Verdict.NOT_CERTIFIED
    # What acts on the first child is input, not coupling.
    other = rnn.Sequential(nn.GELU(approximate="tanh"), nn.Tanh())
    assert other.certificate([1.0, 1.0]).contracts
    inner = product([0.0])
    nested = rnn.Parallel(nn.Tanh(), nn.Tanh()).certificate([inner, 1.0])
    assert nested.verdict is Verdict.NOT_CERTIFIED


def test_learning() -> None:
    chain = rnn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2))
    rates, couplings = {"0": 2.0, "2": 2.0}, [[0.0, 0.5], [0.5, 0.0]]
    found = chain.certificate(rates, couplings=couplings)
    assert found.value == pytest.approx(1.5)
    assert found.assumptions[0].startswith("the system is the flow of the parameters")
    for wrong in ({"0": 2.0, "5": 2.0}, [2.0, 2.0]):
        with pytest.raises(ContractionError, match="blocks of parameters"):
            chain.certificate(wrong, couplings=couplings)


def test_each_certificate_says_which_system_it_speaks_about() -> None:
    for module, rates in (
        (rnn.FixedPoint(cell(), 3), None),
        (rnn.Recurrent(cell(), 3), None),
        (rnn.Feedback(nn.Tanh(), linear([[0.1, 0.0], [0.0, 0.1]])), None),
        (rnn.Residual(nn.Tanh()), None),
        (rnn.Sequential(nn.Tanh(), nn.Tanh()), [1.0, 1.0]),
        (rnn.Parallel(nn.Tanh(), nn.Tanh()), [1.0, 1.0]),
        (rnn.Heads(nn.Tanh(), trunk=nn.Tanh()), [1.0, 1.0]),
    ):
        found = module.certificate(rates)
        assert found.assumptions[0].startswith("the system is ")
        assert "the system is" in str(found)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        (lambda m: m.certificate(), "give rates"),
        (lambda m: m.certificate([1.0]), "1 rates for 2"),
        (lambda m: m.certificate({"a": 1.0, "b": 1.0}), "children are 0, 1"),
        (lambda m: m.certificate([1.0, 1.0], bounds="norm"), "bounds='norm'"),
        (lambda m: m.certificate([1.0, 1.0], bounds="measured"), "never mixed"),
        (lambda m: m.certificate([1.0, 1.0], at=torch.ones(1, 2)), "never mixed"),
    ],
)
def test_refusals(call, word: str) -> None:
    with pytest.raises(ContractionError, match=word):
        call(rnn.Sequential(nn.Tanh(), nn.Tanh()))


def test_other_compositions_have_to_say_what_they_are() -> None:
    class Mine(rnn.Composition):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Tanh()

    with pytest.raises(ContractionError, match="register"):
        Mine().certificate()

    @rnn.dynamics.register
    def rule(module: Mine, question):
        return product(question.named_rates(["inner"]))

    assert Mine().certificate([2.0]).value == 2.0
    with pytest.raises(ContractionError, match="continuous time"):
        rnn.FixedPoint(cell(), 3).certificate(target=0.5)
