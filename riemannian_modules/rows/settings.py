"""The settings of a metric that has fewer rows, and what it remembers for them."""

from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Protocol

import torch

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.linearization import Linearization
from riemannian_modules.rows.base import Neglected, RowReduction
from riemannian_modules.rows.history import History, Past

__all__ = ["FewerRows"]


class Processes(Protocol):
    """What processes that share a pass have to agree on."""

    def same_dice(self) -> AbstractContextManager[None]:
        """Draw the same random numbers on all of them inside this scope."""


class FewerRows:
    """How a metric makes its rows out of those of its passes.

    Args:
        rows: what to put in the place of the rows of a pass; None: all of them.
        history: past passes whose rows are added; a number is the window; None: none.
        refresh: the rows are renewed in every so many backward passes.

    Attributes:
        neglected: what was left out of the last pass, or None.
        patience: rows are held for no more passes than so many less one, whatever
            ``refresh`` says; None: as it says. An optimizer that averages sets it.

    Raises:
        TypeError: no :class:`RowReduction`, or no :class:`History`.
        ValueError: ``refresh`` is no positive whole number.
        ShapeError: a window out of range.
    """

    def __init__(
        self,
        rows: RowReduction | None = None,
        history: History | int | None = None,
        refresh: int = 1,
    ) -> None:
        if not (rows is None or isinstance(rows, RowReduction)):
            raise TypeError(
                f"rows={rows!r}; pass a RowReduction such as rm.rows.Largest(256), or "
                "None for all rows"
            )
        if isinstance(history, int):
            history = History(history)
        if not (history is None or isinstance(history, History)):
            raise TypeError(
                f"history={history!r}; pass rm.rows.History(window, decay), a window, "
                "or None"
            )
        if not isinstance(refresh, int | Integral) or refresh < 1:
            raise ValueError(
                f"refresh={refresh}: rows are renewed every 1, 2, ... passes"
            )
        self.rows = rows
        self.history = history
        self.refresh = refresh
        self.neglected: Neglected | None = None
        self.patience: int | None = None
        self._past: list[Past] = []
        self._pending: tuple[Neglected | None, list[Past]] = (None, [])
        self._age = 0

    @property
    def is_plain(self) -> bool:
        """Whether the rows of each pass are those of the metric."""
        return self.rows is None and self.history is None and self.refresh == 1

    def describe(self) -> str:
        """Return what it was made from, the same words in every process."""
        rows = type(self.rows).__qualname__
        if isinstance(self.rows, RowReduction) and "__repr__" in vars(type(self.rows)):
            rows = repr(self.rows)
        return f"rows={rows}, history={self.history}, refresh={self.refresh}"

    @property
    def generator(self) -> torch.Generator | None:
        """The source of randomness that ``rows`` was given, or None."""
        found = getattr(self.rows, "generator", None)
        return found if isinstance(found, torch.Generator) else None

    @property
    def age(self) -> int:
        """Number of backward passes since the rows were renewed."""
        return self._age

    @property
    def holds(self) -> bool:
        """Whether the next backward pass keeps the rows of before."""
        bound = self.refresh if self.patience is None else self.patience
        return self._age + 1 < min(self.refresh, bound)

    def held(self) -> None:
        """Count a backward pass that kept the rows."""
        self._age += 1

    def forget(self) -> None:
        """Drop the past: the next pass is the first."""
        self._past, self._age = [], self.refresh

    def apply(
        self,
        found: Linearization,
        parameters: DeclaredParameters,
        processes: Processes | None = None,
    ) -> Linearization:
        """Return a pass with the rows that its metric is made of.

        Nothing is remembered before :meth:`keep`.

        Args:
            found: a linearised pass.
            parameters: the model's parameters, at the point of the pass.
            processes: those that share the pass, or None.

        Returns:
            The pass.
        """
        neglected, past = None, self._past
        if found.factors and self.rows is not None:
            spaces = {name: parameters[name].space() for name in found.names}
            with nullcontext() if processes is None else processes.same_dice():
                found, neglected = self.rows.reduce(found, spaces)
        if found.factors and self.history is not None:
            found, past = self.history.extend(found, self._past)
        self._pending = neglected, past
        return found

    def keep(self) -> None:
        """Remember the pass of the last :meth:`apply`."""
        self.neglected, self._past = self._pending
        self._age = 0
