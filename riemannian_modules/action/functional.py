"""The action of a trajectory: how far a training run is from the gradient flow."""

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from riemannian_modules.action.trajectory import Local, Point, Trajectory
from riemannian_modules.contraction import Bound, Constant, Rate, Side, Verdict
from riemannian_modules.contraction.bound import conclude
from riemannian_modules.contraction.constants import as_rate, as_size
from riemannian_modules.contraction.memory import memory
from riemannian_modules.contraction.verified import sqrt_up, times_up
from riemannian_modules.errors import ContractionError

__all__ = ["Action", "Dissipation", "action", "dissipation", "tube_bound"]

Kind = Literal["left", "midpoint", "discrete_gradient"]


@dataclass(frozen=True)
class Action:
    """The action of a discrete path.

    Attributes:
        value: The action, a sum of squares and so never negative.
        energy: The same by kinetic energy, dissipation and drop of the loss. The two
            agree for "discrete_gradient" only; for the other kinds the energy can be
            negative and certifies nothing. None where the last loss is not known.
        kind: The discretisation.
        contributions: What every step adds to the value.
        duration: How long the path lasts.
    """

    value: float
    energy: float | None
    kind: Kind
    contributions: tuple[float, ...]
    duration: float

    def __str__(self) -> str:
        return f"action {self.value:.6g} ({self.kind}, {len(self.contributions)} steps)"


def action(path: Trajectory, kind: Kind = "left") -> Action:
    """Return the action ``1/2 int |w' + grad f|^2 dt`` of a discrete path.

    It is zero only for the gradient flow. Implements :eq:`action-discrete`.

    Args:
        path: The trajectory.
        kind: "left": first order in the steps, and zero exactly for the iterates of
            Riemannian gradient descent with steps as long as their duration; needs
            nothing beyond what a recorder saw. "midpoint": second order, zero for the
            implicit midpoint rule. "discrete_gradient": second order, with the
            differential replaced by one that reproduces the change of the loss over
            the step exactly :cite:p:`gonzalez1996`, so that the balance of energy
            holds for the discrete path, too. The last two need a landscape.

    Returns:
        The action. Cost of the last two kinds: one evaluation for each step.

    Raises:
        ContractionError: Unknown kind, or points too far apart for the retraction.
        NotRecordedError: A landscape is needed and there is none.

    Example:
        A straight path down half a square, in the Euclidean metric.

        >>> import torch, geoopt
        >>> from riemannian_modules import LayerMetric, Part, TangentSpace
        >>> def landscape(point):
        ...     space = TangentSpace(geoopt.Euclidean(), point["w"])
        ...     loss = float(0.5 * point["w"].square().sum())
        ...     return Local(loss, dict(point), (LayerMetric([Part("w", space)]),))
        >>> points = [{"w": torch.tensor([w])} for w in (1.0, 0.5)]
        >>> path = Trajectory(points, [1.0], landscape)
        >>> action(path).value, action(path, "midpoint").value
        (0.125, 0.03125)
    """
    if kind not in ("left", "midpoint", "discrete_gradient"):
        raise ContractionError(
            f"kind={kind!r}; choose 'left', 'midpoint' or 'discrete_gradient'"
        )
    contributions, energy = [], 0.0
    for k, h in enumerate(path.durations):
        local, velocity, gradient = _sample(path, kind, k, h)
        miss = {name: velocity[name] + x for name, x in gradient.items()}
        contributions.append(0.5 * h * max(local.inner(miss, miss), 0.0))
        energy += 0.5 * h * local.inner(velocity, velocity)
        energy += 0.5 * h * local.inner(gradient, gradient)
    drop = _drop(path)
    return Action(
        math.fsum(contributions),
        None if drop is None else energy - drop,
        kind,
        tuple(contributions),
        path.duration,
    )


@dataclass(frozen=True)
class Dissipation:
    """Three numbers that agree along the gradient flow.

    Attributes:
        drop: Decrease of the loss from start to end; None if the end was not seen.
        gradient: ``int |grad f|^2 dt``, from the left ends of the steps.
        velocity: ``int |w'|^2 dt``, from the steps.
    """

    drop: float | None
    gradient: float
    velocity: float


def dissipation(path: Trajectory) -> Dissipation:
    """Return how much loss a path gave up, and how much a flow would have.

    Along the gradient flow all three are equal; of iterates of step length ``h`` they
    agree up to O(h). Implements :eq:`dissipation`.

    Args:
        path: The trajectory.

    Returns:
        The three numbers.

    Raises:
        NotRecordedError: A point was not seen and there is no landscape.
    """
    gradients = velocities = 0.0
    for k, h in enumerate(path.durations):
        local, velocity, gradient = _sample(path, "left", k, h)
        gradients += h * local.inner(gradient, gradient)
        velocities += h * local.inner(velocity, velocity)
    return Dissipation(_drop(path), gradients, velocities)


def tube_bound(
    found: Action | float,
    rate: Rate | Constant | float,
    t: float | None = None,
    *,
    region: str | None = None,
) -> Bound:
    """Bound the distance of a path from the gradient flow of the same start.

    Implements :eq:`action-tube`.

    Args:
        found: Its action. That of a discrete path is an estimate of the action of the
            curve through its points, so the bound is evidence.
        rate: Rate at which the flow contracts, of any sign.
        t: Duration; None: that of the path.
        region: Where the caller says that the rate holds.

    Returns:
        The bound on the distance at the end, in the metric.

    Raises:
        ContractionError: No duration is known, or a negative action.

    Example:
        >>> tube_bound(0.5, rate=0.0, t=4.0).value
        2.0
    """
    if isinstance(found, Action):
        given = Constant(
            "S",
            found.value,
            f"action ({found.kind})",
            Side.ESTIMATE,
            Verdict.EVIDENCE,
            source="discretised",
        )
        t = found.duration if t is None else t
    else:
        given = as_size(found, "S", "action")
    if t is None:
        raise ContractionError("give t=, the duration of the path of this action")
    speed = as_rate(rate)
    # (1 - exp(-2 rate t)) / rate is twice the memory of twice the rate.
    return conclude(
        sqrt_up(times_up(2.0, given.value, memory(2.0 * speed.value, t))),
        f"distance from the gradient flow at time {t:.4g}",
        [given, speed],
        assumptions=["the same start", "a geodesically convex region with both paths"],
        source="first variation of length and the Cauchy-Schwarz inequality",
        region=region,
    )


def _sample(
    path: Trajectory, kind: Kind, k: int, h: float
) -> tuple[Local, dict[str, Tensor], Point]:
    """Return where a step is looked at, its velocity and the gradient there."""
    start, end = path.points[k], path.points[k + 1]
    whole = path.step(start, end)
    if kind == "left":
        local = path.local(k)
        return local, _scaled(whole, 1.0 / h), local.gradient
    middle = path.moved(start, _scaled(whole, 0.5))
    local = path.at(middle)
    ahead, behind = path.step(middle, end), path.step(middle, start)
    step = {name: u - behind[name] for name, u in ahead.items()}
    gradient = local.gradient
    if kind == "discrete_gradient":
        rise = path.local(k + 1).loss - path.local(k).loss
        length = local.inner(step, step)
        share = (rise - local.pair(step)) / length if length > 0 else 0.0
        gradient = {name: x + share * step[name] for name, x in gradient.items()}
    return local, _scaled(step, 1.0 / h), gradient


def _scaled(u: Point, factor: float) -> dict[str, Tensor]:
    return {name: factor * v for name, v in u.items()}


def _drop(path: Trajectory) -> float | None:
    last = len(path.durations)
    known = path.seen[last] if last < len(path.seen) else None
    if known is None and path.landscape is None:
        return None
    return path.local(0).loss - path.local(last).loss
