"""A manifold at one point, with the random vectors and derivatives that checks need.

The first derivative of ``projx`` is a tangent projection that owes nothing to
``proju`` or ``egrad2rgrad``: with it the methods of a manifold are checked against
each other. On a :class:`riemannian_modules.manifolds.Quotient` what does not move the
point, by the derivative of ``invariant``, is taken off.

Tolerances, for rounding unit eps relative to the size of what is compared:

- exact identities: 200 eps; those of the metric relative to its largest eigenvalue
  (estimated) times the Euclidean norms of the two vectors;
- first derivatives by central differences (step eps^(1/3)): 1000 eps^(2/3).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

import geoopt
import torch
from torch import Tensor

from riemannian_modules.manifolds import Quotient

__all__ = ["Curve", "Probe", "change", "gap", "has", "pairing", "size", "velocity"]

Curve = Callable[[float], Tensor]


def pairing(e: Tensor, v: Tensor) -> Tensor:
    """Return what the covector ``e`` does to ``v``: the sum of products, real part."""
    return (e.conj() * v).real.sum()


def size(u: Tensor) -> float:
    """Return the Euclidean norm."""
    return float(torch.linalg.vector_norm(u))


def gap(a: Tensor, b: Tensor, scale: float | None = None) -> float:
    """Return ``|a - b|`` relative to ``scale``, by default the larger of the two.

    It is infinite for tensors of different shapes.
    """
    if a.shape != b.shape:
        return math.inf
    scale = max(size(a), size(b)) if scale is None else scale
    distance = size(a - b)
    return distance / scale if scale > 0.0 else distance


def velocity(curve: Curve, h: float) -> Tensor:
    """Return the derivative of a curve at 0 by central differences of order 4."""
    near, far = curve(h) - curve(-h), curve(2.0 * h) - curve(-2.0 * h)
    return (8.0 * near - far) / (12.0 * h)


@dataclass(frozen=True)
class Probe:
    """A manifold at one point, with random vectors and derivatives."""

    manifold: geoopt.Manifold
    point: Tensor
    generator: torch.Generator | None

    @property
    def eps(self) -> float:
        """The rounding unit of the point's precision."""
        return float(torch.finfo(self.point.dtype).eps)

    @property
    def exact(self) -> float:
        """The tolerance of exact identities."""
        return 200.0 * self.eps

    @property
    def derived(self) -> float:
        """The tolerance of first derivatives."""
        return 1000.0 * math.pow(self.eps, 2.0 / 3.0)

    @property
    def step(self) -> float:
        """The step of central differences."""
        return math.pow(self.eps, 1.0 / 3.0)

    def draw(self) -> Tensor:
        """Return a random ambient vector of norm 1."""
        sample = torch.randn(
            self.point.shape,
            dtype=self.point.dtype,
            device=self.point.device,
            generator=self.generator,
        )
        unit: Tensor = sample / torch.linalg.vector_norm(sample)
        return unit

    def project(self, u: Tensor) -> Tensor:
        """Return ``proju`` of a copy."""
        projected: Tensor = self.manifold.proju(self.point, u.clone())
        return projected

    def riesz(self, e: Tensor) -> Tensor:
        """Return ``egrad2rgrad`` of a copy."""
        vector: Tensor = self.manifold.egrad2rgrad(self.point, e.clone())
        return vector

    def inner(self, u: Tensor, v: Tensor, point: Tensor | None = None) -> Tensor:
        """Return g0(u, v), summed over the parts that geoopt reports one by one."""
        at = self.point if point is None else point
        # Without keepdim the Poincare ball broadcasts a batch against itself.
        return torch.real(self.manifold.inner(at, u, v, keepdim=True)).sum()

    def norm(self, u: Tensor) -> float:
        """Return the norm in the manifold's metric."""
        return math.sqrt(max(0.0, float(self.inner(u, u))))

    def tangent(self) -> Tensor:
        """Return a random tangent vector of norm 1 in the manifold's metric."""
        v = self.draw()
        # Once more, for little may have been left of it beside what is rounding.
        for _ in range(2):
            v = self.project(v)
            norm = self.norm(v)
            v = v / norm if norm > 0.0 else v
        return v

    def identity(self, x: Tensor) -> Tensor:
        """Return what tells points apart: ``x``, or its invariant on a quotient."""
        return self.manifold.invariant(x) if isinstance(self.manifold, Quotient) else x

    def tangent_part(self, u: Tensor) -> Tensor:
        """Return the derivative of ``projx`` at the point in the direction u.

        On a quotient, the part of it that is orthogonal to :attr:`fibre`.
        """
        part = self._derivative(u)
        for vertical in self.fibre:
            part = part - self.inner(vertical, part) * vertical
        return part

    def _derivative(self, u: Tensor) -> Tensor:
        length = size(u) or 1.0
        unit = u / length
        rate = velocity(lambda t: self.manifold.projx(self.point + t * unit), self.step)
        return length * rate

    @cached_property
    def magnification(self) -> float:
        """Operator norm of the projection on the tangent space: 1 if orthogonal."""
        columns = [self.project(unit).reshape(-1) for unit in units(self.point)]
        return float(torch.linalg.matrix_norm(torch.stack(columns), 2))

    @cached_property
    def fibre(self) -> list[Tensor]:
        """Orthonormal directions in which the tensor changes, but not the point."""
        if not isinstance(self.manifold, Quotient):
            return []

        def moved(u: Tensor) -> Tensor:
            return velocity(
                lambda t: self.identity(self.manifold.projx(self.point + t * u)),
                self.step,
            )

        columns = [moved(unit).reshape(-1) for unit in units(self.point)]
        _, values, right = torch.linalg.svd(torch.stack(columns, dim=-1))
        rank = int((values > math.sqrt(self.derived) * values[0]).sum())
        # Normal directions hide among these, too, but projx maps them to nothing.
        hidden = [self._derivative(u.view_as(self.point)) for u in right[rank:]]
        if not hidden:
            return []
        images = torch.stack([u.reshape(-1) for u in hidden])
        _, values, right = torch.linalg.svd(images, full_matrices=False)
        basis: list[Tensor] = []
        for row in right[values > math.sqrt(self.derived)]:
            rest = row.view_as(self.point)
            for vertical in (*basis, *basis):
                rest = rest - self.inner(vertical, rest) * vertical
            basis.append(rest / self.norm(rest))
        return basis

    @cached_property
    def metric_size(self) -> float:
        """The largest ``inner(u, u) / |u|^2`` over projected unit vectors."""
        vectors = [self.project(unit) for unit in units(self.point)]
        return max(self.norm(u) ** 2 / max(size(u), self.eps) ** 2 for u in vectors)

    @cached_property
    def tangent_matrix(self) -> Tensor:
        """The derivative of ``projx`` as a real matrix, ``(p, p)``."""
        real = torch.view_as_real if self.point.is_complex() else torch.clone
        columns = [self.tangent_part(unit) for unit in units(self.point)]
        return torch.stack([real(u).reshape(-1) for u in columns], dim=-1)

    def normal_covector(self) -> Tensor:
        """Return a random covector that vanishes on tangent vectors."""
        e = self.draw()
        flat = (torch.view_as_real(e) if e.is_complex() else e).reshape(-1)
        rest = flat - self.tangent_matrix.mT @ flat
        if e.is_complex():
            return torch.view_as_complex(rest.reshape(*e.shape, 2))
        return rest.view_as(e)


def units(x: Tensor) -> Iterator[Tensor]:
    for row in torch.eye(x.numel(), dtype=x.dtype, device=x.device):
        yield row.view_as(x)
        if x.is_complex():
            yield 1j * row.view_as(x)


def change(function: Callable[..., Tensor], *arguments: Tensor) -> float:
    """Return how much a call changes its arguments."""
    copies = [argument.clone() for argument in arguments]
    function(*copies)
    return max(
        size(copy - argument) for copy, argument in zip(copies, arguments, strict=True)
    )


def has(method: Callable[..., object], *arguments: Tensor) -> bool:
    """Return whether the method is implemented for these arguments."""
    try:
        method(*arguments)
    except NotImplementedError:
        return False
    return True
