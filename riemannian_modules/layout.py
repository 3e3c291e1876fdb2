"""Where the examples of a batch are in a tensor inside the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Layout", "bit_probes", "candidates", "find_layout"]


@dataclass(frozen=True)
class Layout:
    """The dimension that holds the examples, alone or folded with another one.

    Attributes:
        dim: the dimension; its size is ``n q`` for n examples.
        major: whether the examples are the slow index of it, ``(n, q)``; else
            ``(q, n)``.
    """

    dim: int = 0
    major: bool = True

    def front(self, tensor: Tensor, examples: int, leading: int = 0) -> Tensor:
        """Return the tensor with the examples first.

        Args:
            tensor: ``(*leading, *shape)``.
            examples: number n of examples.
            leading: number of leading dimensions that are not part of the layout.

        Returns:
            ``(*leading, n, *rest)``; where they were folded, q stays in place.
        """
        dim = leading + self.dim
        if tensor.shape[dim] == examples:
            return tensor if self.dim == 0 else tensor.movedim(dim, leading)
        sizes = (examples, -1) if self.major else (-1, examples)
        return tensor.unflatten(dim, sizes).movedim(dim + (not self.major), leading)

    def single(self, example: Tensor, folded: bool) -> Tensor:
        """Return one example, as it lies along :meth:`front`, as a batch of one.

        Args:
            example: ``rest``.
            folded: whether the dimension also holds something else.

        Returns:
            The tensor with the number of dimensions that it had in the batch.
        """
        return example if folded else example.unsqueeze(self.dim)


def candidates(shape: Sequence[int], examples: int) -> Iterator[Layout]:
    """Yield the layouts that a tensor of this shape can have, unfolded ones first."""
    exact = [dim for dim, size in enumerate(shape) if size == examples]
    yield from (Layout(dim) for dim in exact)
    for dim, size in enumerate(shape):
        if size > examples and size % examples == 0:
            yield from (Layout(dim, major) for major in (True, False))


def bit_probes(outputs: Tensor) -> Tensor:
    """Return cotangents that tell the examples apart.

    Example i takes part in two cotangents for each binary digit of i: where the digit
    is 1, or where it is 0. Of any two examples one is there and the other is not.

    Args:
        outputs: ``(n, *output)``.

    Returns:
        ``(k, n, *output)`` with k of the order of ``2 log2 n``; none for n = 1.
    """
    n = len(outputs)
    bits = torch.arange((n - 1).bit_length(), device=outputs.device).unsqueeze(1)
    digits = torch.arange(n, device=outputs.device).bitwise_right_shift(bits) & 1
    masks = torch.cat([digits, 1 - digits]).to(outputs.dtype)
    pattern = torch.linspace(
        1.0, 2.0, outputs.numel(), dtype=outputs.dtype, device=outputs.device
    ).view_as(outputs)
    return masks.view(*masks.shape, *[1] * (outputs.ndim - 1)) * pattern


def find_layout(probes: Tensor, examples: int) -> tuple[Layout | None, bool]:
    """Find where the examples are from what the probes of the outputs have become.

    A gradient is a sum over examples and does not notice rows that end up in another
    example; where a probe leaves an example out, its part must stay exactly zero.

    Args:
        probes: the cotangents of :func:`bit_probes`, carried to a tensor of the model,
            ``(k, *shape)``.
        examples: number n of examples.

    Returns:
        The layout, or None if there is none: the examples interact, or the tensor is
        shared by all. And whether the probes told: they do not where they vanish.
    """
    shape = probes.shape[1:]
    if len(probes) == 0 or probes.is_meta:
        return next(candidates(shape, examples), None), True
    bits = len(probes) // 2
    index = torch.arange(examples, device=probes.device)
    absent = torch.stack(
        [index.bitwise_right_shift(bit) & 1 == 0 for bit in range(bits)]
    )
    absent = torch.cat([absent, ~absent])
    # A value that is not finite is another error, found with the gradient.
    touched = (probes != 0) & torch.isfinite(probes)
    told = bool(touched.any())
    for layout in candidates(shape, examples):
        front = layout.front(touched, examples, 1)
        by_example = front.reshape(*front.shape[:2], -1).any(-1)
        if not bool((by_example & absent).any()):
            return layout, told
    return None, told
