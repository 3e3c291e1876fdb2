"""FixedRank in the time that its rank takes: range finders and when they are right."""

from collections.abc import Callable

import pytest
import torch
from manifold_cases import assert_two_derivatives
from torch import Tensor

from riemannian_modules import manifolds
from riemannian_modules.manifolds import low_rank
from riemannian_modules.manifolds.fixed_rank import orthographic_step
from riemannian_modules.manifolds.low_rank import low_rank_svd

SHAPES = [(90, 70), (70, 90), (2, 3, 80, 80)]


def of_rank(rank: int, shape: tuple[int, ...]) -> Tensor:
    *batch, m, n = shape
    return torch.randn(*batch, m, rank) @ torch.randn(*batch, rank, n)


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The shorter sides of all matrices that are decomposed."""
    found: list[int] = []
    svd = torch.linalg.svd

    def seen(x: Tensor, full_matrices: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        found.append(min(x.shape[-2:]))
        return svd(x, full_matrices=full_matrices)

    monkeypatch.setattr(torch.linalg, "svd", seen)
    return found


def by_whole_decomposition(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Tensor]
) -> Tensor:
    with monkeypatch.context() as patch:
        patch.setattr(low_rank, "_LEAST", 10**9)
        return call()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_no_operation_decomposes_the_whole_matrix(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    sides: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    manifold = manifolds.FixedRank(3)
    x = manifold.projx(of_rank(3, shape)).to(dtype)
    vector = torch.randn(shape, dtype=dtype)
    u = 0.1 * manifold.proju(x, vector)
    y = manifold.retr(x, u)
    assert manifold.check_point_on_manifold(y)
    eps = torch.finfo(dtype).eps
    for call in (
        lambda: manifold.projx(x),
        lambda: manifold.proju(x, vector),
        lambda: manifold.egrad2rgrad(x, vector),
        lambda: manifold.retr(x, u),
        lambda: manifold.transp(x, y, u),
        lambda: orthographic_step(x, u, 3),
    ):
        sides.clear()
        found = call()
        assert sides == [11]
        expected = by_whole_decomposition(monkeypatch, call)
        assert max(sides) >= 70
        size = torch.linalg.matrix_norm(expected).max()
        assert float((found - expected).abs().max()) < 32.0 * eps * float(size)


@pytest.mark.parametrize("shape", SHAPES)
def test_matrices_of_another_rank_are_decomposed_whole(
    shape: tuple[int, ...], sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifold = manifolds.FixedRank(2)
    some = of_rank(2, shape)
    last = some[-1] if some.ndim > 2 else some
    for rest in (torch.randn_like(last), 1e-10 * torch.randn_like(last)):
        x = some.clone()
        (x[-1] if some.ndim > 2 else x).add_(rest)
        sides.clear()
        y = manifold.projx(x)
        assert sides == [min(shape[-2:])]
        expected = by_whole_decomposition(monkeypatch, lambda x=x: manifold.projx(x))
        assert torch.equal(y, expected)


def test_what_the_range_finder_does_not_see_is_not_lost(
    sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = low_rank._spread(90, 7, torch.ones(()))
    unseen = torch.linalg.qr(start, mode="complete")[0][:, 7:9]
    x = torch.randn(80, 2) @ unseen.mT
    u, values, vh = low_rank_svd(x, 2)
    torch.testing.assert_close((u * values) @ vh, x, rtol=1e-13, atol=1e-13)
    # Rounding sees it, which a start of zeros does not leave to anything.
    monkeypatch.setattr(low_rank, "_spread", lambda *_: torch.zeros(90, 7))
    x[:7] = 0.0
    sides.clear()
    u, values, vh = low_rank_svd(x, 2)
    assert sides == [80]
    torch.testing.assert_close((u * values) @ vh, x, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("ratio", [1.0, 1e-6, 1e-12])
def test_small_singular_values_are_as_good_as_by_the_whole_decomposition(
    ratio: float, sides: list[int]
) -> None:
    left = torch.linalg.qr(torch.randn(90, 2))[0]
    right = torch.linalg.qr(torch.randn(70, 2))[0]
    x = (left * torch.tensor([1.0, ratio])) @ right.mT
    u, values, _ = low_rank_svd(x, 2)
    assert sides == [7]
    assert float((values[:2] - torch.tensor([1.0, ratio])).abs().max()) < 1e-15 * 4
    expected = torch.linalg.svd(x, full_matrices=False)[0][:, :2]
    for found in (u[:, :2], expected):
        error = torch.linalg.matrix_norm(found - left @ (left.mT @ found))
        assert float(error) < 1e-14 / ratio


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
def test_values_without_a_rank(value: float) -> None:
    x = torch.full((90, 80), value)
    if value == 0.0:
        assert torch.equal(manifolds.FixedRank(2).projx(x), x)
    else:
        with pytest.raises(RuntimeError, match=r"non-finite|failed to converge"):
            low_rank_svd(x, 2)


def test_the_same_input_has_the_same_bits_and_no_random_number_is_drawn() -> None:
    manifold = manifolds.FixedRank(3)
    x = of_rank(3, (90, 80))
    state = torch.get_rng_state()
    first = manifold.retr(x, torch.zeros_like(x))
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    assert torch.equal(manifold.retr(x, torch.zeros_like(x)), first)


def test_the_fixed_start_has_no_pattern() -> None:
    start = low_rank._spread(400, 30, torch.ones(()))
    assert abs(float(start.mean())) < 0.03
    assert abs(float(start.square().mean()) - 1.0 / 3.0) < 0.02
    for some in (start[:30], start[100:130], start[::13][:30], start[30:40, :10]):
        assert float(torch.linalg.cond(some)) < 2000.0
    assert float(torch.linalg.cond(start)) < 2.5


def test_inside_of_transformations(
    sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifold = manifolds.FixedRank(2)
    x, u = manifold.projx(of_rank(2, (3, 70, 80))), torch.randn(3, 70, 80)
    plain = manifold.proju(x, u)
    sides.clear()
    mapped = torch.func.vmap(manifold.proju)(x, u)
    over_vectors = torch.func.vmap(lambda v: manifold.proju(x[0], v))(u)
    assert sides == [9, 9]
    torch.testing.assert_close(mapped, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(over_vectors[0], plain[0], rtol=1e-12, atol=1e-12)
    x[1] += torch.randn(70, 80)  # one of the batch alone
    sides.clear()
    mapped = torch.func.vmap(manifold.projx)(x)
    assert sides == [70]
    torch.testing.assert_close(mapped, manifold.projx(x), rtol=1e-12, atol=1e-12)

    def slope() -> Tensor:
        move = torch.func.jvp(lambda t: manifold.retr(x[0], t * u[0]), (one,), (one,))
        return move[1]

    one = torch.tensor(0.1)
    sides.clear()
    found = slope()
    expected = by_whole_decomposition(monkeypatch, slope)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_shapes_alone_and_empty_batches() -> None:
    manifold = manifolds.FixedRank(2)
    assert manifold.projx(torch.empty(90, 80, device="meta")).shape == (90, 80)
    assert manifold.projx(torch.empty(0, 90, 80)).shape == (0, 90, 80)


# torch 2.6 says so of its own gradcheck.
@pytest.mark.filterwarnings("ignore:Please use `torch.vmap`:FutureWarning")
@pytest.mark.parametrize("shape", [(8, 9), (9, 8)])
def test_derivatives_where_the_rest_is_left_out(
    shape: tuple[int, ...], sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(low_rank, "_LEAST", 1)
    monkeypatch.setattr(low_rank, "_RATIO", 1)
    manifold = manifolds.FixedRank(1)
    x, u = manifold.projx(of_rank(1, shape)), 0.1 * torch.randn(shape)
    for point in (x, x + 0.3 * manifold.proju(x, u)):
        first = point.clone().requires_grad_()
        second = u.clone().requires_grad_()
        sides.clear()
        assert_two_derivatives(manifold.projx, (first,), batched=True)
        assert 7 in sides
        assert_two_derivatives(manifold.proju, (first, second))


def test_a_third_derivative_where_the_rest_is_left_out(
    sides: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifold = manifolds.FixedRank(2)
    x, u = manifold.projx(of_rank(2, (70, 80))), torch.randn(70, 80)

    def third() -> Tensor:
        value: Callable[[Tensor], Tensor] = lambda t: manifold.projx(x + t * u)  # noqa: E731
        for _ in range(3):
            value = torch.func.jacfwd(value)
        return value(torch.tensor(0.0))

    sides.clear()
    found = third()
    assert sides == [9]
    expected = by_whole_decomposition(monkeypatch, third)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
