"""Residuals of differential equations, told apart from other functions of a network."""

from collections.abc import Callable, Sequence
from typing import Any, final

from torch import Tensor, nn
from torch.func import vmap

from riemannian_modules.errors import LinearizationError, ShapeError
from riemannian_modules.functional.jet import MissingStreamError, StreamJet, TorchJet
from riemannian_modules.functional.orders import Orders
from riemannian_modules.functional.streams import Recording, Streams, lift

__all__ = ["DifferentialOperator"]


@final
class DifferentialOperator:
    """A function of a network's value and derivatives at one point.

    Handed to :class:`FunctionalMetric` in the place of a function of the network, its
    derivatives are carried through the network together (forward Laplacian), and the
    factors of the linear layers keep their structure: K is not stored. The network is
    made of linear layers, smooth elementwise functions, sums and products of features;
    others need ``structured=False``.

    Args:
        function: ``function(u, z, *more)`` returns the residual at one point, a tensor
            of any shape; ``u`` is a :class:`Jet`, ``z`` the point ``(inputs,)``, and
            ``more`` are further tensors of this example. Branches on values are not
            possible, nor is anything but ``u`` that depends on parameters.
        structured: False: differentiate the network with torch.func, and store K.

    The Helmholtz equation ``lap u + 4 u = 0`` and a known boundary value:

    >>> import torch
    >>> import riemannian_modules as rm
    >>> _ = torch.manual_seed(0)
    >>> net = torch.nn.Sequential(
    ...     torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)
    ... ).double()
    >>> metric = rm.functional.FunctionalMetric(
    ...     net,
    ...     {
    ...         "inside": DifferentialOperator(
    ...             lambda u, z: u.laplacian() + 4 * u.value
    ...         ),
    ...         "edge": DifferentialOperator(lambda u, z, known: u.value - known),
    ...     },
    ...     {"inside": rm.output.Euclidean(), "edge": rm.output.Euclidean()},
    ... )
    >>> z = torch.rand(20, 2, dtype=torch.float64)
    >>> values = metric({"inside": z, "edge": (z[:5], torch.ones_like(z[:5, :1]))})
    >>> {name: tuple(each.shape) for name, each in values.items()}
    {'inside': (20, 1), 'edge': (5, 1)}
    """

    def __init__(
        self, function: Callable[..., Tensor], *, structured: bool = True
    ) -> None:
        if not callable(function):
            raise TypeError(
                f"a DifferentialOperator is made of a function of a Jet and a point, "
                f"got a {type(function).__name__}"
            )
        self.function = function
        self.structured = structured
        # What is asked for may depend on how many coordinates there are.
        self._orders: dict[int, Orders] = {}

    def __call__(self, net: Callable[..., Any], z: Tensor, *more: Tensor) -> Tensor:
        """Return the residual at one point, with torch.func.

        Args:
            net: the network.
            z: the point.
            *more: further tensors of the example.
        """
        return self.function(TorchJet(net, z), z, *more)

    def residuals(self, net: nn.Module, *examples: Tensor) -> Tensor:
        """Return the residual at many points, for losses that autograd differentiates.

        By streams if ``structured``: some times faster than nested differentiation.

        Args:
            net: the network.
            *examples: points ``(n, inputs)`` and further tensors ``(n, ...)``.

        Returns:
            ``(n, *output)``.

        Raises:
            ShapeError: the points are no matrix.
            LinearizationError: derivatives are not carried through the network.
        """
        if self.structured:
            return self.evaluate(net, examples)
        outputs: Tensor = vmap(self, (None, *[0] * len(examples)))(net, *examples)
        return outputs

    def evaluate(
        self,
        net: Callable[..., Any],
        examples: Sequence[Tensor],
        record: Recording | None = None,
    ) -> Tensor:
        """Return the residual at many points by streams.

        Args:
            net: the network, which is called with streams.
            examples: points ``(n, inputs)`` and further tensors ``(n, ...)``.
            record: told of products with weights.

        Returns:
            ``(n, *output)``.

        Raises:
            ShapeError: the points are no matrix.
            LinearizationError: derivatives are not carried through the network.
        """
        points = examples[0]
        if points.ndim != 2:
            raise ShapeError(
                f"a DifferentialOperator takes points of shape (n, inputs) first, got "
                f"{tuple(points.shape)}"
            )
        inputs = points.shape[1]
        orders = self._orders.get(inputs, Orders())
        while True:
            end = net(lift(points, orders, record))
            if not isinstance(end, Streams):
                raise LinearizationError(
                    f"the network returns a {type(end).__name__}, to which no "
                    "derivatives were carried; give the DifferentialOperator "
                    "structured=False, which differentiates any network"
                )
            try:
                return self._at_all(end, examples)
            except MissingStreamError as error:
                # Only a first evaluation comes here: it finds out what is asked for.
                orders = self._orders[inputs] = orders.including(error.terms)

    def _at_all(self, end: Streams, examples: Sequence[Tensor]) -> Tensor:
        inputs = examples[0].shape[1]

        def residual(data: Tensor, *example: Tensor) -> Tensor:
            return self.function(StreamJet(data, end.orders, inputs), *example)

        outputs: Tensor = vmap(residual)(end.data, *examples)
        return outputs
