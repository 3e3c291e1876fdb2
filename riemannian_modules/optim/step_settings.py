"""What tells one kind of captured step from another: all but numbers in tensors."""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from riemannian_modules.capture.memory import memory_of
from riemannian_modules.mass import Mass
from riemannian_modules.optim.rsgd import RiemannianSGD
from riemannian_modules.output import OutputMetric

__all__ = [
    "PLAIN",
    "Key",
    "copied",
    "key_of",
    "looks_of",
    "settings_of",
    "written_back",
]

_PLAIN = bool | int | float | str | None

Key = tuple[object, ...]
# What may stand beside the tensors in arguments: it stays what it is.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
PLAIN += (torch.Generator, Enum)  # type: ignore[assignment]


def key_of(flat: Sequence[Any], spec: Any, device: str) -> Key:
    """Return what tells calls apart, and the modes that they are made in.

    Args:
        flat: the leaves of the arguments.
        spec: how they are nested.
        device: the kind of the parameters' device.
    """
    tensors = [each for each in flat if isinstance(each, Tensor)]
    others = [each for each in flat if not isinstance(each, Tensor)]
    return (
        # With dictionaries it has no hash in older versions of torch.
        repr(spec),
        tuple([isinstance(each, Tensor) for each in flat]),
        tuple(map(_exactly, others)),
        tuple(map(looks_of, tensors)),
        _shared_memory(tensors),
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device),
    )


def copied(
    tensors: Sequence[Tensor], args: Any, kwargs: Any
) -> tuple[Sequence[Tensor], Any, Any]:
    """Return arguments with copies of their tensors, where these are alike.

    Args:
        tensors: those in the arguments.
        args: arguments.
        kwargs: those with names.
    """
    plain = all(
        t.layout is torch.strided and t.is_contiguous() and not t.requires_grad
        for t in tensors
    )
    if not plain or len(set(map(memory_of, tensors))) < len(tensors):
        return tensors, args, kwargs
    copies = {id(tensor): tensor.clone() for tensor in tensors}
    args, kwargs = tree_map_only(Tensor, lambda t: copies[id(t)], (args, kwargs))
    return list(copies.values()), args, kwargs


def written_back(tensors: Sequence[Tensor], copies: Sequence[Tensor]) -> None:
    """Let tensors have what a step has written to their copies.

    Args:
        tensors: what was given.
        copies: what :func:`copied` returned, or the same tensors.
    """
    distinct = {id(tensor): tensor for tensor in tensors}.values()
    for tensor, copy in zip(distinct, copies, strict=False):
        if copy is not tensor and copy._version:
            tensor.copy_(copy)


def settings_of(optimizer: RiemannianSGD) -> Key:
    """Return all that steps depend on and that is no tensor.

    Args:
        optimizer: whose steps they are.
    """
    metric = optimizer.metric
    options = [
        _exactly(value) if isinstance(value, _PLAIN) else type(value)
        for group in optimizer.param_groups
        for name, value in group.items()
        if name != "params"
    ]
    return (
        tuple(options),
        tuple([_weighs(declared.mass) for declared in metric.parameters]),
        tuple([declared.tensor.dtype for declared in metric.parameters]),
        next(iter(metric.parameters)).tensor.device,
        metric.gradients.fills,
        metric.is_frozen,
        metric.reduction,
        metric.precision,
        metric.solver,
        metric.max_memory,
        _Same(optimizer.retraction),
        _Same(metric.output),
        # Probes, for one: a schedule changes them.
        _plain(metric.output),
    )


def _weighs(mass: Mass) -> Key:
    if mass.is_scalar:
        # A schedule makes another one of the same number.
        return (_exactly(mass.scalar),)
    return (_Same(mass),)


def _plain(output: object) -> Key:
    if isinstance(output, _PLAIN):
        return (_exactly(output),)
    if isinstance(output, Tensor | torch.Generator):
        return (_Same(output),)
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, OutputMetric):
        output = list(vars(output).values())
    if not isinstance(output, list | tuple):
        return ()
    return tuple([part for each in output for part in _plain(each)])


def _exactly(value: object) -> object:
    """Return what only equals itself, where Python's 1, 1.0 and True are equal.

    Args:
        value: hashable.
    """
    if isinstance(value, float):
        return float, value.hex()
    return type(value), repr(value) if isinstance(value, complex) else value


def looks_of(tensor: Tensor) -> Key:
    """Return all of a tensor that operations depend on, but its numbers and its place.

    Args:
        tensor: any.
    """
    if tensor.layout is not torch.strided:
        return type(tensor), tensor.layout
    lies = tensor.shape, tensor.stride(), tensor.is_conj(), tensor.is_neg()
    kind = type(tensor), tensor.dtype, tensor.device, tensor.requires_grad
    return *lies, *kind


def _shared_memory(tensors: Sequence[Tensor]) -> Key:
    """Return which tensors lie in the same memory, and how far from each other.

    Args:
        tensors: any.
    """
    if len(tensors) < 2 or any(t.layout is not torch.strided for t in tensors):
        return ()
    storages = [memory_of(tensor) for tensor in tensors]
    first = [storages.index(storage) for storage in storages]
    found = []
    for at, tensor in zip(first, tensors, strict=True):
        other = tensors[at]
        apart = tensor.storage_offset() - other.storage_offset()
        found.append((at, apart, tensor is other))
    return tuple(found)


class _Same:
    """Something that is equal to itself alone, and lives as long as this does."""

    __slots__ = ("_it",)

    def __init__(self, it: object) -> None:
        self._it = it

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self._it is other._it

    def __hash__(self) -> int:
        return id(self._it)
