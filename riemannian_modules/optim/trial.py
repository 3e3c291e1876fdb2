"""Trial points: parameters that are moved, looked at, and put back bit for bit."""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.declared import Declared
from riemannian_modules.errors import NonFiniteError
from riemannian_modules.finite import looks_finite
from riemannian_modules.manifolds.declaring import left_by_step
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
        self._away = self._refused = False

    def point(self, name: str) -> Tensor:
        """Return where a parameter started, as a plain tensor."""
        return self.start[name].as_subclass(Tensor)

    def along(self, name: str, vector: Tensor) -> Tensor:
        """Return the point that a tangent vector of a parameter leads to."""
        manifold = self.moving[name].manifold
        return self._retraction(manifold, self.point(name), vector)

    @torch.no_grad()
    def move(self, vectors: Mapping[str, Tensor]) -> None:
        """Put the parameters where tangent vectors lead from the start.

        They stay where they are if that is no point of one of the manifolds.
        """
        points = self._points(vectors)
        self._refused = points is None
        if points is None:
            return
        self._away = True
        for name, declared in self.moving.items():
            declared.tensor.copy_(points[name])
            declared.verified = declared.tensor._version

    def _points(self, vectors: Mapping[str, Tensor]) -> dict[str, Tensor] | None:
        found = {}
        for name, declared in self.moving.items():
            try:
                point = self.along(name, vectors[name])
            except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
                return None
            # The loss of the point is read in any case, so this waits for no more.
            if not looks_finite(point) or left_by_step(declared.manifold, point):
                return None
            found[name] = point
        return found

    @torch.no_grad()
    def restore(self) -> None:
        """Put the parameters back where they started."""
        for name, declared in self.moving.items():
            declared.tensor.copy_(self.start[name])
            declared.verified = declared.linearised = declared.tensor._version
        self._away = self._refused = False

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
        there, and where there is no point, for :meth:`move` left a manifold: one more
        loss that is too large.
        """
        if self._refused:
            return math.inf
        try:
            return closure()
        except NonFiniteError:
            return math.inf
