"""From a linearised pass to the metrics of its blocks and of single parameters."""

import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from riemannian_modules.block import Vectors
from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.errors import ShapeError
from riemannian_modules.factors import MetricFactor
from riemannian_modules.linearization import Linearization
from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.precision import without_autocast
from riemannian_modules.strategy import Once, Solver

if TYPE_CHECKING:
    from riemannian_modules.model_metric import ModelMetric

__all__ = [
    "BlockMetrics",
    "MetricLink",
    "bind_views",
    "block_metrics",
    "full_precision",
    "introduce",
    "moved",
    "narrowed",
    "reweighted",
    "right_hand_side",
    "too_narrow",
    "zero_covectors",
]

Blocks = Mapping[str, LayerMetric]


class BlockMetrics(dict[str, LayerMetric]):
    """Metrics by block. A name that is none of them is an error with those that are."""

    def __missing__(self, name: str) -> LayerMetric:
        if not self:
            raise KeyError(
                "there are no blocks before the first pass; call "
                "metric.backward(loss, outputs) or metric.pull_back(outputs)"
            )
        known = ", ".join(map(repr, self))
        raise KeyError(f"no block is called {name!r}; there are {known}")


class MetricLink:
    """What a module knows of the metric that was built last on a model with it.

    It does not keep the metric alive, and copies and pickles start without one.
    """

    def __init__(self) -> None:
        self._known: weakref.ref[ModelMetric] | None = None

    @property
    def metric(self) -> "ModelMetric | None":
        """The metric, or None if there is none, or none any more."""
        return None if self._known is None else self._known()

    def set(self, metric: "ModelMetric") -> None:
        """Point to this metric from now on."""
        self._known = weakref.ref(metric)

    def __reduce__(self) -> tuple[type["MetricLink"], tuple[()]]:
        return MetricLink, ()


def introduce(metric: "ModelMetric", model: nn.Module) -> None:
    """Tell the modules of a model that have a :class:`MetricLink` of its metric.

    Args:
        metric: the metric.
        model: the model that it was built on.
    """
    for module in model.modules():
        link = vars(module).get("metric_link")
        if isinstance(link, MetricLink):
            link.set(metric)


def block_metrics(
    groups: Mapping[str, Sequence[str]],
    found: Linearization,
    parameters: DeclaredParameters,
    version: int,
    precision: torch.dtype | None,
    once: Once,
    wide: Collection[str] = (),
    solver: Solver = "auto",
    max_memory: int | None = None,
    before: Blocks | None = None,
) -> dict[str, LayerMetric]:
    """Return the metric of every group of parameters that the pass reached.

    Args:
        groups: ``{metric name: parameter names}``.
        found: the linearised pass.
        parameters: the model's parameters, at the point of the pass.
        version: number of the pull-back.
        precision: see :class:`riemannian_modules.LayerMetric`.
        once: shared by all metrics of the model.
        wide: names of metrics for which float32 is not worth a try.
        solver: see :class:`riemannian_modules.LayerMetric`.
        max_memory: see :class:`riemannian_modules.LayerMetric`.
        before: metrics of the pass before, from which conjugate gradients start warm.

    Returns:
        ``{metric name: metric}``; groups without a reached parameter are left out.
    """
    metrics = BlockMetrics()
    for group, members in groups.items():
        parts = [
            Part(name, parameters[name].space(), found.factors.get(name))
            for name in members
            if name in found.names
        ]
        if parts:
            metrics[group] = LayerMetric(
                parts,
                name=group,
                version=version,
                precision=precision,
                narrow=group not in wide,
                solver=_settled(solver, (before or {}).get(group), parts, version),
                max_memory=max_memory,
                once=once,
                start=_last((before or {}).get(group)),
            )
    return metrics


def _settled(
    solver: Solver, block: LayerMetric | None, parts: Sequence[Part], version: int
) -> Solver:
    # What the pass before found out holds for its rank, and is tried again only in
    # every sixteenth pass.
    if solver != "auto" or block is None or version % 16 == 0:
        return solver
    ranks = {part.factor.rank for part in parts if part.factor is not None}
    if ranks != {block.rank}:
        return solver
    known = vars(block).get("inverse")
    return block.solver if known is None else known.strategy.settled


def _last(block: LayerMetric | None) -> Tensor | None:
    # Asking must not make an inverse that nobody needed.
    known = None if block is None else vars(block).get("inverse")
    return None if known is None else known.last


def bind_views(metrics: Blocks, parameters: DeclaredParameters) -> None:
    """Hand metrics of single parameters to their MetricManifolds.

    Args:
        metrics: ``{parameter name: metric}``.
        parameters: the model's parameters.
    """
    for name, metric in metrics.items():
        view = parameters[name].view
        if view is not None:
            view.bind(metric)


def moved(blocks: Blocks, parameters: DeclaredParameters) -> dict[str, LayerMetric]:
    """Return the blocks with their factors held, at the parameters' values now.

    Args:
        blocks: metrics by block.
        parameters: the model's parameters.

    Returns:
        Metrics by block.
    """
    found = {}
    for name, block in blocks.items():
        points = {p.name: parameters[p.name].space().point for p in block.parts}
        # That of a Euclidean parameter is the parameter itself, wherever it is.
        same = all(points[p.name] is p.space.point for p in block.parts)
        found[name] = block if same else block.at(points)
    return BlockMetrics(found)


def reweighted(blocks: Blocks, factor: float) -> dict[str, LayerMetric]:
    """Return the blocks with their factors held and their masses multiplied.

    Args:
        blocks: metrics by block.
        factor: a positive number.

    Returns:
        Metrics by block.
    """
    return BlockMetrics(
        {
            name: LayerMetric(
                [
                    replace(p, space=replace(p.space, mass=p.space.mass.times(factor)))
                    for p in block.parts
                ],
                name=block.name,
                version=block.version,
                precision=block.precision,
                narrow=not block.too_narrow,
                solver=block.solver,
                max_memory=block.max_memory,
                once=block.once,
                start=_last(block),
            )
            for name, block in blocks.items()
        }
    )


def narrowed(blocks: Blocks, names: Collection[str]) -> dict[str, LayerMetric]:
    """Return the metrics of some of the parameters while all others stand still.

    Args:
        blocks: metrics by block.
        names: the parameters that move.

    Returns:
        Metrics by block, the same ones where all of a block's parameters move; without
        blocks of which none does.
    """
    found = {}
    for name, block in blocks.items():
        parts = [part for part in block.parts if part.name in names]
        if len(parts) == len(block.parts):
            found[name] = block
        elif parts:
            found[name] = LayerMetric(
                parts,
                name=block.name,
                version=block.version,
                precision=block.precision,
                solver=block.solver,
                max_memory=block.max_memory,
                once=block.once,
            )
    return found


def zero_covectors(blocks: Blocks) -> dict[str, Tensor]:
    """Return the zero covector of every parameter of the blocks."""
    return {
        part.name: torch.zeros_like(part.space.point)
        for block in blocks.values()
        for part in block.parts
    }


def right_hand_side(
    found: Linearization,
    blocks: Blocks,
    parameters: DeclaredParameters,
    covector: Mapping[str, Tensor] | None,
    *,
    gradient: float,
    shift: Tensor | None,
) -> tuple[Tensor | None, Vectors | None, Mapping[str, MetricFactor] | None]:
    """Return ``gradient * (d loss) + covector + K^T shift`` as blocks solve for it.

    Args:
        found: the linearised pass.
        blocks: metrics by block.
        parameters: the model's parameters.
        covector: ambient covectors by parameter name, or None.
        gradient: how often the gradient of the loss counts.
        shift: more coefficients of the rows, or None.

    Returns:
        The residual, the covectors, and factors whose row sums these are; see
        :meth:`riemannian_modules.LayerMetric.solve`.

    Raises:
        ShapeError: a covector of an unknown name.
    """
    residual, source = None, None
    rest: Vectors | None = None
    if covector is not None:
        unknown = set(covector) - {declared.name for declared in parameters}
        if unknown:
            raise ShapeError(f"no parameters are called {sorted(unknown)}")
        rest = {**zero_covectors(blocks), **covector}
    if gradient != 0.0:
        residual = None if found.residual is None else gradient * found.residual
        if found.rest is not None and rest is None and gradient == 1.0:
            rest, source = found.rest, found.source
        elif found.rest is not None:
            own = {name: gradient * e for name, e in found.rest.items()}
            rest = own if rest is None else {n: own[n] + rest[n] for n in own}
    if shift is not None:
        residual = shift if residual is None else residual + shift
    return residual, rest, source


def full_precision(parameters: DeclaredParameters) -> AbstractContextManager[object]:
    """Switch autocast off inside this scope: it is for the forward pass only."""
    kind = next(iter(parameters)).tensor.device.type
    return without_autocast(kind)


def too_narrow(blocks: Blocks, version: int) -> set[str]:
    """Return the blocks for which float32 is not worth a try in the next pull-back.

    Where it was not enough in the last one it is tried again only in every sixteenth.

    Args:
        blocks: metrics by block.
        version: number of pull-backs so far.
    """
    if version % 16 == 0:
        return set()
    return {name for name, block in blocks.items() if block.too_narrow}
