"""What may be part of a product manifold."""

import geoopt

from riemannian_modules.errors import MassError, ShapeError
from riemannian_modules.manifolds.contract import ensure_contract
from riemannian_modules.manifolds.declaring import shape_problem
from riemannian_modules.manifolds.riesz import require_own_formulas
from riemannian_modules.mass import Mass

__all__ = ["require_part"]


def require_part(
    name: str, manifold: geoopt.Manifold, shape: tuple[int, ...], mass: Mass
) -> None:
    """Refuse what cannot be part of a product.

    Args:
        name: the part's name.
        manifold: where it is to live.
        shape: its shape.
        mass: its mass.

    Raises:
        ManifoldContractError: the manifold cannot carry a layer metric.
        ShapeError: no point of it has the shape.
        MassError: it cannot carry the mass.
    """
    ensure_contract(manifold, name)
    require_own_formulas(manifold, name)
    reason = shape_problem(manifold, shape)
    if reason is not None:
        raise ShapeError(
            f"'{name}' of shape {shape} does not fit {manifold.name}: {reason}; choose "
            "another manifold"
        )
    if not (mass.is_scalar or isinstance(manifold, geoopt.Euclidean)):
        raise MassError(
            f"'{name}' lives on {manifold.name}, where only a number can be its mass; "
            "use one"
        )
