"""Certified sensitivities of chains of layers: the product of their norms."""

import math
from collections.abc import Iterable

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules.contraction.constants import Constant, require
from riemannian_modules.contraction.gains import is_linear
from riemannian_modules.contraction.result import Side
from riemannian_modules.errors import ContractionError
from riemannian_modules.manifolds import Oblique, base_of
from riemannian_modules.output import Bernoulli, Categorical, Euclidean, OutputMetric

__all__ = ["chain_sensitivity", "output_norm", "slope"]

# Lipschitz constants of entrywise functions that map 0 to 0.
_SLOPES: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.Flatten: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Tanh: 1.0,
    nn.Softsign: 1.0,
    nn.Hardtanh: 1.0,
    nn.Tanhshrink: 1.0,
    nn.Softshrink: 1.0,
}
_EUCLIDEAN = geoopt.Euclidean()
_SURROUNDING = (geoopt.Euclidean, geoopt.Sphere, geoopt.EuclideanStiefel, Oblique)


def slope(module: nn.Module) -> float | None:
    """Return a Lipschitz constant of a parameter-free module that maps 0 to 0.

    Args:
        module: The module.

    Returns:
        The constant; None where this table has none.

    Example:
        >>> slope(nn.Tanh()), slope(nn.LeakyReLU(0.2)), slope(nn.Sigmoid())
        (1.0, 1.0, None)
    """
    if type(module) is nn.LeakyReLU:
        return max(1.0, abs(float(module.negative_slope)))
    if type(module) is nn.Dropout and not module.training:
        return 1.0
    return _SLOPES.get(type(module))


def output_norm(output: OutputMetric, entries: int, norm: str = "spectral") -> float:
    """Return a bound on the norm of the output factor ``L_o``, for any output.

    Args:
        output: ``Euclidean``, ``Bernoulli`` or ``Categorical``.
        entries: Entries of one output; for ``Categorical`` the number of classes.
        norm: "spectral" or "frobenius".

    Returns:
        The bound.

    Raises:
        ContractionError: No bound is known for this output metric.

    Example:
        >>> output_norm(Bernoulli(), 1), round(output_norm(Categorical(), 10) ** 2, 6)
        (0.5, 0.5)
    """
    whole = norm == "frobenius"
    if type(output) is Euclidean:
        return math.sqrt(output.scale * (entries if whole else 1))
    if type(output) is Bernoulli:
        return 0.5 * math.sqrt(entries if whole else 1)
    if type(output) is Categorical:
        # diag(p) - p p^T has the trace 1 - |p|^2 and no eigenvalue above 1/2.
        return math.sqrt(1.0 - 1.0 / entries if whole else 0.5)
    raise ContractionError(
        f"no bound is known for the factor of {output!r}; give its norm as a number"
    )


def chain_sensitivity(
    layers: Iterable[nn.Module],
    output: OutputMetric | float,
    input_norm: float,
    *,
    radius: float = 0.0,
    joint: bool = False,
    norm: str = "spectral",
) -> Constant:
    """Bound ``kappa`` of a chain of linear layers and activations by their norms.

    Implements :eq:`chain-sensitivity`, following :cite:t:`large2024`. Unlike an
    estimate it holds for every input up to ``input_norm`` and all parameters within
    ``radius``, so a bound can be certified with it; the price is that it can be far
    above the truth.

    Args:
        layers: The chain: ``nn.Linear``, and parameter-free modules of :func:`slope`.
        output: The output metric, or a bound on the norm of its factor.
        input_norm: Largest Euclidean norm of an input.
        radius: How far the weight and the bias of a layer may each move, in the
            Frobenius norm.
        joint: Whether all layers are one block (``blocks="model"``); else the largest
            of the layers counts.
        norm: "spectral", or "frobenius" for a bound on the Hilbert-Schmidt norm.

    Returns:
        The constant, an upper bound, certified up to the rounding of singular values.

    Raises:
        ContractionError: A layer with an unknown norm, or whose manifold's metric is
            not that of the surrounding space.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> chain_sensitivity([layer], 0.5, input_norm=3.0).value
        1.5
    """
    require(input_norm >= 0, f"input_norm = {input_norm}")
    require(radius >= 0, f"radius = {radius}")
    chain = list(layers)
    size, entries = input_norm, 0
    sensitivities: list[float] = []
    for index, module in enumerate(chain):
        if is_linear(module):
            _require_surrounding(module, index)
            stretch = _spectral(module.weight) + radius
            bias = 0.0 if module.bias is None else _length(module.bias) + radius
            own = math.hypot(size, 0.0 if module.bias is None else 1.0)
            sensitivities = [s * stretch for s in sensitivities] + [own]
            size = stretch * size + bias
            entries = module.out_features
        else:
            size, sensitivities = _through(module, index, size, sensitivities)
    if not sensitivities:
        raise ContractionError("the chain has no linear layer, so nothing to measure")
    top = (
        float(output)
        if isinstance(output, int | float)
        else output_norm(output, entries, norm)
    )
    kappa = top * (math.hypot(*sensitivities) if joint else max(sensitivities))
    where = f"inputs up to norm {input_norm:.4g}"
    if radius:
        where += f", parameters within {radius:.4g} of the present ones"
    else:
        where += ", the present parameters"
    return Constant(
        "kappa",
        kappa,
        "product of the layers' norms",
        Side.UPPER,
        where=where,
        source="operator norms by singular values",
    )


def _through(
    module: nn.Module, index: int, size: float, sensitivities: list[float]
) -> tuple[float, list[float]]:
    steep = slope(module)
    if steep is None:
        raise ContractionError(
            f"layer {index} of the chain is a {type(module).__name__}, whose norm is "
            "not known here; measure the sensitivity with contraction.sensitivity"
        )
    return size * steep, [s * steep for s in sensitivities]


def _require_surrounding(module: nn.Linear, index: int) -> None:
    for parameter in module.parameters(recurse=False):
        manifold = base_of(getattr(parameter, "manifold", _EUCLIDEAN))
        if not isinstance(manifold, _SURROUNDING):
            raise ContractionError(
                f"layer {index} lives on {manifold.name}, whose metric is not that of "
                "the surrounding space; use contraction.sensitivity"
            )


def _spectral(weight: Tensor) -> float:
    return float(torch.linalg.matrix_norm(_plain(weight), ord=2))


def _length(bias: Tensor) -> float:
    return float(_plain(bias).norm())


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor).double()
