r"""From a candidate and the step before to a step, in numbers that nobody reads.

With the candidate v, the step before d and its part ``beta`` that is kept,

    x   = sharp(K^T (y + beta K d) + e),  v = -x        the pull of the new data
    u   = s (a v + b d)                                 the step, before ``lr``

where (a, b) is (1, beta) or what the quadratic model says, and s keeps u within what
the model may be trusted with. All of it stays on the device.
"""

from dataclasses import dataclass, replace

import geoopt
import torch
from torch import Tensor

from riemannian_modules.optim.quadratic import Numbers

__all__ = [
    "Motion",
    "Rule",
    "best_pair",
    "credible_share",
    "transported",
    "within",
]

_DEPENDENT = 1e-12


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
    """

    vectors: dict[str, Tensor]
    along: Tensor
    carried: Tensor
    share: Tensor
    length: Tensor | None

    def times(self, factor: Tensor) -> "Motion":
        """Return the step multiplied by a scalar."""
        vectors = {name: factor.to(u.dtype) * u for name, u in self.vectors.items()}
        length = None if self.length is None else factor * self.length
        return replace(self, vectors=vectors, share=factor * self.share, length=length)

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
        The coefficients, ``(1,)`` or ``(2,)``; zero along a zero direction.
    """
    matrix, pull = numbers.damped, -numbers.slopes
    size = matrix.diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).sqrt()
    if len(pull) == 1:
        return pull / size.square()
    right = (pull + spring * numbers.weight[:, 1]) / size
    # [[1, r], [r, 1]] has the eigenvalues 1 + r and 1 - r.
    r = matrix[0, 1] / (size[0] * size[1])
    total, difference = right[0] + right[1], right[0] - right[1]
    total = torch.where(1.0 + r > _DEPENDENT, total / (1.0 + r), 0.0)
    difference = torch.where(1.0 - r > _DEPENDENT, difference / (1.0 - r), 0.0)
    return 0.5 * torch.stack([total + difference, total - difference]) / size


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
