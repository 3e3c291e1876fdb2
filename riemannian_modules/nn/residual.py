"""A module beside a shortcut."""

from typing import Any

from torch import Tensor, nn

from riemannian_modules.nn.composition import (
    Composition,
    require_module,
    require_same_shape,
)

__all__ = ["Residual"]


class Residual(Composition):
    """A module beside a shortcut: ``y = shortcut(x) + scale * module(x)``.

    Recursion: ``L_in = L_out (A_shortcut + scale A_module)`` with ``A_shortcut = I``
    where there is no shortcut module; the module gets ``scale L_out``.

    Args:
        module: the branch that learns the difference.
        scale: its weight, a number.
        shortcut: what the input passes on the other branch; None: nothing, it is the
            identity.

    Shapes: ``(n, *in)`` to ``(n, *out)``; without a shortcut both are the same. Cost:
    the module's and the shortcut's.

    >>> import torch
    >>> block = Residual(nn.Linear(3, 3), scale=0.5)
    >>> x = torch.ones(2, 3)
    >>> torch.equal(block(x), x + 0.5 * block.module(x))
    True
    """

    def __init__(
        self, module: nn.Module, scale: float = 1.0, shortcut: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.module = require_module(module, "module")
        self.scale = float(scale)
        self.shortcut: nn.Module | None = None
        if shortcut is not None:
            self.shortcut = require_module(shortcut, "shortcut")

    def forward(self, x: Any) -> Tensor:
        """Return ``shortcut(x) + scale * module(x)``.

        Args:
            x: input.

        Returns:
            The sum.

        Raises:
            ShapeError: the two branches differ in shape.
        """
        short: Tensor = x if self.shortcut is None else self.shortcut(x)
        branch: Tensor = self.module(x)
        require_same_shape(
            short,
            branch,
            "a shortcut and the module beside it; give Residual a shortcut that ends "
            "in the module's output size",
        )
        return short + (branch if self.scale == 1.0 else self.scale * branch)

    def extra_repr(self) -> str:
        """Say the scale."""
        return f"scale={self.scale:g}"
