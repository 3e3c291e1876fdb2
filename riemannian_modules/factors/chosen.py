"""Some rows of a factor, combinations of its rows, and how long its rows are."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from riemannian_modules.factors.base import MetricFactor
from riemannian_modules.factors.convolution import ConvolutionFactor
from riemannian_modules.factors.cotangents import CotangentFactor, memory
from riemannian_modules.factors.dense import DenseFactor
from riemannian_modules.factors.linear import BiasFactor, LinearFactor
from riemannian_modules.factors.viewed import ViewedFactor, through
from riemannian_modules.tangent import TangentSpace

__all__ = ["Shared", "column", "combined", "energies", "owned", "rebuilt", "taken"]

# Rows that are formed at a time, in entries.
_CHUNK_ENTRIES = 1 << 22


class Shared:
    """Results that the factors of one layer have in common, made once.

    A bias is found to belong to a weight by its cotangents, the very same numbers in
    memory; what is made of these has to be the same in memory too.
    """

    def __init__(self) -> None:
        self._known: dict[object, tuple[Sequence[Tensor], Tensor]] = {}

    def of(
        self, how: object, tensors: Sequence[Tensor], make: Callable[[], Tensor]
    ) -> Tensor:
        """Return what was made of these tensors in this way, or make it.

        Args:
            how: what is made of them.
            tensors: what it is made of; kept, so that their memory stays theirs.
            make: makes it.

        Returns:
            The result.
        """
        key = how, tuple(memory(tensor) for tensor in tensors)
        if key not in self._known:
            self._known[key] = list(tensors), make()
        return self._known[key][1]


def rebuilt(
    like: MetricFactor, inputs: Tensor | None, cotangents: Tensor
) -> MetricFactor | None:
    """Return a factor of the same kind with other cotangents; None: of other kinds.

    Args:
        like: any factor.
        inputs: inputs of the layer; None: those that it has.
        cotangents: ``(r, n, positions, ...)``.

    Returns:
        A factor of a linear layer, its bias or a convolution.
    """
    if isinstance(like, LinearFactor):
        return LinearFactor(like.inputs if inputs is None else inputs, cotangents)
    if isinstance(like, BiasFactor):
        return BiasFactor(cotangents)
    if isinstance(like, ConvolutionFactor):
        inputs = like.inputs if inputs is None else inputs
        return ConvolutionFactor(like.convolution, inputs, cotangents, like.shape)
    return None


def owned(factor: MetricFactor) -> MetricFactor:
    """Return the factor with inputs that nobody else can overwrite.

    The cotangents and stored rows of a pass are its own anyway; the inputs of a layer
    are tensors of the model or its user.

    Args:
        factor: any factor.
    """
    if isinstance(factor, LinearFactor | ConvolutionFactor):
        found = rebuilt(factor, factor.inputs.clone(), factor.cotangents)
        assert found is not None
        return found
    if isinstance(factor, BiasFactor | DenseFactor):
        return factor
    if isinstance(factor, ViewedFactor):
        return through(factor, owned)
    return DenseFactor(factor.rows(0, factor.rank))


def taken(factor: MetricFactor, index: Tensor, shared: Shared) -> MetricFactor:
    """Return the factor of some rows.

    Args:
        factor: any factor.
        index: which rows, ``(k,)``.
        shared: what factors of one layer have in common.

    Returns:
        A factor of rank k, of one cotangent and k examples if it is structured.
    """
    if isinstance(factor, CotangentFactor):
        l, inputs = factor.cotangents, None
        chosen = shared.of(
            ("taken", memory(index)), [l, index], lambda: l.flatten(0, 1)[index][None]
        )
        if isinstance(factor, LinearFactor | ConvolutionFactor):
            inputs = factor.inputs[index % l.shape[1]]
        found = rebuilt(factor, inputs, chosen)
        if found is not None:
            return found
    if isinstance(factor, ViewedFactor):
        return through(factor, lambda inner: taken(inner, index, shared))
    if isinstance(factor, DenseFactor):
        return DenseFactor(factor.rows(0, factor.rank)[index])
    return DenseFactor(_all_rows(factor)[index])


def combined(
    factor: MetricFactor, weights: Tensor, examples: int, shared: Shared
) -> MetricFactor:
    """Return one row for each example, a combination of its rows.

    Args:
        factor: any factor.
        weights: of every row, ``(rank,)``.
        examples: number of examples, the fast index of the rows.
        shared: what factors of one layer have in common.

    Returns:
        A factor of rank ``examples``.
    """
    if isinstance(factor, CotangentFactor) and factor.cotangents.shape[1] == examples:
        l = factor.cotangents
        sums = shared.of(
            ("combined", memory(weights)),
            [l, weights],
            lambda: factor.combine(weights)[None],
        )
        found = rebuilt(factor, None, sums)
        if found is not None:
            return found
    if isinstance(factor, ViewedFactor):
        return through(factor, lambda own: combined(own, weights, examples, shared))
    rows = _all_rows(factor).view(-1, examples, *factor.shape)
    return DenseFactor(
        torch.einsum("jn,jn...->n...", weights.to(rows).view(-1, examples), rows)
    )


def energies(factor: MetricFactor, space: TangentSpace) -> Tensor:
    """Return ``k_j(sharp k_j)`` of every row, the diagonal of its Gram matrix.

    Args:
        factor: any factor.
        space: tangent space with the Riesz map and the mass.

    Returns:
        ``(rank,)`` in float64. Cost O(rank (inputs + outputs)) for a linear layer whose
        Riesz map is a division by its mass; otherwise O(rank p), in chunks.
    """
    if isinstance(factor, ViewedFactor):
        view = factor.inner_space(space)
        if view is not None:
            return energies(factor.inner, view)
    mass = space.divisor
    if mass is not None and isinstance(factor, BiasFactor):
        sums = factor.cotangents.sum(2).double()
        return sums.square().sum(-1).reshape(-1) / mass
    if mass is not None and isinstance(factor, LinearFactor):
        l, x = factor.cotangents.double(), factor.inputs.double()
        if x.shape[1] == 1:
            return (l.square().sum((-1, -2)) * x.square().sum((-1, -2))).view(-1) / mass
    step = max(1, _CHUNK_ENTRIES // max(1, space.point.numel()))
    wide = space.to(torch.float64)
    found = []
    for start in range(0, factor.rank, step):
        rows = factor.rows(start, min(start + step, factor.rank)).double()
        found.append((rows * wide.sharp(rows)).reshape(len(rows), -1).sum(1))
    return torch.cat(found)


def column(factor: MetricFactor, space: TangentSpace, index: Tensor) -> Tensor:
    """Return ``K sharp k_j``, a column of the Gram matrix.

    Args:
        factor: any factor.
        space: tangent space with the Riesz map and the mass.
        index: j, a scalar.

    Returns:
        ``(rank,)`` in float64. Cost: one product with K; O(rank (inputs / r + outputs))
        for a linear layer whose Riesz map is a division by its mass.
    """
    if isinstance(factor, ViewedFactor):
        view = factor.inner_space(space)
        if view is not None:
            return column(factor.inner, view, index)
    mass = space.divisor
    if mass is not None and isinstance(factor, LinearFactor | BiasFactor):
        r, n, positions, _ = factor.cotangents.shape
        if positions == 1:
            l = factor.cotangents.flatten(0, 1).squeeze(1)
            shared = (l @ l.index_select(0, index.view(1))[0]).double()
            if isinstance(factor, BiasFactor):
                return shared / mass
            x = factor.inputs.squeeze(1)
            known = (x @ x.index_select(0, (index % n).view(1))[0]).double()
            return shared * known.repeat(r) / mass
    one = torch.zeros(factor.rank, dtype=factor.dtype, device=factor.device)
    one.index_fill_(0, index.view(1), 1.0)
    return factor.matvec(space.sharp(factor.rmatvec(one))).double()


def _all_rows(factor: MetricFactor) -> Tensor:
    return factor.rows(0, factor.rank)
