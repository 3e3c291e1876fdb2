"""Output metrics whose residual does not belong to their rows."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from mutants.metrics import UnrootedResidual
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.output import Bernoulli, Categorical, Euclidean, Poisson

WEIGHTS = torch.tensor([1.0, 5.0, 0.2, 1.0, 3.0], dtype=torch.float64)


def weighted(kind: type[rm.output.OutputMetric]) -> type[rm.output.OutputMetric]:
    """A subclass with rows of its own and nothing else."""

    class Weighted(kind):  # type: ignore[misc,valid-type]
        def factor(self, outputs: Tensor) -> Tensor:
            rows = super().factor(outputs)
            return rows * WEIGHTS.sqrt().view(-1, *[1] * (rows.ndim - 1))

    return Weighted


@pytest.mark.parametrize("kind", [Categorical, Bernoulli, Poisson, Euclidean])
def test_a_subclass_with_other_rows_has_their_residual(
    kind: type[rm.output.OutputMetric],
) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    metric = rm.LayerwiseMetric(model, weighted(kind)(), mass=0.1, blocks="model")
    with metric.record():
        z = model(x)
    loss = (WEIGHTS * z.softmax(1)[:, 0]).mean()
    metric.backward(loss, z)
    rows = kind().factor(z.detach()) * WEIGHTS.sqrt().view(-1, 1, 1)
    rows = rows / kind().terms(z) ** 0.5
    inputs = torch.cat([x, torch.ones(5, 1).double()], 1)
    K = torch.einsum("nro,ni->nroi", rows, inputs).flatten(0, 1).flatten(1)
    g = K.mT @ K + 0.1 * torch.eye(16).double()
    assert model.weight.grad is not None
    assert model.bias.grad is not None
    e = torch.cat([model.weight.grad, model.bias.grad[:, None]], 1).flatten()
    solved = torch.linalg.solve(g, e).view(4, 4)
    found = metric.natural_gradient()
    torch.testing.assert_close(found["weight"], solved[:, :3], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(found["bias"], solved[:, 3], rtol=1e-9, atol=1e-12)


def test_what_a_subclass_defines_itself_stays() -> None:
    class Own(Categorical):
        def factor(self, outputs: Tensor) -> Tensor:
            return 2.0 * super().factor(outputs)

        def whiten(self, outputs: Tensor, cotangent: Tensor) -> tuple[Tensor, Tensor]:
            y, rest = super().whiten(outputs, cotangent)
            return 0.5 * y, rest

    class Renamed(Categorical):
        pass

    assert Own.whiten is not rm.output.OutputMetric.whiten
    assert Own.sample is rm.output.OutputMetric.sample
    assert Own.terms is Categorical.terms
    assert Renamed.whiten is Categorical.whiten


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_residual_of_other_rows_is_refused(reduction: str) -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    metric = rm.LayerwiseMetric(model, UnrootedResidual(), reduction=reduction)
    optimizer = rm.optim.RiemannianSGD(metric, lr=0.1)
    with metric.record():
        z = model(x)
    with pytest.raises(rm.errors.OutputMetricError, match="other rows"):
        metric.backward(F.softplus(z).mean(), z)
    assert model.weight.grad is None
    with pytest.raises(rm.errors.NotRecordedError):
        optimizer.step()


@pytest.mark.parametrize(("positions", "asked"), [(2, [6]), (2**9, [4]), (2**11, [])])
def test_samples_of_many_outputs_are_compared_for_some_examples(
    positions: int, asked: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    # All rows of a model of language, for a look at whether they fit, need gigabytes.
    sizes, factor = [], Categorical.factor

    def counted(self: Categorical, outputs: Tensor) -> Tensor:
        sizes.append(len(outputs))
        return factor(self, outputs)

    monkeypatch.setattr(Categorical, "factor", counted)
    model = nn.Linear(3, 4)
    output = rm.output.Sampled(Categorical(), gradient_rows=False)
    metric = rm.LayerwiseMetric(model, output)
    with metric.record():
        z = model(torch.randn(6, positions, 3))
    y = torch.zeros(6, positions, dtype=torch.long)
    metric.backward(F.cross_entropy(z.movedim(-1, 1), y), z)
    assert sizes == asked


def test_other_rows_of_many_outputs_are_refused() -> None:
    model, x = nn.Linear(3, 2**11), torch.randn(6, 3)
    output = rm.output.Sampled(UnrootedResidual(), gradient_rows=False)
    metric = rm.LayerwiseMetric(model, output)
    with metric.record():
        z = model(x)
    with pytest.raises(rm.errors.OutputMetricError, match="other rows"):
        metric.backward(F.softplus(z).mean(), z)


def test_a_functional_metric_looks_too() -> None:
    model = nn.Linear(3, 2)
    metric = rm.functional.FunctionalMetric(
        model, lambda net, x: net(x), UnrootedResidual()
    )
    z = metric(torch.randn(4, 3))
    with pytest.raises(rm.errors.OutputMetricError, match="other rows"):
        metric.backward(F.softplus(z).mean(), z)


def test_rows_of_a_mixin() -> None:
    class Tenfold:
        def factor(self, outputs: Tensor) -> Tensor:
            return 10.0 * super().factor(outputs)  # type: ignore[misc]

    class Mixed(Tenfold, Categorical):
        pass

    z = torch.zeros(3, 4, dtype=torch.float64)
    assert Mixed.sample is rm.output.OutputMetric.sample
    y, rest = Mixed().whiten(z, Mixed().factor(z).sum(1))
    assert y is not None
    torch.testing.assert_close(
        (y.unsqueeze(-1) * Mixed().factor(z)).sum(1) + rest, Mixed().factor(z).sum(1)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("classes", [2, 3, 10])
def test_predictions_that_are_sure_and_right(classes: int, dtype: torch.dtype) -> None:
    # Of a derivative that is nearly zero only rounding is left: no reason to refuse.
    for size in (8.0, 14.0, 20.0, 40.0, 700.0):
        model = nn.Linear(classes, classes).to(dtype)
        nn.init.eye_(model.weight)
        nn.init.zeros_(model.bias)
        x = size * torch.eye(classes, dtype=dtype) + 0.1
        metric = rm.LayerwiseMetric(model, Categorical(), mass=1e-2)
        with metric.record():
            z = model(x)
        metric.backward(F.cross_entropy(z, torch.arange(classes)), z)
        assert all(v.isfinite().all() for v in metric.natural_gradient().values())


@pytest.mark.parametrize("probes", [0, 1, 2])
@pytest.mark.parametrize("size", [100.0, 740.0, 1e4])
def test_sampled_rows_of_logits_that_are_far_apart(size: float, probes: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(3, 3).double(), torch.randn(6, 3).double()
    x[0] *= size
    metric = rm.LayerwiseMetric(
        model, rm.output.Sampled(Categorical(), probes), mass=0.1, blocks="model"
    )
    for _ in range(2):
        with metric.record():
            z = model(x)
        metric.backward(F.cross_entropy(z, z.detach().argmin(1)), z)
        lowered = metric.blocks["model"].flat(metric.natural_gradient())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(
                lowered[name], parameter.grad, rtol=1e-6, atol=1e-8 * size
            )


class Spd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        a = self.layer(x).view(-1, 2, 2)
        return torch.matrix_exp(a + a.mT)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
def test_matrices_of_another_data_type_than_the_default(default: torch.dtype) -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        torch.manual_seed(0)
        model, x = Spd().double(), torch.randn(8, 4).double()
        output = rm.output.OnManifold(rm.manifolds.SPD())
        metric = rm.LayerwiseMetric(model, output)
        with metric.record():
            z = model(x)
        metric.backward(z.square().mean(), z)
        rows = output.factor(z.detach())
        y, rest = output.whiten(z.detach(), rows.sum(1))
        combined = (y.view(*y.shape, 1, 1) * rows).sum(1) + rest
        torch.testing.assert_close(combined, rows.sum(1), rtol=1e-12, atol=1e-13)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("weighted", [False, True])
def test_random_rows_that_split_the_cotangent_themselves(weighted: bool) -> None:
    class Drawn(rm.output.OutputMetric):
        def factor(self, outputs: Tensor) -> Tensor:
            return torch.randn(len(outputs), 2, *outputs.shape[1:]).to(outputs)

        def split(
            self, outputs: Tensor, cotangent: Tensor
        ) -> tuple[Tensor, Tensor, Tensor]:
            rows, v = self.factor(outputs), cotangent.detach()
            y = torch.linalg.lstsq(rows.mT, v.unsqueeze(-1)).solution.squeeze(-1)
            return rows, y, v - (rows * y.unsqueeze(-1)).sum(1)

    model, x = nn.Linear(3, 4).double(), torch.randn(5, 3).double()
    metric = rm.LayerwiseMetric(model, Drawn(), mass=0.1, blocks="model")
    for _ in range(3):
        with metric.record():
            z = model(x)
        w = torch.ones(5).double() if weighted else None
        metric.backward(F.cross_entropy(z, torch.arange(5) % 4), z, weights=w)
        lowered = metric.blocks["model"].flat(metric.natural_gradient())
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(lowered[name], parameter.grad)


@pytest.mark.parametrize("per", ["example", "batch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [60.0, 95.0, 200.0, 700.0, 720.0, 800.0])
def test_rows_and_rest_are_the_cotangent_however_wrong(
    per: Any, dtype: torch.dtype, gap: float
) -> None:
    z = torch.tensor([[0.0, gap], [0.3, 0.1]], dtype=dtype)
    v = z.softmax(1) - torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=dtype)
    rows, y, rest = rm.output.Sampled(Categorical(), per=per).split(z, v)
    assert y is not None
    whole = (rows * y.expand(2, -1).unsqueeze(-1)).sum(1) + rest
    if per == "batch":
        whole, v = whole.sum(0), v.sum(0)
    torch.testing.assert_close(whole, v, rtol=1e-5, atol=1e-6)
