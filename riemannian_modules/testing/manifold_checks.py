"""The contract of a base manifold, and of a retraction, measured at one point.

The first derivative of ``projx`` is a tangent projection that owes nothing to
``proju`` or ``egrad2rgrad``; the energy of a curve knows the geodesics from ``inner``
alone. With these two the methods of a manifold are checked against each other.

Tolerances, for rounding unit eps relative to the size of what is compared:

- exact identities: 200 eps, times the condition of the metric where it enters;
- first derivatives by central differences (step eps^(1/3)): 1000 eps^(2/3);
- the distance, which geoopt clamps near 0 and 1: 100 sqrt(eps);
- the energy of a geodesic (float64 only): 1e-8.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import geoopt
import torch
from torch import Tensor

from riemannian_modules.retractions import Retraction
from riemannian_modules.testing.result import CheckResult
from riemannian_modules.testing.slopes import error_slope

__all__ = ["check_base_manifold", "check_retraction"]

Curve = Callable[[float], Tensor]


def _pairing(e: Tensor, v: Tensor) -> Tensor:
    return (e.conj() * v).real.sum()


def _size(u: Tensor) -> float:
    return float(torch.linalg.vector_norm(u))


def _gap(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    """Return ``|a - b|`` relative to ``scale``, by default the larger of the two."""
    scale = max(_size(a), _size(b)) if scale is None else scale
    distance = _size(a - b)
    return distance / scale if scale > 0.0 else distance


def _velocity(curve: Curve, h: float) -> Tensor:
    """Return the derivative of a curve at 0 by central differences of order 4."""
    near, far = curve(h) - curve(-h), curve(2.0 * h) - curve(-2.0 * h)
    return (8.0 * near - far) / (12.0 * h)


@dataclass(frozen=True)
class _Probe:
    """A manifold at one point, with random vectors and derivatives."""

    manifold: geoopt.Manifold
    point: Tensor
    generator: torch.Generator | None

    @property
    def eps(self) -> float:
        return torch.finfo(self.point.dtype).eps

    @property
    def exact(self) -> float:
        return 200.0 * self.eps

    @property
    def derived(self) -> float:
        return 1000.0 * self.eps ** (2.0 / 3.0)

    @property
    def step(self) -> float:
        return self.eps ** (1.0 / 3.0)

    def draw(self) -> Tensor:
        """Return a random ambient vector of norm 1."""
        sample = torch.randn(
            self.point.shape,
            dtype=self.point.dtype,
            device=self.point.device,
            generator=self.generator,
        )
        return sample / torch.linalg.vector_norm(sample)

    def project(self, u: Tensor) -> Tensor:
        projected: Tensor = self.manifold.proju(self.point, u.clone())
        return projected

    def riesz(self, e: Tensor) -> Tensor:
        vector: Tensor = self.manifold.egrad2rgrad(self.point, e.clone())
        return vector

    def inner(self, u: Tensor, v: Tensor, point: Tensor | None = None) -> Tensor:
        """Return g0(u, v), summed over the parts that geoopt reports one by one."""
        at = self.point if point is None else point
        # Without keepdim the Poincare ball broadcasts a batch against itself.
        return torch.real(self.manifold.inner(at, u, v, keepdim=True)).sum()

    def norm(self, u: Tensor) -> float:
        return math.sqrt(max(0.0, float(self.inner(u, u))))

    def tangent(self) -> Tensor:
        """Return a random tangent vector of metric norm 1 (0 if there is none)."""
        v = self.project(self.draw())
        norm = self.norm(v)
        return v / norm if norm > 0.0 else v

    def tangent_part(self, u: Tensor) -> Tensor:
        """Return the derivative of ``projx`` at the point in the direction u."""
        return _velocity(lambda t: self.manifold.projx(self.point + t * u), self.step)

    @cached_property
    def tangent_matrix(self) -> Tensor:
        """The derivative of ``projx`` as a real matrix, ``(p, p)``."""
        real = torch.view_as_real if self.point.is_complex() else torch.clone
        columns = []
        for unit in _units(self.point):
            columns.append(real(self.tangent_part(unit)).reshape(-1))
        return torch.stack(columns, dim=-1)

    def normal_covector(self) -> Tensor:
        """Return a random covector that vanishes on tangent vectors."""
        e = self.draw()
        flat = (torch.view_as_real(e) if e.is_complex() else e).reshape(-1)
        rest = flat - self.tangent_matrix.mT @ flat
        if e.is_complex():
            return torch.view_as_complex(rest.reshape(*e.shape, 2))
        return rest.view_as(e)


def _units(x: Tensor) -> Iterator[Tensor]:
    factors = (1.0, 1.0j) if x.is_complex() else (1.0,)
    for index in range(x.numel()):
        for factor in factors:
            unit = torch.zeros(x.numel(), dtype=x.dtype, device=x.device)
            unit[index] = factor
            yield unit.view_as(x)


def _change(function: Callable[..., Tensor], *arguments: Tensor) -> float:
    """Return how much a call changes its arguments."""
    copies = [argument.clone() for argument in arguments]
    function(*copies)
    return max(
        _size(copy - argument) for copy, argument in zip(copies, arguments, strict=True)
    )


def _has(method: Callable[..., object], *arguments: Tensor) -> bool:
    try:
        method(*arguments)
    except NotImplementedError:
        return False
    return True


def _energy_slope(probe: _Probe, curve: Curve, bend: Tensor) -> float:
    """Return the derivative of the energy of a curve, bent inside its ends."""
    manifold = probe.manifold
    # Legendre nodes on (0, 1), from the symmetric tridiagonal matrix of Golub & Welsch.
    k = torch.arange(1, 10, dtype=torch.float64)
    off = k / (4.0 * k * k - 1.0).sqrt()
    nodes, vectors = torch.linalg.eigh(torch.diag(off, 1) + torch.diag(off, -1))
    weights = vectors[0].square()

    def energy(amount: float) -> Tensor:
        total = nodes.new_zeros(())
        for node, weight in zip((0.5 * (nodes + 1.0)).tolist(), weights, strict=True):

            def bent(dt: float, node: float = node) -> Tensor:
                t = node + dt
                base, bump = curve(t), (t * (1.0 - t)) ** 2
                direction = manifold.proju(base, bend)
                moved: Tensor = manifold.projx(base + amount * bump * direction)
                return moved

            here, velocity = bent(0.0), _velocity(bent, 1e-3)
            total += 0.5 * weight * probe.inner(velocity, velocity, here).cpu()
        return total

    return float(_velocity(energy, 3e-3))


def _riesz_checks(probe: _Probe) -> Iterator[CheckResult]:
    e, f, v = probe.draw(), probe.draw(), probe.tangent()
    sharp = probe.riesz(e)
    scale = max(probe.norm(sharp), _size(e) * _size(v))
    yield CheckResult.at_most(
        "riesz",
        abs(float(probe.inner(sharp, v) - _pairing(e, v))) / max(scale, probe.eps),
        probe.exact,
        "inner(x, egrad2rgrad(x, e), v) = <e, v> for tangent v",
    )
    yield CheckResult.at_most(
        "riesz_tangent",
        _gap(probe.tangent_part(sharp), sharp),
        probe.derived,
        "egrad2rgrad has tangent values",
    )
    sharp_f = probe.riesz(f)
    yield CheckResult.at_most(
        "riesz_linear",
        _gap(
            probe.riesz(2.0 * e - f),
            2.0 * sharp - sharp_f,
            _size(sharp) + _size(sharp_f),
        ),
        probe.exact,
        "egrad2rgrad is linear in the covector",
    )
    yield CheckResult.at_most(
        "riesz_normal",
        _size(probe.riesz(probe.normal_covector())) / max(_size(sharp), probe.eps),
        probe.derived,
        "egrad2rgrad kills covectors that vanish on tangent vectors",
    )
    yield CheckResult.at_most(
        "riesz_pure",
        _change(probe.manifold.egrad2rgrad, probe.point, e),
        0.0,
        "egrad2rgrad leaves its arguments alone",
    )


def _metric_checks(probe: _Probe) -> Iterator[CheckResult]:
    u, v = probe.tangent(), probe.tangent()
    yield CheckResult.at_most(
        "metric_symmetric",
        abs(float(probe.inner(u, v) - probe.inner(v, u))),
        probe.exact,
        "inner(x, u, v) = inner(x, v, u)",
    )
    w = probe.project(probe.draw())
    yield CheckResult.at_least(
        "metric_positive",
        float(probe.inner(w, w)) / max(_size(w) ** 2, probe.eps**2),
        probe.eps,
        "inner(x, u, u) > 0 for tangent u",
    )


def _projection_checks(probe: _Probe) -> Iterator[CheckResult]:
    e = probe.draw()
    v = probe.project(e)
    yield CheckResult.at_most(
        "projection_idempotent",
        _gap(probe.project(v), v),
        probe.exact,
        "proju(x, proju(x, u)) = proju(x, u)",
    )
    yield CheckResult.at_most(
        "projection_tangent",
        _gap(probe.tangent_part(v), v),
        probe.derived,
        "proju has tangent values",
    )
    w = probe.tangent_part(e)
    yield CheckResult.at_most(
        "projection_complete",
        _gap(probe.project(w), w),
        probe.derived,
        "proju leaves tangent vectors alone",
    )
    x = probe.point
    changes = (
        _change(probe.manifold.projx, x),
        _change(probe.manifold.proju, x, e),
        _change(probe.manifold.retr, x, probe.step * v),
    )
    yield CheckResult.at_most(
        "pure", max(changes), 0.0, "projx, proju and retr leave their arguments alone"
    )


def _point_checks(probe: _Probe) -> Iterator[CheckResult]:
    manifold, x = probe.manifold, probe.point
    yield CheckResult.at_most(
        "point_on_manifold",
        _gap(manifold.projx(x.clone()), x),
        math.sqrt(probe.eps),
        "the point of this check is on the manifold: projx(x) = x",
    )
    ambient = x + 0.1 * _size(x) * probe.draw()
    nearest = manifold.projx(ambient)
    yield CheckResult.at_most(
        "projx_idempotent",
        _gap(manifold.projx(nearest), nearest),
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
        _gap(manifold.projx(sample), sample),
        probe.exact,
        "random gives points on the manifold",
    )


def _geodesic_checks(probe: _Probe) -> Iterator[CheckResult]:
    manifold, x = probe.manifold, probe.point
    u = 0.3 * probe.tangent()
    if not _has(manifold.expmap, x, u):
        return
    end = manifold.expmap(x, u)
    yield CheckResult.at_most(
        "expmap_derivative",
        _gap(_velocity(lambda t: manifold.expmap(x, t * u), probe.step), u),
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
            1e-8,
            "expmap(x, t u) has stationary energy among curves with the same ends",
        )
    if _has(manifold.dist, x, end):
        parts = manifold.dist(x, end, keepdim=True)
        yield CheckResult.at_most(
            "distance",
            abs(_size(parts) - probe.norm(u)),
            100.0 * math.sqrt(probe.eps),
            "dist(x, expmap(x, u)) = |u| for short u",
        )


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
    the list, and so is ``expmap_geodesic`` below float64.

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
    probe = _Probe(manifold, x, generator)
    with torch.no_grad():
        v = probe.tangent()
        results = [
            *_riesz_checks(probe),
            *_metric_checks(probe),
            *_projection_checks(probe),
            CheckResult.at_most(
                "retraction_derivative",
                _gap(_velocity(lambda t: manifold.retr(x, t * v), probe.step), v),
                probe.derived,
                "d/dt retr(x, t v) = v at t = 0",
            ),
            *_point_checks(probe),
            *_geodesic_checks(probe),
        ]
    return results


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
    is that of the distance to ``expmap``, so it is left out on a manifold without one;
    whether ``expmap`` itself can be trusted is a finding of
    :func:`check_base_manifold`.

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
    x = point.detach().as_subclass(Tensor)
    probe = _Probe(manifold, x, generator)
    with torch.no_grad():
        u = probe.tangent()

        def move(t: float) -> Tensor:
            return retraction(manifold, x, t * u)

        far = move(0.5)
        results = [
            CheckResult.at_most(
                "retraction_zero", _gap(move(0.0), x), probe.exact, "R(x, 0) = x"
            ),
            CheckResult.at_most(
                "retraction_on_manifold",
                _gap(manifold.projx(far), far),
                probe.exact,
                "R(x, u) is on the manifold",
            ),
            CheckResult.at_most(
                "retraction_derivative",
                _gap(_velocity(move, probe.step), u),
                probe.derived,
                "d/dt R(x, t u) = u at t = 0",
            ),
            CheckResult.at_most(
                "retraction_pure",
                _change(lambda p, v: retraction(manifold, p, v), x, 0.5 * u),
                0.0,
                "R leaves its arguments alone",
            ),
        ]
        if _has(manifold.expmap, x, u):
            order = retraction.order(manifold)
            slope = error_slope(
                lambda t: torch.linalg.vector_norm(move(t) - manifold.expmap(x, t * u)),
                x.dtype,
                scale=_size(x),
            )
            slack = 0.25 if probe.eps < 1e-12 else 0.5
            results.append(
                CheckResult.at_least(
                    "retraction_order",
                    slope.value,
                    order + 1.0 - slack,
                    f"|R(x, t u) - Exp(x, t u)| = O(t^{order + 1})",
                )
            )
    return results
