"""The geoopt view of a whole model: its product manifold with the layer metrics."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.manifolds.batches import for_each_point
from riemannian_modules.manifolds.product import Product
from riemannian_modules.manifolds.riesz import flat, root, root_adjoint

if TYPE_CHECKING:
    from riemannian_modules.metric import LayerMetric

__all__ = ["MetricProduct"]

Metrics = Sequence["LayerMetric"]
Vectors = Mapping[str, Tensor]


class MetricProduct(Product):
    """A product manifold whose metric is the sum of the layer metrics of its blocks.

    What :attr:`riemannian_modules.LayerwiseMetric.manifold` returns. It belongs to one
    pull-back: the factors are held while the point moves, as in a line search. Points,
    tangent vectors, retraction and transport are the parts'. Distances and logarithms
    have no closed form, and ``expmap`` follows the geodesics of the parts.

    Copying and pickling drop the factors, as those of a MetricManifold: what arrives
    is a :class:`Product` with the same masses.

    Args:
        parts: ``{name: (manifold, shape)}``; base manifolds.
        blocks: layer metrics that together hold every part once.
        version: number of the pull-back that they come from.

    Raises:
        ShapeError: the blocks do not fit the parts.
        ManifoldContractError: a part cannot carry a layer metric.

    Cost: a product with K and its transpose, or a solve, for each vector of a batch;
    another point means other Gram matrices.
    """

    name = "MetricProduct"

    def __init__(
        self,
        parts: Mapping[str, tuple[geoopt.Manifold, Sequence[int]]],
        blocks: Metrics,
        version: int = 0,
    ) -> None:
        held = [part for block in blocks for part in block.parts]
        if sorted(part.name for part in held) != sorted(parts):
            raise ShapeError(
                f"the blocks hold {sorted(part.name for part in held)}; they must hold "
                f"each of {sorted(parts)} once"
            )
        super().__init__(parts, masses={part.name: part.space.mass for part in held})
        self.blocks = tuple(blocks)
        self.version = version
        self._dtypes = {part.name: part.space.point.dtype for part in held}

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the inner products, ``(*batch)``; with keepdim ``(*batch, 1)``."""

        def one(metrics: Metrics, a: Vectors, b: Vectors) -> Tensor:
            return torch.stack([metric.inner(a, b) for metric in metrics]).sum()

        total = self._for_each(one, (), x, u, u if v is None else v)
        return total.unsqueeze(-1) if keepdim else total

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return for every entry the inner product of its block."""

        def one(metrics: Metrics, a: Vectors, b: Vectors) -> Tensor:
            found = {
                part.name: metric.inner(a, b).expand(part.space.point.shape)
                for metric in metrics
                for part in metric.parts
            }
            return self.pack(found)

        return self._for_each(one, (self.n_elements,), x, u, u if v is None else v)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vectors that represent the covectors ``u``."""

        def one(metrics: Metrics, e: Vectors) -> Tensor:
            found = {n: w for metric in metrics for n, w in metric.sharp(e).items()}
            return self.pack(found)

        return self._for_each(one, (self.n_elements,), x, u)

    def _flat(self, x: Tensor, u: Tensor) -> Tensor:
        def one(metrics: Metrics, a: Vectors) -> Tensor:
            found = {n: e for metric in metrics for n, e in metric.flat(a).items()}
            return self.pack(found)

        return self._for_each(one, (self.n_elements,), x, u)

    def _for_each(
        self,
        verb: Callable[..., Tensor],
        result: tuple[int, ...],
        x: Tensor,
        *vectors: Tensor,
    ) -> Tensor:
        """Return ``verb`` of every point with its vectors, ``(*batch, *result)``."""

        def typed(metrics: Metrics, *rows: Tensor) -> Tensor:
            return verb(metrics, *(self._typed(row) for row in rows))

        shape = (self.n_elements,)
        return for_each_point(self._metrics_at, typed, shape, result, x, *vectors)

    def _typed(self, row: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat tensor in the data types of the parameters."""
        return {name: t.to(self._dtypes[name]) for name, t in self.unpack(row).items()}

    def _metrics_at(self, point: Tensor) -> Metrics:
        values = self._typed(point)
        return [
            block.at({part.name: values[part.name] for part in block.parts})
            for block in self.blocks
        ]

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Refuse: NotImplementedError."""
        return self._refuse("logmap")

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Refuse: NotImplementedError."""
        return self._refuse("dist")

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Refuse: NotImplementedError."""
        return self._refuse("dist2")

    def _refuse(self, verb: str) -> Tensor:
        raise NotImplementedError(
            f"{verb}: the geodesics of a metric with factors have no closed form; use "
            "riemannian_modules.manifolds.Product.of(model) for those of the parts"
        )

    def extra_repr(self) -> str:
        """Return the version and the ranks."""
        ranks = ", ".join(f"{block.name}: rank {block.rank}" for block in self.blocks)
        return f"version {self.version}; {ranks}"

    def __reduce_ex__(self, protocol: object) -> tuple[Any, ...]:
        parts = zip(self.manifolds, self.shapes, strict=True)
        named = dict(zip(self.names, parts, strict=True))
        return _without_factors, (
            named,
            dict(zip(self.names, self.masses, strict=True)),
        )


def _without_factors(
    parts: Mapping[str, tuple[geoopt.Manifold, Sequence[int]]],
    masses: Mapping[str, Any],
) -> Product:
    return Product(parts, masses=masses)


@flat.register(MetricProduct)
def _(manifold: MetricProduct, x: Tensor, u: Tensor) -> Tensor:
    return manifold._flat(x, u)


@root.register(MetricProduct)
@root_adjoint.register(MetricProduct)
def _(manifold: MetricProduct, x: Tensor, z: Tensor) -> Tensor:
    raise NotImplementedError(
        "a product with factors is no base manifold of a layer metric; use "
        "riemannian_modules.manifolds.Product"
    )
