"""A trained model leaves PyTorch as any other: its parameters are plain tensors."""

import copy
import io
from typing import Any

import geoopt
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm

X = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
TARGET = torch.tensor([0, 1, 2, 0, 1, 2])


def trained() -> nn.Module:
    model = rm.nn.Sequential(
        rm.nn.Linear(5, 4, manifold=rm.manifolds.Stiefel()),
        nn.Tanh(),
        rm.nn.Residual(rm.nn.Linear(4, 4, manifold=rm.manifolds.Sphere())),
        rm.nn.Linear(4, 3),
    )
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    for _ in range(2):
        with metric.record():
            z = model(X)
        metric.backward(F.cross_entropy(z, TARGET), z)
        optimizer.step()
    return model


def exported(model: nn.Module, **options: Any) -> Any:
    # The default of newer versions; the strict tracer of older ones stumbles over
    # geoopt's parameters.
    return torch.export.export(model, (X,), strict=False, **options)


def test_torch_export() -> None:
    model = trained()
    program = exported(model)
    wanted = model(X).detach()
    torch.testing.assert_close(program.module()(X).detach(), wanted)
    for name, value in model.state_dict().items():
        assert torch.equal(program.state_dict[name], value)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file)
    torch.testing.assert_close(loaded.module()(X).detach(), wanted)


def test_torch_export_with_any_batch() -> None:
    model = trained()
    program = exported(model, dynamic_shapes=(({0: torch.export.Dim("n", min=2)},),))
    for n in (2, 5):
        torch.testing.assert_close(program.module()(X[:n]), model(X[:n]))


def test_exporting_leaves_the_model_on_its_manifolds() -> None:
    model = trained()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    exported(model)
    metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=0.1)
    metric.parameters.verify()
    assert isinstance(model[0].weight, geoopt.ManifoldParameter)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_functions_of_torch_func() -> None:
    """Parameters go into functional_call, grad, vmap and jacrev as they are."""
    model = trained()
    values = {n: p.detach().as_subclass(Tensor) for n, p in model.named_parameters()}

    def loss(values: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(torch.func.functional_call(model, values, (x,)), y)

    own = torch.func.grad(loss)(values, X, TARGET)
    model.zero_grad()
    loss(dict(model.named_parameters()), X, TARGET).backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(own[name], p.grad)
    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(
        values, X.unsqueeze(1), TARGET.unsqueeze(1)
    )
    for name, p in model.named_parameters():
        torch.testing.assert_close(each[name].mean(0), p.grad)


def test_a_plain_copy() -> None:
    """What a pipeline needs that knows nothing of geoopt."""
    model = trained()
    plain = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3))
    names = zip(plain.state_dict(), model.state_dict().values(), strict=True)
    plain.load_state_dict({n: copy.deepcopy(v) for n, v in names})
    with torch.no_grad():
        h = plain[1](plain[0](X))
        torch.testing.assert_close(plain[3](h + plain[2](h)), model(X))
    assert all(type(p) is nn.Parameter for p in plain.parameters())


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*")  # torch's own exporter
def test_onnx() -> None:
    pytest.importorskip("onnxscript")
    model = trained().float().eval()
    program = torch.onnx.export(model, (X.float(),), dynamo=True)
    assert program is not None
