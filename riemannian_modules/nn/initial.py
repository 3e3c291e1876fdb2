"""Where recurrences and iterations begin."""

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules.errors import ShapeError
from riemannian_modules.factors import DenseFactor, MetricFactor
from riemannian_modules.manifolds import Euclidean, MetricManifold
from riemannian_modules.manifolds.declaring import shape_problem
from riemannian_modules.manifolds.drawing import drawn
from riemannian_modules.nn.base import RiemannianModule
from riemannian_modules.rules import Call, register_rule

__all__ = ["InitialState", "Size", "initial_state", "shape_of", "zero_state"]

Size = int | tuple[int, ...]


class InitialState(RiemannianModule):
    """A learned state, the same for every example: ``h_i = value``.

    Args:
        size: shape of the state without the batch.
        manifold: where it lives; None: Euclidean, and it starts at zero. Else it
            starts at a random point.
        device: device of the parameter.
        dtype: floating point type of the parameter.

    Raises:
        ShapeError: no point of the manifold has the shape of the state.

    Shapes: any batch of n examples to ``(n, *size)``.

    >>> InitialState(3)(torch.zeros(2, 5)).shape
    torch.Size([2, 3])
    """

    value: Tensor

    def __init__(
        self,
        size: Size,
        manifold: geoopt.Manifold | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shape = shape_of(size)
        if manifold is None:
            start = torch.zeros(shape, device=device, dtype=dtype)
            self.declare("value", start, Euclidean())
        else:
            base = manifold.base if isinstance(manifold, MetricManifold) else manifold
            problem = shape_problem(base, shape)
            if problem is not None:
                raise ShapeError(
                    f"no state of shape {shape} lives on {base.name}: {problem}"
                )
            point = drawn(base, "random", shape, device=device, dtype=dtype)
            self.declare("value", point, manifold)

    def forward(self, x: Tensor) -> Tensor:
        """Return the state for every example of a batch.

        Args:
            x: ``(n, ...)``, of which only n matters.

        Returns:
            ``(n, *size)``.
        """
        # A copy: under no_grad a view of a parameter still asks for a gradient.
        return self.value.expand(len(x), *self.value.shape).clone()

    def extra_repr(self) -> str:
        """Say the size."""
        return "x".join(map(str, self.value.shape))


def initial_state(call: Call) -> dict[str, MetricFactor]:
    """Return the factor of a state that all examples begin at: the cotangents.

    Args:
        call: a call of an :class:`InitialState`.

    Returns:
        The factor.
    """
    return {"value": DenseFactor(call.cotangent().to(call.dtype).flatten(0, 1))}


register_rule(InitialState, initial_state)


def shape_of(size: Size) -> tuple[int, ...]:
    """Return a size as a shape."""
    return (size,) if isinstance(size, int) else tuple(size)


def zero_state(module: nn.Module, x: Tensor, size: Size) -> Tensor:
    """Return a state of zeros for the examples of a batch.

    Args:
        module: the module whose state it is; its data type is that of the state where
            the input is not floating.
        x: ``(n, ...)``.
        size: shape of the state without the batch.

    Returns:
        ``(n, *size)``.
    """
    dtype = x.dtype
    if not dtype.is_floating_point:
        kinds = (p.dtype for p in module.parameters())
        dtype = next(kinds, torch.get_default_dtype())
    return x.new_zeros(len(x), *shape_of(size), dtype=dtype)
