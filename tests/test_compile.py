"""What torch.compile may be put around: the same numbers come out."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import woodbury
from riemannian_modules.errors import NotRecordedError

# The default backend needs a C++ compiler; what can be traced does not depend on it.
BACKEND = "aot_eager"
# It compiles nothing below a module with a hook that is not traced, and says so itself.
OLD = torch.__version__.startswith("2.6.")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


KERNELS: dict[str, tuple[Callable[..., Tensor], int]] = {
    "push-through": (woodbury.push_through, 5),
    "woodbury": (woodbury.woodbury, 9),
    "primal": (woodbury.primal, 9),
    "qr": (woodbury.qr, 9),
}


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_are_whole_graphs(name: str) -> None:
    kernel, size = KERNELS[name]
    K, D, e = torch.randn(5, 9), torch.rand(9) + 0.1, torch.randn(size)
    compiled = torch.compile(kernel, backend=BACKEND, fullgraph=True)
    torch.testing.assert_close(compiled(K, D, e), kernel(K, D, e))


@pytest.mark.slow
def test_a_compiled_step_is_the_same() -> None:
    start, x, y = nn.Linear(6, 3), torch.randn(4, 6), torch.arange(4) % 3

    def trained(compiled: bool) -> Tensor:
        model = copy.deepcopy(start)
        metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=1e-2)
        optimizer = rm.optim.RiemannianSGD(metric, lr=0.3)
        step: Callable[[], object] = optimizer.step
        if compiled:
            step = torch.compile(step, backend="eager")
        for _ in range(2):
            with metric.record():
                logits = model(x)
            metric.backward(F.cross_entropy(logits, y), logits)
            step()
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    torch.testing.assert_close(trained(True), trained(False), rtol=1e-12, atol=0.0)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleList([nn.Linear(4, 4) for _ in range(10)])
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.inner:
            x = torch.tanh(layer(x))
        return self.last(x)


def counting() -> tuple[list[Any], Any]:
    """Return a list of the graphs that a backend was given, and the backend."""
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    return graphs, backend


def in_place(model: nn.Module, **options: Any) -> nn.Module:
    model.compile(**options)
    return model


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", [torch.compile, in_place])
def test_a_recorded_model_is_compiled_once(compiled: Any) -> None:
    graphs, backend = counting()
    plain, x, y = Deep(), torch.randn(6, 4), torch.arange(6) % 3
    model = compiled(copy.deepcopy(plain), backend=backend)
    found, counts = [], []
    for each in (plain, model):
        metric = rm.LayerwiseMetric(each, rm.output.Categorical(), mass=1e-2)
        for _ in range(5):
            with metric.record():
                logits = each(x)
            metric.backward(F.cross_entropy(logits, y), logits)
            counts.append(len(graphs))
        found.append(list(metric.natural_gradient().values()))
    assert len(set(counts[-3:])) == 1
    assert counts[-1] > 0 or OLD
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("compiled", [torch.compile, in_place])
def test_a_model_is_compiled_after_its_metric(compiled: Any) -> None:
    graphs, backend = counting()
    plain, x, y = Deep(), torch.randn(6, 4), torch.arange(6) % 3
    start = copy.deepcopy(plain)
    metrics = [
        rm.LayerwiseMetric(each, rm.output.Categorical(), mass=1e-2)
        for each in (plain, start)
    ]
    model, counts = compiled(start, backend=backend), []
    for _ in range(12):
        for metric, each in zip(metrics, (plain, model), strict=True):
            with metric.record():
                logits = each(x)
            metric.backward(F.cross_entropy(logits, y), logits)
        counts.append(len(graphs))
    assert len(set(counts[2:])) == 1
    assert counts[-1] > 0 or OLD
    one, other = (metric.natural_gradient() for metric in metrics)
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-10, atol=1e-12)


def test_a_graph_that_calls_no_layer_asks_for_a_metric_of_it() -> None:
    layers, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), torch.randn(6, 4)
    model = torch.compile(layers, backend=BACKEND)
    model(x)
    metric = rm.LayerwiseMetric(layers, rm.output.Categorical(), mass=1e-2)
    with metric.record():
        logits = model(x)
    if not OLD:
        with pytest.raises(NotRecordedError, match=r"that torch\.compile returned"):
            metric.pull_back(logits)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=1e-2)
    with metric.record():
        logits = model(x)
    metric.pull_back(logits)


@pytest.mark.parametrize("of_compiled", [True, False])
def test_a_whole_graph_cannot_be_recorded(of_compiled: bool) -> None:
    layers = Deep()
    model = torch.compile(layers, backend="eager", fullgraph=True)
    measured = model if of_compiled else layers
    metric = rm.LayerwiseMetric(measured, rm.output.Categorical(), mass=1e-2)
    message = "torch._dynamo.disable" if OLD else "leave out fullgraph=True"
    with pytest.raises(RuntimeError, match=message), metric.record():
        model(torch.randn(6, 4))
