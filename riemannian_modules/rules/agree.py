"""Whether what was made twice is the same, or the same but for rounding."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

__all__ = ["agree", "same"]


def agree(
    one: Mapping[str, Tensor], scaled: Callable[[float], Mapping[str, Tensor]]
) -> bool:
    """Whether rows of the same parameters are the same but for rounding.

    Args:
        one: rows by parameter.
        scaled: makes those that are right, multiplied by a number that the cotangents
            are multiplied with.
    """
    other = scaled(1.0)
    sizes = {name: each.abs().amax() for name, each in other.items() if each.numel()}
    if not sizes:
        return True
    largest = torch.stack([size.double() for size in sizes.values()]).max()
    rounding: Tensor | None = None
    for name, size in sizes.items():
        eps = torch.finfo(size.dtype).eps
        # A derivative that vanishes is rounding of the others.
        bound = eps**0.5 * size + 1e3 * eps * largest
        error = (one[name] - other[name]).abs().amax()
        if bool(error <= bound):
            continue
        # Where terms cancel, all derivatives are rounding of what is not seen here.
        rounding = _rounding(other, scaled) if rounding is None else rounding
        if not bool(error <= 16.0 * rounding):
            return False
    return True


def _rounding(
    rows: Mapping[str, Tensor], scaled: Callable[[float], Mapping[str, Tensor]]
) -> Tensor:
    """Return by how much rows change that are scaled on their way and scaled back."""
    changes = [
        (each / scale - rows[name]).abs().amax().double()
        for scale in (1.1, 1.3, 1.7)
        for name, each in scaled(scale).items()
        if each.numel()
    ]
    return torch.stack(changes).max()


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two runs gave the very same; without values to compare they did.

    Args:
        one: tensors.
        other: as many others.
    """
    return all(
        a.shape == b.shape and (a.is_meta or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )
