"""Which manifolds can carry a layer metric, and what to use instead of the others.

A layer metric asks five things of its base manifold:

1. ``egrad2rgrad`` is the Riesz map: ``inner(x, egrad2rgrad(x, e), v) = <e, v>`` for
   every tangent ``v``;
2. its values are tangent, it is linear and kills normal covectors;
3. it leaves its argument alone;
4. ``proju`` is a projection on the tangent space;
5. ``retr(x, t v)`` starts with the velocity ``v``.

``riemannian_modules.testing.check_base_manifold`` measures them on any manifold. Some
geoopt classes (0.5.1) fail; :func:`ensure_contract` knows these, and what replaces
them.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import geoopt
from geoopt.manifolds.siegel.siegel import SiegelManifold
from geoopt.manifolds.symmetric_positive_definite import SPDMetric

from riemannian_modules.errors import ManifoldContractError

__all__ = ["MetricView", "base_of", "ensure_contract"]


class MetricView(geoopt.Manifold):  # type: ignore[misc]
    """A manifold that adds a metric to another one: ``MetricManifold``."""

    # A Protocol with this attribute would not find it: from Python 3.12 on isinstance
    # does not ask nn.Module for its submodules.
    base: geoopt.Manifold


def base_of(manifold: geoopt.Manifold) -> geoopt.Manifold:
    """Return the manifold below a ``MetricManifold``; any other one unchanged."""
    return manifold.base if isinstance(manifold, MetricView) else manifold


@dataclass(frozen=True)
class _Flaw:
    """Methods that break the contract, in every class that inherits one of them.

    Without methods: nothing that a subclass could override mends it.
    """

    owner: type[geoopt.Manifold]
    methods: tuple[str, ...]
    finding: str
    remedy: str

    def afflicts(self, manifold: geoopt.Manifold) -> bool:
        kind = type(manifold)
        return isinstance(manifold, self.owner) and (
            not self.methods
            or any(
                getattr(kind, method) is getattr(self.owner, method)
                for method in self.methods
            )
        )


_OURS = "riemannian_modules.manifolds"
_COMPLEX = (
    "its points are complex, while covectors, factors and Gram matrices of a layer "
    "metric are real"
)
_REAL_INSTEAD = (
    f"use {_OURS}.SPD() on real matrices of twice the size, the symplectic ones of "
    "which are this space, or for 1 x 1 matrices Lorentz() or PoincareBall()"
)

_FLAWS = (
    _Flaw(
        geoopt.CanonicalStiefel,
        ("proju", "retr", "expmap"),
        "its retr and expmap double the speed in the directions x A, its proju is not "
        "a projection",
        f"use {_OURS}.CanonicalStiefel()",
    ),
    _Flaw(
        geoopt.Scaled,
        ("__init__",),
        "its retr and expmap divide the step by the scale while inner and egrad2rgrad "
        "ignore it",
        f"use {_OURS}.Scaled(manifold, scale), or put scale^2 into the mass",
    ),
    _Flaw(
        geoopt.BirkhoffPolytope,
        ("egrad2rgrad", "proju"),
        "its egrad2rgrad is not the Riesz map of its inner (off by the matrix size), "
        "its proju is not a projection, its points are only good to 1e-5",
        f"use {_OURS}.BirkhoffPolytope(), whose egrad2rgrad(x, e) is n proju(x, e * x)",
    ),
    _Flaw(
        geoopt.Lorentz,
        ("egrad2rgrad", "retr"),
        "its egrad2rgrad overwrites its argument, its retr(x, 0) is not x, its logmap "
        "and transp are wrong between points closer than 1e-4",
        f"use {_OURS}.Lorentz(k)",
    ),
    _Flaw(
        geoopt.BoundedDomain,
        (),
        "its egrad2rgrad is not the Riesz map of its inner, its proju is not a "
        f"projection, and {_COMPLEX}",
        f"not even a subclass that repairs both can carry one; {_REAL_INSTEAD}",
    ),
    _Flaw(
        SiegelManifold,
        (),
        f"its proju is egrad2rgrad, not a projection, and {_COMPLEX}",
        f"not even a subclass that repairs it can carry one; {_REAL_INSTEAD}",
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

    Refused are geoopt's ``CanonicalStiefel``, ``Scaled``, ``BirkhoffPolytope`` and
    ``Lorentz``, subclasses of these that inherit a broken method,
    ``SymmetricPositiveDefinite`` with another metric than "AIM", the complex
    ``BoundedDomain`` and ``UpperHalf``, learnable curvatures, and products of any of
    these. Everything else is returned unchanged; run
    ``riemannian_modules.testing.check_base_manifold`` on a class of your own.

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
    if isinstance(manifold, type) and issubclass(manifold, geoopt.Manifold):
        kind = manifold.__name__
        raise ManifoldContractError(
            f"{name}: the manifold is the class {kind}; call it: {kind}()"
        )
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
            own = "SPD()"
            if part.default_metric is SPDMetric.LEM:
                own = f"LogEuclideanSPD(), or {_OURS}.SPD() as it is without LEM"
            _refuse(
                name,
                part,
                f"with default_metric={part.default_metric.value} only its dist "
                "changes, inner, egrad2rgrad and retr stay affine-invariant",
                f"use {_OURS}.{own}",
            )
        if any(value.requires_grad for value in part.parameters(recurse=False)):
            _refuse(
                name,
                part,
                "its curvature is learnable, so that its points and their metric would "
                "change between two steps",
                "make it with learnable=False; a scale of the outputs can be learned "
                "instead",
            )
    return manifold
