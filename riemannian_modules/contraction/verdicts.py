"""What is known of a rate, of the smallest eigenvalue that was found."""

import math
from dataclasses import dataclass

from riemannian_modules.contraction.eigen import Smallest
from riemannian_modules.contraction.replica import Replica
from riemannian_modules.contraction.result import SMALL, Side, Verdict

__all__ = ["Judged", "judge"]


@dataclass(frozen=True)
class Judged:
    """A value with its side, its verdict and the reasons."""

    value: float
    side: Side
    verdict: Verdict
    source: str


def judge(found: Smallest, replica: Replica, *, decays: bool) -> Judged:
    """Return the value on the safe side of rounding, and what is known of it.

    Args:
        found: the smallest eigenvalue.
        replica: model and data.
        decays: whether weight decay is part of the flow.

    Returns:
        The rate; a lower or an upper bound where rounding is not small against it.
    """
    value, side = found.value, found.side
    source = f"{found.how}, rounding within {found.noise:.1e}"
    if side is not Side.LOWER and value + found.above < 0.0:
        verdict = Verdict.REFUTED
    elif value > found.noise:
        proves = side is not Side.UPPER
        verdict = Verdict.CERTIFIED if proves else Verdict.EVIDENCE
        if not decays and 0 < (rank := replica.rank) < replica.dim:
            # True at this point, but in no region around a point that fits exactly.
            verdict = Verdict.EVIDENCE
            source += (
                f"; {replica.dim} dimensions move the outputs in {rank} directions "
                "only: where all is fitted the rate is zero without weight decay"
            )
    else:
        verdict = Verdict.NOT_CERTIFIED
    if side is Side.UPPER:
        return Judged(value + found.above, side, verdict, source)
    clear = max(found.noise, found.above) <= SMALL * abs(value)
    if verdict is Verdict.REFUTED:
        if clear:
            return Judged(value, side, verdict, source)
        return Judged(value + found.above, Side.UPPER, verdict, source)
    value = -math.inf if math.isinf(found.noise) else value - found.noise
    return Judged(value, side if clear else Side.LOWER, verdict, source)
