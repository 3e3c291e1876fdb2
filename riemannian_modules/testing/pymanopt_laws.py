"""What pymanopt's interface promises of steps, distances and transports."""

from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from riemannian_modules.testing.pymanopt_probe import (
    EXACT,
    LOOSE,
    SLACK,
    Place,
    Point,
    apart,
    flat,
    order_of,
)
from riemannian_modules.testing.result import CheckResult, measured

__all__ = ["distance_laws", "step_laws", "transport_laws"]


def _start_gap(step: Callable[[Point, Point], Point], x: Point, v: Point) -> float:
    return apart(step(x, v * 0.0), x)


def step_laws(case: Place) -> Iterator[CheckResult]:
    """Yield the laws of retractions and geodesics, as far as the manifold has them.

    Args:
        case: the manifold at a point.

    Yields:
        The findings.
    """
    manifold, x, v = case.manifold, case.x, case.v
    array = all(isinstance(each, np.ndarray) for each in (x, v))

    def velocity(step: Callable[[Point, Point], Point]) -> float:
        h = 1e-4
        near = (flat(step(x, v * h)) - flat(step(x, v * -h))) / (2.0 * h)
        return apart(near, manifold.embedding(x, v))

    for name in ("retraction", "exp"):
        if not case.has(name, x, v):
            continue
        step = getattr(manifold, name)
        yield measured(
            f"{name}_zero",
            partial(_start_gap, step, x, v),
            10.0 * EXACT,
            f"{name}(x, 0) = x",
        )
        if array:
            yield measured(
                f"{name}_derivative",
                partial(velocity, step),
                LOOSE,
                f"d/dt {name}(x, t v) = v at t = 0",
            )
    if case.has("exp", x, v) and case.has("retraction", x, v) and array:
        yield measured(
            "retraction_order",
            lambda: order_of(
                lambda t: apart(manifold.exp(x, v * t), case.move(t), 1.0)
            ),
            2.0 - SLACK,
            "|R(t v) - exp(t v)| = O(t^2)",
            at_least=True,
        )


def distance_laws(case: Place) -> Iterator[CheckResult]:
    """Yield the laws of distances and logarithms, as far as the manifold has them.

    Args:
        case: the manifold at a point.

    Yields:
        The findings.
    """
    manifold, x = case.manifold, case.x
    short = case.u * 0.2
    if not case.has("exp", x, short):
        return
    y = manifold.exp(x, short)
    if case.has("log", x, y):
        yield measured(
            "log_inverse",
            lambda: apart(manifold.log(x, y), short),
            LOOSE,
            "log(x, exp(x, u)) = u for short u",
        )
    if case.has("dist", x, y):
        yield measured(
            "dist",
            lambda: abs(float(manifold.dist(x, y)) - 0.2),
            LOOSE,
            "dist(x, exp(x, u)) = norm(u) for short u",
        )
        yield measured(
            "dist_symmetric",
            lambda: abs(float(manifold.dist(x, y)) - float(manifold.dist(y, x))),
            LOOSE,
            "dist(x, y) = dist(y, x)",
        )
        yield measured(
            "dist_zero", lambda: float(manifold.dist(x, x)), LOOSE, "dist(x, x) = 0"
        )
        if case.has("pair_mean", x, y):

            def uneven() -> float:
                middle = manifold.pair_mean(x, y)
                ways = [float(manifold.dist(middle, end)) for end in (x, y)]
                return max(abs(way - 0.1) for way in ways)

            yield measured(
                "pair_mean", uneven, LOOSE, "pair_mean(x, y) is half way from both"
            )


def transport_laws(case: Place) -> Iterator[CheckResult]:
    """Yield the laws of transports, as far as the manifold has them.

    Args:
        case: the manifold at a point.

    Yields:
        The findings.
    """
    manifold, x, u, v = case.manifold, case.x, case.u, case.v
    y = case.move(0.3)
    if not case.has("transport", x, y, u):
        return

    def nonlinear() -> float:
        both = manifold.transport(x, y, u * 2.0 - v)
        parts = manifold.transport(x, y, u) * 2.0 - manifold.transport(x, y, v)
        return apart(both, parts)

    yield measured("transport_linear", nonlinear, LOOSE, "transport is linear")
    yield measured(
        "transport_identity",
        lambda: apart(manifold.transport(x, x, u), u),
        LOOSE,
        "transport(x, x, u) = u",
    )
    yield measured(
        "transport_continuous",
        lambda: order_of(lambda t: apart(manifold.transport(x, case.move(t), u), u)),
        1.0 - SLACK,
        "transport(x, R(t v), u) - u = O(t)",
        at_least=True,
    )
    if case.has("to_tangent_space", y, manifold.transport(x, y, u)):
        yield measured(
            "transport_tangent",
            lambda: case.tangent_gap(y, manifold.transport(x, y, u)),
            LOOSE,
            "transport(x, y, u) is tangent at y",
        )
