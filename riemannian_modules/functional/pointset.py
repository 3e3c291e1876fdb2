"""A function of a model, evaluated at a set of examples and differentiated."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import jvp

from riemannian_modules.errors import (
    EmptyBatchError,
    LinearizationError,
    NonFiniteError,
    OutputMetricError,
    RiemannianModulesError,
    ShapeError,
)
from riemannian_modules.factors import (
    BiasFactor,
    DenseFactor,
    LinearFactor,
    MetricFactor,
)
from riemannian_modules.finite import looks_finite
from riemannian_modules.heads import Rows
from riemannian_modules.leaves import leaves_of
from riemannian_modules.linearization import Linearization
from riemannian_modules.twice import DifferentiableTwice

__all__ = ["Point", "PointSet", "joined", "refuse_others", "require_pairs"]

Point = dict[str, Tensor]


class PointSet(ABC):
    """One function of the model and of one example.

    Attributes:
        label: what errors call it.
    """

    label: str

    @abstractmethod
    def values(self, point: Point, examples: Sequence[Tensor]) -> Tensor:
        """Return the outputs of all examples, ``(n, *output)``."""

    def outputs(self, point: Point, examples: Sequence[Tensor]) -> Tensor:
        """Return the outputs of all examples, or say what is wrong with the function.

        Args:
            point: values of the parameters.
            examples: ``(n, ...)`` each.

        Raises:
            ShapeError: it does not return one tensor.
            TypeError: it fails, and examples and parameters are of different types.
            RuntimeError: it fails otherwise.
        """
        try:
            values = self.values(point, examples)
        except RuntimeError as error:
            own = {str(each.dtype) for each in point.values()}
            given = {str(each.dtype) for each in examples}
            if isinstance(error, RiemannianModulesError) or given <= own:
                raise
            raise TypeError(
                f"{self.label} cannot be evaluated: {error}. Its examples have the "
                f"data types {sorted(given)}, the parameters {sorted(own)}; convert "
                "the examples with .to(...)"
            ) from error
        if not isinstance(values, Tensor):
            raise ShapeError(
                f"{self.label} returns a {type(values).__name__}; it must return one "
                "tensor for each example: put several together with torch.cat, or give "
                "a dictionary of functions"
            )
        return values

    @abstractmethod
    def linearize(
        self, point: Point, examples: Sequence[Tensor], rows: Rows
    ) -> Linearization:
        """Pull the rows of the output metric back.

        Args:
            point: values of the parameters.
            examples: ``(n, ...)`` each.
            rows: rows of the output metric and costate.

        Returns:
            The factors, and the gradient if there is a costate.
        """

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

        with DifferentiableTwice():
            second: Tensor = jvp(slope, (point,), (direction,))[1]
        return second


def require_pairs(
    functions: Mapping[str, object], outputs: Mapping[str, object]
) -> None:
    """Refuse functions and output metrics that do not match.

    Args:
        functions: by name.
        outputs: the output metrics, by name.

    Raises:
        OutputMetricError: they have other names, or several metrics have none.
    """
    if set(functions) != set(outputs):
        raise OutputMetricError(
            f"there are functions {sorted(functions)} and output metrics "
            f"{sorted(outputs)}; give a dictionary with the same keys for both"
        )
    for metric in outputs.values():
        if isinstance(metric, list | tuple | None):
            raise OutputMetricError(
                f"output={metric!r}: each function has one output metric; give a "
                "dictionary of functions and one of output metrics with the same keys"
            )


def refuse_others(
    outputs: Tensor,
    known: Iterable[Tensor],
    model: nn.Module,
    label: str,
    *,
    inner: bool = False,
) -> None:
    """Refuse outputs that depend on parameters that the function was not given.

    Args:
        outputs: with their graph.
        known: the parameters that it was given.
        model: whose parameters have names.
        label: what errors call the function.
        inner: whether the function may have made other leaves itself, such as a point
            that it differentiates by.

    Raises:
        LinearizationError: there are others; names one.
    """
    names = {id(tensor): f"'{name}'" for name, tensor in model.named_parameters()}
    given = {id(each) for each in known}
    found = [
        leaf
        for leaf in leaves_of([outputs.grad_fn])
        if id(leaf) not in given and (not inner or isinstance(leaf, nn.Parameter))
    ]
    if not found:
        return
    stray = found[0]
    name = names.get(id(stray), f"of shape {tuple(stray.shape)} outside the model")
    raise LinearizationError(
        f"{label} depends on parameters otherwise than through its first argument "
        f"(on the parameter {name}), so its derivative by them would be lost. Use the "
        "first argument in a plain function: the network, or the members of a "
        "riemannian_modules.functional.Parameters module if there is more than a "
        "network. What is constant needs requires_grad_(False)"
    )


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

    factors = _stacked({name: [p.factors[name] for p in parts] for name in names})
    ranks = [next(iter(p.factors.values())).rank for p in parts]
    examples = sum(ranks)  # each row one of its own, as they are stacked
    gradient = total([p.gradient for p in parts]) if parts[0].gradient else {}
    rest = None
    residuals = [p.residual for p in parts]
    if gradient and any(p.rest is not None for p in parts):
        rest = total([p.rest for p in parts if p.rest is not None])
    if all(each is None for each in residuals):
        return Linearization(names, factors, gradient, None, rest, None, {}, examples)
    like = next(each for each in residuals if each is not None)
    residual = torch.cat(
        [
            like.new_zeros(rank) if each is None else each
            for each, rank in zip(residuals, ranks, strict=True)
        ]
    )
    return Linearization(names, factors, gradient, residual, rest, None, {}, examples)


def _stacked(
    parts: Mapping[str, Sequence[MetricFactor]],
) -> dict[str, MetricFactor]:
    """Return factors whose rows are those of several factors, one set after another.

    Rows of linear layers stay unformed: each becomes an example of its own, and sets
    with fewer positions get further ones, at which all is zero.
    """
    cotangents: dict[tuple[object, ...], Tensor] = {}

    def under(tensors: Sequence[Tensor]) -> Tensor:
        # The same tensors give the same one, so that a bias still knows its weight.
        key = tuple(map(id, tensors))
        if key not in cotangents:
            single = [t.flatten(0, 1) for t in tensors]
            cotangents[key] = _padded(single).unsqueeze(0)
        return cotangents[key]

    found: dict[str, MetricFactor] = {}
    for name, factors in parts.items():
        linear = [f for f in factors if isinstance(f, LinearFactor)]
        biases = [f for f in factors if isinstance(f, BiasFactor)]
        if len(linear) == len(factors):
            inputs = [f.inputs.repeat(len(f.cotangents), 1, 1) for f in linear]
            rows = under([f.cotangents for f in linear])
            found[name] = LinearFactor(_padded(inputs), rows)
        elif len(biases) == len(factors):
            found[name] = BiasFactor(under([f.cotangents for f in biases]))
        else:
            found[name] = DenseFactor(torch.cat([f.rows(0, f.rank) for f in factors]))
    return found


def _padded(tensors: Sequence[Tensor]) -> Tensor:
    """Return ``(rows, positions, width)`` tensors under each other."""
    positions = max(t.shape[1] for t in tensors)
    total = sum(len(t) for t in tensors)
    out = tensors[0].new_zeros(total, positions, tensors[0].shape[2])
    start = 0
    for each in tensors:
        out[start : start + len(each), : each.shape[1]] = each
        start += len(each)
    return out
