"""KFAC: averages, inverses, steps, state, errors."""

import copy
import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants.kfac import AVERAGES, SIDES
from sklearn.datasets import load_digits
from torch import nn

import riemannian_modules as rm
from riemannian_modules.errors import NonFiniteError, NotRecordedError
from riemannian_modules.optim import KFAC
from riemannian_modules.optim.averaged import Averaged
from riemannian_modules.optim.kronecker import (
    KroneckerInverse,
    Sides,
    sides_in_coordinates,
)
from riemannian_modules.optim.sides import Side
from riemannian_modules.output import Categorical, Sampled

SEEDS = st.integers(0, 2**31 - 1)
MANIFOLDS = {
    "euclidean": lambda: None,
    "stiefel": rm.manifolds.Stiefel,
    "sphere": rm.manifolds.Sphere,
}
X = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).double()
Y = torch.arange(8) % 3


def problem(manifold="euclidean", output=None, dtype=None, **options):
    torch.manual_seed(0)
    model = nn.Sequential(
        rm.nn.Linear(4, 5, manifold=MANIFOLDS[manifold]()), nn.Tanh(), nn.Linear(5, 3)
    ).to(dtype)
    output = Categorical() if output is None else output
    return model, rm.LayerwiseMetric(model, output, **{"mass": 0.1, **options})


def backward(metric, x=X, y=Y):
    x = x.to(next(metric.model.parameters()).dtype)
    with metric.record():
        z = metric.model(x)
    loss = F.cross_entropy(z, y)
    metric.backward(loss, z)
    return loss


def parts_of(metric):
    return [part for block in metric.blocks.values() for part in block.parts]


def values(model):
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# --- averages and their inverses


def raw_sides(part):
    found, mass = sides_in_coordinates(part.factor, part.space), part.space.mass.scalar
    return Sides(mass * found.left, mass * found.right)


def average_findings(kind, manifold, seed):
    _, metric = problem(manifold)
    torch.manual_seed(seed)
    found = {}
    passes = []
    for _ in range(2):
        backward(metric, torch.randn(8, 4))
        passes.append({part.name: part for part in parts_of(metric)})
    for name, part in passes[0].items():
        first, second = raw_sides(part), raw_sides(passes[1][name])
        once = kind.of(first, None, 0.0, 8)
        e, f = torch.randn_like(part.space.point), torch.randn_like(part.space.point)
        inverse = once.inverse(part.space.mass.scalar)
        x, y = inverse(part.space, e), inverse(part.space, f)
        exact = KroneckerInverse([part])({name: e})[name]
        twice = kind.of(second, once, 0.5, 8)
        mean = kind.of(
            Sides((first.left + second.left) / 2, (first.right + second.right) / 2),
            None,
            0.0,
            8,
        )
        after = [each.inverse(0.3)(part.space, e) for each in (twice, mean)]
        size = float(x.norm() * f.norm())
        found |= {
            f"{name}: one pass": torch.allclose(x, exact, rtol=1e-8, atol=1e-10),
            f"{name}: symmetric": abs(float((x * f).sum() - (y * e).sum()))
            < 1e-9 * size,
            f"{name}: positive": float((x * e).sum()) > 0.0,
            f"{name}: tangent": torch.allclose(part.space.project(x), x),
            f"{name}: mean": torch.allclose(*after, rtol=1e-8, atol=1e-10),
        }
    return found


@pytest.mark.parametrize("manifold", MANIFOLDS)
@given(seed=SEEDS)
@settings(max_examples=8)
def test_averages_are_means_and_their_inverses_those_of_the_mean(manifold, seed):
    findings = average_findings(Averaged, manifold, seed)
    assert all(findings.values()), findings


@pytest.mark.parametrize("name", AVERAGES)
def test_wrong_averages_are_rejected(name):
    assert not all(average_findings(AVERAGES[name], "euclidean", 0).values())


def side_findings(kind, seed, n, rank):
    torch.manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(n, n))
    grams = []
    for _ in range(2):
        spectrum = torch.full((n,), 0.2)
        spectrum[:rank] = torch.linspace(3.0, 9.0, rank)
        grams.append((turn * spectrum) @ turn.mT)
        # The same eigenvectors but for a rotation of a few degrees.
        skew = 0.05 * torch.randn(n, n)
        turn = turn @ torch.matrix_exp(skew - skew.mT)
    side = kind.first(grams[0], rank)
    for _ in range(6):
        # The same average; only the eigenvectors get better.
        side = side.after(grams[0], 1.0, rank)
    matrix = torch.randn(n, 3)
    dense = torch.linalg.inv(grams[0] / 2.0 + 0.7 * torch.eye(n))
    found = side.inverse(2.0, 0.7)
    for _ in range(12):
        side = side.after(grams[1], 0.1, rank)
    later = side.inverse(2.0, 0.7).times(matrix)
    now = torch.linalg.inv(grams[1] / 2.0 + 0.7 * torch.eye(n)) @ matrix
    any_gram = torch.randn(n, n)
    odd = kind.first(any_gram @ any_gram.mT, rank).inverse(1.0, 0.1).times(torch.eye(n))
    return {
        "left": torch.allclose(found.times(matrix), dense @ matrix, atol=1e-6),
        "right": torch.allclose(found.after(matrix.mT), matrix.mT @ dense, atol=1e-6),
        "divided": torch.allclose(
            found.divided(3.0).times(matrix), dense @ matrix / 3.0, atol=1e-6
        ),
        "follows": torch.allclose(later, now, atol=1e-4),
        "positive": float(torch.linalg.eigvalsh((odd + odd.mT) / 2)[0]) > 0.0,
        "symmetric": torch.allclose(odd, odd.mT, atol=1e-9),
    }


@given(seed=SEEDS, n=st.integers(3, 12), rank=st.integers(1, 4))
@settings(max_examples=15)
def test_eigenpairs_and_one_number_for_the_rest(seed, n, rank):
    rank = min(rank, n - 1)
    findings = side_findings(Side, seed, n, rank)
    assert all(findings.values()), findings


@pytest.mark.parametrize("name", SIDES)
def test_wrong_sides_are_rejected(name):
    assert not all(side_findings(SIDES[name], 0, 12, 3).values())


def test_a_diagonal_side_is_divided_by_entry_by_entry():
    side = Side.first(torch.tensor([1.0, 3.0]), 4).after(
        torch.tensor([3.0, 1.0]), 0.5, 4
    )
    inverse = side.inverse(2.0, 1.0)
    torch.testing.assert_close(inverse.times(torch.ones(2, 1)), torch.full((2, 1), 0.5))
    torch.testing.assert_close(inverse.after(torch.ones(1, 2)), torch.full((1, 2), 0.5))


# --- steps


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_two_steps_are_those_of_the_formula(manifold):
    model, metric = problem(manifold)
    optimizer = KFAC(metric, lr=0.2, momentum=0.5, clip=None, decay=0.25)
    expected, last, averages = values(model), {}, {}
    for index in range(2):
        backward(metric, X + index)
        vectors = {}
        for part in parts_of(metric):
            keep = min(0.25, 1.0 - 1.0 / (index + 1))
            known = averages.get(part.name)
            averages[part.name] = Averaged.of(raw_sides(part), known, keep, 32)
            inverse = averages[part.name].inverse(0.1)
            e = dict(model.named_parameters())[part.name].grad
            vectors[part.name] = inverse(part.space, e), part.space
        for name, (v, space) in vectors.items():
            before = space.project(last[name]) if name in last else 0.0
            kept = v + 0.5 * before
            step = -0.2 * (v + 0.5 * kept)
            point = expected[name].as_subclass(torch.Tensor)
            if name == "0.weight" and manifold != "euclidean":
                new = space.manifold.retr(point, step)
                last[name] = space.manifold.transp(point, new, kept)
                expected[name] = new
            else:
                expected[name], last[name] = point + step, kept
        optimizer.step()
        for name, value in values(model).items():
            torch.testing.assert_close(
                value.as_subclass(torch.Tensor), expected[name], rtol=1e-9, atol=1e-10
            )
        expected = values(model)


def test_the_momentum_is_carried_by_the_manifold():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 3))
    ball = rm.manifolds.PoincareBall()
    rm.geometrize(model, {"2.weight": ball})
    metric = rm.LayerwiseMetric(model, Categorical(), mass=0.1)
    optimizer = KFAC(metric, clip=None)
    weight = dict(model.named_parameters())["2.weight"]
    start = weight.detach().as_subclass(torch.Tensor).clone()
    backward(metric)
    part = next(p for p in parts_of(metric) if p.name == "2.weight")
    kept = Averaged.of(raw_sides(part), None, 0.0, 32).inverse(0.1)(
        part.space, weight.grad
    )
    optimizer.step()
    end = weight.detach().as_subclass(torch.Tensor)
    found = optimizer.state[weight]["step"]
    torch.testing.assert_close(found, ball.transp(start, end, kept))
    assert float((found - kept).norm()) > 1e-3 * float(kept.norm())
    # What a step has written is known to be on its manifold.
    assert all(d.verified == d.tensor._version for d in metric.parameters)


def test_weight_decay_is_decoupled():
    ends = []
    for decay in (0.0, 0.3):
        model, metric = problem()
        optimizer = KFAC(metric, lr=0.2, clip=None, weight_decay=decay)
        start = values(model)
        backward(metric)
        optimizer.step()
        ends.append(values(model))
    for name, value in start.items():
        torch.testing.assert_close(ends[1][name], ends[0][name] - 0.06 * value)


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_the_length_is_that_in_the_metric_of_the_whole_model(manifold):
    model, metric = problem(manifold)
    joint = rm.LayerwiseMetric(model, Categorical(), mass=0.1, blocks="model")
    optimizer = KFAC(metric, clip=1e-3, warmup=0, momentum=0.0, lr=1.0)
    backward(metric)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    inverse = KroneckerInverse(parts_of(metric))
    v = inverse(grads)
    with joint.record():
        z = model(X)
    joint.pull_back(z)
    block = joint.blocks["model"]
    averaged = float(sum((v[n] * grads[n]).sum() for n in v))
    whole = max(averaged, float(block.inner(v, v))) ** 0.5
    assert manifold != "euclidean" or whole**2 > averaged
    before = values(model)
    optimizer.step()
    assert float(optimizer.report.length) == pytest.approx(whole, rel=1e-6)
    assert float(optimizer.report.share) == pytest.approx(1e-3 / whole, rel=1e-6)
    moved = values(model)["2.weight"] - before["2.weight"]
    torch.testing.assert_close(
        moved, -1e-3 / whole * v["2.weight"], rtol=1e-6, atol=0.0
    )


def test_the_first_passes_are_averaged_alike_and_later_ones_fade():
    model, metric = problem()
    optimizer, tensor = (
        KFAC(metric, decay=0.7),
        dict(model.named_parameters())["2.weight"],
    )
    grams = []
    for _ in range(5):
        backward(metric, torch.randn(8, 4))
        part = next(p for p in parts_of(metric) if p.name == "2.weight")
        grams.append(raw_sides(part).left)
        optimizer.step()
        # A past of 1/2 and 2/3, and then of 0.7.
        average = grams[0]
        for index, gram in enumerate(grams[1:], 2):
            keep = min(0.7, 1.0 - 1.0 / index)
            average = keep * average + (1.0 - keep) * gram
        torch.testing.assert_close(optimizer.state[tensor]["left_average"], average)
    assert optimizer.param_groups[0]["passes"] == 5


def test_the_length_is_remembered_where_it_is_measured_anew():
    model, metric = problem()
    optimizer = KFAC(metric, lr=1e-2, momentum=0.0, clip=1.0, warmup=0)
    ratios, known = [], []
    for _ in range(7):
        backward(metric, torch.randn(8, 4))
        before = values(model)
        grads = {n: p.grad.clone() for n, p in model.named_parameters()}
        optimizer.step()
        share, after = float(optimizer.report.share), values(model)
        v = {n: (before[n] - after[n]) / (1e-2 * share) for n in before}
        own = float(sum((v[n] * grads[n]).sum() for n in v))
        rows = sum(
            block.image({part.name: v[part.name] for part in block.parts})
            for block in metric.blocks.values()
        )
        mass = 0.1 * float(sum(x.square().sum() for x in v.values()))
        ratios.append(max(1.0, (float(rows.square().sum()) + mass) / own))
        average = ratios[0]
        for index, ratio in enumerate(ratios[1:], 2):
            keep = min(0.8, 1.0 - 1.0 / index)
            average = keep * average + (1.0 - keep) * ratio
        known.append(average)
        assert float(optimizer.report.length) == pytest.approx(
            (average * own) ** 0.5, rel=1e-6
        )
    assert len({round(each, 3) for each in known}) > 3


def test_a_gradient_whose_square_is_no_number_has_a_length():
    lengths = []
    for scale in (1.0, 1e-25):
        _, metric = problem(dtype=torch.float32)
        with metric.record():
            z = metric.model(X.float())
        metric.backward(scale * F.cross_entropy(z, Y), z)
        optimizer = KFAC(metric, clip=None)
        optimizer.step()
        lengths.append(float(optimizer.report.length))
        steps = [optimizer.state[p]["step"] for p in metric.model.parameters()]
        assert {each.dtype for each in steps} == {torch.float32}
    assert lengths[1] == pytest.approx(1e-25 * lengths[0], rel=1e-3)


@pytest.mark.parametrize("blocks", ["tensor", "model"])
def test_blocks_make_no_difference(blocks):
    ends = []
    for each in ("layer", blocks):
        model, metric = problem(blocks=each)
        optimizer = KFAC(metric)
        for _ in range(3):
            backward(metric)
            optimizer.step()
        ends.append(values(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


def test_the_clip_grows_in_the_first_steps():
    _, metric = problem()
    optimizer = KFAC(metric, clip=1e-3, warmup=3)
    bounds = []
    for _ in range(5):
        backward(metric)
        optimizer.step()
        report = optimizer.report
        bounds.append(float(report.share * report.length))
    assert bounds == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3])


def test_rows_are_renewed_often_at_first_and_then_as_the_metric_says():
    model, metric = problem(refresh=4)
    optimizer = KFAC(metric)
    renewed, tensor = [], dict(model.named_parameters())["0.weight"]
    for _ in range(19):
        before = optimizer.state.get(tensor, {}).get("left_average")
        backward(metric, torch.randn(8, 4))
        optimizer.step()
        renewed.append(optimizer.report.renewed)
        after = optimizer.state[tensor]["left_average"]
        assert renewed[-1] == (before is None or not torch.equal(before, after))
    assert [i + 1 for i, new in enumerate(renewed) if new] == [1, 2, 4, 7, 11, 15, 19]
    assert "new rows" in str(optimizer.report)
    assert "length" in str(optimizer.report)


def test_another_mass_counts_at_once():
    (_, metric), (_, other) = problem(refresh=5), problem(refresh=5, mass=0.1)
    first, second = KFAC(metric, clip=None), KFAC(other, clip=None)
    for _ in range(2):
        for m, optimizer in ((metric, first), (other, second)):
            backward(m)
            optimizer.step()
    metric.set_mass(0.7)
    first._inverses = {}
    other.set_mass(0.7)
    for m, optimizer in ((metric, first), (other, second)):
        backward(m)
        optimizer.step()
    assert not second.report.renewed
    pairs = zip(
        values(metric.model).values(), values(other.model).values(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)
    assert all(i.mass == 0.7 for i in second._inverses.values())


@pytest.mark.parametrize("output", [None, Categorical()])
def test_without_rows_and_with_other_masses(output):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    mass = {"weight": torch.linspace(0.1, 0.4, 12).view(3, 4), "bias": 0.2}
    metric = rm.LayerwiseMetric(model, output, mass=mass)
    optimizer, before = KFAC(metric, lr=0.1, clip=None, momentum=0.0), values(model)
    backward(metric)
    grads = {n: p.grad.clone() for n, p in model.named_parameters()}
    if output is None:
        wanted = {
            "weight": grads["weight"] / mass["weight"],
            "bias": grads["bias"] / 0.2,
        }
    else:
        wanted = KroneckerInverse(parts_of(metric))(grads)
    optimizer.step()
    for name, value in values(model).items():
        torch.testing.assert_close(value, before[name] - 0.1 * wanted[name])


def test_digits_are_learned():
    data = load_digits()
    x = torch.tensor(data.data / 16.0, dtype=torch.float32)
    y = torch.tensor(data.target)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).float()
    metric = rm.LayerwiseMetric(
        model, Sampled(Categorical()), mass=1e-2, refresh=10, static_graph=True
    )
    optimizer = KFAC(metric)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=60)
    order = itertools.cycle(torch.randperm(len(x)).split(128)[:14])
    for chosen in itertools.islice(order, 60):
        backward(metric, x[chosen], y[chosen])
        optimizer.step()
        schedule.step()
    # Adam's best of 1e-3, 3e-3, 1e-2 and 3e-2, with this schedule, ends at 0.099.
    assert float(F.cross_entropy(model(x), y).detach()) < 0.03


# --- state and errors


@pytest.mark.parametrize("manifold", MANIFOLDS)
def test_a_run_goes_on_from_a_checkpoint_bit_for_bit(manifold):
    model, metric = problem(manifold)
    optimizer = KFAC(metric, rank=1)
    batches = [torch.randn(8, 4) for _ in range(6)]
    for x in batches[:3]:
        backward(metric, x)
        optimizer.step()
    file = io.BytesIO()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save({**state, "metric": metric.state_dict()}, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    twin, other = problem(manifold)
    again = KFAC(other, rank=1)
    twin.load_state_dict(loaded["model"])
    other.load_state_dict(loaded["metric"])
    again.load_state_dict(loaded["optimizer"])
    for x in batches[3:]:
        for m, each in ((metric, optimizer), (other, again)):
            backward(m, x)
            each.step()
    pairs = zip(values(model).values(), values(twin).values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_nothing_changes_where_a_step_is_not_finite():
    model, metric = problem()
    optimizer = KFAC(metric)
    backward(metric)
    optimizer.step()
    backward(metric)
    dict(model.named_parameters())["2.weight"].grad[0, 0] = float("nan")
    before, state = values(model), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(NonFiniteError, match=r"'2\.weight'"):
        optimizer.step()
    assert all(torch.equal(v, before[n]) for n, v in values(model).items())
    after = optimizer.state_dict()
    assert after["param_groups"] == state["param_groups"]
    for key, own in state["state"].items():
        for name, value in own.items():
            assert torch.equal(after["state"][key][name], value)


def test_averages_stay_numbers_where_a_device_failed():
    model, metric = problem()
    optimizer, tensor = KFAC(metric), next(model.parameters())
    backward(metric)
    new = optimizer._renewed()
    optimizer._keep(new, torch.tensor(False))
    assert not optimizer.state[tensor]["left_average"].any()
    optimizer._keep(new, torch.tensor(True))
    assert optimizer.state[tensor]["left_average"].any()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, "lr=-1"),
        ({"momentum": 1.0}, "momentum=1"),
        ({"decay": 1.0}, "decay=1"),
        ({"clip": 0.0}, "clip=0"),
        ({"rank": 0}, "rank=0"),
        ({"rank": 1.5}, r"rank=1\.5"),
        ({"warmup": -1}, "warmup=-1"),
        ({"weight_decay": -1.0}, "weight_decay=-1"),
    ],
)
def test_options_out_of_range(options, words):
    _, metric = problem()
    with pytest.raises(ValueError, match=words):
        KFAC(metric, **options)


def test_what_is_not_a_pass_or_a_metric():
    model, metric = problem()
    with pytest.raises(TypeError, match=r"KFAC\(metric\)"):
        KFAC(model)
    optimizer = KFAC(metric)
    assert optimizer.report is None
    with pytest.raises(NotRecordedError, match="before every"):
        optimizer.step()
    backward(metric)
    optimizer.step()
    with pytest.raises(NotRecordedError, match="before every"):
        optimizer.step()


def test_a_closure_is_evaluated_once_and_its_loss_returned():
    _, metric = problem()
    losses = []

    def closure():
        losses.append(float(backward(metric).detach()))
        return losses[-1]

    assert KFAC(metric).step(closure) == losses[0]
    assert len(losses) == 1


def test_a_rate_that_is_a_tensor():
    ends = []
    for lr in (0.3, torch.tensor(0.3)):
        model, metric = problem()
        optimizer = KFAC(metric, lr=lr)
        for _ in range(2):
            backward(metric)
            optimizer.step()
        ends.append(values(model))
    for name, value in ends[0].items():
        torch.testing.assert_close(value, ends[1][name])


# --- passes that renew no rows


class Shared(nn.Module):
    """Two parameters with one gradient, and a table."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(9, 4)
        self.a, self.b = nn.Parameter(torch.zeros(4)), nn.Parameter(torch.zeros(4))
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.table(x) + (self.a + self.b))


@pytest.mark.parametrize("sparse", [False, True])
def test_gradients_alone_are_autograd_s_and_have_memory_of_their_own(sparse):
    torch.manual_seed(0)
    model = Shared()
    model.table.sparse = sparse
    outside = nn.Parameter(torch.ones(3))
    metric = rm.LayerwiseMetric(model, Categorical(), mass=0.1, refresh=9)
    x, y = torch.arange(9), torch.arange(9) % 3
    for index in range(3):
        with metric.record():
            z = model(x)
        metric.backward(F.cross_entropy(z * outside, y), z)
        assert metric.version == 1
        found = {n: p.grad.clone() for n, p in model.named_parameters()}
        beside = outside.grad.clone()
        model.zero_grad()
        outside.grad = None
        F.cross_entropy(model(x) * outside, y).backward()
        torch.testing.assert_close(beside, outside.grad)
        outside.grad = None
        for name, p in model.named_parameters():
            wanted = p.grad.to_dense() if p.grad.is_sparse else p.grad
            torch.testing.assert_close(found[name], wanted)
        if index:
            with metric.record():
                z = model(x)
            metric.backward(F.cross_entropy(z, y), z)
            model.a.grad.zero_()
            assert model.b.grad.any()


def test_gradients_alone_of_several_passes_add_up():
    grads = []
    for sizes in ((8,), (3, 5)):
        model, metric = problem(refresh=9)
        backward(metric)
        start = 0
        for size in sizes:
            with metric.record():
                z = model(X[start : start + size])
            loss = F.cross_entropy(z, Y[start : start + size])
            start += size
            metric.backward(loss, z, accumulate=start < 8)
        assert metric.version == 1
        grads.append({n: p.grad for n, p in model.named_parameters()})
    for name, value in grads[0].items():
        torch.testing.assert_close(value, grads[1][name])
