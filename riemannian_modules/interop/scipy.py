"""The layer metric as a linear operator of SciPy: its spectrum, its solvers."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator

from riemannian_modules.interop.coordinates import Coordinates, Kind
from riemannian_modules.metric import LayerMetric

__all__ = ["to_scipy"]


def to_scipy(
    metric: LayerMetric, *, coordinates: Kind = "tangent", inverse: bool = False
) -> Any:
    """Return the metric of a block as a ``scipy.sparse.linalg.LinearOperator``.

    It is symmetric. Several parameters of a block follow each other in the order of
    ``metric.parts``, each in the order of its entries.

    Args:
        metric: the metric, at its point.
        coordinates: ``"tangent"``: coefficients in Frobenius-orthonormal tangent
            vectors, ``(dim, dim)``, positive definite; O(p^3) for the basis on a
            curved manifold, nothing on a Euclidean one. ``"ambient"``: entries of the
            tensors, ``(p, p)``, zero on what is not tangent.
        inverse: the inverse (in ambient coordinates on the tangent space): ``sharp``
            instead of ``flat``.

    Returns:
        The operator, in the data type of the parameters; complex vectors are multiplied
        part by part. A product costs one with K
        and one with its transpose, an inverse one a solve with the factorisation that
        the metric keeps; no matrix of the size of the parameters is formed.

    Raises:
        ValueError: other coordinates.

    >>> import geoopt
    >>> from riemannian_modules import Part, TangentSpace, factors
    >>> space = TangentSpace(geoopt.Euclidean(), torch.zeros(3, dtype=torch.float64))
    >>> factor = factors.DenseFactor(torch.ones(1, 3, dtype=torch.float64))
    >>> operator = to_scipy(LayerMetric([Part("w", space, factor)]))
    >>> operator @ np.array([1.0, 0.0, 0.0])
    array([2., 1., 1.])
    """
    own = Coordinates(metric, coordinates)
    verb = own.solve if inverse else own.apply

    def matvec(column: NDArray[Any]) -> NDArray[Any]:
        if np.iscomplexobj(column):
            both: NDArray[Any] = matvec(column.real) + 1j * matvec(column.imag)
            return both
        numbers = torch.as_tensor(np.ascontiguousarray(column).reshape(-1))
        found = verb(numbers.to(dtype=own.dtype, device=own.device))
        plain: NDArray[Any] = found.detach().cpu().numpy()
        return plain

    return LinearOperator(
        (own.size, own.size),
        matvec=matvec,
        rmatvec=matvec,
        dtype=torch.empty(0, dtype=own.dtype).numpy().dtype,
    )
