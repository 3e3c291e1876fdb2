"""What a rule of composition starts from, and how it concludes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from riemannian_modules.contraction.certificate import Certificate, Clock, Norm, Step
from riemannian_modules.contraction.result import (
    Gain,
    Rate,
    Side,
    Verdict,
    require_trajectories,
    weakest,
)
from riemannian_modules.errors import ContractionError

__all__ = [
    "GainLike",
    "Gains",
    "Premises",
    "RateLike",
    "Rates",
    "as_gain",
    "as_rate",
    "one_metric",
]

T = TypeVar("T")

RateLike = float | Rate | Certificate
GainLike = float | Gain
Rates = Mapping[str, RateLike] | Sequence[RateLike]
Gains = (
    Mapping[tuple[str, str], GainLike]
    | Sequence[Sequence[GainLike]]
    | NDArray[np.float64]
    | torch.Tensor
)

NO_COUPLING = Gain(0.0, side=Side.EXACT, source="no coupling, says the caller")


def as_rate(value: RateLike) -> Rate:
    """Return a rate; a number is a certified lower bound that the caller gives.

    Raises:
        ContractionError: it is infinite, in output space, in discrete time, or in a
            norm that no inner product belongs to.
    """
    if isinstance(value, Certificate):
        value = value.rate
    rate = value if isinstance(value, Rate) else Rate(float(value))
    if rate.norm != "2":
        raise ContractionError(
            f"a certificate in the {rate.norm}-norm cannot be composed further: its "
            "norm comes from no metric; use norm='2' below"
        )
    if rate.value == math.inf:
        raise ContractionError("an infinite rate; a rate is a finite lower bound")
    return require_trajectories(rate)


def as_gain(value: GainLike | None) -> Gain:
    """Return a gain; a number is a certified upper bound that the caller gives."""
    if value is None:
        return NO_COUPLING
    return value if isinstance(value, Gain) else Gain(float(value))


@dataclass(frozen=True)
class Premises:
    """Modules with their rates or factors, and the gains between them.

    Args:
        names: the modules.
        rates: a rate of each; in discrete time nothing.
        gains: ``gains[i][j]`` of module j on module i; the diagonal is no coupling, or
            in discrete time the factors.
        proofs: the certificates among the premises, by module.
    """

    names: tuple[str, ...]
    rates: tuple[Rate, ...] = ()
    gains: tuple[tuple[Gain, ...], ...] = ()
    proofs: Mapping[str, Certificate] = field(default_factory=dict)

    @classmethod
    def of(cls, rates: Rates, gains: Gains | None = None) -> "Premises":
        """Read the arguments of a rule.

        Raises:
            ContractionError: no modules, unknown names, a matrix of another shape, a
                gain of a module on itself.
        """
        given = _named(rates, "rates")
        names = tuple(given)
        proofs = {n: r for n, r in given.items() if isinstance(r, Certificate)}
        found = tuple(as_rate(each) for each in given.values())
        matrix = gain_matrix(names, gains)
        for name, row, index in zip(names, matrix, range(len(names)), strict=True):
            if row[index].value != 0:
                raise ContractionError(
                    f"module '{name}' has a gain of {row[index].value:.6g} on itself; "
                    "what it does to itself is in its rate"
                )
        return cls(names, found, matrix, proofs)

    @classmethod
    def discrete(
        cls,
        factors: Mapping[str, GainLike | Certificate]
        | Sequence[GainLike | Certificate],
        gains: Gains | None,
    ) -> "Premises":
        """Read factors and gains; the factors become the diagonal.

        Raises:
            ContractionError: as :meth:`of`; a certificate in continuous time.
        """
        given = _named(factors, "factors")
        names = tuple(given)
        proofs = {n: q for n, q in given.items() if isinstance(q, Certificate)}
        own = [
            q.factor if isinstance(q, Certificate) else as_gain(q)
            for q in given.values()
        ]
        matrix = [list(row) for row in gain_matrix(names, gains)]
        for index, factor in enumerate(own):
            if matrix[index][index].value != 0:
                raise ContractionError(
                    f"the gain of module '{names[index]}' on itself is its factor; "
                    "leave the diagonal of the gains zero"
                )
            matrix[index][index] = factor
        return cls(names, (), tuple(tuple(row) for row in matrix), proofs)

    @property
    def values(self) -> list[float]:
        """The rates as numbers."""
        return [rate.value for rate in self.rates]

    @property
    def matrix(self) -> NDArray[np.float64]:
        """The gains as numbers."""
        return np.array([[g.value for g in row] for row in self.gains], dtype=float)

    @property
    def finite(self) -> bool:
        """Whether every rate and every gain is a finite number."""
        return bool(np.isfinite(self.matrix).all() and np.isfinite(self.values).all())

    def _all(self) -> list[Rate | Gain]:
        used = [gain for row in self.gains for gain in row if gain is not NO_COUPLING]
        return [*self.rates, *used]

    def steps(self) -> tuple[Step, ...]:
        """A line for each module, then one for each coupling that is not zero."""
        shared = len({premise.where for premise in self._all()}) == 1
        lines = []
        for name, rate in zip(self.names, self.rates, strict=False):
            said = str(rate).removesuffix(f", {rate.where}") if shared else str(rate)
            claim = f"{name} contracts with the rate {said}"
            numbers = {"rate": rate.value}
            lines.append(Step(claim, rate.source, numbers, self.proofs.get(name)))
        for i, target in enumerate(self.names):
            for j, source in enumerate(self.names):
                gain = self.gains[i][j]
                if (i == j and self.rates) or (i != j and gain.value == 0):
                    continue
                said = (
                    str(gain).removesuffix(f", {gain.where}") if shared else str(gain)
                )
                claim = f"{source} acts on {target} with the gain {said}"
                proof = None
                if i == j:
                    claim = f"{target} contracts in one step by the factor {said}"
                    proof = self.proofs.get(target)
                lines.append(Step(claim, gain.source, {"gain": gain.value}, proof))
        return tuple(lines)

    def conclude(
        self,
        rule: str,
        value: float,
        weights: Sequence[float],
        reasons: Sequence[Step],
        assumptions: Sequence[str] = (),
        *,
        clock: Clock = "continuous",
        norm: Norm = "2",
        limits: Mapping[str, float] | None = None,
        like: Certificate | str | None = None,
    ) -> Certificate:
        """Return the certificate of a rule that needs all premises.

        Args:
            rule: its name.
            value: what it concludes; safe with safe premises.
            weights: ``d_i`` of the modules.
            reasons: the steps of the proof after the premises.
            assumptions: what else it takes for granted.
            clock: of the certificate.
            norm: of the certificate.
            limits: further numbers.
            like: a metric in words, or a certificate whose metric it is, instead of the
                weights.

        Returns:
            The certificate; certified only if all premises are and the value says so.
        """
        premises = self._all()
        safe_sides = {Side.EXACT, Side.LOWER}, {Side.EXACT, Side.UPPER}
        safe = all(p.side in safe_sides[isinstance(p, Gain)] for p in premises)
        proved = Side.LOWER if clock == "continuous" else Side.UPPER
        shrinks = value > 0 if clock == "continuous" else value < 1
        verdict = weakest(p.verdict for p in premises)
        metrics: Mapping[str, str]
        by_name: Mapping[str, float]
        nested: Mapping[str, Certificate]
        if like is None:
            words = [r.metric for r in self.rates] or ["P"] * len(self.names)
            metrics = dict(zip(self.names, words, strict=True))
            by_name = dict(zip(self.names, map(float, weights), strict=True))
            nested = self.proofs
        elif isinstance(like, str):
            metrics, by_name, nested = {"x": like}, {"x": 1.0}, {}
        else:
            metrics, by_name, nested = like.metrics, like.weights, like.nested
        below = [each for p in self.proofs.values() for each in p.assumptions]
        return Certificate(
            rule=rule,
            value=value,
            weights=dict(by_name),
            verdict=verdict if shrinks else Verdict.NOT_CERTIFIED,
            side=proved if safe else Side.ESTIMATE,
            region=" and ".join(dict.fromkeys(p.where for p in premises)),
            metrics=dict(metrics),
            assumptions=tuple(dict.fromkeys([*assumptions, *below])),
            steps=(*self.steps(), *reasons),
            clock=clock,
            norm=norm,
            limits=dict(limits or {}),
            nested=dict(nested),
        )


def gain_matrix(
    names: tuple[str, ...], gains: Gains | None
) -> tuple[tuple[Gain, ...], ...]:
    """Return ``gains[target][source]`` for all pairs of modules.

    Raises:
        ContractionError: an unknown name, or a matrix of another shape.
    """
    n = len(names)
    matrix = [[NO_COUPLING] * n for _ in range(n)]
    if gains is None:
        return tuple(tuple(row) for row in matrix)
    if isinstance(gains, Mapping):
        for (target, source), gain in gains.items():
            for name in (target, source):
                if name not in names:
                    raise ContractionError(
                        f"a gain names '{name}', the modules are {', '.join(names)}"
                    )
            matrix[names.index(target)][names.index(source)] = as_gain(gain)
        return tuple(tuple(row) for row in matrix)
    if isinstance(gains, torch.Tensor | np.ndarray):
        gains = gains.tolist()
    rows = [list(row) for row in gains]
    if len(rows) != n or any(len(row) != n for row in rows):
        raise ContractionError(
            f"{n} modules need a {n} x {n} matrix of gains, [target][source]; got rows "
            f"of {[len(row) for row in rows]}"
        )
    return tuple(
        tuple(
            NO_COUPLING if i == j and not isinstance(g, Gain) and g == 0 else as_gain(g)
            for j, g in enumerate(row)
        )
        for i, row in enumerate(rows)
    )


def one_metric(rates: Sequence[Rate]) -> str:
    """Return the metric that all rates share, by their words for it.

    Raises:
        ContractionError: they are rates in different metrics.
    """
    found = list(dict.fromkeys(rate.metric for rate in rates))
    if len(found) > 1:
        raise ContractionError(
            f"rates in different metrics ({'; '.join(found)}) do not add up: two "
            "systems that contract, each in its own metric, can have an unstable sum. "
            "Find the rates of all of them in one metric"
        )
    return found[0]


def _named(values: Mapping[str, T] | Sequence[T], what: str) -> dict[str, T]:
    if isinstance(values, Mapping):
        found = dict(values)
    else:
        found = {str(index): value for index, value in enumerate(values, 1)}
    if not found:
        raise ContractionError(f"no {what}: a composition needs at least one module")
    return found
