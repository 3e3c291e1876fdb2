"""A block solved in coordinates of its tangent space, where it is small."""

from collections.abc import Callable

import torch
from torch import Tensor

from riemannian_modules.block import Block, Vectors
from riemannian_modules.solution import Solution

__all__ = ["in_coordinates"]


def in_coordinates(
    block: Block,
    rows: Tensor | None,
    y: Tensor | None,
    e: Vectors | None,
    solve: Callable[[Tensor], Tensor],
    branch: str,
) -> Solution:
    """Return ``C G^-1 C^T (K^T y + e)``, all of it in float64.

    ``G^-1`` amplifies what rounding leaves in ``K^T y`` by the inverse of the mass.

    Args:
        block: the block.
        rows: ``K C``, ``(rank, size)``, float64; None: products with K in its place.
        y: ``(rank,)`` or None for zero.
        e: ambient covectors or None for zero.
        solve: multiplies coordinates, ``(size,)``, by ``G^-1``.
        branch: what the solution says that ran.
    """
    if rows is not None:
        return _from_rows(block, rows, y, e, solve, branch)
    wide = block.double()
    total = {p.name: torch.zeros_like(p.space.point) for p in wide.parts}
    if y is not None:
        total = wide.rmatvec(y.double())
    if e is not None:
        total = {name: t + e[name].double() for name, t in total.items()}
    adjoint = {p.name: p.space.root_adjoint(total[p.name]) for p in wide.parts}
    z = wide.unstack(solve(wide.stack(adjoint)))
    x = {p.name: p.space.root(z[p.name]) for p in wide.parts}
    narrow = {p.name: x[p.name].to(p.space.point) for p in block.parts}
    return Solution(narrow, wide.matvec(x), block, branch)


def _from_rows(
    block: Block,
    rows: Tensor,
    y: Tensor | None,
    e: Vectors | None,
    solve: Callable[[Tensor], Tensor],
    branch: str,
) -> Solution:
    spaces = {p.name: p.space.to(torch.float64) for p in block.parts}
    total = rows.new_zeros(rows.shape[1]) if y is None else rows.mT @ y.double()
    if e is not None:
        adjoint = {n: s.root_adjoint(e[n].double()) for n, s in spaces.items()}
        total = total + block.stack(adjoint)
    z = solve(total)
    roots = block.unstack(z)
    x = {
        p.name: spaces[p.name].root(roots[p.name]).to(p.space.point)
        for p in block.parts
    }
    return Solution(x, rows @ z, block, branch)
