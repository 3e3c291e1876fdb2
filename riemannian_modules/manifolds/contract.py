"""Which manifolds can carry a layer metric, and what to use instead of the others.

A layer metric asks five things of its base manifold:

1. ``egrad2rgrad`` is the Riesz map: ``inner(x, egrad2rgrad(x, e), v) = <e, v>`` for
   every tangent ``v``;
2. its values are tangent, it is linear and kills normal covectors;
3. it leaves its argument alone;
4. ``proju`` is a projection on the tangent space;
5. ``retr(x, t v)`` starts with the velocity ``v``.

``riemannian_modules.testing.check_base_manifold`` measures them on any manifold. Some
geoopt classes (0.5.1) fail; :func:`ensure_contract` knows these.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import geoopt
from geoopt.manifolds.symmetric_positive_definite import SPDMetric

from riemannian_modules.errors import ManifoldContractError

__all__ = ["base_of", "ensure_contract"]


@runtime_checkable
class MetricView(Protocol):
    """A manifold that adds a metric to another one: ``MetricManifold``."""

    base: geoopt.Manifold

    def bind(self, metric: object) -> None:
        """Use ``metric`` from now on."""


def base_of(manifold: geoopt.Manifold) -> geoopt.Manifold:
    """Return the manifold below a ``MetricManifold``; any other one unchanged."""
    return manifold.base if isinstance(manifold, MetricView) else manifold


@dataclass(frozen=True)
class _Flaw:
    """Methods that break the contract, in every class that inherits them."""

    owner: type[geoopt.Manifold]
    methods: tuple[str, ...]
    finding: str
    remedy: str

    def afflicts(self, manifold: geoopt.Manifold) -> bool:
        kind = type(manifold)
        return isinstance(manifold, self.owner) and any(
            getattr(kind, method) is getattr(self.owner, method)
            for method in self.methods
        )


_FLAWS = (
    _Flaw(
        geoopt.CanonicalStiefel,
        ("proju", "retr", "expmap"),
        "its retr and expmap double the speed in the directions x A, its proju is not "
        "a projection",
        "use riemannian_modules.manifolds.CanonicalStiefel()",
    ),
    _Flaw(
        geoopt.Scaled,
        ("__init__",),
        "its retr and expmap divide the step by the scale while inner and egrad2rgrad "
        "ignore it",
        "use the manifold inside it and put scale^2 into the mass",
    ),
    _Flaw(
        geoopt.BirkhoffPolytope,
        ("egrad2rgrad", "proju"),
        "its egrad2rgrad is not the Riesz map of its inner (off by the matrix size), "
        "its proju is not a projection",
        "use a subclass with egrad2rgrad(x, e) = n proju(x, e * x) and a repaired "
        "proju, or a Euclidean parameter with a softmax",
    ),
    _Flaw(
        geoopt.BoundedDomain,
        ("egrad2rgrad", "proju"),
        "its egrad2rgrad is not the Riesz map of its inner, its proju is not a "
        "projection",
        "use a subclass that repairs both",
    ),
    _Flaw(
        geoopt.UpperHalf,
        ("proju",),
        "its proju is egrad2rgrad, not a projection",
        "use a subclass with proju(x, u) = (u + u.mT) / 2",
    ),
)


def _parts(manifold: geoopt.Manifold) -> Iterator[geoopt.Manifold]:
    yield manifold
    if isinstance(manifold, geoopt.ProductManifold):
        for part in manifold.manifolds:
            yield from _parts(part)


def _refuse(name: str, manifold: geoopt.Manifold, finding: str, remedy: str) -> None:
    kind = type(manifold)
    raise ManifoldContractError(
        f"{name}: {kind.__module__.split('.')[0]}.{kind.__name__} cannot carry a layer "
        f"metric: {finding}; {remedy}"
    )


def ensure_contract(
    manifold: geoopt.Manifold, name: str = "manifold"
) -> geoopt.Manifold:
    """Return the manifold, unless it is known to break the contract.

    Refused are geoopt's ``CanonicalStiefel``, ``Scaled``, ``BirkhoffPolytope``,
    ``BoundedDomain``, ``UpperHalf``, subclasses of these that inherit the broken
    methods, ``SymmetricPositiveDefinite`` with another metric than "AIM", and products
    of any of these. Everything else is returned unchanged; run
    ``riemannian_modules.testing.check_base_manifold`` on a class of your own.

    ``geoopt.Lorentz`` writes into the argument of ``egrad2rgrad``. It is accepted,
    because the library always passes a copy.

    Args:
        manifold: where a parameter is to live.
        name: the parameter's name, for the message.

    Returns:
        The argument.

    Raises:
        ManifoldContractError: the manifold breaks the contract, or is not a
            geoopt manifold at all; the message has the remedy.

    >>> ensure_contract(geoopt.Sphere())
    Sphere manifold
    """
    if not isinstance(manifold, geoopt.Manifold):
        raise ManifoldContractError(
            f"{name}: expected a geoopt.Manifold, got {type(manifold).__name__}; "
            "subclass geoopt.Manifold or use one of riemannian_modules.manifolds"
        )
    for part in _parts(base_of(manifold)):
        for flaw in _FLAWS:
            if flaw.afflicts(part):
                _refuse(name, part, flaw.finding, flaw.remedy)
        if (
            isinstance(part, geoopt.SymmetricPositiveDefinite)
            and part.default_metric is not SPDMetric.AIM
        ):
            _refuse(
                name,
                part,
                f"with default_metric={part.default_metric.value} only its dist "
                "changes, inner, egrad2rgrad and retr stay affine-invariant",
                "use riemannian_modules.manifolds.SPD()",
            )
    return manifold
