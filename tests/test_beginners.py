"""Mistakes that a beginner makes: each is an error that says what to write instead."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.errors import (
    LinearizationError,
    LostManifoldError,
    ManifoldContractError,
    MassError,
    NotRecordedError,
    OutputMetricError,
    ShapeError,
)

X, Y = torch.randn(8, 4, dtype=torch.float64), torch.arange(8) % 3


def setting(**options: object) -> tuple[nn.Module, rm.LayerwiseMetric]:
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    return model, rm.LayerwiseMetric(model, rm.output.Categorical(), **options)


def passed(model: nn.Module, metric: rm.LayerwiseMetric) -> Tensor:
    with metric.record():
        z = model(X)
    metric.backward(F.cross_entropy(z, Y), z)
    return z


@pytest.mark.parametrize(
    "given", [(), ("mse",), (nn.MSELoss(),), ([nn.CrossEntropyLoss()],)]
)
def test_a_metric_without_an_output_metric(given: tuple[object, ...]) -> None:
    words = (
        r"Categorical\(\) for cross entropy.*Euclidean\(2 / d\) for MSE of d outputs"
    )
    with pytest.raises(TypeError, match=words):
        rm.LayerwiseMetric(nn.Linear(4, 3), *given)


def test_output_metrics_by_name_for_a_tuple() -> None:
    model = nn.Linear(4, 3)
    metric = rm.LayerwiseMetric(model, {"class": rm.output.Categorical()})
    with metric.record():
        z = model(X)
    with pytest.raises(OutputMetricError, match="or give a list of output metrics"):
        metric.pull_back((z,))
    with pytest.raises(OutputMetricError, match=r"with these keys$"):
        metric.pull_back({"other": z})


class Speech(nn.Module):
    """Returns (time, examples, classes), as ctc_loss wants it."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.last = kind, nn.Linear(6, 3)
        self.conv = nn.Conv1d(4, 6, 3, padding=1)
        self.lstm = nn.LSTM(4, 6, batch_first=kind == "lstm")

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "conv":
            return self.last(self.conv(x.mT).mT).transpose(0, 1)
        if self.kind == "lstm":
            return self.last(self.lstm(x)[0]).transpose(0, 1)
        return self.last(self.lstm(x.transpose(0, 1))[0])


@pytest.mark.parametrize("kind", ["conv", "lstm", "time first"])
def test_time_in_front_of_the_examples(kind: str) -> None:
    model = Speech(kind)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    for back in (False, True):
        with metric.record():
            z = model(torch.randn(3, 5, 4))
        if back:
            metric.pull_back(z.transpose(0, 1))
        else:
            match = r"0 of the outputs must be the examples.*z\.transpose\(0, 1\)"
            with pytest.raises(LinearizationError, match=match):
                metric.pull_back(z)


@dataclass
class Both:
    label: Tensor
    amount: Tensor
    other: object = None


class Pair(NamedTuple):
    label: Tensor
    amount: Tensor


class Fields(OrderedDict):
    """A dictionary with attributes, and more in it, like those of transformers."""

    def __init__(self, **fields: Tensor) -> None:
        super().__init__(**fields, past=fields["label"])
        self.label, self.amount = fields["label"], fields["amount"]


@pytest.mark.parametrize("kind", [Both, Pair, Fields])
def test_outputs_that_are_fields_of_an_object(kind: Callable[..., Any]) -> None:
    class Heads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.label, self.amount = nn.Linear(4, 3), nn.Linear(4, 1)

        def forward(self, x: Tensor) -> Any:
            return kind(label=self.label(x), amount=self.amount(x))

    output = {"label": rm.output.Categorical(), "amount": rm.output.Euclidean()}
    model = Heads()
    found = []
    for plain in (False, True):
        metric = rm.LayerwiseMetric(model, output, mass=0.1)
        with metric.record():
            z = model(X)
        loss = z.label.logsumexp(1).mean() + z.amount.square().mean()
        given = {"label": z.label, "amount": z.amount} if plain else z
        metric.backward(loss, given)
        found.append(metric.natural_gradient())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("output", [rm.output.Euclidean(), None])
def test_an_object_where_the_metrics_are_in_a_list(output: Any) -> None:
    model = nn.Linear(4, 3)
    metric = rm.LayerwiseMetric(model, [rm.output.Categorical(), output])
    with metric.record():
        z = model(X)
    with pytest.raises(OutputMetricError, match="got a Both; hand on a tuple of as"):
        metric.backward(z.square().mean(), Both(z, z))


def test_a_backward_pass_that_was_not_recorded() -> None:
    model, metric = setting()
    passed(model, metric)
    z = model(X)
    with pytest.raises(NotRecordedError, match=r"^run the model inside 'with metric"):
        metric.backward(F.cross_entropy(z, Y), z)


def test_manifolds_declared_after_the_metric() -> None:
    model, metric = setting()
    rm.geometrize(model, {"0.weight": rm.manifolds.Stiefel()})
    with pytest.raises(LostManifoldError, match="geometrize before the metric is"):
        passed(model, metric)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    passed(model, metric)


def test_two_backward_passes_through_one_recorded_pass() -> None:
    model, metric = setting()
    z = passed(model, metric)
    with pytest.raises(NotRecordedError, match=r"linearised already.*one \+ other"):
        metric.backward(F.cross_entropy(z, Y), z)
    passed(model, metric)


@pytest.mark.parametrize(
    "make", [rm.optim.RiemannianSGD, rm.optim.LevenbergMarquardt, rm.optim.TrustRegion]
)
def test_zero_grad_between_backward_and_step(make: type) -> None:
    model, metric = setting()
    optimizer = make(metric)
    searching = make is not rm.optim.RiemannianSGD
    given = [lambda: F.cross_entropy(model(X), Y)] if searching else []
    passed(model, metric)
    optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(NotRecordedError, match=r"zero_grad\(\) after metric\.backward"):
        optimizer.step(*given)
    assert all(map(torch.equal, before, model.parameters()))
    optimizer.zero_grad()
    passed(model, metric)
    optimizer.step(*given)
    assert not all(map(torch.equal, before, model.parameters()))


@pytest.mark.parametrize("make", [rm.optim.LevenbergMarquardt, rm.optim.TrustRegion])
def test_a_learning_rate_where_there_is_none(make: type) -> None:
    _, metric = setting()
    with pytest.raises(TypeError, match=rf"no learning rate.*{make.__name__}\(metric"):
        make(metric, lr=1.0)


@pytest.mark.parametrize("make", [rm.optim.LevenbergMarquardt, rm.optim.TrustRegion])
def test_two_functions_where_one_evaluates_the_loss(make: type) -> None:
    model, metric = setting()
    with pytest.raises(TypeError, match=r"2 arguments.*only evaluates the loss"):
        make(metric).step(lambda: model(X), lambda z: F.cross_entropy(z, Y))


class Tagger(nn.Module):
    """A class for every position; ``torch_order``: as torch's losses want them."""

    def __init__(self, torch_order: bool) -> None:
        super().__init__()
        self.layer, self.torch_order = nn.Linear(4, 3), torch_order

    def forward(self, x: Tensor) -> Tensor:
        z = self.layer(x)
        return z.movedim(-1, 1) if self.torch_order else z


@pytest.mark.parametrize("sampled", [False, True])
def test_classes_in_dimension_one(sampled: bool) -> None:
    torch.manual_seed(0)
    x, y = torch.randn(6, 5, 4), torch.randint(3, (6, 5))
    output: rm.output.OutputMetric = rm.output.Categorical()
    output = rm.output.Sampled(output) if sampled else output
    wrong, right = Tagger(True), Tagger(False)
    metric = rm.LayerwiseMetric(wrong, output)
    with metric.record():
        z = wrong(x)
    with pytest.raises(ShapeError, match=r"\(6, 3, 5\).*z\.movedim\(1, -1\)"):
        metric.backward(F.cross_entropy(z, y), z)
    metric = rm.LayerwiseMetric(right, output)
    for weight in (None, torch.tensor([1.0, 2.0, 0.5])):
        with metric.record():
            z = right(x)
        metric.backward(F.cross_entropy(z.movedim(-1, 1), y, weight), z)


def test_the_class_of_a_manifold_in_its_place() -> None:
    with pytest.raises(ManifoldContractError, match=r"call it: Stiefel\(\)"):
        rm.nn.Linear(4, 3, manifold=rm.manifolds.Stiefel)


def test_masses_that_do_not_reach_all() -> None:
    with pytest.raises(MassError, match=r"name: there is no mass for.*'\*' for all"):
        setting(mass={"*.bias": 0.1})
    with pytest.raises(MassError, match=r"name: no parameter matches \['head'\]; use"):
        setting(mass={"head": 0.1, "*": 0.1})


def test_a_block_that_is_not_there() -> None:
    model, metric = setting()
    optimizer = rm.optim.RiemannianSGD(metric)
    passed(model, metric)
    optimizer.step()
    with pytest.raises(KeyError, match=r"no block is called '1'; there are '0', '2'"):
        optimizer.report["1"]


def test_a_block_of_the_metric_that_is_not_there() -> None:
    model, metric = setting()
    with pytest.raises(KeyError, match=r"before the first pass; call metric\.backward"):
        metric.blocks["0"]
    passed(model, metric)
    for _ in range(2):
        with pytest.raises(
            KeyError, match=r"no block is called '1'; there are '0', '2'"
        ):
            metric.blocks["1"]
        assert metric.blocks.get("1") is None
        metric.scale_mass(2.0)


def test_a_manifold_without_a_name() -> None:
    model, _ = setting()
    with pytest.raises(TypeError, match=r"such as \{'0\.weight': Stiefel\(\)\}"):
        rm.geometrize(model, rm.manifolds.Stiefel())


@pytest.mark.parametrize("rest", [(), (2,)])
def test_flattened_outputs(rest: tuple[int, ...]) -> None:
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.GRU(4, 8, batch_first=True), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            z = self.head(self.core(x)[0])
            return z if not rest else z.unsqueeze(2).expand(-1, -1, *rest, -1)

    model, x = Recurrent(), torch.randn(10, 6, 4, dtype=torch.float64)
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    with metric.record():
        z = model(x).flatten(0, 1)
    words = r"60 = 10 x 6 rows: if they were flattened, hand on .* \(10, 6, \.\.\.\)"
    with pytest.raises(LinearizationError, match=words):
        metric.backward(z.square().mean(), z)


def test_outputs_that_are_put_together_for_the_metric() -> None:
    model, metric = setting()
    with metric.record():
        a, b = model(X[:4]), model(X[4:])
    loss = F.cross_entropy(a, Y[:4]) + F.cross_entropy(b, Y[4:])
    with pytest.raises(NotRecordedError, match=r"once on torch\.cat of the inputs"):
        metric.backward(loss, torch.cat([a, b]))


class StateOnly(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.cell(x)[0]


UNBATCHED = {
    "linear": (lambda: nn.Linear(4, 3), (4,)),
    "gru": (lambda: nn.GRUCell(4, 3), (4,)),
    "rnn": (lambda: nn.RNNCell(4, 3), (4,)),
    "lstm": (StateOnly, (4,)),
    "conv1d": (lambda: nn.Conv1d(2, 3, 2), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(1, 3, 2), (1, 5, 5)),
    "transposed": (lambda: nn.ConvTranspose1d(2, 3, 2), (2, 5)),
    "instance": (lambda: nn.InstanceNorm1d(3, affine=True), (3, 5)),
    "layer": (lambda: nn.LayerNorm(3), (3,)),
    "rms": (lambda: nn.RMSNorm(3), (3,)),
    "embedding": (lambda: nn.Embedding(5, 3), ()),
}


@pytest.mark.parametrize("name", UNBATCHED)
def test_an_example_without_a_batch(name: str) -> None:
    make, shape = UNBATCHED[name]
    torch.manual_seed(0)
    model = make()
    x = torch.zeros(shape).long() if name == "embedding" else torch.randn(shape)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean())
    with metric.record():
        z = model(x)
    with pytest.raises(LinearizationError, match=r"a batch dimension with unsqueeze"):
        metric.backward(z.square().mean(), z)
    with metric.record():
        z = model(x.unsqueeze(0))
    metric.backward(z.square().mean(), z)


def test_a_model_that_changes_its_ways() -> None:
    class Changing(nn.Module):
        plain = True

        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            if self.plain:
                return self.layer(x)
            return F.linear(x, self.layer.weight, self.layer.bias)

    model = Changing()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    for _ in range(3):
        passed(model, metric)
    model.plain = False
    with pytest.raises(LinearizationError, match="record this pass again"):
        passed(model, metric)
    passed(model, metric)


def test_second_derivatives_that_torch_lacks() -> None:
    class Attending(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, batch_first=True)
            self.last = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.attention(x, x, x, need_weights=False)[0]).sum(1)

    x = torch.randn(8, 5, 4)
    model = Attending()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    optimizer = rm.optim.GaussNewton(metric)
    with metric.record():
        z = model(x)
    metric.pull_back(z)
    with pytest.raises(LinearizationError, match=r"sdpa_kernel\(SDPBackend\.MATH\)"):
        optimizer.step(lambda: model(x), lambda z: F.cross_entropy(z, Y))
    kernel, math = torch.nn.attention.sdpa_kernel, torch.nn.attention.SDPBackend.MATH
    with kernel(math):
        optimizer.step(lambda: model(x), lambda z: F.cross_entropy(z, Y))
    assert optimizer.report.accepted


@pytest.mark.parametrize("kind", [rm.optim.MassSchedule, rm.optim.ProbeSchedule])
def test_a_schedule_of_an_optimizer(kind: type) -> None:
    _, metric = setting()
    optimizer = rm.optim.RiemannianSGD(metric)
    with pytest.raises(TypeError, match=r"Schedule\(metric, function\)"):
        kind(optimizer, lambda step: 1)


def test_a_lazy_layer_without_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(LinearizationError, match="call the model once"):
        rm.LayerwiseMetric(model, rm.output.Categorical())
    model(X)
    rm.LayerwiseMetric(model, rm.output.Categorical())
