"""Residuals of differential equations, told apart from other functions of a network."""

from collections.abc import Callable
from typing import Any, final

from torch import Tensor

from riemannian_modules.functional.jet import Jet, TorchJet

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

    def __call__(self, net: Callable[..., Any], z: Tensor, *more: Tensor) -> Tensor:
        """Return the residual at one point, with torch.func.

        Args:
            net: the network.
            z: the point.
            *more: further tensors of the example.
        """
        return self.function(TorchJet(net, z), z, *more)

    def at(self, jet: Jet, z: Tensor, *more: Tensor) -> Tensor:
        """Return the residual for a jet that is known.

        Args:
            jet: the network at the point.
            z: the point.
            *more: further tensors of the example.
        """
        return self.function(jet, z, *more)
