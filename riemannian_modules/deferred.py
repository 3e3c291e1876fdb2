"""Covectors that are worked out when they are first asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import final

import torch
from torch import Tensor

from riemannian_modules.factors import MetricFactor
from riemannian_modules.precision import without_autocast

__all__ = ["Deferred"]


@final
class Deferred(Mapping[str, Tensor]):
    """Products of factors, each made when it is first read, and kept.

    They are made without gradients and outside of autocast, wherever they are read.

    Args:
        factors: by name.
        product: returns the covector of a factor.

    >>> from riemannian_modules.factors import DenseFactor
    >>> rows = {"a": DenseFactor(torch.ones(3, 2)), "b": DenseFactor(torch.ones(3, 1))}
    >>> covectors = Deferred(rows, lambda factor: factor.row_sum())
    >>> list(covectors), covectors["a"]
    (['a', 'b'], tensor([3., 3.]))
    """

    def __init__(
        self,
        factors: Mapping[str, MetricFactor],
        product: Callable[[MetricFactor], Tensor],
    ) -> None:
        self._factors = factors
        self._product = product
        self._known: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._known:
            self._make([name])
        return self._known[name]

    def all(self) -> dict[str, Tensor]:
        """Return all of them, made now."""
        self._make([name for name in self._factors if name not in self._known])
        return {name: self._known[name] for name in self._factors}

    def _make(self, names: Sequence[str]) -> None:
        factors = {name: self._factors[name] for name in names}
        kind = next((f.device.type for f in factors.values()), "cpu")
        with torch.no_grad(), without_autocast(kind):
            for name, factor in factors.items():
                self._known[name] = self._product(factor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._factors)

    def __len__(self) -> int:
        return len(self._factors)

    def __contains__(self, name: object) -> bool:
        # That of Mapping would make the covector.
        return name in self._factors
