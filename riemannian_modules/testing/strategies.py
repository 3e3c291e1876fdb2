"""Hypothesis strategies for manifolds, points, masses, factors, metrics and models.

Ranges are arguments. Numbers come from a drawn seed rather than one by one, so that
points are generic and well conditioned by construction: nothing is filtered out, and
a failure shrinks in its shapes, kinds and ranges. Needs the extra ``testing``.

>>> metric = layer_metrics(max_rank=3).example()  # doctest: +SKIP
"""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from zlib import crc32

import geoopt
import torch
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from torch import Tensor, nn

from riemannian_modules import manifolds as rm_manifolds
from riemannian_modules import output
from riemannian_modules.factors import (
    BiasFactor,
    DenseFactor,
    LinearFactor,
    MetricFactor,
)
from riemannian_modules.mass import Mass
from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.nn import Linear, Sequential
from riemannian_modules.output import OutputMetric
from riemannian_modules.tangent import TangentSpace
from riemannian_modules.testing.metric_probe import MetricProbe

__all__ = [
    "MANIFOLDS",
    "OUTPUTS",
    "covectors",
    "factors",
    "inputs_for",
    "layer_metrics",
    "manifolds",
    "masses",
    "modules",
    "output_metrics",
    "points",
    "shapes",
    "tangent_vectors",
]

MANIFOLDS: Mapping[str, Callable[[], geoopt.Manifold]] = MappingProxyType(
    {
        "euclidean": rm_manifolds.Euclidean,
        "stiefel": rm_manifolds.Stiefel,
        "canonical_stiefel": rm_manifolds.CanonicalStiefel,
        "sphere": rm_manifolds.Sphere,
        "poincare_ball": rm_manifolds.PoincareBall,
        "spd": rm_manifolds.SPD,
    }
)
OUTPUTS: Mapping[str, Callable[[], OutputMetric]] = MappingProxyType(
    {
        "euclidean": output.Euclidean,
        "categorical": output.Categorical,
        "bernoulli": output.Bernoulli,
        "poisson": output.Poisson,
        "gaussian": output.Gaussian,
        "sphere": lambda: output.OnManifold(rm_manifolds.Sphere()),
    }
)


def _known(kinds: Sequence[str], known: Mapping[str, object]) -> list[str]:
    unknown = sorted(set(kinds) - set(known))
    if unknown or not kinds:
        raise InvalidArgument(f"kinds={kinds!r}: choose from {sorted(known)}")
    return list(kinds)


def _seeds() -> st.SearchStrategy[int]:
    return st.integers(0, 2**32 - 1)


def _generator(seed: int, role: str) -> torch.Generator:
    # Hypothesis likes to draw equal seeds; what plays another role differs anyway.
    return torch.Generator().manual_seed(crc32(role.encode()) ^ seed)


def _normal(seed: int, shape: Sequence[int], dtype: torch.dtype, role: str) -> Tensor:
    generator = _generator(seed, role)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def manifolds(
    *, kinds: Sequence[str] = tuple(MANIFOLDS)
) -> st.SearchStrategy[geoopt.Manifold]:
    """Return a strategy for base manifolds of matrices.

    Args:
        kinds: keys of :data:`MANIFOLDS`.

    Returns:
        The strategy.
    """
    return st.sampled_from(_known(kinds, MANIFOLDS)).map(lambda kind: MANIFOLDS[kind]())


def shapes(
    manifold: geoopt.Manifold, *, min_side: int = 2, max_side: int = 5
) -> st.SearchStrategy[tuple[int, int]]:
    """Return a strategy for matrix shapes that fit a manifold.

    Args:
        manifold: a manifold of matrices.
        min_side: least number of rows and columns, at least 2.
        max_side: largest number of rows and columns.

    Returns:
        The strategy.
    """
    sides = st.integers(min_side, max_side)
    if isinstance(manifold, geoopt.SymmetricPositiveDefinite):
        return sides.map(lambda side: (side, side))
    return st.tuples(sides, sides)


@st.composite
def points(
    draw: st.DrawFn,
    manifold: geoopt.Manifold,
    shape: Sequence[int],
    *,
    max_radius: float = 0.9,
    max_condition: float = 10.0,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Return a strategy for points of a manifold.

    Args:
        draw: given by Hypothesis.
        manifold: the manifold.
        shape: shape of the point.
        max_radius: largest norm of a point of the Poincare ball, relative to its
            radius.
        max_condition: largest condition number of a positive definite matrix.
        dtype: data type.

    Returns:
        A point. It is computed in float64 and rounded.
    """
    ambient = _normal(draw(_seeds()), shape, torch.float64, "point")
    if isinstance(manifold, geoopt.SymmetricPositiveDefinite):
        _, vectors = torch.linalg.eigh(ambient + ambient.mT)
        spread = 0.5 * math.log(draw(st.floats(1.0, max_condition)))
        values = torch.linspace(-spread, spread, shape[-1], dtype=torch.float64).exp()
        return ((vectors * values) @ vectors.mT).to(dtype)
    if isinstance(manifold, geoopt.PoincareBall):
        radius = draw(st.floats(0.0, max_radius)) / math.sqrt(float(manifold.c))
        return (radius * torch.nn.functional.normalize(ambient, dim=-1)).to(dtype)
    point: Tensor = manifold.projx(ambient).to(dtype)
    return point


@st.composite
def tangent_vectors(draw: st.DrawFn, space: TangentSpace) -> Tensor:
    """Return a strategy for tangent vectors of a tangent space.

    Args:
        draw: given by Hypothesis.
        space: the tangent space.

    Returns:
        A tangent vector of the space's shape and data type.
    """
    return space.project(draw(covectors(space)))


@st.composite
def covectors(draw: st.DrawFn, space: TangentSpace) -> Tensor:
    """Return a strategy for ambient covectors at the point of a tangent space.

    Args:
        draw: given by Hypothesis.
        space: the tangent space.

    Returns:
        A covector of the space's shape and data type.
    """
    return _normal(draw(_seeds()), space.point.shape, space.point.dtype, "covector")


@st.composite
def masses(
    draw: st.DrawFn,
    shape: Sequence[int],
    *,
    kinds: Sequence[str] = ("scalar", "rank_one", "diagonal"),
    min_mass: float = 1e-2,
    max_mass: float = 1e2,
) -> Mass:
    """Return a strategy for masses of a parameter.

    Args:
        draw: given by Hypothesis.
        shape: the parameter's shape; only matrices have a rank-one mass.
        kinds: ``"scalar"``, ``"rank_one"``, ``"diagonal"``.
        min_mass: least mass of an entry.
        max_mass: largest mass of an entry.

    Returns:
        A mass, log-uniform entry by entry.
    """
    known = {"scalar": 0, "rank_one": 0, "diagonal": 0}
    kind = draw(st.sampled_from(_known(kinds, known)))
    low, high = math.log(min_mass), math.log(max_mass)

    def entries(*size: int, root: float = 1.0) -> Tensor:
        generator = _generator(draw(_seeds()), "mass")
        share = torch.rand(size, generator=generator, dtype=torch.float64)
        return (root * (low + (high - low) * share)).exp()

    if kind == "diagonal":
        return Mass(diagonal=entries(*shape))
    if kind == "rank_one" and len(shape) == 2:
        return Mass(row=entries(shape[0], root=0.5), column=entries(shape[1], root=0.5))
    return Mass(scalar=math.exp(draw(st.floats(low, high))))


@st.composite
def factors(
    draw: st.DrawFn,
    shape: Sequence[int],
    *,
    rank: int,
    kinds: Sequence[str] = ("dense", "linear"),
    max_positions: int = 3,
    dtype: torch.dtype = torch.float64,
) -> MetricFactor:
    """Return a strategy for factors of a parameter.

    Args:
        draw: given by Hypothesis.
        shape: the parameter's shape; only matrices have a linear factor.
        rank: number of rows, at least 1.
        kinds: ``"dense"`` (rows stored) and ``"linear"`` (structured, one or several
            positions).
        max_positions: largest number of positions.
        dtype: data type.

    Returns:
        A factor with normal entries.
    """
    kind = draw(st.sampled_from(_known(kinds, {"dense": 0, "linear": 0})))
    seed = draw(_seeds())
    if kind == "dense" or len(shape) != 2:
        return DenseFactor(_normal(seed, (rank, *shape), dtype, "rows"))
    divisors = [n for n in range(1, rank + 1) if rank % n == 0]
    n = draw(st.sampled_from(divisors))
    positions = draw(st.integers(1, max_positions))
    inputs = _normal(seed, (n, positions, shape[1]), dtype, "inputs")
    size = (rank // n, n, positions, shape[0])
    cotangents = _normal(seed, size, dtype, "cotangents")
    return LinearFactor(inputs, cotangents)


def _scaled(
    factor: MetricFactor, scale: float, biases: dict[int, Tensor]
) -> MetricFactor:
    if isinstance(factor, LinearFactor | BiasFactor):
        # A bias goes on sharing the cotangents of its weight.
        key = id(factor.cotangents)
        biases.setdefault(key, factor.cotangents * scale)
        if isinstance(factor, BiasFactor):
            return BiasFactor(biases[key])
        return LinearFactor(factor.inputs, biases[key])
    return DenseFactor(factor.rows(0, factor.rank) * scale)


@st.composite
def layer_metrics(
    draw: st.DrawFn,
    *,
    kinds: Sequence[str] = tuple(MANIFOLDS),
    factor_kinds: Sequence[str] = ("dense", "linear"),
    mass_kinds: Sequence[str] = ("scalar", "rank_one", "diagonal"),
    bias: bool | None = None,
    min_rank: int = 0,
    max_rank: int | None = None,
    max_side: int = 4,
    min_mass: float = 1e-2,
    max_mass: float = 1e2,
    max_amplification: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> LayerMetric:
    """Return a strategy for metrics of a layer: a weight and perhaps a bias.

    Args:
        draw: given by Hypothesis.
        kinds: where the weight lives, keys of :data:`MANIFOLDS`.
        factor_kinds: as in :func:`factors`.
        mass_kinds: as in :func:`masses`; curved manifolds take scalar masses only.
        bias: whether there is a bias; None: either.
        min_rank: least rank.
        max_rank: largest rank; None: 3 more than the dimension, so that both forms of
            the inverse are met.
        max_side: largest number of rows and columns of the weight.
        min_mass: least mass.
        max_mass: largest mass.
        max_amplification: largest ``1 + |M| / mu``; None: 1e8 in float64 and 1e4 in
            float32. The factors are scaled to a drawn value.
        dtype: data type of parameters and factors.

    Returns:
        A layer metric.
    """
    if max_amplification is None:
        max_amplification = 1e8 if dtype == torch.float64 else 1e4
    manifold = draw(manifolds(kinds=kinds))
    shape = draw(shapes(manifold, max_side=max_side))
    point = draw(points(manifold, shape, dtype=dtype))
    curved = not isinstance(manifold, geoopt.Euclidean)
    limits = {"min_mass": min_mass, "max_mass": max_mass}
    allowed = ("scalar",) if curved else mass_kinds
    mass = draw(masses(shape, kinds=allowed, **limits))
    spaces = {"weight": TangentSpace(manifold, point, mass, "weight")}
    if draw(st.booleans()) if bias is None else bias:
        mass = draw(masses(shape[:1], kinds=("scalar",), **limits))
        start = draw(points(rm_manifolds.Euclidean(), shape[:1], dtype=dtype))
        spaces["bias"] = TangentSpace(rm_manifolds.Euclidean(), start, mass, "bias")
    dim = sum(space.dim for space in spaces.values())
    rank = draw(st.integers(min_rank, dim + 3 if max_rank is None else max_rank))
    if rank == 0:
        return LayerMetric([Part(name, space) for name, space in spaces.items()])
    weight = draw(factors(shape, rank=rank, kinds=factor_kinds, dtype=dtype))
    parts = [Part("weight", spaces["weight"], weight)]
    if "bias" in spaces:
        own = (
            BiasFactor(weight.cotangents)
            if isinstance(weight, LinearFactor)
            else draw(factors(shape[:1], rank=rank, dtype=dtype))
        )
        parts.append(Part("bias", spaces["bias"], own))
    amp = math.exp(draw(st.floats(0.0, math.log(max_amplification))))
    current = MetricProbe(LayerMetric(parts), None).amp - 1.0
    scale = math.sqrt((amp - 1.0) / current) if current > 0.0 else 1.0
    shared: dict[int, Tensor] = {}
    return LayerMetric(
        [
            Part(
                p.name,
                p.space,
                None if p.factor is None else _scaled(p.factor, scale, shared),
            )
            for p in parts
        ]
    )


def output_metrics(
    *, kinds: Sequence[str] = tuple(OUTPUTS)
) -> st.SearchStrategy[OutputMetric]:
    """Return a strategy for output metrics on outputs ``(n, width)``, ``width >= 2``.

    Args:
        kinds: keys of :data:`OUTPUTS`; the outputs of ``"sphere"`` are unit vectors.

    Returns:
        The strategy.
    """
    return st.sampled_from(_known(kinds, OUTPUTS)).map(lambda kind: OUTPUTS[kind]())


@st.composite
def modules(
    draw: st.DrawFn,
    *,
    in_features: int = 3,
    out_features: int = 3,
    max_layers: int = 3,
    max_side: int = 4,
    kinds: Sequence[str] = tuple(MANIFOLDS),
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """Return a strategy for chains of linear layers with activations between them.

    Args:
        draw: given by Hypothesis.
        in_features: size of the inputs.
        out_features: size of the outputs.
        max_layers: largest number of linear layers.
        max_side: largest hidden size.
        kinds: where the weights live, keys of :data:`MANIFOLDS`; where a shape fits
            no point of the drawn manifold the weight is Euclidean.
        dtype: data type of the parameters.

    Returns:
        A chain of :class:`riemannian_modules.nn.Linear` and torch layers.
    """
    depth = draw(st.integers(1, max_layers))
    hidden = [draw(st.integers(2, max_side)) for _ in range(depth - 1)]
    sizes = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(zip(sizes, sizes[1:], strict=False)):
        manifold = draw(manifolds(kinds=kinds))
        square = isinstance(manifold, geoopt.SymmetricPositiveDefinite)
        if square and before != after:
            manifold = rm_manifolds.Euclidean()
        bias = draw(st.booleans())
        layer = Linear(before, after, bias, manifold=manifold, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(draw(points(manifold, (after, before), dtype=dtype)))
            if bias:
                layer.bias.copy_(_normal(draw(_seeds()), (after,), dtype, "bias"))
        layers.append(layer)
        if index + 1 < depth:
            layers.append(draw(st.sampled_from([nn.Tanh, nn.Softplus, nn.Sigmoid]))())
    return Sequential(*layers)


@st.composite
def inputs_for(
    draw: st.DrawFn, module: nn.Module, *, max_examples: int = 4, max_positions: int = 0
) -> Tensor:
    """Return a strategy for batches of inputs of a chain.

    Args:
        draw: given by Hypothesis.
        module: a module whose first linear layer reads the input.
        max_examples: largest number of examples.
        max_positions: largest number of positions; 0: inputs ``(n, in)``, else also
            ``(n, positions, in)``.

    Returns:
        Normal numbers.
    """
    first = next(m for m in module.modules() if isinstance(m, nn.Linear))
    n = draw(st.integers(1, max_examples))
    positions = draw(st.integers(0, max_positions))
    middle = (positions,) if positions else ()
    size = (n, *middle, first.in_features)
    return _normal(draw(_seeds()), size, first.weight.dtype, "batch")
