r"""From a candidate and the step before to a step, in numbers that nobody reads.

With the candidate v, the step before d and its part ``beta`` that is kept,

    x   = sharp(K^T (y + beta K d) + e),  v = -x        the pull of the new data
    u   = s (a v + b d)                                 the step, before ``lr``

where (a, b) is (1, beta) or what the quadratic model says, and s keeps u within what
the model may be trusted with. The rows of K know less of the curvature along v than
they should, since v was fitted to them; the next rows, which measure K d anyway, tell
how much less, and whether the step went too far. All of it stays on the device.
"""

from dataclasses import dataclass, replace

import geoopt
import torch
from torch import Tensor

from riemannian_modules.optim.quadratic import Numbers

__all__ = [
    "FIRST",
    "Motion",
    "Rule",
    "best_pair",
    "corrected",
    "credible_share",
    "foreseen",
    "lower",
    "renewed",
    "transported",
    "within",
]

_DEPENDENT = 1e-12
_MEMORY = 0.7
# The measured curvature is noisy, and to overrate it costs speed.
_SLACK = 1.5
# After a step far too long all are short, and weigh nothing in sums beside it: so it
# counts for no more than this. With all rows it was the point that was another, and
# steps that went as foreseen take it back.
_WORST, _FAR, _FORGIVEN = 1e4, 100.0, 0.25
# The reach follows slowly, since one batch says little of it, and never below a tenth,
# since steps that hardly move learn nothing any more.
_PATIENCE, _GAIN, _SHORTEST = 0.9, 0.05, 0.1
# Part of the first step that is taken where only other rows will tell what it is worth.
FIRST = 0.1


@dataclass(frozen=True)
class Rule:
    """How long steps are; see :class:`riemannian_modules.optim.RiemannianSGD`.

    Attributes:
        automatic: whether the quadratic model chooses the length.
        spring: part of the step before that is kept.
        floor: what the loss cannot fall below, or None.
        clip: bound on the step in the metric norm, or None.
        normalize: whether the step has the length ``lr`` in the metric norm.
    """

    automatic: bool
    spring: float
    floor: float | None
    clip: float | None
    normalize: bool

    @property
    def plain(self) -> bool:
        """Whether a step is ``-lr`` times the solution and nothing else."""
        return not (self.keeps or self.measures)

    @property
    def keeps(self) -> bool:
        """Whether the step before counts."""
        return self.automatic or self.spring > 0.0

    def gap(self, loss: Tensor, lowest: Tensor | None) -> Tensor | None:
        """Return the loss above its floor; None without one.

        A floor that a loss was below lies as far under the lowest loss from then on.

        Args:
            loss: scalar.
            lowest: the lowest loss so far, or None.
        """
        if self.floor is None:
            return None
        gap = loss.double() - self.floor
        if lowest is None:
            return gap
        slack = torch.finfo(loss.dtype).eps ** 0.5 * (1.0 + abs(self.floor))
        below = self.floor - lowest.to(gap)
        return torch.where(below > slack, gap + 2.0 * below, gap)

    @property
    def measures(self) -> bool:
        """Whether the quadratic model is asked."""
        return self.automatic or self.clip is not None or self.normalize


@dataclass(frozen=True)
class Motion:
    """A step before ``lr``.

    Attributes:
        vectors: ``{parameter name: u}``, tangent vectors.
        along: the coefficient a of the candidate.
        carried: the coefficient b of the step before.
        share: the factor s.
        length: the step's length in the metric norm, where it is known.
        inflation: what the curvature along the candidate was multiplied by.
        trust: what the next step is to compare, see :func:`foreseen`; or None.
    """

    vectors: dict[str, Tensor]
    along: Tensor
    carried: Tensor
    share: Tensor
    length: Tensor | None
    inflation: Tensor
    trust: Tensor | None = None

    def times(self, factor: Tensor) -> "Motion":
        """Return the step multiplied by a scalar."""
        vectors = {name: factor.to(u.dtype) * u for name, u in self.vectors.items()}
        length = None if self.length is None else factor * self.length
        trust = self.trust
        if trust is not None:
            own = factor.square() * trust[2:4]
            trust = torch.cat([trust[:2], own, trust[4:]])
        share = factor * self.share
        return replace(self, vectors=vectors, share=share, length=length, trust=trust)

    def trust_after(self, old: Tensor | None, healthy: Tensor | None) -> Tensor | None:
        """Return what the next step is to compare: the old if this one failed.

        Args:
            old: what the last step left, or None.
            healthy: boolean scalar on the device; None: the step went well.

        Returns:
            ``(7,)``, or None.
        """
        if self.trust is None or healthy is None:
            return old if self.trust is None else self.trust
        before = self.trust if old is None else old.to(self.trust)
        return torch.where(healthy, self.trust, before)

    def total(self) -> Tensor:
        """Return the sum of all entries, which is finite only if they are."""
        return torch.stack([u.sum() for u in self.vectors.values()]).sum()


def best_pair(numbers: Numbers, spring: float) -> Tensor:
    """Minimise the model over one or two directions, the mass centred on the second.

    Implements :eq:`automatic-step`. Directions that are dependent up to rounding
    share the step (the solution of least norm). Nothing is read from the device.

    Args:
        numbers: the model on the candidate, or on it and the step before.
        spring: the centre of the mass term is so much of the step before.

    Returns:
        The coefficients, ``(1,)`` or ``(2,)``; zero along a zero direction. That of
        the step before lies in [-1, 1].
    """
    matrix, pull = numbers.damped, -numbers.slopes
    tiny = torch.finfo(matrix.dtype).tiny
    # A square that was too small for the data type of the vectors.
    alive = matrix.diagonal() > tiny
    size = matrix.diagonal().clamp_min(tiny).sqrt()
    if len(pull) == 1:
        return torch.where(alive, pull / size.square(), 0.0)
    right = torch.where(alive, (pull + spring * numbers.weight[:, 1]) / size, 0.0)
    across = torch.where(alive.all(), matrix[0, 1], 0.0)
    # [[1, r], [r, 1]] has the eigenvalues 1 + r and 1 - r.
    r = across / (size[0] * size[1])
    total, difference = right[0] + right[1], right[0] - right[1]
    total = torch.where(1.0 + r > _DEPENDENT, total / (1.0 + r), 0.0)
    difference = torch.where(1.0 - r > _DEPENDENT, difference / (1.0 - r), 0.0)
    a, b = 0.5 * torch.stack([total + difference, total - difference]) / size
    # A step can be taken back or taken again; more of it leaves where K was seen.
    bounded = b.clamp(-1.0, 1.0)
    alone = (right[0] - r * size[1] * bounded) / size[0]
    return torch.stack([torch.where(bounded == b, a, alone), bounded])


def renewed(
    trust: Tensor, curvature: Tensor, slope: Tensor, some_rows: bool = True
) -> Tensor:
    """Learn from the new rows what the last step was worth.

    Implements :eq:`reach`.

    Args:
        trust: what :func:`foreseen` left, ``(7,)``.
        curvature: ``|K u|^2`` of the last step u, with K of this pass.
        slope: ``df(u)``, with the gradient of this pass.
        some_rows: whether others than these might have been drawn.

    Returns:
        The same with sums and a reach that include it.
    """
    measured, expected, rest, own, right, whole, reach = trust.unbind()
    if not some_rows:
        met = (curvature <= _SLACK * (own + rest)) & (measured > _FAR * expected)
        measured = torch.where(met, _FORGIVEN * measured, measured)
    found = torch.minimum(curvature - rest, _WORST * own)
    measured = _MEMORY * measured + (1.0 - _MEMORY) * found
    expected = _MEMORY * expected + (1.0 - _MEMORY) * own
    right = _PATIENCE * right + (1.0 - _PATIENCE) * (curvature - slope)
    whole = _PATIENCE * whole + (1.0 - _PATIENCE) * curvature
    ratio = torch.where(whole > 0.0, right / whole, 1.0).clamp(0.5, 1.5)
    reach = (reach * ratio**_GAIN).clamp(_SHORTEST, 1.0)
    return torch.stack([measured, expected, rest, own, right, whole, reach])


def corrected(numbers: Numbers, trust: Tensor) -> tuple[Numbers, Tensor]:
    """Inflate the curvature along the candidate by what new rows found it to be.

    Implements :eq:`curvature-check`.

    Args:
        numbers: the model on the candidate and the step before.
        trust: what :func:`renewed` returned.

    Returns:
        The corrected model, and the factor, at least 1.
    """
    measured, expected = trust[0], _SLACK * trust[1]
    known = (expected > 0.0) & (measured > expected)
    factor = torch.where(known, measured / expected, 1.0)
    curvature = numbers.curvature.clone()
    curvature[0, 0] = factor * curvature[0, 0]
    return replace(numbers, curvature=curvature), factor


def foreseen(numbers: Numbers, c: Tensor, trust: Tensor | None) -> Tensor:
    """Return what these rows say of the step, for the next ones to compare.

    Args:
        numbers: the model as measured, not corrected.
        c: coefficients of the step that is taken.
        trust: what :func:`renewed` returned, or None.

    Returns:
        ``(7,)``: the sums of measured and of expected curvatures along candidates;
        of this step the curvature that needs no check and the one that does; the sums
        of what steps should have been and of what they were; and the reach.
    """
    own = c[0].square() * numbers.curvature[0, 0]
    rest = c @ numbers.curvature @ c - own
    if trust is None:
        zero, one = torch.zeros_like(own), torch.ones_like(own)
        return torch.stack([zero, zero, rest, own, zero, zero, one])
    return torch.cat([trust[:2], torch.stack([rest, own]), trust[4:]])


def credible_share(slope: Tensor, curvature: Tensor, gap: Tensor) -> Tensor:
    """Return the share of a step at which the model reaches the floor of the loss.

    Implements :eq:`credible-share`. Beyond that the model is certainly wrong.

    Args:
        slope: ``df(u)``.
        curvature: ``|K u|^2``.
        gap: the loss above its floor.

    Returns:
        The smallest t in (0, 1] with ``gap + t slope + t^2 curvature / 2 = 0``; 1 if
        there is none, if the gap is not positive, or if u does not descend.
    """
    inside = slope.square() - 2.0 * gap * curvature
    # This form of the root loses no digits and holds without curvature.
    root = 2.0 * gap / (inside.clamp_min(0.0).sqrt() - slope)
    reached = (inside >= 0.0) & (gap > 0.0) & (slope < 0.0)
    return torch.where(reached, root.clamp_max(1.0), 1.0)


def lower(lowest: Tensor | None, loss: Tensor | None) -> Tensor | None:
    """Return the lower of two losses of which one may be None; NaN counts for none."""
    if loss is None or lowest is None:
        return lowest if loss is None else loss
    return torch.fmin(lowest.to(loss), loss)


def within(bound: float, length: Tensor) -> Tensor:
    """Return the factor that shortens a step of this length to the bound.

    Implements :eq:`metric-clip`.

    Args:
        bound: a positive number.
        length: length of the step in the metric norm.

    Returns:
        At most 1.
    """
    return torch.where(length > bound, bound / length, 1.0)


def transported(
    manifold: geoopt.Manifold, start: Tensor, end: Tensor, vector: Tensor
) -> Tensor:
    """Return a tangent vector at ``start`` carried to ``end``.

    Args:
        manifold: where the points live.
        start: a point.
        end: another.
        vector: tangent at ``start``.

    Returns:
        By the manifold's transport; the vector itself, to be projected, if it has none.
    """
    if type(manifold).transp is geoopt.Manifold.transp:
        return vector
    carried: Tensor = manifold.transp(start, end, vector)
    return carried
