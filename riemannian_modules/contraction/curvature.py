"""The curvature of a small training loss in its metric, held fixed: dense matrices."""

from collections.abc import Callable
from dataclasses import replace

import geoopt
import torch
from torch import Tensor

from riemannian_modules.contraction import eigen
from riemannian_modules.contraction.autodiff import exact_derivatives
from riemannian_modules.contraction.constants import Constant
from riemannian_modules.contraction.rates import pencil, prepare
from riemannian_modules.contraction.replica import Blocks, Replica
from riemannian_modules.contraction.result import SMALL, Rate, Side
from riemannian_modules.contraction.verdicts import judge
from riemannian_modules.errors import ContractionError, NotRecordedError
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.metric import LayerMetric

__all__ = ["frozen_curvature"]

Loss = Callable[[Tensor, Tensor], Tensor]
HERE = "at this point"


@exact_derivatives
def frozen_curvature(
    metric: LayerwiseMetric,
    inputs: Tensor,
    targets: Tensor,
    loss: Loss,
    *,
    weight_decay: float = 0.0,
    limit: int = 2000,
) -> tuple[Rate, Constant]:
    """Return the extreme eigenvalues of the Hessian in the metric of the last pass.

    The metric is held fixed, so this is the rate of ``w' = -G^-1 dloss - decay w`` in
    the constant metric G, at the present parameters. Implements :eq:`frozen-curvature`.
    The Hessian is that of a copy of the model in float64; the metric is the recorded
    one.

    Args:
        metric: The metric after a pull-back; all parameters Euclidean.
        inputs: The model's input.
        targets: What the loss compares the outputs with.
        loss: ``loss(outputs, targets)``, a scalar.
        weight_decay: Decoupled weight decay, as of the optimizers of this library.
        limit: Most parameters for which dense matrices are formed.

    Returns:
        The rate at this point, of the kind "frozen" and with the verdicts of
        :func:`rate`, and the smoothness; a bound on rounding is on the safe side of
        both. Cost: p Hessian products and O(p^3).

    Raises:
        NotRecordedError: There was no pull-back yet.
        ContractionError: Too many parameters, or some are not Euclidean; a loss that
            is no scalar; inputs that reach other parameters than the last pass.

    Example:
        >>> import riemannian_modules as rm
        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> metric = rm.LayerwiseMetric(model, rm.output.Euclidean(), mass=1.0)
        >>> x = torch.ones(3, 1)
        >>> with metric.record():
        ...     z = model(x)
        >>> metric.pull_back(z)
        >>> loss = lambda z, y: 0.5 * (z - y).square().mean()
        >>> rate, smoothness = frozen_curvature(metric, x, x, loss, weight_decay=0.25)
        >>> print(rate)
        0.75 (frozen, exact, certified) in the layer metric, at this point
    """
    if not metric.blocks:
        raise NotRecordedError(
            "the metric knows no pass yet: run the model inside metric.record() and "
            "call metric.backward(loss, outputs)"
        )
    shapes = {d.name: d.tensor.shape for d in metric.parameters}
    p = sum(shape.numel() for shape in shapes.values())
    curved = [
        d.name for d in metric.parameters if type(d.manifold) is not geoopt.Euclidean
    ]
    if curved or p > limit:
        raise ContractionError(
            f"dense curvature needs at most {limit} parameters, all Euclidean; this "
            f"model has {p}, on other manifolds: {curved}. Give the rate as a number "
            "or as a Rate"
        )
    wide = targets.double() if targets.is_floating_point() else targets
    replica = Replica(metric, lambda z: loss(z, wide), [inputs])
    if _names(replica.blocks) != _names(metric.blocks):
        raise ContractionError(
            f"the last pass reached {_names(metric.blocks)}, and these inputs reach "
            f"{_names(replica.blocks)}: record a pass with them first"
        )
    H, _, error = pencil(*prepare(replica, "frozen", basis=True))
    G = torch.block_diag(*[_recorded(block) for block in metric.blocks.values()])
    least, most = eigen.dense(H, G, error), eigen.dense(-H, G, error)
    source = "dense eigenvalues of the Hessian in the metric held fixed"
    low = replace(least, value=least.value + weight_decay, how=source)
    known = judge(low, replica, decays=weight_decay > 0.0)
    rate = Rate(
        known.value, "frozen", "layer", HERE, known.side, known.verdict, known.source
    )
    high = weight_decay - most.value
    clear = most.noise <= SMALL * abs(high)
    smoothness = Constant(
        "Lambda",
        high + most.noise,
        "smoothness",
        Side.EXACT if clear else Side.UPPER,
        where=HERE,
        source=f"{source}, rounding within {most.noise:.1e}",
    )
    return rate, smoothness


def _names(blocks: Blocks) -> list[str]:
    return [part.name for block in blocks.values() for part in block.parts]


def _recorded(block: LayerMetric) -> Tensor:
    """Return the metric of a block of Euclidean parameters, summed up in float64."""
    rows, masses = [], []
    for part in block.parts:
        point = part.space.point.detach().as_subclass(Tensor)
        masses.append(
            part.space.mass.multiply(torch.ones_like(point)).double().reshape(-1)
        )
        found = None if part.factor is None else part.factor.to_dense().double()
        rows.append(
            masses[-1].new_zeros(block.rank, point.numel()) if found is None else found
        )
    K = torch.cat(rows, 1)
    return torch.cat(masses).diag() + K.mT @ K
