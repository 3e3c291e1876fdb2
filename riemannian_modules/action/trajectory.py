"""What a training run was: points, durations, and what was known at the points."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import geoopt
from torch import Tensor

from riemannian_modules.action.inverse_retraction import inverse_retraction
from riemannian_modules.errors import NotRecordedError, ShapeError
from riemannian_modules.manifolds import base_of
from riemannian_modules.metric import LayerMetric
from riemannian_modules.retractions import Default, Retraction

__all__ = [
    "Landscape",
    "Local",
    "Point",
    "Trajectory",
]

Point = Mapping[str, Tensor]
_EUCLIDEAN = geoopt.Euclidean()


@dataclass(frozen=True)
class Local:
    """The loss, its differential and the metric at one point.

    Args:
        loss: Value of the loss.
        covector: ``{parameter name: d loss}``.
        blocks: Metrics of the blocks, at this point.
        known: The Riemannian gradient, if it is known already.
    """

    loss: float
    covector: Point
    blocks: tuple[LayerMetric, ...]
    known: Point | None = None

    @cached_property
    def gradient(self) -> dict[str, Tensor]:
        """The Riemannian gradient ``{parameter name: tangent vector}``."""
        if self.known is not None:
            return dict(self.known)
        found: dict[str, Tensor] = {}
        for block in self.blocks:
            own = {part.name: self.covector[part.name] for part in block.parts}
            found |= block.sharp(own)
        return found

    def inner(self, u: Point, v: Point) -> float:
        """Return ``g(u, v)``, summed over the blocks."""
        return sum(float(block.inner(u, v)) for block in self.blocks)

    def pair(self, u: Point) -> float:
        """Return ``d loss (u)``."""
        return sum(
            float((self.covector[part.name] * u[part.name]).sum().double())
            for block in self.blocks
            for part in block.parts
        )


Landscape = Callable[[Point], Local]


@dataclass(frozen=True)
class Trajectory:
    """A discrete path of parameters with the durations of its steps.

    Args:
        points: N + 1 points ``{parameter name: value}``.
        durations: N positive durations; a step of length ``lr`` lasts ``lr``.
        landscape: Evaluates loss, differential and metric at any point; None: only
            what was ``seen`` is known.
        manifolds: ``{parameter name: manifold}``; Euclidean where missing.
        retraction: How the run turned steps into points.
        seen: What was known at the points during the run; None where nothing was.

    Raises:
        ShapeError: The numbers of points and durations do not fit, or a duration is
            not positive.
    """

    points: Sequence[Point]
    durations: Sequence[float]
    landscape: Landscape | None = None
    manifolds: Mapping[str, geoopt.Manifold] = field(default_factory=dict)
    retraction: Retraction = field(default_factory=Default)
    seen: Sequence[Local | None] = ()

    def __post_init__(self) -> None:
        count = len(self.durations)
        if len(self.points) != count + 1 or count == 0:
            raise ShapeError(
                f"{len(self.points)} points and {count} durations: a trajectory of N "
                "steps has N + 1 points and N durations, N at least 1"
            )
        if not all(h > 0 for h in self.durations):
            raise ShapeError(f"durations must be positive, got {list(self.durations)}")

    @property
    def duration(self) -> float:
        """How long it lasts."""
        return sum(self.durations)

    def local(self, index: int) -> Local:
        """Return what is known at a point.

        Args:
            index: Which point, from 0.

        Returns:
            What was seen there during the run, else what the landscape says.

        Raises:
            NotRecordedError: Nothing was seen there and there is no landscape.
        """
        known = self.seen[index] if index < len(self.seen) else None
        return self.at(self.points[index]) if known is None else known

    def at(self, point: Point) -> Local:
        """Return what the landscape says of any point.

        Args:
            point: The point.

        Returns:
            Loss, differential and metric.

        Raises:
            NotRecordedError: There is no landscape.
        """
        if self.landscape is None:
            raise NotRecordedError(
                "loss and metric are needed where the run was not looked at; give the "
                "trajectory a landscape, for instance recorder.trajectory(evaluate)"
            )
        return self.landscape(point)

    def step(self, start: Point, end: Point) -> dict[str, Tensor]:
        """Return the tangent step at ``start`` that leads to ``end``.

        Args:
            start: A point.
            end: A point near it.

        Returns:
            ``{parameter name: tangent vector}``.

        Raises:
            ContractionError: The points are too far apart for the retraction.
        """
        return {
            name: inverse_retraction(
                self.manifolds.get(name, _EUCLIDEAN), x, end[name], self.retraction
            )
            for name, x in start.items()
        }

    def moved(self, start: Point, u: Point) -> dict[str, Tensor]:
        """Return the point to which a tangent step leads."""
        return {
            name: self.retraction(
                base_of(self.manifolds.get(name, _EUCLIDEAN)), x, u[name]
            )
            for name, x in start.items()
        }
