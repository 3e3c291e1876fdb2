"""What another metric on a manifold leaves as it is: points, tangent vectors, steps."""

import abc
from typing import Any

import geoopt
from torch import Tensor

from riemannian_modules.manifolds.drawing import drawn

__all__ = ["Delegating"]


class Delegating(geoopt.Manifold):  # type: ignore[misc]
    """The points of ``base``; it lacks the methods which its own metric changes.

    ``options`` are those of the base's methods, such as ``project`` on Poincare balls.
    """

    base: geoopt.Manifold

    @abc.abstractmethod
    def _at(self, x: Tensor) -> geoopt.Manifold:
        """Return the base manifold, ready for points such as ``x``."""

    def retr(self, x: Tensor, u: Tensor, **options: Any) -> Tensor:
        """Retract with the base manifold."""
        point: Tensor = self._at(x).retr(x, u, **options)
        return point

    def expmap(self, x: Tensor, u: Tensor, **options: Any) -> Tensor:
        """Follow the geodesic of the base manifold (not of the layer metric)."""
        point: Tensor = self._at(x).expmap(x, u, **options)
        return point

    def projx(self, x: Tensor, **options: Any) -> Tensor:
        """Return the nearest point of the base manifold."""
        point: Tensor = self._at(x).projx(x, **options)
        return point

    def proju(self, x: Tensor, u: Tensor, **options: Any) -> Tensor:
        """Return the tangent part of ``u`` on the base manifold."""
        tangent: Tensor = self._at(x).proju(x, u, **options)
        return tangent

    def transp(self, x: Tensor, y: Tensor, v: Tensor, **options: Any) -> Tensor:
        """Transport with the base manifold."""
        vector: Tensor = self._at(x).transp(x, y, v, **options)
        return vector

    def retr_transp(
        self, x: Tensor, u: Tensor, v: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Retract and transport with the base manifold."""
        point, vector = self._at(x).retr_transp(x, u, v, **options)
        return point, vector

    def expmap_transp(
        self, x: Tensor, u: Tensor, v: Tensor, **options: Any
    ) -> tuple[Tensor, Tensor]:
        """Follow the base manifold's geodesic and transport with it."""
        point, vector = self._at(x).expmap_transp(x, u, v, **options)
        return point, vector

    def transp_follow_retr(
        self, x: Tensor, u: Tensor, v: Tensor, **options: Any
    ) -> Tensor:
        """Transport along the base manifold's retraction."""
        vector: Tensor = self._at(x).transp_follow_retr(x, u, v, **options)
        return vector

    def transp_follow_expmap(
        self, x: Tensor, u: Tensor, v: Tensor, **options: Any
    ) -> Tensor:
        """Transport along the base manifold's geodesic."""
        vector: Tensor = self._at(x).transp_follow_expmap(x, u, v, **options)
        return vector

    def random(self, *size: int, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Return a random point of the base manifold."""
        return self._own("random", size, kwargs)

    def origin(self, *size: int, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Return the origin of the base manifold."""
        return self._own("origin", size, kwargs)

    def unpack_tensor(self, tensor: Tensor) -> Any:
        """Return what the base makes of a tensor."""
        return self.base.unpack_tensor(tensor)

    def pack_point(self, *tensors: Tensor) -> Tensor:
        """Return what the base makes of the parts of a point."""
        return self.base.pack_point(*tensors)

    def _own(
        self, verb: str, size: tuple[int, ...], kwargs: dict[str, Any]
    ) -> geoopt.ManifoldTensor:
        point = drawn(self.base, verb, size, **kwargs)
        return geoopt.ManifoldTensor(point, manifold=self)

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
