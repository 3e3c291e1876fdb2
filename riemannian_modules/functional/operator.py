"""Residuals of differential equations, told apart from other functions of a network."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, final

from torch import Tensor, nn
from torch.func import vmap

from riemannian_modules.errors import LinearizationError, ShapeError
from riemannian_modules.functional.jet import MissingStreamError, StreamJet, TorchJet
from riemannian_modules.functional.orders import Orders
from riemannian_modules.functional.parameters import Parameters
from riemannian_modules.functional.streams import Recording, Streams, lift

__all__ = ["Beside", "DifferentialOperator", "network_of"]


class Beside(NamedTuple):
    """What a function gets besides the jet of its network.

    Attributes:
        network: the name of the network.
        tensors: the other members of Parameters by name, ``(n, *shape)`` each.
    """

    network: str
    tensors: Mapping[str, Tensor]


class _Members(dict[str, Any]):
    """The members of Parameters; says so where it is taken for a jet."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise LinearizationError(
            f"the model is a Parameters, so the first argument of the function is a "
            f"dictionary of {list(self)}, no Jet: write function(p, z) with "
            f'p["net"].{name} for a network called net, and p["nu"] for a coefficient '
            "called nu"
        )


def network_of(members: Mapping[str, Any]) -> str:
    """Return the name of the one network among the members of Parameters.

    Args:
        members: tensors, and functions or modules.

    Raises:
        LinearizationError: there is none, or there are several.
    """
    names = [name for name, each in members.items() if not isinstance(each, Tensor)]
    if len(names) != 1:
        raise LinearizationError(
            f"a DifferentialOperator carries derivatives through one network; the "
            f"modules among the Parameters are {names}. Give it structured=False, "
            "which differentiates any number of them"
        )
    return names[0]


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
            possible, nor is anything but ``u`` that depends on parameters. If the model
            is a :class:`Parameters`, ``u`` is a dictionary, with a Jet in the place of
            its network, and with its tensors.
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

    def __call__(
        self, net: Callable[..., Any] | Mapping[str, Any], z: Tensor, *more: Tensor
    ) -> Tensor:
        """Return the residual at one point, with torch.func.

        Args:
            net: the network, or the members of Parameters by name.
            z: the point.
            *more: further tensors of the example.
        """
        if not isinstance(net, Mapping):
            return self.function(TorchJet(net, z), z, *more)
        members = {
            name: each if isinstance(each, Tensor) else TorchJet(each, z)
            for name, each in net.items()
        }
        return self.function(_Members(members), z, *more)

    def residuals(self, net: nn.Module, *examples: Tensor) -> Tensor:
        """Return the residual at many points, for losses that autograd differentiates.

        By streams if ``structured``: some times faster than nested differentiation.

        Args:
            net: the network, or Parameters that hold it.
            *examples: points ``(n, inputs)`` and further tensors ``(n, ...)``.

        Returns:
            ``(n, *output)``.

        Raises:
            ShapeError: the points are no matrix.
            LinearizationError: derivatives are not carried through the network.
        """
        members = net() if isinstance(net, Parameters) else None
        if not self.structured:
            given = net if members is None else members
            outputs: Tensor = vmap(lambda *each: self(given, *each))(*examples)
            return outputs
        if members is None:
            return self.evaluate(net, examples)
        network, n = network_of(members), len(examples[0])
        run = members.pop(network)
        tensors = {name: each.expand(n, *each.shape) for name, each in members.items()}
        return self.evaluate(run, examples, beside=Beside(network, tensors))

    def evaluate(
        self,
        net: Callable[..., Any],
        examples: Sequence[Tensor],
        record: Recording | None = None,
        beside: Beside | None = None,
    ) -> Tensor:
        """Return the residual at many points by streams.

        Args:
            net: the network, which is called with streams.
            examples: points ``(n, inputs)`` and further tensors ``(n, ...)``.
            record: told of products with weights.
            beside: the other members of Parameters; None: there is a network alone.

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
                return self._at_all(end, examples, beside)
            except MissingStreamError as error:
                # Only a first evaluation comes here: it finds out what is asked for.
                orders = self._orders[inputs] = orders.including(error.terms)

    def _at_all(
        self, end: Streams, examples: Sequence[Tensor], beside: Beside | None
    ) -> Tensor:
        inputs = examples[0].shape[1]

        def residual(
            data: Tensor, tensors: dict[str, Tensor], *example: Tensor
        ) -> Tensor:
            jet = StreamJet(data, end.orders, inputs)
            if beside is None:
                return self.function(jet, *example)
            return self.function(_Members({**tensors, beside.network: jet}), *example)

        tensors = {} if beside is None else dict(beside.tensors)
        outputs: Tensor = vmap(residual)(end.data, tensors, *examples)
        return outputs
