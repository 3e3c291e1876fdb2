"""What a solved Riesz problem consists of."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from riemannian_modules.block import Block
from riemannian_modules.finite import looks_finite
from riemannian_modules.precision import dot

__all__ = ["Solution"]


@dataclass(frozen=True)
class Solution:
    """A solved Riesz problem ``g(x, .) = e`` with what is known about it.

    Attributes:
        vectors: ``{parameter name: x}``, tangent vectors.
        found: :attr:`velocity`, or what makes it when it is first asked for.
        base: the base metric at the point, for :attr:`squared_norm`.
        branch: which form ran: ``"base"`` (no factor), ``"push-through"``,
            ``"woodbury"``, ``"push-through + woodbury"``, ``"primal"``, ``"qr"``,
            ``"cg"``; ``"cg, then ..."`` where the first did not converge.
        iterations: of conjugate gradients, products with ``K sharp K^T``.
        converged: whether the tolerance was reached; True for direct forms, None
            where reading it would have made the host wait.
        error: bound of the relative error in the metric that conjugate gradients
            ended with, a scalar; None for direct forms.
    """

    vectors: dict[str, Tensor]
    found: Tensor | Callable[[], Tensor]
    base: Block
    branch: str
    iterations: int = 0
    converged: bool | None = True
    error: Tensor | None = None

    @cached_property
    def velocity(self) -> Tensor:
        """``K x``, the whitened velocity of the outputs, ``(rank,)``."""
        return self.found if isinstance(self.found, Tensor) else self.found()

    def __repr__(self) -> str:
        names = ", ".join(self.vectors)
        return f"Solution({names}; rank {self.base.rank}, {self.branch})"

    def looks_finite(self) -> bool:
        """Return False if a number on the CPU is not finite."""
        return all(map(looks_finite, self.vectors.values()))

    def total(self) -> Tensor:
        """Return the sum of all entries, which is finite only if they are."""
        return torch.stack([vector.sum() for vector in self.vectors.values()]).sum()

    @cached_property
    def squared_norm(self) -> Tensor:
        """``g(x, x)``, a scalar, float64: the base metric's part and ``|K x|^2``."""
        flat = {p.name: p.space.flat(self.vectors[p.name]) for p in self.base.parts}
        return self.base.pair(flat, self.vectors) + dot(self.velocity, self.velocity)
