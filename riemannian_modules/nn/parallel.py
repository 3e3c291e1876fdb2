"""Modules side by side: on the same input, or each on its own."""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from riemannian_modules.errors import ShapeError
from riemannian_modules.nn.composition import (
    Composition,
    require_module,
    require_same_shape,
)

__all__ = ["Combine", "Join", "Parallel", "added"]

Combine = Literal["sum", "concat"]


class _Branches(Composition):
    def __init__(
        self, *modules: nn.Module, combine: Combine = "sum", dim: int = -1
    ) -> None:
        super().__init__()
        if combine not in ("sum", "concat"):
            raise ValueError(f"combine={combine!r}; choose 'sum' or 'concat'")
        if not modules:
            raise ValueError(f"{type(self).__name__} needs at least one module")
        self.combine = combine
        self.dim = dim
        self.by_operator = False
        for index, module in enumerate(modules):
            self.add_module(str(index), require_module(module, f"branch {index}"))

    @property
    def branches(self) -> list[nn.Module]:
        """The children in order; a module that is there twice counts twice."""
        return [child for child in self._modules.values() if child is not None]

    def extra_repr(self) -> str:
        """Say how the branches come together."""
        return "sum" if self.combine == "sum" else f"concat, dim={self.dim}"

    def _combined(self, outputs: Sequence[Tensor]) -> Tensor:
        if self.combine == "concat":
            return torch.cat(list(outputs), self.dim)
        total = outputs[0]
        for index, output in enumerate(outputs[1:], 1):
            require_same_shape(
                total,
                output,
                f"branches 0 and {index} of a sum; give all the same output size, or "
                "use combine='concat'",
            )
            total = total + output
        return total


class Parallel(_Branches):
    """Branches on the same input: ``y = sum_i f_i(x)``, or all ``f_i(x)`` side by side.

    ``f + g`` is ``Parallel(f, g)``, and sums made by ``+`` become one sum.

    Recursion: for a sum every branch gets ``L_out``, and
    ``L_in = L_out (A_1 + ... + A_k)``; for a concatenation branch i gets its block of
    columns.

    Args:
        modules: the branches, at least one.
        combine: ``"sum"`` or ``"concat"``.
        dim: dimension of the concatenation.

    Raises:
        ValueError: no branches, or an unknown ``combine``.

    Shapes: ``(n, *in)`` to ``(n, *out)``; for a sum all branches return the same shape.
    Cost: the sum of the branches'.

    >>> wide = Parallel(nn.Linear(3, 2), nn.Linear(3, 5), combine="concat")
    >>> wide(torch.zeros(4, 3)).shape
    torch.Size([4, 7])
    """

    def forward(self, *inputs: Any) -> Tensor:
        """Return the combined outputs; all branches get the same arguments."""
        return self._combined([branch(*inputs) for branch in self.branches])


class Join(_Branches):
    """Branches with an input each: ``y = sum_i f_i(x_i)``, or side by side.

    It makes one module out of several where a recurrence or a fixed point asks for a
    module of two arguments: ``Join(a, b)(x, z) = a(x) + b(z)``.

    Args:
        modules: the branches, as many as there will be inputs.
        combine: ``"sum"`` or ``"concat"``.
        dim: dimension of the concatenation.

    Raises:
        ValueError: no branches, or an unknown ``combine``.

    Shapes: ``(n, *in_i)`` each, to ``(n, *out)``. Cost: the sum of the branches'.

    >>> cell = Join(nn.Linear(3, 2), nn.Linear(2, 2))
    >>> cell(torch.zeros(4, 3), torch.zeros(4, 2)).shape
    torch.Size([4, 2])
    """

    def forward(self, *inputs: Any) -> Tensor:
        """Return the combined outputs.

        Args:
            inputs: one for each branch.

        Returns:
            Their sum or concatenation.

        Raises:
            ShapeError: not as many inputs as branches.
        """
        branches = self.branches
        if len(inputs) != len(branches):
            raise ShapeError(
                f"Join has {len(branches)} branches and got {len(inputs)} inputs; it "
                "takes one for each (Parallel gives all branches the same)"
            )
        return self._combined([f(x) for f, x in zip(branches, inputs, strict=True)])


def added(first: nn.Module, second: nn.Module) -> Parallel:
    """Return the sum of two modules; sums that ``+`` has made are joined.

    Args:
        first: a module.
        second: a module.

    Returns:
        The sum.
    """
    total = Parallel(*_terms(first), *_terms(second))
    total.by_operator = True
    return total


def _terms(module: nn.Module) -> list[nn.Module]:
    if isinstance(module, Parallel) and module.by_operator:
        return module.branches
    return [module]
