"""The quadratic model of the loss that a linearised pass leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

import torch
from torch import Tensor

from riemannian_modules.errors import NonFiniteError
from riemannian_modules.finite import looks_finite
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.precision import dot

__all__ = ["Numbers", "QuadraticModel", "Step", "refuse_unmeasurable", "spanned"]

Vectors = Mapping[str, Tensor]


def spanned(metric: ModelMetric) -> Tensor | None:
    """Return y with ``K^T y`` the gradient that steps are made of, ``(rank,)``.

    Args:
        metric: the metric after a backward pass.

    Returns:
        The residual; None where the rows do not span the gradient, or ``.grad`` was
        changed since.
    """
    found = metric.linearization
    if found is None or found.residual is None or found.rest is not None:
        return None
    return found.residual if metric.gradients.untouched() else None


def refuse_unmeasurable(gradient: Vectors) -> NoReturn:
    """Say why the loss has no finite model along a step.

    Args:
        gradient: ``{parameter name: d f}``; the host waits for the device.

    Raises:
        NonFiniteError: with the names of the parameters where it is not finite.
    """
    bad = [name for name, e in gradient.items() if not bool(e.isfinite().all())]
    if not bad:
        raise NonFiniteError(
            "the gradient is finite, but the step or the slope of the loss along it is "
            "not; nothing was changed. Raise the mass, or scale the loss down"
        )
    raise NonFiniteError(
        f"the gradient of {', '.join(map(repr, bad))} holds NaN or infinity where the "
        "step begins; nothing was changed. Leave this batch out, or load a good state"
    )


@dataclass(frozen=True)
class Step:
    """A combination of directions.

    Attributes:
        coefficients: one for each direction.
        vectors: ``{parameter name: tangent vector}``.
        decrease: by how much the model says that the loss falls, without the mass.
    """

    coefficients: list[float]
    vectors: dict[str, Tensor]
    decrease: float


@dataclass(frozen=True)
class Numbers:
    """The model on the span of k directions, float64 on the parameters' device.

    Attributes:
        curvature: ``<K u_i, K u_j>``, ``(k, k)``.
        weight: the massed base metric ``mu g0(u_i, u_j)``, ``(k, k)``.
        slopes: ``df(u_i)``, ``(k,)``.
    """

    curvature: Tensor
    weight: Tensor
    slopes: Tensor

    @property
    def damped(self) -> Tensor:
        """Curvature and weight together, ``(k, k)``."""
        return self.curvature + self.weight

    def turned(self) -> "Numbers":
        """Return the model on the same directions, the first the other way round."""
        sign = torch.ones_like(self.slopes)
        sign[0] = -1.0
        signs = sign.outer(sign)
        return Numbers(signs * self.curvature, signs * self.weight, sign * self.slopes)


class QuadraticModel:
    """``f(R_w(u)) = f + df(u) + |K u|^2 / 2``, all blocks of parameters together.

    The blocks of a layerwise metric neglect how layers act together when they are
    solved; this model does not, so it knows how far to go.

    Args:
        metric: the model's metric after a backward pass.
        gradient: ``{parameter name: d f}``; parameters that are missing, here or in a
            direction, stand still.
        residual: y with ``d f = K^T y``, ``(rank,)``, with which the gradient is not
            read; or None.
    """

    def __init__(
        self, metric: ModelMetric, gradient: Vectors, residual: Tensor | None = None
    ) -> None:
        self._metric = metric
        self._gradient = gradient
        self._residual = None if residual is None else residual.double()

    def image(self, u: Vectors) -> Tensor:
        """Return ``K u`` of the whole model, ``(rank,)``, float64."""
        images = [
            block.image(
                {
                    part.name: u[part.name]
                    if part.name in u
                    else torch.zeros_like(part.space.point)
                    for part in block.parts
                }
            )
            for block in self._metric.blocks.values()
            if block.rank
        ]
        if not images:
            return self._zero().unsqueeze(0)
        return torch.stack([image.double() for image in images]).sum(0)

    def mass(self, u: Vectors, v: Vectors) -> float:
        """Return the massed base metric of two tangent vectors."""
        return float(self._weight(u, v))

    def slope(self, u: Vectors) -> float:
        """Return ``df(u)``."""
        return float(self._slope(u))

    def numbers(
        self, directions: Sequence[Vectors], images: Sequence[Tensor | None] = ()
    ) -> Numbers:
        """Return the model on the span of directions, without waiting for the device.

        Cost: one product with K for each direction whose image is not known.

        Args:
            directions: tangent vectors.
            images: ``K u`` of each, ``(rank,)``; None where it is not known.

        Returns:
            The numbers.
        """
        known = [*images, *[None] * (len(directions) - len(images))]
        found = [
            self.image(u) if image is None else image.double()
            for u, image in zip(directions, known, strict=True)
        ]
        stacked = torch.stack(found)
        count = range(len(directions))
        rows = [[self._zero() for _ in count] for _ in count]
        for i in count:
            for j in range(i + 1):
                rows[i][j] = rows[j][i] = self._weight(directions[i], directions[j])
        weight = torch.stack([torch.stack(row) for row in rows])
        slopes = (
            torch.stack([self._slope(u) for u in directions])
            if self._residual is None
            else stacked @ self._residual
        )
        return Numbers(stacked @ stacked.mT, weight, slopes)

    def best(self, directions: Sequence[Vectors]) -> Step:
        """Minimise the model, with the mass, over combinations of directions.

        Implements :eq:`quadratic-step`. Cost: one product with K for each direction.
        It reads the numbers, so the host waits for the device.

        Args:
            directions: tangent vectors of all parameters, linearly dependent or not.

        Returns:
            The best combination.

        Raises:
            NonFiniteError: the gradient or a direction is not finite.
        """
        numbers = self.numbers(directions)
        curvature, slopes = numbers.curvature.cpu(), numbers.slopes.cpu()
        damped = numbers.damped.cpu()
        if not (looks_finite(damped) and looks_finite(slopes)):
            refuse_unmeasurable(self._gradient)
        # Of length one each, so that a short one is not taken for a dependent one.
        size = damped.diagonal().clamp_min(1e-300).sqrt()
        scaled = damped / size.outer(size)
        c = -torch.linalg.lstsq(scaled, slopes / size, driver="gelsd").solution / size
        vectors = {
            name: sum(
                (
                    float(a) * u[name]
                    for a, u in zip(c[1:], directions[1:], strict=True)
                ),
                start=float(c[0]) * directions[0][name],
            )
            for name in directions[0]
        }
        decrease = -float(slopes @ c + 0.5 * c @ curvature @ c)
        return Step(c.tolist(), vectors, decrease)

    def _zero(self) -> Tensor:
        device = next(iter(self._metric.parameters)).tensor.device
        return torch.zeros((), dtype=torch.float64, device=device)

    def _weight(self, u: Vectors, v: Vectors) -> Tensor:
        total = self._zero()
        for block in self._metric.blocks.values():
            for part in block.parts:
                if part.name in u and part.name in v:
                    total = total + part.space.inner(u[part.name], v[part.name])
        return total

    def _slope(self, u: Vectors) -> Tensor:
        total = self._zero()
        for name, vector in u.items():
            if name in self._gradient:
                total = total + dot(self._gradient[name], vector)
        return total
