"""The gradient of a pass that renews no rows: autograd's own."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from riemannian_modules.checks import output_costates
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.linearization import Linearization
from riemannian_modules.survey import foreign_leaves

__all__ = ["gradient_alone", "paired"]


def gradient_alone(
    loss: Tensor,
    outputs: Sequence[Tensor],
    parameters: DeclaredParameters,
    foreign: Sequence[Tensor] | None,
) -> Linearization:
    """Return a linearisation without factors. Cost: an ordinary backward pass.

    Args:
        loss: scalar.
        outputs: the model's outputs.
        parameters: the model's parameters.
        foreign: other parameters that the loss depends on; None: look for them.

    Raises:
        NotRecordedError, ShapeError, NonFiniteError: as
            :func:`riemannian_modules.checks.output_costates`.
    """
    declared = list(parameters)
    others = foreign_leaves(loss, parameters) if foreign is None else foreign
    places = [*(each.tensor for each in declared), *others]
    _, grads = output_costates(loss, outputs, places)
    own = _apart(grads[: len(declared)])
    gradient = {d.name: g for d, g in zip(declared, own, strict=True) if g is not None}
    rest = paired(others, grads[len(declared) :])
    return Linearization(
        list(gradient), {}, gradient, None, None, None, {}, foreign=rest
    )


def paired(
    tensors: Sequence[Tensor], grads: Sequence[Tensor | None]
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Return parameters with their gradients, of their own data type and memory."""
    return tuple(
        (tensor, grad.detach().clone().to(tensor.dtype))
        for tensor, grad in zip(tensors, grads, strict=True)
        if grad is not None
    )


def _apart(grads: Sequence[Tensor | None]) -> Iterator[Tensor | None]:
    """Yield gradients of memory of their own, as autograd leaves them in ``.grad``."""
    seen = set()
    for grad in grads:
        if grad is None:
            yield None
            continue
        dense = grad.to_dense() if grad.is_sparse else grad
        if dense.data_ptr() in seen or not dense.is_contiguous():
            dense = dense.clone(memory_format=torch.contiguous_format)
        seen.add(dense.data_ptr())
        yield dense
