"""Values that decide which example goes where: every pass is looked at."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_models import grad_jacobian

import riemannian_modules as rm
from riemannian_modules.errors import LinearizationError
from riemannian_modules.layout import (
    Layout,
    keeps_apart,
    random_scales,
    scaled_examples,
)

N, EACH = 10, 4
EPS = torch.finfo(torch.float64).eps


class Pooled(nn.Module):
    """Adds up the nodes of each graph; what belongs together is an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor, graph: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        return self.last(torch.zeros(N, 6).index_add(0, graph, h))


def misses(moved: int) -> int:
    """How often a batch is not refused whose graphs have a node of the next one."""
    x, y = torch.randn(N * EACH, 4), torch.arange(N) % 3
    even = torch.arange(N).repeat_interleave(EACH)
    missed = 0
    for warm, start in product(range(1, 4), range(N - moved)):
        model = Pooled()
        metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
        odd = even.clone()
        for k in range(start, start + moved):
            odd[EACH * k + EACH - 1] = k + 1
        for graph in [even] * warm + [odd]:
            with metric.record():
                z = model(x, graph)
            try:
                metric.backward(F.cross_entropy(z, y), z)
            except LinearizationError:
                assert graph is odd
                break
        else:
            missed += 1
    return missed


@pytest.mark.parametrize("moved", [1, 3])
def test_a_node_of_another_graph_is_noticed_in_its_first_pass(moved: int) -> None:
    torch.manual_seed(0)
    # Two examples have the same scale, or none, once in thirty passes.
    assert misses(moved) <= 1


def test_examples_in_another_order_give_the_right_metric() -> None:
    torch.manual_seed(0)

    class Reordered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, order: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x))[order])

    model = Reordered()
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    x, y = torch.randn(N, 4), torch.arange(N) % 3
    still, swapped = torch.arange(N), torch.arange(N)
    swapped[[2, 7]] = torch.tensor([7, 2])
    for order in (still, still, swapped, still):
        with metric.record():
            z = model(x, order)
        metric.backward(F.cross_entropy(z, y), z)
        parameters = dict(model.named_parameters())
        dense = grad_jacobian([z], parameters)
        L = rm.output.Categorical().factor(z.detach()) / N**0.5
        for part in metric.blocks["first"].parts:
            want = torch.einsum("nrc,ncp->rnp", L, dense[part.name]).flatten(0, 1)
            found = part.factor.to_dense().flatten(1)
            # Whose row is whose does not matter for the metric.
            torch.testing.assert_close(found.mT @ found, want.mT @ want)


# --- the look itself


def test_scales_are_powers_of_two_and_sometimes_none() -> None:
    coins = torch.Generator().manual_seed(0)
    scales = random_scales(4000, coins)
    some = scales[scales > 0]
    assert torch.equal(some.log2(), some.log2().round())
    assert len(some.unique()) == 41
    assert 0.1 < float((scales == 0).float().mean()) < 0.15
    short = random_scales(4000, coins, short=True)
    assert float(short.max()) == 8.0
    assert torch.equal(short.half().float(), short)


@pytest.mark.parametrize("layout", [Layout(), Layout(1), Layout(0, major=False)])
def test_a_look_sees_what_is_out_of_place(layout: Layout) -> None:
    torch.manual_seed(0)
    shape = {0: (6, 3) if layout.major else (12, 3), 1: (3, 6)}[layout.dim]
    like = torch.randn(shape)
    scales = random_scales(6, torch.Generator().manual_seed(1))
    scales[0], scales[1], scales[2] = 0.0, 1.0, 2.0

    def carried(owner: Tensor) -> Tensor:
        size = like.shape[layout.dim]
        per = scales[owner].repeat(size // 6)
        return like * (per.unsqueeze(1) if layout.dim == 0 else per)

    own = torch.arange(6)
    assert keeps_apart(carried(own), like, scales, layout, EPS)
    rounded = carried(own) * (1 + 1e-14)
    assert keeps_apart(rounded, like, scales, layout, EPS)
    for one, other in ((0, 1), (1, 0), (1, 2)):
        wrong = own.clone()
        wrong[one] = other
        assert not keeps_apart(carried(wrong), like, scales, layout, EPS)
    leak = carried(own)
    front = layout.front(leak, 6)
    front[0] += 1e-30
    assert not keeps_apart(leak, like, scales, layout, EPS)


def test_scaled_examples() -> None:
    z = torch.ones(3, 2, 2)
    scaled = scaled_examples(z, torch.tensor([0.0, 1.0, 4.0]))
    assert scaled.sum((1, 2)).tolist() == [0.0, 4.0, 16.0]


def refused_after(
    model: nn.Module, x: Tensor, y: Tensor, apart: Tensor, mixed: Tensor
) -> None:
    """Two passes that keep the examples apart, and one that does not."""
    metric = rm.LayerwiseMetric(model, rm.output.Categorical(), mass=0.1)
    for how in (apart, apart):
        with metric.record():
            z = model(x, how)
        metric.backward(F.cross_entropy(z, y), z)
    with metric.record():
        z = model(x, mixed)
    with pytest.raises(LinearizationError, match="interact"):
        metric.backward(F.cross_entropy(z, y), z)


SPARSE = {
    "segment_reduce": lambda h, graph: torch.segment_reduce(
        h, "sum", lengths=torch.bincount(graph, minlength=N)
    ),
    "sparse product": lambda h, graph: torch.sparse.mm(
        torch.sparse_coo_tensor(
            torch.stack([graph, torch.arange(len(graph))]),
            torch.ones(len(graph)),
            (N, len(graph)),
            check_invariants=True,
        ),
        h,
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", SPARSE)
def test_other_ways_to_pool(name: str) -> None:
    class Pools(Pooled):
        def forward(self, x: Tensor, graph: Tensor) -> Tensor:
            return self.last(SPARSE[name](torch.tanh(self.first(x)), graph))

    torch.manual_seed(0)
    x, y = torch.randn(N * EACH, 4), torch.arange(N) % 3
    even = torch.arange(N).repeat_interleave(EACH)
    odd = even.clone()
    odd[EACH - 1] = 1
    refused_after(Pools(), x, y, even, odd)


def test_examples_packed_into_one_sequence() -> None:
    class Packed(nn.Module):
        """All examples as one sequence; a mask keeps them apart, or not."""

        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            h = self.first(x).flatten(0, 1)[None, None]
            h = F.scaled_dot_product_attention(h, h, h, attn_mask=mask)
            return self.last(h[0, 0].unflatten(0, x.shape[:2]).sum(1))

    torch.manual_seed(0)
    x, y = torch.randn(N, EACH, 4), torch.arange(N) % 3
    number = torch.arange(N).repeat_interleave(EACH)
    apart = number[:, None] == number
    mixed = apart.clone()
    mixed[5, 30] = mixed[13, 2] = True
    refused_after(Packed(), x, y, apart, mixed)
