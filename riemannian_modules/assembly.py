"""From a linearised pass to the metrics of its blocks and of single parameters."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from riemannian_modules.declared import DeclaredParameters
from riemannian_modules.linearize import Linearization
from riemannian_modules.metric import LayerMetric, Part

__all__ = ["bind_views", "block_metrics", "moved", "reweighted", "zero_covectors"]

Blocks = Mapping[str, LayerMetric]


def block_metrics(
    groups: Mapping[str, Sequence[str]],
    found: Linearization,
    parameters: DeclaredParameters,
    version: int,
    precision: torch.dtype | None,
    wide: Collection[str] = (),
) -> dict[str, LayerMetric]:
    """Return the metric of every group of parameters that the pass reached.

    Args:
        groups: ``{metric name: parameter names}``.
        found: the linearised pass.
        parameters: the model's parameters, at the point of the pass.
        version: number of the pull-back.
        precision: see :class:`riemannian_modules.LayerMetric`.
        wide: names of metrics for which float32 is not worth a try.

    Returns:
        ``{metric name: metric}``; groups without a reached parameter are left out.
    """
    metrics = {}
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
            )
    return metrics


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
    return {
        name: block.at(
            {part.name: parameters[part.name].space().point for part in block.parts}
        )
        for name, block in blocks.items()
    }


def reweighted(blocks: Blocks, factor: float) -> dict[str, LayerMetric]:
    """Return the blocks with their factors held and their masses multiplied.

    Args:
        blocks: metrics by block.
        factor: a positive number.

    Returns:
        Metrics by block.
    """
    return {
        name: LayerMetric(
            [
                replace(p, space=replace(p.space, mass=p.space.mass.times(factor)))
                for p in block.parts
            ],
            name=block.name,
            version=block.version,
            precision=block.precision,
            narrow=not block.too_narrow,
        )
        for name, block in blocks.items()
    }


def zero_covectors(blocks: Blocks) -> dict[str, Tensor]:
    """Return the zero covector of every parameter of the blocks."""
    return {
        part.name: torch.zeros_like(part.space.point)
        for block in blocks.values()
        for part in block.parts
    }
