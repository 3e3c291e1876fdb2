"""Values that decide which example goes where: every pass is looked at."""

from collections.abc import Callable
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


# --- operations that begin to mix examples in a later pass


def _triangle(A: Tensor) -> Tensor:
    return A.triu() + 3.0 * torch.eye(len(A)).to(A)


def _mixing(share: Tensor, h: Tensor, other: Tensor) -> Tensor:
    return h + share * other


# Of features h, (n, 4), and a matrix A, (n, n), which begins as the identity.
MIXING: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "product from the right": lambda h, A: (h.T @ A).T,
    "product from the left": lambda h, A: A @ h,
    "linear": lambda h, A: F.linear(h.T, A).T,
    "linear with a bias": lambda h, A: F.linear(h.T, A, 0.0 * A[0]).T,
    "addmm": lambda h, A: torch.addmm(torch.zeros(()).to(h), h.T, A).T,
    "tensordot": lambda h, A: torch.tensordot(A, h, dims=([0], [0])),
    "einsum": lambda h, A: torch.einsum("ij,id->jd", A, h),
    "solve": lambda h, A: torch.linalg.solve(A, h),
    "solve from the right": lambda h, A: torch.linalg.solve(A, h.T, left=False).T,
    "triangular": lambda h, A: torch.linalg.solve_triangular(
        _triangle(A), h, upper=True
    ),
    "convolution": lambda h, A: (
        F.conv1d(h.T.unsqueeze(1), A[:1, :3].flip(1).unsqueeze(0), padding=(2,))[
            :, 0, : len(h)
        ].T
    ),
    "average pooling": lambda h, A: _mixing(A[0, 1], h, F.avg_pool1d(h.T, 3, 1, 1).T),
    "max pooling": lambda h, A: _mixing(A[0, 1], h, F.max_pool1d(h.T, 3, 1, 1).T),
    "layer norm": lambda h, A: _mixing(A[0, 1], h, F.layer_norm(h, h.shape)),
    "group norm": lambda h, A: _mixing(
        A[0, 1], h, F.group_norm(h.T.unsqueeze(0), 1)[0].T
    ),
    "renorm": lambda h, A: _mixing(A[0, 1], h, torch.renorm(h.T, 2, 0, 0.1).T),
    "determinant": lambda h, A: _mixing(A[0, 1], h, torch.linalg.det(h[:4])),
    "reshape": lambda h, A: _mixing(A[0, 1], h, h.T.reshape(h.shape)),
}


class Mixed(nn.Module):
    def __init__(self, mix: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.mix = nn.Linear(3, 4), nn.Linear(4, 2), mix

    def forward(self, x: Tensor, A: Tensor) -> Tensor:
        y: Tensor = self.last(self.mix(torch.tanh(self.first(x)), A))
        return y


def right_or_refused(metric: rm.LayerwiseMetric, *inputs: Tensor) -> bool:
    """Whether a pass is refused; if it is not, its metric is that of autograd."""
    model = metric.model
    try:
        with metric.record():
            z = model(*inputs)
        metric.backward(0.5 * z.square().sum(1).mean(), z)
    except rm.errors.LinearizationError:
        return True
    parameters = [p for p in model.parameters() if p.requires_grad]
    z = model(*inputs)
    rows = [
        torch.cat(
            [g.flatten() for g in torch.autograd.grad(e, parameters, retain_graph=True)]
        )
        for e in z.flatten()
    ]
    flat = [torch.cat([g.flatten() for g in grads]) for grads in rows]
    K = torch.stack(flat) / len(z) ** 0.5
    expected = K.mT @ K + 0.1 * torch.eye(K.shape[1]).to(K)
    torch.testing.assert_close(
        metric.blocks["model"].to_dense(), expected, rtol=1e-7, atol=1e-9
    )
    return False


@pytest.mark.parametrize("name", MIXING)
def test_mixing_that_begins_later_is_seen_at_once(name: str) -> None:
    torch.manual_seed(0)
    model, x = Mixed(MIXING[name]).double(), torch.randn(12, 3).double()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1, blocks="model")
    seen = []
    for index in range(9):
        mixing = index in (5, 6)
        A = torch.eye(12).double() + (
            0.5 * torch.rand(12, 12).double() if mixing else 0.0
        )
        seen.append(right_or_refused(metric, x, A))
    assert not seen[0]


class Without(nn.Module):
    """A layer without a bias, or a table, whose outputs are no weights."""

    def __init__(self, how: str, width: int) -> None:
        super().__init__()
        self.first, self.table = nn.Linear(3, width, bias=False), nn.Embedding(6, width)
        self.last, self.how = nn.Linear(width, 2), how

    def forward(self, x: Tensor, A: Tensor) -> Tensor:
        h = self.first(x)
        if self.how == "product":
            h = A @ h
        elif self.how == "sum of products":
            h = torch.addmm(torch.zeros(()).to(h), A, h)
        elif self.how == "sparse":
            h = A.to_sparse() @ h
        elif self.how == "table":
            h = h + A @ self.table(torch.arange(len(x)))
        elif self.how == "rows":
            h = F.embedding(A.argmax(1), h)
        elif self.how == "turned":
            h = (h.t() @ A).t()
        y: Tensor = self.last(torch.tanh(h))
        return y


@pytest.mark.parametrize("width", [4, 6, 12])
@pytest.mark.parametrize(
    "how", ["product", "sum of products", "sparse", "table", "rows", "turned"]
)
def test_products_with_what_is_no_weight(how: str, width: int) -> None:
    torch.manual_seed(0)
    model = Without(how, width).double()
    if how != "table":
        model.table.requires_grad_(False)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1, blocks="model")
    for index in range(7):
        A = torch.eye(6).double()
        if index > 3:
            A = torch.softmax(torch.randn(6, 6).double(), 1)
        x = torch.randn(6, 3).double()
        refused = right_or_refused(metric, x, A)
        assert index > 3 or not refused


class Gated(nn.Module):
    """Mixes nothing before its gate has moved."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 4), nn.Linear(4, 2)
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.first(x))
        # An operation that no list names.
        points = torch.linspace(-1.0, 1.0, 2 * len(h)).view(1, len(h), 1, 2)
        other = F.grid_sample(h.T[None, :, :, None], points.to(h), align_corners=False)
        y: Tensor = self.last(h + self.gate * other[0, :, :, 0].T)
        return y


@pytest.mark.skipif(
    not hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks"),
    reason="a trained gate has no factor with this torch",
)
def test_a_gate_that_opens_is_seen_in_the_next_pass() -> None:
    torch.manual_seed(0)
    model, x, t = (
        Gated().double(),
        torch.randn(12, 3).double(),
        torch.randn(12, 2).double(),
    )
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric)
    assert not right_or_refused_step(metric, optimizer, x, t)
    assert float(model.gate.detach()) != 0.0
    assert right_or_refused_step(metric, optimizer, x, t)


def test_anything_is_seen_within_eight_passes() -> None:
    torch.manual_seed(0)
    model, x, t = (
        Gated().double(),
        torch.randn(12, 3).double(),
        torch.randn(12, 2).double(),
    )
    model.gate.requires_grad_(False)
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
    optimizer = rm.optim.RiemannianSGD(metric)
    for _ in range(5):
        assert not right_or_refused_step(metric, optimizer, x, t)
    with torch.no_grad():
        model.gate.fill_(0.5)
    seen = [right_or_refused_step(metric, optimizer, x, t) for _ in range(8)]
    assert any(seen)


def right_or_refused_step(
    metric: rm.LayerwiseMetric,
    optimizer: rm.optim.RiemannianSGD,
    x: Tensor,
    t: Tensor,
) -> bool:
    try:
        with metric.record():
            z = metric.model(x)
        metric.backward((z - t).square().sum(1).mean() / 2, z)
    except rm.errors.LinearizationError:
        return True
    optimizer.step()
    return False


class Folded(nn.Module):
    """Rows are positions of examples, in the one order or in the other."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: Tensor, a: int, b: int) -> Tensor:
        h = torch.tanh(self.layer(x))
        return h.view(a, -1, b, 2).sum((0, 2))


def test_a_view_that_takes_rows_apart_in_another_way() -> None:
    torch.manual_seed(0)
    model, x = Folded().double(), torch.randn(8, 3).double()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1, blocks="model")
    for a, b in [(2, 1)] * 4 + [(1, 2), (2, 1), (1, 2), (1, 2), (2, 1)]:
        assert not right_or_refused(metric, x, a, b)


class Experts(nn.Module):
    """Every example goes to one of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        first, index = x[:, 0] > 0, torch.arange(len(x))
        out = x.new_zeros(len(x), 2)
        for chosen, layer in ((first, self.one), (~first, self.other)):
            out = out.index_add(0, index[chosen], layer(x[chosen]))
        return out


@pytest.mark.filterwarnings("ignore:.*boolean mask:UserWarning")
def test_an_expert_without_examples() -> None:
    torch.manual_seed(0)
    model, x = Experts().double(), torch.randn(5, 3).double()
    metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1, blocks="model")
    for sign in (1.0, 1.0, None, -1.0, None, 1.0):
        if sign is not None:
            x[:, 0] = sign * x[:, 0].abs()
        else:
            x = torch.randn(5, 3).double()
        assert not right_or_refused(metric, x)
