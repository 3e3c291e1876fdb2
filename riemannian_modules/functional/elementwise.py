"""Functions of single numbers, with the two derivatives that streams need."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from riemannian_modules.errors import LinearizationError

__all__ = ["Derivatives", "elementwise", "named"]

# ``f(v, order, *args)`` returns the function and its derivatives up to the order.
Derivatives = Callable[..., list[Tensor]]

_TABLE: dict[Any, Derivatives] = {}
_NAMED: dict[str, Derivatives] = {}


def elementwise(function: Any) -> Derivatives | None:
    """Return the derivatives of a function of torch, or None if it has none here.

    Args:
        function: what ``__torch_function__`` is told, such as ``torch.tanh``.

    Returns:
        ``f(v, order, *args, **kwargs)``, a list with the value, the first and the
        second derivative at each entry of ``v``, as far as the order asks for them;
        differentiable once more by autograd.

    >>> elementwise(torch.square)(torch.tensor([3.0]), 2)
    [tensor([9.]), tensor([6.]), tensor([2.])]
    """
    return _TABLE.get(function)


def named(name: str) -> Derivatives | None:
    """Return the derivatives of the method of a tensor that is called so, or None."""
    return _NAMED.get(name)


def _add(*names: str) -> Callable[[Derivatives], Derivatives]:
    def register(derivatives: Derivatives) -> Derivatives:
        for name in names:
            _NAMED[name] = derivatives
            for owner in (torch, Tensor, F, torch._C._nn, torch.special):
                if (function := getattr(owner, name, None)) is not None:
                    _TABLE[function] = derivatives
        return derivatives

    return register


@_add("tanh")
def _tanh(v: Tensor, order: int) -> list[Tensor]:
    t = v.tanh()
    found = [t]
    if order:
        slope = 1.0 - t.square()
        found += [slope, -2.0 * t * slope][:order]
    return found


@_add("sigmoid", "expit")
def _sigmoid(v: Tensor, order: int) -> list[Tensor]:
    s = v.sigmoid()
    found = [s]
    if order:
        slope = s * (1.0 - s)
        found += [slope, slope * (1.0 - 2.0 * s)][:order]
    return found


@_add("sin")
def _sin(v: Tensor, order: int) -> list[Tensor]:
    s = v.sin()
    return [s, v.cos(), -s][: order + 1]


@_add("cos")
def _cos(v: Tensor, order: int) -> list[Tensor]:
    c = v.cos()
    return [c, -v.sin(), -c][: order + 1]


@_add("sinh")
def _sinh(v: Tensor, order: int) -> list[Tensor]:
    s = v.sinh()
    return [s, v.cosh(), s][: order + 1]


@_add("cosh")
def _cosh(v: Tensor, order: int) -> list[Tensor]:
    c = v.cosh()
    return [c, v.sinh(), c][: order + 1]


@_add("exp")
def _exp(v: Tensor, order: int) -> list[Tensor]:
    return [v.exp()] * (order + 1)


@_add("log")
def _log(v: Tensor, order: int) -> list[Tensor]:
    inverse = v.reciprocal()
    return [v.log(), inverse, -inverse.square()][: order + 1]


@_add("sqrt")
def _sqrt(v: Tensor, order: int) -> list[Tensor]:
    root = v.sqrt()
    return [root, 0.5 / root, -0.25 / root**3][: order + 1]


@_add("reciprocal")
def _reciprocal(v: Tensor, order: int) -> list[Tensor]:
    w = v.reciprocal()
    return [w, -w.square(), 2.0 * w**3][: order + 1]


@_add("square")
def _square(v: Tensor, order: int) -> list[Tensor]:
    return [v.square(), 2.0 * v, torch.full_like(v, 2.0)][: order + 1]


@_add("pow", "__pow__")
def _pow(v: Tensor, order: int, exponent: float | Tensor) -> list[Tensor]:
    found, factor, power = [], 1.0, _number(exponent)
    for _ in range(order + 1):
        # A power that has come to nothing is no 0 * inf at zero.
        found.append(factor * v**power if factor else torch.zeros_like(v))
        factor, power = factor * power, power - 1
    return found


def _number(exponent: float | Tensor) -> float:
    if not isinstance(exponent, Tensor):
        return exponent
    if exponent.requires_grad or exponent.numel() != 1 or exponent.ndim > 1:
        raise LinearizationError(
            "derivatives are not carried through a power whose exponent depends on "
            f"parameters or has several entries (its shape is {tuple(exponent.shape)}):"
            " a DifferentialOperator takes numbers there. Use structured=False, which "
            "differentiates any network"
        )
    return exponent.item()


@_add("atan", "arctan")
def _atan(v: Tensor, order: int) -> list[Tensor]:
    slope = 1.0 / (1.0 + v.square())
    return [v.atan(), slope, -2.0 * v * slope.square()][: order + 1]


@_add("erf")
def _erf(v: Tensor, order: int) -> list[Tensor]:
    slope = (2.0 / math.sqrt(math.pi)) * (-v.square()).exp()
    return [v.erf(), slope, -2.0 * v * slope][: order + 1]


@_add("silu")
def _silu(v: Tensor, order: int, inplace: bool = False) -> list[Tensor]:
    if inplace:
        raise TypeError("inplace=True")
    s = v.sigmoid()
    first = s * (1.0 + v * (1.0 - s))
    second = s * (1.0 - s) * (2.0 + v * (1.0 - 2.0 * s))
    return [v * s, first, second][: order + 1]


@_add("softplus")
def _softplus(
    v: Tensor, order: int, beta: float = 1.0, threshold: float = 20.0
) -> list[Tensor]:
    found = [F.softplus(v, beta, threshold)]
    if order:
        # Above the threshold torch takes the identity instead.
        linear = beta * v > threshold
        s = (beta * v).sigmoid()
        first = torch.where(linear, 1.0, s)
        second = torch.where(linear, 0.0, beta * s * (1.0 - s))
        found += [first, second][:order]
    return found


@_add("logsigmoid")
def _logsigmoid(v: Tensor, order: int) -> list[Tensor]:
    s = (-v).sigmoid()
    return [F.logsigmoid(v), s, -s * (1.0 - s)][: order + 1]


@_add("tanhshrink")
def _tanhshrink(v: Tensor, order: int) -> list[Tensor]:
    t, *slopes = _tanh(v, order)
    return [v - t, *(1.0 - s if i == 0 else -s for i, s in enumerate(slopes))]


@_add("gelu")
def _gelu(v: Tensor, order: int, approximate: str = "none") -> list[Tensor]:
    value = F.gelu(v, approximate=approximate)
    if not order:
        return [value]
    if approximate == "none":
        density = (-0.5 * v.square()).exp() / math.sqrt(2.0 * math.pi)
        below = 0.5 * (1.0 + (v / math.sqrt(2.0)).erf())
        slopes = [below + v * density, density * (2.0 - v.square())]
    else:
        scale, cubic = math.sqrt(2.0 / math.pi), 0.044715
        inner = scale * (v + cubic * v**3)
        up = scale * (1.0 + 3.0 * cubic * v.square())
        t, first, second = _tanh(inner, 2)
        slopes = [
            0.5 * (1.0 + t) + 0.5 * v * first * up,
            first * up
            + 0.5 * v * (second * up.square() + first * scale * 6.0 * cubic * v),
        ]
    return [value, *slopes[:order]]
