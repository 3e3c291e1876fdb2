"""Products with the factors of a block, against those of its tensors alone."""

import geoopt
import pytest
import torch
from test_structured_grams import BASES, dense_gram, linear_factor, lower, space_of
from torch import Tensor

from riemannian_modules import Mass, TangentSpace, woodbury
from riemannian_modules import factors as fs
from riemannian_modules.testing.strategies import VECTOR_MANIFOLDS

NAMES = sorted(BASES)


def flat(shape: tuple[int, ...], mass: float) -> TangentSpace:
    return TangentSpace(geoopt.Euclidean(), torch.randn(shape), Mass(scalar=mass))


def block_of(name: str, positions: int, groups: int = 3, bias_on: str = "euclidean"):
    """Return a layer with its bias and another tensor, for all groups of rows."""
    space = space_of(BASES[name])
    weight = linear_factor(BASES[name].shape, positions, groups)
    bias = fs.BiasFactor(weight.cotangents)
    other = fs.DenseFactor(torch.randn(weight.rank, 5))
    home = bias_space(bias_on, bias.shape)
    return [(weight, space), (bias, home), (other, flat((5,), 2.0))]


def bias_space(name: str, shape: tuple[int, ...]) -> TangentSpace:
    """Return where a bias lives; "masses" are those of a diagonal mass."""
    if name == "masses":
        mass = Mass(diagonal=torch.rand(shape) + 0.5)
        return TangentSpace(geoopt.Euclidean(), torch.randn(shape), mass)
    manifold = VECTOR_MANIFOLDS[name]()
    point = 0.6 * torch.nn.functional.normalize(torch.randn(shape), dim=0)
    return TangentSpace(manifold, manifold.projx(point), Mass(scalar=0.5))


def part(pairs, start: int, stop: int):
    return [(factor.narrow(start, stop), space) for factor, space in pairs]


def assert_close(found: Tensor, wanted: Tensor) -> None:
    size = float(wanted.norm()) + 1.0
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12 * size)


@pytest.mark.parametrize("given", ["nothing", "covectors", "factors"])
@pytest.mark.parametrize("positions", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_direction(name: str, positions: int, given: str) -> None:
    pairs, a = block_of(name, positions), torch.randn(6)
    own, last = part(pairs, 0, 6), part(pairs, 6, 9)
    sums = [factor.row_sum() for factor, _ in last]
    e = None if given == "nothing" else sums
    source = [factor for factor, _ in last] if given == "factors" else None
    found = fs.BlockFactor(own).direction(a, e, source)
    for index, (factor, space) in enumerate(own):
        lowered = torch.tensordot(a, factor.rows(0, 6), 1)
        covector = lowered if e is None else sums[index] - lowered
        assert_close(found[index], space.sharp(covector))


def test_a_bias_with_another_source_than_its_weight() -> None:
    weight = linear_factor((4, 3), 1, 3)
    other = fs.BiasFactor(torch.randn(1, 3, 1, 4))
    pairs = [
        (weight, flat((4, 3), 1.0)),
        (fs.BiasFactor(weight.cotangents), flat((4,), 1.0)),
    ]
    own = part(pairs, 0, 6)
    source, a = [weight.narrow(6, 9), other], torch.randn(6)
    sums = [each.row_sum() for each in source]
    _, found = fs.BlockFactor(own).direction(a, sums, source)
    assert_close(found, other.row_sum() - own[1][0].rmatvec(a))


@pytest.mark.parametrize("width", [2, 40])
@pytest.mark.parametrize("known", [False, True], ids=["fresh", "after-gram"])
@pytest.mark.parametrize("positions", [0, 1])
@pytest.mark.parametrize("name", NAMES)
def test_image(name: str, positions: int, known: bool, width: int) -> None:
    # More and fewer examples than inputs; the kernel of the Gram matrix serves again.
    pairs = block_of(name, positions)
    if name == "euclidean":
        weight = linear_factor((4, width), positions, 3)
        pairs[0] = weight, space_of(BASES[name], weight.shape)
        pairs[1] = fs.BiasFactor(weight.cotangents), pairs[1][1]
    own, last = part(pairs, 0, 6), part(pairs, 6, 9)
    sums = [factor.row_sum() for factor, _ in last]
    block = fs.BlockFactor(own)
    if known:
        block.gram(torch.float64)
    found = block.image(sums, [factor for factor, _ in last])
    wanted = [
        factor.matvec(space.sharp(e))
        for (factor, space), e in zip(own, sums, strict=True)
    ]
    assert_close(found, torch.stack(wanted).sum(0))


@pytest.mark.parametrize("positions", [0, 1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_gram_of_two_layers(name: str, positions: int) -> None:
    # The second layer is added to the matrix of the first.
    pairs = [*block_of("euclidean", 1), *block_of(name, positions)]
    found = lower(fs.BlockFactor(pairs).gram(torch.float64))
    wanted = [dense_gram(space, factor.rows(0, 9)) for factor, space in pairs]
    assert_close(found, torch.stack(wanted).sum(0))


@pytest.mark.parametrize("bias_on", [*VECTOR_MANIFOLDS, "masses"])
@pytest.mark.parametrize("weight_on", ["euclidean", "stiefel-wide", "scaled-sphere"])
def test_a_bias_that_lives_elsewhere_than_its_weight(
    weight_on: str, bias_on: str
) -> None:
    pairs = block_of(weight_on, 1, bias_on=bias_on)
    own, last = part(pairs, 0, 6), part(pairs, 6, 9)
    block, source = fs.BlockFactor(own), [factor for factor, _ in last]
    dense = [(factor, space, factor.rows(0, 6)) for factor, space in own]
    wanted = [dense_gram(space, rows) for _, space, rows in dense]
    assert_close(lower(block.gram(torch.float64)), torch.stack(wanted).sum(0))
    sums, a = [factor.row_sum() for factor in source], torch.randn(6)
    images = [
        f.matvec(space.sharp(e)) for (f, space, _), e in zip(dense, sums, strict=True)
    ]
    assert_close(block.image(sums, source), torch.stack(images).sum(0))
    found = block.direction(a, sums, source)
    for x, (_, space, rows), e in zip(found, dense, sums, strict=True):
        assert_close(x, space.sharp(e - torch.tensordot(a, rows, 1)))


def test_cotangents_are_shared_only_if_they_are_the_same_numbers() -> None:
    # A transposed view has the memory and the shape, but not the order.
    l = torch.randn(2, 3, 4, 4)
    weight = fs.LinearFactor(torch.randn(3, 4, 5), l)
    assert fs.BiasFactor(l).belongs_to(weight)
    assert not fs.BiasFactor(l.mT).belongs_to(weight)
    space = flat((4, 5), 1.0), flat((4,), 1.0)
    pairs = [(weight, space[0]), (fs.BiasFactor(l.mT), space[1])]
    wanted = [dense_gram(space, factor.rows(0, 6)) for factor, space in pairs]
    found = lower(fs.BlockFactor(pairs).gram(torch.float64))
    assert_close(found, torch.stack(wanted).sum(0))


@pytest.mark.parametrize("overwrite", [False, True])
def test_the_factor_takes_the_memory_of_the_matrix(overwrite: bool) -> None:
    root = torch.randn(7, 7)
    matrix = root @ root.mT + torch.eye(7)
    before, rhs = matrix.clone(), torch.randn(7)
    factor = woodbury.cholesky(matrix, overwrite=overwrite)
    same = factor.lower.data_ptr() == matrix.data_ptr()
    assert same == overwrite
    assert torch.equal(matrix, before) != overwrite
    assert int(factor.info) == 0
    assert torch.equal(factor.lower, factor.lower.tril())
    assert_close(factor.lower @ factor.lower.mT, before)
    assert_close(before @ factor.solve(rhs), rhs)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_failed_factorisation_says_where(overwrite: bool) -> None:
    matrix = torch.diag(torch.tensor([1.0, 2.0, -1.0, 3.0]))
    assert int(woodbury.cholesky(matrix, overwrite=overwrite).info) == 3


def test_the_dense_kernels_can_be_differentiated() -> None:
    K, y = torch.randn(2, 4, requires_grad=True), torch.randn(2)
    assert torch.autograd.gradcheck(lambda K: woodbury.push_through(K, 0.5, y), (K,))
