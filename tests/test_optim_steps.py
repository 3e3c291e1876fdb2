"""Steps of a length that is found: what they minimise, and where they end."""

import copy
import io
import json
import math
import re
from dataclasses import replace
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from mutants.steps import MUTANTS
from scripts import REPOSITORY
from torch import nn

import riemannian_modules as rm
from riemannian_modules.optim import RiemannianSGD, motion, proposal
from riemannian_modules.optim.quadratic import Numbers
from riemannian_modules.testing.reference import dense_sharp

SEEDS = st.integers(0, 2**31 - 1)
# Every example trains a model, and a seed does not get simpler.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
MANIFOLDS = {
    "Euclidean": None,
    "Stiefel": rm.manifolds.Stiefel(),
    "Sphere": rm.manifolds.Sphere(),
    "PoincareBall": rm.manifolds.PoincareBall(),
}
MASS = 0.1


class Problem:
    """A small classifier, its metric and its batch."""

    def __init__(self, seed=0, blocks="layer", manifold=None, sampled=False, mass=MASS):
        torch.manual_seed(seed)
        self.model = rm.nn.Sequential(
            rm.nn.Linear(5, 4, manifold=copy.deepcopy(manifold)),
            nn.Tanh(),
            rm.nn.Linear(4, 3),
        )
        self.x, self.y = torch.randn(7, 5), torch.randint(3, (7,))
        output = rm.output.Categorical()
        if sampled:
            generator = torch.Generator().manual_seed(seed)
            output = rm.output.Sampled(output, generator=generator)
        self.metric = rm.LayerwiseMetric(
            self.model, output=output, mass=mass, blocks=blocks
        )

    def backward(self):
        with self.metric.record():
            z = self.model(self.x)
        loss = F.cross_entropy(z, self.y)
        self.metric.backward(loss, z)
        return float(loss.detach())

    def loss(self):
        with torch.no_grad():
            return float(F.cross_entropy(self.model(self.x), self.y))

    def values(self):
        return {
            n: p.detach().as_subclass(torch.Tensor).clone()
            for n, p in self.model.named_parameters()
        }

    def gradient(self):
        return {n: p.grad.clone() for n, p in self.model.named_parameters()}

    def factors(self):
        return {
            part.name: part.factor.to_dense().flatten(1)
            for block in self.metric.blocks.values()
            for part in block.parts
        }

    def before(self, optimizer):
        """The step before, as a tangent vector at the present point."""
        return {
            d.name: d.space().project(optimizer.state[d.tensor]["step_buffer"])
            for d in self.metric.parameters
            if "step_buffer" in optimizer.state[d.tensor]
        }


class Dense:
    """Everything about the model of one pass, with matrices."""

    def __init__(self, problem):
        spaces = {d.name: d.space() for d in problem.metric.parameters}
        self.spaces = {n: replace(s, point=s.point.clone()) for n, s in spaces.items()}
        self.blocks = [
            [part.name for part in block.parts]
            for block in problem.metric.blocks.values()
        ]
        self.K = problem.factors()
        self.h = problem.gradient()
        self.loss = float(problem.metric.loss)

    def image(self, u):
        return sum(self.K[n] @ u[n].reshape(-1) for n in u)

    def mass(self, u, v):
        return sum(
            s.mass.scalar * s.manifold.inner(s.point, u[n], v[n], keepdim=True).sum()
            for n, s in self.spaces.items()
        )

    def slope(self, u):
        return sum((self.h[n] * u[n]).sum() for n in u)

    def norm(self, u):
        return float((self.image(u).square().sum() + self.mass(u, u)).sqrt())

    def predicted(self, u):
        """The loss that the model predicts."""
        return self.loss + self.slope(u) + 0.5 * self.image(u).square().sum()

    def sharp(self, e):
        x = {}
        for names in self.blocks:
            own = {name: self.spaces[name] for name in names}
            x.update(dense_sharp(own, self.K, e))
        return x

    def candidate(self, before, spring):
        """Each block's minimum with the others, and itself, at ``spring d``."""
        if not before:
            return {n: -x for n, x in self.sharp(self.h).items()}
        shift = spring * self.image(before)
        e = {
            n: g + (self.K[n].mT @ shift).view_as(g) if n in self.K else g
            for n, g in self.h.items()
        }
        return {n: -x for n, x in self.sharp(e).items()}


def combined(c, directions):
    return {
        n: sum(a * u[n] for a, u in zip(c, directions, strict=True))
        for n in directions[0]
    }


def steps(problem, optimizer, count):
    for _ in range(count):
        problem.backward()
        optimizer.step()


def automatic_findings(problem, optimizer, spring, part=0.0):
    """Take one step and compare it with the dense model's.

    The floor is so much of the loss.
    """
    steps(problem, optimizer, 2)
    optimizer.param_groups[0]["trust"] = None
    floor = part * problem.backward()
    optimizer.param_groups[0]["floor"] = floor
    dense, before = Dense(problem), problem.before(optimizer)
    start = problem.values()
    optimizer.step()
    report = optimizer.report.motion
    share = report.share
    # Without a step before nobody knows what sampled rows are worth.
    sampled = isinstance(problem.metric.output, rm.output.Sampled)
    whole = share / motion.FIRST if sampled else share
    directions = [dense.candidate(before, spring), before]
    c = torch.tensor([report.length, report.carried]) / share
    c.requires_grad_(True)
    u = combined(c, directions)
    away = combined([c[0], c[1] - spring], directions)
    objective = dense.predicted(u) + 0.5 * dense.mass(away, away)
    (slope,) = torch.autograd.grad(objective, c)
    scale = max(abs(float(dense.slope(v))) for v in directions)
    taken = {n: share * v.detach() for n, v in u.items()}
    end = {n: whole * v.detach() for n, v in u.items()}
    reached = float(dense.predicted(end)) - floor
    c = c.detach()
    if abs(float(c[1])) > 1.0 - 1e-12:
        # More of the step before would be better, and is not taken.
        slope = torch.stack([slope[0], (slope[1] * c[1].sign()).clamp_min(0.0)])
    ends = {
        n: s.manifold.retr(s.point, taken[n]).sub(v).abs().max()
        for (n, s), v in zip(
            dense.spaces.items(), problem.values().values(), strict=True
        )
    }
    return {
        "stationary": float(slope.abs().max()) <= 1e-9 * max(scale, 1e-3),
        "credible": reached >= -1e-9,
        "far enough": math.isclose(whole, 1.0) or abs(reached) < 1e-9,
        "smallest": all(
            float(dense.predicted({n: t * v for n, v in end.items()})) > floor - 1e-9
            for t in (0.25, 0.5, 0.75)
        ),
        "ends": max(map(float, ends.values())) < 1e-9,
        "decrease": math.isclose(
            report.predicted_decrease,
            dense.loss - float(dense.predicted(taken)),
            rel_tol=1e-8,
            abs_tol=1e-12,
        ),
        "norm": math.isclose(report.norm, dense.norm(taken), rel_tol=1e-8),
        "moved": any(not torch.equal(v, start[n]) for n, v in problem.values().items()),
    }


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(
    seed=SEEDS,
    spring=st.sampled_from([0.0, 0.8]),
    sampled=st.booleans(),
    part=st.sampled_from([0.0, 0.7]),
)
@settings(max_examples=5, phases=NO_SHRINKING)
def test_an_automatic_step_minimises_the_joint_model(
    blocks, manifold, seed, spring, sampled, part
):
    problem = Problem(seed, blocks, MANIFOLDS[manifold], sampled)
    optimizer = RiemannianSGD(problem.metric, spring=spring)
    findings = automatic_findings(problem, optimizer, spring, part)
    assert all(findings.values()), findings


def spring_findings(problem, beta=0.7, lr=0.3):
    optimizer = RiemannianSGD(problem.metric, lr=lr, spring=beta)
    steps(problem, optimizer, 2)
    problem.backward()
    dense, before = Dense(problem), problem.before(optimizer)
    optimizer.step()
    # The proximal problem min df(u) + |Ku|^2/2 + mu |u - beta d|^2/2 itself.
    pulled = {n: dense.h[n] - beta * s.flat(before[n]) for n, s in dense.spaces.items()}
    expected = {n: -x for n, x in dense.sharp(pulled).items()}
    ends = {
        n: s.manifold.retr(s.point, lr * expected[n]) for n, s in dense.spaces.items()
    }
    error = max(float((problem.values()[n] - v).abs().max()) for n, v in ends.items())
    return {"ends": error < 1e-10}


@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(seed=SEEDS, sampled=st.booleans())
@settings(max_examples=5, phases=NO_SHRINKING)
def test_a_spring_is_the_centre_of_the_proximal_problem(manifold, seed, sampled):
    problem = Problem(seed, "model", MANIFOLDS[manifold], sampled)
    findings = spring_findings(problem)
    assert all(findings.values()), findings


def test_the_first_step_of_a_spring_is_the_plain_one():
    problems = [Problem(), Problem()]
    for problem, options in zip(problems, ({}, {"spring": 0.5}), strict=True):
        steps(problem, RiemannianSGD(problem.metric, lr=0.3, **options), 1)
    for name, value in problems[0].values().items():
        torch.testing.assert_close(value, problems[1].values()[name])


def clip_findings(problem, clip=0.05):
    optimizer = RiemannianSGD(problem.metric, lr=0.5, clip=clip)
    problem.backward()
    dense, start = Dense(problem), problem.values()
    long = {n: -0.5 * x for n, x in dense.sharp(dense.h).items()}
    optimizer.step()
    moved = {n: v - start[n] for n, v in problem.values().items()}
    share = optimizer.report.motion.share
    return {
        "long": dense.norm(long) > 2.0 * clip,
        "length": math.isclose(dense.norm(moved), clip, rel_tol=1e-10),
        "direction": all(
            torch.allclose(moved[n], share * u, atol=1e-12) for n, u in long.items()
        ),
        "reported": math.isclose(optimizer.report.motion.norm, clip, rel_tol=1e-10),
    }


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_clipping_is_in_the_metric_norm(blocks):
    findings = clip_findings(Problem(blocks=blocks))
    assert all(findings.values()), findings


LAWS = {
    "automatic": lambda: automatic_findings(
        problem := Problem(5, "layer", mass=0.02),
        RiemannianSGD(problem.metric, spring=0.8),
        0.8,
    ),
    "floor": lambda: automatic_findings(
        problem := Problem(6, "layer"), RiemannianSGD(problem.metric), 0.8, 0.7
    ),
    "spring": lambda: spring_findings(Problem(3, "model")),
    "clip": lambda: clip_findings(Problem(blocks="layer")),
}


@pytest.mark.parametrize("law", LAWS)
def test_the_laws_hold(law):
    findings = LAWS[law]()
    assert all(findings.values()), findings


@pytest.mark.parametrize("name", MUTANTS)
def test_wrong_steps_are_rejected(name, monkeypatch):
    attribute, wrong = MUTANTS[name]
    if attribute == "_solve":
        right = proposal._solve
        # The mutant calls the right one.
        monkeypatch.setattr(
            proposal, "_solve", lambda m, p, s: with_right(wrong, right, m, p, s)
        )
    else:
        monkeypatch.setattr(proposal, attribute, wrong)
    assert any(not all(law().values()) for law in LAWS.values())


def with_right(wrong, right, metric, plans, shift):
    held, proposal._solve = proposal._solve, right
    try:
        return wrong(metric, plans, shift)
    finally:
        proposal._solve = held


# --- the numbers


def numbers(seed, rank=4):
    torch.manual_seed(seed)
    images, roots = torch.randn(2, rank), torch.randn(2, 2)
    return Numbers(images @ images.mT, roots @ roots.mT, torch.randn(2))


@given(seed=SEEDS, spring=st.floats(0.0, 0.95), scale=st.sampled_from([1e-8, 1.0, 1e6]))
def test_the_best_pair_solves_the_equations(seed, spring, scale):
    found = numbers(seed)
    size = torch.tensor([1.0, scale])
    table = size.outer(size)
    scaled = Numbers(found.curvature * table, found.weight * table, found.slopes * size)
    c = motion.best_pair(scaled, spring)
    right = -scaled.slopes + spring * scaled.weight[:, 1]
    left = scaled.damped @ c
    torch.testing.assert_close(left[0], right[0], rtol=1e-7, atol=1e-7)
    assert abs(float(c[1])) <= 1.0
    if abs(float(c[1])) < 1.0:
        torch.testing.assert_close(left / size, right / size, rtol=1e-7, atol=1e-7)
    else:
        assert float((right[1] - left[1]) * c[1]) >= -1e-7


@given(seed=SEEDS, spring=st.floats(0.0, 0.9))
def test_dependent_directions_share_a_step(seed, spring):
    torch.manual_seed(seed)
    image, weight, slope = torch.randn(4), torch.rand(()) + 0.1, -torch.rand(()) - 0.1
    size = torch.tensor([1.0, 2.0])
    table = size.outer(size)
    twice = Numbers(table * image.square().sum(), table * weight, slope * size)
    c = motion.best_pair(twice, 0.0)
    along = -slope / (image.square().sum() + weight)
    torch.testing.assert_close(c @ size, along, rtol=1e-9, atol=0.0)
    zero = Numbers(
        twice.curvature * torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        twice.weight * torch.tensor([[1.0, 0.0], [0.0, 0.0]]),
        twice.slopes * torch.tensor([1.0, 0.0]),
    )
    torch.testing.assert_close(motion.best_pair(zero, spring)[0], along)
    assert motion.best_pair(zero, spring)[1] == 0.0


# Squares of smaller numbers are zero.
SIZED_SLOPES = st.floats(-10.0, -1e-100) | st.floats(0.0, 1.0)


@given(
    slope=SIZED_SLOPES,
    curvature=st.just(0.0) | st.floats(1e-100, 10.0),
    gap=st.floats(-1.0, 0.0) | st.floats(1e-100, 5.0),
)
def test_the_credible_share_is_the_first_point_at_the_floor(slope, curvature, gap):
    s, c, g = torch.tensor([slope, curvature, gap])
    t = float(motion.credible_share(s, c, g))
    assert 0.0 < t <= 1.0 or (t == 0.0 and gap < 1e-300)

    def model(t):
        return gap + t * slope + 0.5 * t * t * curvature

    if gap <= 0.0 or slope >= 0.0:
        assert t == 1.0
    elif t < 1.0:
        assert abs(model(t)) <= 1e-9 * (gap - slope)
    else:
        assert min(model(i / 50) for i in range(50)) >= -1e-9 * (gap - slope)


@given(seed=SEEDS)
def test_curvature_that_new_rows_confirm_is_not_corrected(seed):
    found, c = numbers(seed), torch.randn(2)
    trust = motion.foreseen(found, c, None)
    for _ in range(5):
        seen = motion.renewed(trust, c @ found.curvature @ c, torch.zeros(()))
        same, factor = motion.corrected(found, seen)
        assert factor == 1.0
        torch.testing.assert_close(same.curvature, found.curvature)
        trust = motion.foreseen(found, c, seen)


@given(seed=SEEDS, true=st.floats(2.0, 1e4))
def test_curvature_that_new_rows_find_larger_is_corrected(seed, true):
    # The rows show a part of the curvature along the candidate only.
    found, c = numbers(seed), torch.randn(2).abs() + 0.1
    real = found.curvature.clone()
    real[0, 0] *= true
    trust = None
    for _ in range(5):
        trust = motion.foreseen(found, c, trust)
        trust = motion.renewed(trust, c @ real @ c, torch.zeros(()))
    better, factor = motion.corrected(found, trust)
    assert float(factor) == pytest.approx(max(1.0, true / 1.5), rel=1e-6)
    assert float(better.curvature[0, 0]) == pytest.approx(
        float(factor * found.curvature[0, 0]), rel=1e-12
    )


@given(seed=SEEDS, true=st.floats(1e2, 1e30))
def test_one_step_that_went_too_far_is_forgotten(seed, true):
    found, c = numbers(seed), torch.randn(2)
    trust = motion.foreseen(found, c, None)
    trust = motion.renewed(trust, true * (c @ found.curvature @ c), torch.zeros(()))
    _, first = motion.corrected(found, trust)
    # The curvature that does not need the check may be most of it.
    assert 1.0 <= first <= 1e4 / 1.5 * (1.0 + 1e-9)
    # The next ones are shorter by that, and as they were foreseen.
    trust = motion.foreseen(found, c / first, trust)
    for _ in range(8):
        short = c / motion.corrected(found, trust)[1]
        trust = motion.foreseen(found, short, trust)
        curvature = short @ found.curvature @ short
        trust = motion.renewed(trust, curvature, torch.zeros(()), some_rows=False)
    _, last = motion.corrected(found, trust)
    assert last <= 100.0 / 1.5 * (1.0 + 1e-9), (first, last)


@given(seed=SEEDS)
def test_the_reach_follows_what_steps_should_have_been(seed):
    found, c = numbers(seed), torch.randn(2)
    curvature = c @ found.curvature @ c
    for part, limit in ((1.0, 1.0), (2.0, 1.0), (0.7, 0.1)):
        trust, reaches = motion.foreseen(found, c, None), []
        for _ in range(200):
            # Newton's step along it from its end goes back by 1 - part.
            trust = motion.renewed(trust, curvature, (1.0 - part) * curvature)
            reaches.append(float(trust[-1]))
        assert reaches[0] == pytest.approx(min(1.0, min(part, 1.5) ** 0.05))
        assert reaches[-1] == pytest.approx(limit)
        assert reaches == sorted(reaches, reverse=True)
    for _ in range(200):
        trust = motion.renewed(trust, curvature, -curvature)
    assert float(trust[-1]) == 1.0


# --- lengths


@pytest.mark.parametrize("manifold", ["Euclidean", "Stiefel"])
def test_a_normalised_step_has_the_length_lr(manifold):
    problem = Problem(manifold=MANIFOLDS[manifold])
    optimizer = RiemannianSGD(problem.metric, lr=0.02, normalize=True)
    for _ in range(3):
        problem.backward()
        dense = Dense(problem)
        x = dense.sharp(dense.h)
        optimizer.step()
        assert optimizer.report.motion.norm == pytest.approx(0.02, rel=1e-10)
        share = optimizer.report.motion.share
        assert share == pytest.approx(1.0 / dense.norm(x), rel=1e-9)


def test_groups_are_clipped_together():
    problem = Problem()
    first, _, last = problem.model
    groups = [{"params": first.parameters(), "lr": 1.0}, {"params": last.parameters()}]
    optimizer = RiemannianSGD(problem.metric, groups, lr=0.1, clip=0.05)
    problem.backward()
    dense, start = Dense(problem), problem.values()
    optimizer.step()
    moved = {n: v - start[n] for n, v in problem.values().items()}
    assert dense.norm(moved) == pytest.approx(0.05, rel=1e-10)


def test_a_short_step_is_not_clipped():
    problems = [Problem(), Problem()]
    for problem, clip in zip(problems, (None, 1e3), strict=True):
        steps(problem, RiemannianSGD(problem.metric, lr=0.3, clip=clip), 3)
    for name, value in problems[0].values().items():
        torch.testing.assert_close(value, problems[1].values()[name])


def test_a_scheduler_multiplies_the_length_that_is_found():
    problems = [Problem(), Problem()]
    optimizers = [RiemannianSGD(p.metric) for p in problems]
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizers[1], lambda step: 0.25)
    starts = [p.values() for p in problems]
    for problem, optimizer in zip(problems, optimizers, strict=True):
        steps(problem, optimizer, 1)
    scheduler.step()
    for name, value in problems[0].values().items():
        torch.testing.assert_close(
            0.25 * (value - starts[0][name]),
            problems[1].values()[name] - starts[1][name],
        )


@pytest.mark.parametrize("options", [{}, {"lr": 0.2, "spring": 0.5}])
def test_the_decay_has_the_length_of_the_step(options):
    problems = [Problem(), Problem()]
    rates = [0.0, 0.1]
    for problem, decay in zip(problems, rates, strict=True):
        optimizer = RiemannianSGD(problem.metric, weight_decay=decay, **options)
        start = problem.values()
        steps(problem, optimizer, 1)
    length = options.get("lr", optimizer.report.motion.length)
    for name, value in problems[0].values().items():
        torch.testing.assert_close(
            problems[1].values()[name], value - length * 0.1 * start[name]
        )


def test_without_a_floor_the_model_alone_decides():
    problem = Problem(mass=1e-4)
    optimizer = RiemannianSGD(problem.metric, floor=None)
    steps(problem, optimizer, 2)
    assert optimizer.report.motion.share == optimizer.report.motion.reach > 0.9


def test_a_higher_floor_shortens_the_step():
    shares = []
    for floor in (0.5, 0.8):
        problem = Problem(mass=1e-4)
        optimizer = RiemannianSGD(problem.metric, floor=floor)
        loss = problem.backward()
        optimizer.step()
        shares.append(optimizer.report.motion.share)
        predicted = optimizer.report.motion.predicted_decrease
        assert predicted == pytest.approx(loss - floor, rel=1e-6)
    assert shares[1] < shares[0] < 1.0


def regression(seed=0, mass=1e-2, blocks="model"):
    torch.manual_seed(seed)
    model = nn.Linear(4, 2)
    x, y = torch.randn(12, 4), torch.randn(12, 2)
    metric = rm.LayerwiseMetric(
        model, rm.output.Euclidean(1.0), mass=mass, blocks=blocks
    )

    def backward():
        with metric.record():
            z = model(x)
        loss = F.mse_loss(z, y)
        metric.backward(loss, z)
        return float(loss.detach())

    return model, metric, backward


@pytest.mark.parametrize("blocks", ["tensor", "model"])
def test_on_a_quadratic_loss_the_prediction_comes_true(blocks):
    _, metric, backward = regression(blocks=blocks)
    optimizer = RiemannianSGD(metric)
    losses, predicted = [], []
    for _ in range(4):
        losses.append(backward())
        optimizer.step()
        predicted.append(optimizer.report.motion.predicted_decrease)
        assert optimizer.report.motion.inflation == 1.0
    losses.append(backward())
    for (before, after), found in zip(pairwise(losses), predicted, strict=True):
        assert before - after == pytest.approx(found, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("mass", [1e-3, 1e-1])
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("blocks", ["layer", "model"])
def test_it_trains_whatever_the_mass(mass, sampled, blocks):
    torch.manual_seed(0)
    model = rm.nn.Sequential(
        rm.nn.Linear(8, 24, manifold=rm.manifolds.Stiefel()),
        nn.ReLU(),
        rm.nn.Linear(24, 4),
    )
    # Two rows for each of 64 examples say less than a mass of 1e-3 asks them to.
    bound = 0.75 if sampled and mass < 1e-2 else 0.35
    x = torch.randn(192, 8)
    y = (x[:, :4] + 0.5 * x[:, 4:] ** 2).argmax(1)
    output = rm.output.Categorical()
    output = rm.output.Sampled(output, probes=2) if sampled else output
    metric = rm.LayerwiseMetric(model, output, mass=mass, blocks=blocks)
    optimizer = RiemannianSGD(metric)

    def loss():
        with torch.no_grad():
            return float(F.cross_entropy(model(x), y))

    first = loss()
    for step in range(45):
        part = slice(64 * (step % 3), 64 * (step % 3) + 64)
        with metric.record():
            z = model(x[part])
        metric.backward(F.cross_entropy(z, y[part]), z)
        optimizer.step()
    assert loss() < bound * first, f"{loss():.3f} after {first:.3f}"
    columns = model[0].weight.detach()
    torch.testing.assert_close(columns.mT @ columns, torch.eye(8), rtol=0.0, atol=1e-10)


# --- what is kept


@pytest.mark.parametrize("manifold", ["Stiefel", "Sphere", "PoincareBall"])
def test_the_step_is_carried_to_where_it_led(manifold):
    problem = Problem(manifold=MANIFOLDS[manifold])
    optimizer = RiemannianSGD(problem.metric)
    start = problem.values()["0.weight"]
    steps(problem, optimizer, 1)
    end = problem.values()["0.weight"]
    weight = problem.model[0].weight
    kept = optimizer.state[weight]["step_buffer"]
    base = MANIFOLDS[manifold]
    torch.testing.assert_close(kept, base.proju(end, kept), rtol=0.0, atol=1e-12)
    taken = optimizer.report["0"].steps["0.weight"]
    torch.testing.assert_close(kept, base.transp(start, end, taken))
    assert float(kept.norm()) > 1e-3


def test_a_manifold_without_transport_keeps_the_vector():
    class Bare(rm.manifolds.Euclidean):
        pass

    Bare.transp = motion.geoopt.Manifold.transp
    u = torch.randn(3)
    assert motion.transported(Bare(), u, u + 1.0, u) is u


@pytest.mark.parametrize("options", [{}, {"lr": 0.2, "spring": 0.9}, {"clip": 0.1}])
@pytest.mark.parametrize("through_file", [False, True])
def test_a_loaded_state_resumes_bit_for_bit(options, through_file):
    problem = Problem(manifold=rm.manifolds.Stiefel(), sampled=True)
    optimizer = RiemannianSGD(problem.metric, **options)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for _ in range(3):
        steps(problem, optimizer, 1)
        scheduler.step()
    states = {
        "model": problem.model.state_dict(),
        "optimizer": optimizer.state_dict(),
        "random": problem.metric.output.generator.get_state(),
    }
    if through_file:
        buffer = io.BytesIO()
        torch.save(states, buffer)
        buffer.seek(0)
        states = torch.load(buffer, weights_only=True)
    else:
        states = copy.deepcopy(states)
    twin = Problem(1, manifold=rm.manifolds.Stiefel(), sampled=True)
    twin.x, twin.y = problem.x, problem.y
    twin.model.load_state_dict(states["model"])
    twin.metric.output.generator.set_state(states["random"])
    other = RiemannianSGD(twin.metric, lr=1e3)
    other.load_state_dict(states["optimizer"])
    for each in (problem, twin):
        steps(each, optimizer if each is problem else other, 3)
    for name, value in problem.values().items():
        assert torch.equal(value, twin.values()[name]), name


def test_a_state_of_before_there_were_rules_is_a_plain_step():
    problems = [Problem(), Problem()]
    plain = RiemannianSGD(problems[0].metric, lr=0.3, momentum=0.5)
    other = RiemannianSGD(problems[1].metric)
    state = plain.state_dict()
    new = {"automatic", "spring", "floor", "clip", "normalize", "trust"}
    for group in state["param_groups"]:
        for name in new:
            del group[name]
    other.load_state_dict(state)
    for problem, optimizer in zip(problems, (plain, other), strict=True):
        steps(problem, optimizer, 3)
    for name, value in problems[0].values().items():
        assert torch.equal(value, problems[1].values()[name])


@pytest.mark.parametrize("options", [{}, {"clip": 10.0}, {"lr": 0.2, "spring": 0.5}])
def test_the_laws_of_every_optimizer_hold(options):
    def make(model, groups):
        metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.5)
        return RiemannianSGD(metric, groups, **options)

    rm.testing.raise_failures(rm.testing.check_optimizer(make))


# --- parts of a model, changed gradients, other momenta


@pytest.mark.parametrize("blocks", ["tensor", "layer", "model"])
def test_parameters_that_are_left_out_stand_still(blocks):
    problem = Problem(blocks=blocks)
    last = list(problem.model[2].parameters())
    optimizer = RiemannianSGD(problem.metric, last)
    start, first = problem.values(), problem.loss()
    steps(problem, optimizer, 5)
    end = problem.values()
    assert torch.equal(end["0.weight"], start["0.weight"])
    assert not torch.equal(end["2.weight"], start["2.weight"])
    assert problem.loss() < first
    assert math.isfinite(optimizer.report.motion.norm)


def test_a_changed_gradient_is_honoured():
    problem = Problem(mass=1.0)
    optimizer = RiemannianSGD(problem.metric, floor=None)
    problem.backward()
    for p in problem.model.parameters():
        p.grad.mul_(0.01)
    dense, start = Dense(problem), problem.values()
    optimizer.step()
    v = dense.candidate({}, 0.8)
    a = -dense.slope(v) / dense.norm(v) ** 2
    for name, value in problem.values().items():
        torch.testing.assert_close(value - start[name], a * v[name])


def test_the_momentum_of_gradients_is_a_candidate_too():
    problem = Problem()
    optimizer = RiemannianSGD(problem.metric, momentum=0.9)
    assert optimizer.param_groups[0]["spring"] == 0.0
    first = problem.loss()
    steps(problem, optimizer, 10)
    assert problem.loss() < 0.5 * first
    kinds = set(next(iter(optimizer.state.values())))
    assert kinds == {"momentum_buffer", "step_buffer"}


def test_a_spring_ascends_where_it_should():
    problems = [Problem(), Problem()]
    ends = []
    for sign, problem in zip((1.0, -1.0), problems, strict=True):
        optimizer = RiemannianSGD(
            problem.metric, lr=0.02, spring=0.8, maximize=sign < 0.0
        )
        for _ in range(4):
            with problem.metric.record():
                z = problem.model(problem.x)
            problem.metric.backward(sign * F.cross_entropy(z, problem.y), z)
            optimizer.step()
        ends.append(problem.values())
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name], rtol=1e-10, atol=1e-10)


def test_plain_steps_keep_and_measure_nothing(monkeypatch):
    def fail(*_):
        raise AssertionError("a plain step asked the quadratic model")

    monkeypatch.setattr(proposal, "QuadraticModel", fail)
    problem = Problem()
    optimizer = RiemannianSGD(problem.metric, lr=0.3)
    steps(problem, optimizer, 2)
    assert optimizer.report.motion is None
    assert optimizer.state_dict()["state"] == {}


def test_an_automatic_step_costs_one_product(monkeypatch):
    problem = Problem()
    optimizer = RiemannianSGD(problem.metric)
    steps(problem, optimizer, 2)
    problem.backward()
    calls = []
    right = rm.LayerMetric.image
    monkeypatch.setattr(
        rm.LayerMetric, "image", lambda self, u: calls.append(self) or right(self, u)
    )
    optimizer.step()
    assert len(calls) == len(problem.metric.blocks)


def test_the_report_says_how_far_and_why():
    problem = Problem()
    optimizer = RiemannianSGD(problem.metric)
    steps(problem, optimizer, 2)
    report = optimizer.report
    head, *table = str(report).splitlines()
    assert head == str(report.motion)
    for word in ("length", "carried", "share", "curvature", "predicted decrease"):
        assert word in head
    assert len(table) == 3
    assert repr(report.motion) == "MotionReport(4 parameters)"
    total = sum(block.predicted_decrease for block in report)
    assert total >= report.motion.predicted_decrease


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}], ids=str)
def test_plain_numbers_for_a_log(options, monkeypatch):
    problem = Problem()
    optimizer = RiemannianSGD(problem.metric, **options)
    steps(problem, optimizer, 2)
    report = optimizer.report
    whole = report.numbers(spectrum=True)
    for name, numbers in whole.items():
        own = report.motion if name == "whole step" else report[name]
        assert numbers == {key: getattr(own, key) for key in numbers}
        assert all(type(number) is float for number in numbers.values())
    assert ("whole step" in whole) == (report.motion is not None)
    assert {"condition", "contraction_rate", "residual"} <= set(whole["0"])
    steps(problem, optimizer, 1)
    for dear in ("condition", "contraction_rate"):
        monkeypatch.delattr(rm.LayerMetric, dear)
    cheap = optimizer.report.numbers()
    assert set(whole["0"]) - set(cheap["0"]) == {"condition", "contraction_rate"}
    assert json.loads(json.dumps(cheap)) == cheap


def test_the_quickstart_names_every_column_and_its_attribute():
    page = (REPOSITORY / "docs" / "quickstart.md").read_text(encoding="utf-8")
    table = page.partition("| column | attribute")[2].partition("\n\n")[0]
    rows = [line.split(" | ")[:2] for line in table.splitlines()[2:]]
    columns, names = (
        re.findall(r"`(.+?)`", " ".join(row[i] for row in rows)) for i in (0, 1)
    )
    problem = Problem()
    optimizer = RiemannianSGD(problem.metric)
    steps(problem, optimizer, 1)
    head = str(optimizer.report).splitlines()[1].split()
    assert [name.replace("\\", "") for name in columns] == head[1:]
    numbers = optimizer.report.numbers(spectrum=True)
    assert {*names} - {"branch"} == set(next(reversed(numbers.values())))


@pytest.mark.parametrize("blocks", ["layer", "model"])
@pytest.mark.parametrize(
    "options",
    [{}, {"lr": 0.1, "spring": 0.5}, {"clip": 1.0, "weight_decay": 0.1}],
    ids=str,
)
def test_nothing_is_read_from_the_device(blocks, options):
    with torch.device("meta"):
        model = rm.nn.Sequential(
            rm.nn.Linear(5, 4, manifold=rm.manifolds.Stiefel()),
            nn.Tanh(),
            rm.nn.Linear(4, 3),
        )
        x, y = torch.empty(6, 5), torch.empty(6, dtype=torch.long)
    output = rm.output.Sampled(rm.output.Categorical())
    metric = rm.LayerwiseMetric(model, output, blocks=blocks)
    optimizer = RiemannianSGD(metric, **options)
    for _ in range(3):
        with metric.record():
            z = model(x)
        metric.backward(F.cross_entropy(z, y), z)
        optimizer.step()
    assert all(s["step_buffer"].is_meta for s in optimizer.state.values())


# --- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"spring": 1.0}, "spring=1.0"),
        ({"spring": -0.1}, "spring=-0.1"),
        ({"spring": 0.5, "momentum": 0.5}, "choose one"),
        ({"clip": 0.0}, "clip=0.0"),
        ({"clip": float("nan")}, "clip=nan"),
        ({"floor": float("inf")}, "floor=inf"),
        ({"normalize": True}, "need an lr"),
        ({"maximize": True}, "need an lr"),
        ({"lr": -1.0}, "lr=-1.0"),
    ],
    ids=str,
)
def test_bad_hyperparameters(options, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        RiemannianSGD(Problem().metric, **options)


@pytest.mark.parametrize("option", [{"clip": 1.0}, {"spring": 0.1}, {"lr": None}])
def test_a_group_cannot_have_a_rule_of_its_own(option):
    problem = Problem()
    first, _, last = problem.model
    groups = [{"params": first.parameters()}, {"params": last.parameters(), **option}]
    with pytest.raises(ValueError, match=next(iter(option))):
        RiemannianSGD(problem.metric, groups)


def test_a_step_that_is_not_finite_changes_nothing(monkeypatch):
    problem = Problem()
    optimizer = RiemannianSGD(problem.metric)
    steps(problem, optimizer, 1)
    start, state = problem.values(), copy.deepcopy(optimizer.state_dict())
    problem.backward()
    monkeypatch.setattr(proposal, "best_pair", lambda n, s: torch.full((2,), math.nan))
    with pytest.raises(rm.errors.NonFiniteError, match="coefficients nan"):
        optimizer.step()
    for name, value in problem.values().items():
        assert torch.equal(value, start[name])
    for key, entry in optimizer.state_dict()["state"].items():
        assert torch.equal(entry["step_buffer"], state["state"][key]["step_buffer"])


@pytest.mark.parametrize("options", [{}, {"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}])
def test_a_gradient_that_is_not_finite_is_named(options):
    problem = Problem()
    optimizer = RiemannianSGD(problem.metric, **options)
    steps(problem, optimizer, 2)
    start = problem.values()
    problem.backward()
    bias = problem.model[0].bias
    bias.grad = torch.full_like(bias, math.nan)
    with pytest.raises(rm.errors.NonFiniteError, match=r"the gradient of '0\.bias'"):
        optimizer.step()
    for name, value in problem.values().items():
        assert torch.equal(value, start[name])


@pytest.mark.parametrize("lr", [0.3, 2.0])
def test_a_blocks_decrease_is_the_slope_of_its_whole_step(lr):
    problem = Problem(manifold=rm.manifolds.Stiefel())
    optimizer = RiemannianSGD(problem.metric, lr=lr, spring=0.5)
    steps(problem, optimizer, 2)
    before = problem.values()
    problem.backward()
    gradient = problem.gradient()
    optimizer.step()
    for block in optimizer.report:
        slope = sum(float((gradient[n] * u).sum()) for n, u in block.steps.items())
        assert block.predicted_decrease == pytest.approx(-slope, rel=1e-9)
        norms = torch.stack([u.norm() for u in block.steps.values()])
        assert block.update_norm == pytest.approx(float(norms.norm()), rel=1e-9)
        for name in set(block.steps) & {"0.bias", "2.weight", "2.bias"}:
            moved = problem.values()[name] - before[name]
            torch.testing.assert_close(block.steps[name], moved)


def test_a_floor_that_a_loss_was_below_is_none() -> None:
    rule = motion.Rule(
        automatic=True, spring=0.0, floor=1.0, clip=None, normalize=False
    )
    loss = torch.tensor(3.0, dtype=torch.float64)
    assert float(rule.gap(loss, None)) == 2.0
    assert float(rule.gap(loss, torch.tensor(1.0))) == 2.0
    # Rounding is no evidence.
    assert float(rule.gap(loss, torch.tensor(1.0 - 1e-9))) == pytest.approx(2.0)
    assert float(rule.gap(loss, torch.tensor(-4.0))) == pytest.approx(12.0)
    assert replace(rule, floor=None).gap(loss, torch.tensor(-4.0)) is None


def test_a_log_density_is_not_held_at_zero() -> None:
    torch.manual_seed(0)
    x = torch.randn(20, 5, dtype=torch.float64)
    t = 2.0 * x[:, :1] + 0.01 * torch.randn(20, 1, dtype=torch.float64)
    model = nn.Linear(5, 2).double()
    output = rm.output.Gaussian(learned="log_variance")
    metric = rm.LayerwiseMetric(model, output, blocks="model")
    optimizer, losses = RiemannianSGD(metric), []
    for index in range(250):
        if index == 60:
            state = io.BytesIO()
            torch.save(optimizer.state_dict(), state)
            state.seek(0)
            optimizer = RiemannianSGD(metric)
            optimizer.load_state_dict(torch.load(state, weights_only=True))
            assert float(optimizer.param_groups[0]["lowest"]) == min(losses)
        with metric.record():
            z = model(x)
        loss = F.gaussian_nll_loss(z[:, :1], t, z[:, 1:].exp(), eps=1e-12)
        metric.backward(loss, z)
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < -4.5
    assert sum(abs(value) < 1e-3 for value in losses) < 5


@pytest.mark.parametrize("loss_at", [0.01, -0.01, -0.3])
def test_the_pass_that_falls_below_the_floor_is_bounded_too(loss_at: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 3).double()
    model.weight.data.mul_(8.0)
    x, y = torch.randn(12, 4).double(), torch.randint(3, (12,))
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=1e-2)
    optimizer = RiemannianSGD(metric)
    with metric.record():
        z = model(x)
    value = F.cross_entropy(z, y)
    metric.backward(value - value.detach() + loss_at, z)
    optimizer.step()
    assert float(optimizer.report.motion.share) < 0.3


def test_a_candidate_too_short_for_its_data_type_is_no_direction() -> None:
    weight = torch.tensor([[0.0, -1e-42], [-1e-42, 1.0]], dtype=torch.float64)
    numbers = Numbers(
        torch.zeros(2, 2, dtype=torch.float64), weight, torch.zeros(2).double()
    )
    pair = motion.best_pair(numbers, 0.8)
    assert pair.isfinite().all()
    assert float(pair[0]) == 0.0
    assert float(pair[1]) == pytest.approx(0.8)
    alone = Numbers(*(torch.zeros(*s).double() for s in ((1, 1), (1, 1), (1,))))
    assert float(motion.best_pair(alone, 0.8)) == 0.0


def test_batches_that_say_nothing_are_steps_like_others() -> None:
    before = torch.get_default_dtype()
    # The random numbers with which a square underflows and a product does not.
    torch.set_default_dtype(torch.float32)
    try:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        metric = rm.LayerwiseMetric(model, rm.output.Categorical())
        optimizer = RiemannianSGD(metric)
        x = torch.randn(24, 4)
        y = (x[:, 0] > 0).long() + (x[:, 1] > 0).long()

        def step(x, y):
            with metric.record():
                z = model(x)
            metric.backward(F.cross_entropy(z, y), z)
            optimizer.step()

        for _ in range(30):
            step(x, y)
        for k in range(10, 60):
            step(x[:1] * k, model(x[:1] * k).argmax(1))
    finally:
        torch.set_default_dtype(before)
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(
    ("scale", "options"),
    [
        (1e20, {}),
        (1e-23, {"floor": None}),
        *product(
            [1e20, 1e-23],
            [
                {"lr": 1.0, "clip": 1.0},
                {"lr": 0.01, "normalize": True},
                {"lr": 0.01, "normalize": True, "spring": 0.5},
            ],
        ),
    ],
    ids=str,
)
@pytest.mark.parametrize("manifold", [None, "Sphere"])
def test_steps_are_as_long_where_squares_leave_float32(scale, options, manifold):
    def run(dtype):
        torch.manual_seed(0)
        own = copy.deepcopy(MANIFOLDS[manifold]) if manifold else None
        model = nn.Sequential(rm.nn.Linear(4, 3, manifold=own)).to(dtype)
        x, t = torch.randn(8, 4).to(dtype), torch.randn(8, 3).to(dtype)
        metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=10.0)
        optimizer = RiemannianSGD(metric, **options)
        for _ in range(2):
            with metric.record():
                z = model(x)
            metric.backward(scale * (z - t).square().sum(1).mean() / 2, z)
            optimizer.step()
        block = next(iter(optimizer.report))
        return optimizer.report.motion.numbers() | block.numbers()

    wide, narrow = run(torch.float64), run(torch.float32)
    # Nothing but rounding.
    residuals = wide.pop("residual"), narrow.pop("residual")
    assert max(residuals) < 1e-5
    assert narrow == pytest.approx(wide, rel=1e-3)
    if "normalize" in options:
        assert narrow["norm"] == pytest.approx(0.01)
