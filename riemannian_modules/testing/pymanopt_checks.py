"""The interface of a pymanopt manifold, measured at random points.

Tolerances: 200 eps for identities, 1e-7 for first derivatives and for what loses
half of the digits; fitted slopes may fall short by 0.25.
"""

import copy
import math
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from riemannian_modules.testing.pymanopt_laws import (
    distance_laws,
    step_laws,
    transport_laws,
)
from riemannian_modules.testing.pymanopt_probe import (
    EXACT,
    LOOSE,
    SLACK,
    Cost,
    Place,
    Point,
    apart,
    arrays,
    flat,
    order_of,
)
from riemannian_modules.testing.result import CheckResult, measured

__all__ = ["check_pymanopt_manifold"]


def _metric_laws(case: Place) -> Iterator[CheckResult]:
    manifold, x, u, v, w = case.manifold, case.x, case.u, case.v, case.w

    def nonlinear() -> float:
        both = case.inner(u * 2.0 - v, w)
        return abs(both - (2.0 * case.inner(u, w) - case.inner(v, w)))

    yield measured(
        "inner_symmetric",
        lambda: abs(case.inner(u, v) - case.inner(v, u)),
        EXACT,
        "<u, v> = <v, u>",
    )
    yield measured("inner_linear", nonlinear, 10.0 * EXACT, "<u, v> is linear in u")
    yield measured(
        "inner_positive", lambda: case.inner(u, u), EXACT, "<u, u> > 0", at_least=True
    )
    yield measured(
        "norm",
        lambda: abs(float(manifold.norm(x, u * 3.0)) ** 2 - 9.0 * case.inner(u, u)),
        10.0 * EXACT,
        "norm(u)^2 = <u, u>",
    )
    yield measured(
        "zero_vector",
        lambda: float(manifold.norm(x, manifold.zero_vector(x))),
        0.0,
        "the zero vector has no length",
    )
    yield measured(
        "dim",
        lambda: isinstance(manifold.dim, int | np.integer) and bool(manifold.dim >= 0),
        0.0,
        "dim is an integer, not negative",
    )


def _projection_laws(case: Place) -> Iterator[CheckResult]:
    manifold, x, u = case.manifold, case.x, case.u
    ambient = case.cost.gradient(x)
    if case.has("projection", x, ambient):

        def again() -> float:
            once = manifold.projection(x, ambient)
            # In some layouts tangent vectors are no ambient ones.
            twice = manifold.projection(x, manifold.embedding(x, once))
            return apart(twice, once, float(np.linalg.norm(flat(ambient))))

        yield measured(
            "projection_idempotent", again, EXACT, "projecting twice is projecting once"
        )
        yield measured(
            "projection_complete",
            lambda: apart(manifold.projection(x, manifold.embedding(x, u)), u),
            10.0 * EXACT,
            "projection leaves tangent vectors alone",
        )
    if case.has("to_tangent_space", x, u):
        yield measured(
            "random_tangent",
            lambda: case.tangent_gap(x, u),
            10.0 * EXACT,
            "random tangent vectors are tangent",
        )


def _cost_laws(case: Place) -> Iterator[CheckResult]:
    manifold, x, v = case.manifold, case.x, case.v
    ambient = case.cost.gradient(x)
    if not case.has("euclidean_to_riemannian_gradient", x, ambient):
        return
    start = case.cost.value(x)

    def along() -> float:
        pairing = np.dot(flat(ambient), flat(manifold.embedding(x, v)))
        size = max(1.0, float(np.linalg.norm(flat(ambient))))
        return abs(case.inner(case.gradient, v) - float(pairing)) / size

    def gradient_order(step: Callable[[float], Point]) -> float:
        slope = case.inner(case.gradient, v)
        return order_of(
            lambda t: abs(case.cost.value(step(t)) - start - t * slope),
            max(1.0, abs(start)),
        )

    yield measured(
        "riesz", along, 10.0 * EXACT, "<grad f, v> = <Euclidean gradient, v>"
    )
    yield measured(
        "gradient_slope",
        lambda: gradient_order(case.move),
        2.0 - SLACK,
        "f(R(t v)) = f(x) + t <grad f, v> + O(t^2)",
        at_least=True,
    )
    if case.has("to_tangent_space", x, case.u):
        yield measured(
            "gradient_tangent",
            lambda: case.tangent_gap(x, case.gradient),
            10.0 * EXACT,
            "the gradient is tangent",
        )
    arguments = (x, ambient, case.cost.hessian(x, manifold.embedding(x, v)), v)
    if case.has("euclidean_to_riemannian_hessian", *arguments):
        yield from _hessian_laws(case, start)


def _hessian_laws(case: Place, start: float) -> Iterator[CheckResult]:
    manifold, x, u, v = case.manifold, case.x, case.u, case.v

    def size() -> float:
        return max(1.0, float(manifold.norm(x, case.hessian(v))))

    def lopsided() -> float:
        there, back = case.inner(case.hessian(u), v), case.inner(u, case.hessian(v))
        return abs(there - back) / size()

    def nonlinear() -> float:
        both = case.hessian(u * 2.0 - v)
        return apart(both, case.hessian(u) * 2.0 - case.hessian(v), size())

    yield measured(
        "hessian_symmetric",
        lopsided,
        LOOSE,
        "<Hess u, v> = <u, Hess v>",
    )
    yield measured("hessian_linear", nonlinear, LOOSE, "the Hessian is linear")
    if case.has("to_tangent_space", x, u):
        yield measured(
            "hessian_tangent",
            lambda: case.tangent_gap(x, case.hessian(v)),
            LOOSE,
            "the Hessian of a tangent vector is tangent",
        )
    if case.has("exp", x, v):

        def order() -> float:
            slope = case.inner(case.gradient, v)
            bend = 0.5 * case.inner(case.hessian(v), v)

            def error(t: float) -> float:
                value = case.cost.value(manifold.exp(x, v * t))
                return abs(value - start - t * slope - t * t * bend)

            return order_of(error, max(1.0, abs(start)))

        yield measured(
            "hessian_slope",
            order,
            3.0 - SLACK,
            "f(exp(t v)) = f(x) + t <grad f, v> + t^2 <Hess v, v> / 2 + O(t^3)",
            at_least=True,
        )


def _pure_laws(case: Place) -> Iterator[CheckResult]:
    manifold = case.manifold
    x, v, e = case.x, case.v, case.cost.gradient(case.x)
    calls = {
        "retraction": (x, v),
        "exp": (x, v),
        "projection": (x, e),
        "euclidean_to_riemannian_gradient": (x, e),
        "inner_product": (x, v, v),
    }

    def change() -> float:
        worst = 0.0
        for name, arguments in calls.items():
            if case.has(name, *copy.deepcopy(arguments)):
                before = copy.deepcopy(arguments)
                getattr(manifold, name)(*arguments)
                pairs = zip(before, arguments, strict=True)
                worst = max(worst, *(apart(a, b) for a, b in pairs))
        return worst

    yield measured("pure", change, 0.0, "methods leave their arguments alone")

    def finite() -> bool:
        found = arrays(manifold.random_point())
        return all(bool(np.isfinite(each).all()) for each in found)

    yield measured("random_point", finite, 0.0, "random points are finite")
    if case.has("__getattribute__", "typical_dist"):
        yield measured(
            "typical_dist",
            lambda: 0.0 < float(manifold.typical_dist) < math.inf,
            0.0,
            "typical_dist is positive",
        )


def check_pymanopt_manifold(
    manifold: Any,
    *,
    cost: Cost | None = None,
    skip: Collection[str] = (),
    seed: int = 0,
) -> list[CheckResult]:
    """Measure whether a manifold keeps the interface of pymanopt's ``Manifold``.

    The findings are named ``inner_symmetric``, ``inner_linear``, ``inner_positive``,
    ``norm``, ``zero_vector``, ``dim``; ``projection_idempotent``,
    ``projection_complete``, ``random_tangent``; ``riesz``, ``gradient_slope`` (2),
    ``gradient_tangent``, ``hessian_symmetric``, ``hessian_linear``,
    ``hessian_tangent``, ``hessian_slope`` (3, along ``exp``); ``retraction_zero``,
    ``retraction_derivative``, ``retraction_order``, ``exp_zero``, ``exp_derivative``;
    ``log_inverse``, ``dist``, ``dist_symmetric``, ``dist_zero``, ``pair_mean``;
    ``transport_linear``, ``transport_identity``, ``transport_continuous``,
    ``transport_tangent``; ``pure``, ``random_point``, ``typical_dist``. What a manifold
    does not implement is left out; points that are no single array are not compared
    with vectors.

    Args:
        manifold: any pymanopt manifold. pymanopt is not needed to import this function.
        cost: a cost with Euclidean derivatives; needed on quotient manifolds (where it
            must not depend on the representative) and where the ambient space has
            another layout than the points. None: a quadratic one.
        skip: names of findings to leave out.
        seed: pymanopt draws from numpy's global state; it is set, and restored after.

    Returns:
        The findings.

    >>> pymanopt = __import__("pytest").importorskip("pymanopt")
    >>> findings = check_pymanopt_manifold(pymanopt.manifolds.Sphere(4))
    >>> len(findings) > 25, [str(f) for f in findings if not f.passed]
    (True, [])
    """
    before = np.random.get_state()  # noqa: NPY002
    np.random.seed(seed % 2**32)  # noqa: NPY002
    try:
        case = Place(manifold, cost, seed)
        results = [
            *_metric_laws(case),
            *_projection_laws(case),
            *_cost_laws(case),
            *step_laws(case),
            *distance_laws(case),
            *transport_laws(case),
            *_pure_laws(case),
        ]
    finally:
        np.random.set_state(before)  # noqa: NPY002
    return [result for result in results if result.name not in set(skip)]
