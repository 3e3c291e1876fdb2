"""Trial points: parameters that are moved, looked at, and put back bit for bit."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.declared import Declared
from riemannian_modules.errors import NonFiniteError
from riemannian_modules.retractions import Retraction

__all__ = ["Trial"]


class Trial:
    """The parameters of a step: where they started and where they are tried.

    Args:
        moving: the parameters that move, by name.
        retraction: how a tangent vector becomes a point.
    """

    def __init__(self, moving: Mapping[str, Declared], retraction: Retraction) -> None:
        self.moving = dict(moving)
        self._retraction = retraction
        self.start = {n: d.tensor.detach().clone() for n, d in moving.items()}
        self._away = False

    def point(self, name: str) -> Tensor:
        """Return where a parameter started, as a plain tensor."""
        return self.start[name].as_subclass(Tensor)

    def along(self, name: str, vector: Tensor) -> Tensor:
        """Return the point that a tangent vector of a parameter leads to."""
        manifold = self.moving[name].manifold
        return self._retraction(manifold, self.point(name), vector)

    @torch.no_grad()
    def move(self, vectors: Mapping[str, Tensor]) -> None:
        """Put the parameters where tangent vectors lead from the start."""
        points = {name: self.along(name, vectors[name]) for name in self.moving}
        self._away = True
        for name, declared in self.moving.items():
            declared.tensor.copy_(points[name])
            declared.verified = declared.tensor._version

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back where they started."""
        for name, declared in self.moving.items():
            declared.tensor.copy_(self.start[name])
            declared.verified = declared.linearised = declared.tensor._version
        self._away = False

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Put the parameters back if an error is raised inside this scope."""
        try:
            yield
        except BaseException:
            if self._away:
                self.restore()
            raise

    def value(self, closure: Callable[[], Any]) -> Any:
        """Return the loss that a closure finds here.

        Infinity where it refuses the point, since outputs or parameters are not finite
        there: one more loss that is too large.
        """
        try:
            return closure()
        except NonFiniteError:
            return math.inf
