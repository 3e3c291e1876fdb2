"""The geoopt view of one parameter: its base manifold with the layer metric inside."""

import copy
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import geoopt
import torch
from geoopt.manifolds.base import ScalingStorage
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds.batches import drop_kept, for_each_point
from riemannian_modules.manifolds.contract import MetricView, ensure_contract
from riemannian_modules.manifolds.delegating import Delegating
from riemannian_modules.manifolds.massed import massed
from riemannian_modules.manifolds.no_points import possibly_empty
from riemannian_modules.manifolds.quotient import Quotient
from riemannian_modules.manifolds.riesz import dimension, flat, root, root_adjoint
from riemannian_modules.mass import Mass

if TYPE_CHECKING:
    from riemannian_modules.metric import LayerMetric

__all__ = ["MetricManifold", "follow", "has_tensors"]


def has_tensors(manifold: geoopt.Manifold) -> bool:
    """Return whether a manifold has tensors of its own, such as a curvature."""
    return any(True for _ in chain(manifold.buffers(), manifold.parameters()))


def follow(manifold: geoopt.Manifold, x: Tensor) -> None:
    """Move a manifold's own tensors, such as its curvature, to where its points are.

    ``model.to`` does not do it, because a parameter's manifold is no submodule. Numbers
    keep their data type, so that nothing is lost when a model is rounded for a while;
    nothing is moved to the meta device, which would forget them.

    Args:
        manifold: base manifold; changed in place.
        x: a point.
    """
    if x.is_meta:
        return

    def moved(tensor: Tensor) -> Tensor:
        return tensor.to(x.device, x.dtype if tensor.ndim else tensor.dtype)

    for tensor in chain(manifold.buffers(), manifold.parameters()):
        if tensor.device != x.device or (tensor.ndim and tensor.dtype != x.dtype):
            manifold._apply(moved)
            return


_PARTS = (
    "a part of the tensor has no metric of its own. Sparse optimizers, which step in "
    "some rows only, cannot use this metric: use a dense optimizer, or release() the "
    "manifold for the base metric"
)
_GEODESIC = ("dist", "geodesic", "logmap")


class _Unscalable(ScalingStorage):  # type: ignore[misc]
    """What geoopt.Scaled asks for when it wraps a manifold."""

    def items(self) -> Any:
        raise ManifoldContractError(
            "geoopt.Scaled cannot scale a MetricManifold: it would divide the steps by "
            "the scale and leave the metric as it is. Put scale^2 into the mass, or "
            "scale what is inside: "
            "MetricManifold(riemannian_modules.manifolds.Scaled(base, scale))"
        )


@possibly_empty
class MetricManifold(Delegating, MetricView):
    """A geoopt manifold whose metric is ``mass g0 + K^T K`` once one is known.

    Points, tangent vectors, retraction and transport are the base manifold's;
    ``inner`` and ``egrad2rgrad`` are the layer metric's, so any geoopt optimizer
    steps in it. Before the first backward pass (and after :meth:`release`) it is
    the base manifold with mass 1, in every method bit for bit, and without a factor
    it is the base manifold with the parameter's mass.

    With a factor, K couples all entries: one point is the whole tensor, ``ndim`` its
    number of dimensions, ``inner`` one number for each tensor of a batch
    ``(*batch, *shape)``. Points of a batch share the factor. Cost for each: two
    products with K (``inner``) or a solve (``egrad2rgrad``), and new Gram matrices
    where the point is not the one of the last pass. ``dist`` and ``logmap`` are then
    refused; ``expmap`` stays that of the base. Any other method of the base, such as
    ``mobius_add``, is the base's.

    ``reversible`` is False whatever the base is, so that geoopt's samplers, which draw
    momenta in the embedding's metric, refuse the parameter; ``geoopt.Scaled`` refuses
    it too, and sparse optimizers stop at the first rows that they pick out of a tensor
    with a factor.

    The factor belongs to one pass and is dropped by copying and pickling. Tensors of
    the base follow the points to their device, matrices to their data type as well.

    Args:
        base: the manifold; one of those that keep their contract.

    Raises:
        ManifoldContractError: ``base`` is known to break its contract, or is a
            MetricManifold itself.

    >>> manifold = MetricManifold(geoopt.Sphere())
    >>> manifold.egrad2rgrad(torch.tensor([1.0, 0.0]), torch.tensor([5.0, 2.0]))
    tensor([0., 2.])
    """

    reversible = False
    __scaling__ = _Unscalable()

    def __init__(self, base: geoopt.Manifold) -> None:
        super().__init__()
        if isinstance(base, MetricManifold):
            raise ManifoldContractError(
                "a MetricManifold holds one metric; pass its .base instead of it"
            )
        self.base = ensure_contract(base)
        self.name = f"Metric({base.name})"
        self._metric: LayerMetric | None = None
        self._has_tensors = has_tensors(base)
        if isinstance(base, Quotient):
            self.invariant = base.invariant

    def _at(self, x: Tensor) -> geoopt.Manifold:
        if self._has_tensors:
            follow(self.base, x)
        return self.base

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None or name.startswith("_") or not hasattr(base, name):
                raise
        if self._coupled is not None and name.startswith(_GEODESIC):
            return partial(self._refuse, name)
        return massed(base, name, self._mass)

    # --- the metric that it carries

    @property
    def metric(self) -> "LayerMetric | None":
        """The metric of this parameter at its last recorded point, or None."""
        return self._metric

    def bind(self, metric: "LayerMetric") -> None:
        """Use the one-parameter ``metric`` from now on."""
        object.__setattr__(self, "_metric", metric)

    def release(self) -> None:
        """Forget the metric, and with it the activations that its factor holds."""
        object.__setattr__(self, "_metric", None)

    @property
    def _coupled(self) -> "LayerMetric | None":
        """The metric if it has a factor; else the base metric and the mass say all."""
        metric = self._metric
        return metric if metric is not None and metric.rank else None

    @property
    def _mass(self) -> Mass:
        return Mass() if self._metric is None else self._metric.parts[0].space.mass

    @property
    def ndim(self) -> int:
        """Dimensions of one point: all of the parameter's once there is a factor."""
        metric = self._coupled
        return self.base.ndim if metric is None else metric.parts[0].space.point.ndim

    def _each(
        self, verb: str, whole: bool, metric: "LayerMetric", x: Tensor, *v: Tensor
    ) -> Tensor:
        shape = tuple(metric.parts[0].space.point.shape)

        def one(here: "LayerMetric", *vectors: Tensor) -> Tensor:
            value: Tensor = getattr(here, verb)(*vectors)
            return value

        result = shape if whole else ()
        return for_each_point(metric.at, one, shape, result, x, *v, remedy=_PARTS)

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return ``g(u, v)``: with a factor ``(*batch)``, else what the base returns.

        With keepdim and a factor ``(*batch, 1, ..., 1)``.
        """
        metric = self._coupled
        if metric is None:
            # Not the base's inner(u, u): a mass weighs one of the two.
            w = v if v is not None or self._mass.is_one else u
            base = self._at(x)
            value: Tensor = base.inner(x, self._mass.multiply(u), w, keepdim=True)
            return drop_kept(value, base.ndim, keepdim)
        total = self._each("inner", False, metric, x, u, u if v is None else v)
        return total.view((*total.shape, *(1,) * self.ndim)) if keepdim else total

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return the inner product of the component that an entry is in.

        With a factor that is the whole tensor: ``inner`` with keepdim.
        """
        if self._coupled is not None:
            return self.inner(x, u, v, keepdim=True)
        w = v if v is not None or self._mass.is_one else u
        parts: Tensor = self._at(x).component_inner(x, self._mass.multiply(u), w)
        return parts

    def norm(self, x: Tensor, u: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the root of ``inner(x, u)``."""
        if self._coupled is None and self._mass.is_one:
            base = self._at(x)
            return drop_kept(base.norm(x, u, keepdim=True), base.ndim, keepdim)
        return self.inner(x, u, keepdim=keepdim).sqrt()

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u`` in g."""
        metric = self._coupled
        if metric is None:
            # A copy, because some geoopt classes write into it.
            return self._mass.divide(self._at(x).egrad2rgrad(x, u.clone()))
        return self._each("sharp", True, metric, x, u)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the distance, the massed base's; undefined once there is a factor."""
        return self._distance("dist", x, y, keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the squared distance; undefined once there is a factor."""
        return self._distance("dist2", x, y, keepdim)

    def _distance(self, verb: str, x: Tensor, y: Tensor, keepdim: bool) -> Tensor:
        if self._coupled is not None:
            self._refuse(verb)
        distance = getattr(self._at(x), verb)
        mass = self._mass
        if mass.is_scalar:
            value: Tensor = distance(x, y, keepdim=keepdim)
            scale = mass.scalar if verb == "dist2" else mass.scalar**0.5
            return value if mass.is_one else scale * value
        root_mass = torch.as_tensor(mass.elementwise(x)).sqrt()
        return torch.as_tensor(distance(root_mass * x, root_mass * y, keepdim=keepdim))

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base manifold's logarithm; undefined once there is a factor."""
        if self._coupled is not None:
            self._refuse("logmap")
        vector: Tensor = self._at(x).logmap(x, y)
        return vector

    # --- the rest is the base manifold's

    def extra_repr(self) -> str:
        """Return what the base says, and the rank of the factor if there is one."""
        own = "" if self._metric is None else f"metric rank={self._metric.rank}"
        return ", ".join(filter(None, (self.base.extra_repr(), own)))

    def _refuse(self, verb: str, *arguments: object, **options: object) -> None:
        raise NotImplementedError(
            f"{verb}: the geodesics of a metric with a factor have no closed "
            "form; use release() for the base manifold's"
        )

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        ok, reason = self.base._check_shape(shape, name)
        metric = self._coupled
        if ok and metric is not None:
            own = tuple(metric.parts[0].space.point.shape)
            ok = tuple(shape[max(0, len(shape) - len(own)) :]) == own
            reason = None if ok else f"`{name}` must end with {own}, got {tuple(shape)}"
        return ok, reason

    def __deepcopy__(self, memo: dict[int, Any]) -> "MetricManifold":
        twin = MetricManifold(copy.deepcopy(self.base, memo))
        memo[id(self)] = twin
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_metric": None}

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = torch.nn.Module.__hash__


@flat.register(MetricManifold)
def _(manifold: MetricManifold, x: Tensor, u: Tensor) -> Tensor:
    metric = manifold._coupled
    if metric is None:
        return manifold._mass.multiply(flat(manifold._at(x), x, u))
    return manifold._each("flat", True, metric, x, u)


@root.register(MetricManifold)
def _(manifold: MetricManifold, x: Tensor, z: Tensor) -> Tensor:
    if manifold._coupled is None:
        return root(manifold._at(x), x, manifold._mass.divide_root(z))
    numerical: Tensor = root.dispatch(object)(manifold, x, z)
    return numerical


@root_adjoint.register(MetricManifold)
def _(manifold: MetricManifold, x: Tensor, e: Tensor) -> Tensor:
    if manifold._coupled is None:
        return manifold._mass.divide_root(root_adjoint(manifold._at(x), x, e))
    numerical: Tensor = root_adjoint.dispatch(object)(manifold, x, e)
    return numerical


@dimension.register(MetricManifold)
def _(manifold: MetricManifold, x: Tensor) -> int:
    return int(dimension(manifold.base, x))
