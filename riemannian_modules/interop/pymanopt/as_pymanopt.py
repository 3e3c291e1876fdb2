"""geoopt's manifolds as pymanopt's."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace

import geoopt
import torch
from pymanopt.manifolds.manifold import RiemannianSubmanifold
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.interop.pymanopt.view import (
    Array,
    ManifoldView,
    _array,
    drawn,
)
from riemannian_modules.manifolds import (
    FixedRank,
    MetricManifold,
    MetricProduct,
    Oblique,
    Product,
    Reshaped,
    Scaled,
    SpecialOrthogonal,
    base_of,
    ensure_contract,
)
from riemannian_modules.manifolds.acceleration import hessian_correction
from riemannian_modules.manifolds.declaring import shape_problem
from riemannian_modules.manifolds.metric_manifold import follow
from riemannian_modules.manifolds.riesz import dimension, require_own_formulas
from riemannian_modules.metric import LayerMetric
from riemannian_modules.retractions import Default, Retraction

__all__ = ["GeooptManifold", "GeooptSubmanifold", "as_pymanopt", "in_float64"]

_SURROUNDING_METRIC = (
    geoopt.Euclidean,
    geoopt.Sphere,
    geoopt.EuclideanStiefel,
    FixedRank,
    Oblique,
    SpecialOrthogonal,
)


class GeooptManifold(ManifoldView):
    """A geoopt manifold as a pymanopt manifold; made by :func:`as_pymanopt`.

    Attributes:
        manifold: the geoopt manifold, a copy in float64.
        shape: shape of the points.
    """

    def __init__(
        self,
        manifold: geoopt.Manifold,
        shape: Sequence[int],
        retraction: Retraction,
        device: torch.device,
    ) -> None:
        self.manifold = manifold
        with torch.random.fork_rng(devices=[]):
            point = drawn(manifold, shape, device)
        dim = dimension(base_of(manifold), point)
        sizes = " x ".join(map(str, shape)) or "scalar"
        super().__init__(f"{manifold.name} ({sizes})", shape, dim, retraction, device)

    def _at(self, x: Tensor) -> geoopt.Manifold:
        return self.manifold

    def _base(self) -> geoopt.Manifold:
        return self.manifold


class GeooptSubmanifold(GeooptManifold, RiemannianSubmanifold):  # type: ignore[misc]
    """A geoopt manifold whose metric is that of the space around it."""

    def weingarten(
        self, point: Array, tangent_vector: Array, normal_vector: Array
    ) -> Array:
        """Return the Weingarten map, the adjoint of the second fundamental form.

        Args:
            point: point.
            tangent_vector: tangent vector u.
            normal_vector: normal vector n.

        Returns:
            The tangent vector w with ``<w, v> = <n, a(u, v)>`` for all tangent v and
            the acceleration a of geodesics.
        """
        x, u, n = map(self._tensor, (point, tangent_vector, normal_vector))
        covector = hessian_correction(self.manifold, x, u, n)
        return _array(self.manifold.proju(x, covector))


def as_pymanopt(
    manifold: geoopt.Manifold,
    shape: Sequence[int],
    *,
    retraction: Retraction | None = None,
) -> GeooptManifold:
    """Return a geoopt manifold as a pymanopt manifold.

    Points are numpy arrays in float64, those of a product flat ones, as in geoopt; put
    several results into ``pymanopt.manifolds.Product`` for a point that is a list. The
    metric, the Hessian (of the manifold's own connection), retraction and transport
    are the manifold's. ``exp``, ``log``, ``dist`` and ``pair_mean`` exist where the
    manifold has closed forms; they raise NotImplementedError, with the reason, else.
    Random points come from numpy's stream, as in all of pymanopt.

    A ``MetricManifold`` or ``LayerwiseMetric.manifold`` is taken with the metric of
    this moment, also if it is pulled back anew later.

    Args:
        manifold: a geoopt manifold that keeps its contract.
        shape: shape of the points.
        retraction: how tangent vectors become points; None: the manifold's own.

    Returns:
        A :class:`GeooptSubmanifold`, which has a Weingarten map, where the metric is
        that of the space around it.

    Raises:
        ManifoldContractError: the manifold is known to break its contract.
        ShapeError: no point of it has this shape.

    >>> from riemannian_modules.manifolds import Stiefel
    >>> stiefel = as_pymanopt(Stiefel(), (5, 2))
    >>> stiefel.dim, stiefel.random_point().shape
    (7, (5, 2))
    """
    base = base_of(ensure_contract(manifold, "as_pymanopt"))
    require_own_formulas(base, "as_pymanopt")
    shape = tuple(shape)
    problem = shape_problem(base, shape)
    if problem is not None:
        raise ShapeError(
            f"as_pymanopt: no point of {base.name} has the shape {shape}: {problem}"
        )
    device = _device(manifold)
    own = in_float64(manifold, device)
    kind = GeooptSubmanifold if _is_submanifold(own) else GeooptManifold
    return kind(own, shape, Default() if retraction is None else retraction, device)


def _device(manifold: geoopt.Manifold) -> torch.device:
    points = [part.space.point for block in _metrics(manifold) for part in block.parts]
    return points[0].device if points else torch.device("cpu")


def _metrics(manifold: geoopt.Manifold) -> Sequence[LayerMetric]:
    if isinstance(manifold, MetricProduct):
        return manifold.blocks
    if isinstance(manifold, MetricManifold) and manifold.metric is not None:
        return (manifold.metric,)
    return ()


def in_float64(manifold: geoopt.Manifold, device: torch.device) -> geoopt.Manifold:
    """Return a copy of a manifold in float64 that later pull-backs do not change.

    Args:
        manifold: base manifold, or one that carries layer metrics.
        device: where it is to compute.

    Returns:
        A manifold; without metrics where there is no factor and the mass is a number.
    """
    if isinstance(manifold, MetricProduct):
        parts = {
            name: (in_float64(part, device), shape)
            for name, part, shape in zip(
                manifold.names, manifold.manifolds, manifold.shapes, strict=True
            )
        }
        if all(block.rank == 0 for block in manifold.blocks):
            masses = dict(zip(manifold.names, manifold.masses, strict=True))
            return Product(parts, masses=masses)
        return MetricProduct(parts, manifold.blocks, manifold.version)
    if not isinstance(manifold, MetricManifold):
        twin = copy.deepcopy(manifold)
        # Not double(): a curvature of float32 is another number after it.
        follow(twin, torch.empty(1, dtype=torch.float64, device=device))
        return twin
    base = in_float64(manifold.base, device)
    if manifold.metric is None:
        return base
    metric = manifold.metric.double()
    (part,) = metric.parts
    mass = part.space.mass
    if metric.rank == 0 and mass.is_scalar:
        return base if mass.scalar == 1.0 else Scaled(base, math.sqrt(mass.scalar))
    view = MetricManifold(base)
    own = replace(part, space=replace(part.space, manifold=base))
    view.bind(
        LayerMetric(
            [own], name=metric.name, version=metric.version, precision=torch.float64
        )
    )
    return view


def _is_submanifold(manifold: geoopt.Manifold) -> bool:
    """Whether the metric is that of the space around the manifold."""
    if isinstance(manifold, MetricProduct):
        return False
    if isinstance(manifold, Product) and any(
        not (mass.is_scalar and mass.scalar == 1.0) for mass in manifold.masses
    ):
        return False
    if isinstance(manifold, geoopt.ProductManifold):
        return all(_is_submanifold(part) for part in manifold.manifolds)
    if isinstance(manifold, Reshaped):
        return _is_submanifold(manifold.base)
    return isinstance(manifold, _SURROUNDING_METRIC)
