"""One module that opens and closes another."""

from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.nn.composition import Composition, require_module

__all__ = ["Gate"]


class Gate(Composition):
    """One module that gates another: ``y = sigmoid(gate(x)) * value(x)``.

    Recursion, with ``s = sigmoid(gate(x))``: the value gets ``L_out diag(s)``, the gate
    ``L_out diag(value(x) s (1 - s))``.

    Args:
        gate: how far each output is open, before the sigmoid.
        value: what is let through.

    Shapes: ``(n, *in)`` to ``(n, *out)``; the gate may return sizes of 1 where it is
    one number for several outputs. Cost: the gate's and the value's.

    >>> unit = Gate(gate=nn.Linear(3, 1), value=nn.Linear(3, 5))
    >>> unit(torch.zeros(2, 3)).shape
    torch.Size([2, 5])
    """

    def __init__(self, gate: nn.Module, value: nn.Module) -> None:
        super().__init__()
        self.gate = require_module(gate, "gate")
        self.value = require_module(value, "value")

    def forward(self, *inputs: Any) -> Tensor:
        """Return ``sigmoid(gate(x)) * value(x)``; both get the same arguments."""
        return torch.sigmoid(self.gate(*inputs)) * self.value(*inputs)
