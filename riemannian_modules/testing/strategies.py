"""Hypothesis strategies for manifolds, points, masses, factors, metrics and models.

Ranges are arguments. Numbers come from a drawn seed rather than one by one, so that
points are generic and well conditioned by construction: nothing is filtered out, and
a failure shrinks in its shapes, kinds and ranges. Needs the extra ``testing``.

>>> from hypothesis import given, settings
>>> @settings(max_examples=5, database=None)
... @given(metric=layer_metrics(max_rank=3, dtype=torch.float64))
... def condition_is_at_least_one(metric):
...     assert metric.condition() >= 1.0
>>> condition_is_at_least_one()
"""

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType

import geoopt
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from riemannian_modules import manifolds as rm_manifolds
from riemannian_modules import output
from riemannian_modules.factors import (
    BiasFactor,
    DenseFactor,
    LinearFactor,
    MetricFactor,
)
from riemannian_modules.metric import LayerMetric, Part
from riemannian_modules.nn import Linear, Sequential
from riemannian_modules.output import OutputMetric
from riemannian_modules.tangent import TangentSpace
from riemannian_modules.testing.metric_probe import MetricProbe
from riemannian_modules.testing.point_strategies import (
    MANIFOLDS,
    SCALAR_KINDS,
    VECTOR_MANIFOLDS,
    covectors,
    known,
    manifolds,
    masses,
    normal,
    points,
    seeds,
    shapes,
    tangent_vectors,
)

__all__ = [
    "MANIFOLDS",
    "OUTPUTS",
    "SCALAR_KINDS",
    "VECTOR_MANIFOLDS",
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
    "vector_manifolds",
]

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
    kind = draw(st.sampled_from(known(kinds, ("dense", "linear"))))
    seed = draw(seeds())
    if kind == "dense" or len(shape) != 2:
        return DenseFactor(normal(seed, (rank, *shape), dtype, "rows"))
    divisors = [n for n in range(1, rank + 1) if rank % n == 0]
    n = draw(st.sampled_from(divisors))
    positions = draw(st.integers(1, max_positions))
    inputs = normal(seed, (n, positions, shape[1]), dtype, "inputs")
    size = (rank // n, n, positions, shape[0])
    cotangents = normal(seed, size, dtype, "cotangents")
    return LinearFactor(inputs, cotangents)


def vector_manifolds(
    *, kinds: Sequence[str] = tuple(VECTOR_MANIFOLDS)
) -> st.SearchStrategy[geoopt.Manifold]:
    """Return a strategy for base manifolds of vectors, such as biases.

    Args:
        kinds: keys of :data:`VECTOR_MANIFOLDS`.

    Returns:
        The strategy.
    """
    allowed = known(kinds, VECTOR_MANIFOLDS)
    return st.sampled_from(allowed).map(lambda kind: VECTOR_MANIFOLDS[kind]())


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
    bias_kinds: Sequence[str] = tuple(VECTOR_MANIFOLDS),
    scalar: bool | None = None,
    min_rank: int = 0,
    max_rank: int | None = None,
    max_side: int = 4,
    min_mass: float = 1e-2,
    max_mass: float = 1e2,
    max_amplification: float | None = None,
    dtype: torch.dtype = torch.float64,
) -> LayerMetric:
    """Return a strategy for metrics of a layer: a weight, perhaps a bias and a scale.

    Args:
        draw: given by Hypothesis.
        kinds: where the weight lives, keys of :data:`MANIFOLDS`.
        factor_kinds: as in :func:`factors`.
        mass_kinds: as in :func:`masses`; curved manifolds take scalar masses only.
        bias: whether there is a bias; None: either.
        bias_kinds: where the bias lives, keys of :data:`VECTOR_MANIFOLDS`.
        scalar: whether there is a parameter of shape ``()``; None: either.
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

    def space(home: geoopt.Manifold, point: Tensor, name: str) -> TangentSpace:
        curved = not isinstance(home, geoopt.Euclidean)
        allowed = ("scalar",) if curved else mass_kinds
        limits = {"min_mass": min_mass, "max_mass": max_mass}
        mass = draw(masses(point.shape, kinds=allowed, **limits))
        return TangentSpace(home, point, mass, name)

    spaces = {"weight": space(manifold, point, "weight")}
    if draw(st.booleans()) if bias is None else bias:
        home = draw(vector_manifolds(kinds=bias_kinds))
        start = draw(points(home, shape[:1], dtype=dtype))
        spaces["bias"] = space(home, start, "bias")
    if draw(st.booleans()) if scalar is None else scalar:
        home = draw(vector_manifolds(kinds=SCALAR_KINDS))
        spaces["scale"] = space(home, draw(points(home, (), dtype=dtype)), "scale")
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
    if "scale" in spaces:
        own = draw(factors((), rank=rank, dtype=dtype))
        parts.append(Part("scale", spaces["scale"], own))
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
    return st.sampled_from(known(kinds, OUTPUTS)).map(lambda kind: OUTPUTS[kind]())


@st.composite
def modules(
    draw: st.DrawFn,
    *,
    in_features: int = 3,
    out_features: int = 3,
    max_layers: int = 3,
    max_side: int = 4,
    kinds: Sequence[str] = tuple(MANIFOLDS),
    bias_kinds: Sequence[str] = tuple(VECTOR_MANIFOLDS),
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
        bias_kinds: where the biases live, keys of :data:`VECTOR_MANIFOLDS`.
        dtype: data type of the parameters.

    Returns:
        A chain of :class:`riemannian_modules.nn.Linear` and torch layers.
    """
    depth = draw(st.integers(1, max_layers))
    hidden = [draw(st.integers(2, max_side)) for _ in range(depth - 1)]
    sizes = [in_features, *hidden, out_features]
    layers: list[nn.Module] = []
    for index, (before, after) in enumerate(pairwise(sizes)):
        manifold = draw(manifolds(kinds=kinds))
        square = isinstance(manifold, geoopt.SymmetricPositiveDefinite)
        fits = manifold.check_point(torch.empty(after, before))
        if not fits or (square and before != after):
            manifold = rm_manifolds.Euclidean()
        bias = draw(st.booleans())
        layer = Linear(before, after, bias, manifold=manifold, dtype=dtype)
        with torch.no_grad():
            layer.weight.copy_(draw(points(manifold, (after, before), dtype=dtype)))
            if bias:
                home = draw(vector_manifolds(kinds=bias_kinds))
                layer.declare("bias", draw(points(home, (after,), dtype=dtype)), home)
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
    return normal(draw(seeds()), size, first.weight.dtype, "batch")
