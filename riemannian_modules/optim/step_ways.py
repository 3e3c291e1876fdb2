"""The ways that steps of one kind go, and the programs for them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from riemannian_modules.capture import Missed, Program, Slot, Trace
from riemannian_modules.optim.step_settings import Key

__all__ = ["Ends", "Kind", "Known"]

# So many programs at a time, one more after so many steps that fit none of them; a step
# that fits takes so much of one off. So often a kind of step is looked at for them.
_PROGRAMS, _MISSES, _FORGETS, _LOOKS = 4, 3.0, 0.03, 16
# So much of programs may be run in vain. A step that fits saves about half of one.
_WASTED, _SAVED = 8.0, 0.5


@dataclass(frozen=True)
class Ends:
    """What a step returns, and what it leaves in places.

    Attributes:
        spec: how its results are nested.
        results: their leaves, slots in the place of tensors.
        places: by index of a place, the slot of what it puts there; or None.
    """

    spec: Any
    results: tuple[object, ...]
    places: dict[int, Slot | None]

    @property
    def wanted(self) -> list[Slot]:
        """The slots among them."""
        every = [*self.results, *self.places.values()]
        return [each for each in every if isinstance(each, Slot)]


@dataclass(eq=False)
class Known:
    """One way that steps of a kind go.

    Attributes:
        program: what runs in their place.
        ends: what to make of its results.
        contents: what the contents of the places looked like that it reads.
    """

    program: Program
    ends: Ends
    contents: Key


@dataclass(eq=False)
class Kind:
    """What is known of steps of one kind.

    Attributes:
        steps: how many were taken as usual.
        looks: how many of these were taken down.
        last: the last of them that was, and what it left.
        agreed: whether the one before was the same.
        known: the ways that they went, the last one that fitted first.
        misses: grows with each step that goes none of them, and falls with others.
        waste: the same of the parts of programs that were run in vain.
        closed: whether no other way is looked for.
        hopeless: whether all steps are taken as usual.
    """

    steps: int = 0
    looks: int = 0
    last: tuple[Trace, Ends] | None = None
    agreed: bool = False
    known: list[Known] = field(default_factory=list)
    misses: float = 0.0
    waste: float = 0.0
    closed: bool = False
    hopeless: bool = False

    def learns(self, known: Known) -> None:
        """Know a way from now on."""
        self.known[_PROGRAMS - 1 :] = []
        self.known.insert(0, known)
        self.misses = 0.0

    def through(
        self, replay: Callable[[Known], tuple[Any] | Missed]
    ) -> tuple[Any] | Missed:
        """Replay a step in the ways that it may go, until one fits.

        Args:
            replay: runs a program, and returns where it ended early or what it left.
        """
        left, way = list(self.known), dict[int, object]()
        while True:
            known = left.pop(0)
            found = replay(known)
            if not isinstance(found, Missed):
                self._fits(known)
                return found
            self.waste += found.part
            way.update(found.way)
            left = [each for each in left if each.program.may_go(way)]
            if not left:
                self.misses += 1.0
                return found

    def _fits(self, known: Known) -> None:
        self.known.remove(known)
        self.known.insert(0, known)
        self.misses = max(0.0, self.misses - _FORGETS)
        self.waste = max(0.0, self.waste - _SAVED)

    @property
    def wasteful(self) -> bool:
        """Whether programs are run in vain too often."""
        return self.waste >= _WASTED

    @property
    def seeks(self) -> bool:
        """Whether to look for another way."""
        # Three steps in a row, or of some thirty.
        missed = self.misses > _MISSES - 1.0
        return not self.closed and missed and self.looks < _LOOKS

    def stop(self, *, all: bool) -> bool:
        """Stop looking for another way, for now or, as is returned, for good.

        Args:
            all: whether those that are known are no good either.
        """
        self.last, self.agreed = None, False
        if self.known and not all and self.looks < _LOOKS:
            # An odd one among others, such as one that failed.
            self.misses = 0.0
            return False
        self.closed = True
        if all:
            self.known.clear()
        self.hopeless = not self.known
        return True
