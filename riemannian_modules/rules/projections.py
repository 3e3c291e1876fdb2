"""The projections of multi-head attention: linear layers, with tokens as positions."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from riemannian_modules.factors import BiasFactor, LinearFactor, MetricFactor
from riemannian_modules.factors.stacked import StackedFactor
from riemannian_modules.nested import tensors_in
from riemannian_modules.place import Place
from riemannian_modules.rules.base import Call
from riemannian_modules.rules.inside import linear_maps
from riemannian_modules.rules.replay import positions, weight

__all__ = [
    "NAMES",
    "SEPARATE",
    "find_projections",
    "found_factors",
    "projection_factors",
]

SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")

NAMES = (
    "query",
    "key",
    "value",
    "key_padding_mask",
    "need_weights",
    "attn_mask",
    "average_attn_weights",
    "is_causal",
)


def find_projections(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    outputs: Sequence[Tensor],
) -> tuple[Place, ...]:
    """Find the projections in a call: the last one, and those of its inputs.

    There are none to be found where learned tokens come between. Where nothing below
    wants a derivative, autograd need not come so far, which takes it longer than the
    layer once more takes us.
    """
    assert isinstance(module, nn.MultiheadAttention)
    given = dict(zip(NAMES, args, strict=False)) | kwargs
    q, k, v = inputs = [given[name] for name in NAMES[:3]]
    repeatable = not module.training or module.dropout == 0.0
    if repeatable and not any(x.requires_grad for x in inputs):
        return ()
    if is_parametrized(module) or is_parametrized(module.out_proj):
        # To read such a weight is to compute it anew.
        return ()
    learned: Tensor | None = module.bias_k
    if learned is not None or any(x.ndim != 3 or x.is_nested for x in inputs):
        return ()
    packed: Tensor | None = module.in_proj_weight
    if packed is None:
        weights = [getattr(module, name) for name in SEPARATE]
    else:
        # What torch makes of a packed weight depends on which inputs are the same.
        inputs = [q] if q is k and k is v else [q, k] if k is v else inputs
        weights = [packed] * len(inputs)
    shapes = [x.shape[:2][:: -1 if module.batch_first else 1] for x in (q, *inputs)]
    # A mask may come from an earlier call of the same layer.
    arguments = tensors_in((args, kwargs))
    return linear_maps(outputs, arguments, [module.out_proj.weight, *weights], shapes)


def found_factors(call: Call) -> Iterator[tuple[str, MetricFactor]]:
    """Yield the names and factors of the projections that were found."""
    like = next(each for each in call.inside if each.cotangent is not None)
    assert like.cotangent is not None
    n, layout = call.examples, like.layout
    factors = []
    for each in call.inside:
        l = each.cotangent
        if l is None:
            # Only the attention weights are used, or only values.
            l = each.input.new_zeros(len(like.cotangent), *each.shape)
        inputs = positions(each.input.to(call.dtype), layout, n, 0)
        factors.append(LinearFactor(inputs, positions(l.to(call.dtype), layout, n, 1)))
    packed = weight(call, "in_proj_weight") is not None
    return projection_factors(factors[0], factors[1:], packed)


def projection_factors(
    out: LinearFactor, projections: Sequence[LinearFactor], packed: bool
) -> Iterator[tuple[str, MetricFactor]]:
    """Yield the names and factors of all linear maps and their biases.

    Args:
        out: the output projection.
        projections: those of queries, keys and values, neighbours with one input as
            one map.
        packed: whether their weights are parts of one parameter.
    """
    yield "out_proj.weight", out
    yield "out_proj.bias", BiasFactor(out.cotangents)
    if not packed:
        yield from zip(SEPARATE, projections, strict=True)
    elif len(projections) == 1:
        yield "in_proj_weight", projections[0]
    else:
        yield "in_proj_weight", StackedFactor(projections)
    if len(projections) == 1:
        yield "in_proj_bias", BiasFactor(projections[0].cotangents)
    else:
        sums = [factor.cotangents.sum(2, keepdim=True) for factor in projections]
        yield "in_proj_bias", BiasFactor(torch.cat(sums, -1))
