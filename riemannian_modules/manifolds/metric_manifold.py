"""The geoopt view of one parameter: its base manifold with the layer metric inside."""

import copy
from itertools import chain
from typing import TYPE_CHECKING, Any

import geoopt
import torch
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds.contract import MetricView, ensure_contract

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


class MetricManifold(MetricView):
    """A geoopt manifold whose metric is ``mass g0 + K^T K`` once one is known.

    Points, tangent vectors, retraction and transport are the base manifold's;
    ``inner`` and ``egrad2rgrad`` are the layer metric's, so any geoopt optimizer
    steps in it. Before the first backward pass (and after :meth:`release`) it is
    the base manifold with mass 1. With a factor, ``inner`` is one number for the
    whole tensor, since K couples all entries.

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

    def __init__(self, base: geoopt.Manifold) -> None:
        super().__init__()
        if isinstance(base, MetricManifold):
            raise ManifoldContractError(
                "a MetricManifold holds one metric; pass its .base instead of it"
            )
        self.base = ensure_contract(base)
        self.name = f"Metric({base.name})"
        self.ndim = base.ndim
        self.reversible = False
        self._metric: LayerMetric | None = None
        self._has_tensors = has_tensors(base)

    def _at(self, x: Tensor) -> geoopt.Manifold:
        if self._has_tensors:
            follow(self.base, x)
        return self.base

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

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return ``g(u, v)`` at ``x``; one number once there is a factor."""
        if self._metric is None:
            value: Tensor = self._at(x).inner(x, u, v, keepdim=keepdim)
            return value
        total = self._metric.at(x).inner(u, u if v is None else v).to(u.dtype)
        return total.view((1,) * x.ndim) if keepdim else total

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u`` in g."""
        if self._metric is None:
            gradient: Tensor = self._at(x).egrad2rgrad(x, u.clone())
            return gradient
        return self._metric.at(x).sharp(u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract with the base manifold."""
        point: Tensor = self._at(x).retr(x, u)
        return point

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic of the base manifold (not of the layer metric)."""
        point: Tensor = self._at(x).expmap(x, u)
        return point

    def projx(self, x: Tensor) -> Tensor:
        """Return the nearest point of the base manifold."""
        point: Tensor = self._at(x).projx(x)
        return point

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent part of ``u`` on the base manifold."""
        tangent: Tensor = self._at(x).proju(x, u)
        return tangent

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport with the base manifold."""
        vector: Tensor = self._at(x).transp(x, y, v)
        return vector

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the base manifold's distance; undefined once there is a factor."""
        self._refuse("dist")
        distance: Tensor = self._at(x).dist(x, y, keepdim=keepdim)
        return distance

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base manifold's logarithm; undefined once there is a factor."""
        self._refuse("logmap")
        vector: Tensor = self._at(x).logmap(x, y)
        return vector

    def random(self, *size: int, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Return a random point of the base manifold."""
        return self._own(self.base.random(*size, **kwargs))

    def origin(self, *size: int, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Return the origin of the base manifold."""
        return self._own(self.base.origin(*size, **kwargs))

    def extra_repr(self) -> str:
        """Name the rank of the factor, if there is one."""
        return "" if self._metric is None else f"rank={self._metric.rank}"

    def _own(self, point: geoopt.ManifoldTensor) -> geoopt.ManifoldTensor:
        return geoopt.ManifoldTensor(point.data, manifold=self)

    def _refuse(self, verb: str) -> None:
        if self._metric is not None:
            raise NotImplementedError(
                f"{verb}: the geodesics of a metric with a factor have no closed "
                "form; use release() for the base manifold's"
            )

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        result: tuple[bool, str | None] = self.base._check_shape(shape, name)
        return result

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        result: tuple[bool, str | None] = self._at(x)._check_point_on_manifold(
            x, atol=atol, rtol=rtol
        )
        return result

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        result: tuple[bool, str | None] = self._at(x)._check_vector_on_tangent(
            x, u, atol=atol, rtol=rtol
        )
        return result

    def __deepcopy__(self, memo: dict[int, Any]) -> "MetricManifold":
        twin = MetricManifold(copy.deepcopy(self.base, memo))
        memo[id(self)] = twin
        return twin

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_metric": None}

    def __eq__(self, other: object) -> bool:
        return self is other

    __hash__ = torch.nn.Module.__hash__
