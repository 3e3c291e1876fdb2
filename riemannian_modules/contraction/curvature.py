"""The curvature of a small training loss in its metric, held fixed: dense matrices."""

from collections.abc import Callable

import geoopt
import scipy.linalg
import torch
from torch import Tensor
from torch.func import functional_call

from riemannian_modules.contraction.constants import Constant
from riemannian_modules.contraction.result import Rate, Side
from riemannian_modules.errors import ContractionError, NotRecordedError
from riemannian_modules.layerwise import LayerwiseMetric

__all__ = ["frozen_curvature"]

Loss = Callable[[Tensor, Tensor], Tensor]
HERE = "at this point"


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

    Args:
        metric: The metric after a pull-back; all parameters Euclidean.
        inputs: The model's input.
        targets: What the loss compares the outputs with.
        loss: ``loss(outputs, targets)``, a scalar.
        weight_decay: Decoupled weight decay, as of the optimizers of this library.
        limit: Most parameters for which dense matrices are formed.

    Returns:
        The rate, exact at this point and of the kind "frozen", and the smoothness.
        Cost: p Hessian products and O(p^3).

    Raises:
        NotRecordedError: There was no pull-back yet.
        ContractionError: Too many parameters, or some are not Euclidean.

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
    names = [part.name for block in metric.blocks.values() for part in block.parts]
    point = {d.name: d.tensor.detach().as_subclass(Tensor) for d in metric.parameters}
    sizes = [shapes[name].numel() for name in names]

    def value(flat: Tensor) -> Tensor:
        pieces = flat.split(sizes)
        own = {
            name: piece.view(shapes[name])
            for name, piece in zip(names, pieces, strict=True)
        }
        outputs = functional_call(metric.model, {**point, **own}, (inputs,))
        return loss(outputs, targets)

    flat = torch.cat([point[name].reshape(-1) for name in names])
    H = torch.func.hessian(value)(flat).double()
    G = torch.block_diag(*[b.to_dense().double() for b in metric.blocks.values()])
    values = scipy.linalg.eigh(
        (0.5 * (H + H.mT)).cpu().numpy(),
        (0.5 * (G + G.mT)).cpu().numpy(),
        eigvals_only=True,
    )
    low, high = float(values[0]) + weight_decay, float(values[-1]) + weight_decay
    source = "dense eigenvalues of the Hessian in the metric held fixed"
    rate = Rate(low, "frozen", "layer", HERE, Side.EXACT, source=source)
    smoothness = Constant(
        "Lambda", high, "smoothness", Side.EXACT, where=HERE, source=source
    )
    return rate, smoothness
