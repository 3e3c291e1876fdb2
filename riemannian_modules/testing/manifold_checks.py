"""The contract of a base manifold, measured at one point.

Tolerances are those of :mod:`riemannian_modules.testing.probe`; besides, for the
distance, which geoopt clamps near 0 and 1, 100 sqrt(eps), and for the energy of a
geodesic (float64 only) 1e-6.
"""

import math
from collections.abc import Callable, Iterator
from functools import cache, partial

import geoopt
import torch
from torch import Tensor

from riemannian_modules.testing.guarded import guarded, worst
from riemannian_modules.testing.probe import (
    Curve,
    Probe,
    change,
    gap,
    has,
    pairing,
    size,
    velocity,
)
from riemannian_modules.testing.result import CheckResult

__all__ = ["check_base_manifold"]


def _energy_slope(probe: Probe, curve: Curve, bend: Tensor) -> float:
    """Return the derivative of the energy of a curve, bent inside its ends."""
    manifold = probe.manifold
    # Legendre nodes on (0, 1), from the symmetric tridiagonal matrix of Golub & Welsch.
    k = torch.arange(1, 6, dtype=torch.float64)
    off = k / (4.0 * k * k - 1.0).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0].square()

    @cache
    def unbent(t: float) -> tuple[Tensor, Tensor]:
        base = curve(t)
        return base, manifold.proju(base, bend)

    def energy(amount: float) -> Tensor:
        total: Tensor = nodes.new_zeros(())
        for node, weight in zip((0.5 * (nodes + 1.0)).tolist(), weights, strict=True):

            def bent(dt: float, node: float = node) -> Tensor:
                t = node + dt
                (base, direction), bump = unbent(t), (t * (1.0 - t)) ** 2
                moved: Tensor = manifold.projx(base + amount * bump * direction)
                return moved

            here, speed = bent(0.0), velocity(bent, 1e-3)
            total += 0.5 * weight * probe.inner(speed, speed, here).cpu()
        return total

    return float(velocity(energy, 3e-3))


def _riesz_checks(probe: Probe) -> Iterator[CheckResult]:
    e, f, v = probe.draw(), probe.draw(), probe.tangent()
    sharp = probe.riesz(e)
    scale = max(1.0, probe.metric_size * size(sharp)) * size(v)
    yield CheckResult.at_most(
        "riesz",
        abs(float(probe.inner(sharp, v) - pairing(e, v))) / max(scale, probe.eps),
        probe.exact,
        "inner(x, egrad2rgrad(x, e), v) = <e, v> for tangent v",
    )
    yield CheckResult.at_most(
        "riesz_tangent",
        gap(probe.tangent_part(sharp), sharp),
        probe.derived,
        "egrad2rgrad has tangent values",
    )
    sharp_f = probe.riesz(f)
    yield CheckResult.at_most(
        "riesz_linear",
        gap(
            probe.riesz(2.0 * e - f),
            2.0 * sharp - sharp_f,
            size(sharp) + size(sharp_f),
        ),
        probe.exact,
        "egrad2rgrad is linear in the covector",
    )
    yield CheckResult.at_most(
        "riesz_normal",
        size(probe.riesz(probe.normal_covector())) / max(size(sharp), probe.eps),
        probe.derived,
        "egrad2rgrad kills covectors that vanish on tangent vectors",
    )
    yield CheckResult.at_most(
        "riesz_pure",
        change(probe.manifold.egrad2rgrad, probe.point, e),
        0.0,
        "egrad2rgrad leaves its arguments alone",
    )


def _metric_checks(probe: Probe) -> Iterator[CheckResult]:
    u, v = probe.tangent(), probe.tangent()
    yield CheckResult.at_most(
        "metric_symmetric",
        abs(float(probe.inner(u, v) - probe.inner(v, u)))
        / max(probe.metric_size * size(u) * size(v), probe.eps),
        probe.exact,
        "inner(x, u, v) = inner(x, v, u)",
    )
    e = probe.draw()
    w = probe.project(e)
    if size(w) <= probe.exact * size(e):
        message = "no tangent u to measure inner(x, u, u) with: proju leaves rounding"
        yield CheckResult.yes("metric_positive", True, message)
        return
    yield CheckResult.at_least(
        "metric_positive",
        float(probe.inner(w, w)) / max(size(w) ** 2, probe.eps**2),
        probe.eps,
        "inner(x, u, u) > 0 for tangent u",
    )


def _projection_checks(probe: Probe) -> Iterator[CheckResult]:
    e = probe.draw()
    v = probe.project(e)
    yield CheckResult.at_most(
        "projection_idempotent",
        gap(probe.project(v), v, max(size(v), size(e))),
        probe.exact,
        "proju(x, proju(x, u)) = proju(x, u)",
    )
    yield CheckResult.at_most(
        "projection_tangent",
        gap(probe.tangent_part(v), v),
        probe.derived,
        "proju has tangent values",
    )
    # Tangent up to differences, whose error an oblique projection magnifies.
    w = probe.tangent_part(e)
    yield CheckResult.at_most(
        "projection_complete",
        gap(probe.project(w), w),
        probe.derived * max(1.0, probe.magnification),
        "proju leaves tangent vectors alone",
    )
    x = probe.point
    changes = worst(
        (
            change(probe.manifold.projx, x),
            change(probe.manifold.proju, x, e),
            change(probe.manifold.retr, x, probe.step * v),
        )
    )
    yield CheckResult.at_most(
        "pure", changes, 0.0, "projx, proju and retr leave their arguments alone"
    )


def _retraction_checks(probe: Probe) -> Iterator[CheckResult]:
    manifold, x, v = probe.manifold, probe.point, probe.tangent()
    yield CheckResult.at_most(
        "retraction_derivative",
        gap(velocity(lambda t: manifold.retr(x, t * v), probe.step), v),
        probe.derived,
        "d/dt retr(x, t v) = v at t = 0",
    )


def _point_checks(probe: Probe) -> Iterator[CheckResult]:
    manifold, x = probe.manifold, probe.point
    yield CheckResult.at_most(
        "point_on_manifold",
        gap(manifold.projx(x.clone()), x),
        math.sqrt(probe.eps),
        "the point of this check is on the manifold: projx(x) = x",
    )
    ambient = x + 0.1 * size(x) * probe.draw()
    nearest = manifold.projx(ambient)
    yield CheckResult.at_most(
        "projx_idempotent",
        gap(manifold.projx(nearest), nearest),
        probe.exact,
        "projx(projx(y)) = projx(y)",
    )
    devices = [] if x.device.type == "cpu" else [x.device]
    with torch.random.fork_rng(devices):
        if probe.generator is not None:
            torch.manual_seed(probe.generator.initial_seed())
        try:
            sample = manifold.random(*x.shape, dtype=x.dtype, device=x.device)
        except NotImplementedError:
            return
    yield CheckResult.at_most(
        "random_on_manifold",
        gap(manifold.projx(sample), sample),
        probe.exact,
        "random gives points on the manifold",
    )


def _geodesic_checks(probe: Probe) -> Iterator[CheckResult]:
    manifold, x = probe.manifold, probe.point
    u = 0.3 * probe.tangent()
    if not has(manifold.expmap, x, u):
        return
    end = manifold.expmap(x, u)
    yield CheckResult.at_most(
        "expmap_derivative",
        gap(velocity(lambda t: manifold.expmap(x, t * u), probe.step), u),
        probe.derived,
        "d/dt expmap(x, t u) = u at t = 0",
    )
    if probe.eps < 1e-12:
        yield CheckResult.at_most(
            "expmap_geodesic",
            abs(
                _energy_slope(
                    probe, lambda t: manifold.expmap(x, t * u), probe.tangent()
                )
            ),
            1e-6,
            "expmap(x, t u) has stationary energy among curves with the same ends",
        )
    if has(manifold.dist, x, end):
        parts = manifold.dist(x, end, keepdim=True)
        yield CheckResult.at_most(
            "distance",
            abs(size(parts) - probe.norm(u)),
            100.0 * math.sqrt(probe.eps),
            "dist(x, expmap(x, u)) = |u| for short u",
        )


_LAWS: dict[str, Callable[[Probe], Iterator[CheckResult]]] = {
    "the Riesz map": _riesz_checks,
    "the inner product": _metric_checks,
    "the projections": _projection_checks,
    "the retraction": _retraction_checks,
    "points": _point_checks,
    "geodesics": _geodesic_checks,
}


def check_base_manifold(
    manifold: geoopt.Manifold,
    point: Tensor,
    *,
    generator: torch.Generator | None = None,
) -> list[CheckResult]:
    """Measure whether a manifold can carry a layer metric, with random vectors.

    The findings are named ``riesz``, ``riesz_tangent``, ``riesz_linear``,
    ``riesz_normal``, ``riesz_pure``; ``metric_symmetric``, ``metric_positive``;
    ``projection_idempotent``, ``projection_tangent``, ``projection_complete``;
    ``pure``; ``retraction_derivative``; ``point_on_manifold``, ``projx_idempotent``,
    ``random_on_manifold``; ``expmap_derivative``, ``expmap_geodesic``, ``distance``.
    What a manifold does not implement (``random``, ``expmap``, ``dist``) is left out of
    the list, and so is ``expmap_geodesic`` below float64. Where a method raises, a
    finding named ``raised`` takes the place of what is left of its group.

    Args:
        manifold: the manifold under test.
        point: a point on it, ``(*batch, *shape)``, well inside its domain; the inner
            product is summed over everything that is left.
        generator: source of the random vectors, on the device of ``point``.

    Returns:
        The findings. Cost: 4 p calls of ``projx`` for p entries.

    >>> generator = torch.Generator().manual_seed(0)
    >>> point = torch.eye(3, dtype=torch.float64)[0]
    >>> results = check_base_manifold(geoopt.Sphere(), point, generator=generator)
    >>> all(result.passed for result in results)
    True
    """
    x = point.detach().as_subclass(Tensor)
    probe = Probe(manifold, x, generator)
    with torch.no_grad():
        return [
            result
            for words, laws in _LAWS.items()
            for result in guarded(words, partial(laws, probe))
        ]
