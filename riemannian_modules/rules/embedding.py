"""The rules of embeddings: of single tokens, and of bags of them."""

from collections.abc import Sequence
from itertools import zip_longest
from typing import cast

import torch
from torch import Tensor, nn

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import EmbeddingFactor, MetricFactor
from riemannian_modules.rules.base import Call, register_rule
from riemannian_modules.rules.places import (
    cotangents_by_example,
    inputs_by_example,
    require_plain,
)

__all__ = ["embedding", "embedding_bag"]


def embedding(call: Call) -> dict[str, MetricFactor]:
    """Factor of an embedding, zero at its padding index.

    Args:
        call: a call of an Embedding.

    Returns:
        The structured factor of the weight.

    Raises:
        LinearizationError: an option makes the gradient another one than that of the
            embedding as a function of its weight.
    """
    module = cast("nn.Embedding", call.module)
    _refuse_options(call, module)
    l = cotangents_by_example(call, 1)
    tokens = inputs_by_example(call, call.input, 0)
    if module.padding_idx is not None:
        l = l * (tokens != module.padding_idx).unsqueeze(-1)
    return {"weight": EmbeddingFactor(tokens.flatten(), l, module.num_embeddings)}


def embedding_bag(call: Call) -> dict[str, MetricFactor]:
    """Factor of an EmbeddingBag that adds or averages.

    Args:
        call: a call of an EmbeddingBag; every bag belongs to one example.

    Returns:
        The structured factor of the weight.

    Raises:
        LinearizationError: the mode is ``"max"``, or an option makes the gradient
            another one than that of the layer as a function of its weight.
    """
    module = cast("nn.EmbeddingBag", call.module)
    _refuse_options(call, module)
    if module.mode not in {"sum", "mean"}:
        raise LinearizationError(
            f"{call.label} has mode={module.mode!r}; its rule knows 'sum' and 'mean'"
        )
    tokens, offsets, scales = _arguments(call, "input", "offsets", "per_sample_weights")
    assert tokens is not None
    l = cotangents_by_example(call, 1)
    bags = l.shape[1] * l.shape[2]
    bag = _bag_of_each_token(module, tokens, offsets, bags)
    tokens = tokens.flatten()
    counted = torch.ones_like(tokens, dtype=call.dtype)
    if module.padding_idx is not None:
        counted = (tokens != module.padding_idx).to(call.dtype)
    weights = counted if scales is None else counted * scales.flatten()
    if module.mode == "mean":
        sizes = counted.new_zeros(bags).index_add_(0, bag, counted)
        weights = weights / sizes.clamp_min(1.0)[bag]
    place = inputs_by_example(call, torch.arange(bags, device=tokens.device), 0)
    place = place.flatten().argsort()
    factor = EmbeddingFactor(tokens, l, module.num_embeddings, place[bag], weights)
    return {"weight": factor}


def _refuse_options(call: Call, module: nn.Embedding | nn.EmbeddingBag) -> None:
    require_plain(call)
    why = None
    if module.max_norm is not None:
        why = (
            "max_norm changes the weight during the forward pass; use "
            "riemannian_modules.manifolds.PoincareBall or clip the weight after a step"
        )
    elif module.scale_grad_by_freq:
        why = (
            "scale_grad_by_freq divides the gradient by counts in the batch, so it is "
            "no gradient of the loss; set it to False"
        )
    if why is not None:
        raise LinearizationError(f"{call.label}: {why}")


def _arguments(call: Call, *names: str) -> Sequence[Tensor | None]:
    """Return the arguments by name, None where they are missing."""
    pairs = zip_longest(names, call.args)
    given = {str(name): value for name, value in pairs if name is not None}
    return [call.kwargs.get(name, given[name]) for name in names]


def _bag_of_each_token(
    module: nn.EmbeddingBag, tokens: Tensor, offsets: Tensor | None, bags: int
) -> Tensor:
    """Return the number of the bag that each token is in, ``(N,)``."""
    if offsets is None:
        numbers = torch.arange(bags, device=tokens.device)
        return numbers.repeat_interleave(tokens.shape[1])
    begin = offsets[:bags]
    count = torch.arange(len(tokens), device=tokens.device)
    return torch.searchsorted(begin, count, right=True) - 1


register_rule(nn.Embedding, embedding)
register_rule(nn.EmbeddingBag, embedding_bag)
