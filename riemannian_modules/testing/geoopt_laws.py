"""What geoopt's interface promises besides the contract of a base manifold.

Transports, distances and costs. Each function yields findings of one kind, at one
point of the manifold (a :class:`Place`).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import geoopt
import torch
from torch import Tensor

from riemannian_modules.testing.probe import (
    Probe,
    change,
    gap,
    has,
    pairing,
    size,
    velocity,
)
from riemannian_modules.testing.result import CheckResult, measured
from riemannian_modules.testing.slopes import error_slope

__all__ = ["Place", "cost_laws", "distance_laws", "transport_laws"]


@dataclass(frozen=True)
class Place:
    """One point of a manifold, a short step and where it leads."""

    probe: Probe

    @property
    def manifold(self) -> geoopt.Manifold:
        """The manifold under test."""
        return self.probe.manifold

    @property
    def x(self) -> Tensor:
        """The point."""
        return self.probe.point

    @cached_property
    def u(self) -> Tensor:
        """A tangent vector of length 0.3."""
        return 0.3 * self.probe.tangent()

    @cached_property
    def v(self) -> Tensor:
        """Another tangent vector, of length 1."""
        return self.probe.tangent()

    @cached_property
    def y(self) -> Tensor:
        """Where the retraction leads along ``u``."""
        end: Tensor = self.manifold.retr(self.x, self.u.clone())
        return end

    @property
    def slack(self) -> float:
        """How far a fitted slope may fall short."""
        return 0.25 if self.probe.eps < 1e-12 else 0.5

    @property
    def loose(self) -> float:
        """The tolerance of what loses half of the digits."""
        return 100.0 * math.sqrt(self.probe.eps)

    def tangent_gap(self, y: Tensor, w: Tensor) -> float:
        """Return how far a transport ``w`` of ``v`` is from being tangent at ``y``."""
        longest = max(size(w), size(self.v))
        return gap(self.manifold.proju(y, w.clone()), w, longest)


def transport_laws(place: Place) -> Iterator[CheckResult]:
    """Yield the laws of transports, as far as the manifold has them.

    Args:
        place: where to look.

    Yields:
        The findings.
    """
    manifold, x, y, u, v = place.manifold, place.x, place.y, place.u, place.v
    exact, transp = place.probe.exact, manifold.transp
    if not has(transp, x, y, v):
        return
    w = place.probe.tangent()

    def nonlinear() -> float:
        moved, other = transp(x, y, v), transp(x, y, w)
        both = transp(x, y, 2.0 * v - w)
        return gap(both, 2.0 * moved - other, size(moved) + size(other))

    def order() -> float:
        def error(t: float) -> Tensor:
            return torch.linalg.vector_norm(transp(x, manifold.retr(x, t * u), v) - v)

        return error_slope(error, x.dtype, scale=size(v)).value

    yield measured(
        "transp_tangent",
        lambda: place.tangent_gap(y, transp(x, y, v)),
        10.0 * exact,  # y is computed, too
        "transp(x, y, v) is tangent at y",
    )
    yield measured("transp_linear", nonlinear, exact, "transp is linear in the vector")
    yield measured(
        "transp_identity",
        lambda: gap(transp(x, x, v), v),
        place.loose,
        "transp(x, x, v) = v",
    )
    yield measured(
        "transp_continuous",
        order,
        1.0 - place.slack,
        "transp(x, retr(x, t u), v) - v = O(t)",
        at_least=True,
    )
    yield measured(
        "transp_pure",
        lambda: change(transp, x, y, v),
        0.0,
        "transp leaves its arguments alone",
    )
    yield from _combined(place, manifold.retr, "retr")
    if has(manifold.expmap, x, u):
        yield from _combined(place, manifold.expmap, "expmap")


def _combined(
    place: Place, step: Callable[[Tensor, Tensor], Tensor], name: str
) -> Iterator[CheckResult]:
    manifold, probe = place.manifold, place.probe
    x, u, v = place.x, place.u, place.v
    together = getattr(manifold, f"{name}_transp")
    follow = getattr(manifold, f"transp_follow_{name}")

    yield measured(
        f"{name}_transp_point",
        lambda: gap(probe.identity(together(x, u, v)[0]), probe.identity(step(x, u))),
        probe.exact,
        f"{name}_transp(x, u, v) leads to {name}(x, u)",
    )
    yield measured(
        f"{name}_transp_tangent",
        lambda: place.tangent_gap(*together(x, u, v)),
        10.0 * probe.exact,
        f"{name}_transp(x, u, v) gives a vector that is tangent there",
    )
    yield measured(
        f"transp_follow_{name}",
        lambda: gap(follow(x, u, v), together(x, u, v)[1]),
        probe.exact,
        f"transp_follow_{name}(x, u, v) is the vector of {name}_transp(x, u, v)",
    )


def distance_laws(place: Place) -> Iterator[CheckResult]:
    """Yield the laws of distances and logarithms, as far as the manifold has them.

    Args:
        place: where to look.

    Yields:
        The findings.
    """
    manifold, x, probe = place.manifold, place.x, place.probe
    if not has(manifold.expmap, x, place.u):
        return
    y = manifold.expmap(x, place.u)

    def dist(a: Tensor, b: Tensor) -> Tensor:
        parts: Tensor = manifold.dist(a, b, keepdim=True)
        return parts

    measures = has(dist, x, y)
    if measures:
        yield measured(
            "dist_symmetric",
            lambda: gap(dist(y, x), dist(x, y)),
            place.loose,
            "dist(x, y) = dist(y, x)",
        )
        yield measured(
            "dist_zero",
            lambda: size(dist(x, x.clone())),
            place.loose,
            "dist(x, x) = 0",
        )
        yield measured(
            "dist2",
            lambda: gap(manifold.dist2(x, y, keepdim=True), dist(x, y).square()),
            probe.exact,
            "dist2 = dist^2",
        )
    if has(manifold.logmap, x, y):
        yield measured(
            "logmap_inverse",
            lambda: gap(manifold.logmap(x, y), place.u),
            place.loose,
            "logmap(x, expmap(x, u)) = u",
        )
        if measures:
            yield measured(
                "logmap_length",
                lambda: abs(probe.norm(manifold.logmap(x, y)) - size(dist(x, y))),
                place.loose,
                "|logmap(x, y)| = dist(x, y)",
            )


def cost_laws(place: Place) -> Iterator[CheckResult]:
    """Yield what holds for a smooth cost along retractions.

    The cost is quadratic in the tensor, on a quotient in its invariant.

    Args:
        place: where to look.

    Yields:
        The findings.
    """
    manifold, x, probe = place.manifold, place.x, place.probe
    z = probe.identity(x)

    def noise() -> Tensor:
        drawn = torch.randn(
            z.shape, dtype=z.dtype, device=z.device, generator=probe.generator
        )
        return drawn / math.sqrt(max(1, z.numel()))

    center, weight = noise(), noise().abs()

    def cost(y: Tensor) -> Tensor:
        image = probe.identity(y)
        return pairing(center, image) + 0.5 * pairing(weight * image, image)

    with torch.enable_grad():
        leaf = x.clone().requires_grad_()
        (covector,) = torch.autograd.grad(cost(leaf), leaf)
    gradient, start = probe.riesz(covector), float(cost(x))
    length = probe.norm(gradient)

    def order(u: Tensor, slope: float) -> float:
        def error(t: float) -> Tensor:
            return (cost(manifold.retr(x, t * u)) - start - t * slope).abs()

        return error_slope(error, x.dtype, scale=max(1.0, abs(start))).value

    def mistake() -> float:
        along = velocity(lambda t: cost(manifold.retr(x, t * place.v)), probe.step)
        found = abs(float(along) - float(probe.inner(gradient, place.v)))
        return found / max(1.0, length, size(covector))

    yield measured(
        "directional_derivative",
        mistake,
        probe.derived,
        "d/dt f(retr(x, t u)) = inner(x, grad f, u) at t = 0",
    )
    yield measured(
        "gradient_slope",
        lambda: order(place.v, float(probe.inner(gradient, place.v))),
        2.0 - place.slack,
        "f(retr(x, t u)) = f(x) + t inner(x, grad f, u) + O(t^2)",
        at_least=True,
    )
    if length > math.sqrt(probe.eps):
        yield measured(
            "descent_slope",
            lambda: order(gradient / -length, -length),
            2.0 - place.slack,
            "f(retr(x, -t grad f)) = f(x) - t |grad f|^2 + O(t^2)",
            at_least=True,
        )
