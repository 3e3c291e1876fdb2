"""The geoopt view of a pymanopt manifold."""

from collections.abc import Callable
from typing import Any

import geoopt
import numpy as np
import torch
from geoopt.utils import size2shape
from pymanopt import manifolds as pm
from pymanopt.manifolds.manifold import Manifold, RetrAsExpMixin
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.interop.pymanopt.nearest import Array, nearest_point
from riemannian_modules.interop.pymanopt.view import pymanopt_state_kept

__all__ = ["Nearest", "PymanoptManifold"]

Nearest = Callable[[Array], Array]


def _projector(x: Tensor) -> Tensor:
    return x @ x.mT


class PymanoptManifold(geoopt.Manifold):  # type: ignore[misc]
    """A pymanopt manifold as a geoopt manifold; made by :func:`as_geoopt`.

    Everything is computed by pymanopt in float64 on the CPU, one point of a batch
    after the other, and returned in the data type and on the device of the argument.
    Gradients do not flow through it. ``Grassmann`` is a
    :class:`riemannian_modules.manifolds.Quotient`.

    Args:
        manifold: a pymanopt manifold whose points are single real arrays.
        projx: from an array of the shape of its points to a point; None: known for
            Euclidean spaces, spheres, ``Stiefel``, ``Grassmann``, ``Oblique``,
            ``SpecialOrthogonalGroup``, ``SymmetricPositiveDefinite``, ``Positive`` and
            ``PoincareBall``.

    Raises:
        ManifoldContractError: points are complex or several arrays, or ``projx`` is
            missing.
    """

    reversible = False
    invariant: Callable[[Tensor], Tensor]

    def __init__(self, manifold: Manifold, projx: Nearest | None = None) -> None:
        super().__init__()
        if manifold.point_layout != 1:
            raise ManifoldContractError(
                f"{manifold}: its points are {manifold.num_values} arrays, while a "
                "parameter is one tensor; use riemannian_modules.manifolds.FixedRank "
                "for matrices of one rank, Product for products"
            )
        with pymanopt_state_kept():
            point = np.asarray(manifold.random_point())
        if np.iscomplexobj(point):
            raise ManifoldContractError(
                f"{manifold}: its points are complex, while parameters with a layer "
                "metric are real; use real matrices of twice the size"
            )
        self.manifold = manifold
        self.shape = point.shape
        self.ndim = point.ndim
        self.name = f"pymanopt.{type(manifold).__name__}"
        if isinstance(manifold, pm.Grassmann):
            self.invariant = _projector
        self._nearest = projx
        # Some of pymanopt's tangent vectors are coordinates, such as skew matrices.
        self._inward = type(manifold).embedding is not Manifold.embedding
        try:
            self._closest(point)
        except NotImplementedError as error:
            raise ManifoldContractError(str(error)) from error

    # --- numpy and back

    def _closest(self, array: Array) -> Array:
        if self._nearest is not None:
            return np.asarray(self._nearest(array))
        return nearest_point(self.manifold, array)

    def _each(
        self, verb: Callable[..., Any], result: tuple[int, ...], *tensors: Tensor
    ) -> Tensor:
        """Return ``verb`` of the arrays of every point, ``(*batch, *result)``."""
        batch = torch.broadcast_shapes(
            *(t.shape[: t.ndim - self.ndim] for t in tensors)
        )
        arrays = [
            t.detach()
            .as_subclass(Tensor)
            .to("cpu", torch.float64)
            .expand((*batch, *self.shape))
            .reshape(-1, *self.shape)
            .numpy()
            for t in tensors
        ]
        found = np.empty((len(arrays[0]), *result))
        for i, rows in enumerate(zip(*arrays, strict=True)):
            found[i] = verb(*(row.copy() for row in rows))
        like = tensors[0]
        return (
            torch.from_numpy(found)
            .to(like.device, like.dtype)
            .reshape((*batch, *result))
        )

    def _in(self, x: Array, u: Array) -> Array:
        return np.asarray(self.manifold.projection(x, u)) if self._inward else u

    def _out(self, x: Array, u: Array) -> Array:
        return np.asarray(self.manifold.embedding(x, u))

    # --- geoopt's verbs

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the inner products, one for each point."""

        def one(p: Array, a: Array, b: Array) -> float:
            a, b = self._in(p, a), self._in(p, b)
            return float(self.manifold.inner_product(p, a, b))

        found = self._each(one, (), x, u, u if v is None else v)
        return self._keep(found, keepdim)

    def _keep(self, found: Tensor, keepdim: bool) -> Tensor:
        return found.reshape((*found.shape, *(1,) * self.ndim)) if keepdim else found

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent part of ``u``."""

        def one(p: Array, a: Array) -> Array:
            return self._out(p, self.manifold.projection(p, a))

        return self._each(one, self.shape, x, u)

    def projx(self, x: Tensor) -> Tensor:
        """Return the point next to ``x``."""
        return self._each(self._closest, self.shape, x)

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""

        def one(p: Array, e: Array) -> Array:
            found = self.manifold.euclidean_to_riemannian_gradient(p, e)
            return self._out(p, found)

        return self._each(one, self.shape, x, u)

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract with pymanopt's retraction."""

        def one(p: Array, a: Array) -> Array:
            return np.asarray(self.manifold.retraction(p, self._in(p, a)))

        return self._each(one, self.shape, x, u)

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic.

        Args:
            x: points.
            u: tangent vectors.

        Returns:
            Points.

        Raises:
            NotImplementedError: pymanopt has no exponential map for the manifold, or
                only a retraction under that name.
        """
        if isinstance(self.manifold, RetrAsExpMixin):
            raise NotImplementedError(
                f"expmap: pymanopt takes the retraction of {self.manifold} for it"
            )

        def one(p: Array, a: Array) -> Array:
            return np.asarray(self.manifold.exp(p, self._in(p, a)))

        return self._each(one, self.shape, x, u)

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the tangent vector at ``x`` that leads to ``y``, where known."""

        def one(p: Array, q: Array) -> Array:
            return self._out(p, self.manifold.log(p, q))

        return self._each(one, self.shape, x, y)

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the distances, where known."""
        return self._keep(self._each(self.manifold.dist, (), x, y), keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport ``v`` from ``x`` to ``y``."""

        def one(p: Array, q: Array, a: Array) -> Array:
            return self._out(q, self.manifold.transport(p, q, self._in(p, a)))

        return self._each(one, self.shape, x, y, v)

    def random(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> geoopt.ManifoldTensor:
        """Draw points with pymanopt, from torch's stream.

        Args:
            *size: shape, ``(*batch, *shape)``.
            dtype: data type.
            device: device.

        Returns:
            Points of the manifold; numpy's stream is left where it was.
        """
        return self._drawn(size, int(torch.randint(2**31, ())), dtype, device)

    def origin(
        self,
        *size: int,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        seed: int | None = 42,
    ) -> geoopt.ManifoldTensor:
        """Return points that depend on the seed only.

        Args:
            *size: shape, ``(*batch, *shape)``.
            dtype: data type.
            device: device.
            seed: seed; None: draw anew.

        Returns:
            Points of the manifold.
        """
        if seed is None:
            return self.random(*size, dtype=dtype, device=device)
        return self._drawn(size, seed, dtype, device)

    def _drawn(
        self,
        size: tuple[int, ...],
        seed: int,
        dtype: torch.dtype | None,
        device: torch.device | str | None,
    ) -> geoopt.ManifoldTensor:
        shape = tuple(size2shape(*size))
        self._assert_check_shape(shape, "x")
        batch = shape[: len(shape) - self.ndim]
        with pymanopt_state_kept():
            np.random.seed(seed % 2**32)  # noqa: NPY002
            points = [self.manifold.random_point() for _ in range(int(np.prod(batch)))]
        found = torch.tensor(np.asarray(points), device=device).reshape(shape)
        kind = torch.get_default_dtype() if dtype is None else dtype
        return geoopt.ManifoldTensor(found.to(kind), manifold=self)

    def _check_shape(
        self, shape: tuple[int, ...], name: str
    ) -> tuple[bool, str | None]:
        if tuple(shape[max(0, len(shape) - self.ndim) :]) != self.shape:
            return False, (
                f"`{name}` should have the shape {self.shape}, or batches of it, got "
                f"{tuple(shape)}"
            )
        return True, None

    def _check_point_on_manifold(
        self, x: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not torch.allclose(self.projx(x), x, atol=atol, rtol=rtol):
            return False, f"`x != projx(x)` with atol={atol}, rtol={rtol}"
        return True, None

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        if not torch.allclose(self.proju(x, u), u, atol=atol, rtol=rtol):
            return False, f"`u != proju(x, u)` with atol={atol}, rtol={rtol}"
        return True, None
