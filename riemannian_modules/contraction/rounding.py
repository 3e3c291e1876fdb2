"""How much rounding can change the Hessian of a loss in a metric."""

import torch
from torch import Tensor

from riemannian_modules.contraction.autodiff import jvp, vjp
from riemannian_modules.contraction.derivatives import curvature
from riemannian_modules.contraction.eigen import ROUNDING
from riemannian_modules.contraction.geometry import Tensors
from riemannian_modules.contraction.hessian import Hessian

__all__ = ["rounding"]


def rounding(
    hessian: Hessian, v: Tensor, Hv: Tensor, flat: Tensor | None = None
) -> float:
    """Return the size of the error in H that float64 allows.

    The terms that H is a sum of can be much larger than H: probabilities that nearly
    cancel, or a curvature that the metric's derivative takes off. Their sizes are seen
    along one direction, whose entries are drawn from the normal distribution, so that
    the length of a product is of the order of the matrix' Frobenius norm.

    Args:
        hessian: H.
        v: tangent vector in coordinates, normally distributed.
        Hv: ``H v``.
        flat: ``D2f v``, if it is known.

    Returns:
        ``16 d eps`` times the sizes of the terms, and what the error in the gradient
        as a tangent vector changes. Cost: two gradients, and for a ``true`` rate one
        product with H, and with ``D2f`` if that is not known.
    """
    geometry, unit = hessian.geometry, ROUNDING * len(v)
    if hessian.kind == "frozen" and not geometry.curved:
        flat = Hv
    elif flat is None:
        flat = curvature(geometry, v)
    terms, outputs = float(flat.norm() + (flat - Hv).norm()), _outputs(hessian, v)
    if hessian.kind == "frozen":
        return unit * (terms + outputs)
    X, slope = hessian.velocity, hessian.gradient
    # The derivative of the output metric along the velocity of the outputs.
    moved = geometry.images(geometry.origin, X).values()
    terms += outputs * (1.0 + max(_norm(each) for each in moved))
    residual = hessian.metric(X) - slope
    # Where the metric is small, what rounding the gradient loses is all there is.
    blur = ROUNDING * slope.norm() / v.norm() * geometry.chart.restrict(v)
    wrong = hessian.sharp(residual.abs() * v.sign() + blur)
    lost = hessian.along(v, wrong) - flat
    return unit * terms + float(lost.norm())


def _outputs(hessian: Hessian, v: Tensor) -> float:
    """Return the size of ``J^T B J v`` with the loss's second derivative B unreduced.

    Each entry of B is a difference of numbers about as large as an example's weight.
    """
    geometry = hessian.geometry
    z, pull = vjp(geometry.outputs, geometry.origin)
    dz = jvp(geometry.outputs, geometry.origin, v)[1]
    slope, bend = vjp(torch.func.grad(geometry.loss_of), z)
    geometry.cost["gradients"] += 2
    largest = max(float(each.abs().max()) for each in slope)
    size = _norm(dz)
    steep = max(geometry.weight(z), largest, _norm(bend(dz)) / size if size else 0.0)
    return steep * float(pull(dz).norm())


def _norm(tensors: Tensors) -> float:
    return float(torch.stack([each.norm() for each in tensors]).norm())
