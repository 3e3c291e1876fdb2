r"""The rule of multi-head attention.

With the weights ``P = softmax(Q K^T / sqrt(d) + mask)`` of each head and its output
``C = P V``, the cotangent of C goes to the projected values, queries and keys as

    L_V = P^T L_C,    L_Q = L_S K / sqrt(d),    L_K = L_S^T Q / sqrt(d),
    L_P = L_C V^T,    L_S = P o (L_P - (P o L_P) 1),

and these are the cotangents of linear layers, with tokens as positions. Where autograd
has to come through the layer anyway they are taken from it instead.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from riemannian_modules.errors import LinearizationError
from riemannian_modules.factors import (
    DenseFactor,
    LinearFactor,
    MetricFactor,
)
from riemannian_modules.rules.base import Call, register_rule
from riemannian_modules.rules.projections import (
    NAMES,
    SEPARATE,
    find_projections,
    found_factors,
    projection_factors,
)
from riemannian_modules.rules.replay import (
    batch_layout,
    collected,
    positions,
    require_same,
    weight,
)

__all__ = ["attention"]

# Entries of the cotangents of attention weights that are held at a time.
_ROOM = 2**20


class _Attention:
    """An attention layer with all that it was given, batch first.

    Args:
        call: a call of it.
    """

    def __init__(self, call: Call) -> None:
        module = call.module
        assert isinstance(module, nn.MultiheadAttention)
        if module.training and module.dropout > 0.0:
            raise LinearizationError(
                f"{call.label} (MultiheadAttention) drops out attention weights, which "
                "cannot be repeated; set its attribute dropout = 0.0 or call eval() on "
                "it (nn.Dropout elsewhere in the model may stay)"
            )
        given: dict[str, Any] = {"need_weights": True, "average_attn_weights": True}
        given.update(zip(NAMES, call.args, strict=False))
        given.update(call.kwargs)
        self.call, self.module, self.given = call, module, given
        self.single = given["query"].ndim == 2
        self.layout = batch_layout(call, {0: 0 if module.batch_first else 1, 1: 0})
        self.packed = weight(call, "in_proj_weight") is not None
        groups = _grouped([given[name] for name in NAMES[:3]], self.packed)
        self.groups = [(self._front(x.to(call.dtype), 0), same) for x, same in groups]

    def _front(self, tensor: Tensor, leading: int) -> Tensor:
        if self.single:
            return tensor.unsqueeze(leading)
        if self.module.batch_first:
            return tensor
        return tensor.transpose(leading, leading + 1)

    def _heads(self, tensor: Tensor) -> Tensor:
        """Return a copy ``(batch, heads, tokens, d)`` of ``(batch, tokens, width)``."""
        split: Tensor = tensor.unflatten(-1, (self.module.num_heads, -1))
        return split.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def _projections(self) -> list[Tensor]:
        """Return queries, keys and values, ``(batch, tokens, width)`` each."""
        packed, bias = (
            weight(self.call, name) for name in ("in_proj_weight", "in_proj_bias")
        )
        found: list[Tensor] = []
        for x, same in self.groups:
            first, width = len(found), self.module.embed_dim
            rows = slice(first * width, (first + same) * width)
            w = weight(self.call, SEPARATE[first]) if packed is None else packed[rows]
            assert w is not None
            projected = linear(x, w, None if bias is None else bias[rows])
            found += projected.chunk(same, -1)
        return found

    def run(self) -> None:
        """Project, attend, and compare with the recorded outputs.

        Raises:
            LinearizationError: they differ.
        """
        call, module = self.call, self.module
        q, k, v = self._projections()
        self.tokens = k.shape[1]
        k, v = self._extended(k, "bias_k"), self._extended(v, "bias_v")
        self.q, self.k, self.v = map(self._heads, (q, k, v))
        self.q *= module.head_dim**-0.5
        scores = self.q @ self.k.mT
        mask = self._mask(scores)
        if mask is None:
            self.weights = scores.softmax(-1)
        else:
            # A token that may attend to nothing has no weights at all.
            idle = mask.isneginf().all(-1, keepdim=True)
            self.weights = (scores + mask).softmax(-1).masked_fill(idle, 0.0)
        self.context = (self.weights @ self.v).transpose(1, 2).flatten(2)
        out = weight(call, "out_proj.weight")
        assert out is not None
        self.out = out
        z = linear(self.context, out, weight(call, "out_proj.bias"))
        shown = self.weights
        if self.given["average_attn_weights"]:
            shown = shown.mean(1)
        if self.single:
            z, shown = z.squeeze(0), shown.squeeze(0)
        elif not module.batch_first:
            z = z.transpose(0, 1)
        require_same(call, {0: z, 1: shown})

    def _extended(self, tensor: Tensor, name: str) -> Tensor:
        """Append the learned token and the token of zeros, if there are any."""
        pieces = [tensor]
        learned = weight(self.call, name)
        if learned is not None:
            pieces.append(learned.expand(len(tensor), -1, -1))
        if self.module.add_zero_attn:
            pieces.append(torch.zeros_like(tensor[:, :1]))
        return torch.cat(pieces, 1) if len(pieces) > 1 else tensor

    def _mask(self, scores: Tensor) -> Tensor | None:
        """Return what is added to the scores, in a shape that broadcasts to theirs."""
        given, total = self.given, None
        padding, mask = given.get("key_padding_mask"), given.get("attn_mask")
        if given.get("is_causal") and padding is None and not given["need_weights"]:
            # torch does not look at attn_mask then.
            causal = torch.ones_like(scores[0, 0], dtype=torch.bool).tril()
            return torch.zeros_like(scores[0, 0]).masked_fill(~causal, -torch.inf)
        if mask is not None:
            mask = _additive(mask, scores.dtype)
            heads = self.module.num_heads
            total = mask if mask.ndim == 2 else mask.unflatten(0, (-1, heads))
        if padding is not None:
            padding = _additive(padding, scores.dtype)
            padding = padding.view(-1, 1, 1, padding.shape[-1])
            total = padding if total is None else total + padding
        if total is None:
            return None
        return pad(total, (0, scores.shape[-1] - self.tokens))

    def reverse(self) -> None:
        """Carry the cotangents from the outputs to the projections."""
        carried = dict(zip(self.call.places, self.call.cotangents, strict=True))
        of_out, of_weights = (
            None if each is None else each.to(self.call.dtype)
            for each in (carried.get(0), carried.get(1))
        )
        if of_weights is not None:
            if self.single:
                of_weights = of_weights.unsqueeze(1)
            if self.given["average_attn_weights"]:
                of_weights = of_weights.unsqueeze(2) / self.module.num_heads
        if of_out is not None:
            self.l = self._front(of_out, 1)
        else:
            assert of_weights is not None
            self.l = self.context.new_zeros(len(of_weights), *self.context.shape)
        self._reserve()
        # Some rows at a time: their cotangents are as large as the attention weights.
        step = max(1, _ROOM // max(1, self.weights.numel()))
        for start in range(0, len(self.l), step):
            rows = slice(start, start + step)
            self._pull(rows, None if of_weights is None else of_weights[rows])

    def _reserve(self) -> None:
        """Make room for the cotangents of q, k and v, side by side where they can be.

        Queries, keys and values of the same input are outputs of one linear layer.
        """
        extra = self.k.shape[2] - self.tokens
        self.joint: list[Tensor] = []
        self.parts: list[Tensor] = []
        for x, same in self.groups:
            shape = (len(self.l), len(x), x.shape[1] + extra, same * self.l.shape[-1])
            joint = self.l.new_empty(shape)
            self.joint.append(joint[:, :, : x.shape[1]])
            self.parts += joint.chunk(same, -1)

    def _pull(self, rows: slice, of_weights: Tensor | None) -> None:
        """Fill in some rows of the cotangents of q, k and v."""
        l, heads = self.l[rows], self.module.num_heads
        rank = len(l)
        # The rows are folded next to the tokens, (batch, heads, tokens, r, d): each
        # product is then one of matrices, whose other side is not copied for them.
        l = (l @ self.out).unflatten(-1, (heads, -1)).permute(1, 3, 2, 0, 4)
        l = l.contiguous()
        l_v = (self.weights.mT @ l.flatten(3)).unflatten(3, (rank, -1))
        l_p = (l.flatten(2, 3) @ self.v.mT).unflatten(2, (-1, rank))
        if of_weights is not None:
            l_p += of_weights.permute(1, 2, 3, 0, 4)
        l_p = _through_softmax(self.weights.unsqueeze(3), l_p)
        k = self.k * self.module.head_dim**-0.5
        l_q = (l_p.flatten(2, 3) @ k).unflatten(2, (-1, rank))
        l_k = (l_p.flatten(3).mT @ self.q).unflatten(2, (rank, -1)).transpose(2, 3)
        for part, each in zip(self.parts, (l_q, l_k, l_v), strict=True):
            room = part[rows, :, : each.shape[2]].unflatten(-1, (heads, -1))
            room.copy_(each.permute(3, 0, 2, 1, 4))

    def uses(self) -> Iterator[tuple[str, MetricFactor]]:
        """Yield each parameter's name and factor; tokens are positions."""
        out = LinearFactor(self._split(self.context, 0), self._split(self.l, 1))
        projections = [
            LinearFactor(self._split(x, 0), self._split(each, 1))
            for (x, _), each in zip(self.groups, self.joint, strict=True)
        ]
        yield from projection_factors(out, projections, self.packed)
        if weight(self.call, "bias_k") is not None:
            for name, part in zip(("bias_k", "bias_v"), self.parts[1:], strict=True):
                token = self._split(part[:, :, self.tokens, None], 1).sum(2)
                yield name, DenseFactor(token.reshape(-1, 1, 1, token.shape[-1]))

    def _split(self, tensor: Tensor, leading: int) -> Tensor:
        return positions(tensor, self.layout, self.call.examples, leading)


def _grouped(inputs: Sequence[Tensor], packed: bool) -> list[tuple[Tensor, int]]:
    """Return the inputs, neighbours that are the same tensor together, and how many."""
    groups: list[tuple[Tensor, int]] = []
    for x in inputs:
        if packed and groups and _same(groups[-1][0], x):
            groups[-1] = (x, groups[-1][1] + 1)
        else:
            groups.append((x, 1))
    return groups


def _same(a: Tensor, b: Tensor) -> bool:
    here = a.data_ptr() == b.data_ptr() and not a.is_meta
    return here and a.shape == b.shape and a.stride() == b.stride()


def _through_softmax(p: Tensor, l: Tensor) -> Tensor:
    """Return the cotangent of the scores; that of their softmax p is overwritten."""
    l *= p
    return l.addcmul_(p, l.sum(-1, keepdim=True), value=-1.0)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a mask that is added to scores; True of a boolean one forbids."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -torch.inf)


def attention(call: Call) -> dict[str, MetricFactor]:
    """Factors of multi-head attention, its projections packed or separate.

    Cost: none where the projections were found in the graph; else attention once more,
    with its weights held in memory, and for each row of cotangents five products of
    the size of a head's.

    Args:
        call: a call of the layer; self-attention or cross-attention with any masks.

    Returns:
        The structured factors of all parameters, of the output projection as well.

    Raises:
        LinearizationError: the projections were not found, and dropout is active or the
            outputs are not those of the layer.
    """
    if call.inside:
        return collected(call, found_factors(call))
    layer = _Attention(call)
    layer.run()
    layer.reverse()
    return collected(call, layer.uses())


register_rule(
    nn.MultiheadAttention, attention, deep=True, compares=True, finder=find_projections
)
