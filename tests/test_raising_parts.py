"""Parts that raise: the checks turn it into findings, the library into its errors."""

import math

import geoopt
import pytest
import torch
import torch.nn.functional as F
from mutants import raising as mutants
from mutants.metrics import layer
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules import testing as t
from riemannian_modules.errors import LinearizationError, NonFiniteError, ShapeError
from riemannian_modules.testing.guarded import guarded, worst

X = torch.linspace(-1.0, 1.0, 30, dtype=torch.float64).sin().view(6, 5)


def point() -> Tensor:
    return F.normalize(torch.randn(4), dim=0)


def failed(results: list[t.CheckResult]) -> dict[str, str]:
    return {result.name: result.message for result in t.failures(results)}


# ---- checks ------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", mutants.WRONG)
@pytest.mark.parametrize("method", mutants.METHODS)
def test_a_manifold(method: str, wrong: str) -> None:
    broken = mutants.manifold(method, mutants.WRONG[wrong])
    found = failed(t.check_base_manifold(broken, point()))
    assert found
    if wrong == "raises":
        assert "ValueError: boom" in found["raised"]
        assert "raising.py line" in found["raised"]


@pytest.mark.parametrize("wrong", mutants.WRONG)
def test_a_retraction(wrong: str) -> None:
    retraction = mutants.Broken(mutants.WRONG[wrong])
    assert failed(t.check_retraction(geoopt.Sphere(), retraction, point()))


def test_a_retraction_without_an_order() -> None:
    found = failed(t.check_retraction(geoopt.Sphere(), mutants.Unordered(), point()))
    assert list(found) == ["raised"]
    assert "boom (in order," in found["raised"]


@pytest.mark.parametrize("wrong", mutants.WRONG)
def test_an_output_metric(wrong: str) -> None:
    output = mutants.BrokenRows(mutants.WRONG[wrong])
    results = t.check_output_metric(output, torch.randn(3, 4))
    assert ("raised" if wrong == "raises" else "factor_shape") in failed(results)


def test_an_output_metric_without_a_residual() -> None:
    results = t.check_output_metric(mutants.RaisingResidual(), torch.randn(3, 4))
    words = [result.message for result in t.failures(results)]
    assert any("the residual: ValueError: boom" in each for each in words)
    # What does not need it is measured all the same.
    assert {"factor_per_example", "terms", "sample_unbiased"} <= {
        result.name for result in results if result.passed
    }


@pytest.mark.parametrize(
    ("metric", "name"),
    [
        (lambda: layer(mutants.RaisingSharp), "raised"),
        (lambda: layer(mutants.NanSharp), "tangent"),
        (lambda: layer(factor=mutants.RaisingRows), "raised"),
    ],
    ids=["raises", "nan", "rows"],
)
def test_a_layer_metric(metric, name: str) -> None:
    assert name in failed(t.check_metric(metric()))


@pytest.mark.parametrize("rule", mutants.RULES)
def test_a_rule(rule: str) -> None:
    wrong, _ = mutants.RULES[rule]
    found = failed(t.check_rule(mutants.adapter(wrong), X))
    assert "layer 'layer' (Adapter)" in found["factor"]


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (nn.Tanh(), X),
        (nn.Linear(4, 3), X),
        (nn.Linear(5, 3), torch.full((4, 5), torch.nan)),
    ],
    ids=["no-parameters", "does-not-run", "nan"],
)
def test_a_layer(layer: nn.Module, x: Tensor) -> None:
    assert failed(t.check_rule(layer, x))
    output = rm.output.Euclidean()
    found = failed(t.check_module(layer, x, output, lambda z: z.square().mean()))
    assert set(found) & {"raised", "gradient"}


@pytest.mark.parametrize("wrong", mutants.WRONG)
def test_a_module_with_an_output_metric(wrong: str) -> None:
    output = mutants.BrokenRows(mutants.WRONG[wrong])
    results = t.check_module(nn.Linear(5, 3), X, output, lambda z: z.square().mean())
    assert "raised" in failed(results)


def test_good_parts_raise_nothing() -> None:
    t.raise_failures(t.check_rule(mutants.adapter(mutants.right), X))


def test_nan_is_the_worst() -> None:
    assert worst([0.0, 2.0, 1.0]) == 2.0
    assert all(math.isnan(worst(each)) for each in ([1.0, math.nan], [math.nan, 1.0]))


def test_findings_before_an_exception_are_kept() -> None:
    good = t.CheckResult.at_most("first", 0.0, 1.0, "fine")

    def laws():
        yield good
        raise KeyError("second")

    first, last = guarded("some laws", laws)
    assert first is good
    assert not last.passed
    assert "some laws: KeyError: 'second' (in laws," in last.message


def test_an_interruption_is_no_finding() -> None:
    def laws():
        raise KeyboardInterrupt
        yield

    with pytest.raises(KeyboardInterrupt):
        list(guarded("some laws", laws))


# ---- the library -------------------------------------------------------------------


@pytest.mark.parametrize("rule", mutants.RULES)
def test_backward_names_the_layer_and_the_parameter_of_a_wrong_rule(rule: str) -> None:
    wrong, words = mutants.RULES[rule]
    model = nn.Sequential(mutants.adapter(wrong), nn.Tanh(), nn.Linear(4, 3))
    metric = rm.LayerwiseMetric(model, rm.output.Categorical())
    with metric.record():
        z = model(X)
    with pytest.raises(LinearizationError, match=words) as caught:
        metric.backward(F.cross_entropy(z, torch.arange(6) % 3), z)
    assert "layer '0' (Adapter)" in str(caught.value)
    assert "'0.a'" in str(caught.value)
    assert (metric.version, metric.blocks) == (0, {})
    assert all(p.grad is None for p in model.parameters())


def test_a_rule_that_leaves_a_parameter_out_is_helped() -> None:
    # As for a subclass with a parameter of its own: the module above explains it.
    def partial(call):
        return {"a": mutants.right(call)["a"]}

    model = nn.Sequential(mutants.adapter(partial), nn.Linear(4, 3))
    output = rm.output.Categorical()
    loss = lambda z: F.cross_entropy(z, torch.arange(len(z)) % 3)  # noqa: E731
    t.raise_failures(t.check_module(model, X[:3], output, loss, reduction="sum"))


@pytest.mark.parametrize(
    ("wrong", "error", "words"),
    [
        (lambda z: torch.eye(3), ShapeError, r"\(3, 3\) for outputs of shape \(6, 3\)"),
        (lambda z: None, ShapeError, r"NoneType for"),
        (lambda z: torch.full((len(z), 1, 3), torch.nan), NonFiniteError, r"hold NaN"),
    ],
    ids=["shape", "nothing", "nan"],
)
def test_backward_names_a_wrong_output_metric(wrong, error, words: str) -> None:
    model = nn.Linear(5, 3)
    metric = rm.LayerwiseMetric(model, mutants.BrokenRows(wrong))
    with metric.record():
        z = model(X)
    with pytest.raises(error, match=words) as caught:
        metric.backward(z.square().mean(), z)
    assert "BrokenRows()" in str(caught.value)
    assert metric.version == 0
