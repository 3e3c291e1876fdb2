"""Which derivatives by the input are asked for."""

from collections.abc import Iterable
from dataclasses import dataclass

from riemannian_modules.errors import LinearizationError, ShapeError

__all__ = ["Orders", "Terms", "terms_of"]

# A derivative as a sum of partial ones: ``((i,), weight)`` or ``((i, j), weight)``.
Terms = tuple[tuple[tuple[int, ...], float], ...]


def terms_of(indices: Iterable[tuple[int, ...]], inputs: int) -> Terms:
    """Return the sum of some partial derivatives in its one normal form.

    Args:
        indices: the coordinates of each.
        inputs: how many coordinates there are.

    Returns:
        The terms, sorted.

    Raises:
        ShapeError: there is no such coordinate.
        LinearizationError: a third or higher derivative.

    >>> terms_of([(1, 0), (1, 1)], 2)
    (((0, 1), 1.0), ((1, 1), 1.0))
    """
    weights: dict[tuple[int, ...], float] = {}
    for each in indices:
        if not all(0 <= i < inputs for i in each):
            raise ShapeError(
                f"there is no derivative by the coordinates {each}: the points have "
                f"the coordinates 0 to {inputs - 1}"
            )
        if len(each) > 2:
            raise LinearizationError(
                f"the derivative by the coordinates {each} is of order {len(each)}; "
                "offered are first and second ones. Write higher ones with torch.func "
                "in a plain function of the network, which FunctionalMetric takes too"
            )
        key = tuple(sorted(each))
        weights[key] = weights.get(key, 0.0) + 1.0
    return tuple(sorted(weights.items()))


@dataclass(frozen=True)
class Orders:
    """The streams that are carried through a network beside its value.

    Attributes:
        firsts: coordinates of the first derivatives.
        seconds: second derivatives, each a sum of partial ones.
    """

    firsts: tuple[int, ...] = ()
    seconds: tuple[Terms, ...] = ()

    @property
    def count(self) -> int:
        """Number of streams, that of the value among them."""
        return 1 + len(self.firsts) + len(self.seconds)

    @property
    def order(self) -> int:
        """The highest derivative."""
        return 2 if self.seconds else int(bool(self.firsts))

    def place(self, terms: Terms) -> int | None:
        """Return which stream a derivative is, None if it is not carried."""
        if terms in self.seconds:
            return 1 + len(self.firsts) + self.seconds.index(terms)
        if len(terms) == 1 and terms[0][1] == 1.0 and terms[0][0][0] in self.firsts:
            return (
                1 + self.firsts.index(terms[0][0][0]) if len(terms[0][0]) == 1 else None
            )
        return None

    def including(self, terms: Terms) -> "Orders":
        """Return the streams with one more derivative, and those that it needs."""
        needed = {i for indices, _ in terms for i in indices}
        firsts = tuple(sorted({*self.firsts, *needed}))
        second = len(terms[0][0]) == 2 and terms not in self.seconds
        return Orders(firsts, (*self.seconds, terms) if second else self.seconds)

    def pairs(self) -> list[list[tuple[int, int, float]]]:
        """Return, for each second derivative, pairs of places of first ones."""
        at = {i: place for place, i in enumerate(self.firsts)}
        return [[(at[i], at[j], w) for (i, j), w in terms] for terms in self.seconds]
