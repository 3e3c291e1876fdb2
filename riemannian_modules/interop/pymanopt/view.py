"""pymanopt's verbs, said once, for every manifold of geoopt behind them."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import geoopt
import numpy as np
import torch
from pymanopt.manifolds.manifold import Manifold
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.interop.pymanopt.nearest import Array
from riemannian_modules.interop.pymanopt.typical import typical_distance
from riemannian_modules.manifolds import MetricManifold, MetricProduct
from riemannian_modules.manifolds.acceleration import base_hessian
from riemannian_modules.manifolds.riesz import riesz
from riemannian_modules.retractions import Retraction

__all__ = ["Array", "ManifoldView", "drawn", "pymanopt_seed", "retracted"]


@contextmanager
def pymanopt_seed() -> Iterator[None]:
    """Draw from numpy's stream inside this scope, as all of pymanopt does.

    torch's own stream is left where it was.

    Yields:
        None.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(np.random.randint(2**31))  # noqa: NPY002
        yield


def retracted(
    retraction: Retraction, manifold: geoopt.Manifold, x: Tensor, u: Tensor
) -> Tensor:
    """Retract part by part; Euclidean parts move straight with every retraction.

    Args:
        retraction: how a tangent vector becomes a point.
        manifold: base manifold, also a product.
        x: point.
        u: tangent vector.

    Returns:
        A point.
    """
    if isinstance(manifold, geoopt.Euclidean):
        return x + u
    if isinstance(manifold, geoopt.ProductManifold):
        take = manifold.take_submanifold_value
        moved = [
            retracted(retraction, part, take(x, i), take(u, i)).reshape(-1)
            for i, part in enumerate(manifold.manifolds)
        ]
        return torch.cat(moved)
    return retraction(manifold, x, u)


def drawn(
    manifold: geoopt.Manifold, shape: Sequence[int], device: torch.device
) -> Tensor:
    """Return a random point in float64, from torch's stream.

    Args:
        manifold: base manifold, or one with a metric.
        shape: shape of the point.
        device: device.
    """
    kinds = {t.dtype for t in (*manifold.buffers(), *manifold.parameters())}
    # Curved geoopt classes draw in the data type of their curvature only.
    dtype = torch.float32 if torch.float32 in kinds else torch.float64
    point = manifold.random(*shape, dtype=dtype, device=device)
    point = point.detach().as_subclass(Tensor).to(torch.float64)
    found: Tensor = point if dtype is torch.float64 else manifold.projx(point)
    return found


class ManifoldView(Manifold):  # type: ignore[misc]
    """A geoopt manifold, or one that changes with the point, as a pymanopt manifold.

    Points and tangent vectors are numpy arrays of one shape in float64; a product is
    a flat one. Subclasses say which geoopt manifold holds at a point.

    Args:
        name: what to print.
        shape: shape of the points.
        dim: dimension of the manifold.
        retraction: how tangent vectors become points.
        device: where the geoopt manifold computes.
    """

    def __init__(
        self,
        name: str,
        shape: Sequence[int],
        dim: int,
        retraction: Retraction,
        device: torch.device,
    ) -> None:
        super().__init__(name, dim)
        self.shape = tuple(shape)
        self._retract = retraction
        self._device = device

    @abstractmethod
    def _at(self, x: Tensor) -> geoopt.Manifold:
        """Return the geoopt manifold, in float64, with the metric that holds at x."""

    @abstractmethod
    def _base(self) -> geoopt.Manifold:
        """Return a geoopt manifold with the same points and retraction."""

    def _tensor(self, array: Array) -> Tensor:
        found = torch.tensor(np.asarray(array), dtype=torch.float64)
        if tuple(found.shape) != self.shape:
            raise ShapeError(
                f"{self}: got an array of shape {tuple(found.shape)}; points and "
                f"vectors have the shape {self.shape}"
            )
        return found.to(self._device)

    # --- the metric

    def inner_product(
        self, point: Array, tangent_vector_a: Array, tangent_vector_b: Array
    ) -> float:
        """Return ``g(a, b)`` at the point, summed over all its parts."""
        x, a, b = map(self._tensor, (point, tangent_vector_a, tangent_vector_b))
        # keepdim: without it geoopt's stereographic classes mix up the points.
        return float(self._at(x).inner(x, a, b, keepdim=True).sum())

    def norm(self, point: Array, tangent_vector: Array) -> float:
        """Return ``sqrt(g(u, u))``."""
        return math.sqrt(self.inner_product(point, tangent_vector, tangent_vector))

    def euclidean_to_riemannian_gradient(
        self, point: Array, euclidean_gradient: Array
    ) -> Array:
        """Return the tangent vector that represents an ordinary gradient in g."""
        x, e = self._tensor(point), self._tensor(euclidean_gradient)
        return _array(riesz(self._at(x), x, e))

    def euclidean_to_riemannian_hessian(
        self,
        point: Array,
        euclidean_gradient: Array,
        euclidean_hessian: Array,
        tangent_vector: Array,
    ) -> Array:
        """Return the Hessian of the base connection as a tangent vector of g.

        The vector h with ``g(h, v) = Hess f(u, v)`` for all tangent v, see
        :func:`riemannian_modules.manifolds.acceleration.base_hessian`. In a metric
        without a factor it is the Riemannian Hessian; with one it is that of the base
        manifold, the same form represented in the other metric.

        Args:
            point: point.
            euclidean_gradient: ordinary gradient there.
            euclidean_hessian: ordinary Hessian applied to the tangent vector.
            tangent_vector: tangent vector u.

        Returns:
            A tangent vector.
        """
        x, u = self._tensor(point), self._tensor(tangent_vector)
        e, second = map(self._tensor, (euclidean_gradient, euclidean_hessian))
        at = self._at(x)
        return _array(riesz(at, x, base_hessian(at, x, u, e, second)))

    @property
    def typical_dist(self) -> float:
        """A typical distance, which trust regions are sized by."""
        x = self._typical_point()
        return typical_distance(self._at(x), x)

    def _typical_point(self) -> Tensor:
        with pymanopt_state_kept():
            return self._tensor(self.random_point())

    # --- tangent vectors

    def projection(self, point: Array, vector: Array) -> Array:
        """Return the tangent part of an ambient vector."""
        x, u = self._tensor(point), self._tensor(vector)
        return _array(self._base().proju(x, u))

    def to_tangent_space(self, point: Array, vector: Array) -> Array:
        """Return :meth:`projection`."""
        return self.projection(point, vector)

    def zero_vector(self, point: Array) -> Array:
        """Return the zero vector."""
        return np.zeros(self.shape)

    def random_tangent_vector(self, point: Array) -> Array:
        """Return the tangent part of a normal vector, scaled to norm 1."""
        vector = np.random.standard_normal(self.shape)  # noqa: NPY002
        tangent = self.projection(point, vector)
        return tangent / self.norm(point, tangent)

    def transport(
        self, point_a: Array, point_b: Array, tangent_vector_a: Array
    ) -> Array:
        """Transport with the base manifold."""
        x, y, v = map(self._tensor, (point_a, point_b, tangent_vector_a))
        return _array(self._base().transp(x, y, v))

    # --- points

    def random_point(self) -> Array:
        """Return a random point, drawn from numpy's stream."""
        with pymanopt_seed():
            return _array(drawn(self._base(), self.shape, self._device))

    def retraction(self, point: Array, tangent_vector: Array) -> Array:
        """Return the point that the retraction leads to."""
        x, u = self._tensor(point), self._tensor(tangent_vector)
        return _array(retracted(self._retract, self._base(), x, u))

    # --- geodesics

    def exp(self, point: Array, tangent_vector: Array) -> Array:
        """Follow the geodesic; NotImplementedError where there is no closed form."""
        x, u = self._tensor(point), self._tensor(tangent_vector)
        with self._geodesics("exp", x) as at:
            return _array(at.expmap(x, u))

    def log(self, point_a: Array, point_b: Array) -> Array:
        """Return the initial velocity of the geodesic from a to b, where known."""
        x, y = self._tensor(point_a), self._tensor(point_b)
        with self._geodesics("log", x) as at:
            return _array(at.logmap(x, y))

    def dist(self, point_a: Array, point_b: Array) -> float:
        """Return the length of the geodesic from a to b, where known."""
        x, y = self._tensor(point_a), self._tensor(point_b)
        with self._geodesics("dist", x) as at:
            return float(torch.linalg.vector_norm(at.dist(x, y, keepdim=True)))

    def pair_mean(self, point_a: Array, point_b: Array) -> Array:
        """Return the middle of the geodesic from a to b, where known."""
        x, y = self._tensor(point_a), self._tensor(point_b)
        with self._geodesics("pair_mean", x) as at:
            return _array(at.expmap(x, 0.5 * at.logmap(x, y)))

    @contextmanager
    def _geodesics(self, verb: str, x: Tensor) -> Iterator[geoopt.Manifold]:
        at = self._at(x)
        if isinstance(at, MetricManifold | MetricProduct):
            raise NotImplementedError(
                f"{verb}: the geodesics of a layer metric with factors have no closed "
                "form; use retraction, or the base manifold for optimizers that cannot "
                "do without geodesics (NelderMead, ParticleSwarm)"
            )
        try:
            yield at
        except NotImplementedError as error:
            raise NotImplementedError(
                f"{verb}: {self} has no closed form for it ({error or 'in geoopt'}); "
                "optimizers that need it (NelderMead, ParticleSwarm) cannot run here"
            ) from error


@contextmanager
def pymanopt_state_kept() -> Iterator[None]:
    """Put numpy's stream back where it was after this scope.

    Yields:
        None.
    """
    state = np.random.get_state()  # noqa: NPY002
    try:
        yield
    finally:
        np.random.set_state(state)  # noqa: NPY002


def _array(tensor: Tensor) -> Array:
    plain = tensor.detach().as_subclass(Tensor)
    found: Array = plain.to("cpu", torch.float64, copy=True).numpy()
    return found
