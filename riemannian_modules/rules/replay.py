"""What rules share that run a layer again, batch first, to see inside it."""

from collections.abc import Iterable, Mapping
from operator import attrgetter

import torch
from torch import Tensor

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import MetricFactor, joined
from riemannian_modules.layout import Layout
from riemannian_modules.rules.base import Call
from riemannian_modules.rules.parametrized import held_still

__all__ = ["batch_layout", "collected", "positions", "require_same", "weight"]


def weight(call: Call, path: str) -> Tensor | None:
    """Return a parameter of the layer in its own data type, or None without it.

    Args:
        call: a call of the layer.
        path: the attribute.

    Returns:
        A plain tensor.
    """
    try:
        with held_still(call.module):
            found = attrgetter(path)(call.module)
    except AttributeError:
        return None
    if found is None:
        return None
    plain: Tensor = found.detach().as_subclass(Tensor).to(call.dtype)
    return plain


def batch_layout(call: Call, dims: Mapping[int, int]) -> Layout:
    """Return where the examples are in the layer's own batch dimension.

    Args:
        call: a call of a layer that has a batch dimension.
        dims: this dimension in each of its outputs.

    Returns:
        The layout of a tensor that has this dimension first.

    Raises:
        LinearizationError: the examples are elsewhere.
    """
    if call.examples == 1:
        return Layout()
    layouts = {
        Layout(layout.dim - dims[place], layout.major)
        for place, layout, cotangent in zip(
            call.places, call.layouts, call.cotangents, strict=True
        )
        if cotangent is not None
    }
    if len(layouts) == 1 and (found := layouts.pop()).dim == 0:
        return found
    raise LinearizationError(
        f"{call.label} ({type(call.module).__name__}) saw the {call.examples} examples "
        "of the batch in another dimension than its own batch dimension. Dimension 0 "
        "of the outputs must be the examples: return z.transpose(0, 1) if it is time, "
        "as for ctc_loss; else check the layer's batch_first"
    )


def positions(tensor: Tensor, layout: Layout, examples: int, leading: int) -> Tensor:
    """Return a tensor by example and position, for the structured factors.

    Args:
        tensor: ``(*leading, batch, positions, width)``.
        layout: where the examples are in the batch.
        examples: number n of examples.
        leading: number of leading dimensions.

    Returns:
        ``(*leading, n, positions, width)``; what else the batch holds are positions.
    """
    front = layout.front(tensor, examples, leading)
    if front.ndim > leading + 3:
        front = front.flatten(leading + 1, -2)
    return front.contiguous()


def require_same(call: Call, outputs: Mapping[int, Tensor]) -> None:
    """Compare the outputs of the replay with the recorded ones.

    On other devices than the CPU, where this waits for the device, only the first
    pass through a graph is compared.

    Args:
        call: a call with its values.
        outputs: the replay's outputs by place.

    Raises:
        LinearizationError: they differ by more than rounding.
    """
    known = call.memo.get("compared", False)
    for place, recorded in zip(call.places, call.values, strict=True):
        if recorded.is_meta or (known and recorded.device.type != "cpu"):
            continue
        own, eps = outputs[place], torch.finfo(recorded.dtype).eps
        size, error = recorded.norm(), torch.full((), torch.inf)
        if own.shape == recorded.shape:
            error = (own.to(recorded.dtype) - recorded).norm()
        # Written so that NaN is refused, too.
        if not bool(error <= eps**0.5 * (size + 1e-30)):
            raise LinearizationError(
                f"{call.label} ({type(call.module).__name__}) does not give the "
                f"recorded outputs when it is run again: they differ by "
                f"{float(error):.1e}, their norm is {float(size):.1e}. Keep hooks and "
                "parametrizations from changing what the layer computes"
            )
    call.memo["compared"] = True


def collected(
    call: Call, uses: Iterable[tuple[str, MetricFactor]]
) -> dict[str, MetricFactor]:
    """Return the factors that are wanted; uses of one parameter are added.

    Args:
        call: a call of the layer.
        uses: attribute and factor of each use of a parameter.

    Returns:
        One factor for each wanted parameter.

    Raises:
        LinearizationError: a wanted parameter is none of these, for instance the
            original of a parametrization.
    """
    own = call.module.named_parameters(remove_duplicate=False)
    identity = {path: id(parameter) for path, parameter in own}
    found: dict[int, list[MetricFactor]] = {}
    for path, factor in uses:
        if path in identity:
            found.setdefault(identity[path], []).append(factor)
    unknown = [path for path in call.wanted if identity[path] not in found]
    if unknown:
        raise LinearizationError(
            f"{call.label} ({type(call.module).__name__}) holds parameters that its "
            f"rule does not know: {', '.join(map(repr, unknown))}"
        )
    return {path: joined(found[identity[path]]) for path in call.wanted}
