"""One reverse pass for many cotangents: the recursion ``L_{a-1} = L_a A_a``."""

import warnings
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

__all__ = [
    "FEW",
    "batching_pays",
    "joint",
    "reverse_pass",
    "reverse_passes",
    "single_pass",
]

# So few cotangents are carried faster one by one.
FEW = 2
# Operations that torch carries one by one all the same, and copies the results of.
_ONE_BY_ONE = (
    "Convolution",
    "MaxPool",
    "AvgPool",
    "AdaptiveAvgPool",
    "AdaptiveMaxPool",
)


def batching_pays(operations: Iterable[object], device: torch.device) -> bool:
    """Whether a graph is faster with all cotangents at once than one by one.

    Args:
        operations: what is in the graph, names of operations among it.
        device: where it runs; off the CPU every call from Python costs more.

    >>> cpu = torch.device("cpu")
    >>> batching_pays(["AddmmBackward0"], cpu)
    True
    >>> batching_pays(["ConvolutionBackward0"], cpu)
    False
    """
    if device.type != "cpu":
        return True
    names = [each for each in operations if isinstance(each, str)]
    return not any(name.startswith(_ONE_BY_ONE) for name in names)


def reverse_pass(
    outputs: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    batched: bool | None,
    keep: bool = False,
) -> tuple[list[Tensor | None], bool]:
    """Carry cotangents at the outputs back to places in the graph.

    Args:
        outputs: see :func:`reverse_passes`, as all others.
        edges: places in the autograd graph.
        cotangents: ``(k, n, *output)`` for each output.
        batched: whether all at once, or None.
        keep: whether to keep the graph.

    Returns:
        For each edge a tensor ``(k, *shape)`` or None if the outputs do not depend
        on it, and whether the pass was batched.

    Raises:
        RuntimeError: autograd refuses the pass.
    """
    found, batched = reverse_passes(
        outputs, edges, cotangents, batched=batched, keep=keep
    )
    return joint(found), batched


def joint(passes: Sequence[Sequence[Tensor | None]]) -> list[Tensor | None]:
    """Return what several passes carried to each place, one after the other."""
    if len(passes) == 1:
        return list(passes[0])
    found = []
    for own in zip(*passes, strict=True):
        pieces = [each for each in own if each is not None]
        found.append(torch.cat(pieces) if pieces else None)
    return found


def reverse_passes(
    outputs: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    batched: bool | None,
    keep: bool = False,
) -> tuple[list[list[Tensor | None]], bool]:
    """Carry cotangents at the outputs back to places in the graph, in one pass or more.

    Nothing is differentiated with respect to parameters or the model's input.

    Args:
        outputs: model outputs, ``(n, *output)`` each.
        edges: places in the autograd graph, for instance layer outputs.
        cotangents: ``(k, n, *output)`` for each output.
        batched: True: all cotangents at once, if there are more than two. False: one
            by one. None: find out whether the graph can be batched (compiled ones
            cannot), and keep it.
        keep: whether to keep the graph; else it is freed.

    Returns:
        For each pass, and each edge, a tensor ``(cotangents of the pass, *shape)`` or
        None if the outputs do not depend on it; and whether it was one pass for all.

    Raises:
        RuntimeError: autograd refuses the pass.
    """
    count = len(cotangents[0])
    if batched is None or (batched and count > FEW):
        try:
            keep = keep or batched is None
            found = _batched(outputs, edges, cotangents, keep=keep)
        except RuntimeError:
            if batched:
                raise
        else:
            return [list(found)], True
    passes = []
    for index in range(count):
        grads = single_pass(
            outputs,
            edges,
            [cotangent[index] for cotangent in cotangents],
            keep=keep or batched is None or index + 1 < count,
        )
        passes.append([None if g is None else g.unsqueeze(0) for g in grads])
    return passes, False


def single_pass(
    outputs: Sequence[Tensor],
    places: Sequence[Tensor | GradientEdge],
    cotangents: Sequence[Tensor] | None,
    *,
    keep: bool,
) -> tuple[Tensor | None, ...]:
    """Carry one cotangent back to places in the graph.

    Args:
        outputs: where it begins.
        places: where it is wanted.
        cotangents: of the shape of each output; None: ones, for a scalar.
        keep: whether to keep the graph.

    Returns:
        For each place a tensor, or None if the outputs do not depend on it.

    Raises:
        RuntimeError: autograd refuses the pass.
    """
    grads: tuple[Tensor | None, ...] = torch.autograd.grad(
        outputs,
        places,  # type: ignore[arg-type]
        cotangents,
        allow_unused=True,
        retain_graph=keep,
    )
    return grads


def _batched(
    outputs: Sequence[Tensor],
    edges: Sequence[GradientEdge],
    cotangents: Sequence[Tensor],
    *,
    keep: bool,
) -> tuple[Tensor | None, ...]:
    grads: tuple[Tensor | None, ...]
    with warnings.catch_warnings():
        # torch says so, over and over, of operations that it carries one by one.
        warnings.filterwarnings("ignore", "There is a performance drop")
        grads = torch.autograd.grad(
            outputs,
            edges,
            cotangents,
            is_grads_batched=True,
            allow_unused=True,
            retain_graph=keep,
        )
    return grads
