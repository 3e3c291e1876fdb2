"""Conjugate gradients for the proximal problem of a step, on tangent spaces."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.optim.joint_map import JointMap
from riemannian_modules.optim.output_map import OutputMap
from riemannian_modules.precision import wide_dot
from riemannian_modules.tangent import TangentSpace

__all__ = ["Proximal", "Truncated"]

Vectors = dict[str, Tensor]

# What a step costs besides its iterations, in iterations: the gradient, the
# preconditioner, the warm start and the trial.
_OVERHEAD = 3.0


@dataclass(frozen=True)
class Truncated:
    """What conjugate gradients found.

    Attributes:
        vectors: the step.
        decrease: by how much the quadratic model falls, without the mass.
        iterations: how many there were.
        stiffness: largest ratio of curvature and mass that was met.
    """

    vectors: Vectors
    decrease: float
    iterations: int
    stiffness: float


def _dot(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> float:
    return float(torch.stack([wide_dot(a[name], b[name]) for name in a]).sum())


def _plus(a: Mapping[str, Tensor], t: float, b: Mapping[str, Tensor]) -> Vectors:
    return {name: torch.add(a[name], b[name], alpha=t) for name in a}


class Proximal:
    """``df(u) + |J u|_H^2 / 2 + mu g0(u, u) / 2`` as a function of a tangent vector.

    Args:
        map: the derivative of the outputs, with the output metric H.
        spaces: the tangent spaces, with their masses, by parameter name.
        gradient: the covector df.
    """

    def __init__(
        self,
        map: OutputMap | JointMap,
        spaces: Mapping[str, TangentSpace],
        gradient: Mapping[str, Tensor],
    ) -> None:
        self._map = map
        self._spaces = spaces
        self._gradient = gradient

    def flat(self, u: Mapping[str, Tensor]) -> Vectors:
        """Return the massed base metric's covector of a tangent vector."""
        return {name: space.flat(u[name]) for name, space in self._spaces.items()}

    def curved(self, u: Mapping[str, Tensor]) -> tuple[float, float, list[Tensor]]:
        """Return ``|J u|_H^2``, ``mu g0(u, u)`` and ``H J u``."""
        velocity = self._map.push(u)
        lowered = self._map.lower(velocity)
        curvature = self._map.pairing(velocity, lowered)
        return curvature, _dot(self.flat(u), u), lowered

    def minimise(
        self,
        precondition: Callable[[Mapping[str, Tensor]], Vectors],
        start: Mapping[str, Tensor] | None,
        iterations: int,
        greed: float,
    ) -> Truncated:
        """Minimise by preconditioned conjugate gradients from a multiple of ``start``.

        Implements :eq:`gauss-newton-system` and :eq:`marginal-stop`.

        Args:
            precondition: symmetric positive map from covectors to tangent vectors.
            start: a tangent vector, such as the last step; its best multiple is the
                first point. None: zero.
            iterations: at most so many.
            greed: stop where the last two iterations gained less than this times what
                a unit of work has gained on average.

        Returns:
            The step. Cost: two products with J for each iteration.
        """
        e = self._gradient
        u: Vectors = {n: torch.zeros_like(s.point) for n, s in self._spaces.items()}
        stiffness = total = 0.0
        r = {name: -covector for name, covector in e.items()}
        if start is not None:
            curvature, mass, lowered = self.curved(start)
            weight = curvature + mass
            if weight > 0.0:
                t = -_dot(e, start) / weight
                stiffness = curvature / mass if mass > 0.0 else 0.0
                total = 0.5 * t * t * weight
                u = {name: t * v for name, v in start.items()}
                r = self._less(r, t, start, lowered)
        y = precondition(r)
        p, product, count = y, _dot(r, y), 0
        gains: list[float] = []
        # Below that only rounding is left, which the recurrence would amplify.
        largest = product if start is None else max(product, _dot(e, precondition(e)))
        eps = max(torch.finfo(x.dtype).eps for x in y.values())
        while count < iterations and product > eps * eps * largest:
            curvature, mass, lowered = self.curved(p)
            weight = curvature + mass
            if not weight > 0.0:
                break
            a = product / weight
            stiffness = max(stiffness, curvature / mass if mass > 0.0 else 0.0)
            u = _plus(u, a, p)
            count += 1
            gains.append(0.5 * a * product)
            total += gains[-1]
            recent = 0.5 * sum(gains[-2:])
            if count >= 2 and recent < greed * total / (_OVERHEAD + count):
                break
            if count == iterations:
                break
            r = self._less(r, a, p, lowered)
            y = precondition(r)
            after = _dot(r, y)
            p, product = _plus(y, after / product, p), after
        return Truncated(u, self._decrease(u, total), count, stiffness)

    def _less(
        self,
        r: Mapping[str, Tensor],
        a: float,
        p: Mapping[str, Tensor],
        lowered: list[Tensor],
    ) -> Vectors:
        pulled, flat = self._map.pull(lowered), self.flat(p)
        return {n: r[n] - a * (pulled[n] + flat[n]) for n in r}

    def _decrease(self, u: Vectors, total: float) -> float:
        # total = -df - |J u|^2 / 2 - mass / 2
        return total + 0.5 * _dot(self.flat(u), u)
