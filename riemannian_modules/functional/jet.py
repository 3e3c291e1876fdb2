"""A network at one point, as a residual sees it: its value and its derivatives."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, final

import torch
from torch import Tensor
from torch.func import jacrev, jvp

from riemannian_modules.functional.orders import Orders, Terms, terms_of

__all__ = ["Jet", "MissingStreamError", "StreamJet", "TorchJet"]

Function = Callable[[Tensor], Any]


class Jet(ABC):
    """What a network is, and how it changes, at one point ``z``.

    Attributes:
        inputs: number of coordinates of the point.
    """

    inputs: int

    @property
    @abstractmethod
    def value(self) -> Tensor:
        """The output ``u(z)``, ``(outputs,)``."""

    @abstractmethod
    def derivative(self, terms: Terms) -> Tensor:
        """Return a sum of partial derivatives, ``(outputs,)``."""

    def d(self, *coordinates: int) -> Tensor:
        """Return a partial derivative, ``(outputs,)``.

        Args:
            *coordinates: one or two coordinates of the point: ``d(0)`` is
                ``du/dz_0``, ``d(0, 1)`` is ``d^2 u/dz_0 dz_1``.

        Raises:
            ShapeError: there is no such coordinate.
            LinearizationError: more than two.
        """
        if not coordinates:
            return self.value
        return self.derivative(terms_of([coordinates], self.inputs))

    def gradient(self) -> Tensor:
        """Return the derivative by every coordinate, ``(outputs, inputs)``."""
        return torch.stack([self.d(i) for i in range(self.inputs)], -1)

    def laplacian(self, *coordinates: int) -> Tensor:
        """Return the sum of second derivatives, ``(outputs,)``.

        Args:
            *coordinates: by these coordinates only, each counted once; none: by all.

        Raises:
            ShapeError: there is no such coordinate.
        """
        chosen = sorted(set(coordinates)) or range(self.inputs)
        return self.derivative(terms_of([(i, i) for i in chosen], self.inputs))


class MissingStreamError(Exception):
    """A derivative is asked for that was not carried; caught where they are chosen."""

    def __init__(self, terms: Terms) -> None:
        super().__init__(terms)
        self.terms = terms


@final
class StreamJet(Jet):
    """The jet that streams have carried.

    Args:
        data: ``(streams, outputs)``.
        orders: what the streams are.
        inputs: number of coordinates.
    """

    def __init__(self, data: Tensor, orders: Orders, inputs: int) -> None:
        self._data = data
        self._orders = orders
        self.inputs = inputs

    @property
    def value(self) -> Tensor:
        """The output."""
        return self._data[0]

    def derivative(self, terms: Terms) -> Tensor:
        """Return the stream of a derivative.

        Raises:
            MissingStreamError: it was not carried.
        """
        place = self._orders.place(terms)
        if place is None:
            raise MissingStreamError(terms)
        return self._data[place]


@final
class TorchJet(Jet):
    """The jet by forward-mode differentiation of the network itself.

    Args:
        net: the network, a function of one point.
        point: ``(inputs,)``.
    """

    def __init__(self, net: Callable[[Tensor], Any], point: Tensor) -> None:
        self._net = net
        self._point = point
        self.inputs = point.shape[-1]

    @property
    def value(self) -> Tensor:
        """The output."""
        value: Tensor = self._net(self._point)
        return value

    def derivative(self, terms: Terms) -> Tensor:
        """Return a sum of partial derivatives, each by one or two passes forward."""
        total: Tensor | None = None
        for indices, weight in terms:
            try:
                found = self._partial(indices, self._along)
            except NotImplementedError:
                # Not every activation can be differentiated forwards twice.
                found = self._partial(indices, self._across)
            found = found if weight == 1.0 else weight * found
            total = found if total is None else total + found
        assert total is not None
        return total

    def _partial(
        self,
        indices: Sequence[int],
        differentiated: Callable[[Function, int], Function],
    ) -> Tensor:
        partial = self._net
        for index in indices:
            partial = differentiated(partial, index)
        found: Tensor = partial(self._point)
        return found

    def _across(
        self, function: Callable[[Tensor], Any], index: int
    ) -> Callable[[Tensor], Any]:
        return lambda z: jacrev(function)(z)[..., index]

    def _along(
        self, function: Callable[[Tensor], Any], index: int
    ) -> Callable[[Tensor], Any]:
        axis = torch.zeros_like(self._point)
        axis[..., index] = 1.0
        return lambda z: jvp(function, (z,), (axis,))[1]
