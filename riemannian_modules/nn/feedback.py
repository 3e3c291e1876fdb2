"""A loop of two modules."""

from typing import Any

import torch
from torch import Tensor, nn

from riemannian_modules.nn.adjoint import AdjointSolver
from riemannian_modules.nn.composition import require_module, require_same_shape
from riemannian_modules.nn.fixed_point import ImplicitModule
from riemannian_modules.nn.solvers import OnFailure, Solver

__all__ = ["Feedback"]


class Feedback(ImplicitModule):
    """A loop of two modules: the y with ``y = ahead(x + back(y))``.

    It is the fixed point of the chain of both, and begins with the open loop,
    ``ahead(x)``. With ``|A_ahead| |A_back| < 1`` there is exactly one. Negative
    feedback is a ``back`` with a minus in it. (A loop that joins x and ``back(y)`` in
    another way is a :class:`FixedPoint`.)

    Recursion: ``L_ahead = L_out (I - A_ahead A_back)^-1`` at the output of ``ahead``;
    ``L_back = L_ahead A_ahead`` at the output of ``back``, and ``L_in`` is the same.

    Args:
        ahead: from the input, with what comes back, to the output.
        back: from the output to what is added to the input.
        solver: as in :class:`ImplicitModule`.
        adjoint: as there.
        on_failure: as there.

    Shapes: ``(n, *in)`` to ``(n, *out)``. Cost: as :class:`FixedPoint`.

    >>> _ = torch.manual_seed(0)
    >>> back = nn.Linear(2, 3)
    >>> with torch.no_grad():
    ...     _ = back.weight.mul_(0.3)
    >>> loop = Feedback(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), back)
    >>> x = torch.randn(4, 3)
    >>> y = loop(x)
    >>> torch.allclose(y, loop.ahead(x + loop.back(y)), atol=1e-5)
    True
    """

    def __init__(
        self,
        ahead: nn.Module,
        back: nn.Module,
        *,
        solver: Solver | None = None,
        adjoint: AdjointSolver | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__(solver=solver, adjoint=adjoint, on_failure=on_failure)
        self.ahead = require_module(ahead, "ahead")
        self.back = require_module(back, "back")

    def start(self, x: Any) -> Tensor:
        """Return ``ahead(x)``."""
        with torch.no_grad():
            image: Tensor = self.ahead(x)
        return image

    def step(self, x: Any, z: Tensor) -> Tensor:
        """Return ``ahead(x + back(y))``.

        Raises:
            ShapeError: what comes back does not have the input's shape.
        """
        returned: Tensor = self.back(z)
        require_same_shape(
            x,
            returned,
            "the input of Feedback and what comes back to it; let back end in the size "
            "of the input",
        )
        image: Tensor = self.ahead(x + returned)
        return image
