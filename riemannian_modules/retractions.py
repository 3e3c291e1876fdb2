"""Retractions as values: how a tangent step becomes a point.

A retraction R satisfies ``R_w(0) = w`` and ``d/dt R_w(t v) = v`` at 0. Its *order* is
the order of agreement with the geodesic of the manifold's own metric: the distance to
``Exp_w(t v)`` is O(t^(order + 1)) (Absil, Mahony & Sepulchre, 2008, section 4.1 and
proposition 5.5.5). The geodesics of a layer metric with a factor are other curves,
with which every retraction agrees to first order. On a quotient such as ``Grassmann``
the distance is that of the points, however the tensors differ that stand for them.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import geoopt
from torch import Tensor

from riemannian_modules.errors import ManifoldContractError
from riemannian_modules.manifolds.contract import base_of
from riemannian_modules.manifolds.fixed_rank import FixedRank, orthographic_step
from riemannian_modules.manifolds.grassmann import Grassmann
from riemannian_modules.manifolds.log_euclidean import LogEuclideanSPD
from riemannian_modules.manifolds.lorentz import Lorentz
from riemannian_modules.manifolds.oblique import Oblique
from riemannian_modules.manifolds.positive import Positive
from riemannian_modules.manifolds.reshaped import Reshaped, innermost
from riemannian_modules.manifolds.rotations import SpecialOrthogonal
from riemannian_modules.manifolds.scaled import Scaled
from riemannian_modules.manifolds.stiefel import (
    CanonicalStiefel,
    cayley_step,
    qr_step,
)

__all__ = [
    "QR",
    "Cayley",
    "Default",
    "Exponential",
    "Orthographic",
    "Projection",
    "Retraction",
]


class Retraction(ABC):
    """A rule that moves a point along a tangent vector.

    Subclass it, as a frozen dataclass, for a rule of your own; test it with
    ``riemannian_modules.testing.check_retraction``.
    """

    @abstractmethod
    def __call__(
        self, manifold: geoopt.Manifold, point: Tensor, tangent: Tensor
    ) -> Tensor:
        """Return the point that ``tangent`` leads to.

        Args:
            manifold: the manifold, also inside a ``MetricManifold``.
            point: where the step starts, ``(*batch, *shape)``.
            tangent: tangent vector there, of the same shape.

        Returns:
            A new tensor; the arguments are unchanged.
        """

    @abstractmethod
    def order(self, manifold: geoopt.Manifold) -> int:
        """Return the order of agreement with the geodesic: 1, or 2 for 2 and more."""


# By function, not by class: a subclass with a retraction of its own is not in here.
_SECOND_ORDER_RETR: frozenset[Callable[..., Tensor]] = frozenset(
    kind.retr
    for kind in (
        geoopt.Euclidean,
        geoopt.Sphere,
        geoopt.SphereExact,
        geoopt.SymmetricPositiveDefinite,
        geoopt.EuclideanStiefelExact,
        geoopt.StereographicExact,
        CanonicalStiefel,
        FixedRank,
        Grassmann,
        LogEuclideanSPD,
        Lorentz,
        Oblique,
        Positive,
        SpecialOrthogonal,
    )
)


_SURROUNDING_METRIC = (
    geoopt.Euclidean,
    geoopt.Sphere,
    geoopt.EuclideanStiefel,
    FixedRank,
    Grassmann,
    Oblique,
    SpecialOrthogonal,
)


def _moved(
    step: Callable[[Tensor, Tensor], Tensor],
    manifold: geoopt.Manifold,
    point: Tensor,
    tangent: Tensor,
) -> Tensor:
    """Return ``step(point, tangent)``, taken where the innermost manifold has both."""
    base = base_of(manifold)
    if isinstance(base, Scaled):
        return _moved(step, base.base, point, tangent)
    if isinstance(base, Reshaped):
        point, tangent = base._in(point), base._in(tangent)
        return base._out(_moved(step, base.base, point, tangent))
    return step(point, tangent)


def _lowest_order(
    manifold: geoopt.Manifold, order: Callable[[geoopt.Manifold], int]
) -> int:
    """Return the order on a manifold or, for a product, on its worst part."""
    base = innermost(manifold)
    if isinstance(base, geoopt.ProductManifold):
        return min(_lowest_order(part, order) for part in base.manifolds)
    return order(base)


def _orthonormal(manifold: geoopt.Manifold, rule: str) -> geoopt.Manifold:
    base = innermost(manifold)
    if not isinstance(base, geoopt.Stiefel | Grassmann | SpecialOrthogonal):
        raise ManifoldContractError(
            f"retractions.{rule} needs a manifold of orthonormal matrices (Stiefel, "
            f"Grassmann, SpecialOrthogonal), got {base.name}; use retractions.Default()"
        )
    return base


def _fixed_rank(manifold: geoopt.Manifold) -> FixedRank:
    base = innermost(manifold)
    if not isinstance(base, FixedRank):
        raise ManifoldContractError(
            f"retractions.Orthographic needs a FixedRank manifold, got {base.name}; "
            "use retractions.Default()"
        )
    return base


@dataclass(frozen=True)
class Default(Retraction):
    """The manifold's own ``retr``.

    Second order on Euclidean space, spheres, SPD matrices, ``CanonicalStiefel``,
    ``FixedRank``, ``Grassmann``, ``Oblique``, ``Positive``, ``SpecialOrthogonal`` and
    geoopt's "Exact" classes; first order on ``Stiefel`` (QR) and the Poincare ball.
    On a manifold of your own the order is reported as 1.

    >>> Default().order(geoopt.Sphere()), Default().order(geoopt.PoincareBall())
    (2, 1)
    """

    def __call__(
        self, manifold: geoopt.Manifold, point: Tensor, tangent: Tensor
    ) -> Tensor:
        """Return ``manifold.retr(point, tangent)``."""
        moved: Tensor = manifold.retr(point, tangent)
        return moved

    def order(self, manifold: geoopt.Manifold) -> int:
        """Return 2 where ``retr`` is known to be second order, else 1."""
        return _lowest_order(
            manifold, lambda base: 2 if type(base).retr in _SECOND_ORDER_RETR else 1
        )


@dataclass(frozen=True)
class Exponential(Retraction):
    """The manifold's ``expmap``: its geodesics themselves.

    >>> Exponential().order(geoopt.PoincareBall())
    2
    """

    def __call__(
        self, manifold: geoopt.Manifold, point: Tensor, tangent: Tensor
    ) -> Tensor:
        """Return ``manifold.expmap(point, tangent)``.

        Raises:
            ManifoldContractError: the manifold has no ``expmap``.
        """
        try:
            moved: Tensor = manifold.expmap(point, tangent)
        except NotImplementedError as error:
            raise ManifoldContractError(
                f"{base_of(manifold).name} has no expmap; use retractions.Default()"
            ) from error
        return moved

    def order(self, manifold: geoopt.Manifold) -> int:
        """Return 2, which stands for "2 and more"."""
        return 2


@dataclass(frozen=True)
class Projection(Retraction):
    """The nearest point to ``point + tangent``: ``manifold.projx``.

    On Stiefel manifolds this is the polar retraction, on ``FixedRank`` the truncated
    singular value decomposition. Second order where the metric is that of the
    surrounding space: Euclidean space, spheres, ``Stiefel``, ``FixedRank``,
    ``Oblique``, ``SpecialOrthogonal`` (Absil & Malick, 2012), and on ``Grassmann``;
    first order with other metrics, and reported as such on a manifold of your own.

    >>> from riemannian_modules.manifolds import Stiefel
    >>> Projection().order(Stiefel()), Projection().order(CanonicalStiefel())
    (2, 1)
    """

    def __call__(
        self, manifold: geoopt.Manifold, point: Tensor, tangent: Tensor
    ) -> Tensor:
        """Return ``manifold.projx(point + tangent)``."""
        moved: Tensor = manifold.projx(point + tangent)
        return moved

    def order(self, manifold: geoopt.Manifold) -> int:
        """Return 2 where the metric is the surrounding one, else 1."""
        return _lowest_order(
            manifold, lambda base: 2 if isinstance(base, _SURROUNDING_METRIC) else 1
        )


@dataclass(frozen=True)
class Cayley(Retraction):
    """The Cayley map of orthonormal matrices (Wen & Yin, 2013), either orientation.

    For Stiefel manifolds, ``Grassmann`` and ``SpecialOrthogonal``, where it is the
    default. Second order, but for the Euclidean metric on Stiefel manifolds: there its
    acceleration has the tangent part ``(I - x x^T) u x^T u``. A ManifoldContractError
    on other manifolds.

    >>> Cayley().order(CanonicalStiefel())
    2
    """

    def __call__(
        self, manifold: geoopt.Manifold, point: Tensor, tangent: Tensor
    ) -> Tensor:
        """Return :func:`riemannian_modules.manifolds.stiefel.cayley_step`."""
        _orthonormal(manifold, "Cayley")
        return _moved(cayley_step, manifold, point, tangent)

    def order(self, manifold: geoopt.Manifold) -> int:
        """Return 1 with the Euclidean metric on Stiefel manifolds, else 2."""
        base = _orthonormal(manifold, "Cayley")
        second = (CanonicalStiefel, Grassmann, SpecialOrthogonal)
        return 2 if isinstance(base, second) else 1


@dataclass(frozen=True)
class QR(Retraction):
    """The QR retraction of orthonormal matrices, either orientation.

    For Stiefel manifolds and ``SpecialOrthogonal``, where it is first order and
    cheaper than the Cayley map, and for ``Grassmann``, where it is second order. The
    default of ``Stiefel`` and ``Grassmann``. A ManifoldContractError on other
    manifolds.

    >>> QR().order(CanonicalStiefel())
    1
    """

    def __call__(
        self, manifold: geoopt.Manifold, point: Tensor, tangent: Tensor
    ) -> Tensor:
        """Return :func:`riemannian_modules.manifolds.stiefel.qr_step`."""
        _orthonormal(manifold, "QR")
        return _moved(qr_step, manifold, point, tangent)

    def order(self, manifold: geoopt.Manifold) -> int:
        """Return 2 on subspaces, else 1."""
        return 2 if isinstance(_orthonormal(manifold, "QR"), Grassmann) else 1


@dataclass(frozen=True)
class Orthographic(Retraction):
    """The point that differs from ``point + tangent`` by a normal vector.

    For ``FixedRank``: second order (Absil & Malick, 2012), and meant for steps shorter
    than the least singular value. A ManifoldContractError on other manifolds.

    >>> Orthographic().order(FixedRank(2))
    2
    """

    def __call__(
        self, manifold: geoopt.Manifold, point: Tensor, tangent: Tensor
    ) -> Tensor:
        """Return :func:`riemannian_modules.manifolds.fixed_rank.orthographic_step`."""
        rank = _fixed_rank(manifold).rank
        step = partial(orthographic_step, rank=rank)
        return _moved(step, manifold, point, tangent)

    def order(self, manifold: geoopt.Manifold) -> int:
        """Return 2 on matrices of fixed rank."""
        _fixed_rank(manifold)
        return 2
