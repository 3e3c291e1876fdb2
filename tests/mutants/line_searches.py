"""Line searches and trust regions with one mistake each."""

from dataclasses import dataclass, replace

import torch

from riemannian_modules.optim.line_rules import Armijo, StrongWolfe
from riemannian_modules.optim.line_search import RetractedCurve
from riemannian_modules.optim.quadratic import QuadraticModel, Step


@dataclass(frozen=True)
class AnyDecrease(Armijo):
    """Takes whatever is lower."""

    def search(self, curve, value, slope, first):
        return super().search(curve, value, 1e-9 * slope, first)


@dataclass(frozen=True)
class Longer(Armijo):
    """Goes on for a bit after it has looked."""

    def search(self, curve, value, slope, first):
        found = super().search(curve, value, slope, first)
        return replace(found, length=2.0 * found.length)


@dataclass(frozen=True)
class FirstGood(StrongWolfe):
    """Does not ask for flatness."""

    def search(self, curve, value, slope, first):
        found = Armijo(self.sufficient).search(curve, value, slope, first)
        return replace(found, satisfied=True)


@dataclass(frozen=True)
class SignedWolfe(StrongWolfe):
    """Forgets the absolute value of the slope."""

    def search(self, curve, value, slope, first):
        class Flattened:
            def value(self, t):
                return curve.value(t)

            def slope(self, t):
                return min(0.0, curve.slope(t))

        return super().search(Flattened(), value, slope, first)


RULES = {"any-decrease": AnyDecrease, "longer": Longer}
WOLFES = {"first-good": FirstGood, "signed": SignedWolfe}


class StraightSlope(RetractedCurve):
    """Takes the direction for the velocity all along the curve."""

    def _part(self, name, covector, t):
        return float((covector * self._direction[name]).sum())


class StartSlope(RetractedCurve):
    """Differentiates where the curve begins."""

    def _part(self, name, covector, t):
        return super()._part(name, covector, 0.0)


CURVES = {"straight": StraightSlope, "start": StartSlope}


class Uncurved(QuadraticModel):
    """Predicts to first order."""

    def best(self, directions):
        step = super().best(directions)
        return Step(step.coefficients, step.vectors, -self.slope(step.vectors))


class TwiceAsCurved(QuadraticModel):
    """Forgets the half."""

    def image(self, u):
        return super().image(u) * torch.tensor(2.0).sqrt()


MODELS = {"uncurved": Uncurved, "twice-as-curved": TwiceAsCurved}
