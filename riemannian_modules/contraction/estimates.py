"""The constants of a stability bound, found at one point of a model with its data.

What is found at the present parameters and for the present examples can be exceeded
elsewhere: a largest norm that was seen is a lower bound of the supremum. Bounds that
rest on it are evidence. :mod:`riemannian_modules.contraction.chain` has the certified
counterpart for chains of layers.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor

from riemannian_modules.contraction.constants import Constant
from riemannian_modules.contraction.result import Side, Verdict
from riemannian_modules.errors import ContractionError, NotRecordedError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.linearization import Linearization
from riemannian_modules.metric import LayerMetric, Part

__all__ = [
    "example_norms",
    "loss_lipschitz",
    "mass_constant",
    "residual_norm",
    "sensitivity",
]

Norm = Literal["spectral", "frobenius"]
_CHUNK_ENTRIES = 1 << 22


def example_norms(
    metric: LayerwiseMetric, examples: Sequence[int] | None = None
) -> Tensor:
    """Return the dual norms ``|dl_i|`` of the losses of single examples.

    Args:
        metric: The metric after ``metric.backward`` of a mean loss.
        examples: Indices in the batch; None: all.

    Returns:
        ``(examples,)``, the norms in the inverse of the metric. Cost: one solve for
        each example and block; nothing is factorised anew.

    Raises:
        NotRecordedError: There was no backward pass yet.
        ContractionError: The metric was built for a sum of losses.
    """
    found = _passed(metric)
    n = _examples(found)
    chosen = range(n) if examples is None else examples
    squares = []
    for i in chosen:
        if not 0 <= i < n:
            raise ContractionError(f"example {i} is not in the batch of {n}")
        residual, rest = _single(found, i, n)
        solutions = [
            block.solve(residual=residual, covector=_own(rest, block))
            for block in metric.blocks.values()
        ]
        total = sum(float(s.squared_norm.double()) for s in solutions)
        squares.append(n * n * max(total, 0.0))
    return torch.tensor(squares, dtype=torch.float64).sqrt()


def loss_lipschitz(
    metric: LayerwiseMetric, examples: Sequence[int] | None = None
) -> Constant:
    """Estimate ``L_G``, the largest dual norm of the loss of a single example.

    It is the largest of :func:`example_norms`, hence a lower bound of the supremum over
    parameters and examples that a guarantee would need.

    Args:
        metric: The metric after ``metric.backward`` of a mean loss.
        examples: Indices in the batch; None: all.

    Returns:
        The constant, an under-estimate.

    Raises:
        NotRecordedError: There was no backward pass yet.
        ContractionError: The metric was built for a sum of losses.

    Example:
        >>> import riemannian_modules as rm
        >>> model = torch.nn.Linear(1, 1, bias=False, dtype=torch.float64)
        >>> metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1.0)
        >>> with metric.record():
        ...     z = model(torch.ones(4, 1, dtype=torch.float64))
        >>> metric.backward(0.5 * (z - z.detach() - 2.0).square().mean(), z)
        >>> print(loss_lipschitz(metric))
        L_G = 1.41421 (lower bound, evidence), at this point: max |dl_i| of 4 examples
    """
    norms = example_norms(metric, examples)
    return _seen("L_G", float(norms.max()), f"max |dl_i| of {len(norms)} examples")


def residual_norm(metric: LayerwiseMetric) -> Constant:
    """Estimate ``L``, the Lipschitz constant of the loss in whitened outputs.

    It is the largest norm of the whitened residual of an example, ``|y_i|``. With it
    ``L_G <= kappa L / sqrt(mu)``.

    Args:
        metric: The metric after ``metric.backward`` of a mean loss.

    Returns:
        The constant, an under-estimate.

    Raises:
        NotRecordedError: There was no backward pass yet.
        ContractionError: The output metric has no exact residual, or the metric was
            built for a sum of losses.
    """
    found = _passed(metric)
    n = _examples(found)
    if found.residual is None or found.rest is not None:
        raise ContractionError(
            f"{metric.output} has no whitened residual of this loss; use "
            "loss_lipschitz, which needs none"
        )
    norms = found.residual.view(-1, n).norm(dim=0) * math.sqrt(n)
    return _seen("L", float(norms.max()), f"max |y_i| of {n} examples")


def sensitivity(metric: LayerwiseMetric, norm: Norm = "spectral") -> Constant:
    """Estimate ``kappa``, the largest norm of one example's factor ``K_i``.

    The norm is taken from the base metric without its mass to the whitened outputs;
    with masses that differ it is taken from the massed base metric, and the mass of
    :func:`mass_constant` is one. Blocks are measured one by one.

    Args:
        metric: The metric after ``metric.backward`` of a mean loss.
        norm: "spectral", exact for each example from its Gram matrix; or "frobenius",
            the Hilbert-Schmidt norm that :func:`metric_sampling_bound` asks for.

    Returns:
        The constant, an under-estimate of the supremum over parameters and inputs.
        Cost: all rows of K are formed, in chunks.

    Raises:
        NotRecordedError: There was no backward pass yet.
        ContractionError: The metric was built for a sum of losses, or the norm is
            unknown.

    Example:
        The output of a linear layer moves by the norm of its input.

        >>> import riemannian_modules as rm
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=0.1)
        >>> with metric.record():
        ...     z = model(torch.tensor([[3.0, 4.0], [1.0, 0.0]]))
        >>> metric.backward(z.square().mean(), z)
        >>> round(sensitivity(metric).value, 4), mass_constant(metric).value
        (5.0, 0.1)
    """
    if norm not in ("spectral", "frobenius"):
        raise ContractionError(f"norm={norm!r}; choose 'spectral' or 'frobenius'")
    found = _passed(metric)
    n = _examples(found)
    uniform = _uniform_mass(metric)
    largest = 0.0
    for block in metric.blocks.values():
        for gram in _example_grams(block, n):
            trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
            top = trace if norm == "frobenius" else torch.linalg.eigvalsh(gram)[:, -1]
            largest = max(largest, float(top.max()))
    # Rows are weighted by 1 / sqrt(n), and sharp divides by the mass.
    kappa = math.sqrt(largest * n * (1.0 if uniform is None else uniform))
    what = "max |K_i|" if norm == "spectral" else "max Hilbert-Schmidt norm of K_i"
    return _seen("kappa", kappa, f"{what} of {n} examples")


def mass_constant(metric: LayerwiseMetric) -> Constant:
    """Return ``mu``, which is known: the mass, or one where masses differ.

    Args:
        metric: The metric.

    Returns:
        The constant, exact. One means that :func:`sensitivity` absorbs the masses.
    """
    uniform = _uniform_mass(metric)
    meaning = "mass of the base metric"
    if uniform is None:
        meaning = "masses differ: measured in the massed base metric"
    return Constant(
        "mu",
        1.0 if uniform is None else uniform,
        meaning,
        Side.EXACT,
        source="the metric's own mass",
        safe="lower",
    )


def _seen(symbol: str, value: float, meaning: str) -> Constant:
    return Constant(
        symbol,
        value,
        meaning,
        Side.LOWER,
        Verdict.EVIDENCE,
        "at this point",
        "the largest that was seen",
    )


def _passed(metric: LayerwiseMetric) -> Linearization:
    found = metric.linearization
    if found is None:
        raise NotRecordedError(
            "the metric knows no pass yet: run the model inside metric.record() and "
            "call metric.backward(loss, outputs)"
        )
    if metric.fewer.history is not None or metric.fewer.rows is not None:
        raise ContractionError(
            "the rows of this metric are no longer those of the examples of one batch "
            "(rows=... or history=...); pass metric.of(model) after a backward pass"
        )
    if metric.reduction != "mean":
        raise ContractionError(
            "stability is about a mean of losses, but the metric was built with "
            "reduction='sum'; build it with reduction='mean' and average the loss"
        )
    return found


def _examples(found: Linearization) -> int:
    if found.costates:
        return next(iter(found.costates.values())).rank
    if found.gradient:
        return found.examples
    raise NotRecordedError(
        "the last pass had no loss; call metric.backward(loss, outputs)"
    )


def _single(
    found: Linearization, i: int, n: int
) -> tuple[Tensor | None, dict[str, Tensor] | None]:
    """Return the gradient of one example's share as ``K^T y + e``."""
    if found.residual is None:
        return None, {name: _row(f, i) for name, f in found.costates.items()}
    y = torch.zeros_like(found.residual).view(-1, n)
    y[:, i] = found.residual.view(-1, n)[:, i]
    source = found.source
    rest = None if source is None else {k: _row(f, i) for k, f in source.items()}
    return y.view(-1), rest


def _row(factor: MetricFactor, i: int) -> Tensor:
    return factor.rows(i, i + 1)[0]


def _own(
    covectors: dict[str, Tensor] | None, block: LayerMetric
) -> dict[str, Tensor] | None:
    if covectors is None:
        return None
    return {part.name: covectors[part.name] for part in block.parts}


def _uniform_mass(metric: LayerwiseMetric) -> float | None:
    masses = [declared.mass for declared in metric.parameters]
    numbers = {mass.scalar for mass in masses}
    same = len(numbers) == 1 and all(mass.is_scalar for mass in masses)
    return numbers.pop() if same else None


def _example_grams(block: LayerMetric, n: int) -> Iterator[Tensor]:
    """Yield ``K_i sharp K_i^T`` of some examples at a time, ``(examples, r, r)``."""
    if block.rank == 0:
        return
    r = block.rank // n
    size = sum(part.space.point.numel() for part in block.parts)
    some = max(1, _CHUNK_ENTRIES // (r * size))
    for start in range(0, n, some):
        stop = min(start + some, n)
        total = torch.zeros(stop - start, r, r, dtype=torch.float64)
        for part in block.parts:
            total += _part_gram(part, r, n, start, stop)
        yield total


def _part_gram(part: Part, r: int, n: int, start: int, stop: int) -> Tensor:
    if part.factor is None:
        return torch.zeros(stop - start, r, r, dtype=torch.float64)
    rows = torch.stack(
        [part.factor.rows(j * n + start, j * n + stop) for j in range(r)], 1
    )
    space = part.space.to(torch.float64)
    rows = rows.double()
    raised = space.sharp(rows).flatten(2)
    return (rows.flatten(2) @ raised.mT).cpu()
