"""Points, tangent vectors and a cost for checks of pymanopt's manifolds.

Points and vectors of pymanopt are arrays, or nested sequences of them. Here they are
compared as one long real vector.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from riemannian_modules.testing.slopes import error_slope

__all__ = [
    "EXACT",
    "LOOSE",
    "SLACK",
    "Cost",
    "Place",
    "apart",
    "arrays",
    "flat",
    "order_of",
    "quadratic",
    "rebuilt",
]

EXACT = 200.0 * float(np.finfo(np.float64).eps)
LOOSE = 1e-7
SLACK = 0.25

Array = NDArray[Any]
Point = Any


def arrays(value: Point) -> list[Array]:
    """Return the arrays of a point or vector, in their order."""
    if isinstance(value, list | tuple):
        return [each for part in value for each in arrays(part)]
    return [np.asarray(value)]


def flat(value: Point) -> Array:
    """Return a point or vector as one real vector."""
    parts = [np.atleast_1d(each).reshape(-1) for each in arrays(value)]
    whole = np.concatenate(parts)
    return np.concatenate([whole.real, whole.imag]) if np.iscomplexobj(whole) else whole


def apart(a: Point, b: Point, scale: float | None = None) -> float:
    """Return ``|a - b|`` relative to ``scale``, by default the larger of the two."""
    one, two = flat(a), flat(b)
    if one.shape != two.shape:
        return float("inf")
    sizes = max(float(np.linalg.norm(one)), float(np.linalg.norm(two)))
    size = sizes if scale is None else scale
    gap = float(np.linalg.norm(one - two))
    return gap / size if size > 0.0 else gap


def rebuilt(like: Point, parts: Sequence[Array]) -> Point:
    """Return arrays in the layout of a point."""
    waiting = iter(parts)

    def build(value: Point) -> Point:
        if isinstance(value, list | tuple):
            return [build(each) for each in value]
        return next(waiting)

    return build(like)


def order_of(error: Callable[[float], float], scale: float = 1.0) -> float:
    """Return the order at which ``error(t)`` vanishes as t goes to 0."""

    def measured(t: float) -> torch.Tensor:
        return torch.tensor(error(t), dtype=torch.float64)

    return error_slope(measured, torch.float64, scale=scale).value


@dataclass(frozen=True)
class Cost:
    """A cost on the ambient space, with its derivatives there.

    On a quotient manifold it must not depend on the representative.

    Attributes:
        value: of a point.
        gradient: Euclidean gradient at a point.
        hessian: Euclidean Hessian at a point times an ambient vector.
    """

    value: Callable[[Point], float]
    gradient: Callable[[Point], Point]
    hessian: Callable[[Point, Point], Point]


def quadratic(point: Point, random: np.random.Generator) -> Cost:
    """Return a quadratic cost with one weight for each row.

    ``f(x) = Re <c, x> + sum_i a_i |x_i|^2 / 2``.

    Args:
        point: a point, for the layout.
        random: source of the coefficients.
    """
    parts = arrays(point)

    def normal(part: Array) -> Array:
        drawn = random.standard_normal(part.shape)
        imaginary = random.standard_normal(part.shape)
        return drawn + 1j * imaginary if np.iscomplexobj(part) else drawn

    centers = [normal(part) for part in parts]
    weights = [
        random.random(part.shape[:1]).reshape(-1, *[1] * (part.ndim - 1))
        if part.ndim
        else random.random()
        for part in parts
    ]

    def value(x: Point) -> float:
        return float(
            sum(
                np.sum(np.real(np.conj(c) * z) + 0.5 * w * np.abs(z) ** 2)
                for c, w, z in zip(centers, weights, arrays(x), strict=True)
            )
        )

    def gradient(x: Point) -> Point:
        found = zip(centers, weights, arrays(x), strict=True)
        return rebuilt(x, [c + w * z for c, w, z in found])

    def hessian(x: Point, u: Point) -> Point:
        return rebuilt(x, [w * z for w, z in zip(weights, arrays(u), strict=True)])

    return Cost(value, gradient, hessian)


class Place:
    """A manifold, two points, and vectors of length 1 at the first."""

    def __init__(self, manifold: Any, cost: Cost | None, seed: int) -> None:
        self.manifold = manifold
        random = np.random.default_rng(seed)
        self.x = manifold.random_point()
        self.u, self.v, self.w = (self._unit(self.x) for _ in range(3))
        self.cost = quadratic(self.x, random) if cost is None else cost

    def _unit(self, x: Point) -> Point:
        vector = self.manifold.random_tangent_vector(x)
        return vector * (1.0 / self.manifold.norm(x, vector))

    def has(self, name: str, *arguments: Any) -> bool:
        """Return whether the manifold implements a method.

        It does if it fails in another way, which is then a finding of the law.
        """
        try:
            getattr(self.manifold, name)(*copy.deepcopy(arguments))
        except NotImplementedError:
            return False
        except Exception:
            return True
        return True

    def inner(self, a: Point, b: Point, x: Point | None = None) -> float:
        """Return the inner product."""
        at = self.x if x is None else x
        return float(np.real(self.manifold.inner_product(at, a, b)))

    def move(self, t: float, u: Point | None = None) -> Point:
        """Return where the retraction leads."""
        return self.manifold.retraction(self.x, (self.v if u is None else u) * t)

    def tangent_gap(self, x: Point, u: Point) -> float:
        """Return how far a vector is from being tangent, by ``to_tangent_space``."""
        same = self.manifold.to_tangent_space(x, copy.deepcopy(u))
        return apart(same, u)

    @cached_property
    def gradient(self) -> Point:
        """The Riemannian gradient of the cost."""
        euclidean = self.cost.gradient(self.x)
        return self.manifold.euclidean_to_riemannian_gradient(self.x, euclidean)

    def hessian(self, u: Point) -> Point:
        """Return the Riemannian Hessian of the cost times ``u``."""
        ambient = self.cost.hessian(self.x, self.manifold.embedding(self.x, u))
        return self.manifold.euclidean_to_riemannian_hessian(
            self.x, self.cost.gradient(self.x), ambient, u
        )
