"""Schedules: what they set, what they resume, and what they refuse."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import riemannian_modules as rm
from riemannian_modules.errors import MassError
from riemannian_modules.optim import MassSchedule, ProbeSchedule, RiemannianSGD


def make(output=None, mass=0.5):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))
    output = rm.output.Categorical() if output is None else output
    return model, rm.LayerwiseMetric(model, output, mass=mass)


def backward(metric):
    generator = torch.Generator().manual_seed(metric.passes)
    x = torch.randn(6, 4, generator=generator)
    with metric.record():
        z = metric.model(x)
    metric.backward(F.cross_entropy(z, torch.arange(6) % 2), z)


def masses(metric):
    return {d.name: d.mass.elementwise(d.tensor) for d in metric.parameters}


def test_masses_follow_the_function_from_where_they_began():
    diagonal = torch.rand(3, 4) + 0.1
    _, metric = make(mass={"0.weight": diagonal, "*": 0.5})
    schedule = MassSchedule(metric, lambda step: 1.0 / (1 + step))
    assert repr(schedule) == "MassSchedule(step 0)"
    for count in range(1, 4):
        schedule.step()
        found = masses(metric)
        torch.testing.assert_close(found["0.weight"], diagonal / (1 + count))
        assert found["2.bias"] == 0.5 / (1 + count)
    assert schedule.last_step == 3


def test_the_next_pull_back_has_the_new_mass():
    _, metric = make()
    schedule = MassSchedule(metric, lambda step: 10.0**step)
    backward(metric)
    before = metric.blocks["0"]
    schedule.step()
    assert before.parts[0].space.mass.scalar == 0.5
    backward(metric)
    assert metric.blocks["0"].parts[0].space.mass.scalar == 5.0


def test_a_schedule_resumes_bit_for_bit():
    runs = []
    for _ in range(2):
        model, metric = make()
        optimizer = RiemannianSGD(metric)
        runs.append((model, metric, optimizer, MassSchedule(metric, decay)))

    def train(run, count):
        for _ in range(count):
            backward(run[1])
            run[2].step()
            run[3].step()

    train(runs[0], 3)
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in runs[0]], buffer)
    buffer.seek(0)
    states = torch.load(buffer, weights_only=True)
    for part, state in zip(runs[1], states, strict=True):
        part.load_state_dict(state)
    runs[1][1].passes = runs[0][1].passes
    assert masses(runs[1][1]) == masses(runs[0][1])
    for run in runs:
        train(run, 3)
    for p, q in zip(runs[0][0].parameters(), runs[1][0].parameters(), strict=True):
        assert torch.equal(p, q)


def decay(step):
    return 0.7**step


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_a_factor_that_is_no_mass_changes_nothing(value):
    _, metric = make()
    schedule = MassSchedule(metric, lambda step: value if step else 1.0)
    before = copy.deepcopy(metric.state_dict())
    with pytest.raises(MassError, match="for step 1"):
        schedule.step()
    assert metric.state_dict() == before
    assert schedule.last_step == 0


@pytest.mark.parametrize("wrong", ["value", "other", "count"])
def test_a_state_that_does_not_fit_changes_nothing(wrong):
    _, metric = make()
    saved = MassSchedule(metric, decay)
    saved.step()
    saved.step()
    state = saved.state_dict()
    _, metric = make(mass=3.0)
    schedule = MassSchedule(
        metric, lambda step: -1.0 if wrong == "value" and step == 2 else 0.5**step
    )
    schedule.step()
    before = copy.deepcopy(metric.state_dict())
    if wrong == "other":
        state["start"] = {"nowhere": state["start"]["0.weight"]}
    if wrong == "count":
        del state["last_step"]
    with pytest.raises((MassError, KeyError)):
        schedule.load_state_dict(state)
    assert metric.state_dict() == before
    assert schedule.last_step == 1
    schedule.function = decay
    schedule.step()
    assert metric.parameters["0.weight"].mass.scalar == pytest.approx(3.0 * 0.7**2)


def test_probes_follow_the_function():
    sampled = rm.output.Sampled(rm.output.Categorical())
    _, metric = make(sampled)
    optimizer = RiemannianSGD(metric)
    schedule = ProbeSchedule(metric, lambda step: 1 + step)
    for count in range(1, 4):
        backward(metric)
        # One more for the gradient.
        assert metric.blocks["0"].rank == 6 * (count + 1)
        optimizer.step()
        schedule.step()
    other = ProbeSchedule(metric, lambda step: 10 + step)
    other.load_state_dict(schedule.state_dict())
    assert sampled.probes == 13
    assert repr(other) == "ProbeSchedule(step 3)"


def test_probes_of_several_outputs():
    outputs = {
        "a": rm.output.Sampled(rm.output.Categorical()),
        "b": rm.output.Euclidean(),
        "c": rm.output.Sampled(rm.output.Euclidean()),
    }
    _, metric = make(outputs)
    ProbeSchedule(metric, lambda step: 3)
    assert outputs["a"].probes == outputs["c"].probes == 3


def test_probes_are_any_whole_number():
    sampled = rm.output.Sampled(rm.output.Categorical())
    ProbeSchedule(make(sampled)[1], lambda step: torch.arange(4).numpy()[2])
    assert type(sampled.probes) is int
    assert sampled.probes == 2


@pytest.mark.parametrize("value", [0, 1.5, "two", True])
def test_probes_are_a_positive_number(value):
    _, metric = make(rm.output.Sampled(rm.output.Categorical()))
    with pytest.raises(ValueError, match="at least one row"):
        ProbeSchedule(metric, lambda step: value)


def test_an_exact_output_has_no_probes():
    _, metric = make()
    with pytest.raises(ValueError, match="has all its rows"):
        ProbeSchedule(metric, lambda step: 2)
