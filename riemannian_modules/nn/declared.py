"""Where the parameters of a model live, as a nested dictionary."""

from typing import Union

import geoopt
from torch import Tensor, nn

from riemannian_modules.manifolds import Euclidean, base_of
from riemannian_modules.manifolds.dotted import nested

__all__ = ["Declared", "declared", "manifold_of"]

Declared = dict[str, Union[geoopt.Manifold, "Declared"]]


def manifold_of(parameter: Tensor) -> geoopt.Manifold:
    """Return the base manifold of a parameter, Euclidean if it declares none."""
    view = getattr(parameter, "manifold", None)
    return Euclidean() if view is None else base_of(view)


def declared(module: nn.Module) -> Declared:
    """Return ``{name: manifold}`` of the trainable parameters, nested as the modules.

    The manifold of a module is the product of these, and that of a composition the
    product of its children's. A parameter that is used in several places is one
    variable, so it is named where :meth:`torch.nn.Module.named_parameters` finds it
    first, and only there. Modules without trainable parameters are left out.

    Args:
        module: any module; parameters that declare no manifold are Euclidean.

    Returns:
        For every attribute that is a parameter its base manifold, for every child a
        dictionary of the same form.

    >>> from riemannian_modules import manifolds
    >>> from riemannian_modules.nn import Linear, Residual
    >>> block = Residual(Linear(4, 4, manifold=manifolds.Stiefel()))
    >>> {k: m.name for k, m in declared(block)["module"].items()}
    {'weight': 'Stiefel', 'bias': 'Euclidean'}
    """
    trainable = {n: p for n, p in module.named_parameters() if p.requires_grad}
    return nested({name: manifold_of(p) for name, p in trainable.items()})
