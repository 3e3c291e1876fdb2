"""Cotangents at the outputs of a model, carried down to the uses of its layers."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge

from riemannian_modules.errors import NotRecordedError
from riemannian_modules.layout import Layout, keeps_apart
from riemannian_modules.reverse import joint, rescaled, reverse_passes, unit_scaled
from riemannian_modules.tape import Use

__all__ = [
    "NOT_FROM_IT",
    "Carried",
    "between",
    "by_use",
    "carry",
    "carry_to",
    "in_float16",
    "in_place",
    "require_some",
]

# What comes to the outputs of a use, and to the linear maps inside it.
Carried = tuple[Tensor | None, ...]

NOT_FROM_IT = (
    "these outputs do not come from the recorded pass; call the model inside "
    "metric.record() and hand on what it returned"
)


def carry(
    uses: Sequence[Use],
    outputs: Sequence[Tensor],
    stacks: Sequence[Tensor],
    *,
    batched: bool | None,
    keep: bool = False,
) -> tuple[list[list[Carried]], bool]:
    """Carry cotangents down to the outputs of every use.

    Args:
        uses: recorded calls.
        outputs: the model's outputs.
        stacks: cotangents at each output, ``(k, n, *output)``.
        batched: see :func:`riemannian_modules.reverse.reverse_passes`.
        keep: whether to keep the graph.

    Returns:
        For each pass, each use and each of its differentiable outputs ``(cotangents of
        the pass, *shape)`` or None, and whether all were carried at once.

    Raises:
        NotRecordedError: the outputs do not come from the recorded pass, or there is
            neither an output metric nor a loss.
    """
    require_some(stacks)
    edges = [edge for use in uses for edge in use.edges]
    passes, batched = carry_to(
        edges,
        outputs,
        stacks,
        half=in_float16(uses, outputs),
        batched=batched,
        keep=keep,
    )
    if all(each is None for flat in passes for each in flat):
        raise NotRecordedError(NOT_FROM_IT)
    return [by_use(uses, flat) for flat in passes], batched


def require_some(stacks: Sequence[Tensor]) -> None:
    """Check that there is something to carry.

    Args:
        stacks: cotangents at each output, none of them without a metric and a loss.

    Raises:
        NotRecordedError: there is not.
    """
    if not stacks:
        raise NotRecordedError(
            "there is nothing to pull back: the metric was built with output=None and "
            "no loss was given; use metric.backward(loss, outputs)"
        )


def carry_to(
    edges: Sequence[GradientEdge],
    outputs: Sequence[Tensor],
    stacks: Sequence[Tensor],
    *,
    half: bool,
    batched: bool | None,
    keep: bool,
) -> tuple[list[list[Tensor | None]], bool]:
    """Carry cotangents down to places in the graph.

    Args:
        edges: the places.
        outputs: the model's outputs.
        stacks: cotangents at each output, ``(k, n, *output)``.
        half: whether float16 is on the way.
        batched: see :func:`riemannian_modules.reverse.reverse_passes`.
        keep: whether to keep the graph.

    Returns:
        As :func:`riemannian_modules.reverse.reverse_passes`.
    """
    active = [i for i, output in enumerate(outputs) if output.requires_grad]
    back = None
    if half:
        stacks, back = unit_scaled(stacks)
    passes, batched = reverse_passes(
        [outputs[i] for i in active],
        edges,
        [stacks[i].to(outputs[i].dtype) for i in active],
        batched=batched,
        keep=keep,
    )
    if back is not None:
        flat = joint(passes)
        passes = [[None if each is None else rescaled(each, back) for each in flat]]
    return passes, batched


def in_float16(uses: Sequence[Use], outputs: Sequence[Tensor]) -> bool:
    """Whether cotangents have to be scaled, float16 being somewhere on their way.

    Its range is short; bfloat16 has that of float32.
    """
    dtypes = {use.dtype for use in uses} | {output.dtype for output in outputs}
    return torch.float16 in dtypes


def by_use(uses: Sequence[Use], flat: Sequence[Tensor | None]) -> list[Carried]:
    """Return what was carried to the edges of all uses, use by use."""
    pieces = iter(flat)
    found = [tuple([next(pieces) for _ in use.edges]) for use in uses]
    return [
        tuple(map(_in_shape, own, use.shapes)) if use.inside else own
        for own, use in zip(found, uses, strict=True)
    ]


def _in_shape(carried: Tensor | None, shape: torch.Size) -> Tensor | None:
    return None if carried is None else carried.reshape(len(carried), *shape)


def between(carried: Sequence[Carried], start: int, stop: int) -> list[Carried]:
    """Return some of the cotangents of every use."""
    return [
        tuple([None if each is None else each[start:stop] for each in own])
        for own in carried
    ]


def in_place(
    carried: Sequence[Carried],
    like: Sequence[Carried],
    layouts: Sequence[Sequence[Layout]],
    scales: Tensor,
    rounding: float,
) -> bool:
    """Whether every example is where its layout says.

    Args:
        carried: for each use a cotangent whose examples were sent out with scales.
        like: the same without them.
        layouts: where the examples are said to be.
        scales: those of the examples, ``(n,)``.
        rounding: the unit of rounding on the way.
    """
    return all(
        keeps_apart(each[-1], plain[0], scales, layout, rounding)
        for cotangents, plains, own in zip(carried, like, layouts, strict=True)
        for each, plain, layout in zip(cotangents, plains, own, strict=True)
        if each is not None and plain is not None and layout.dim >= 0
    )
