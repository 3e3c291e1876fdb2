"""Kronecker products that are averaged over passes, and what they say of steps."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Self

import torch
from torch import Tensor

from riemannian_modules.optim.kronecker import Sides
from riemannian_modules.optim.sides import Side, SideInverse
from riemannian_modules.tangent import TangentSpace

__all__ = ["Averaged", "AveragedInverse", "told", "unit_mass", "wide"]

_PLACES = tuple(
    f"{side}_{name}"
    for side in ("left", "right")
    for name in ("average", "vectors", "values")
)


def unit_mass(space: TangentSpace) -> float:
    """Return the mass where it is a number, else 1: the coordinates have it."""
    return space.mass.scalar if space.mass.is_scalar else 1.0


@dataclass(frozen=True)
class AveragedInverse:
    """The inverse of the averaged metric of one parameter.

    Attributes:
        mass: the number that it was made for.
        left: what acts from the left on coordinates, as matrices; None: nothing does.
        right: what acts from the right, likewise.
    """

    mass: float
    left: SideInverse | None
    right: SideInverse | None

    @cached_property
    def flat(self) -> tuple[SideInverse | None, SideInverse | None]:
        """Left and right for a Euclidean parameter, the mass among them."""
        if self.left is not None:
            return self.left.divided(self.mass), self.right
        assert self.right is not None
        return None, self.right.divided(self.mass)

    def __call__(self, space: TangentSpace, e: Tensor) -> Tensor:
        """Return the tangent vector that represents a covector.

        Args:
            space: the parameter's tangent space.
            e: of the parameter's shape.
        """
        if space.divisor is not None:
            return _between(e, *self.flat)
        return space.root(_between(space.root_adjoint(e), self.left, self.right))


@dataclass(frozen=True)
class Averaged:
    """Both sides of the rows of one parameter, for mass 1, averaged over passes.

    Attributes:
        left: of the first dimension.
        right: of all others.
    """

    left: Side
    right: Side

    @classmethod
    def of(
        cls, sides: Sides, before: "Averaged | None", keep: float, rank: int
    ) -> Self:
        """Return the average with one more pass.

        Args:
            sides: of the rows of the pass, for mass 1.
            before: the average so far, or None.
            keep: its weight, in [0, 1].
            rank: how many eigenpairs of long sides are kept.
        """
        left, right = wide(sides.left), wide(sides.right)
        if before is None:
            return cls(Side.first(left, rank), Side.first(right, rank))
        return cls(
            before.left.after(left, keep, rank), before.right.after(right, keep, rank)
        )

    @classmethod
    def found(cls, state: Mapping[str, Tensor]) -> Self | None:
        """Return what :meth:`tensors` left, or None.

        Args:
            state: tensors by name, others among them.
        """
        if _PLACES[0] not in state:
            return None
        each = [wide(state[place]) for place in _PLACES]
        return cls(Side(*each[:3]), Side(*each[3:]))

    def tensors(self) -> dict[str, Tensor]:
        """Return all there is to keep."""
        sides = (self.left, self.right)
        each = [t for side in sides for t in (side.average, side.vectors, side.values)]
        return dict(zip(_PLACES, each, strict=True))

    def inverse(self, mass: float) -> AveragedInverse:
        """Return the inverse of mass and average. Implements :eq:`averaged-sides`.

        Args:
            mass: a positive number.
        """
        n, m = len(self.left.average), len(self.right.average)
        if m == 1:
            # One side of one entry: the other says it all, exactly.
            return AveragedInverse(mass, self.left.inverse(mass, 1.0), None)
        if n == 1:
            return AveragedInverse(mass, None, self.right.inverse(mass, 1.0))
        trace = self.left.trace
        share = (mass * trace).sqrt().clamp_min(torch.finfo(trace.dtype).tiny)
        ratio = (m / n) ** 0.5
        left, right = (
            self.left.inverse(share, ratio),
            self.right.inverse(share, 1 / ratio),
        )
        return AveragedInverse(mass, left, right)


def _between(z: Tensor, left: SideInverse | None, right: SideInverse | None) -> Tensor:
    matrix = z.reshape(len(z) if z.ndim else 1, -1)
    if left is not None:
        matrix = left.times(matrix)
    if right is not None:
        matrix = right.after(matrix)
    return matrix.reshape(z.shape)


def wide(value: Tensor) -> Tensor:
    """Return a tensor in float32 at least."""
    return value.float() if value.itemsize < 4 else value


def told(
    averages: Mapping[str, Averaged],
    tell: Callable[[Mapping[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Averaged]:
    """Return the averages of the first of several processes.

    Args:
        averages: by parameter name, the same on all but for rounding.
        tell: :meth:`riemannian_modules.exchange.Exchange.tell`.
    """
    flat = tell(
        {
            f"{name}/{place}": value
            for name, own in averages.items()
            for place, value in own.tensors().items()
        }
    )
    found = {
        name: Averaged.found({place: flat[f"{name}/{place}"] for place in _PLACES})
        for name in averages
    }
    return {name: own for name, own in found.items() if own is not None}
