"""Positive eigenvectors of matrices of gains: the weights of composite metrics."""

import numpy as np
from numpy.typing import NDArray
from scipy.linalg import matrix_balance
from scipy.sparse.csgraph import connected_components

__all__ = [
    "abscissa",
    "irreducible",
    "perron_vector",
    "perron_weights",
    "usable",
    "witness",
]

Array = NDArray[np.float64]


def irreducible(A: Array) -> bool:
    """Return whether every module acts on every other one, perhaps through others."""
    return _components(A, "strong")[0] == 1


def _components(A: Array, connection: str) -> tuple[int, NDArray[np.int32]]:
    edges = (A != 0) & ~np.eye(len(A), dtype=bool)
    found: tuple[int, NDArray[np.int32]] = connected_components(
        edges, directed=True, connection=connection
    )
    return found


@np.errstate(all="ignore")
def perron_vector(A: Array) -> Array:
    """Return the positive right eigenvector of an irreducible Metzler matrix.

    Noda's iteration: inverse iteration whose shift is the upper Collatz-Wielandt
    bound, on the balanced matrix. It converges quadratically and stays positive. Every
    system is scaled by the vector so far, so that small entries are as accurate as
    large ones.

    Args:
        A: ``(n, n)``, not negative off the diagonal, irreducible.

    Returns:
        The vector, with sum one; not :func:`usable` where doubles do not hold it.
        Cost: some ten linear systems.
    """
    n = len(A)
    if not np.isfinite(A).all():
        return np.full(n, np.nan)
    balanced, (scale, _) = matrix_balance(A, permute=False, separate=True)
    B = balanced - np.eye(n) * np.diag(A).min()
    x = np.full(n, 1.0 / n)
    best, least = x, np.inf
    for _ in range(60):
        scaled = B * x[None, :] / x[:, None]
        ratios = scaled.sum(1)
        spread = ratios.max() - ratios.min()
        if spread < least:
            best, least = x, spread
        if spread <= 4 * np.finfo(float).eps * ratios.max():
            break
        try:
            y = x * np.linalg.solve(np.eye(n) * ratios.max() - scaled, np.ones(n))
        except np.linalg.LinAlgError:
            break
        if not np.isfinite(y).all() or (y <= 0).any():
            break
        x = y / y.sum()
    best = best * scale
    return best / best.sum()


@np.errstate(all="ignore")
def perron_weights(A: Array) -> Array:
    """Return ``u_i / v_i`` of the left and right Perron vectors of a Metzler matrix.

    Implements :eq:`perron-weights`.

    Args:
        A: ``(n, n)``, not negative off the diagonal, irreducible.

    Returns:
        The weights ``(n,)``; both vectors are scaled to sum one.

    >>> perron_weights(np.array([[-3.0, 1.0], [2.0, -4.0]])).round(6).tolist()
    [1.333333, 0.666667]
    """
    return perron_vector(A.T) / perron_vector(A)


def abscissa(A: Array) -> float:
    """Return the largest real part of the eigenvalues, as the eigen-solver has it."""
    return float(np.linalg.eigvals(A).real.max())


def usable(vector: Array) -> bool:
    """Return whether all entries are positive and finite."""
    return bool((vector > 0).all() and np.isfinite(vector).all())


def witness(A: Array) -> Array:
    """Return positive vectors of the parts of A that are not connected, side by side.

    Args:
        A: ``(n, n)`` Metzler, ``A_ij`` zero only where ``A_ji`` is.

    Returns:
        ``(n,)``, an eigenvector on each part.
    """
    count, label = _components(A, "weak")
    x = np.ones(len(A))
    for part in range(count):
        inside = np.flatnonzero(label == part)
        x[inside] = perron_vector(A[np.ix_(inside, inside)])
    return x
