"""The parts of the processes come together."""

from collections.abc import Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from riemannian_modules.distributed.ranks import Ranks
from riemannian_modules.factors import MetricFactor
from riemannian_modules.joining import Members, Offer, Pieces, Plan, cat_padded
from riemannian_modules.joining.members import own_residual, own_sums
from riemannian_modules.linearization import Linearization

__all__ = ["Processes", "join_rows", "summed"]


@final
class Processes(Members):
    """Every process brings its own part; all of them end up with the same.

    Args:
        ranks: the processes.
        found: the linearisation of this one.
        factors: the factors to send.
        pieces: the tensors that they are made of.
        like: the model's parameters by name, in the order of the gradients.
        share: the share of this process.
    """

    def __init__(
        self,
        ranks: Ranks,
        found: Linearization,
        factors: Mapping[str, MetricFactor],
        pieces: Pieces,
        like: Mapping[str, Tensor],
        share: float,
    ) -> None:
        self._ranks = ranks
        self._found = found
        self._factors = factors
        self._pieces = pieces
        self._like = like
        self._share = share

    def factors(self, offers: Sequence[Offer]) -> dict[str, MetricFactor]:
        """Return the factors of all examples: every process sends its tensors."""
        plan, device = Plan(offers), next(iter(self._like.values())).device
        own = plan.packed(self._ranks.rank, self._factors, self._pieces, device)
        return plan.joined(self._ranks.gather_bytes(own, plan.sizes))

    def sums(self, names: Sequence[str], *, rest: bool) -> list[dict[str, Tensor]]:
        """Return the weighted sums of gradients, and of rests."""
        wanted = own_sums(self._found, rest=rest)
        return summed(self._ranks, wanted, names, self._like, self._share)

    def residual(self, offers: Sequence[Offer]) -> Tensor:
        """Return the residual of all examples, ``(total rank,)``, weighted."""
        like = next(iter(self._like.values()))
        own = own_residual(self._found, self._share, like)
        return join_rows(self._ranks, offers, own)


def join_rows(ranks: Ranks, offers: Sequence[Offer], own: Tensor) -> Tensor:
    """Return a vector with one entry for each row of K, of all processes.

    Args:
        ranks: the processes.
        offers: what each of them has; the order of rows is that of their factors.
        own: the entries of this process.

    Returns:
        ``(total rank,)``.
    """
    sizes = [offer.rows * offer.examples for offer in offers]
    received = ranks.gather_bytes(
        own.contiguous().view(torch.uint8), [own.itemsize * size for size in sizes]
    )
    parts = [
        each.view(own.dtype).view(offer.rows, offer.examples)
        for each, offer in zip(received, offers, strict=True)
    ]
    return cat_padded(parts, 1).reshape(-1)


def summed(
    ranks: Ranks,
    wanted: Sequence[Mapping[str, Tensor]],
    names: Sequence[str],
    like: Mapping[str, Tensor],
    share: float,
) -> list[dict[str, Tensor]]:
    """Return weighted sums over the processes, zero where a process has nothing.

    Args:
        ranks: the processes.
        wanted: what this one has, by name; several at a time.
        names: what any of them has.
        like: tensors of the same shapes, by name.
        share: weight of this process.

    Returns:
        The sums, the same bits on all processes.
    """
    found: list[dict[str, Tensor]] = [{} for _ in wanted]
    kinds: dict[torch.dtype, list[tuple[int, str]]] = {}
    for index in range(len(wanted)):
        for name in names:
            kinds.setdefault(like[name].dtype, []).append((index, name))
    for dtype, places in kinds.items():
        # Sums of numbers in half precision would lose what the shares are about.
        wide = torch.promote_types(dtype, torch.float32)
        flat = torch.cat(
            [
                _or_zero(wanted[index].get(name), like[name]).to(wide).reshape(-1)
                for index, name in places
            ]
        )
        ranks.sum_(flat.mul_(share))
        sizes = [like[name].numel() for _, name in places]
        for (index, name), part in zip(places, flat.split(sizes), strict=True):
            value = part.to(dtype).view(like[name].shape)
            # Of its own memory: optimizers change gradients in place.
            found[index][name] = value.clone()
    return found


def _or_zero(value: Tensor | None, like: Tensor) -> Tensor:
    return torch.zeros_like(like) if value is None else value
