"""One module, over and over along time."""

from typing import Literal

import torch
from torch import Tensor, nn

from riemannian_modules.errors import ShapeError
from riemannian_modules.nn.composition import (
    Composition,
    require_module,
    require_same_shape,
)
from riemannian_modules.nn.initial import InitialState, Size, shape_of, zero_state

__all__ = ["Recurrent"]


class Recurrent(Composition):
    """One module along time: ``h_(t+1) = cell(x_t, h_t)`` with the same weights.

    Recursion, with the rows that enter at each output time: ``L_t = L_(t+1) A_t`` and
    ``K = sum_t L_(t+1) B_t``: the factors of all times add up before any Gram is
    formed, for one weight is one variable.

    Args:
        cell: a module of two arguments, input and state, that returns the next state:
            :class:`torch.nn.GRUCell`, or a chain that begins with :class:`Join`.
        size: shape of the state without the batch.
        initial: where the state begins if a call does not say: ``"zero"``;
            ``"learned"``, a parameter that starts at zero; or an :class:`InitialState`.
        output: ``"sequence"``: all states after the first; ``"last"``: the last one.
        dim: dimension of time, in the input and in the sequence.

    Raises:
        ValueError: an unknown ``initial`` or ``output``.

    Shapes: ``(n, time, *in)`` to ``(n, time, *size)`` or ``(n, *size)``. Cost: that of
    the cell for each time.

    >>> from riemannian_modules.nn import Join, Sequential
    >>> cell = Sequential(Join(nn.Linear(3, 4), nn.Linear(4, 4)), nn.Tanh())
    >>> Recurrent(cell, 4)(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 5, 4])
    >>> Recurrent(cell, 4, initial="learned", output="last")(torch.zeros(2, 5, 3)).shape
    torch.Size([2, 4])
    """

    def __init__(
        self,
        cell: nn.Module,
        size: Size,
        *,
        initial: Literal["zero", "learned"] | InitialState = "zero",
        output: Literal["sequence", "last"] = "sequence",
        dim: int = 1,
    ) -> None:
        super().__init__()
        if output not in ("sequence", "last"):
            raise ValueError(f"output={output!r}; choose 'sequence' or 'last'")
        self.cell = require_module(cell, "cell")
        self.size = shape_of(size)
        self.output = output
        self.dim = dim
        self.initial: InitialState | None = None
        if initial == "learned":
            like = next(cell.parameters(), torch.empty(0))
            self.initial = InitialState(size, device=like.device, dtype=like.dtype)
        elif isinstance(initial, InitialState):
            self.initial = initial
        elif initial != "zero":
            raise ValueError(
                f"initial={initial!r}; choose 'zero', 'learned' or an InitialState"
            )

    def forward(self, x: Tensor, state: Tensor | None = None) -> Tensor:
        """Return the states, or the last one.

        Args:
            x: ``(n, time, *in)``.
            state: where it begins, ``(n, *size)``.

        Returns:
            ``(n, time, *size)``, or ``(n, *size)``.

        Raises:
            ShapeError: there is no time in x, or the cell changes the state's shape.
        """
        inputs = x.unbind(self.dim)
        if not inputs:
            raise ShapeError(
                f"an input of shape {tuple(x.shape)} has no times in dimension "
                f"{self.dim}; Recurrent needs at least one"
            )
        if state is None:
            state = self._start(inputs[0])
        states = []
        for each in inputs:
            following: Tensor = self.cell(each, state)
            require_same_shape(
                state,
                following,
                "a state and the next one; give Recurrent the size that the cell "
                "returns",
            )
            state = following
            states.append(state)
        return torch.stack(states, self.dim) if self.output == "sequence" else state

    def _start(self, x: Tensor) -> Tensor:
        if self.initial is None:
            return zero_state(self, x, self.size)
        state: Tensor = self.initial(x)
        return state

    def extra_repr(self) -> str:
        """Say the size and what is returned."""
        return f"size={'x'.join(map(str, self.size))}, output={self.output}"
