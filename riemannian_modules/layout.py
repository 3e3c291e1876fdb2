"""Where the examples of a batch are in a tensor inside the model."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from riemannian_modules.errors import LinearizationError

__all__ = [
    "Fitting",
    "Layout",
    "candidates",
    "keeps_apart",
    "probe_masks",
    "probes",
    "random_scales",
    "scaled_examples",
]


@dataclass(frozen=True)
class Layout:
    """The dimension that holds the examples, alone or folded with another one.

    Attributes:
        dim: the dimension; its size is ``n q`` for n examples. Negative: there is none.
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

        Raises:
            LinearizationError: the examples are nowhere.
        """
        if self.dim < 0:
            raise LinearizationError(
                "the examples of the batch interact here, or share a value"
            )
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


def probe_masks(n: int, device: torch.device) -> Tensor:
    """Return which examples each probe is for.

    The first is for all examples. Each example is in the same number of the others,
    half of them, and no two are in the same ones. So of any two examples each is
    somewhere where the other is not, and no fewer probes do that (Sperner).

    Args:
        n: number of examples.
        device: where they are.

    Returns:
        ``(1 + k, n)``, boolean, with ``n <= comb(k, k // 2)``.

    >>> probe_masks(3, torch.device("cpu")).int()
    tensor([[1, 1, 1],
            [1, 0, 0],
            [0, 1, 0],
            [0, 0, 1]], dtype=torch.int32)
    """
    count = 0
    while n > 1 and math.comb(count, count // 2) < n:
        count += 1
    masks = torch.zeros(1 + count, n, dtype=torch.bool)
    masks[0] = True
    if count:
        total = math.comb(count, count // 2)
        # From all of them, so that every probe is for about half of the examples.
        chosen = {index * total // n: index for index in range(n)}
        for index, places in enumerate(combinations(range(1, 1 + count), count // 2)):
            if index in chosen:
                masks[list(places), chosen[index]] = True
    return masks.to(device)


def probes(outputs: Tensor, masks: Tensor) -> Tensor:
    """Return cotangents that are zero for all examples that are not in a mask.

    Args:
        outputs: ``(n, *output)``.
        masks: of :func:`probe_masks`, ``(k, n)``.

    Returns:
        ``(k, n, *output)``.
    """
    pattern = _pattern(outputs)
    return masks.to(pattern).view(*masks.shape, *[1] * (outputs.ndim - 1)) * pattern


def _pattern(outputs: Tensor) -> Tensor:
    # No sum or difference of few entries may vanish: multiples of the golden ratio.
    count = torch.arange(1, outputs.numel() + 1, device=outputs.device)
    share = torch.frac(count.to(torch.float32) * 0.61803398875)
    return (1.0 + share).to(outputs.dtype).view_as(outputs)


def random_scales(
    examples: int, generator: torch.Generator, *, short: bool = False
) -> Tensor:
    """Draw a power of two for each example, and zero for one in eight.

    Args:
        examples: number n of examples.
        generator: source of randomness, on the CPU.
        short: whether they have to fit into the range of float16.

    Returns:
        ``(n,)``, float32: multiplying with them is exact.
    """
    most = 3 if short else 20
    exponents = torch.randint(-most, most + 1, (examples,), generator=generator)
    absent = torch.rand(examples, generator=generator) < 0.125
    return torch.ldexp(torch.ones(examples), exponents).masked_fill_(absent, 0.0)


def scaled_examples(cotangent: Tensor, scales: Tensor) -> Tensor:
    """Return a cotangent with every example multiplied by a number of its own.

    Args:
        cotangent: ``(n, *output)``.
        scales: ``(n,)``.
    """
    return cotangent * scales.to(cotangent).view(-1, *[1] * (cotangent.ndim - 1))


def keeps_apart(
    carried: Tensor, like: Tensor, scales: Tensor, layout: Layout, rounding: float
) -> bool:
    """Whether every example has the scale that it was sent out with.

    What comes from another example has that one's. Where an example was left out there
    must be nothing at all.

    Args:
        carried: the cotangent of :func:`scaled_examples`, carried to a tensor of the
            model, ``shape``.
        like: the same without the scales.
        scales: those, ``(n,)``.
        layout: where the examples are in the tensor.
        rounding: the unit of rounding on the way.
    """
    n = len(scales)
    found, plain = (layout.front(x, n).reshape(n, -1) for x in (carried, like))
    scales = scales.to(plain).unsqueeze(1)
    size = torch.linalg.vector_norm(plain, dim=1, keepdim=True)
    slack = max(rounding, torch.finfo(plain.dtype).eps) ** 0.5
    error = torch.linalg.vector_norm(found - scales * plain, dim=1, keepdim=True)
    # Where an example is nearly nothing, rounding of the others' sizes is left of it.
    allowed = scales * slack * (size + slack * size.amax())
    # Written so that NaN is no reason to look again: the gradient tells of it.
    return not bool((error > allowed).any())


class Fitting:
    """What the probes of the outputs have become at a tensor, one after the other.

    A gradient is a sum over examples and does not notice rows that end up in another
    example; where a probe leaves an example out, its part must stay exactly zero. And
    what is carried must be linear: all others add up to a multiple of the first.

    Args:
        shape: that of a tensor of the model.
        masks: the examples of all probes, :func:`probe_masks`.
        rounding: the unit of rounding on the way, where it is not that of the probes.
    """

    def __init__(
        self, shape: Sequence[int], masks: Tensor, rounding: float = 0.0
    ) -> None:
        self._masks, self._rounding = masks, rounding
        self._n = masks.shape[1]
        self._left = list(candidates(shape, self._n))
        self._sure, self._seen = self._n == 1, 0
        self._meta = False
        self._error: Tensor | None = None
        self._largest = 0.0
        if self._n == 1:
            # Any is right; a dimension of size one that is no feature is likeliest.
            likely = [each for each in self._left if each.dim < len(shape) - 1]
            self._left = [next(iter(likely), Layout())]

    def see(self, carried: Tensor) -> None:
        """Look at the next probes.

        Args:
            carried: what they have become, ``(k, *shape)``.
        """
        masks = self._masks[self._seen : self._seen + len(carried)]
        self._meta = carried.is_meta
        if self._n > 1 and not self._meta and carried.numel() > 0:
            self._compare(carried, masks)
            self._add(carried)
        self._seen += len(carried)

    def _compare(self, carried: Tensor, masks: Tensor) -> None:
        fitting, largest = [], None
        for layout in self._left:
            front = layout.front(carried, self._n, 1)
            touched, largest = _touched(front)
            if not bool((touched & ~masks).any()):
                fitting.append(layout)
                self._sure = self._sure or bool(touched.any())
        self._left = fitting
        if largest is None:
            largest = _largest(carried)
        # NaN is larger than all.
        if not largest <= self._largest:
            self._largest = largest

    def _add(self, carried: Tensor) -> None:
        each = carried.float() if carried.itemsize < 4 else carried
        if self._error is None:
            self._rounding = max(self._rounding, torch.finfo(carried.dtype).eps)
            times = int(self._masks[1:, 0].sum())
            self._error, each = each[0] * -times, each[1:]
        for one in each:
            self._error += one

    @property
    def found(self) -> tuple[Layout | None, bool]:
        """The layout, or None if there is none.

        Then the examples interact, or the tensor is shared by all. And whether it is
        certain: not where the probes vanish, or fit more than one layout.
        """
        sure = self._meta or (self._sure and len(self._left) == 1)
        return next(iter(self._left), None), sure

    def is_linear(self) -> bool:
        """Whether the probes add up, as carried, once all were looked at."""
        if self._error is None:
            return True
        assert self._seen == len(self._masks)
        error, self._error = _largest(self._error), None
        allowed = 2.0 * self._rounding**0.5 * self._largest
        # Values that are not finite are another error, found with the gradient.
        return not (math.isfinite(error) and error > allowed)


def _touched(front: Tensor) -> tuple[Tensor, float]:
    """Return where something is, ``(k, n)``, of ``(k, n, *rest)``; and the largest."""
    # A fifth of the time that comparing all entries takes, and as exact.
    rest = tuple(range(2, front.ndim))
    low, high = (front.amin(rest), front.amax(rest)) if rest else (front, front)
    largest = max(-float(low.amin()), float(high.amax()))
    if math.isfinite(largest):
        return (low != 0) | (high != 0), largest
    there = (front != 0) & torch.isfinite(front)
    return (there.flatten(2).any(-1) if rest else there), largest


def _largest(values: Tensor) -> float:
    low, high = values.aminmax()
    return max(-float(low), float(high))
