"""A function of a model and one example, mapped over examples and differentiated."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp, vjp, vmap

from riemannian_modules.errors import EmptyBatchError, NonFiniteError, ShapeError
from riemannian_modules.factors import DenseFactor, MetricFactor
from riemannian_modules.finite import looks_finite
from riemannian_modules.heads import Rows
from riemannian_modules.linearize import Linearization, linearize

__all__ = ["Function", "Pointwise", "joined"]

Function = Callable[..., Tensor]
Point = dict[str, Tensor]


@final
class Pointwise:
    """A function of a model and of one example.

    Args:
        model: the model.
        function: ``function(net, *example)``.
        name: what errors call it.
        chunk_size: examples at a time; None: all.
    """

    def __init__(
        self, model: nn.Module, function: Function, name: str, chunk_size: int | None
    ) -> None:
        self._model = model
        self._function = function
        self._chunk_size = chunk_size
        self.label = f"function '{name}'" if name else "the function"

    def _one(self, point: Point, *example: Tensor) -> Tensor:
        def net(*args: Any, **kwargs: Any) -> Any:
            return functional_call(self._model, point, args, kwargs)

        return self._function(net, *example)

    def values(self, point: Point, examples: Sequence[Tensor]) -> Tensor:
        """Return the outputs of all examples, ``(n, *output)``."""
        dims = (None, *[0] * len(examples))
        mapped = vmap(self._one, dims, chunk_size=self._chunk_size)
        outputs: Tensor = mapped(point, *examples)
        return outputs

    def require_finite(self, values: Tensor) -> None:
        """Check the outputs, on the CPU only, where it costs no synchronisation.

        Args:
            values: ``(n, *output)``.

        Raises:
            NonFiniteError: NaN or infinity; names the example.
        """
        if not looks_finite(values):
            bad = (~values.isfinite()).reshape(len(values), -1).any(1)
            raise NonFiniteError(
                f"{self.label} gives NaN or infinity for example "
                f"{int(bad.nonzero()[0])} of {len(values)}; nothing was changed. Check "
                "the points, lower the learning rate or raise the mass"
            )

    def require_examples(self, tensors: Sequence[object]) -> None:
        """Check that examples fit together.

        Args:
            tensors: what the function is to be called with.

        Raises:
            ShapeError: no tensors, or of different first dimensions.
            EmptyBatchError: no examples.
        """
        shapes = [tuple(t.shape) for t in tensors if isinstance(t, Tensor)]
        sizes = {shape[:1] for shape in shapes}
        if not shapes or len(shapes) < len(tensors) or len(sizes) > 1 or () in sizes:
            raise ShapeError(
                f"the examples of {self.label} have shapes {shapes}; it takes tensors "
                "with one and the same first dimension, one example in each row"
            )
        if (0,) in sizes:
            raise EmptyBatchError(
                f"the examples of {self.label} have shapes {shapes}: there are none; "
                "skip empty batches"
            )

    def linearize(
        self, point: Point, examples: Sequence[Tensor], rows: Rows
    ) -> Linearization:
        """Pull the rows of the output metric back, example by example.

        Args:
            point: values of the parameters.
            examples: ``(n, ...)`` each.
            rows: rows of the output metric and costate.

        Returns:
            Factors that store their rows, and the gradient if there is a costate.
        """
        # With an exact residual the gradient is K^T y, and needs no row of its own.
        y = None if rows.has_rest else rows.residual
        stack = rows.stacks[0] if y is None else rows.stacks[0][: rows.rank]

        def pull(cotangents: Tensor, *example: Tensor) -> Point:
            back = vjp(lambda p: self._one(p, *example), point)[1]
            return vmap(lambda cotangent: back(cotangent)[0])(cotangents)

        dims = (1, *[0] * len(examples))
        jacobian = vmap(pull, dims, out_dims=1, chunk_size=self._chunk_size)
        pulled: Point = jacobian(stack, *examples)
        whole: dict[str, MetricFactor] = {
            name: DenseFactor(each.flatten(0, 1)) for name, each in pulled.items()
        }
        if y is None:
            return linearize(whole, rows, len(examples[0]))
        gradient = {name: factor.rmatvec(y) for name, factor in whole.items()}
        n = len(examples[0])
        return Linearization(list(whole), whole, gradient, y, None, None, {}, n)

    def bend(
        self,
        point: Point,
        examples: Sequence[Tensor],
        direction: Point,
        rows: Tensor,
        spacing: float | None = None,
    ) -> Tensor:
        """Return ``L D^2 f(d, d)``.

        Args:
            point: values of the parameters.
            examples: ``(n, ...)`` each.
            direction: d, for every parameter.
            rows: L, ``(r, n, *output)``.
            spacing: see :meth:`FunctionalMetric.bend`.

        Returns:
            ``(r n,)``, in the order of the rows of K.
        """
        if spacing is None:
            second = self._second(point, examples, direction)
        else:
            before, here, after = (
                self.values(
                    {n: w + t * direction[n] for n, w in point.items()}, examples
                )
                for t in (-spacing, 0.0, spacing)
            )
            second = (after - here - (here - before)) / spacing**2
        return (rows * second).flatten(1).view(*rows.shape[:2], -1).sum(-1).reshape(-1)

    def _second(
        self, point: Point, examples: Sequence[Tensor], direction: Point
    ) -> Tensor:
        def slope(p: Point) -> Tensor:
            derivative: Tensor = jvp(
                lambda q: self.values(q, examples), (p,), (direction,)
            )[1]
            return derivative

        second: Tensor = jvp(slope, (point,), (direction,))[1]
        return second


def joined(parts: Sequence[Linearization]) -> Linearization:
    """Put the rows of several sets of examples under each other.

    Args:
        parts: the linearisations of one model.

    Returns:
        The linearisation of all.
    """
    names = parts[0].names

    def total(of: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
        return {n: torch.stack([each[n] for each in of]).sum(0) for n in names}

    factors: dict[str, MetricFactor] = {
        name: DenseFactor(
            torch.cat([p.factors[name].rows(0, p.factors[name].rank) for p in parts])
        )
        for name in names
    }
    gradient = total([p.gradient for p in parts]) if parts[0].gradient else {}
    rest = None
    residuals = [p.residual for p in parts]
    if gradient and any(p.rest is not None for p in parts):
        rest = total([p.rest for p in parts if p.rest is not None])
    if all(each is None for each in residuals):
        return Linearization(names, factors, gradient, None, rest, None, {})
    ranks = [next(iter(p.factors.values())).rank for p in parts]
    like = next(each for each in residuals if each is not None)
    residual = torch.cat(
        [
            like.new_zeros(rank) if each is None else each
            for each, rank in zip(residuals, ranks, strict=True)
        ]
    )
    return Linearization(names, factors, gradient, residual, rest, None, {})
