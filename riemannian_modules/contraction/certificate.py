"""A statement about the convergence of a composition, with its proof."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from riemannian_modules.contraction.result import Gain, Norm, Rate, Side, Verdict
from riemannian_modules.errors import ContractionError

__all__ = ["Certificate", "Clock", "Norm", "Step"]

Clock = Literal["continuous", "discrete"]


@dataclass(frozen=True)
class Step:
    """A line of a proof.

    Args:
        claim: what holds, in words, with its numbers.
        source: the theorem, the computation or the person behind it.
        numbers: the numbers of the claim by name.
        proof: the certificate that the claim rests on, if it rests on one.
    """

    claim: str
    source: str = ""
    numbers: Mapping[str, float] = field(default_factory=dict)
    proof: "Certificate | None" = None


@dataclass(frozen=True)
class Certificate:
    """What is known of the convergence of a composition, and why.

    In continuous time two trajectories approach each other like ``exp(-value * t)``,
    in discrete time their distance shrinks by the factor ``value`` in every step, in
    the composite metric ``blockdiag(d_i P_i)`` and as long as both stay in the region.
    The rules of composition make certificates; ``print`` shows one as a short proof.

    Args:
        rule: the rule of composition.
        value: the rate, or the contraction factor in discrete time.
        weights: ``{module: d_i}`` of the composite metric; ``w_i`` of
            ``max w_i |x_i|`` or ``sum w_i |x_i|`` in the other norms.
        verdict: what is known. Never better than what the certificate rests on.
        side: on which side of the truth the value lies.
        region: where it holds, in words.
        metrics: ``{module: metric}``, in words.
        assumptions: what the rule takes for granted, in words.
        steps: the proof.
        clock: ``"continuous"`` or ``"discrete"`` time.
        norm: how the norms of the modules are combined: ``"2"`` is the metric
            ``blockdiag(d_i P_i)``.
        limits: further numbers of the rule: largest time scale, loss, margin.
        nested: ``{module: certificate}`` where a module is a composition itself.

    Raises:
        ContractionError: it is called certified and does not say that distances
            shrink, or lies on the wrong side of the truth.

    >>> from riemannian_modules.contraction import small_gain
    >>> both = small_gain({"x": 3.0, "y": 4.0}, {("x", "y"): 1.0, ("y", "x"): 2.0})
    >>> both.value, str(both.verdict)
    (2.0, 'certified')
    """

    rule: str
    value: float
    weights: Mapping[str, float]
    verdict: Verdict
    side: Side
    region: str
    metrics: Mapping[str, str]
    assumptions: tuple[str, ...] = ()
    steps: tuple[Step, ...] = ()
    clock: Clock = "continuous"
    norm: Norm = "2"
    limits: Mapping[str, float] = field(default_factory=dict)
    nested: Mapping[str, "Certificate"] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if math.isnan(self.value):
            raise ContractionError(f"the value of the rule '{self.rule}' is NaN")
        if self.verdict is not Verdict.CERTIFIED:
            return
        good = (Side.EXACT, Side.LOWER if self.continuous else Side.UPPER)
        if not self.shrinks or self.side not in good:
            raise ContractionError(
                f"{self.value:.6g} ({self.side}) certifies no contraction in "
                f"{self.clock} time; its verdict can only be "
                f"'{Verdict.NOT_CERTIFIED}' or '{Verdict.EVIDENCE}'"
            )

    @property
    def continuous(self) -> bool:
        """Whether it speaks about a flow, not about a map."""
        return self.clock == "continuous"

    @property
    def shrinks(self) -> bool:
        """Whether the value, proved or not, says that distances shrink."""
        return self.value > 0 if self.continuous else self.value < 1

    @property
    def contracts(self) -> bool:
        """Whether contraction is proved."""
        return self.verdict is Verdict.CERTIFIED

    @property
    def children(self) -> tuple["Certificate", ...]:
        """The certificates that this one rests on."""
        return tuple(step.proof for step in self.steps if step.proof is not None)

    @property
    def rate(self) -> Rate:
        """The rate, for the next level of composition.

        Raises:
            ContractionError: it speaks about a map; take :attr:`factor`.
        """
        if not self.continuous:
            raise ContractionError(
                "a certificate in discrete time has a contraction factor and no rate: "
                "take certificate.factor, and combine factors with discrete(...)"
            )
        return Rate(
            self.value,
            kind=self.rule,
            metric=self.metric,
            where=self.region,
            side=self.side,
            verdict=self.verdict,
            source=f"the rule of composition '{self.rule}'",
            norm=self.norm,
        )

    @property
    def factor(self) -> Gain:
        """The contraction factor of one step, for the next level of composition.

        Raises:
            ContractionError: it speaks about a flow; take :attr:`rate`.
        """
        if self.continuous:
            raise ContractionError(
                "a certificate in continuous time has a rate and no factor: take "
                "certificate.rate"
            )
        return Gain(
            self.value,
            where=self.region,
            side=self.side,
            verdict=self.verdict,
            source=f"the rule of composition '{self.rule}'",
        )

    @property
    def leaves(self) -> dict[str, float]:
        """Weights of the innermost modules: those of nested metrics multiply."""
        found: dict[str, float] = {}
        for name, weight in self.weights.items():
            child = self.nested.get(name)
            if child is None:
                found[name] = weight
            else:
                inner = child.leaves.items()
                found |= {f"{name}.{leaf}": weight * value for leaf, value in inner}
        return found

    @property
    def condition(self) -> float:
        """Largest over smallest weight, down to the innermost modules."""
        found = self.leaves.values()
        return max(found) / min(found)

    @property
    def overshoot(self) -> float:
        """How far a distance may grow in the unweighted norm before it shrinks."""
        return math.sqrt(self.condition) if self.norm == "2" else self.condition

    @property
    def metric(self) -> str:
        """The composite metric in words, with all digits of its weights."""
        return self._metric_in_words("{!r}")

    def _metric_in_words(self, digits: str) -> str:
        parts = [
            f"{digits.format(weight)} * {self.metrics[name]}[{name}]"
            for name, weight in self.weights.items()
        ]
        if self.norm == "2":
            only = len(parts) == 1 and set(self.weights.values()) == {1.0}
            return (
                next(iter(self.metrics.values()))
                if only
                else f"blockdiag({', '.join(parts)})"
            )
        return f"{'max' if self.norm == 'inf' else 'sum'}({', '.join(parts)})"

    def __str__(self) -> str:
        what = "rate" if self.continuous else "contraction factor"
        lines = [
            f"{_TITLES[self.verdict]}: {what} {self.value:.6g} ({self.side}), "
            f"by the rule '{self.rule}'",
            f"  metric    {self._metric_in_words('{:.6g}')}",
            f"  region    {self.region}",
            f"  distance  {self._envelope()}",
            *(f"  {name:9s} {value:.6g}" for name, value in self.limits.items()),
            "Proof" if self.contracts else "Reasoning",
            *self._lines("  "),
        ]
        if self.assumptions:
            lines += ["Assuming", *(f"  - {each}" for each in self.assumptions)]
        return "\n".join(lines)

    def _envelope(self) -> str:
        if not self.contracts:
            seen = self.verdict is Verdict.EVIDENCE
            return "not bounded: seen at points only" if seen else "not bounded"
        many, value = self.overshoot, self.value
        law = f"exp({-value:.6g} t)" if self.continuous else f"{value:.6g}^t"
        more = f"; unweighted {many:.6g} * {law}" if many > 1 else ""
        return f"d(t) <= {law} d(0){more} (condition number {self.condition:.6g})"

    def _lines(self, lead: str, number: str = "") -> Iterator[str]:
        for index, step in enumerate(self.steps, 1):
            label = f"{number}{index}."
            source = f" [{step.source}]" if step.source else ""
            yield f"{lead}{label} {step.claim}{source}"
            if step.proof is not None:
                yield from step.proof._lines(f"{lead}   ", label)


_TITLES = {
    Verdict.CERTIFIED: "Certificate",
    Verdict.EVIDENCE: "Evidence, no proof",
    Verdict.NOT_CERTIFIED: "Not certified",
    Verdict.REFUTED: "Refuted",
}
