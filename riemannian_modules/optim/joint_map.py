"""The derivative of the outputs of all processes, each of which knows its own."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from riemannian_modules.exchange import Exchange
from riemannian_modules.optim.output_map import OutputMap

__all__ = ["JointMap"]


class JointMap:
    """The linear map J of the joined batch of several processes.

    Outputs and cotangents stay where they are; what belongs to parameters is added up,
    with the share of every process, and is the same on all of them.

    Args:
        own: the map of this process' examples.
        exchange: the processes.
        share: weight of this process.
    """

    def __init__(self, own: OutputMap, exchange: Exchange, share: float) -> None:
        self._own = own
        self._exchange = exchange
        self._share = share

    @property
    def outputs(self) -> list[Tensor]:
        """The outputs of this process' examples, with their graph."""
        return self._own.outputs

    def pull(self, v: Sequence[Tensor]) -> dict[str, Tensor]:
        """Return the covectors of all parameters, of all processes."""
        return self._exchange.add(self._own.pull(v), self._share)

    def push(self, u: Mapping[str, Tensor]) -> list[Tensor]:
        """Return the velocity of each output of this process' examples."""
        return self._own.push(u)

    def lower(self, velocities: Sequence[Tensor]) -> list[Tensor]:
        """Return the cotangent of each velocity, of this process' examples."""
        return self._own.lower(velocities)

    def pairing(self, velocities: Sequence[Tensor], lowered: Sequence[Tensor]) -> float:
        """Return the product over all outputs of all processes."""
        return self.total(self._own.pairing(velocities, lowered))

    def total(self, value: float) -> float:
        """Return the weighted sum of a number over the processes."""
        own = torch.tensor(value, dtype=torch.float64, device=self.outputs[0].device)
        return float(self._exchange.add({"": own}, self._share)[""])
