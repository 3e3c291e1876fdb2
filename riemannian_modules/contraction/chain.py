"""Certified sensitivities of chains of layers: the product of their norms."""

import math
from collections.abc import Iterable
from fractions import Fraction

import geoopt
from torch import Tensor, nn

from riemannian_modules.contraction.constants import Constant, require
from riemannian_modules.contraction.exact import round_up
from riemannian_modules.contraction.gains import is_linear, is_plain
from riemannian_modules.contraction.result import Side
from riemannian_modules.contraction.verified import (
    hypot_up,
    plus_up,
    spectral_norm,
    sqrt_up,
    times_up,
)
from riemannian_modules.errors import ContractionError
from riemannian_modules.manifolds import Oblique, base_of
from riemannian_modules.output import Bernoulli, Categorical, Euclidean, OutputMetric

__all__ = ["chain_sensitivity", "output_norm", "slope"]

# Lipschitz constants of entrywise functions that map 0 to 0.
_SLOPES: dict[type[nn.Module], float] = {
    nn.Identity: 1.0,
    nn.ReLU: 1.0,
    nn.ReLU6: 1.0,
    nn.Tanh: 1.0,
    nn.Softsign: 1.0,
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
    if not is_plain(module, type(module)):
        return None
    if type(module) is nn.LeakyReLU:
        steep = max(abs(float(module.negative_slope)), 1.0)
        return steep if math.isfinite(steep) else None
    if type(module) is nn.Hardtanh:
        return 1.0 if module.min_val <= 0 <= module.max_val else None
    if type(module) is nn.Flatten:
        # Examples stay apart.
        return 1.0 if module.start_dim >= 1 else None
    if type(module) is nn.Dropout:
        return None if module.training else 1.0
    return _SLOPES.get(type(module))


def output_norm(
    output: OutputMetric, entries: int, norm: str = "spectral", positions: int = 1
) -> float:
    """Return a bound on the norm of the output factor ``L_o``, for any output.

    Args:
        output: ``Euclidean``, ``Bernoulli`` or ``Categorical``.
        entries: Entries of one output; for ``Categorical`` the number of classes.
        norm: "spectral" or "frobenius".
        positions: How many outputs an example has.

    Returns:
        The bound.

    Raises:
        ContractionError: No bound is known for this output metric.

    Example:
        >>> output_norm(Bernoulli(), 1), round(output_norm(Categorical(), 10) ** 2, 6)
        (0.5, 0.5)
    """
    whole = norm == "frobenius"
    many = positions if whole else 1
    if type(output) is Euclidean:
        return sqrt_up(times_up(output.scale, entries if whole else 1, many))
    if type(output) is Bernoulli:
        return sqrt_up(times_up(0.25, entries if whole else 1, many))
    if type(output) is Categorical:
        # diag(p) - p p^T has the trace 1 - |p|^2 and no eigenvalue above 1/2.
        trace = round_up(1 - Fraction(1, entries))
        return sqrt_up(times_up(trace if whole else 0.5, many))
    raise ContractionError(
        f"no bound is known for the factor of {output!r}; give its norm as a number"
    )


def chain_sensitivity(
    layers: Iterable[nn.Module],
    output: OutputMetric | float,
    input_norm: float,
    *,
    radius: float = 0.0,
    positions: int = 1,
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
        positions: At how many positions of an example a layer is used at most: the
            length of a sequence, 1 for inputs ``(n, in)``. A bias acts at each.
        joint: Whether all layers are one block (``blocks="model"``); else the largest
            of the layers counts, those that share a parameter taken together.
        norm: "spectral", or "frobenius" for a bound on the Hilbert-Schmidt norm.

    Returns:
        The constant, an upper bound, certified and rounded up. A layer that is there
        twice, and layers with tied weights, have the sum of what their uses do.

    Raises:
        ContractionError: A layer with an unknown norm, with complex, parametrised or
            otherwise computed weights, or whose manifold's metric is not that of the
            surrounding space; positions that are flattened and not told.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> chain_sensitivity([layer], 0.5, input_norm=3.0).value
        1.5
    """
    require(input_norm >= 0, f"input_norm = {input_norm}")
    require(radius >= 0, f"radius = {radius}")
    require(positions >= 1, f"positions = {positions}")
    size, entries, many = input_norm, 0, sqrt_up(positions)
    # Of the output by each parameter, the sum over all of its uses.
    found: dict[int, float] = {}
    blocks: list[set[int]] = []
    for index, module in enumerate(layers):
        if is_linear(module):
            _require_parameters(module, index)
            stretch = plus_up(float(spectral_norm(_plain(module.weight))), radius)
            found = {key: times_up(s, stretch) for key, s in found.items()}
            uses, shift = {id(module.weight): size}, 0.0
            if module.bias is not None:
                uses[id(module.bias)] = many
                length = hypot_up(*_plain(module.bias).tolist())
                shift = times_up(many, plus_up(length, radius))
            for key, own in uses.items():
                found[key] = plus_up(found.get(key, 0.0), own)
            shared = [block for block in blocks if block & uses.keys()]
            blocks = [block for block in blocks if block not in shared]
            blocks.append(set(uses).union(*shared))
            size, entries = plus_up(times_up(stretch, size), shift), module.out_features
        else:
            if isinstance(module, nn.Flatten) and found and positions == 1:
                raise ContractionError(
                    f"layer {index} of the chain flattens what linear layers return at "
                    "several positions; say at how many, positions=, or flatten first"
                )
            steep = _slope(module, index)
            size = times_up(size, steep)
            found = {key: times_up(s, steep) for key, s in found.items()}
    if not found:
        raise ContractionError("the chain has no linear layer, so nothing to measure")
    top = (
        float(output)
        if isinstance(output, int | float)
        else output_norm(output, entries, norm, positions)
    )
    parts = [found.keys()] if joint else blocks
    sizes = [hypot_up(*(found[key] for key in part)) for part in parts]
    kappa = times_up(top, max(sizes))
    where = f"inputs up to norm {input_norm:.4g}, of {positions} position(s)"
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
        source="operator norms, verified and rounded up",
    )


def _slope(module: nn.Module, index: int) -> float:
    steep = slope(module)
    if steep is None:
        raise ContractionError(
            f"layer {index} of the chain is a {type(module).__name__}, whose norm is "
            "not known here; measure the sensitivity with contraction.sensitivity"
        )
    return steep


def _require_parameters(module: nn.Linear, index: int) -> None:
    own = dict(module.named_parameters(recurse=False))
    names = ["weight"] if module.bias is None else ["weight", "bias"]
    for name in names:
        if name not in own or own[name].is_complex():
            raise ContractionError(
                f"the {name} of layer {index} is complex, or computed from other "
                "parameters, so its norm says nothing of them; use "
                "contraction.sensitivity"
            )
        manifold = base_of(getattr(own[name], "manifold", _EUCLIDEAN))
        if not isinstance(manifold, _SURROUNDING):
            raise ContractionError(
                f"layer {index} lives on {manifold.name}, whose metric is not that of "
                "the surrounding space; use contraction.sensitivity"
            )


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().as_subclass(Tensor).double()
