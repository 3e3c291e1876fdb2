"""Operations whose forward derivative torch cannot differentiate again."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

__all__ = ["DifferentiableTwice"]


class DifferentiableTwice(TorchFunctionMode):
    """Writes layer norms out inside this scope.

    The forward derivative of torch's own takes mean and deviation for constants when
    it is differentiated again, in silence.

    >>> x, u = torch.tensor([0.0, 1.0, 3.0]), torch.tensor([1.0, 0.0, 0.0])
    >>> def slope(x):
    ...     return torch.func.jvp(lambda x: F.layer_norm(x, (3,)), (x,), (u,))[1]
    >>> with DifferentiableTwice():
    ...     exact = torch.func.jvp(slope, (x,), (u,))[1]
    >>> difference = (slope(x + 5e-3 * u) - slope(x - 5e-3 * u)) / 1e-2
    >>> torch.allclose(exact, difference, rtol=1e-2)
    True
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Call the function, or what stands for it."""
        written = _layer_norm if func in (F.layer_norm, torch.layer_norm) else func
        return written(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Tensor:
    del cudnn_enable
    dims = tuple(range(-len(normalized_shape), 0))
    centered = input - input.mean(dims, keepdim=True)
    found = centered * (centered.square().mean(dims, keepdim=True) + eps).rsqrt()
    if weight is not None:
        found = found * weight
    return found if bias is None else found + bias
