"""Quadratic models with one mistake each."""

import torch

from riemannian_modules.optim.quadratic import QuadraticModel, Step


class BlocksApart(QuadraticModel):
    """Squares the image of every block on its own: layers do not see each other."""

    def image(self, u):
        images = [
            block.image({part.name: u[part.name] for part in block.parts})
            for block in self._metric.blocks.values()
        ]
        return torch.cat(images)


class Weightless(QuadraticModel):
    """Forgets the mass."""

    def _weight(self, u, v):
        return self._zero()


class DampedDecrease(QuadraticModel):
    """Counts the mass as if it were the loss."""

    def best(self, directions):
        step = super().best(directions)
        own = self.mass(step.vectors, step.vectors)
        return Step(step.coefficients, step.vectors, step.decrease - 0.5 * own)


class FullSteps(QuadraticModel):
    """Always goes the whole way along the first direction."""

    def best(self, directions):
        step = super().best(directions)
        ones = [1.0] + [0.0] * (len(directions) - 1)
        return Step(ones, dict(directions[0]), step.decrease)


MUTANTS = {
    "blocks-apart": BlocksApart,
    "weightless": Weightless,
    "damped-decrease": DampedDecrease,
    "full-steps": FullSteps,
}
