"""A promise that the graph stays as it is: the same steps, fewer looks."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutants import static_graph as mutants
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import recorder
from riemannian_modules.errors import LinearizationError, NonFiniteError

SETTLING = 3


class Sequences(nn.Module):
    """Attention, whose graph could move examples without changing its looks."""

    def __init__(self) -> None:
        super().__init__()
        self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.unflatten(1, (-1, 4))
        z: Tensor = self.head(self.attend(tokens, tokens, tokens)[0].mean(1))
        return z


class Rolling(nn.Module):
    """Rolls the batch by as many examples as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(8, 4), nn.Linear(4, 3)
        self.by = torch.zeros((), dtype=torch.long)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.below(x))
        order = (torch.arange(len(h)) + self.by) % len(h)
        z: Tensor = self.above(h[order])
        return z


def images() -> nn.Module:
    layers = (nn.Unflatten(1, (1, 2, 4)), nn.Conv2d(1, 2, 2), nn.Tanh(), nn.Flatten())
    return nn.Sequential(*layers, nn.Linear(6, 3))


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 3))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "chain": chain,
    "images": images,
    "attention": Sequences,
    "rolled": Rolling,
}
OUTPUTS: dict[str, Callable[[], rm.output.OutputMetric]] = {
    "exact": rm.output.Categorical,
    "sampled": lambda: rm.output.Sampled(rm.output.Categorical()),
}


def data(n: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (n,), generator=generator)


def built(
    model: nn.Module, output: str, **options: Any
) -> tuple[rm.LayerwiseMetric, rm.optim.RiemannianSGD]:
    metric = rm.LayerwiseMetric(model, OUTPUTS[output](), mass=0.1, **options)
    return metric, rm.optim.RiemannianSGD(metric, lr=0.1)


def passed(metric: rm.LayerwiseMetric, x: Tensor, y: Tensor) -> None:
    with metric.record():
        outputs = metric.model(x)
    metric.backward(F.cross_entropy(outputs, y), outputs)


@contextmanager
def surveys(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Count the walks through autograd's graph."""
    found: list[int] = []
    survey = recorder.survey

    def spy(*args: Any) -> Any:
        found.append(1)
        return survey(*args)

    with monkeypatch.context() as patch:
        patch.setattr(recorder, "survey", spy)
        yield found


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", MODELS)
def test_the_same_steps(name: str, output: str) -> None:
    torch.manual_seed(1)
    plain = MODELS[name]().double()
    trained = []
    for static in (False, True):
        model = copy.deepcopy(plain)
        metric, optimizer = built(model, output, static_graph=static)
        torch.manual_seed(2)
        for step in range(SETTLING + 3):
            passed(metric, *data(seed=step))
            optimizer.step()
        trained.append([p.detach() for p in model.parameters()])
    for one, other in zip(*trained, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", MODELS)
def test_settled_graphs_are_not_walked_through(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric, _ = built(MODELS[name]().double(), "sampled", static_graph=True)
    for _ in range(SETTLING):
        passed(metric, *data())
    with surveys(monkeypatch) as walks:
        passed(metric, *data(seed=1))
        assert not walks
        # Other shapes are looked at in full first.
        passed(metric, *data(n=7))
        assert walks
        for _ in range(SETTLING):
            passed(metric, *data(n=7))
        walks.clear()
        passed(metric, *data(n=7, seed=1))
        passed(metric, *data(seed=2))
        assert not walks


def test_without_the_promise_every_graph_is_walked_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    metric, _ = built(chain().double(), "sampled")
    for _ in range(SETTLING):
        passed(metric, *data())
    with surveys(monkeypatch) as walks:
        passed(metric, *data())
    assert walks


@pytest.mark.parametrize("seen", range(1, SETTLING))
def test_the_promise_is_held_against_what_comes_before_it_counts(seen: int) -> None:
    """The examples move in a pass that is still compared with the first one."""
    model = Rolling().double()
    metric, _ = built(model, "exact", static_graph=True)
    for _ in range(seen):
        passed(metric, *data())
    model.by.fill_(2)
    with pytest.raises(LinearizationError, match="examples of the batch interact"):
        passed(metric, *data())


def test_a_loss_with_a_term_of_its_own_is_refused_before_it_counts() -> None:
    model = chain().double()
    metric, _ = built(model, "sampled", static_graph=True)
    x, y = data()
    passed(metric, x, y)
    with metric.record():
        outputs = model(x)
    decay = sum(p.square().sum() for p in model.parameters())
    with pytest.raises(LinearizationError, match="other than through the outputs"):
        metric.backward(F.cross_entropy(outputs, y) + decay, outputs)


def test_a_hook_that_comes_later_is_noticed() -> None:
    model = chain().double()
    metric, _ = built(model, "exact", static_graph=True)
    for _ in range(SETTLING + 1):
        passed(metric, *data())
    handle = model[0].register_forward_hook(lambda m, i, o: 2.0 * o)
    x, y = data()
    passed(metric, x, y)
    expected = torch.autograd.grad(
        F.cross_entropy(model(x), y), list(model.parameters())
    )
    handle.remove()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, gradient)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_values_are_still_looked_at(bad: float) -> None:
    metric, _ = built(chain().double(), "sampled", static_graph=True)
    for _ in range(SETTLING + 1):
        passed(metric, *data())
    before = [p.detach().clone() for p in metric.model.parameters()]
    x, y = data()
    with pytest.raises(NonFiniteError):
        passed(metric, torch.full_like(x, bad), y)
    for parameter, value in zip(metric.model.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_copies_keep_the_promise() -> None:
    metric, _ = built(chain(), "exact", static_graph=True)
    assert metric.of(copy.deepcopy(metric.model)).static_graph
    assert not built(chain(), "exact")[0].static_graph


LAWS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "settles at once": lambda _: (
        test_the_promise_is_held_against_what_comes_before_it_counts(SETTLING - 1)
    ),
    "all passes look alike": lambda patch: test_settled_graphs_are_not_walked_through(
        "chain", patch
    ),
}


@pytest.mark.parametrize("wrong", mutants.WRONG)
def test_a_wrong_promise_breaks_the_law(
    wrong: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    law = LAWS[wrong]
    law(monkeypatch)
    part, instead = mutants.WRONG[wrong]
    monkeypatch.setattr(recorder, part, instead)
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        law(monkeypatch)
