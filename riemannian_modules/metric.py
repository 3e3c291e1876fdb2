"""The layer metric ``g = mu g0 + K^T K`` of one block of parameters."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

from riemannian_modules.block import Block, Part, Vectors, small_precision
from riemannian_modules.errors import ShapeError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.inverse import Inverse, Solution
from riemannian_modules.memory_model import parse_bytes
from riemannian_modules.precision import dot
from riemannian_modules.strategy import Once, Solver, require_solver

__all__ = ["LayerMetric", "Part", "Solution"]

V = TypeVar("V", Tensor, Vectors)


class LayerMetric:
    """The metric of one block of parameters, exact and never formed.

    Vectors and covectors are mappings ``{parameter name: tensor}``; a block of one
    tensor also takes and returns the bare tensor. The metric belongs to the point
    where it was made and does not change; :meth:`at` makes one at another point.

    Args:
        parts: the block's parameters, all factors of the same rank.
        name: the block's name, for errors and reports.
        version: counts the pull-backs of the metric that this one belongs to.
        precision: data type of the small matrix; None: float64 up to rank 2048, or
            float32 where that costs a float32 model no accuracy; never below that.
        narrow: whether float32 is worth a try where ``precision`` is None.
        solver: as in :class:`riemannian_modules.LayerwiseMetric`.
        max_memory: as in :class:`riemannian_modules.LayerwiseMetric`.
        start: first guess of warm conjugate gradients, another's ``inverse.last``.
        once: another's; those who share it warn of dear solves once.

    Raises:
        ValueError: an unknown solver.
        ShapeError: no parts, or factors that do not fit together or their tensors.

    >>> import geoopt
    >>> from riemannian_modules import TangentSpace, factors
    >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(2))
    >>> factor = factors.DenseFactor(torch.tensor([[1.0, 1.0]]))
    >>> metric = LayerMetric([Part("w", space, factor)])
    >>> metric.sharp(torch.tensor([3.0, 0.0])).round(decimals=4)
    tensor([ 2., -1.])
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        name: str = "block",
        version: int = 0,
        precision: torch.dtype | None = None,
        narrow: bool = True,
        solver: Solver = "auto",
        start: Tensor | None = None,
        max_memory: int | str | None = None,
        once: Once | None = None,
    ) -> None:
        require_solver(solver)
        self.once = Once() if once is None else once
        self.max_memory = parse_bytes(max_memory)
        self.solver: Solver = solver
        self._start = start
        self.precision = precision
        self._narrow = narrow
        self.version = version
        self._block = Block(parts, name, precision or small_precision(parts))

    def __repr__(self) -> str:
        names = ", ".join(part.name for part in self.parts)
        return (
            f"LayerMetric({self.name}: {names}; dim {self.dim}, rank {self.rank}, "
            f"version {self.version})"
        )

    @property
    def name(self) -> str:
        """The block's name."""
        return self._block.name

    @property
    def parts(self) -> tuple[Part, ...]:
        """The block's parameters with tangent spaces and factors."""
        return self._block.parts

    @property
    def too_narrow(self) -> bool:
        """Whether the small matrix was needed and float32 was not enough for it."""
        known = self.__dict__.get("inverse")
        return known is not None and known.too_narrow

    @property
    def rank(self) -> int:
        """Number of rows of K."""
        return self._block.rank

    @property
    def dim(self) -> int:
        """Dimension of the block's product manifold."""
        return self._block.dim

    @cached_property
    def inverse(self) -> Inverse:
        """The factorised inverse, made when first needed."""
        how = self.solver, self._start, self.max_memory, self.once
        return Inverse(self._block, self.precision, self._narrow, *how)

    # --- the metric and its inverse

    def inner(self, u: Tensor | Vectors, v: Tensor | Vectors) -> Tensor:
        """Return ``g(u, v)``, a scalar. Implements :eq:`layer-metric`.

        Args:
            u: tangent vectors.
            v: tangent vectors.

        Returns:
            Scalar tensor. Cost: two products with K.
        """
        a, b = self._vectors(u), self._vectors(v)
        flat = {part.name: part.space.flat(a[part.name]) for part in self.parts}
        images = self._block.matvec(a), self._block.matvec(b)
        return self._block.pair(flat, b) + dot(*images)

    def norm(self, u: Tensor | Vectors) -> Tensor:
        """Return ``sqrt(g(u, u))``, a scalar."""
        return self.inner(u, u).sqrt()

    def image(self, u: Tensor | Vectors) -> Tensor:
        """Return ``K u``, the whitened velocity of the outputs, ``(rank,)``."""
        return self._block.matvec(self._vectors(u))

    def flat(self, u: V) -> V:
        """Return the covector ``g(u, .)``, the inverse of :meth:`sharp`.

        Args:
            u: tangent vectors.

        Returns:
            Ambient covectors, unique up to parts that vanish on the tangent space.
        """
        a = self._vectors(u)
        lowered = self._block.rmatvec(self._block.matvec(a))
        return self._like(
            u, {p.name: p.space.flat(a[p.name]) + lowered[p.name] for p in self.parts}
        )

    def sharp(self, e: V) -> V:
        """Return the tangent vector x with ``g(x, v) = e(v)`` for every tangent v.

        This is the subtracting form with a refinement where rank < dim, and the
        primal form else. For the gradient of the loss prefer :meth:`solve` with
        its whitened residual, which with independent rows loses no digits however
        small the mass.

        Args:
            e: ambient covectors, for instance an ordinary gradient.

        Returns:
            Tangent vectors.
        """
        return self._like(
            e, self.solve(covector=self._vectors(e), refinements=1).vectors
        )

    def solve(
        self,
        *,
        residual: Tensor | None = None,
        covector: Vectors | None = None,
        source: Mapping[str, MetricFactor] | None = None,
        refinements: int | None = None,
    ) -> Solution:
        """Solve ``g(x, .) = K^T y + e`` for the tangent vector x.

        Implements :eq:`push-through` for the first summand and :eq:`woodbury`
        (rank < dim) or :eq:`primal` for the second. Cost of the first call: the Gram
        matrix and O(m^3 / 3) with m the smaller of rank and dim.

        Args:
            residual: whitened residual y, ``(rank,)``, or None for zero.
            covector: ambient covectors e, or None for zero.
            source: factors whose row sums are e, if known; only saves time.
            refinements: refinement steps of the subtracting form; None: one, unless
                rounding costs less than 1e-3 anyway.

        Returns:
            The solution with its norm and the form that ran.

        Raises:
            NotPositiveDefiniteError: the small matrix could not be factorised
                (raised where reading the outcome costs no synchronisation).
        """
        return self.inverse.solve(residual, covector, source, refinements)

    # --- what it looks like

    def logdet(self) -> Tensor:
        """Return the log-determinant of g relative to g0, at the cost of a solve.

        Raises:
            NotPositiveDefiniteError: as :meth:`solve`.
        """
        logs = [part.space.mass.logdet(part.space.dim) for part in self.parts]
        total = torch.as_tensor(
            sum(logs), dtype=self._block.precision, device=self._block.device
        )
        return total + self.inverse.logdet() if self.rank else total

    def gram_spectrum(self) -> Tensor:
        """Return the min(rank, dim) largest eigenvalues of ``K sharp K^T``, descending.

        The masses are absorbed in ``sharp``. Cost O(m^3), m the smaller of rank and
        number of entries.
        """
        if self.rank == 0:
            return self._block.zeros(0)
        dual = self.inverse.form == "dual"
        matrix = (
            self._block.gram(self._block.precision)
            if dual
            else self._block.coordinate_gram()
        )
        values = torch.linalg.eigvalsh(matrix).flip(0)
        return values[: min(self.rank, self.dim)].clamp_min(0.0)

    def spectrum(self) -> Tensor:
        """Return the min(rank, dim) largest eigenvalues of g, descending.

        They are relative to g0 if the block has one scalar mass (all others equal
        that mass), else relative to the massed base metric (all others equal 1).
        """
        masses = {p.space.mass.scalar for p in self.parts if p.space.mass.is_scalar}
        uniform = len(masses) == 1 and all(p.space.mass.is_scalar for p in self.parts)
        scale = masses.pop() if uniform else 1.0
        return scale * (1.0 + self.gram_spectrum())

    def contraction_rate(self) -> Tensor:
        """Return ``lambda_min(M (1 + M)^-1)``, the output-space rate of the block.

        Implements :eq:`output-rate`. Along the flow of the metric's gradient the
        whitened residual of this block shrinks at least at this rate. It is zero
        when the outputs have more directions than the block has parameters.
        """
        if self.rank == 0 or self.rank > self.dim:
            return self._block.zeros()
        smallest = self.gram_spectrum()[-1]
        return smallest / (1.0 + smallest)

    def condition(self) -> Tensor:
        """Return the condition number of the inner matrix that the solve factorises."""
        values = self.gram_spectrum()
        if len(values) == 0:
            return self._block.zeros() + 1.0
        # Normal directions, and rows or columns beyond the rank, have the eigenvalue 1.
        order = self._block.size if self.inverse.form == "primal" else self.rank
        smallest = torch.zeros_like(values[0]) if order > len(values) else values[-1]
        return (1.0 + values[0]) / (1.0 + smallest)

    def basis(self) -> list[dict[str, Tensor]]:
        """Return the tangent basis of :meth:`to_dense`, dim elements."""
        zeros = {part.name: torch.zeros_like(part.space.point) for part in self.parts}
        return [
            {**zeros, part.name: vector}
            for part in self.parts
            for vector in part.space.basis()
        ]

    def to_dense(self) -> Tensor:
        """Return the matrix ``g(b_i, b_j)`` in the basis of :meth:`basis`.

        For references and small blocks: O(dim^2) memory.
        """
        stack = self._block.stack
        if self.dim == 0:
            return torch.zeros(0, 0, dtype=self._block.dtype)
        flats = torch.stack([stack(self.flat(vectors)) for vectors in self.basis()])
        return flats @ torch.stack([stack(vectors) for vectors in self.basis()]).mT

    # --- other points and precisions

    def at(self, points: Tensor | Vectors) -> "LayerMetric":
        """Return the metric with its factors held, at other values of the parameters.

        Args:
            points: values of the parameters.

        Returns:
            This metric if it was made at these very values, else a new one.
        """
        values = self._vectors(points)
        parts = [
            replace(p, space=replace(p.space, point=values[p.name].detach()))
            for p in self.parts
        ]
        pairs = zip(parts, self.parts, strict=True)
        if all(_equal(new.space.point, old.space.point) for new, old in pairs):
            return self
        return self._with(parts, self.precision)

    def double(self) -> "LayerMetric":
        """Return the same metric in float64."""
        return self._with(self._block.double().parts, torch.float64)

    def _with(
        self, parts: Sequence[Part], precision: torch.dtype | None
    ) -> "LayerMetric":
        return LayerMetric(
            parts,
            name=self.name,
            version=self.version,
            precision=precision,
            solver=self.solver,
            max_memory=self.max_memory,
            once=self.once,
        )

    def _vectors(self, u: Tensor | Vectors) -> Vectors:
        if isinstance(u, Mapping):
            return u
        if len(self.parts) != 1:
            names = [part.name for part in self.parts]
            raise ShapeError(
                f"block '{self.name}' has several parameters; pass a mapping with "
                f"the keys {names}"
            )
        return {self.parts[0].name: u}

    def _like(self, u: V, result: dict[str, Tensor]) -> V:
        return result[self.parts[0].name] if isinstance(u, Tensor) else result


def _equal(a: Tensor, b: Tensor) -> bool:
    # Off the CPU comparing would wait for the device; a new metric is right too.
    same = a.data_ptr() == b.data_ptr() and a.shape == b.shape
    return a.device.type == "cpu" and (same or torch.equal(a, b))
