"""Rules of layers with one mistake each, by the law that finds it."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from riemannian_modules import TangentSpace, rules
from riemannian_modules.factors import (
    BiasFactor,
    ConvolutionFactor,
    DenseFactor,
    LinearFactor,
    MetricFactor,
)
from riemannian_modules.rules import Call, register_rule

Example = tuple[nn.Module, tuple[Tensor, ...]]


def normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# ---- layers whose rules are wrong ------------------------------------------------


class FlippedKernel(nn.Conv2d):
    pass


def flipped(call: Call) -> dict[str, MetricFactor]:
    found = rules.convolution(call)
    right = found["weight"]
    found["weight"] = ConvolutionFactor(
        right.convolution,
        right.inputs.flip(-1, -2),
        right.cotangents.flip(-1, -2),
        right.shape,
    )
    return found


class WithoutStride(nn.Conv1d):
    pass


def unstrided(call: Call) -> dict[str, MetricFactor]:
    found = rules.convolution(call)
    right = found["weight"]
    x = right.inputs.new_zeros(right.inputs.shape)
    x[..., : right.inputs.shape[-1] // 2] = right.inputs[..., ::2]
    found["weight"] = ConvolutionFactor(
        right.convolution, x, right.cotangents, right.shape
    )
    return found


class ForgottenBias(nn.LayerNorm):
    pass


def without_bias(call: Call) -> dict[str, MetricFactor]:
    return {"weight": rules.layer_norm(call)["weight"]}


class RawInputs(nn.LayerNorm):
    pass


def raw(call: Call) -> dict[str, MetricFactor]:
    found = rules.layer_norm(call)
    rows = [(own * call.first(call.input)).sum(1) for own in call.cotangent()]
    return {**found, "weight": DenseFactor(torch.cat(rows))}


class EmbeddedPadding(nn.Embedding):
    pass


def padded(call: Call) -> dict[str, MetricFactor]:
    module = call.module
    index, module.padding_idx = module.padding_idx, None
    try:
        return rules.embedding(call)
    finally:
        module.padding_idx = index


class ExampleMajor(nn.GroupNorm):
    pass


def example_major(call: Call) -> dict[str, MetricFactor]:
    r, n = call.cotangent().shape[:2]
    return {
        name: DenseFactor(
            factor.rows(0, r * n).unflatten(0, (r, n)).transpose(0, 1).flatten(0, 1)
        )
        for name, factor in rules.group_norm(call).items()
    }


class FirstUse(nn.Linear):
    """Of several rows that make one example only the first counts."""


def first_use(call: Call) -> dict[str, MetricFactor]:
    found = rules.linear(call)
    weight = found["weight"]
    x, l = weight.inputs, weight.cotangents
    return {**found, "weight": LinearFactor(x[:, :1], l[:, :, :1])}


class NoRule(nn.Bilinear):
    pass


class Counting(nn.Linear):
    def __init__(self) -> None:
        super().__init__(3, 2)
        self.register_buffer("calls", torch.zeros(()))


def counting(call: Call) -> dict[str, MetricFactor]:
    call.module.calls.add_(1.0)
    return rules.linear(call)


# ---- factors with one mistake ----------------------------------------------------


class Kept(LinearFactor):
    """A factor whose parts are of its own class."""

    def narrow(self, start: int, stop: int) -> LinearFactor:
        return type(self)(self.inputs, self._groups(start, stop))

    def double(self) -> LinearFactor:
        return type(self)(self.inputs.double(), self.cotangents.double())

    def right(self) -> LinearFactor:
        return LinearFactor(self.inputs, self.cotangents)


class Stretched(Kept):
    def narrow(self, start: int, stop: int) -> LinearFactor:
        l = self._groups(start, stop)
        return type(self)(self.inputs, 2.0 * l if len(l) == 1 else l)


class FirstGroup(Kept):
    def narrow(self, start: int, stop: int) -> LinearFactor:
        return super().narrow(0, stop - start)


class FirstOfTwo(Kept):
    def __add__(self, other: MetricFactor) -> MetricFactor:
        return self

    @classmethod
    def merge(cls, factors):
        return factors[0]


class Transposed(Kept):
    def matvec(self, u: Tensor) -> Tensor:
        r, n = self.cotangents.shape[:2]
        return super().matvec(u).view(r, n).mT.reshape(-1)


class TransposedBack(Kept):
    def rmatvec(self, a: Tensor) -> Tensor:
        r, n = self.cotangents.shape[:2]
        return super().rmatvec(a.view(n, r).mT.reshape(-1))


class OneRow(Kept):
    def row_sum(self) -> Tensor:
        return self.pull(self.cotangents[0])


class Shifted(Kept):
    def rows(self, start: int, stop: int) -> Tensor:
        if start == 0:
            return super().rows(start, stop)
        return super().rows(start - 1, stop - 1)


class FlatGram(Kept):
    """On every manifold the Gram matrix of the Euclidean one."""

    def gram(self, space, dtype, *, bias=0.0, onto=None):
        rows = self.to_dense().to(dtype)
        gram = rows @ rows.mT / space.mass.scalar
        sums = self.cotangents.sum(2).flatten(0, 1).to(dtype)
        return gram + bias * sums @ sums.mT


class Doubled(Kept):
    def gram(self, space, dtype, *, bias=0.0, onto=None):
        return 2.0 * self.right().gram(space, dtype, bias=bias)


class Unbiased(Kept):
    def gram(self, space: TangentSpace, dtype, *, bias=0.0, onto=None):
        return self.right().gram(space, dtype)


class Single(Kept):
    def double(self) -> LinearFactor:
        return type(self)(self.inputs.float(), self.cotangents.float())


class Small(Kept):
    def magnitude(self) -> Tensor:
        return 0.5 * self.rows(0, self.rank).norm()


def with_weight(kind: type[Kept]) -> Callable[[Call], dict[str, MetricFactor]]:
    def rule(call: Call) -> dict[str, MetricFactor]:
        found = rules.linear(call)
        right = found["weight"]
        bias = BiasFactor(right.cotangents)
        return {"weight": kind(right.inputs, right.cotangents), "bias": bias}

    return rule


def linear(factor: type[Kept]) -> Callable[[], Example]:
    """A linear layer whose weight has this factor."""
    kind = type(f"With{factor.__name__}", (nn.Linear,), {})
    register_rule(kind, with_weight(factor))
    return lambda: (kind(8, 3), (normal(4, 8),))


register_rule(FlippedKernel, flipped)
register_rule(WithoutStride, unstrided)
register_rule(ForgottenBias, without_bias)
register_rule(RawInputs, raw)
register_rule(EmbeddedPadding, padded)
register_rule(ExampleMajor, example_major)
register_rule(FirstUse, first_use)
register_rule(Counting, counting)

RULES: dict[str, list[Callable[[], Example]]] = {
    "factor": [
        lambda: (FlippedKernel(2, 3, 2), (normal(4, 2, 3, 4),)),
        lambda: (WithoutStride(2, 3, 2, stride=2), (normal(4, 2, 6),)),
        # The library itself refuses these two, before any other law is looked at.
        linear(Stretched),
        linear(FirstGroup),
        lambda: (RawInputs(3), (normal(4, 2, 3),)),
        lambda: (
            EmbeddedPadding(5, 2, padding_idx=1),
            (torch.tensor([[0, 1], [1, 2], [3, 1], [1, 4]]),),
        ),
        lambda: (ExampleMajor(1, 2), (normal(4, 2, 3),)),
    ],
    "explained": [
        lambda: (NoRule(2, 3, 2), (normal(4, 2), normal(4, 3))),
        lambda: (ForgottenBias(3), (normal(4, 3),)),
    ],
    "shared": [linear(FirstOfTwo)],
    "folded": [lambda: (FirstUse(3, 2), (normal(4, 3),))],
    "natural_gradient": [linear(Doubled)],
    "matvec": [linear(Transposed)],
    "rmatvec": [linear(TransposedBack)],
    "row_sum": [linear(OneRow)],
    "rows": [linear(Shifted)],
    "gram": [linear(Doubled)],
    "block_gram": [linear(Unbiased)],
    "double": [linear(Single)],
    "magnitude": [linear(Small)],
    "curved_gram": [linear(FlatGram)],
    "unchanged": [lambda: (Counting(), (normal(4, 3),))],
}
