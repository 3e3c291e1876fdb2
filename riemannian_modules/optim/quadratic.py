"""The quadratic model of the loss that a linearised pass leaves."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from riemannian_modules.model_metric import ModelMetric

__all__ = ["QuadraticModel", "Step"]

Vectors = Mapping[str, Tensor]


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


class QuadraticModel:
    """``f(R_w(u)) = f + df(u) + |K u|^2 / 2``, all blocks of parameters together.

    The blocks of a layerwise metric neglect how layers act together when they are
    solved; this model does not, so it knows how far to go.

    Args:
        metric: the model's metric after a backward pass.
        gradient: ``{parameter name: d f}``.
    """

    def __init__(self, metric: ModelMetric, gradient: Vectors) -> None:
        self._metric = metric
        self._gradient = gradient

    def image(self, u: Vectors) -> Tensor:
        """Return ``K u`` of the whole model, ``(rank,)``."""
        images = [
            block.image({part.name: u[part.name] for part in block.parts})
            for block in self._metric.blocks.values()
            if block.rank
        ]
        if not images:
            return torch.zeros(1, dtype=torch.float64)
        return torch.stack([image.double() for image in images]).sum(0)

    def mass(self, u: Vectors, v: Vectors) -> float:
        """Return the massed base metric of two tangent vectors."""
        total = 0.0
        for block in self._metric.blocks.values():
            for part in block.parts:
                total += float(part.space.inner(u[part.name], v[part.name]))
        return total

    def slope(self, u: Vectors) -> float:
        """Return ``df(u)``."""
        return sum(float((self._gradient[name] * u[name]).sum()) for name in u)

    def best(self, directions: Sequence[Vectors]) -> Step:
        """Minimise the model, with the mass, over combinations of directions.

        Implements :eq:`quadratic-step`. Cost: one product with K for each direction.

        Args:
            directions: tangent vectors of all parameters, linearly dependent or not.

        Returns:
            The best combination.
        """
        count = len(directions)
        images = [self.image(u) for u in directions]
        curvature = torch.zeros(count, count, dtype=torch.float64)
        damped = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i + 1):
                curved = float(images[i] @ images[j])
                curvature[i, j] = curvature[j, i] = curved
                weighed = curved + self.mass(directions[i], directions[j])
                damped[i, j] = damped[j, i] = weighed
        slopes = torch.tensor([self.slope(u) for u in directions], dtype=torch.float64)
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
