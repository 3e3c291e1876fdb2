"""Lipschitz constants and interval bounds with one mistake each."""

import torch
from torch import Tensor

from riemannian_modules.contraction.enclosure import MetricRoot, interval_rate
from riemannian_modules.contraction.operator_norms import _double
from riemannian_modules.contraction.verified import spectral_norm


def kernel_norm(layer) -> float:
    """The norm of the kernel as one matrix, as if patches did not overlap."""
    weight = _double(layer.weight)
    grouped = weight.reshape(layer.groups, weight.shape[0] // layer.groups, -1)
    return float(spectral_norm(grouped).max())


def largest_tap(layer) -> float:
    """The largest tap instead of the sum."""
    weight = _double(layer.weight)
    grouped = weight.reshape(
        layer.groups, weight.shape[0] // layer.groups, weight.shape[1], -1
    )
    return float(spectral_norm(grouped.permute(0, 3, 1, 2)).max())


def centre_only(lower: Tensor, upper: Tensor, root: MetricRoot) -> Tensor:
    """The rate of the middle of the intervals."""
    middle = (lower + upper) / 2
    return interval_rate(middle, middle, root)


def corners_only(lower: Tensor, upper: Tensor, root: MetricRoot) -> Tensor:
    """The worse of both ends, as if the rate were monotone in the entries."""
    ends = [interval_rate(end, end, root) for end in (lower, upper)]
    return torch.minimum(*ends)


def no_metric(lower: Tensor, upper: Tensor, root: MetricRoot) -> Tensor:
    """The rate in the Euclidean metric, whatever the metric is."""
    eye = MetricRoot.of(torch.eye(len(root.P)))
    return interval_rate(lower, upper, eye)
