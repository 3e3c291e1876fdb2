"""The interface of an output metric, with defaults that follow from its factor."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from riemannian_modules.errors import EmptyBatchError, OutputMetricError, ShapeError
from riemannian_modules.output.rows import rounding

__all__ = ["OutputMetric"]


_MADE_OF_ROWS = ("row_count", "apply", "whiten", "sharp", "split", "sample")


class OutputMetric(ABC):
    """A Riemannian metric on the space of a model's outputs.

    Subclasses write :meth:`factor`; the other methods have defaults that follow
    from it. Nothing here averages over the batch or looks at targets, and nothing
    branches on the values of a tensor. ``outputs`` has the shape ``(n, *output)``,
    the first dimension being the examples.

    Example:
        A metric that weighs the coordinates of the output.

        >>> import torch
        >>> class Weighted(OutputMetric):
        ...     def __init__(self, weights):
        ...         self.weights = weights
        ...
        ...     def factor(self, outputs):
        ...         return self.weights.sqrt().diag().expand(len(outputs), -1, -1)
        >>> metric = Weighted(torch.tensor([1.0, 4.0]))
        >>> outputs, cotangent = torch.zeros(3, 2), torch.ones(3, 2)
        >>> y, rest = metric.whiten(outputs, cotangent)
        >>> y[0], rest[0]
        (tensor([1.0000, 0.5000]), tensor([0., 0.]))

    Attributes:
        joint: whether a row belongs to the batch, as the sum of the examples' parts,
            and not to one example.
        leads: whether the first row of :meth:`split` is the cotangent of each example,
            scaled, wherever there is a y and no rest; y is zero in all other rows.
    """

    joint: bool = False
    leads: bool = False

    def __init_subclass__(cls, **options: object) -> None:
        """Drop what a parent class worked out for rows that are others here.

        A subclass with its own :meth:`factor` has the default methods for everything
        that is made of the rows, unless it has its own.
        """
        super().__init_subclass__(**options)
        order = cls.__mro__
        first = next(i for i, kind in enumerate(order) if "factor" in vars(kind))
        for name in _MADE_OF_ROWS:
            owner = next(i for i, kind in enumerate(order) if name in vars(kind))
            if owner > first and "factor" in vars(order[owner]):
                setattr(cls, name, vars(OutputMetric)[name])

    @abstractmethod
    def factor(self, outputs: Tensor) -> Tensor:
        """Return rows ``L`` with ``L^T L = G_o`` for each example.

        Args:
            outputs: ``(n, *output)``.

        Returns:
            ``(n, r, *output)`` of the dtype and device of ``outputs``; a fixed rank
            r, not weighted by ``1/n``. It may be an expanded view: do not write
            into it.
        """

    def row_count(self, outputs: Tensor) -> int | None:
        """Return the number r of rows of :meth:`factor`, before they are made.

        Rows that cannot fit into memory are refused then. The default, None, is
        always right.

        Args:
            outputs: ``(n, *output)``.
        """
        return None

    def apply(self, outputs: Tensor, velocity: Tensor) -> Tensor:
        """Return the cotangent ``G_o velocity``, differentiable in both arguments.

        Rates of contraction need its derivative; nothing else calls it. The default
        multiplies by the rows of :meth:`factor`, which must not detach the outputs
        then.

        Args:
            outputs: ``(n, *output)``.
            velocity: ``(n, *output)``.

        Returns:
            ``(n, *output)``, not weighted by ``1/n``.
        """
        rows = self.factor(outputs).flatten(2)
        image = torch.einsum("nro,no->nr", rows, velocity.flatten(1))
        return torch.einsum("nro,nr->no", rows, image).view_as(outputs)

    def whiten(
        self, outputs: Tensor, cotangent: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Split a cotangent of the outputs into a combination of rows and a rest.

        The default solves the least-squares problem of least norm in float64, by
        the singular values of the factor, with one step of refinement. Its rest is
        what the rounded combination leaves of the cotangent, with entries at the
        level of rounding set to zero. Cost O(n r D min(r, D)) for D output entries.

        Args:
            outputs: ``(n, *output)``.
            cotangent: derivative of a loss, of the shape of ``outputs``.

        Returns:
            ``y`` of shape ``(n, r)`` and ``rest`` of the shape of ``outputs`` with
            ``sum_j y_j L_j + rest == cotangent``; ``rest`` is exactly zero where the
            cotangent lies in the row space up to rounding. ``y`` is None where the
            metric offers no such combination; ``rest`` is the cotangent then.
        """
        self.validate_cotangent(outputs, cotangent)
        rows = self.factor(outputs.detach()).double()
        rows = rows.reshape(*rows.shape[:2], -1)
        target = cotangent.detach().reshape(len(rows), -1).double()
        left, values, right = torch.linalg.svd(rows, full_matrices=False)
        eps = torch.finfo(outputs.dtype).eps
        largest = values.amax(-1, keepdim=True) if values.shape[-1] else values
        kept = values > eps * max(rows.shape[1:]) * largest
        inverse = torch.where(kept, values.reciprocal(), 0.0).unsqueeze(-1)

        def solve(v: Tensor) -> Tensor:
            solution: Tensor = left @ (inverse * (right @ v.unsqueeze(-1)))
            return solution.squeeze(-1)

        def combine(rows: Tensor, y: Tensor) -> Tensor:
            return (rows.mT @ y.unsqueeze(-1)).squeeze(-1)

        y = solve(target)
        y = (y + solve(target - combine(rows, y))).to(outputs.dtype)
        y = torch.where(y.isfinite(), y, 0.0)
        rest = target - combine(rows, y.double())
        summands = target.abs() + combine(rows.abs(), y.double().abs())
        part = rounding(outputs.dtype)
        noise = rest.abs() <= part * summands.amax(-1, keepdim=True)
        rest = torch.where(noise, 0.0, rest).to(outputs.dtype)
        return y, rest.view_as(outputs)

    def sharp(self, outputs: Tensor, cotangent: Tensor) -> Tensor | None:
        """Return w with ``G_o w = cotangent``, where that is cheap and safe.

        Then :class:`Sampled` needs no whitening: the residual of the cotangent has the
        squared norm ``<cotangent, w>``. The default, None, is always right.

        Args:
            outputs: ``(n, *output)``.
            cotangent: derivative of a loss, of the shape of ``outputs``.

        Returns:
            ``(n, *output)`` in float64, unique up to what ``G_o`` maps to zero; None
            where :meth:`whiten` has to look closer.
        """
        return None

    def split(
        self, outputs: Tensor, cotangent: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Return the rows for a step, and the cotangent of its loss in their terms.

        The default calls :meth:`factor` and :meth:`whiten`. A metric whose rows may
        depend on the loss, as those of :class:`Sampled` do, overrides it.

        Args:
            outputs: ``(n, *output)``.
            cotangent: derivative of a loss, of the shape of ``outputs``.

        Returns:
            Rows ``(n, r, *output)``, ``y`` and ``rest`` as :meth:`whiten` returns
            them; ``y`` has the shape ``(r,)`` where the rows are :attr:`joint`.
        """
        rows = self.factor(outputs)
        return rows, *self.whiten(outputs, cotangent)

    def sample(
        self, outputs: Tensor, probes: int, generator: torch.Generator | None = None
    ) -> Tensor:
        """Draw random rows whose outer product is ``G_o`` on average.

        The default combines the rows of the factor with independent random signs.
        Likelihoods draw a target from their own prediction and return its score.

        Args:
            outputs: ``(n, *output)``.
            probes: number of independent rows for each example.
            generator: source of randomness on the device of ``outputs``; None takes
                torch's global one.

        Returns:
            ``(n, probes, *output)``, not divided by the number of probes.
        """
        rows = self.factor(outputs)
        signs = torch.empty(
            rows.shape[0], probes, rows.shape[1], dtype=rows.dtype, device=rows.device
        ).bernoulli_(0.5, generator=generator)
        combined = (2.0 * signs - 1.0) @ rows.reshape(*rows.shape[:2], -1)
        return combined.view(rows.shape[0], probes, *outputs.shape[1:])

    def terms(self, outputs: Tensor) -> float:
        """Return the number of likelihood terms that a mean loss divides by.

        Args:
            outputs: ``(n, *output)``.

        Returns:
            The number of examples, unless the class says otherwise: that of
            positions, or the sum of weights.
        """
        return outputs.shape[0]

    def validate(self, outputs: Tensor) -> None:
        """Check what can be known of the outputs without reading their values.

        Args:
            outputs: ``(n, *output)``.

        Raises:
            OutputMetricError: not a tensor of real floating-point numbers.
            ShapeError: no batch dimension, or an output without entries.
            EmptyBatchError: no examples.
        """
        if not isinstance(outputs, Tensor) or not outputs.is_floating_point():
            kind = outputs.dtype if isinstance(outputs, Tensor) else type(outputs)
            raise OutputMetricError(
                f"{self!r} measures real floating-point tensors, got {kind}; pass the "
                "tensor of outputs that the loss is computed from"
            )
        shape = tuple(outputs.shape)
        if not shape:
            raise ShapeError(
                f"{self!r} needs a batch dimension first, got outputs of shape (); "
                "use outputs.unsqueeze(0) for a single example"
            )
        if shape[0] == 0:
            raise EmptyBatchError(
                f"{self!r} got outputs of shape {shape}, a batch without examples; "
                "skip empty batches"
            )
        if outputs.numel() == 0:
            raise ShapeError(
                f"{self!r} got outputs of shape {shape}, without any entries; "
                "every dimension after the first must be at least 1"
            )

    def require_order(self, outputs: Tensor, cotangent: Tensor) -> None:
        """Check that a loss reads the outputs in the order in which this metric does.

        Called once for each graph; by default nothing is known.

        Args:
            outputs: ``(n, *output)``.
            cotangent: derivative of the loss with respect to the outputs.
        """
        del outputs, cotangent

    def validate_cotangent(self, outputs: Tensor, cotangent: Tensor) -> None:
        """Check the outputs, and that the cotangent has their shape.

        Args:
            outputs: ``(n, *output)``.
            cotangent: derivative of a loss with respect to the outputs.

        Raises:
            ShapeError: the two shapes differ.
        """
        self.validate(outputs)
        if cotangent.shape != outputs.shape:
            raise ShapeError(
                f"{self!r} got a cotangent of shape {tuple(cotangent.shape)} for "
                f"outputs of shape {tuple(outputs.shape)}; pass the derivative of "
                "the loss with respect to these outputs"
            )

    def extra_repr(self) -> str:
        """Return the arguments that the representation shows."""
        return ""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.extra_repr()})"
