"""The input and the cotangents of a layer with the examples first."""

import torch
from torch import Tensor

from riemannian_modules.errors import LinearizationError
from riemannian_modules.rules.base import Call

__all__ = ["cotangents_by_example", "inputs_by_example", "require_plain"]


def inputs_by_example(call: Call, x: Tensor, kept: int) -> Tensor:
    """Return a tensor that lies like the output, examples first.

    Args:
        call: a call of a layer.
        x: ``(*places, *kept)``, with the examples somewhere in ``places``.
        kept: number of trailing dimensions that the layer mixes.

    Returns:
        ``(n, places of an example, *kept)``.

    Raises:
        LinearizationError: the examples are in the dimensions that the layer mixes.
    """
    return _by_example(call, x, kept, 0)


def cotangents_by_example(call: Call, kept: int) -> Tensor:
    """Return the cotangents at the first output, ``(r, n, places, *kept)``.

    Args:
        call: a call of a layer.
        kept: number of trailing dimensions that the layer mixes.

    Returns:
        The cotangents in the data type of the parameters.

    Raises:
        LinearizationError: the examples are in the dimensions that the layer mixes.
    """
    cotangents = call.cotangents[0]
    assert cotangents is not None
    return _by_example(call, cotangents.to(call.dtype), kept, 1)


def _by_example(call: Call, x: Tensor, kept: int, leading: int) -> Tensor:
    head, core = x.shape[:leading], x.shape[x.ndim - kept :]
    if call.examples == 1:
        return x.reshape(*head, 1, -1, *core)
    layout = call.layouts[0]
    if layout.dim >= x.ndim - leading - kept:
        remedy = (
            ". Dimension 0 of the outputs must be the examples: return z.transpose(0, "
            "1) if it is time, as for ctc_loss"
        )
        if x.ndim - leading == kept:
            remedy = "; give its input a batch dimension with unsqueeze(0)"
        raise LinearizationError(
            f"the examples of the batch are in dimension {layout.dim} of the output of "
            f"{call.label}, which takes that dimension for channels or positions"
            + remedy
        )
    front = layout.front(x, call.examples, leading)
    return front.reshape(*head, call.examples, -1, *core)


def require_plain(call: Call, *inherited: str) -> None:
    """Check that a call computes with the parameters of that name, and as torch does.

    Args:
        call: a call of a layer.
        *inherited: methods that a subclass must not have changed.

    Raises:
        LinearizationError: the layer is reparametrised, or changed by a subclass.
    """
    module = call.module
    other = set(call.wanted) - {"weight", "bias"}
    if other:
        raise LinearizationError(
            f"{call.label} computes its weight from {sorted(other)}; its rule knows "
            "'weight' and 'bias'"
        )
    for method in inherited:
        kind = type(module)
        owner = next(base for base in kind.__mro__ if method in vars(base))
        if not owner.__module__.startswith(torch.nn.__name__):
            raise LinearizationError(
                f"{call.label} is a {kind.__name__} with its own {method}; the rule of "
                "the layer that it is derived from does not hold"
            )
