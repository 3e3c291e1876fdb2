"""The laws of a retraction, measured at one point.

Tolerances are those of :mod:`riemannian_modules.testing.probe`. A fitted slope may
fall short of order + 1 by 0.25 in float64 and by 0.5 in float32.
"""

from collections.abc import Iterator

import geoopt
import torch
from torch import Tensor

from riemannian_modules.retractions import Retraction
from riemannian_modules.testing.guarded import guarded
from riemannian_modules.testing.probe import Probe, change, gap, has, size, velocity
from riemannian_modules.testing.result import CheckResult
from riemannian_modules.testing.slopes import error_slope

__all__ = ["check_retraction"]


def check_retraction(
    manifold: geoopt.Manifold,
    retraction: Retraction,
    point: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> list[CheckResult]:
    """Measure whether a retraction is one, and of the order that it claims.

    The findings are named ``retraction_zero``, ``retraction_on_manifold``,
    ``retraction_derivative``, ``retraction_pure`` and ``retraction_order``. The order
    is that of the distance to ``expmap``, so it is left out on a manifold without one
    (on a :class:`riemannian_modules.manifolds.Quotient` points are compared, not the
    tensors that stand for them); whether ``expmap`` itself can be trusted is a finding
    of :func:`check_base_manifold`. Where the retraction raises, the last finding is
    named ``raised``.

    Args:
        manifold: the manifold.
        retraction: the retraction under test.
        point: a point on the manifold, ``(*batch, *shape)``.
        generator: source of the random tangent vector, on the device of ``point``.

    Returns:
        The findings; a fitted slope may fall short of order + 1 by 0.25 (0.5 in
        float32).

    >>> from riemannian_modules.retractions import Projection
    >>> point = torch.eye(3, dtype=torch.float64)[0]
    >>> results = check_retraction(geoopt.Sphere(), Projection(), point)
    >>> all(result.passed for result in results)
    True
    """
    probe = Probe(manifold, point.detach().as_subclass(Tensor), generator)
    with torch.no_grad():
        return list(guarded("the retraction", lambda: _laws(probe, retraction)))


def _laws(probe: Probe, retraction: Retraction) -> Iterator[CheckResult]:
    manifold, x, u = probe.manifold, probe.point, probe.tangent()

    def move(t: float) -> Tensor:
        return retraction(manifold, x, t * u)

    yield CheckResult.at_most(
        "retraction_zero", gap(move(0.0), x), probe.exact, "R(x, 0) = x"
    )
    far = move(0.5)
    yield CheckResult.at_most(
        "retraction_on_manifold",
        gap(manifold.projx(far), far),
        probe.exact,
        "R(x, u) is on the manifold",
    )
    yield CheckResult.at_most(
        "retraction_derivative",
        gap(velocity(move, probe.step), u),
        probe.derived,
        "d/dt R(x, t u) = u at t = 0",
    )
    yield CheckResult.at_most(
        "retraction_pure",
        change(lambda p, v: retraction(manifold, p, v), x, 0.5 * u),
        0.0,
        "R leaves its arguments alone",
    )
    if not has(manifold.expmap, x, u):
        return
    order = retraction.order(manifold)
    slope = error_slope(
        lambda t: torch.linalg.vector_norm(
            probe.identity(move(t)) - probe.identity(manifold.expmap(x, t * u))
        ),
        x.dtype,
        scale=size(x),
    )
    slack = 0.25 if probe.eps < 1e-12 else 0.5
    yield CheckResult.at_least(
        "retraction_order",
        slope.value,
        order + 1.0 - slack,
        f"|R(x, t u) - Exp(x, t u)| = O(t^{order + 1})",
    )
