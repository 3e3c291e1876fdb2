"""Hypothesis strategies for base manifolds, their points and vectors, and masses."""

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from types import MappingProxyType
from zlib import crc32

import geoopt
import torch
from hypothesis import strategies as st
from hypothesis.errors import InvalidArgument
from torch import Tensor

from riemannian_modules import manifolds as rm_manifolds
from riemannian_modules.mass import Mass
from riemannian_modules.tangent import TangentSpace

__all__ = [
    "MANIFOLDS",
    "SCALAR_KINDS",
    "VECTOR_MANIFOLDS",
    "covectors",
    "known",
    "manifolds",
    "masses",
    "normal",
    "points",
    "seeds",
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
        "grassmann": rm_manifolds.Grassmann,
        "special_orthogonal": rm_manifolds.SpecialOrthogonal,
        "oblique": rm_manifolds.Oblique,
        "positive": rm_manifolds.Positive,
        "fixed_rank": lambda: rm_manifolds.FixedRank(2),
    }
)

VECTOR_MANIFOLDS: Mapping[str, Callable[[], geoopt.Manifold]] = MappingProxyType(
    {
        "euclidean": rm_manifolds.Euclidean,
        "sphere": rm_manifolds.Sphere,
        "scaled_sphere": lambda: rm_manifolds.Scaled(rm_manifolds.Sphere(), 2.0),
        "scaled_euclidean": lambda: rm_manifolds.Scaled(rm_manifolds.Euclidean(), 0.5),
        "poincare_ball": rm_manifolds.PoincareBall,
        "lorentz": rm_manifolds.Lorentz,
        "positive": rm_manifolds.Positive,
    }
)

# The manifolds of vectors that a single number can be a point of, too.
SCALAR_KINDS = ("euclidean", "scaled_euclidean", "positive")


def known(kinds: Sequence[str], allowed: Collection[str]) -> list[str]:
    """Return the kinds as a list.

    Args:
        kinds: what the caller asks for.
        allowed: what there is.

    Returns:
        The kinds.

    Raises:
        InvalidArgument: there are none, or some are unknown.
    """
    unknown = sorted(set(kinds) - set(allowed))
    if unknown or not kinds:
        raise InvalidArgument(f"kinds={kinds!r}: choose from {sorted(allowed)}")
    return list(kinds)


def seeds() -> st.SearchStrategy[int]:
    """Return a strategy for seeds."""
    return st.integers(0, 2**32 - 1)


def _generator(seed: int, role: str) -> torch.Generator:
    # Hypothesis likes to draw equal seeds; what plays another role differs anyway.
    return torch.Generator().manual_seed(crc32(role.encode()) ^ seed)


def normal(seed: int, shape: Sequence[int], dtype: torch.dtype, role: str) -> Tensor:
    """Return normal numbers; the same seed gives others in another role."""
    generator = _generator(seed, role)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def manifolds(
    *, kinds: Sequence[str] = tuple(MANIFOLDS)
) -> st.SearchStrategy[geoopt.Manifold]:
    """Return a strategy for base manifolds of matrices.

    Args:
        kinds: keys of :data:`MANIFOLDS`.

    Returns:
        The strategy.
    """
    return st.sampled_from(known(kinds, MANIFOLDS)).map(lambda kind: MANIFOLDS[kind]())


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
    if isinstance(manifold, rm_manifolds.FixedRank):
        min_side = max(min_side, manifold.rank)
    sides = st.integers(min_side, max_side)
    if isinstance(manifold, rm_manifolds.SPD | rm_manifolds.SpecialOrthogonal):
        return sides.map(lambda side: (side, side))
    if isinstance(manifold, rm_manifolds.Grassmann):
        short = st.integers(min_side, max_side - 1)
        wide = short.flatmap(
            lambda side: st.tuples(st.just(side), st.integers(side + 1, max_side))
        )
        return st.one_of(wide, wide.map(lambda shape: (shape[1], shape[0])))
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
        max_condition: largest condition number of a positive definite matrix or one
            of fixed rank, and largest ratio of the entries of a positive tensor.
        dtype: data type.

    Returns:
        A point. It is computed in float64 and rounded.
    """
    ambient = normal(draw(seeds()), shape, torch.float64, "point")
    spread = 0.5 * math.log(draw(st.floats(1.0, max_condition)))

    def values(count: int) -> Tensor:
        return torch.linspace(-spread, spread, count, dtype=torch.float64).exp()

    if isinstance(manifold, rm_manifolds.SPD):
        _, vectors = torch.linalg.eigh(ambient + ambient.mT)
        return ((vectors * values(shape[-1])) @ vectors.mT).to(dtype)
    if isinstance(manifold, rm_manifolds.FixedRank):
        left, _, right = torch.linalg.svd(ambient, full_matrices=False)
        rank = manifold.rank
        return ((left[..., :rank] * values(rank)) @ right[..., :rank, :]).to(dtype)
    if isinstance(manifold, rm_manifolds.Positive):
        return (spread * ambient.tanh()).exp().to(dtype)
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
    return normal(draw(seeds()), space.point.shape, space.point.dtype, "covector")


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
    kind = draw(st.sampled_from(known(kinds, ("scalar", "rank_one", "diagonal"))))
    low, high = math.log(min_mass), math.log(max_mass)

    def entries(*size: int, root: float = 1.0) -> Tensor:
        generator = _generator(draw(seeds()), "mass")
        share = torch.rand(size, generator=generator, dtype=torch.float64)
        return (root * (low + (high - low) * share)).exp()

    if kind == "diagonal":
        return Mass(diagonal=entries(*shape))
    if kind == "rank_one" and len(shape) == 2:
        return Mass(row=entries(shape[0], root=0.5), column=entries(shape[1], root=0.5))
    return Mass(scalar=math.exp(draw(st.floats(low, high))))
