"""Where the examples of a batch are in a tensor inside the model."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.errors import LinearizationError

__all__ = [
    "Layout",
    "bit_probes",
    "candidates",
    "find_layout",
    "is_linear",
    "keeps_apart",
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


def bit_probes(outputs: Tensor) -> Tensor:
    """Return cotangents that tell the examples apart.

    The first is for all examples. Then there are two for each binary digit of an
    example's index: for the examples where it is 1, and for those where it is 0. Of any
    two examples one is there and the other is not.

    Args:
        outputs: ``(n, *output)``.

    Returns:
        ``(1 + 2 b, n, *output)`` with b binary digits of n - 1.
    """
    n = len(outputs)
    digits = _digits(n, outputs.device)
    masks = torch.cat([torch.ones_like(digits[:1]), digits, 1 - digits])
    if n == 1:
        masks = torch.ones(1, 1, dtype=torch.long, device=outputs.device)
    pattern = _pattern(outputs)
    return masks.to(pattern).view(*masks.shape, *[1] * (outputs.ndim - 1)) * pattern


def _digits(n: int, device: torch.device) -> Tensor:
    bits = torch.arange((n - 1).bit_length(), device=device).unsqueeze(1)
    return torch.arange(n, device=device).bitwise_right_shift(bits) & 1


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
        shared by all. And whether it is certain: not where the probes vanish, or fit
        more than one layout.
    """
    shape = probes.shape[1:]
    possible = list(candidates(shape, examples))
    if examples == 1:
        # Any layout is right; a dimension of size one that is no feature is likeliest.
        likely = [each for each in possible if each.dim < len(shape) - 1]
        return next(iter(likely), Layout()), True
    if probes.is_meta:
        return next(iter(possible), None), True
    digits = _digits(examples, probes.device)
    absent = torch.cat([torch.zeros_like(digits[:1]), 1 - digits, digits]).bool()
    # A value that is not finite is another error, found with the gradient.
    touched = (probes != 0) & torch.isfinite(probes)
    fitting = []
    for layout in possible:
        front = layout.front(touched, examples, 1)
        by_example = front.reshape(*front.shape[:2], -1).any(-1)
        if not bool((by_example & absent).any()):
            fitting.append(layout)
    certain = len(fitting) == 1 and bool(touched.any())
    return (fitting[0] if fitting else None), certain


def is_linear(probes: Tensor, rounding: float = 0.0) -> bool:
    """Whether the parts of :func:`bit_probes` add up to the whole, as carried.

    Args:
        probes: as in :func:`find_layout`.
        rounding: the unit of rounding on the way, where it is not that of the probes.

    Returns:
        Whether they do.
    """
    if probes.is_meta or len(probes) == 1 or probes.numel() == 0:
        return True
    bits = (len(probes) - 1) // 2
    whole, ones, zeros = probes[:1], probes[1 : 1 + bits], probes[1 + bits :]
    error = (ones + zeros - whole).abs()
    size = ones.abs() + zeros.abs() + whole.abs()
    tolerance = max(rounding, torch.finfo(probes.dtype).eps) ** 0.5
    finite = torch.isfinite(error)
    return not bool(((error > tolerance * (size + size.amax())) & finite).any())
