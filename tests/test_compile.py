"""What torch.compile may be put around: the same numbers come out."""

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import woodbury

# The default backend needs a C++ compiler; what can be traced does not depend on it.
BACKEND = "aot_eager"


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
