"""Whether the metric as a function of the parameters is the recorded metric."""

import torch
from torch import Tensor

from riemannian_modules.contraction.autodiff import jvp
from riemannian_modules.contraction.derivatives import curvature
from riemannian_modules.contraction.eigen import ROUNDING
from riemannian_modules.contraction.geometry import Geometry
from riemannian_modules.contraction.replica import Replica
from riemannian_modules.errors import ContractionError

__all__ = ["require_agreement", "require_scalar"]

_AGREEMENT = 1e-6
_STEP = 1e-5


def require_scalar(value: Tensor) -> None:
    """Check the value of a loss.

    Raises:
        ContractionError: it is not one finite number.
    """
    if value.ndim or not bool(value.isfinite()):
        raise ContractionError(
            f"the loss has shape {tuple(value.shape)} and is {value.tolist()}; it must "
            "be one finite number"
        )


def require_agreement(
    geometry: Geometry, replica: Replica, kind: str
) -> tuple[Tensor, Tensor]:
    """Compare the metric as a function with the recorded one, and its derivative.

    The loss's Hessian is compared with differences of its gradient, in one direction.

    Args:
        geometry: the metric as a function of coordinates.
        replica: the recorded pass.
        kind: the derivative is compared where it is needed, for ``"true"``.

    Returns:
        The direction, a normally distributed tangent vector v, and ``D2f v``.

    Raises:
        ContractionError: they differ.
    """
    generator = torch.Generator().manual_seed(0)
    v = torch.randn(geometry.chart.size, generator=generator, dtype=torch.float64)
    v = v.to(geometry.origin)
    tangents = geometry.chart.embed(v)
    recorded = sum(
        float(block.inner(own, own))
        for block in replica.blocks.values()
        for own in [{p.name: tangents[p.name] for p in block.parts}]
    )
    u = geometry.origin
    form = geometry.base_form(u, v, v) + geometry.pullback_form(u, v, v)
    if not abs(float(form) - recorded) <= _AGREEMENT * recorded:
        raise ContractionError(
            f"the model run again has another metric ({float(form):.6g}) than the "
            f"recorded pass ({recorded:.6g}); look for dropout and other randomness, "
            "for state that changes from call to call, and for an output metric whose "
            "apply and factor disagree"
        )
    if kind == "true":
        _require_derivative(geometry, v)
    v = geometry.chart.coordinates(tangents)
    return v, _require_second_derivative(geometry, v)


def _require_derivative(geometry: Geometry, v: Tensor) -> None:
    z, dz = jvp(geometry.outputs, geometry.origin, v)
    size = max(float(t.abs().max()) for t in dz)
    if size == 0.0:
        return
    dz = tuple(t / size for t in dz)

    def measured(w: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([t.reshape(-1) for t in geometry.measure(w, dz)])

    step = 1e-5
    ahead = tuple(t + step * d for t, d in zip(z, dz, strict=True))
    behind = tuple(t - step * d for t, d in zip(z, dz, strict=True))
    expected = (measured(ahead) - measured(behind)) / (2.0 * step)
    found = jvp(measured, z, dz)[1]
    allowed = 1e-3 * float(expected.norm()) + 1e-7 * float(measured(z).norm())
    # A measure that nearly vanishes is a difference of numbers as large as its weight.
    blur = ROUNDING / step * geometry.weight(z) * len(expected) ** 0.5
    if not float((found - expected).norm()) <= allowed + blur:
        raise ContractionError(
            "the output metric's derivative is wrong: its apply or factor detaches the "
            "outputs or cannot be differentiated. Write an apply(outputs, velocity) "
            "that can, or ask for kind='frozen'"
        )


def _require_second_derivative(geometry: Geometry, v: Tensor) -> Tensor:
    length = v.norm()
    v = v / length
    slope = torch.func.grad(geometry.loss)
    u, step = geometry.origin, _STEP * v
    ahead, behind = slope(u + step), slope(u - step)
    geometry.cost["gradients"] += 2
    expected = (ahead - behind) / (2.0 * _STEP)
    found = curvature(geometry, v)
    error = float((found - expected).norm())
    allowed = 1e-5 * float(expected.norm()) + 1e-7 * (1.0 + float(ahead.norm()))
    if not error <= allowed:
        raise ContractionError(
            f"the loss's second derivative along a direction is off by {error:.1e}"
            f" (norm {float(expected.norm()):.1e}) from differences of gradients. Look "
            "for custom autograd functions and for kinks next to this point"
        )
    return length * found
