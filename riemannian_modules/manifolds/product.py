"""The product manifold of named tensors: one point is the whole model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import geoopt
import torch
from geoopt.utils import size2shape
from torch import Tensor, nn

from riemannian_modules.errors import ShapeError
from riemannian_modules.manifolds.contract import base_of
from riemannian_modules.manifolds.dotted import Nested, flattened, nested
from riemannian_modules.manifolds.drawing import drawn
from riemannian_modules.manifolds.no_points import possibly_empty
from riemannian_modules.manifolds.parts import require_part
from riemannian_modules.manifolds.quotient import Quotient
from riemannian_modules.manifolds.riesz import (
    dimension,
    flat,
    riesz,
    root,
    root_adjoint,
)
from riemannian_modules.mass import Mass

__all__ = ["Product"]


@possibly_empty
class Product(geoopt.ProductManifold):  # type: ignore[misc]
    """A product of named manifolds, each with a mass.

    Points and vectors are flat, ``(*batch, size)``; :meth:`pack` and :meth:`unpack`
    lead to tensors by name and back. Projection, retraction and transport are those
    of the parts, the metric is the sum of theirs, each times its mass. It takes the
    place of ``geoopt.ProductManifold``, which knows neither names nor masses, cannot
    project onto wide Stiefel matrices, puts every point at a distance of 3e-8 from
    itself, and refuses parts whose curvatures differ in data type.

    Args:
        parts: ``{name: (manifold, shape)}``; base manifolds, also products, or
            MetricManifolds, which bring the metric that they have at the time of a
            call.
        masses: ``{name: mass}``; 1 for names that are missing.

    Raises:
        ShapeError: no parts, or no point of a manifold has the shape of its part.
        ManifoldContractError: a part cannot carry a layer metric.
        MassError: a mass that its manifold cannot carry.

    >>> product = Product({"a": (geoopt.Sphere(), (2,)), "b": (geoopt.Euclidean(), ())})
    >>> x = product.pack({"a": torch.tensor([1.0, 0.0]), "b": torch.tensor(5.0)})
    >>> product.egrad2rgrad(x, torch.ones(3))
    tensor([0., 1., 1.])
    """

    name = "Product"
    invariant: Callable[[Tensor], Tensor]

    def __init__(
        self,
        parts: Mapping[str, tuple[geoopt.Manifold, Sequence[int]]],
        *,
        masses: Mapping[str, Mass] | None = None,
    ) -> None:
        # Not super(): it compares the devices and data types of the parts.
        geoopt.Manifold.__init__(self)
        if not parts:
            raise ShapeError("a product of nothing; it needs at least one part")
        given = {} if masses is None else masses
        for name, (manifold, shape) in parts.items():
            require_part(name, manifold, tuple(shape), given.get(name, Mass()))
        self.names = tuple(parts)
        self.shapes = [tuple(shape) for _, shape in parts.values()]
        self.manifolds: Any = nn.ModuleList(base for base, _ in parts.values())
        ends = [0]
        for shape in self.shapes:
            ends.append(ends[-1] + math.prod(shape))
        self.slices = [slice(*pair) for pair in pairwise(ends)]
        self.n_elements = ends[-1]
        self.n_manifolds = len(self.names)
        self.masses = [given.get(name, Mass()) for name in self.names]
        if any(isinstance(manifold, Quotient) for manifold in self.manifolds):
            self.invariant = self._invariant

    @classmethod
    def of(cls, model: nn.Module) -> "Product":
        """Return the product of a model's trainable parameters, without a metric.

        Args:
            model: parameters without a manifold are Euclidean.

        Returns:
            The product with masses 1, in the order of ``model.named_parameters()``.
        """
        return cls(
            {
                name: (
                    base_of(getattr(tensor, "manifold", geoopt.Euclidean())),
                    tensor.shape,
                )
                for name, tensor in model.named_parameters()
                if tensor.requires_grad
            }
        )

    # --- flat vectors and named tensors

    def pack(self, values: Nested) -> Tensor:
        """Return named tensors as one flat tensor.

        Args:
            values: ``{name: (*batch, *shape)}``. Names may be split at their dots into
                nested dictionaries, as in ``{"0": {"weight": w, "bias": b}}``.

        Returns:
            ``(*batch, size)``.

        Raises:
            ShapeError: names are missing or unknown, or a shape does not fit.
        """
        named = dict(flattened(values))
        found: list[Tensor] = []
        used: set[str] = set()
        for name, shape, manifold in zip(
            self.names, self.shapes, self.manifolds, strict=True
        ):
            start, inside = len(name) + 1, {name}
            if name in named:
                value = named[name]
            elif isinstance(manifold, Product):
                inside = {key for key in named if key.startswith(f"{name}.")}
                value = manifold.pack({key[start:]: named[key] for key in inside})
            else:
                raise ShapeError(f"'{name}' is missing; pass one of {self.names} each")
            batch = value.ndim - len(shape)
            if batch < 0 or tuple(value.shape[batch:]) != shape:
                raise ShapeError(
                    f"'{name}' has shape {tuple(value.shape)}; it must end with {shape}"
                )
            used |= inside
            value = value.as_subclass(Tensor)
            found.append(value.reshape(*value.shape[:batch], math.prod(shape)))
        if set(named) - used:
            raise ShapeError(
                f"{sorted(set(named) - used)} are unknown; choose from {self.names}"
            )
        batches = torch.broadcast_shapes(*(part.shape[:-1] for part in found))
        return torch.cat([p.expand(*batches, p.shape[-1]) for p in found], -1)

    def unpack(self, point: Tensor) -> dict[str, Tensor]:
        """Return a flat tensor as ``{name: (*batch, *shape)}``, views of it.

        Args:
            point: ``(*batch, size)``.

        Returns:
            One tensor for each part.

        Raises:
            ShapeError: it has another size.
        """
        if point.ndim == 0 or point.shape[-1] != self.n_elements:
            raise ShapeError(
                f"a flat tensor of shape {tuple(point.shape)} must end with "
                f"{self.n_elements}, the number of entries of all parts"
            )
        plain = point.as_subclass(Tensor)
        return dict(zip(self.names, self.unpack_tensor(plain), strict=True))

    def unpack_nested(self, point: Tensor) -> dict[str, Any]:
        """Return a flat tensor as dictionaries nested as the names are.

        Args:
            point: ``(*batch, size)``.

        Returns:
            Dictionaries of dictionaries of tensors; parts that are products are
            dictionaries as well.
        """
        pairs = zip(self.unpack(point).items(), self.manifolds, strict=True)
        return nested(
            {
                name: m.unpack_nested(value) if isinstance(m, Product) else value
                for (name, value), m in pairs
            }
        )

    def pack_point(self, *tensors: Tensor) -> Tensor:
        """Return the tensors of all parts, in their order, as one flat tensor."""
        return self.pack(dict(zip(self.names, tensors, strict=True)))

    # --- the metric

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the inner products, ``(*batch)``; with keepdim ``(*batch, 1)``."""
        w = u if v is None else v
        terms = self._weighted("inner", x, u, w)
        return torch.cat(terms, -1).sum(-1, keepdim=keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return for every entry the inner product of its part."""
        w = u if v is None else v
        return torch.cat(self._weighted("component_inner", x, u, w), -1)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vectors that represent the covectors ``u``."""

        def sharp(m: geoopt.Manifold, mass: Mass, p: Tensor, e: Tensor) -> Tensor:
            return mass.divide(riesz(m, p, e))

        return self._by_part(sharp, x, u)

    def _weighted(self, verb: str, x: Tensor, u: Tensor, v: Tensor) -> list[Tensor]:
        """Return the parts' inner products times their masses, ``(*batch, size)``."""
        batch = torch.broadcast_shapes(x.shape[:-1], u.shape[:-1], v.shape[:-1])
        terms = []
        for manifold, mass, shape, (p, a, b) in self._parts(x, u, v):
            if mass.is_scalar and verb == "inner":
                term = mass.scalar * manifold.inner(p, a, b, keepdim=True)
            elif mass.is_scalar:
                own = manifold.component_inner(p, a, b)
                term = mass.scalar * own.expand((*batch, *shape))
            else:  # only Euclidean parts have it
                term = (mass.multiply(a) * b).expand((*batch, *shape))
            terms.append(term.reshape(*batch, -1))
        return terms

    def _by_part(self, verb: Callable[..., Tensor], *flat_tensors: Tensor) -> Tensor:
        """Return ``verb(manifold, mass, *tensors)`` of every part as one tensor."""
        batch = torch.broadcast_shapes(*(t.shape[:-1] for t in flat_tensors))
        if 0 in batch:
            return flat_tensors[0].new_empty((*batch, self.n_elements))
        found = []
        for manifold, mass, shape, tensors in self._parts(*flat_tensors):
            value = verb(manifold, mass, *tensors).expand((*batch, *shape))
            found.append(value.reshape((*batch, math.prod(shape))))
        return torch.cat(found, -1)

    def _parts(self, *flat_tensors: Tensor) -> Iterator[tuple[Any, Mass, Any, Any]]:
        """Yield manifold, mass, shape and tensors of every part."""
        triples = zip(self.manifolds, self.masses, self.shapes, strict=True)
        for i, triple in enumerate(triples):
            yield *triple, [self.take_submanifold_value(t, i) for t in flat_tensors]

    def _invariant(self, x: Tensor) -> Tensor:
        parts = zip(self.manifolds, self.unpack(x).values(), strict=True)
        found = [m.invariant(p) if isinstance(m, Quotient) else p for m, p in parts]
        return torch.cat([part.reshape(*x.shape[:-1], -1) for part in found], -1)

    # --- what geoopt's class gets wrong, or cannot do

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        ok = tuple(shape[-1:]) == (self.n_elements,)
        return ok, None if ok else f"`{name}` must end with {self.n_elements}"

    def projx(self, x: Tensor) -> Tensor:
        """Return the parts' ``projx``."""
        return self._by_part(lambda m, _, p: m.projx(p), x)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the massed sum of the squares, where every part has a distance."""
        found = self._distances("dist2", x, y)
        return torch.cat(found, -1).sum(-1, keepdim=keepdim)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the root of the massed sum of squares, where every part has one."""
        found = torch.cat(self._distances("dist", x, y), -1)
        return torch.linalg.vector_norm(found, dim=-1, keepdim=keepdim)

    def _distances(self, verb: str, x: Tensor, y: Tensor) -> list[Tensor]:
        batch = torch.broadcast_shapes(x.shape[:-1], y.shape[:-1])
        found = []
        for manifold, mass, _, (p, q) in self._parts(x, y):
            if mass.is_scalar:
                own = getattr(manifold, verb)(p, q, keepdim=True)
            else:  # only Euclidean parts have it
                own = (p - q).square() if verb == "dist2" else p - q
            weight = torch.as_tensor(mass.elementwise(own)).to(own)
            weight = weight if verb == "dist2" else weight.sqrt()
            found.append((weight * own).reshape(*batch, -1))
        return found

    def random(self, *size: int, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Draw random points of all parts, ``(*batch, size)``."""
        return self._drawn("random", size, kwargs)

    def origin(self, *size: int, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Return the origins of all parts, ``(*batch, size)``."""
        return self._drawn("origin", size, kwargs)

    def _drawn(
        self, verb: str, size: tuple[int, ...], kwargs: dict[str, Any]
    ) -> geoopt.ManifoldTensor:
        shape = tuple(size2shape(*size))
        self._assert_check_shape(shape, "x")
        found = []
        for manifold, own in zip(self.manifolds, self.shapes, strict=True):
            found.append(drawn(manifold, verb, (*shape[:-1], *own), **kwargs))
        return geoopt.ManifoldTensor(self.pack_point(*found), manifold=self)

    def __repr__(self) -> str:
        lines = [
            f"  {name} {shape}: {manifold!r}".replace("\n", "\n  ")
            for name, shape, manifold in zip(
                self.names, self.shapes, self.manifolds, strict=True
            )
        ]
        extra = f"({own})" if (own := self.extra_repr()) else ""
        return "\n".join([f"{self.name}{extra} manifold:", *lines])


@flat.register(Product)
def _(manifold: Product, x: Tensor, u: Tensor) -> Tensor:
    def lowered(m: geoopt.Manifold, mass: Mass, p: Tensor, v: Tensor) -> Tensor:
        return mass.multiply(flat(m, p, v))

    return manifold._by_part(lowered, x, u)


@root.register(Product)
def _(manifold: Product, x: Tensor, z: Tensor) -> Tensor:
    def rooted(m: geoopt.Manifold, mass: Mass, p: Tensor, v: Tensor) -> Tensor:
        return root(m, p, mass.divide_root(v))

    return manifold._by_part(rooted, x, z)


@root_adjoint.register(Product)
def _(manifold: Product, x: Tensor, e: Tensor) -> Tensor:
    def rooted(m: geoopt.Manifold, mass: Mass, p: Tensor, v: Tensor) -> Tensor:
        return mass.divide_root(root_adjoint(m, p, v))

    return manifold._by_part(rooted, x, e)


@dimension.register(Product)
def _(manifold: Product, x: Tensor) -> int:
    return sum(int(dimension(m, p)) for m, _, _, (p,) in manifold._parts(x))
