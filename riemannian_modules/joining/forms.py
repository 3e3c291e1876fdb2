"""Factors taken apart into tensors that can be sent.

A factor is a few tensors, each with the examples in one of its dimensions. The factor
of all examples has the tensors of all members behind each other along that dimension,
so the example is the fast index of its rows again.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.factors import (
    BiasFactor,
    ConvolutionFactor,
    EmbeddingFactor,
    LinearFactor,
    MetricFactor,
    SumFactor,
    ViewedFactor,
)
from riemannian_modules.factors.cotangents import CotangentFactor, memory
from riemannian_modules.factors.stacked import StackedFactor

__all__ = ["DENSE", "Form", "Pieces", "Spec", "form_of"]

DENSE = "dense"


@dataclass(frozen=True)
class Spec:
    """A tensor that a member sends.

    Attributes:
        shape: its shape.
        dtype: its data type.
        axis: where the examples are.
        power: the power of the member's share of the batch that it is multiplied with.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    axis: int
    power: float

    @property
    def nbytes(self) -> int:
        """Its size in bytes, rounded up so that any data type may follow."""
        size = torch.Size(self.shape).numel() * self.dtype.itemsize
        return -(-size // 16) * 16


@dataclass(frozen=True)
class Form:
    """What a factor is made of.

    Attributes:
        kind: the name of its class; :data:`DENSE`: it sends its rows.
        rows: number of rows for each example.
        examples: number of examples.
        shape: shape of the parameter.
        dtype: data type of the factor.
        power: the power of the member's share that the rows are multiplied with.
        detail: what else must be equal on all members for the tensors to be joined.
        pieces: which of the member's tensors it needs.
        parts: forms of the factors that it is made of.
    """

    kind: str
    rows: int
    examples: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    power: float
    detail: object = None
    pieces: tuple[int, ...] = ()
    parts: tuple["Form", ...] = ()

    def key(self) -> object:
        """Return what is equal where factors can be joined."""
        parts = tuple(part.key() for part in self.parts)
        return self.kind, self.shape, self.dtype, self.detail, parts

    def needs(self) -> set[int]:
        """Return all tensors that the factor and its parts need."""
        return set(self.pieces).union(*(part.needs() for part in self.parts))


class Pieces:
    """The tensors of a member, each of them once.

    A weight and its bias have the same cotangents, and a layer's input is that of its
    rows and of its costate; who shares memory before shares it afterwards.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []
        self.specs: list[Spec] = []
        self._known: dict[object, int] = {}

    def add(self, tensor: Tensor, axis: int, power: float = 0.0) -> int:
        """Return the number of a tensor.

        Args:
            tensor: the tensor.
            axis: where the examples are.
            power: the power of the member's share that it is to be multiplied with.
        """
        key = (*memory(tensor), tensor.dtype, axis, power)
        if key not in self._known:
            spec = Spec(tuple(tensor.shape), tensor.dtype, axis, power)
            self._known[key] = self.append(tensor, spec)
        return self._known[key]

    def append(self, tensor: Tensor, spec: Spec) -> int:
        """Return the number of a tensor that is known to be new."""
        self.tensors.append(tensor)
        self.specs.append(spec)
        return len(self.tensors) - 1


def form_of(factor: MetricFactor, rows: int, power: float, pieces: Pieces) -> Form:
    """Take a factor apart.

    Args:
        factor: a factor of ``rows`` rows for each example.
        rows: number of rows for each example.
        power: the power of the member's share that the rows are multiplied with.
        pieces: where its tensors go.

    Returns:
        Its form. What has no other form is :data:`DENSE`, and its rows are not among
        the pieces yet.
    """
    kind = type(factor)
    parts: tuple[Form, ...] = ()
    detail: object = None
    own: list[int] = []
    if isinstance(factor, StackedFactor | SumFactor):
        inner = factor.blocks if isinstance(factor, StackedFactor) else factor.parts
        parts = tuple(form_of(part, rows, power, pieces) for part in inner)
    elif isinstance(factor, ViewedFactor):
        parts = (form_of(factor.inner, rows, power, pieces),)
    elif isinstance(factor, CotangentFactor):
        own.append(pieces.add(factor.cotangents, 1, power))
    if isinstance(factor, LinearFactor | ConvolutionFactor):
        own.append(pieces.add(factor.inputs, 0))
    if isinstance(factor, ConvolutionFactor):
        sizes = tuple(factor.inputs.shape[2:]), tuple(factor.cotangents.shape[3:])
        detail = factor.convolution, sizes
    if isinstance(factor, EmbeddingFactor):
        extra = [t for t in (factor.places, factor.weights) if t is not None]
        own += [pieces.add(t, 0) for t in (factor.tokens, *extra)]
        detail = factor.places is not None, factor.weights is not None
    # The classes themselves: a subclass may mean something else.
    known = kind in _KINDS and all(part.kind != DENSE for part in parts)
    examples = factor.rank // rows
    common = rows, examples, tuple(factor.shape), factor.dtype, power
    if not known:
        return Form(DENSE, *common)
    return Form(kind.__name__, *common, detail, tuple(own), parts)


_KINDS = {
    BiasFactor,
    ConvolutionFactor,
    EmbeddingFactor,
    LinearFactor,
    StackedFactor,
    SumFactor,
    ViewedFactor,
}
