"""Parts of Gauss-Newton steps with one mistake each."""

from riemannian_modules.optim.conjugate import Proximal, Truncated
from riemannian_modules.optim.kronecker import KroneckerInverse
from riemannian_modules.optim.output_map import OutputMap


class SampledTwice(OutputMap):
    """Forgets that the loss is a mean."""

    def lower(self, velocities):
        weights, self._weights = self._weights, [1.0] * len(self._weights)
        found = super().lower(velocities)
        self._weights = weights
        return found


class PushOfTheFirst(OutputMap):
    """Moves the first parameter only."""

    def push(self, u):
        first = next(iter(u))
        return super().push({n: x if n == first else 0.0 * x for n, x in u.items()})


MAPS = {"weights": SampledTwice, "first-parameter": PushOfTheFirst}


class Ambient(KroneckerInverse):
    """Leaves the tangent space."""

    def _one(self, name, space, e):
        return super()._one(name, space, e) + 0.1 * e


class OneSided(KroneckerInverse):
    """Is no symmetric map."""

    def _one(self, name, space, e):
        found = super()._one(name, space, e)
        return space.project(found.cumsum(0))


class Swollen(KroneckerInverse):
    """Counts the mass twice."""

    def _one(self, name, space, e):
        return super()._one(name, space, e) / space.mass.scalar


INVERSES = {"ambient": Ambient, "one-sided": OneSided, "swollen": Swollen}


class Massless(Proximal):
    """Solves without the mass."""

    def flat(self, u):
        return {name: 0.0 * x for name, x in u.items()}


class DampedDecrease(Proximal):
    """Counts the mass as if it were the loss."""

    def _decrease(self, u, total):
        return total


class ColdStart(Proximal):
    """Takes the whole last step, not its best multiple."""

    def minimise(self, precondition, start, iterations, greed):
        found = super().minimise(precondition, start, iterations, greed)
        if start is None:
            return found
        u = {n: x + start[n] for n, x in found.vectors.items()}
        return Truncated(u, found.decrease, found.iterations, found.stiffness)


SOLVERS = {
    "massless": Massless,
    "damped-decrease": DampedDecrease,
    "cold-start": ColdStart,
}
