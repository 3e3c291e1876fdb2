"""Boxes of states, and Jacobians over them: bounded, or seen at points."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from riemannian_modules.contraction.enclosure import (
    MetricRoot,
    interval_gain,
    interval_rate,
)
from riemannian_modules.contraction.interval import Interval
from riemannian_modules.contraction.result import Gain, Rate, Side, Verdict
from riemannian_modules.errors import ContractionError

__all__ = ["Blocks", "Box", "JacobianBounds", "Jacobians", "Layout", "Pieces"]

Block = Interval | Sequence[Sequence[Interval | float]]
Blocks = Mapping[tuple[str, str], Block]
Pieces = int | Mapping[str, int | Sequence[int]]
JacobianBounds = Callable[[dict[str, Interval]], Blocks]


@dataclass(frozen=True)
class Layout:
    """Where the states of named modules are in one long vector.

    Args:
        sizes: how many states each module has.
    """

    sizes: Mapping[str, int]

    @property
    def names(self) -> tuple[str, ...]:
        """The modules in order."""
        return tuple(self.sizes)

    @property
    def total(self) -> int:
        """The number of all states."""
        return sum(self.sizes.values())

    @property
    def places(self) -> dict[str, slice]:
        """Where each module's states are."""
        found, start = {}, 0
        for name, size in self.sizes.items():
            found[name] = slice(start, start + size)
            start += size
        return found

    def split(self, state: Tensor) -> dict[str, Tensor]:
        """Return the modules' parts of ``(..., total)``."""
        return {name: state[..., place] for name, place in self.places.items()}

    def join(self, parts: Mapping[str, float | Sequence[float] | Tensor]) -> Tensor:
        """Return one vector; a number stands for all states of its module.

        Raises:
            ContractionError: other modules, or another number of states.
        """
        if set(parts) != set(self.names):
            raise ContractionError(
                f"states of {', '.join(parts)}; the modules are {', '.join(self.names)}"
            )
        pieces = []
        for name, size in self.sizes.items():
            value = torch.as_tensor(parts[name], dtype=torch.float64).detach()
            if value.ndim > 1 or (value.ndim == 1 and len(value) != size):
                raise ContractionError(
                    f"'{name}' has {size} states; got a tensor of shape "
                    f"{tuple(value.shape)}"
                )
            pieces.append(value.expand(size))
        return torch.cat(pieces)


@dataclass(frozen=True)
class Box:
    """All states between two bounds.

    Args:
        lower: lower bounds ``(total,)``.
        upper: upper bounds.
        words: the box in words.
    """

    lower: Tensor
    upper: Tensor
    words: str

    @classmethod
    def of(
        cls,
        layout: Layout,
        bounds: Mapping[str, tuple[float | Sequence[float], float | Sequence[float]]],
    ) -> "Box":
        """Read ``{module: (lower, upper)}``.

        Raises:
            ContractionError: a bound is not finite, or above its upper bound.
        """
        lower = layout.join({name: low for name, (low, _) in bounds.items()})
        upper = layout.join({name: high for name, (_, high) in bounds.items()})
        if not bool((lower <= upper).all() & torch.isfinite(upper - lower).all()):
            raise ContractionError(
                f"no box lies between {lower.tolist()} and {upper.tolist()}"
            )
        told = [
            f"{name} in {_told(lower[place])} to {_told(upper[place])}"
            for name, place in layout.places.items()
        ]
        return cls(lower, upper, "for " + ", ".join(told))

    def contains(self, states: Tensor) -> Tensor:
        """Return which of ``(..., total)`` lie inside."""
        return ((states >= self.lower) & (states <= self.upper)).all(-1)

    def sample(self, count: int, seed: int) -> Tensor:
        """Return points ``(count, total)``: the middle, then uniformly random ones.

        Raises:
            ContractionError: no points.
        """
        if count < 1:
            raise ContractionError(f"samples={count}; at least one point is looked at")
        generator = torch.Generator().manual_seed(seed)
        shape = (count, len(self.lower))
        share = torch.rand(shape, generator=generator, dtype=torch.float64)
        share[0] = 0.5
        return self.lower + share * (self.upper - self.lower)

    def pieces(self, counts: Tensor) -> Interval:
        """Divide every side into its number of parts, ``(boxes, total)``."""
        edges = [
            torch.linspace(0, 1, int(count) + 1, dtype=torch.float64) * (high - low)
            + low
            for count, low, high in zip(counts, self.lower, self.upper, strict=True)
        ]
        for edge, low, high in zip(edges, self.lower, self.upper, strict=True):
            edge[0], edge[-1] = low, high
        cells = [list(zip(e[:-1].tolist(), e[1:].tolist(), strict=True)) for e in edges]
        both = torch.tensor(list(product(*cells)), dtype=torch.float64)
        return Interval(both[..., 0], both[..., 1])


def _told(values: Tensor) -> str:
    numbers = [f"{value:.4g}" for value in dict.fromkeys(values.tolist())]
    return numbers[0] if len(numbers) == 1 else f"({', '.join(numbers)})"


@dataclass(frozen=True)
class Jacobians:
    """Jacobians of a system: enclosures over pieces of a box, or samples in it.

    Args:
        layout: of the states.
        lower: lower bounds of the entries, ``(pieces, total, total)``.
        upper: upper bounds; the same for samples.
        certified: whether every Jacobian of the region lies in one of the pieces.
        where: the region or the points, in words.
        source: who bounded them, or how they were seen.
    """

    layout: Layout
    lower: Tensor
    upper: Tensor
    certified: bool
    where: str
    source: str

    @classmethod
    def enclosed(
        cls, layout: Layout, box: Box, bounds: JacobianBounds, pieces: Pieces
    ) -> "Jacobians":
        """Evaluate a user's bounds on the pieces of a box.

        Raises:
            ContractionError: a block that no modules have, or of another shape; a
                number of pieces below one, or more than a million in all.
        """
        if isinstance(pieces, int):
            pieces = dict.fromkeys(layout.names, pieces)
        counts = layout.join({name: pieces.get(name, 1) for name in layout.names})
        if not bool((counts >= 1).all()) or float(counts.prod()) > 1e6:
            raise ContractionError(
                f"{counts.tolist()} pieces along the states; give at least one along "
                "each, and at most a million in all"
            )
        cells = box.pieces(counts)
        count = len(cells.lower)
        places = layout.places
        states = {name: cells[:, place] for name, place in places.items()}
        lower = torch.zeros(count, layout.total, layout.total, dtype=torch.float64)
        upper = lower.clone()
        for (target, source), block in bounds(states).items():
            if target not in places or source not in places:
                raise ContractionError(
                    f"bounds on the Jacobian of '{target}' by '{source}'; the modules "
                    f"are {', '.join(places)}"
                )
            rows, columns = places[target], places[source]
            low, high = _entries(block, count)
            want = (count, layout.sizes[target], layout.sizes[source])
            if low.shape != want:
                raise ContractionError(
                    f"bounds on the Jacobian of '{target}' by '{source}' have the "
                    f"shape {tuple(low.shape[1:])}, not {want[1:]}"
                )
            lower[:, rows, columns], upper[:, rows, columns] = low, high
        told = f"intervals given by the caller over {count} boxes"
        return cls(layout, lower, upper, True, box.words, told)

    def require_contains(self, points: Tensor, seen: Tensor, box: Box) -> None:
        """Compare enclosures with Jacobians ``seen`` at points of the box.

        Raises:
            ContractionError: an entry lies outside of all pieces' bounds.
        """
        slip = 1e-9 * (1 + seen.abs())
        low, high = self.lower.amin(0), self.upper.amax(0)
        wrong = (seen < low - slip) | (seen > high + slip)
        if bool(wrong.any()):
            point, row, column = wrong.nonzero()[0].tolist()
            raise ContractionError(
                f"the Jacobian's entry ({row}, {column}) is "
                f"{float(seen[point, row, column]):.6g} at the state "
                f"{[round(x, 4) for x in points[point].tolist()]}, {box.words}; the "
                f"bounds say {float(low[row, column]):.6g} to "
                f"{float(high[row, column]):.6g}: jacobian_bounds is wrong"
            )

    def block(self, target: str, source: str) -> tuple[Tensor, Tensor]:
        """Return bounds on one block, ``(pieces, rows, columns)`` each."""
        places = self.layout.places
        rows, columns = places[target], places[source]
        return self.lower[:, rows, columns], self.upper[:, rows, columns]

    def rate(self, name: str, root: MetricRoot, metric: str) -> Rate:
        """Return the rate of one module in its own states."""
        return self.as_rate(interval_rate(*self.block(name, name), root), metric)

    def as_rate(self, bounds: Tensor, metric: str) -> Rate:
        """Return the least of bounds on a rate, with what it proves."""
        return Rate(
            float(bounds.min()),
            kind="Jacobian",
            metric=metric,
            where=self.where,
            side=Side.LOWER if self.certified else Side.UPPER,
            verdict=Verdict.CERTIFIED if self.certified else Verdict.EVIDENCE,
            source=self.source,
        )

    def gain(
        self, target: str, source: str, row: MetricRoot, column: MetricRoot
    ) -> Gain:
        """Return the gain of one module on another."""
        return self.as_gain(interval_gain(*self.block(target, source), row, column))

    def as_gain(self, bounds: Tensor) -> Gain:
        """Return the largest of bounds on a gain, with what it proves."""
        value = float(bounds.max())
        proved = self.certified and math.isfinite(value)
        verdict = Verdict.EVIDENCE if not self.certified else Verdict.NOT_CERTIFIED
        return Gain(
            value,
            where=self.where,
            side=Side.UPPER if self.certified else Side.LOWER,
            verdict=Verdict.CERTIFIED if proved else verdict,
            source=self.source,
        )


def _entries(block: Block, count: int) -> tuple[Tensor, Tensor]:
    """Return bounds ``(count, rows, columns)``."""
    if isinstance(block, Interval):
        shape = (count, *block.lower.shape[-2:])
        return block.lower.expand(shape), block.upper.expand(shape)
    rows = [
        [entry if isinstance(entry, Interval) else Interval.of(entry) for entry in row]
        for row in block
    ]
    lower = [torch.stack([e.lower.expand(count) for e in row], -1) for row in rows]
    upper = [torch.stack([e.upper.expand(count) for e in row], -1) for row in rows]
    return torch.stack(lower, -2), torch.stack(upper, -2)
