"""check_pymanopt_manifold on pymanopt's own manifolds, and what it must reject."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pymanopt = pytest.importorskip("pymanopt")

from mutants import pymanopt_manifolds as mutants  # noqa: E402
from pymanopt import manifolds as pm  # noqa: E402

from riemannian_modules.testing import (  # noqa: E402
    check_pymanopt_manifold,
    failures,
    raise_failures,
)
from riemannian_modules.testing.pymanopt_probe import Cost  # noqa: E402

RANDOM = np.random.default_rng(1)
A = RANDOM.standard_normal((6, 6))
A = A + A.T
B = np.stack([A, A @ A / 6.0])
TARGET = A @ A / 6.0
LOW = RANDOM.standard_normal((5, 4))

# Of the space alone, not of its basis.
RAYLEIGH = Cost(
    lambda x: 0.5 * float(np.real(np.sum(np.conj(x) * (A @ x)))),
    lambda x: A @ x,
    lambda x, u: A @ u,
)
RAYLEIGHS = Cost(
    lambda x: 0.5 * float(np.sum(x * (B @ x))), lambda x: B @ x, lambda x, u: B @ u
)
GRAM = Cost(
    lambda y: 0.25 * float(np.sum((y @ y.T - TARGET) ** 2)),
    lambda y: (y @ y.T - TARGET) @ y,
    lambda y, u: (u @ y.T + y @ u.T) @ y + (y @ y.T - TARGET) @ u,
)


def factored(x: Any) -> Any:
    u, s, vt = x
    rest = (u * s) @ vt - LOW
    return rest @ vt.T * s, np.diag(u.T @ rest @ vt.T), (u * s).T @ rest


FACTORED = Cost(
    lambda x: 0.5 * float(np.sum(((x[0] * x[1]) @ x[2] - LOW) ** 2)),
    factored,
    lambda x, u: u,
)

Make = Callable[[], Any]
CASES: dict[str, tuple[Make, Cost | None]] = {
    "Sphere": (lambda: pm.Sphere(4), None),
    "Sphere of matrices": (lambda: pm.Sphere(4, 3), None),
    "SphereSubspaceIntersection": (
        lambda: pm.SphereSubspaceIntersection(A[:4, :2]),
        None,
    ),
    "SphereSubspaceComplementIntersection": (
        lambda: pm.SphereSubspaceComplementIntersection(A[:4, :1]),
        None,
    ),
    "Stiefel": (lambda: pm.Stiefel(6, 2), None),
    "Stiefel, several": (lambda: pm.Stiefel(6, 2, k=2), None),
    "Stiefel, polar": (lambda: pm.Stiefel(6, 2, retraction="polar"), None),
    "Grassmann": (lambda: pm.Grassmann(6, 2), RAYLEIGH),
    "Grassmann, several": (lambda: pm.Grassmann(6, 2, k=2), RAYLEIGHS),
    "ComplexGrassmann": (lambda: pm.ComplexGrassmann(6, 2), RAYLEIGH),
    "SPD": (lambda: pm.SymmetricPositiveDefinite(3), None),
    "SPD, several": (lambda: pm.SymmetricPositiveDefinite(3, k=2), None),
    "HPD": (lambda: pm.HermitianPositiveDefinite(3), None),
    "SpecialHPD": (lambda: pm.SpecialHermitianPositiveDefinite(3), None),
    "Euclidean": (lambda: pm.Euclidean(3, 2), None),
    "ComplexEuclidean": (lambda: pm.ComplexEuclidean(3, 2), None),
    "Symmetric": (lambda: pm.Symmetric(3), None),
    "SkewSymmetric": (lambda: pm.SkewSymmetric(3), None),
    "Oblique": (lambda: pm.Oblique(4, 3), None),
    "Positive": (lambda: pm.Positive(3, 2), None),
    "SpecialOrthogonalGroup": (lambda: pm.SpecialOrthogonalGroup(4), None),
    "SpecialOrthogonalGroup, several": (
        lambda: pm.SpecialOrthogonalGroup(4, k=2),
        None,
    ),
    "UnitaryGroup": (lambda: pm.UnitaryGroup(3), None),
    "ComplexCircle": (lambda: pm.ComplexCircle(4), None),
    "PSDFixedRank": (lambda: pm.PSDFixedRank(6, 2), GRAM),
    "Elliptope": (lambda: pm.Elliptope(6, 2), GRAM),
    "PoincareBall": (lambda: pm.PoincareBall(3), None),
    "FixedRankEmbedded": (lambda: pm.FixedRankEmbedded(5, 4, 2), FACTORED),
    "Product": (lambda: pm.Product([pm.Sphere(4), pm.Stiefel(5, 2)]), None),
}

SKEW = "projection takes the real skew part, not the Hermitian one"
REAL = "exp puts complex numbers into a real array"
TWICE = "projection onto rows and onto the complement of rotations disturb each other"
# What pymanopt 2.2.1 is known to get wrong; strict.
DEFECTS: dict[str, dict[str, str]] = {
    "UnitaryGroup": dict.fromkeys(
        (
            "projection_complete",
            "riesz",
            "gradient_slope",
            "gradient_tangent",
            "hessian_slope",
        ),
        SKEW,
    ),
    "ComplexCircle": dict.fromkeys(
        (
            "hessian_slope",
            "exp_zero",
            "exp_derivative",
            "retraction_order",
            "log_inverse",
            "dist",
            "pair_mean",
        ),
        REAL,
    ),
    "Elliptope": dict.fromkeys(
        (
            "projection_complete",
            "random_tangent",
            "transport_identity",
            "transport_continuous",
            "transport_tangent",
        ),
        TWICE,
    ),
}
# A point of three arrays, whose ambient vectors are matrices, and whose tangent vectors
# are written in a basis that goes with the point.
OTHER_LAYOUT = (
    "projection_idempotent",
    "projection_complete",
    "riesz",
    "hessian_symmetric",
    "hessian_linear",
    "hessian_tangent",
    "transport_continuous",
    "pure",
)


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@pytest.mark.parametrize("name", CASES)
def test_pymanopt_s_manifolds(name: str) -> None:
    make, cost = CASES[name]
    skip = OTHER_LAYOUT if name == "FixedRankEmbedded" else ()
    found = check_pymanopt_manifold(make(), cost=cost, skip=skip)
    assert {"inner_symmetric", "retraction_zero", "gradient_slope"} <= {
        result.name for result in found
    }
    raise_failures(found, expected_failures=DEFECTS.get(name))


@settings(max_examples=20, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(sorted(set(CASES) - set(DEFECTS) - {"FixedRankEmbedded"})),
)
def test_any_seed(seed: int, name: str) -> None:
    make, cost = CASES[name]
    raise_failures(check_pymanopt_manifold(make(), cost=cost, seed=seed))


def test_second_derivatives_are_looked_at_where_there_are_some() -> None:
    for name in ("Stiefel", "SPD", "Grassmann", "Oblique", "SpecialOrthogonalGroup"):
        make, cost = CASES[name]
        found = {r.name: r for r in check_pymanopt_manifold(make(), cost=cost)}
        assert found["hessian_slope"].value > 2.75
        assert found["gradient_slope"].value > 1.75


def test_the_random_state_of_numpy_is_put_back() -> None:
    np.random.seed(3)  # noqa: NPY002
    before = np.random.random()  # noqa: NPY002
    np.random.seed(3)  # noqa: NPY002
    check_pymanopt_manifold(pm.Sphere(3))
    assert np.random.random() == before  # noqa: NPY002


@pytest.mark.parametrize("law", mutants.MANIFOLDS)
def test_the_law_rejects_its_mutant(law: str) -> None:
    make, cost = mutants.MANIFOLDS[law]
    found = {r.name: r for r in check_pymanopt_manifold(make(), cost=cost)}
    assert law in found
    assert not found[law].passed


def test_every_law_has_a_mutant() -> None:
    found = {r.name for r in check_pymanopt_manifold(pm.Sphere(4))}
    assert found == set(mutants.MANIFOLDS)


def test_an_error_is_a_finding() -> None:
    bad = failures(check_pymanopt_manifold(mutants.Raising(4)))
    assert {result.name for result in bad} >= {"log_inverse"}
    assert "ZeroDivisionError" in "".join(map(str, bad))
