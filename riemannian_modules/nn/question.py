"""What a user asks of a composition that is to be certified."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from riemannian_modules.contraction import Certificate, Gain, Rate, discrete
from riemannian_modules.contraction.gains import lipschitz, measured_gain
from riemannian_modules.contraction.hierarchy import hierarchy
from riemannian_modules.contraction.networks import small_gain
from riemannian_modules.contraction.premises import Rates, as_rate
from riemannian_modules.errors import ContractionError

__all__ = ["Bounds", "Question"]

Bounds = Literal["operator_norm", "measured"]


@dataclass(frozen=True)
class Question:
    """What a user of ``certificate`` has asked.

    Args:
        rates: of the children's own dynamics, where they have any.
        bounds: how gains are found.
        at: inputs at which they are measured.
        slack: of the rule that concludes.
        epsilon: of a hierarchy.
        target: of a hierarchy.
    """

    rates: Rates | None
    bounds: Bounds
    at: tuple[Tensor, ...]
    slack: float | None = None
    epsilon: float | None = None
    target: float | None = None

    def gain(
        self,
        module: nn.Module,
        inputs: Callable[[], tuple[Tensor, ...]],
        argument: int = 0,
    ) -> Gain:
        """Return the gain of a child; its inputs are computed where they are needed."""
        if self.bounds == "operator_norm":
            return lipschitz(module, argument)
        with torch.no_grad():
            points = inputs()
        return measured_gain(module, *points, argument=argument)

    def named_rates(self, names: Sequence[str]) -> dict[str, Rate | Certificate]:
        """Return a rate for every child.

        Raises:
            ContractionError: they are missing or others.
        """
        given = self.rates
        told = ", ".join(names)
        if given is None:
            raise ContractionError(
                f"give rates of the children's own dynamics, for {told}: a map has "
                "none, see the page on certificates"
            )
        if not isinstance(given, Mapping):
            if len(given) != len(names):
                raise ContractionError(
                    f"{len(given)} rates for {len(names)} children: {told}"
                )
            given = dict(zip(names, given, strict=True))
        if set(given) != set(names):
            raise ContractionError(
                f"rates for {', '.join(given)}; the children are {told}"
            )
        return {
            name: rate if isinstance(rate, Certificate) else as_rate(rate)
            for name, rate in ((name, given[name]) for name in names)
        }

    def network(
        self,
        rates: Mapping[str, Rate | Certificate],
        gains: Mapping[tuple[str, str], Gain],
    ) -> Certificate:
        """Return the certificate of driven states."""
        if self.epsilon is None and self.target is None:
            return small_gain(rates, gains, slack=self.slack)
        return hierarchy(rates, gains, epsilon=self.epsilon, target=self.target)

    def maps(
        self,
        factors: Mapping[str, Gain],
        gains: Mapping[tuple[str, str], Gain] | None = None,
    ) -> Certificate:
        """Return the certificate of maps.

        Raises:
            ContractionError: a hierarchy was designed.
        """
        if self.epsilon is not None or self.target is not None:
            raise ContractionError(
                "epsilon and target belong to hierarchies in continuous time"
            )
        return discrete(factors, gains, slack=self.slack)

    def no_rates(self, why: str) -> None:
        """Refuse rates.

        Raises:
            ContractionError: there are some.
        """
        if self.rates is not None:
            raise ContractionError(f"rates have no place here: {why}")
