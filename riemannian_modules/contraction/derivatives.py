r"""Second derivatives of a loss in a metric that depends on the point, matrix-free.

    Hess_G f(v, v) = D2f[v, v] - (D_v G)(v, X) + 1/2 (D_X G)(v, v),   X = G^-1 df

X and v are held fixed while the metric is differentiated.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from riemannian_modules.contraction.autodiff import jvp, vjp
from riemannian_modules.contraction.geometry import Geometry, Tensors, dot

__all__ = [
    "christoffel",
    "curvature",
    "frozen_product",
    "gradient",
    "hessian_product",
    "image",
    "joint_product",
]

Form = Callable[[Tensor, Tensor, Tensor], Tensor]
Product = Callable[[Tensor, Tensor], Tensor]
Image = tuple[Tensors, Tensors]


def christoffel(
    form: Form, product: Product, u: Tensor, v: Tensor, X: Tensor
) -> Tensor:
    """Return the covector ``Gamma(v, X)`` of a metric that is a function of ``u``.

    Implements :eq:`christoffel`.

    Args:
        form: ``(u, a, b) -> g(a, b)``.
        product: ``(u, v) -> g(v, .)``.
        u: point.
        v: tangent vector, held fixed.
        X: tangent vector, held fixed.

    Returns:
        A covector. Cost: one vjp of ``form`` and two jvps of ``product``.
    """
    across = torch.func.grad(lambda w: form(w, v, X))(u)
    along_v = jvp(lambda w: product(w, X), u, v)[1]
    along_X = jvp(lambda w: product(w, v), u, X)[1]
    return 0.5 * (across + along_v - along_X)


def gradient(geometry: Geometry) -> Tensor:
    """Return the ordinary gradient of the loss in coordinates, ``(size,)``."""
    geometry.cost["gradients"] += 1
    return torch.func.grad(geometry.loss)(geometry.origin)


def curvature(
    geometry: Geometry,
    v: Tensor,
    held: Tensors | None = None,
    bent: Callable[[Tensors], Tensors] | None = None,
) -> Tensor:
    """Return ``D2f v`` of the loss in coordinates: one Hessian-vector product.

    Args:
        geometry: model and loss in coordinates.
        v: tangent vector in coordinates.
        held: cotangents c of the outputs; then it is the Hessian of ``f - <c, z>``.
        bent: function of ``J v``; then ``J^T bent(J v)`` is taken off.

    Returns:
        A covector. Cost: two gradients and a vjp.
    """
    u = geometry.origin
    z, pull = vjp(geometry.outputs, u)
    # Twice in reverse mode: some losses of torch have no derivative in forward mode.
    slope, bend = vjp(torch.func.grad(geometry.loss_of), z)
    rest = slope
    if held is not None:
        rest = tuple(s - c for s, c in zip(slope, held, strict=True))

    def costate(w: Tensor) -> tuple[Tensor, Tensors]:
        outputs, back = vjp(geometry.outputs, w)
        return back(rest), outputs

    _, (curved, dz) = jvp(costate, u, v)
    turned = bend(dz)
    if bent is not None:
        turned = tuple(t - e for t, e in zip(turned, bent(dz), strict=True))
    geometry.cost["gradients"] += 3
    product = curved + pull(turned)
    if geometry.has_decay:
        product = product + jvp(torch.func.grad(geometry.decay), u, v)[1]
    return product


def hessian_product(geometry: Geometry, v: Tensor, X: Tensor) -> Tensor:
    """Return ``Hess_G f v`` for the metric with any blocks.

    Implements :eq:`riemannian-hessian`.

    Args:
        geometry: model, loss and metric in coordinates.
        v: tangent vector in coordinates.
        X: the Riemannian gradient in coordinates.

    Returns:
        A covector. Cost: one Hessian-vector product, one vjp and two jvps, each of
        these times the number of blocks.
    """
    bent = _base_christoffel(geometry, v, X)
    pulled = christoffel(
        geometry.pullback_form, geometry.pullback, geometry.origin, v, X
    )
    # The outer derivatives, on top of the products that count themselves.
    geometry.cost["gradients"] += 3 * len(geometry.masks)
    return curvature(geometry, v) - bent - pulled


def image(geometry: Geometry, X: Tensor) -> Image:
    """Return the outputs and their velocity along ``X``: one jvp."""
    geometry.cost["gradients"] += 1
    return jvp(geometry.outputs, geometry.origin, X)


def joint_product(
    geometry: Geometry, v: Tensor, X: Tensor, known: Image | None = None
) -> Tensor:
    """Return ``Hess_G f v`` for a metric with one block, as cheap as a plain product.

    Implements :eq:`joint-hessian`.

    Args:
        geometry: model, loss and metric in coordinates; one block.
        v: tangent vector in coordinates.
        X: the Riemannian gradient in coordinates.
        known: what :func:`image` returns for X.

    Returns:
        A covector, equal to that of :func:`hessian_product`. Cost: one
        Hessian-vector product.
    """
    z, dX = image(geometry, X) if known is None else known

    def turn(dv: Tensors) -> Tensors:
        return _output_christoffel(geometry, z, dv, dX)

    product = curvature(geometry, v, geometry.measure(z, dX), turn)
    return product - _base_christoffel(geometry, v, X)


def frozen_product(geometry: Geometry, v: Tensor, X0: Tensor) -> Tensor:
    """Return ``Hess_0 f v``: the Hessian of the loss in the base metric.

    Implements :eq:`frozen-rate` together with the metric at the point. On Euclidean
    parameters it is the ordinary Hessian.

    Args:
        geometry: model, loss and metric in coordinates.
        v: tangent vector in coordinates.
        X0: the gradient in the massed base metric, in coordinates.

    Returns:
        A covector. Cost: one Hessian-vector product.
    """
    return curvature(geometry, v) - _base_christoffel(geometry, v, X0)


def _base_christoffel(geometry: Geometry, v: Tensor, X: Tensor) -> Tensor:
    if not geometry.curved:
        return torch.zeros_like(v)
    return christoffel(geometry.base_form, geometry.base, geometry.origin, v, X)


def _output_christoffel(
    geometry: Geometry, z: Tensors, a: Tensors, b: Tensors
) -> Tensors:
    """Return ``Gamma(a, b)`` of the output metric, a cotangent of every head."""

    def form(w: Tensors) -> Tensor:
        return dot(geometry.measure(w, a), b)

    across = torch.func.grad(form)(z)
    along_a = jvp(lambda w: geometry.measure(w, b), z, a)[1]
    along_b = jvp(lambda w: geometry.measure(w, a), z, b)[1]
    return tuple(
        0.5 * (x + y - w) for x, y, w in zip(across, along_a, along_b, strict=True)
    )
