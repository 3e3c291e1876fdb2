"""Rows of past passes as further rows of the metric."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import final

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors import MetricFactor, Shared, concatenated, owned, scaled
from riemannian_modules.linearization import Linearization

__all__ = ["History", "Past"]

Past = tuple[Mapping[str, MetricFactor], int]


@final
class History:
    """An average over passes in the place of the metric of one batch.

    The metric of step t gets the rows of the ``window`` passes before it:

        ``G_t = mass g0 + sum_j w_j K_(t-j)^T K_(t-j)``,
        ``w_j = decay^j / (1 + decay + ... + decay^window)``.

    Implements :eq:`rows-history`. The rows are covectors and are restricted to the
    tangent spaces of the new point when the metric is inverted there; that they
    belong to older points is the error of any average. Linear layers and convolutions
    keep them as inputs and cotangents, ``rank (inputs / r + outputs)`` numbers a
    pass; others as rows. The weights add up to one from the first pass on.

    A pass with other parameters, another number of rows for each example, or of
    another data type starts the history anew.

    Args:
        window: number of past passes, at least 1.
        decay: weight of a pass relative to the one after it, in (0, 1].

    Raises:
        ShapeError: a window or a decay out of range.

    Cost: the rank is up to ``1 + window`` times that of a pass.

    >>> History(2, decay=0.5).weights(3)
    [0.5714285714285714, 0.2857142857142857, 0.14285714285714285]
    """

    def __init__(self, window: int, decay: float = 0.8) -> None:
        if (
            not isinstance(window, int | Integral)
            or window < 1
            or not 0.0 < decay <= 1.0
        ):
            raise ShapeError(
                f"History({window}, decay={decay}): the window is 1, 2, ..., and the "
                "decay lies above 0 and is at most 1"
            )
        self.window = window
        self.decay = decay

    def __repr__(self) -> str:
        return f"History({self.window}, decay={self.decay})"

    def weights(self, passes: int) -> list[float]:
        """Return the weights of passes, the latest first; they add up to one.

        Args:
            passes: how many there are.
        """
        powers = [self.decay**j for j in range(passes)]
        return [power / sum(powers) for power in powers]

    def extend(
        self, found: Linearization, past: Sequence[Past]
    ) -> tuple[Linearization, list[Past]]:
        """Return a pass with the rows of those before it.

        Args:
            found: a linearised pass.
            past: the passes before it, the latest first.

        Returns:
            The pass with all rows, and the passes that the next one has before it.
        """
        rank = next(iter(found.factors.values())).rank
        groups = rank // found.examples
        here = {name: owned(factor) for name, factor in found.factors.items()}
        before = [one for one in past if _fits(one, here, groups)]
        if len(before) < len(past):
            before = []
        kept = [(here, groups), *before][: self.window]
        if not before:
            return found, kept
        roots = [weight**0.5 for weight in self.weights(1 + len(before))]
        passes = [found.factors, *(factors for factors, _ in before)]
        shared = Shared()
        factors = {
            name: concatenated(
                [
                    scaled(each[name], root, shared)
                    for each, root in zip(passes, roots, strict=True)
                ],
                groups,
                shared,
            )
            for name in found.factors
        }
        examples = next(iter(factors.values())).rank // groups
        y = found.residual
        if y is not None:
            own = y.view(groups, -1) / roots[0]
            padded = y.new_zeros(groups, examples)
            padded[:, : own.shape[1]] = own
            y = padded.view(-1)
        together = replace(found, factors=factors, residual=y, examples=examples)
        return together, kept


def _fits(past: Past, here: Mapping[str, MetricFactor], groups: int) -> bool:
    factors, count = past
    return (
        count == groups
        and factors.keys() == here.keys()
        and all(
            (f.dtype, f.device, f.shape)
            == (here[name].dtype, here[name].device, here[name].shape)
            for name, f in factors.items()
        )
    )
