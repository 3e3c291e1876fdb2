"""Products with the factors of a block, in which a bias travels with its weight.

A bias whose cotangents are those of a weight in the block costs next to nothing: its
Gram matrix ``L L^T`` is the weight's with ``X X^T`` replaced by ones.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.linear import BiasFactor, LinearFactor
from riemannian_modules.factors.linear_gram import absorbs_bias
from riemannian_modules.tangent import TangentSpace

__all__ = ["block_gram", "block_image", "block_rmatvec"]

Pair = tuple[MetricFactor, TangentSpace]


def block_gram(pairs: Sequence[Pair], dtype: torch.dtype) -> Tensor:
    """Return ``sum_b K_b sharp_b K_b^T``, shape ``(rank, rank)``, lower triangle valid.

    Args:
        pairs: factor and tangent space of each tensor, at least one.
        dtype: data type in which the matrix is formed and summed.

    Returns:
        A fresh matrix. Cost: that of the factors' own Gram matrices.

    Raises:
        ValueError: no pairs.
    """
    if not pairs:
        raise ValueError("a block needs at least one factor")
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
    assert total is not None
    return total


def block_image(
    pairs: Sequence[Pair], e: Sequence[Tensor], source: Sequence[MetricFactor]
) -> Tensor:
    """Return ``sum_b K_b sharp_b e_b``, shape ``(rank,)``.

    Args:
        pairs: factor and tangent space of each tensor, at least one.
        e: a covector for each tensor.
        source: factors whose rows add up to these covectors.

    Returns:
        The image.
    """
    absorbed = {
        weight: bias
        for weight, bias in _absorbed_biases(pairs).items()
        if _share_an_image(*pairs[weight], source[weight], source[bias])
    }
    total: Tensor | None = None
    for index, (factor, space) in enumerate(pairs):
        if index in absorbed.values():
            continue
        if isinstance(factor, LinearFactor) and index in absorbed:
            bias = 1.0 / pairs[absorbed[index]][1].mass.scalar
            image = factor.image(space, e[index], source[index], bias)
        else:
            image = factor.image(space, e[index], source[index])
        total = image if total is None else total + image
    assert total is not None
    return total


def block_rmatvec(factors: Mapping[str, MetricFactor], a: Tensor) -> dict[str, Tensor]:
    """Return ``{name: K^T a}`` for the factors of a block.

    Args:
        factors: factors by parameter name.
        a: ``(rank,)``.

    Returns:
        The covectors.
    """
    covectors: dict[str, Tensor] = {}
    combined: list[tuple[MetricFactor, Tensor]] = []
    for name, factor in factors.items():
        if isinstance(factor, LinearFactor) and factor.whole is None:
            combined.append((factor, factor.combine(a)))
            covectors[name] = factor.pull(combined[-1][1])
        elif isinstance(factor, BiasFactor):
            known = (c for weight, c in combined if factor.belongs_to(weight))
            covector = next(known, None)
            covector = factor.combine(a) if covector is None else covector
            covectors[name] = covector.sum((0, 1))
        else:
            covectors[name] = factor.rmatvec(a)
    return covectors


def _share_an_image(
    weight: MetricFactor,
    space: TangentSpace,
    source: MetricFactor,
    bias_source: MetricFactor,
) -> bool:
    return (
        isinstance(weight, LinearFactor)
        and isinstance(bias_source, BiasFactor)
        and bias_source.belongs_to(source)
        and weight.maps_by_kernel(space, source)
    )


def _absorbed_biases(pairs: Sequence[Pair]) -> dict[int, int]:
    """Return {index of a weight: index of the bias that it takes along}."""
    absorbed: dict[int, int] = {}
    for index, (bias, space) in enumerate(pairs):
        if not isinstance(bias, BiasFactor) or not space.mass.is_scalar:
            continue
        for other, (weight, its) in enumerate(pairs):
            if (
                other not in absorbed
                and bias.belongs_to(weight)
                and absorbs_bias(its.manifold, its.mass)
            ):
                absorbed[other] = index
                break
    return absorbed
