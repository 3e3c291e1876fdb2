"""Parts that raise, return what does not fit, or return NaN, instead of being wrong."""

from collections.abc import Callable, Mapping

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules import LayerMetric
from riemannian_modules.factors import DenseFactor, LinearFactor
from riemannian_modules.output import OutputMetric
from riemannian_modules.retractions import Retraction
from riemannian_modules.rules import register_rule

# ---- manifolds: a method, and what it does instead ---------------------------------


def boom(*args, **kwargs):
    raise ValueError("boom")


def short(x: Tensor, *others: Tensor, **kwargs) -> Tensor:
    return x[..., :2]


def nothing(*args, **kwargs) -> None:
    return None


def nan(x: Tensor, *others: Tensor, **kwargs) -> Tensor:
    return torch.full_like(x, torch.nan)


WRONG = {"raises": boom, "short": short, "nothing": nothing, "nan": nan}
METHODS = ["egrad2rgrad", "inner", "proju", "projx", "retr", "expmap", "dist", "random"]


def manifold(method: str, wrong: Callable) -> geoopt.Manifold:
    """Return a sphere with one method that is broken."""

    class Broken(geoopt.Sphere):
        pass

    if method == "random":
        wrong = boom if wrong is short else wrong

        def replaced(self, *size, dtype=None, device=None):
            return wrong(torch.zeros(*size, dtype=dtype))
    else:

        def replaced(self, *args, **kwargs):
            return wrong(*args, **kwargs)

    setattr(Broken, method, replaced)
    return Broken()


# ---- retractions -------------------------------------------------------------------


class Broken(Retraction):
    def __init__(self, wrong: Callable) -> None:
        self.wrong = wrong

    def __call__(self, manifold, point, vector):
        return self.wrong(point, vector)

    def order(self, manifold):
        return 1


class Unordered(Retraction):
    def __call__(self, manifold, point, vector):
        return manifold.retr(point, vector)

    def order(self, manifold):
        raise ValueError("boom")


# ---- output metrics ----------------------------------------------------------------


class BrokenRows(OutputMetric):
    def __init__(self, wrong: Callable) -> None:
        self.wrong = wrong

    def factor(self, outputs):
        return self.wrong(outputs)


class RaisingResidual(OutputMetric):
    def factor(self, outputs):
        return torch.ones_like(outputs).diag_embed()

    def whiten(self, outputs, cotangent):
        raise ValueError("boom")


# ---- metrics -----------------------------------------------------------------------


class RaisingSharp(LayerMetric):
    def sharp(self, e):
        raise ValueError("boom")


class NanSharp(LayerMetric):
    """NaN in the last parameter only, where a running maximum overlooks it."""

    def sharp(self, e):
        found = super().sharp(e)
        last = list(found)[-1]
        return {**found, last: torch.full_like(found[last], torch.nan)}


class RaisingRows(LinearFactor):
    def rows(self, start, stop):
        raise ValueError("boom")


# ---- rules -------------------------------------------------------------------------


class Adapter(nn.Module):
    """``y = B A x``, with a right rule: what the wrong ones start from."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(2, 5))
        self.b = nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.a.mT) @ self.b.mT


def right(call) -> dict[str, DenseFactor]:
    x, l, layer = call.first(call.input), call.cotangent(), call.module
    a, b = layer.a.detach(), layer.b.detach()
    rows = {
        "a": torch.einsum("rno,ok,ni->rnki", l, b, x),
        "b": torch.einsum("rno,ni,ki->rnok", l, x, a),
    }
    return {name: DenseFactor(each.flatten(0, 1)) for name, each in rows.items()}


def popping(call):
    found = right(call)
    del found["b"]
    return {path: found[path] for path in call.wanted}


def transposed(call):
    return {k: DenseFactor(v.rows(0, v.rank).mT) for k, v in right(call).items()}


def halved(call):
    return {k: DenseFactor(v.rows(0, v.rank // 2)) for k, v in right(call).items()}


def tensors(call):
    return {k: v.rows(0, v.rank) for k, v in right(call).items()}


def listed(call):
    return list(right(call).values())


# {rule: what its message says}
RULES: Mapping[str, tuple[Callable, str]] = {
    "raises": (boom, r"raised ValueError: boom"),
    "nothing": (nothing, r"returned a NoneType, not a mapping"),
    "list": (listed, r"returned a list, not a mapping"),
    "shape": (transposed, r"shape \(5, 2\) for '0\.a', not of .* shape \(2, 5\)"),
    "rank": (halved, r"of rank \d+ and shape .* not of rank \d+ \(\d+ cotangents"),
    "tensors": (tensors, r"returned a Tensor for '0\.a', not a MetricFactor"),
    "popping": (popping, r"raised KeyError"),
}


def adapter(rule: Callable) -> Adapter:
    """Return a layer of a type of its own with this rule."""

    class Own(Adapter):
        forward = Adapter.forward

    Own.__name__ = "Adapter"
    register_rule(Own, rule)
    return Own()
