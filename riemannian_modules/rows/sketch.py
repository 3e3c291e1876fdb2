"""Random combinations of the rows of a pass."""

import math
from typing import Literal, final

import torch
from torch import Tensor

from riemannian_modules.errors import ShapeError
from riemannian_modules.linearization import Linearization
from riemannian_modules.rows.base import (
    Counted,
    Neglected,
    Spaces,
    combinations,
)

__all__ = ["Sketch"]

Kind = Literal["sign", "gaussian", "hadamard"]


@final
class Sketch(Counted):
    """Takes random combinations ``S K`` of all rows with ``E[S^T S] = 1``.

    As with :class:`riemannian_modules.output.Sampled` the whitened residual keeps a
    row of its own, so that the gradient stays a combination of rows, and the others
    lose what they have in common with it. The reduced metric is right on average; its
    inverse is larger than the exact one on average (Jensen's inequality).

    Rows are stored, one number for each parameter, and all rows have to be carried
    down first: ``Sampled(metric, per="batch")`` draws before and is cheaper, this
    has less variance for some metrics (``"hadamard"``) and works on any rows. It costs
    a backward product for each row.

    Args:
        count: number of random rows; one more is kept for the gradient.
        kind: ``"sign"``: entries +-1. ``"gaussian"``: normal entries. ``"hadamard"``:
            rows of a Hadamard matrix with random signs, orthogonal to each other
            (the subsampled randomised Hadamard transform).
        generator: source of randomness on the device of the model; None takes
            torch's global one.

    Raises:
        ShapeError: fewer than one row, or an unknown ``kind``.

    >>> Sketch(64, "hadamard")
    Sketch(64, 'hadamard')
    """

    def __init__(
        self,
        count: int,
        kind: Kind = "sign",
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(count)
        if kind not in ("sign", "gaussian", "hadamard"):
            raise ShapeError(f"kind={kind!r}; choose 'sign', 'gaussian' or 'hadamard'")
        self.kind: Kind = kind
        self.generator = generator

    def __repr__(self) -> str:
        return f"Sketch({self.count}, {self.kind!r})"

    def _reduce(
        self, found: Linearization, spaces: Spaces, energy: Tensor
    ) -> tuple[Linearization, Neglected]:
        rank, y = len(energy), found.residual
        sketch = self.matrix(rank, energy.device)
        new = None
        if y is not None:
            length = y.to(sketch).norm()
            u = y.to(sketch) / torch.where(length > 0.0, length, 1.0)
            sketch = torch.cat([u.unsqueeze(0), sketch - (sketch @ u).outer(u)])
            new = y.new_zeros(len(sketch))
            new[0] = length
        reduced = combinations(found, sketch, new)
        none = energy.new_zeros(())  # on average
        left = Neglected(none, energy.sum(), len(sketch), rank, bounds=False)
        return reduced, left

    def matrix(self, rank: int, device: torch.device | None = None) -> Tensor:
        """Draw S, ``(count, rank)`` in float64, with ``E[S^T S] = 1``.

        Args:
            rank: number of rows that there are.
            device: where it is.
        """
        root = math.sqrt(self.count)
        like = torch.empty(0, dtype=torch.float64, device=device)
        if self.kind == "gaussian":
            entries = like.new_empty(self.count, rank)
            return entries.normal_(generator=self.generator) / root
        if self.kind == "sign":
            return self._signs(like, self.count, rank) / root
        size = 1 << (rank - 1).bit_length()
        order = torch.randperm(size, generator=self.generator, device=device)
        which, columns = order[: self.count], torch.arange(rank, device=device)
        # Entry (i, j) of the matrix is -1 to the number of ones in i & j.
        bits = which.unsqueeze(1) & columns
        parity = torch.zeros_like(bits)
        while size:
            parity, bits, size = parity ^ (bits & 1), bits >> 1, size >> 1
        return (1.0 - 2.0 * parity.double()) * self._signs(like, rank) / root

    def _signs(self, like: Tensor, *shape: int) -> Tensor:
        coins = like.new_empty(shape).bernoulli_(0.5, generator=self.generator)
        return 2.0 * coins - 1.0
