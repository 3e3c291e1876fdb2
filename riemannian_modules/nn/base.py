"""The base of modules whose parameters declare where they live."""

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules.manifolds import MetricManifold

__all__ = ["RiemannianModule"]


class RiemannianModule(nn.Module):
    """A torch module whose parameters live on manifolds.

    Attributes:
        declared_manifolds: ``{attribute: base manifold}`` of its own parameters, kept
            so that a parameter that loses its manifold is noticed.
    """

    def __init__(self) -> None:
        # Not super(): a subclass may also inherit from a torch layer, whose
        # constructor takes arguments.
        nn.Module.__init__(self)
        self.declared_manifolds: dict[str, geoopt.Manifold] = {}

    def declare(self, attribute: str, value: Tensor, manifold: geoopt.Manifold) -> None:
        """Make ``value`` a parameter on ``manifold``.

        Args:
            attribute: name of the parameter in this module.
            value: a point of the manifold.
            manifold: its base manifold, or a MetricManifold.

        Raises:
            ValueError: the shape does not fit the manifold.
        """
        view = (
            manifold
            if isinstance(manifold, MetricManifold)
            else MetricManifold(manifold)
        )
        point = value.detach().as_subclass(torch.Tensor)
        setattr(self, attribute, geoopt.ManifoldParameter(point, manifold=view))
        self.declared_manifolds[attribute] = view.base
