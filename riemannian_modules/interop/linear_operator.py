"""The layer metric as an operator of the package linear_operator (of GPyTorch)."""

import importlib
from typing import Any

import torch
from torch import Tensor

from riemannian_modules.metric import LayerMetric

__all__ = ["low_rank_root", "to_linear_operator"]


def low_rank_root(metric: LayerMetric) -> Tensor:
    """Return W with the metric ``I + W W^T`` in coordinates of the massed base metric.

    The coordinates are those of :func:`riemannian_modules.manifolds.riesz.root`: with
    ``C C^T = sharp0`` the vector of z is ``C z``, and ``W = (K C)^T``. On a curved
    manifold they are as many as entries; in the superfluous directions W vanishes.

    Args:
        metric: the metric of a block.

    Returns:
        ``(p, rank)``. K of the block is formed: memory of rank times p.

    >>> import geoopt
    >>> from riemannian_modules import Mass, Part, TangentSpace, factors
    >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(2), Mass(scalar=4.0))
    >>> factor = factors.DenseFactor(torch.ones(1, 2))
    >>> low_rank_root(LayerMetric([Part("w", space, factor)])).mT
    tensor([[0.5000, 0.5000]])
    """
    rank, found = metric.rank, []
    for part in metric.parts:
        point = part.space.point
        if part.factor is None:
            found.append(point.new_zeros(point.numel(), rank))
        else:
            rows = part.factor.to_dense().view(rank, *point.shape)
            found.append(part.space.root_adjoint(rows).reshape(rank, -1).mT)
    return torch.cat(found)


def to_linear_operator(metric: LayerMetric) -> Any:
    """Return the metric as a ``LowRankRootAddedDiagLinearOperator``.

    In the coordinates of :func:`low_rank_root`, where the massed base metric is the
    identity: solves, ``logdet`` (relative to the massed base metric) and square roots
    of linear_operator then use the Woodbury identity.

    Args:
        metric: the metric of a block.

    Returns:
        The operator ``I + W W^T``, ``(p, p)``.

    Raises:
        ImportError: the package is not installed.
    """
    try:
        operators = importlib.import_module("linear_operator.operators")
    except ImportError as error:
        raise ImportError(
            "to_linear_operator needs the package linear_operator: "
            "pip install linear_operator (to_scipy needs nothing that is not there)"
        ) from error
    W = low_rank_root(metric)
    ones = torch.ones(len(W), dtype=W.dtype, device=W.device)
    return operators.LowRankRootAddedDiagLinearOperator(
        operators.LowRankRootLinearOperator(W), operators.DiagLinearOperator(ones)
    )
