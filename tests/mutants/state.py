"""Products, reshaped manifolds and state keeping with one mistake each.

A law of ``check_base_manifold`` for MANIFOLDS, of ``test_product`` for PRODUCTS, and of
``test_state`` for KEEPING, where a function of the library is replaced by another.
"""

from collections.abc import Callable
from typing import Any

import geoopt
import torch
from torch import Tensor

from riemannian_modules import manifolds as m
from riemannian_modules.manifolds import declaring, metric_manifold
from riemannian_modules.manifolds.metric_product import MetricProduct
from riemannian_modules.manifolds.product import Product
from riemannian_modules.mass import Mass

# ---- reshaped --------------------------------------------------------------------


class OnlyTheFirstRow(m.Reshaped):
    def inner(self, x, u, v=None, *, keepdim=False):
        w = u if v is None else v
        parts = self.base.inner(self._in(x), self._in(u), self._in(w), keepdim=True)
        value = parts.flatten(-len(self.view))[..., 0]
        return self._keep(value, keepdim)


class ColumnsOut(m.Reshaped):
    """The way out is not the inverse of the way in."""

    def _out(self, tensor):
        return super()._out(tensor.mT.reshape(tensor.shape))


class RawProjection(m.Reshaped):
    """Projects the tensor itself, not its view."""

    def proju(self, x, u):
        return self.base.proju(x, u)


class RawRiesz(m.Reshaped):
    def egrad2rgrad(self, x, u):
        return self.base.egrad2rgrad(x, u)


class StraightStep(m.Reshaped):
    def retr(self, x, u):
        return x + 2.0 * u


class SummedDistances(m.Reshaped):
    def dist(self, x, y, *, keepdim=False):
        parts = self.base.dist(self._in(x), self._in(y), keepdim=True)
        return self._keep(parts.flatten(-len(self.view)).sum(-1), keepdim)


def kernels(kind: type[m.Reshaped], base: Callable[[], geoopt.Manifold]) -> Any:
    return lambda: kind(base(), (4, 2, 3, 3), (4, 18))


# ---- products --------------------------------------------------------------------


class HeavyGradient(Product):
    """Multiplies by the mass where it should divide."""

    def egrad2rgrad(self, x, u):
        def sharp(manifold, mass, p, e):
            return mass.multiply(manifold.egrad2rgrad(p, e.clone()))

        return self._by_part(sharp, x, u)


class MasslessInner(Product):
    def inner(self, x, u, v=None, *, keepdim=False):
        w = u if v is None else v
        terms = [
            manifold.inner(*parts, keepdim=True).flatten().sum()
            for manifold, *parts in zip(
                self.manifolds,
                *(self.unpack(t).values() for t in (x, u, w)),
                strict=True,
            )
        ]
        total = torch.stack(terms).sum()
        return total.view(1) if keepdim else total


class LastPartIsFlat(Product):
    def proju(self, x, u):
        projected = super().proju(x, u)
        return torch.cat([projected[..., :-4], u[..., -4:]], -1)


class MasslessDistance(Product):
    def dist(self, x, y, *, keepdim=False):
        parts = [
            manifold.dist(p, q, keepdim=True).flatten()
            for manifold, p, q in zip(
                self.manifolds,
                self.unpack(x).values(),
                self.unpack(y).values(),
                strict=True,
            )
        ]
        return torch.cat(parts).norm(keepdim=keepdim)


class AddedDistances(Product):
    def dist(self, x, y, *, keepdim=False):
        roots = [mass.scalar**0.5 for mass in self.masses]
        parts = [
            s * manifold.dist(p, q, keepdim=True).flatten().norm()
            for s, manifold, p, q in zip(
                roots,
                self.manifolds,
                self.unpack(x).values(),
                self.unpack(y).values(),
                strict=True,
            )
        ]
        total = torch.stack(parts).sum()
        return total.view(1) if keepdim else total


def two_parts(kind: type[Product]) -> Callable[[], Product]:
    parts = {"a": (m.Oblique(), (3, 2)), "b": (m.Sphere(), (4,))}
    masses = {"a": Mass(scalar=0.3), "b": Mass(scalar=2.0)}
    return lambda: kind(parts, masses=masses)


MANIFOLDS = [
    ("riesz", kernels(OnlyTheFirstRow, m.Sphere)),
    ("point_on_manifold", kernels(ColumnsOut, m.Sphere)),
    ("projection_tangent", kernels(RawProjection, m.Sphere)),
    ("riesz_tangent", kernels(RawRiesz, m.Stiefel)),
    ("retraction_derivative", kernels(StraightStep, m.Stiefel)),
    ("distance", kernels(SummedDistances, m.Sphere)),
    ("riesz", two_parts(HeavyGradient)),
    ("riesz", two_parts(MasslessInner)),
    ("projection_tangent", two_parts(LastPartIsFlat)),
    ("distance", two_parts(MasslessDistance)),
    ("distance", two_parts(AddedDistances)),
]


class TensorByTensor(MetricProduct):
    """Forgets what couples the tensors of a block, as geoopt's product does."""

    def egrad2rgrad(self, x, u):
        from riemannian_modules.metric import LayerMetric

        parts = [part for block in self.blocks for part in block.parts]
        e = self.unpack(u)
        return self.pack(
            {p.name: LayerMetric([p]).sharp(e[p.name]) for p in parts},
        )


class FrozenPoint(MetricProduct):
    """Measures at the point of the pull-back wherever it is asked."""

    def _metrics_at(self, point):
        return self.blocks


class OneVectorForAll(MetricProduct):
    """Takes the first vector of a batch for all of them."""

    def egrad2rgrad(self, x, u):
        first = super().egrad2rgrad(x, u.reshape(-1, u.shape[-1])[0])
        return first.expand_as(u)


class HalfTheInner(MetricProduct):
    def inner(self, x, u, v=None, *, keepdim=False):
        return 0.5 * super().inner(x, u, v, keepdim=keepdim)


PRODUCTS = [
    ("gradient", TensorByTensor),
    ("moved", FrozenPoint),
    ("batches", OneVectorForAll),
    ("inner", HalfTheInner),
]


# ---- state -----------------------------------------------------------------------


def forgets(module: object) -> None:
    """Restore nothing."""


def stays(manifold: geoopt.Manifold, x: Tensor) -> None:
    """Follow nowhere."""


def follows_blindly(manifold: geoopt.Manifold, x: Tensor) -> None:
    """Round the curvature, too, and forget it on the meta device."""
    manifold.to(device=x.device, dtype=x.dtype)


def believes(manifold: geoopt.Manifold, value: Tensor, precision: object) -> None:
    """Call everything a point of the manifold."""


def demands(
    manifold: geoopt.Manifold, value: Tensor, precision: torch.dtype
) -> str | None:
    """Forget that the value was rounded to less than it is in."""
    return declaring.off_manifold(manifold, value, value.dtype)


def sees_no_difference(a: Tensor, b: Tensor) -> bool:
    """Trust the version counter, which conversions and .data leave alone."""
    return True


_DECLARED = "riemannian_modules.declared"
_DECLARING = "riemannian_modules.manifolds.declaring"
KEEPING: list[tuple[str, str, Callable[..., Any]]] = [
    ("assign", f"{_DECLARING}.restore", forgets),
    ("overwrite", "riemannian_modules.nn.base.restore", forgets),
    ("restored", "riemannian_modules.nn.geometrize.restore", forgets),
    ("curvature", f"{metric_manifold.__name__}.follow", follows_blindly),
    ("curvature", f"{_DECLARED}.follow", follows_blindly),
    ("matrices", f"{metric_manifold.__name__}.follow", stays),
    ("matrices", f"{_DECLARING}.follow", stays),
    ("rounded", f"{_DECLARED}.off_manifold", believes),
    ("data", f"{_DECLARED}._same_memory", sees_no_difference),
    ("rounded", f"{_DECLARED}._same_memory", sees_no_difference),
    ("widened", f"{_DECLARED}.off_manifold", demands),
]
