"""A layer metric at its point, with the same metric written out as matrices.

Everything dense is float64 and comes from the factors' rows and the manifolds' own
``inner`` and ``proju``. Sizes are those of the massed base metric: with the masses
absorbed the layer metric is ``g0 + K^T K``, and the rounding errors of its inverse grow
with ``amp = 1 + |K sharp K^T|``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import geoopt
import torch
from torch import Tensor

from riemannian_modules.factors import DenseFactor
from riemannian_modules.mass import Mass
from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.tangent import TangentSpace
from riemannian_modules.testing.reference import base_matrix, tangent_basis
from riemannian_modules.woodbury import qr

__all__ = ["MetricProbe", "combine", "relative_gap"]

Vectors = Mapping[str, Tensor]


def combine(a: float, e: Vectors, b: float, f: Vectors) -> dict[str, Tensor]:
    """Return ``a e + b f``, parameter by parameter."""
    return {name: a * e[name] + b * f[name] for name in e}


def relative_gap(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    """Return ``|a - b| / scale`` in float64, by default ``|b|``; inf between shapes."""
    if a.shape != b.shape:
        return math.inf
    a, b = a.double(), b.double()
    scale = float(b.norm()) if scale is None else scale
    gap = float((a - b).norm())
    return gap / scale if scale > 0.0 else gap


def _spectral_norm(matrix: Tensor) -> float:
    return float(torch.linalg.svdvals(matrix)[0]) if matrix.numel() else 0.0


@dataclass
class MetricProbe:
    """A layer metric, its dense twin, and random vectors of its block.

    Args:
        metric: the metric.
        generator: source of randomness on the CPU, or None for the global one.
    """

    metric: LayerMetric
    generator: torch.Generator | None

    # --- the numbers that tolerances are made of

    @property
    def eps(self) -> float:
        """The rounding unit of the parameters."""
        return float(torch.finfo(self.metric.parts[0].space.point.dtype).eps)

    @cached_property
    def gram_values(self) -> Tensor:
        """Eigenvalues of ``K sharp K^T`` on the tangent space, descending."""
        values: Tensor = torch.linalg.svdvals(self.coordinates) ** 2
        return values

    @cached_property
    def amp(self) -> float:
        """``1 + |K sharp K^T|``, by which the inverse amplifies rounding."""
        return 1.0 + (float(self.gram_values[0]) if len(self.gram_values) else 0.0)

    @cached_property
    def reach(self) -> dict[str, float]:
        """Bound on ``|K sharp K^T|`` of each parameter that sees normal parts too."""
        found = {}
        for part in self.wide:
            K, basis = self.rows[part.name], self.bases[part.name]
            root = self.roots[part.name]
            if len(basis) == basis.shape[1]:
                flat = torch.linalg.solve_triangular(root, basis @ K.mT, upper=False)
                found[part.name] = _spectral_norm(flat) ** 2
            else:
                least = float(torch.linalg.svdvals(root)[-1])
                found[part.name] = (_spectral_norm(K) / least) ** 2
        return found

    @cached_property
    def spread(self) -> float:
        """``amp`` with :attr:`reach` for M and with the condition of curved metrics.

        Normal parts of rows cancel in M but not in its rounding, and neither does the
        condition of the base metric. On Euclidean parameters this is about ``amp``.
        """
        conditions = [1.0]
        for part in self.wide:
            if not isinstance(part.space.manifold, geoopt.Euclidean):
                values = torch.linalg.svdvals(self.roots[part.name])
                conditions.append(float(values[0] / values[-1]))
        return max(conditions) + sum(self.reach.values())

    @property
    def exact(self) -> float:
        """Tolerance of identities, relative to the size of what is compared."""
        return 50.0 * self.eps

    @property
    def solved(self) -> float:
        """Tolerance of what the inverse returns, relative to its size."""
        return self.exact * self.spread

    @property
    def pushed(self) -> float:
        """Tolerance of the solution for a combination of rows."""
        return self.exact * math.sqrt(self.spread)

    # --- the dense twin

    @cached_property
    def wide(self) -> tuple[Part, ...]:
        """The parts in float64."""
        return self.metric.double().parts

    @cached_property
    def rows(self) -> dict[str, Tensor]:
        """Dense factors, ``(rank, p)`` each, in float64."""
        return {
            part.name: torch.zeros(
                self.metric.rank,
                part.space.point.numel(),
                dtype=torch.float64,
                device=part.space.point.device,
            )
            if part.factor is None
            else part.factor.to_dense().double()
            for part in self.wide
        }

    @cached_property
    def bases(self) -> dict[str, Tensor]:
        """Tangent bases, ``(dim, p)`` each, orthonormal entry by entry."""
        return {
            p.name: tangent_basis(p.space.manifold, p.space.point).reshape(
                -1, p.space.point.numel()
            )
            for p in self.wide
        }

    @cached_property
    def roots(self) -> dict[str, Tensor]:
        """Lower Cholesky factors of the massed base metric on the tangent bases."""
        return {p.name: self._root(p.name, p.space) for p in self.wide}

    @cached_property
    def mass_logdet(self) -> float:
        """Log-determinant of the massed base metric relative to the base metric."""
        total = 0.0
        for part in self.wide:
            bare = self._root(part.name, replace(part.space, mass=Mass()))
            ratio = self.roots[part.name].diagonal() / bare.diagonal()
            total += 2.0 * float(ratio.log().sum())
        return total

    def _root(self, name: str, space: TangentSpace) -> Tensor:
        basis = self.bases[name].view(-1, *space.point.shape)
        matrix = base_matrix(space, basis)
        root: Tensor = torch.linalg.cholesky(0.5 * (matrix + matrix.mT))
        return root

    @cached_property
    def coordinates(self) -> Tensor:
        """K in an orthonormal tangent frame of the base metric, ``(rank, dim)``."""
        pieces = [
            torch.linalg.solve_triangular(
                self.roots[name], self.bases[name] @ self.rows[name].mT, upper=False
            ).mT
            for name in self.rows
        ]
        return torch.cat(pieces, 1)

    def sharp(self, e: Vectors) -> dict[str, Tensor]:
        """Return the inverse of the metric by QR, in float64."""
        right = [
            torch.linalg.solve_triangular(
                self.roots[name],
                self.bases[name] @ e[name].double().reshape(-1, 1),
                upper=False,
            )
            for name in self.rows
        ]
        return self._lifted(qr(self.coordinates, 1.0, torch.cat(right).squeeze(-1)))

    def push(self, y: Tensor) -> dict[str, Tensor]:
        """Return the x for the covector ``K^T y``, in float64.

        For large K it minimises ``|K x - y|^2 + |x|^2``, which does not square K.
        """
        if self.amp < 10.0:
            return self.sharp(
                {
                    p.name: (y.double() @ self.rows[p.name]).view_as(p.space.point)
                    for p in self.wide
                }
            )
        rank, dim = self.coordinates.shape
        eye = torch.eye(dim, dtype=torch.float64, device=y.device)
        Q, R = torch.linalg.qr(torch.cat([self.coordinates, eye]))
        right = (Q[:rank].mT @ y.double()).unsqueeze(-1)
        z = torch.linalg.solve_triangular(R, right, upper=True).squeeze(-1)
        return self._lifted(z)

    def _lifted(self, z: Tensor) -> dict[str, Tensor]:
        """Return the tangent vectors with coordinates z in the orthonormal frame."""
        found, start = {}, 0
        for part in self.wide:
            basis, root = self.bases[part.name], self.roots[part.name]
            piece = z[start : start + len(basis)].unsqueeze(-1)
            start += len(basis)
            lifted = torch.linalg.solve_triangular(root.mT, piece, upper=True)
            found[part.name] = (lifted.mT @ basis).view_as(part.space.point)
        return found

    def image(self, u: Vectors) -> Tensor:
        """Return ``K u`` in float64, ``(rank,)``."""
        return sum(
            (self.rows[name] @ u[name].double().reshape(-1) for name in self.rows),
            start=torch.zeros(
                self.metric.rank,
                dtype=torch.float64,
                device=self.wide[0].space.point.device,
            ),
        )

    def pull(self, a: Tensor) -> dict[str, Tensor]:
        """Return ``K^T a`` in the parameters' precision."""
        return {
            part.name: (a.double() @ self.rows[part.name])
            .view_as(part.space.point)
            .to(part.space.point)
            for part in self.metric.parts
        }

    def frame(self, u: Vectors) -> Tensor:
        """Return the coordinates of tangent vectors in the orthonormal frame."""
        return torch.cat(
            [
                self.roots[name].mT @ (self.bases[name] @ u[name].double().reshape(-1))
                for name in self.rows
            ]
        )

    def size(self, u: Vectors) -> float:
        """Return the norm of tangent vectors in the massed base metric."""
        return float(self.frame(u).norm())

    def gap(self, u: Vectors, v: Vectors, scale: float | None = None) -> float:
        """Return the distance of tangent vectors, by default relative to ``v``."""
        scale = self.size(v) if scale is None else scale
        distance = self.size({n: u[n].double() - v[n].double() for n in u})
        return distance / scale if scale > 0.0 else distance

    def dual_size(self, e: Vectors) -> float:
        """Return the norm of covectors in the massed base metric."""
        pieces = [
            torch.linalg.solve_triangular(
                self.roots[name],
                (self.bases[name] @ e[name].double().reshape(-1)).unsqueeze(-1),
                upper=False,
            ).squeeze(-1)
            for name in self.rows
        ]
        return float(torch.cat(pieces).norm())

    def pair(self, e: Vectors, u: Vectors) -> float:
        """Return ``e(u)`` in float64."""
        return float(sum((e[n].double() * u[n].double()).sum() for n in e))

    # --- random vectors

    def draw(self, *shape: int) -> Tensor:
        """Return normal numbers in float64."""
        found = torch.randn(shape, dtype=torch.float64, generator=self.generator)
        return found.to(self.metric.parts[0].space.point.device)

    def covectors(self) -> dict[str, Tensor]:
        """Return random covectors, their normal parts as large as the tangent ones."""
        normals = self.normals()
        return {n: t + t.norm() * normals[n] for n, t in self.tangents().items()}

    def tangents(self) -> dict[str, Tensor]:
        """Return random tangent vectors of the block."""
        return {p.name: self.tangent(p.name, self.draw) for p in self.metric.parts}

    def tangent(self, name: str, draw: Callable[..., Tensor]) -> Tensor:
        """Return a random tangent vector of one parameter."""
        basis = self.bases[name]
        point = next(p.space.point for p in self.metric.parts if p.name == name)
        return (draw(len(basis)) @ basis).view_as(point).to(point)

    def normals(self) -> dict[str, Tensor]:
        """Return random covectors that vanish on tangent vectors, of norm 1 or 0."""
        found = {}
        for part in self.metric.parts:
            point, basis = part.space.point, self.bases[part.name]
            rest = self.draw(point.numel())
            for _ in range(2):  # once more, in case little was left at first
                rest = rest - (basis @ rest) @ basis
                rest = rest / rest.norm()
            if len(basis) == len(rest):
                rest = torch.zeros_like(rest)
            found[part.name] = rest.view_as(point).to(point)
        return found

    # --- the same metric, changed

    def variant(
        self,
        *,
        mass: float = 1.0,
        rows: Mapping[str, Tensor] | None = None,
        parts: Sequence[Part] | None = None,
    ) -> LayerMetric:
        """Return the metric with its mass multiplied or its factors replaced.

        Args:
            mass: factor of the mass.
            rows: dense rows ``(rank, p)`` for each parameter; None: as they are.
            parts: the block's parts; None: as they are.

        Returns:
            A metric of the same class.
        """
        changed = []
        for part in self.metric.parts if parts is None else parts:
            space = replace(part.space, mass=part.space.mass.times(mass))
            factor = part.factor
            if rows is not None:
                dense = rows[part.name].to(space.point)
                factor = DenseFactor(dense.view(-1, *space.point.shape))
            changed.append(Part(part.name, space, factor))
        kind = type(self.metric)
        return kind(changed, name=self.metric.name, precision=self.metric.precision)
