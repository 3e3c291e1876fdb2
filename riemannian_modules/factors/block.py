"""The Gram matrix of a block: the sum of its tensors' Gram matrices."""

from collections.abc import Sequence

import torch
from torch import Tensor

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.linear import BiasFactor, LinearFactor
from riemannian_modules.factors.linear_gram import absorbs_bias
from riemannian_modules.tangent import TangentSpace

__all__ = ["block_gram"]

Pair = tuple[MetricFactor, TangentSpace]


def block_gram(pairs: Sequence[Pair], dtype: torch.dtype) -> Tensor:
    """Return ``sum_b K_b sharp_b K_b^T``, shape ``(rank, rank)``, lower triangle valid.

    A bias whose cotangents are those of a weight in the block costs nothing: its
    Gram matrix ``L L^T`` is the weight's with ``X X^T`` replaced by ones.

    Args:
        pairs: factor and tangent space of each tensor, at least one.
        dtype: data type in which the matrix is formed and summed.

    Returns:
        A fresh matrix. Cost: that of the factors' own Gram matrices.

    Raises:
        ValueError: no pairs.
    """
    absorbed = _absorbed_biases(pairs)
    total: Tensor | None = None
    for index, (factor, space) in enumerate(pairs):
        if index in absorbed.values():
            continue
        if isinstance(factor, LinearFactor) and index in absorbed:
            bias_mass = pairs[absorbed[index]][1].mass.scalar
            gram = factor.gram(space, dtype, bias=1.0 / bias_mass)
        else:
            gram = factor.gram(space, dtype)
        total = gram if total is None else total.add_(gram)
    if total is None:
        raise ValueError("a block needs at least one factor")
    return total


def _absorbed_biases(pairs: Sequence[Pair]) -> dict[int, int]:
    """Return {index of a weight: index of the bias that it takes along}."""
    weights = {
        id(factor.cotangents): index
        for index, (factor, space) in enumerate(pairs)
        if isinstance(factor, LinearFactor) and absorbs_bias(space.manifold, space.mass)
    }
    return {
        weights[id(factor.cotangents)]: index
        for index, (factor, space) in enumerate(pairs)
        if isinstance(factor, BiasFactor)
        and space.mass.is_scalar
        and id(factor.cotangents) in weights
    }
