"""Class weights, masks and padding: terms of a loss that do not all count alike."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.output import (
    Bernoulli,
    Categorical,
    Euclidean,
    Gaussian,
    OutputMetric,
    Poisson,
    Sampled,
    Weighted,
)
from riemannian_modules.testing import check_output_metric, raise_failures

N, IN = 6, 3


def dense(model: nn.Module, x: Tensor, rows: Tensor, mass: float) -> Tensor:
    """The metric of all parameters for rows ``(n, r, *output)``, already weighted."""
    z, parameters = model(x), list(model.parameters())
    found = []
    for i in range(len(x)):
        for row in rows[i]:
            grads = torch.autograd.grad(z[i], parameters, row, retain_graph=True)
            found.append(torch.cat([g.flatten() for g in grads]))
    K = torch.stack(found)
    return K.mT @ K + mass * torch.eye(K.shape[1]).to(K)


def spread(w: Tensor, like: Tensor) -> Tensor:
    return w.view(*w.shape, *[1] * (like.ndim - w.ndim))


# Output metric, shape of an output, and shapes that weights may have.
CASES: dict[str, tuple[Callable[[], OutputMetric], tuple[int, ...], list[int]]] = {
    "classes": (Categorical, (4,), [1]),
    "tokens": (Categorical, (2, 3), [1, 2]),
    "coins": (Bernoulli, (3,), [1, 2]),
    "counts": (Poisson, (3,), [1, 2]),
    "squares": (lambda: Euclidean(0.5), (3,), [1, 2]),
    "variance": (lambda: Gaussian(learned="log_variance"), (4,), [1]),
    "sphere": (lambda: rm.output.OnManifold(rm.manifolds.Sphere()), (3,), [1]),
}


class Shaped(nn.Module):
    def __init__(self, shape: tuple[int, ...], unit: bool) -> None:
        super().__init__()
        self.shape, self.unit = shape, unit
        self.first = nn.Linear(IN, 4)
        self.last = nn.Linear(4, int(torch.Size(shape).numel()))

    def forward(self, x: Tensor) -> Tensor:
        z = self.last(torch.tanh(self.first(x))).unflatten(1, self.shape)
        return F.normalize(z, dim=-1) if self.unit else z


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("name", CASES)
@given(seed=st.integers(0, 99), zeros=st.booleans())
def test_the_metric_is_the_weighted_one(
    name: str, reduction: Any, seed: int, zeros: bool
) -> None:
    make, shape, dims = CASES[name]
    torch.manual_seed(seed)
    model, x = Shaped(shape, name == "sphere").double(), torch.randn(N, IN).double()
    for count in dims:
        w = torch.rand(N, *shape[: count - 1]).double() + 0.1
        if zeros:
            w[0] = 0.0
        metric = rm.LayerwiseMetric(
            model, make(), mass=0.1, blocks="model", reduction=reduction
        )
        with metric.record():
            z = model(x)
        target = torch.randn_like(z)
        loss = (spread(w, z) * (0.3 * z.square() + target * z)).sum()
        terms = max(make().terms(z), w.numel())
        total = w.mean() * terms if reduction == "mean" else 1.0
        loss = loss / total
        metric.backward(loss, z, weights=w)
        rows = make().factor(z.detach()) * spread(w, z).sqrt().unsqueeze(1)
        G = dense(model, x, rows / total**0.5 if reduction == "mean" else rows, 0.1)
        flat = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
        solved = torch.linalg.solve(G, torch.cat(flat))
        found = metric.natural_gradient()
        own = torch.cat([found[n].flatten() for n, _ in model.named_parameters()])
        torch.testing.assert_close(own, solved, rtol=1e-8, atol=1e-10)


def test_class_weights_and_ignored_targets_of_a_cross_entropy() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(IN, 4).double(), torch.randn(8, IN).double()
    target = torch.tensor([0, 1, -100, 3, 2, -100, 1, 0])
    of_class = torch.tensor([1.0, 5.0, 0.2, 2.0]).double()
    w = torch.where(target >= 0, of_class[target.clamp_min(0)], 0.0)
    metric = rm.LayerwiseMetric(model, Categorical(), mass=1e-3, blocks="model")
    with metric.record():
        z = model(x)
    loss = F.cross_entropy(z, target, weight=of_class)
    metric.backward(loss, z, weights=w)
    # For a softmax the metric is the Hessian of the loss.
    values = [p.detach() for p in model.parameters()]

    def again(flat: Tensor) -> Tensor:
        weight, bias = flat[:12].view(4, 3), flat[12:]
        return F.cross_entropy(x @ weight.mT + bias, target, weight=of_class)

    flat = torch.cat([v.flatten() for v in values])
    H = torch.autograd.functional.hessian(again, flat) + 1e-3 * torch.eye(16).double()
    torch.testing.assert_close(
        metric.blocks["model"].to_dense(), H, rtol=1e-9, atol=1e-12
    )
    # Examples that do not count are not there at all.
    kept = target >= 0
    other = rm.LayerwiseMetric(model, Categorical(), mass=1e-3, blocks="model")
    with other.record():
        z = model(x[kept])
    other.backward(
        F.cross_entropy(z, target[kept], weight=of_class), z, weights=w[kept]
    )
    for name, value in other.natural_gradient().items():
        torch.testing.assert_close(metric.natural_gradient()[name], value)


def test_padded_tokens() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(IN, 4).double(), torch.randn(5, 7, IN).double()
    mask = torch.arange(7) < torch.tensor([7, 3, 5, 1, 6]).unsqueeze(1)
    target = torch.randint(4, (5, 7)).masked_fill(~mask, -100)
    padded = rm.LayerwiseMetric(model, Categorical(), mass=0.1, blocks="model")
    with padded.record():
        z = model(x)
    loss = F.cross_entropy(z.movedim(-1, 1), target)
    padded.backward(loss, z, weights=mask.double())
    flat = rm.LayerwiseMetric(model, Categorical(), mass=0.1, blocks="model")
    with flat.record():
        z = model(x[mask])
    flat.backward(F.cross_entropy(z, target[mask]), z)
    one, other = padded.blocks["model"].to_dense(), flat.blocks["model"].to_dense()
    torch.testing.assert_close(one, other)
    for name, value in flat.natural_gradient().items():
        torch.testing.assert_close(padded.natural_gradient()[name], value)


def test_a_full_step_solves_least_squares_with_a_mask() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(IN, 1).double(), torch.randn(4, 10, IN).double()
    t, mask = torch.randn(4, 10, 1).double(), (torch.rand(4, 10) < 0.7).double()
    metric = rm.LayerwiseMetric(model, Euclidean(), mass=1e-10, blocks="model")
    with metric.record():
        z = model(x)
    loss = (mask.unsqueeze(-1) * (z - t).square() / 2.0).sum() / mask.sum()
    metric.backward(loss, z, weights=mask)
    rm.optim.RiemannianSGD(metric, lr=1.0).step()
    rows = torch.cat([x, torch.ones(4, 10, 1).double()], -1)[mask > 0]
    solved = torch.linalg.lstsq(rows, t[mask > 0]).solution
    torch.testing.assert_close(
        model.weight.detach(), solved[:IN].mT, rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_task_that_no_example_has(reduction: Any) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other = nn.Linear(IN, 2), nn.Linear(IN, 1)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"one": self.one(x), "other": self.other(x)}

    torch.manual_seed(0)
    model, x = Two().double(), torch.randn(4, IN).double()
    metric = rm.LayerwiseMetric(
        model,
        {"one": Euclidean(), "other": Euclidean()},
        mass=0.1,
        reduction=reduction,
    )
    with metric.record():
        z = model(x)
    squares = z["one"].square().sum(1) / 2.0
    loss = (squares.mean() if reduction == "mean" else squares.sum()) + 0.0 * z[
        "other"
    ].sum()
    metric.backward(loss, z, weights={"other": torch.zeros(4)})
    alone = rm.LayerwiseMetric(model.one, Euclidean(), mass=0.1, reduction=reduction)
    with alone.record():
        y = model.one(x)
    squares = y.square().sum(1) / 2.0
    alone.backward(squares.mean() if reduction == "mean" else squares.sum(), y)
    found = metric.natural_gradient()
    for name, value in alone.natural_gradient().items():
        torch.testing.assert_close(found[f"one.{name}"], value)
    assert float(found["other.weight"].abs().max()) == 0.0


def test_a_piece_in_which_nothing_counts() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(IN, 4).double(), torch.randn(6, IN).double()
    y = torch.arange(6) % 4

    def gradient(pieces: list[tuple[slice, float]]) -> dict[str, Tensor]:
        metric = rm.LayerwiseMetric(model, Categorical(), mass=0.1)
        for index, (piece, weight) in enumerate(pieces):
            with metric.record():
                z = model(x[piece])
            w = torch.full((len(z),), weight)
            loss = F.cross_entropy(z, y[piece]) * weight
            more = index + 1 < len(pieces)
            metric.backward(loss, z, weights=w, accumulate=more)
        return metric.natural_gradient()

    whole = gradient([(slice(0, 4), 1.0)])
    parts = gradient([(slice(0, 2), 1.0), (slice(2, 4), 1.0), (slice(4, 6), 0.0)])
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.int64, torch.bool]
)
def test_weights_of_other_data_types(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(IN, 4).double(), torch.randn(N, IN).double()
    y, w = torch.arange(N) % 4, torch.arange(1, N + 1).to(dtype)

    def gradient(w: Tensor) -> dict[str, Tensor]:
        metric = rm.LayerwiseMetric(model, Categorical(), mass=0.1)
        with metric.record():
            z = model(x)
        own = w.double() * F.cross_entropy(z, y, reduction="none")
        metric.backward(own.sum() / w.double().sum(), z, weights=w)
        return metric.natural_gradient()

    for name, value in gradient(w.double()).items():
        torch.testing.assert_close(gradient(w)[name], value, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("per", ["example", "batch"])
@pytest.mark.parametrize("probes", [0, 1, 3])
def test_sampled_rows_keep_the_gradient(per: Any, probes: int) -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(IN, 4).double(), torch.randn(8, IN).double()
    y, w = torch.arange(8) % 4, torch.rand(8).double()
    metric = rm.LayerwiseMetric(
        model, Sampled(Categorical(), probes, per=per), mass=0.1, blocks="model"
    )
    for _ in range(3):
        with metric.record():
            z = model(x)
        loss = (w * F.cross_entropy(z, y, reduction="none")).sum() / w.sum()
        metric.backward(loss, z, weights=w)
        block, found = metric.blocks["model"], metric.natural_gradient()
        lowered = block.flat(found)
        for name, p in model.named_parameters():
            assert p.grad is not None
            torch.testing.assert_close(lowered[name], p.grad, rtol=1e-8, atol=1e-11)


def test_sampled_rows_are_the_weighted_metric_on_average() -> None:
    torch.manual_seed(0)
    z, w = torch.randn(3, 4).double(), torch.tensor([4.0, 1.0, 0.25]).double()
    weighted = Weighted(Sampled(Categorical(), 1, gradient_rows=False), w)
    rows = torch.stack([weighted.factor(z)[:, 0] for _ in range(20000)])
    mean = torch.einsum("knc,knd->ncd", rows, rows) / len(rows)
    exact = Weighted(Categorical(), w).factor(z)
    expected = torch.einsum("nrc,nrd->ncd", exact, exact)
    torch.testing.assert_close(mean, expected, rtol=0.05, atol=0.02)


def test_several_outputs_and_passes() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Linear(IN, 5)
            self.one, self.other = nn.Linear(5, 3), nn.Linear(5, 2)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            h = torch.tanh(self.body(x))
            return {"one": self.one(h), "other": self.other(h)}

    torch.manual_seed(0)
    model, x, y = Two().double(), torch.randn(9, IN).double(), torch.arange(9) % 3
    # The second task is missing for some examples.
    known = (torch.arange(9) % 2).double()
    output = {"one": Categorical(), "other": Euclidean()}

    def passed(pieces: list[slice]) -> rm.LayerwiseMetric:
        metric = rm.LayerwiseMetric(model, output, mass=0.1, reduction="sum")
        for index, piece in enumerate(pieces):
            with metric.record():
                z = model(x[piece])
            squares = 0.5 * z["other"].square().sum(1)
            loss = F.cross_entropy(z["one"], y[piece], reduction="sum")
            loss = loss + (known[piece] * squares).sum()
            metric.backward(
                loss,
                z,
                weights={"other": known[piece]},
                accumulate=index + 1 < len(pieces),
            )
        return metric

    whole = passed([slice(0, 9)]).natural_gradient()
    parts = passed([slice(0, 4), slice(4, 9)]).natural_gradient()
    for name, value in whole.items():
        torch.testing.assert_close(parts[name], value)
    alone = rm.LayerwiseMetric(model, output, mass=0.1, reduction="sum")
    with alone.record():
        z = model(x)
    loss = F.cross_entropy(z["one"], y, reduction="sum")
    loss = loss + (known * 0.5 * z["other"].square().sum(1)).sum()
    alone.backward(loss, z)
    # Without weights the metric has the missing ones, too.
    assert not torch.allclose(
        alone.natural_gradient()["other.weight"], whole["other.weight"]
    )


def test_passes_are_weighed_by_their_sums() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(IN, 4).double(), torch.randn(8, IN).double()
    y, w = torch.arange(8) % 4, torch.rand(8).double()

    def gradient(pieces: list[slice]) -> dict[str, Tensor]:
        metric = rm.LayerwiseMetric(model, Categorical(), mass=0.1)
        for index, p in enumerate(pieces):
            with metric.record():
                z = model(x[p])
            own = w[p] * F.cross_entropy(z, y[p], reduction="none")
            more = index + 1 < len(pieces)
            metric.backward(own.sum() / w[p].sum(), z, weights=w[p], accumulate=more)
        return metric.natural_gradient()

    whole = gradient([slice(0, 8)])
    for name, value in gradient([slice(0, 3), slice(3, 8)]).items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("kind", [Categorical, Bernoulli, Euclidean])
def test_they_keep_the_laws_of_output_metrics(kind: type[OutputMetric]) -> None:
    z = torch.randn(3, 4).double()
    metric = Weighted(kind(), torch.ones(3).double())
    generator = torch.Generator().manual_seed(0)
    raise_failures(
        check_output_metric(metric, z, generator=generator),
        expected_failures={"factor_per_example": "the weights are of one batch"},
    )


@pytest.mark.parametrize(
    ("weights", "error", "match"),
    [
        (torch.ones(5), rm.errors.ShapeError, r"pass \(6,\)"),
        (torch.ones(6, 4), rm.errors.ShapeError, r"pass \(6,\)"),
        (torch.tensor(1.0), rm.errors.ShapeError, r"pass \(6,\)"),
        (-torch.ones(6), rm.errors.OutputMetricError, "negative"),
        (torch.full((6,), float("nan")), rm.errors.OutputMetricError, "NaN"),
        (torch.zeros(6), rm.errors.EmptyBatchError, "skip it"),
        ([1.0] * 6, rm.errors.OutputMetricError, "the one tensor"),
        ({"a": torch.ones(6)}, rm.errors.OutputMetricError, "the one tensor"),
    ],
)
def test_weights_that_do_not_fit(
    weights: Any, error: type[Exception], match: str
) -> None:
    model = nn.Linear(IN, 4)
    metric = rm.LayerwiseMetric(model, Categorical())
    with metric.record():
        z = model(torch.randn(N, IN))
    with pytest.raises(error, match=match):
        metric.backward(F.cross_entropy(z, torch.arange(N) % 4), z, weights=weights)
    assert model.weight.grad is None
    metric.backward(F.cross_entropy(z, torch.arange(N) % 4), z)


def test_gauss_newton_knows_none() -> None:
    model, x = nn.Linear(IN, 4), torch.randn(N, IN)
    metric = rm.LayerwiseMetric(model, Categorical())
    optimizer = rm.optim.GaussNewton(metric)
    y = torch.arange(N) % 4
    with metric.record():
        z = model(x)
    metric.backward(F.cross_entropy(z, y), z, weights=torch.ones(N))
    with pytest.raises(rm.errors.OutputMetricError, match="LevenbergMarquardt"):
        optimizer.step(lambda: model(x), lambda z: F.cross_entropy(z, y))
    # Also where only one pass of a batch was weighted.
    for weights in (torch.ones(N), None):
        with metric.record():
            z = model(x)
        more = weights is not None
        metric.backward(F.cross_entropy(z, y), z, weights=weights, accumulate=more)
    with pytest.raises(rm.errors.OutputMetricError, match="LevenbergMarquardt"):
        optimizer.step(lambda: model(x), lambda z: F.cross_entropy(z, y))
