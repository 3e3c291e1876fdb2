"""Whether what was made twice is the same, and which way was taken."""

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from riemannian_modules.rules.base import Call
from riemannian_modules.untraced import is_compiled

__all__ = ["agree", "combinations", "same", "warn_of_loop"]

_COMBINATIONS = 3


def combinations(cotangents: Tensor) -> Tensor:
    """Return weights of a few sums of cotangents in which every one of them is seen.

    Rows are linear in their cotangents: those of the sums are the sums of the rows, and
    take as many passes as there are sums. The weights are random and the same in every
    call, and none is small.

    Args:
        cotangents: ``(r, *shape)``.

    Returns:
        ``(m, r)`` with m at most 3; the identity for so few cotangents.
    """
    rank = len(cotangents)
    if rank <= _COMBINATIONS:
        return torch.eye(rank).to(cotangents)
    # A generator of its own: the numbers that a model draws stay the same.
    generator = torch.Generator().manual_seed(0)
    sizes = 1.0 + torch.rand(_COMBINATIONS, rank, generator=generator)
    signs = torch.randint(2, sizes.shape, generator=generator) * 2.0 - 1.0
    return (sizes * signs).to(cotangents)


def agree(
    one: Mapping[str, Tensor],
    scaled: Callable[[float], Mapping[str, Tensor]],
    weights: Tensor | None = None,
) -> bool:
    """Whether rows of the same parameters are the same but for rounding.

    Args:
        one: rows by parameter.
        scaled: makes those that are right, or sums of them, multiplied by a number that
            the cotangents are multiplied with.
        weights: the weights of these sums, ``(m, r)``, for rows ``(n, r, *shape)``;
            None: none are summed.
    """
    other = scaled(1.0)
    # Of single rows: a sum of many is larger, and would hide that one of them is wrong.
    sizes = {name: each.abs().amax() for name, each in one.items() if each.numel()}
    if not sizes:
        return True
    largest = torch.stack([size.double() for size in sizes.values()]).max()
    rounding: Tensor | None = None
    for name, size in sizes.items():
        eps = torch.finfo(size.dtype).eps
        # A derivative that vanishes is rounding of the others.
        bound = eps**0.5 * size + 1e3 * eps * largest
        own = one[name] if weights is None else _summed(weights, one[name])
        error = (own - other[name]).abs().amax()
        # The bound of infinite rows is infinite.
        if bool((error <= bound) & error.isfinite()):
            continue
        # Where terms cancel, all derivatives are rounding of what is not seen here.
        rounding = _rounding(other, scaled) if rounding is None else rounding
        if not bool(error <= 16.0 * rounding):
            return False
    return True


def _summed(weights: Tensor, rows: Tensor) -> Tensor:
    return torch.einsum("mr,nr...->nm...", weights.to(rows), rows)


def _rounding(
    rows: Mapping[str, Tensor], scaled: Callable[[float], Mapping[str, Tensor]]
) -> Tensor:
    """Return by how much rows change that are scaled on their way and scaled back."""
    changes = [
        (each / scale - rows[name]).abs().amax().double()
        for scale in (1.1, 1.3, 1.7)
        for name, each in scaled(scale).items()
        if each.numel()
    ]
    return torch.stack(changes).max()


def same(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    """Whether two runs gave the very same; without values to compare they did.

    Args:
        one: tensors.
        other: as many others.
    """
    return all(
        a.shape == b.shape and (a.is_meta or torch.equal(a, b))
        for a, b in zip(one, other, strict=True)
    )


def warn_of_loop(call: Call, failure: str | None) -> None:
    """Warn once of examples that are differentiated one by one because of an error.

    Args:
        call: the call of a module; its memo keeps that it was said.
        failure: the error, None if there was none.
    """
    if failure is None or "told" in call.memo:
        return
    call.memo["told"] = True
    # A compiled module may be one that nobody can map: nothing is to be done there. Of
    # packed sequences the rule of recurrent layers has warned.
    expected = any(
        is_compiled(each) or isinstance(each, nn.RNNBase)
        for each in call.module.modules()
    )
    if not expected:
        warnings.warn(
            f"{call.label} cannot be mapped by torch.func.vmap "
            f"({failure.strip().splitlines()[-1]}): its examples are differentiated "
            "one by one, which is slower. Replace what vmap does not take: geoopt's "
            "Poincare ball by riemannian_modules.manifolds.PoincareBall, or give a "
            "function of your own a rule for vmap",
            stacklevel=2,
        )
