"""A manifold of tensors that are another manifold's points in another shape."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import geoopt
import torch
from geoopt.utils import size2shape
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError, ShapeError
from riemannian_modules.manifolds.boundary import inside, on_boundary
from riemannian_modules.manifolds.contract import base_of, ensure_contract
from riemannian_modules.manifolds.declaring import shape_problem
from riemannian_modules.manifolds.drawing import drawn
from riemannian_modules.manifolds.no_points import possibly_empty
from riemannian_modules.manifolds.quotient import Quotient
from riemannian_modules.manifolds.riesz import (
    dimension,
    flat,
    require_own_formulas,
    riesz,
    root,
    root_adjoint,
)
from riemannian_modules.manifolds.scaled import Scaled

__all__ = ["Reshaped", "innermost"]


@possibly_empty
class Reshaped(geoopt.Manifold):  # type: ignore[misc]
    """Tensors of one shape that are points of ``base`` when they are viewed in another.

    One point is the whole tensor: ``inner`` and ``dist`` are those of the product over
    everything that the view has besides a point of the base. Use it for packed
    weights, such as the three square matrices in the ``in_proj_weight`` of attention,
    and through :meth:`filters` for weights of convolutions.

    Args:
        base: a manifold that keeps its contract.
        shape: shape of the tensors.
        view: their shape as points of the base; -1: what is left.

    Raises:
        ShapeError: the view has another number of entries, or no point of the base
            has its shape.
        ManifoldContractError: ``base`` cannot carry a layer metric, or it is a
            MetricManifold.

    >>> from riemannian_modules.manifolds import SpecialOrthogonal
    >>> packed = Reshaped(SpecialOrthogonal(), (6, 2), (3, 2, 2))
    >>> packed
    Reshaped(SpecialOrthogonal)((6, 2) as (3, 2, 2)) manifold
    >>> packed.random(6, 2)[2:4].det().round(decimals=4)
    tensor(1.)
    """

    reversible = False
    invariant: Callable[[Tensor], Tensor]

    def __init__(
        self, base: geoopt.Manifold, shape: Sequence[int], view: Sequence[int]
    ) -> None:
        super().__init__()
        ensure_contract(base, "Reshaped")
        if base_of(base) is not base:
            raise ManifoldContractError(
                "Reshaped: a MetricManifold holds one metric; pass its .base instead"
            )
        require_own_formulas(base, "Reshaped")
        self.base = base
        self.shape = tuple(shape)
        self.view = _resolved(self.shape, tuple(view))
        problem = shape_problem(base, self.view)
        if problem is not None:
            raise ShapeError(
                f"no point of {base.name} has the shape {self.view} that {self.shape} "
                f"is viewed in: {problem}; choose another view"
            )
        self.name = f"Reshaped({base.name})"
        self.ndim = len(self.shape)
        self.reversible = base.reversible
        if isinstance(base, Quotient):
            self.invariant = self._invariant

    @classmethod
    def filters(
        cls, base: geoopt.Manifold, shape: Sequence[int], groups: int = 1
    ) -> "Reshaped":
        """View the weight of a convolution as the matrix of its filters.

        A filter, all that feeds one output channel, becomes a row of length in x
        kernel; groups of a grouped convolution become a batch of such matrices.
        ``Stiefel()`` then means orthonormal filters and ``Sphere()`` filters of norm
        1, which bounds the gain of a 3 x 3 convolution by 3 (with stride 1). On the
        four-dimensional tensor itself they would constrain every 3 x 3 kernel, or
        every row of one: of 4608 dimensions (32 filters, 16 channels) 1536 would be
        left instead of 4080, and the gain of a random weight is 17 instead of 2.3.

        Args:
            base: a manifold of vectors or matrices.
            shape: shape of the weight, ``(out, in / groups, *kernel)``, or of a
                transposed convolution ``(in, out / groups, *kernel)``, whose rows
                belong to input channels.
            groups: number of groups.

        Returns:
            The manifold.

        Raises:
            ShapeError: the groups do not divide the filters, or no point of the base
                has the shape of the view.

        >>> from riemannian_modules.manifolds import Stiefel
        >>> Reshaped.filters(Stiefel(), (8, 4, 3, 3)).view
        (8, 36)
        """
        if len(shape) < 2 or groups < 1 or shape[0] % groups:
            raise ShapeError(
                f"a weight of shape {tuple(shape)} has no filters in {groups} groups; "
                "pass the weight of a convolution and its number of groups"
            )
        rows = (shape[0],) if groups == 1 else (groups, shape[0] // groups)
        return cls(base, shape, (*rows, math.prod(shape[1:])))

    def _in(self, tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[: tensor.ndim - self.ndim], *self.view)

    def _out(self, tensor: Tensor) -> Tensor:
        batch = tensor.shape[: tensor.ndim - len(self.view)]
        return tensor.reshape(*batch, *self.shape)

    def _keep(self, value: Tensor, keepdim: bool) -> Tensor:
        return value.reshape(*value.shape, *(1,) * self.ndim) if keepdim else value

    def _flat(self, parts: Tensor) -> Tensor:
        batch = parts.ndim - len(self.view)
        return parts.reshape(*parts.shape[:batch], math.prod(parts.shape[batch:]))

    def _invariant(self, x: Tensor) -> Tensor:
        assert isinstance(self.base, Quotient)
        return self.base.invariant(self._in(x))

    def inner(
        self, x: Tensor, u: Tensor, v: Tensor | None = None, *, keepdim: bool = False
    ) -> Tensor:
        """Return the inner product of the base, summed over the whole view."""
        w = None if v is None else self._in(v)
        # With keepdim, because not every geoopt class is right without.
        parts = self.base.inner(self._in(x), self._in(u), w, keepdim=True)
        return self._keep(self._flat(parts).sum(-1), keepdim)

    def component_inner(self, x: Tensor, u: Tensor, v: Tensor | None = None) -> Tensor:
        """Return the inner product of the part of the view that an entry is in."""
        w = None if v is None else self._in(v)
        parts = self.base.component_inner(self._in(x), self._in(u), w)
        batch = parts.shape[: parts.ndim - len(self.view)]
        return self._out(parts.expand(*batch, *self.view))

    def egrad2rgrad(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent vector that represents the covector ``u``."""
        return self._out(riesz(self.base, self._in(x), self._in(u)))

    def proju(self, x: Tensor, u: Tensor) -> Tensor:
        """Return the tangent part of ``u``."""
        return self._out(self.base.proju(self._in(x), self._in(u)))

    def projx(self, x: Tensor) -> Tensor:
        """Return the base's ``projx``."""
        return self._out(self.base.projx(self._in(x)))

    def retr(self, x: Tensor, u: Tensor) -> Tensor:
        """Retract with the base."""
        return self._out(self.base.retr(self._in(x), self._in(u)))

    def expmap(self, x: Tensor, u: Tensor) -> Tensor:
        """Follow the geodesic of the base."""
        return self._out(self.base.expmap(self._in(x), self._in(u)))

    def logmap(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the base's logarithm."""
        return self._out(self.base.logmap(self._in(x), self._in(y)))

    def dist(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the root of the sum of the base's squared distances."""
        parts = self.base.dist(self._in(x), self._in(y), keepdim=True)
        total = torch.linalg.vector_norm(self._flat(parts), dim=-1)
        return self._keep(total, keepdim)

    def dist2(self, x: Tensor, y: Tensor, *, keepdim: bool = False) -> Tensor:
        """Return the sum of the base's squared distances."""
        parts = self.base.dist2(self._in(x), self._in(y), keepdim=True)
        return self._keep(self._flat(parts).sum(-1), keepdim)

    def transp(self, x: Tensor, y: Tensor, v: Tensor) -> Tensor:
        """Transport with the base."""
        return self._out(self.base.transp(self._in(x), self._in(y), self._in(v)))

    def retr_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Retract and transport with the base."""
        y, w = self.base.retr_transp(self._in(x), self._in(u), self._in(v))
        return self._out(y), self._out(w)

    def expmap_transp(self, x: Tensor, u: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Follow the geodesic and transport with the base."""
        y, w = self.base.expmap_transp(self._in(x), self._in(u), self._in(v))
        return self._out(y), self._out(w)

    def transp_follow_retr(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport along the retraction with the base."""
        follow = self.base.transp_follow_retr
        return self._out(follow(self._in(x), self._in(u), self._in(v)))

    def transp_follow_expmap(self, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        """Transport along the geodesic with the base."""
        follow = self.base.transp_follow_expmap
        return self._out(follow(self._in(x), self._in(u), self._in(v)))

    def random(self, *size: int, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Return a random point of the base, ``(*batch, *shape)``."""
        return self._own("random", size, kwargs)

    def origin(self, *size: int, **kwargs: Any) -> geoopt.ManifoldTensor:
        """Return the origin of the base, ``(*batch, *shape)``."""
        return self._own("origin", size, kwargs)

    def extra_repr(self) -> str:
        """Return both shapes."""
        return f"{self.shape} as {self.view}"

    def _own(
        self, verb: str, size: tuple[int, ...], kwargs: dict[str, Any]
    ) -> geoopt.ManifoldTensor:
        size = tuple(size2shape(*size))
        self._assert_check_shape(size, "x")
        view = (*size[: len(size) - self.ndim], *self.view)
        point = drawn(self.base, verb, view, **kwargs)
        return geoopt.ManifoldTensor(self._out(point), manifold=self)

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
        return self.base._check_point_on_manifold(self._in(x), atol=atol, rtol=rtol)

    def _check_vector_on_tangent(
        self, x: Tensor, u: Tensor, *, atol: float = 1e-5, rtol: float = 1e-5
    ) -> tuple[bool, str | None]:
        return self.base._check_vector_on_tangent(
            self._in(x), self._in(u), atol=atol, rtol=rtol
        )


def innermost(manifold: geoopt.Manifold) -> geoopt.Manifold:
    """Return the manifold below metrics, scales and views, which change no curve.

    >>> innermost(Reshaped(geoopt.Sphere(), (6,), (2, 3)))
    Sphere manifold
    """
    base = base_of(manifold)
    return innermost(base.base) if isinstance(base, Reshaped | Scaled) else base


def _resolved(shape: tuple[int, ...], view: tuple[int, ...]) -> tuple[int, ...]:
    entries, known = math.prod(shape), math.prod(side for side in view if side != -1)
    if view.count(-1) == 1 and known > 0 and entries % known == 0:
        view = tuple(entries // known if side == -1 else side for side in view)
    if -1 in view or math.prod(view) != entries:
        raise ShapeError(
            f"a tensor of shape {shape} cannot be viewed as {view}; choose a view with "
            f"{entries} entries"
        )
    return view


@flat.register(Reshaped)
def _(manifold: Reshaped, x: Tensor, u: Tensor) -> Tensor:
    return manifold._out(flat(manifold.base, manifold._in(x), manifold._in(u)))


@root.register(Reshaped)
def _(manifold: Reshaped, x: Tensor, z: Tensor) -> Tensor:
    return manifold._out(root(manifold.base, manifold._in(x), manifold._in(z)))


@root_adjoint.register(Reshaped)
def _(manifold: Reshaped, x: Tensor, e: Tensor) -> Tensor:
    return manifold._out(root_adjoint(manifold.base, manifold._in(x), manifold._in(e)))


@dimension.register(Reshaped)
def _(manifold: Reshaped, x: Tensor) -> int:
    return int(dimension(manifold.base, manifold._in(x)))


@inside.register(Reshaped)
def _(manifold: Reshaped, x: Tensor) -> Tensor | None:
    return inside(manifold.base, manifold._in(x))


@on_boundary.register(Reshaped)
def _(manifold: Reshaped, x: Tensor) -> str | None:
    return on_boundary(manifold.base, manifold._in(x))
