"""Gram matrices of structured factors: every way to form them gives the dense one."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import geoopt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import riemannian_modules as rm
from riemannian_modules import Mass, TangentSpace
from riemannian_modules import factors as fs
from riemannian_modules.cost_model import work
from riemannian_modules.factors import chunks, embedding, linear, linear_gram, slabs
from riemannian_modules.factors import tokens as tokens_of
from riemannian_modules.factors.products import gram_diagonal
from riemannian_modules.factors.stacked import StackedFactor
from riemannian_modules.manifolds.riesz import riesz

Reshaped = rm.manifolds.Reshaped


class InPlane(geoopt.Sphere):
    """Unit vectors in the plane of the first two coordinates."""

    def __init__(self, width: int) -> None:
        super().__init__(intersection=torch.eye(width)[:, :2])


class Coupled(geoopt.Manifold):
    """The Riesz map ``e + 0.1 sum(e)``; nothing else is known of it."""

    name, ndim, reversible = "coupled", 2, False

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        return u + 0.1 * u.sum((-1, -2), keepdim=True)

    def projx(self, x: Tensor) -> Tensor:
        return x

    inner = retr = expmap = proju = egrad2rgrad
    _check_point_on_manifold = _check_vector_on_tangent = egrad2rgrad


@dataclass(frozen=True)
class Base:
    make: Callable[[], geoopt.Manifold]
    shape: tuple[int, int] = (4, 3)
    mass: Callable[[int, int], Mass] = lambda a, b: Mass(scalar=0.25)


def rank_one(a: int, b: int) -> Mass:
    return Mass(0.5, row=torch.rand(a) + 0.5, column=torch.rand(b) + 0.5)


def diagonal(a: int, b: int) -> Mass:
    return Mass(diagonal=torch.rand(a, b) + 0.5)


BASES: dict[str, Base] = {
    "euclidean": Base(geoopt.Euclidean),
    "euclidean-rank-one": Base(geoopt.Euclidean, mass=rank_one),
    "euclidean-diagonal": Base(geoopt.Euclidean, mass=diagonal),
    "stiefel-wide": Base(rm.manifolds.Stiefel, (3, 4)),
    "stiefel-tall": Base(rm.manifolds.Stiefel),
    "canonical": Base(rm.manifolds.CanonicalStiefel),
    "grassmann-wide": Base(rm.manifolds.Grassmann, (3, 4)),
    "grassmann-tall": Base(rm.manifolds.Grassmann),
    "unit-rows": Base(lambda: rm.manifolds.Oblique("rows")),
    "unit-columns": Base(lambda: rm.manifolds.Oblique("columns")),
    "sphere": Base(rm.manifolds.Sphere),
    "sphere-in-plane": Base(lambda: InPlane(3)),
    "poincare": Base(rm.manifolds.PoincareBall),
    "lorentz": Base(rm.manifolds.Lorentz),
    "positive": Base(rm.manifolds.Positive),
    "spd": Base(rm.manifolds.SPD, (3, 3)),
    "log-euclidean": Base(rm.manifolds.LogEuclideanSPD, (3, 3)),
    "scaled-sphere": Base(lambda: rm.manifolds.Scaled(rm.manifolds.Sphere(), 2.0)),
    "scaled-stiefel": Base(lambda: rm.manifolds.Scaled(rm.manifolds.Stiefel(), 0.5)),
    "unknown": Base(Coupled),
}
BY_ROW = {
    "euclidean",
    "euclidean-rank-one",
    "euclidean-diagonal",
    "unit-rows",
    "sphere",
    "sphere-in-plane",
    "poincare",
    "lorentz",
    "positive",
    "scaled-sphere",
}
IN_PAIRS = set(BASES) - {
    "euclidean-diagonal",
    "sphere-in-plane",
    "lorentz",
    "positive",
    "log-euclidean",
    "unknown",
}


def space_of(base: Base, shape: tuple[int, ...] | None = None) -> TangentSpace:
    shape, manifold = shape or base.shape, base.make()
    point = torch.randn(shape)
    if isinstance(manifold, geoopt.PoincareBall):
        point = 0.5 * point / point.norm(dim=-1, keepdim=True)
    if isinstance(manifold, rm.manifolds.SPD | rm.manifolds.LogEuclideanSPD):
        point = point @ point.mT + torch.eye(len(point))
    return TangentSpace(manifold, manifold.projx(point), base.mass(*shape[:2]))


def lower(matrix: Tensor) -> Tensor:
    return matrix.tril() + matrix.tril(-1).mT


def dense_gram(space: TangentSpace, rows: Tensor) -> Tensor:
    images = torch.stack([riesz(space.manifold, space.point, row) for row in rows])
    return rows.flatten(1) @ space.mass.divide(images).flatten(1).mT


def assert_gram(
    factor: fs.MetricFactor, space: TangentSpace, dtype: torch.dtype = torch.float64
) -> None:
    K = factor.to_dense().double().view(-1, *factor.shape)
    expected = dense_gram(space.to(torch.float64), K)
    found = lower(factor.gram(space, dtype)).double()
    eps = torch.finfo(min(dtype, factor.dtype, key=lambda d: d.itemsize)).eps
    bound = 200.0 * eps * float(expected.norm() + K.square().sum())
    torch.testing.assert_close(found, expected, rtol=0.0, atol=bound)
    wide = gram_diagonal(factor.double(), space.to(torch.float64))
    torch.testing.assert_close(wide, expected.diagonal(), rtol=0.0, atol=bound)


def linear_factor(shape: tuple[int, int], positions: int, r: int = 2, n: int = 3):
    x = torch.randn(n, positions, shape[1])
    return fs.LinearFactor(x, torch.randn(r, n, positions, shape[0]))


# ---- linear layers with several positions ----------------------------------------


@pytest.mark.parametrize("form", [False, True], ids=["pairs", "rows"])
@pytest.mark.parametrize("positions", [1, 3])
@pytest.mark.parametrize("name", BASES)
def test_both_ways_give_the_gram_matrix(
    name: str, positions: int, form: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "forms_rows", lambda *sizes: form)
    space = space_of(BASES[name])
    factor = linear_factor(BASES[name].shape, positions)
    assert_gram(factor, space)
    if name != "sphere-in-plane":  # geoopt keeps its projector in one data type
        factor, space = factor.to(torch.float32), space.to(torch.float32)
        assert_gram(factor, space, torch.float32)
        assert_gram(factor, space, torch.float64)


@pytest.mark.parametrize("name", BASES)
def test_which_manifolds_have_which_structure(name: str) -> None:
    space = space_of(BASES[name])
    pairs = linear_gram.has_terms(space.manifold) and space.mass.diagonal is None
    assert pairs == (name in IN_PAIRS)
    assert slabs.acts_by_row(space) == (name in BY_ROW)


@pytest.mark.parametrize("form", [False, True], ids=["pairs", "rows"])
@pytest.mark.parametrize("name", ["euclidean", "stiefel-wide", "scaled-sphere"])
def test_the_bias_travels_with_its_weight(
    name: str, form: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "forms_rows", lambda *sizes: form)
    space = space_of(BASES[name])
    weight = linear_factor(BASES[name].shape, 3)
    bias = fs.BiasFactor(weight.cotangents)
    flat = TangentSpace(geoopt.Euclidean(), torch.randn(bias.shape), Mass(scalar=0.5))
    pairs = [(weight, space), (bias, flat)]
    wanted = dense_gram(space, weight.rows(0, 6)) + dense_gram(flat, bias.rows(0, 6))
    found = lower(fs.BlockFactor(pairs).gram(torch.float64))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)


def test_the_cheaper_way_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []
    for name in ("slab_gram", "linear_gram"):
        own = getattr(linear, name)

        def spy(*args: Any, name: str = name, own: Any = own) -> Tensor:
            taken.append(name)
            return own(*args)

        monkeypatch.setattr(linear, name, spy)
    space = TangentSpace(geoopt.Euclidean(), torch.zeros(6, 5))
    forms = []
    for positions in range(1, 12):
        factor = linear_factor((6, 5), positions)
        assert_gram(factor, space)
        forms.append(linear_gram.forms_rows(2, 3, positions, 6, 5))
    assert taken == ["slab_gram" if form else "linear_gram" for form in forms]
    # Forming rows pays off from some number of positions on.
    assert forms == sorted(forms)
    assert not forms[0]
    assert forms[-1]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize(("rank", "columns", "threads"), [(7, 4100, 3), (300, 2048, 2)])
def test_threads_share_the_columns(
    rank: int, columns: int, threads: int, first: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    left, right = torch.randn(columns, rank).mT, torch.randn(rank, columns + 2)[:, 1:-1]
    out = torch.randn(rank, rank)
    wanted = left @ right.mT + (0.0 if first else out)
    slabs.add_lower(out, left, right, first=first)
    torch.testing.assert_close(out.tril(), wanted.tril(), rtol=1e-12, atol=1e-10)


def test_the_cost_of_known_layers() -> None:
    # A token of 64 numbers at 32 positions; a wide layer that is used twice.
    assert linear_gram.forms_rows(1, 128, 32, 64, 64)
    assert not linear_gram.forms_rows(1, 128, 2, 512, 512)
    assert not linear_gram.forms_rows(9, 128, 1, 1, 1)


# ---- bounded memory --------------------------------------------------------------


def convolution(
    groups: int = 1, transposed: bool = False, channels: int = 6
) -> fs.ConvolutionFactor:
    plain = fs.Convolution((2, 2), (1, 2), (1, 0), (1, 1), groups, transposed)
    weight = torch.randn(4, channels // groups, 2, 2)
    x = torch.randn(3, 2, 4 if transposed else channels, 3, 4)
    y = plain.apply(x.flatten(0, 1), weight)
    l = torch.randn(2, 3, 2, *y.shape[1:])
    return fs.ConvolutionFactor(plain, x, l, weight.shape)


def tokens(places: int = 3, vocabulary: int = 7) -> fs.EmbeddingFactor:
    found = torch.randint(vocabulary, (3 * places,))
    return fs.EmbeddingFactor(found, torch.randn(2, 3, places, 3), vocabulary)


def bags() -> fs.EmbeddingFactor:
    place = torch.randint(6, (11,))
    cotangents, weights = torch.randn(2, 3, 2, 3), torch.randn(11)
    return fs.EmbeddingFactor(torch.randint(7, (11,)), cotangents, 7, place, weights)


FACTORS: dict[str, Callable[[], fs.SlabFactor]] = {
    "linear": lambda: linear_factor((7, 3), 3),
    "convolution": convolution,
    "grouped": lambda: convolution(2),
    "transposed": lambda: convolution(1, True),
    "transposed-grouped": lambda: convolution(2, True),
    "embedding": tokens,
    "bags": bags,
    "embedding-twice": lambda: tokens() + tokens(2),
    "embedding-and-bags": lambda: tokens() + bags(),
    "tied": lambda: tokens() + linear_factor((7, 3), 2),
    "across": lambda: fs.ViewedFactor(linear_factor((3, 7), 3)),
    "across-once": lambda: fs.ViewedFactor(linear_factor((3, 7), 1)),
    "across-twice": lambda: (
        fs.ViewedFactor(linear_factor((3, 7), 3))
        + fs.ViewedFactor(linear_factor((3, 7), 2))
        + linear_factor((7, 3), 1)
    ),
    "tied-twice": lambda: linear_factor((7, 3), 1) + bags() + linear_factor((7, 3), 2),
}


@pytest.mark.parametrize("most", [1, 40, 1 << 22])
@pytest.mark.parametrize(
    "base", ["euclidean", "euclidean-rank-one", "euclidean-diagonal", "sphere"]
)
@pytest.mark.parametrize("name", FACTORS)
def test_pieces_of_any_size_give_the_same(
    name: str, base: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = FACTORS[name]()
    dense = factor.to_dense()
    monkeypatch.setattr(chunks, "MOST_ENTRIES", most)
    torch.testing.assert_close(factor.to_dense(), dense)
    shape = factor.shape
    mass = BASES[base].mass(shape[0], shape[1]) if len(shape) == 2 else Mass()
    manifold = BASES[base].make()
    point = manifold.projx(torch.randn(shape))
    assert_gram(factor, TangentSpace(manifold, point, mass))


@pytest.mark.parametrize("most", [1, 1 << 22])
@pytest.mark.parametrize("name", ["stiefel-tall", "grassmann-tall", "unknown"])
@pytest.mark.parametrize("kind", ["linear", "across", "embedding", "bags", "tied"])
def test_manifolds_that_couple_rows(
    name: str, kind: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MOST_ENTRIES", most)
    monkeypatch.setattr(slabs, "_FEWEST_ROWS", 4)
    assert_gram(FACTORS[kind](), space_of(BASES[name], (7, 3)))


@pytest.mark.parametrize("name", FACTORS)
def test_rows_from_anywhere(name: str) -> None:
    factor = FACTORS[name]()
    dense = factor.to_dense()
    for start in range(7):
        for stop in range(start, 7):
            rows = factor.rows(start, stop).flatten(1)
            torch.testing.assert_close(rows, dense[start:stop].view(rows.shape))
    index = torch.tensor([3, 0, 2])
    whole = dense.view(-1, *factor.shape)
    torch.testing.assert_close(factor.slab(index), whole[:, index])
    torch.testing.assert_close(factor.slab(slice(1, 4)), whole[:, 1:4])


@pytest.mark.parametrize("name", FACTORS)
def test_products_are_those_of_the_rows(name: str) -> None:
    factor = FACTORS[name]()
    K = factor.to_dense()
    u, a = torch.randn(factor.shape), torch.randn(factor.rank)
    torch.testing.assert_close(factor.matvec(u), K @ u.flatten())
    torch.testing.assert_close(factor.rmatvec(a).flatten(), K.mT @ a)
    torch.testing.assert_close(factor.row_sum().flatten(), K.sum(0))
    part = factor.narrow(3, 6)
    torch.testing.assert_close(part.to_dense(), K[3:])
    assert float(part.magnitude()) >= float(K[3:].norm(dim=1).sum())
    assert float(factor.magnitude()) >= float(K.norm(dim=1).sum())
    assert factor.to(torch.float32).double().dtype == torch.float64


@pytest.mark.parametrize("most", [1, 400, 1 << 22])
@pytest.mark.parametrize("channels", [1, 2, 3])
def test_convolutions_of_few_channels_in_float32(
    channels: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Their gradients are products with patches, a few examples at a time.
    factor = convolution(channels=channels)
    narrow, K = factor.to(torch.float32), factor.to_dense().view(-1, *factor.shape)
    a = torch.randn(factor.rank)
    monkeypatch.setattr(chunks, "MOST_ENTRIES", most)
    for found, weights in (
        (narrow.rmatvec(a.float()), a),
        (narrow.row_sum(), torch.ones(factor.rank)),
    ):
        wanted = torch.einsum("k,k...->...", weights, K)
        size = torch.einsum("k,k...->...", weights.abs(), K.abs())
        assert found.dtype == torch.float32
        assert bool(((found - wanted).abs() <= 1e-5 * size).all())


def test_products_with_rows_that_a_wider_gram_matrix_has_left() -> None:
    factor = convolution().to(torch.float32)
    u, a = torch.randn(factor.shape), torch.randn(factor.rank)
    assert isinstance(factor, fs.ConvolutionFactor)
    before = factor.matvec(u.float()), factor.rmatvec(a.float())
    space = TangentSpace(geoopt.Euclidean(), torch.zeros(factor.shape).float())
    factor.gram(space, torch.float64)
    assert factor.whole is not None
    assert factor.whole.dtype == torch.float64
    after = factor.matvec(u.float()), factor.rmatvec(a.float())
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)


# ---- nothing to sum over ---------------------------------------------------------


def without_tokens() -> fs.EmbeddingFactor:
    none = torch.zeros(0, dtype=torch.long)
    return fs.EmbeddingFactor(none, torch.randn(2, 3, 2, 3), 7, none, torch.randn(0))


def without_uses(transposed: bool = False) -> fs.ConvolutionFactor:
    factor = convolution(1, transposed)
    x, l = factor.inputs[:, :0], factor.cotangents[:, :, :0]
    return fs.ConvolutionFactor(factor.convolution, x, l, factor.shape)


NOTHING: dict[str, Callable[[], fs.MetricFactor]] = {
    "linear": lambda: linear_factor((7, 3), 0),
    "stacked": lambda: StackedFactor([linear_factor((4, 3), 0) for _ in range(2)]),
    "convolution": without_uses,
    "transposed": lambda: without_uses(True),
    "embedding": lambda: tokens(0),
    "bags": without_tokens,
    "embedding-twice": lambda: tokens(0) + without_tokens(),
    "tied": lambda: tokens(0) + linear_factor((7, 3), 0),
    "no-inputs": lambda: linear_factor((7, 0), 2),
    "no-outputs": lambda: linear_factor((0, 3), 2),
    "no-entries": lambda: fs.DenseFactor(torch.randn(6, 0, 3)),
}


@pytest.fixture
def _fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    assert torch.empty(1).isnan()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("_fresh_memory_is_nan")
@pytest.mark.parametrize("form", [False, True], ids=["pairs", "rows"])
@pytest.mark.parametrize("name", BASES)
def test_no_positions(name: str, form: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "forms_rows", lambda *sizes: form)
    space, factor = space_of(BASES[name]), linear_factor(BASES[name].shape, 0)
    assert_gram(factor, space)
    onto = torch.eye(factor.rank)
    torch.testing.assert_close(
        factor.gram(space, torch.float64, onto=onto), torch.eye(factor.rank)
    )


@pytest.mark.usefixtures("_fresh_memory_is_nan")
@pytest.mark.parametrize("base", ["euclidean", "euclidean-diagonal", "unknown"])
@pytest.mark.parametrize("name", NOTHING)
def test_a_sum_of_nothing_is_zero(name: str, base: str) -> None:
    factor = NOTHING[name]()
    mass = (
        BASES[base].mass(*(*factor.shape, 1)[:2]) if len(factor.shape) == 2 else Mass()
    )
    space = TangentSpace(BASES[base].make(), torch.randn(factor.shape), mass)
    rank, u, a = factor.rank, torch.randn(factor.shape), torch.randn(factor.rank)
    assert torch.equal(factor.rows(0, rank), torch.zeros(rank, *factor.shape))
    assert torch.equal(
        lower(factor.gram(space, torch.float64)), torch.zeros(rank, rank)
    )
    assert torch.equal(factor.matvec(u), torch.zeros(rank))
    assert torch.equal(factor.rmatvec(a), torch.zeros(factor.shape))
    assert torch.equal(factor.row_sum(), torch.zeros(factor.shape))
    assert torch.equal(factor.magnitude(), torch.zeros(()))
    assert torch.equal(factor.image(space, u, factor), torch.zeros(rank))
    assert torch.equal(factor.narrow(3, 6).matvec(u), torch.zeros(3))
    block = fs.BlockFactor([(factor, space)])
    assert torch.equal(block.gram_product(a), torch.zeros(rank))
    some = torch.tensor([4, 1])
    assert torch.equal(block.gram_columns(some), torch.zeros(rank, 2))
    assert torch.equal(block.gram_diagonal(), torch.zeros(rank))


class Largest(TorchDispatchMode):
    """Remembers the number of entries of the largest tensor that was made."""

    most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else (result,):
            if isinstance(each, Tensor) and each.untyped_storage().nbytes() > 0:
                self.most = max(self.most, each.numel())
        return result


@pytest.mark.parametrize("name", ["linear", "grouped", "transposed", "convolution"])
def test_slabs_keep_within_the_bound(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MOST_ENTRIES", 200)
    factor = FACTORS[name]()
    wide = fs.LinearFactor(torch.randn(3, 20, 3), torch.randn(2, 3, 20, 90))
    factor = wide if name == "linear" else factor
    space = TangentSpace(geoopt.Sphere(), torch.randn(factor.shape))
    own = sum(t.numel() for t in (factor.inputs, factor.cotangents))
    with Largest() as seen:
        factor.gram(space, torch.float64)
    assert seen.most <= max(200, own)
    assert factor.rank * space.point.numel() > 200


# ---- embeddings ------------------------------------------------------------------


def price_of_pairs(monkeypatch: pytest.MonkeyPatch, price: float) -> None:
    for name in ("_ENTRY", "_GATHERED", "_TOKEN"):
        monkeypatch.setattr(embedding, name, 0.0)
    monkeypatch.setattr(embedding, "_PAIR", price)


@pytest.mark.parametrize("price", [0.0, 1.0, 1e9], ids=["pairs", "both", "table"])
@pytest.mark.parametrize("name", sorted(BY_ROW))
@pytest.mark.parametrize("kind", ["embedding", "bags", "embedding-and-bags"])
def test_tokens_go_either_way(
    kind: str, name: str, price: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    factor = FACTORS[kind]()
    # With a price of 1 only tokens that occur once go by pairs.
    price_of_pairs(monkeypatch, price * 0.5 * factor.rank**2 * factor.shape[1])
    counts = factor.tokens.bincount()
    assert 1 in counts
    assert counts.amax() > 1
    assert_gram(factor, space_of(BASES[name], (7, 3)))


@given(st.integers(1, 4), st.integers(1, 9), st.integers(1, 6), st.integers(1, 3))
def test_any_tokens(vocabulary: int, places: int, n: int, r: int) -> None:
    found = torch.randint(vocabulary, (n * places,))
    factor = fs.EmbeddingFactor(found, torch.randn(r, n, places, 2), vocabulary)
    assert_gram(factor, space_of(BASES["sphere"], (vocabulary, 2)))


@given(st.integers(1, 12), st.integers(0, 9), st.integers(0, 1000))
def test_the_table_that_no_device_waits_for(size: int, count: int, seed: int) -> None:
    found = torch.randint(size, (count,), generator=torch.Generator().manual_seed(seed))
    table, slot = tokens_of.slots_at_most(found, size)
    assert len(table) == min(size, count)
    assert torch.equal(table[slot], found)
    assert len(slot.unique()) == len(found.unique())


@pytest.mark.parametrize("kind", ["embedding", "bags", "embedding-and-bags", "tied"])
@pytest.mark.parametrize("name", ["euclidean", "poincare"])
def test_the_way_of_other_devices_is_right(
    kind: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slots(factor: fs.EmbeddingFactor) -> tuple[Tensor, Tensor]:
        return tokens_of.slots_at_most(factor.tokens, factor.shape[0])

    monkeypatch.setattr(fs.EmbeddingFactor, "_slots", property(slots))
    price_of_pairs(monkeypatch, 1e9)
    for vocabulary in (7, 40):
        factor = FACTORS[kind]()
        if kind != "tied":
            old = factor
            factor = fs.EmbeddingFactor(
                old.tokens, old.cotangents, vocabulary, old.places, old.weights
            )
        assert_gram(factor, space_of(BASES[name], factor.shape))


@pytest.mark.parametrize("name", ["euclidean", "sphere", "poincare", "positive"])
def test_nothing_of_the_size_of_the_vocabulary_is_made(name: str) -> None:
    vocabulary = 100_000
    base = space_of(BASES[name], (vocabulary, 3))
    found = torch.randint(vocabulary, (12,))
    factor = fs.EmbeddingFactor(found, torch.randn(2, 4, 3, 3), vocabulary)
    e = factor.narrow(0, 4).row_sum()
    with Largest() as seen:
        factor.gram(base, torch.float64)
        gram_diagonal(factor, base)
        factor.image(base, e, factor)
        factor.matvec(base.point)
        factor.magnitude()
    assert seen.most < 2000
    expected = factor.matvec(base.sharp(e))
    torch.testing.assert_close(factor.image(base, e, factor), expected)


def test_few_occurrences_are_cheap_however_long_the_table() -> None:
    # Pairs of occurrences: no reason for iterations over the whole vocabulary.
    found = torch.randint(10**6, (4_000,))
    factor = fs.EmbeddingFactor(found, torch.randn(19, 40, 100, 8), 10**6)
    model = work(factor, space_of(BASES["euclidean"], (10**6, 8)))
    assert model.gram < 10 * model.product
    often = fs.EmbeddingFactor(found % 50, factor.cotangents, 50)
    table = 0.5 * often.rank**2 * often.shape[0] * often.shape[1]
    assert 0.5 * table < often.gram_work() < 4.0 * table


def test_a_wide_vocabulary_is_learned_with() -> None:
    model = torch.nn.Sequential(
        torch.nn.Embedding(20_000, 4), torch.nn.Flatten(), torch.nn.Linear(12, 2)
    )
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    x, target = torch.randint(20_000, (64, 3)), torch.randint(2, (64,))
    for _ in range(2):
        with metric.record():
            z = model(x)
        loss = torch.nn.functional.cross_entropy(z, target)
        with Largest() as seen:
            metric.backward(loss, z)
            metric.natural_gradient()
    assert seen.most <= 4 * 20_000


# ---- convolutions ----------------------------------------------------------------


@pytest.mark.parametrize("form", [False, True], ids=["pairs", "rows"])
@pytest.mark.parametrize("transposed", [False, True])
def test_patches_in_pairs_of_positions(
    transposed: bool, form: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (linear, fs.convolution):
        monkeypatch.setattr(module, "forms_rows", lambda *sizes: form)
    factor = convolution(1, transposed)
    space = TangentSpace(geoopt.Euclidean(), torch.randn(factor.shape), Mass(0.3))
    assert_gram(factor, space)
    assert_gram(factor.to(torch.float32), space.to(torch.float32), torch.float32)
    dense = factor.unfolded().to_dense()
    torch.testing.assert_close(dense, factor.to_dense())


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "make", [rm.manifolds.Sphere, rm.manifolds.Stiefel, rm.manifolds.PoincareBall]
)
@pytest.mark.parametrize("most", [1, 1 << 22])
def test_filters_on_manifolds(
    make: Any, groups: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chunks, "MOST_ENTRIES", most)
    factor = convolution(groups)
    for manifold in (make(), Reshaped.filters(make(), factor.shape, groups)):
        point = manifold.projx(0.1 * torch.randn(factor.shape))
        assert_gram(factor, TangentSpace(manifold, point, Mass(scalar=0.5)))


def test_factors_of_other_kinds_add_up_densely() -> None:
    one, other = linear_factor((7, 3), 2), tokens()
    dense = fs.DenseFactor(other.rows(0, 6))
    for total in (one + dense, dense + one, fs.joined([one, dense, one])):
        assert isinstance(total, fs.DenseFactor)
    torch.testing.assert_close((one + dense).to_dense(), (one + other).to_dense())


def test_tensors_that_do_not_fit_are_refused() -> None:
    plain = fs.Convolution((2,), (1,), (0,), (1,))
    x, l = torch.randn(3, 1, 2, 4), torch.randn(2, 3, 1, 2, 3)
    with pytest.raises(rm.errors.ShapeError, match="uses"):
        fs.ConvolutionFactor(plain, x[0], l, (2, 2, 2))
    with pytest.raises(rm.errors.ShapeError, match="tokens"):
        fs.EmbeddingFactor(torch.zeros(5).long(), torch.randn(1, 3, 2, 2), 4)
    with pytest.raises(rm.errors.ShapeError, match="alike"):
        fs.SumFactor([tokens(), linear_factor((7, 4), 1)])
    with pytest.raises(rm.errors.ShapeError, match="groups"):
        fs.ConvolutionFactor(plain, x, l, (2, 2, 2)).narrow(1, 4)
