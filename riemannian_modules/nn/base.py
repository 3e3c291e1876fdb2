"""The base of modules whose parameters declare where they live, and its operators."""

from collections.abc import Callable
from typing import Any, Self

import geoopt
from torch import Tensor, nn

from riemannian_modules.assembly import MetricLink
from riemannian_modules.manifolds import MetricManifold
from riemannian_modules.manifolds.declaring import remember, restore
from riemannian_modules.nn.declared import Declared, declared

__all__ = ["RiemannianModule"]


class RiemannianModule(nn.Module):
    """A torch module whose parameters live on manifolds.

    Two of them compose as functions do, also with plain torch modules on either side:
    ``(f @ g)(x) = f(g(x))`` and ``(f + g)(x) = f(x) + g(x)``.

    Attributes:
        declared_manifolds: ``{attribute: base manifold}`` of its own parameters, kept
            so that a parameter that loses its manifold is noticed.
        metric_link: the LayerwiseMetric that was built on it last, if it is still
            there; for printing only.

    >>> from torch import nn
    >>> from riemannian_modules.nn import Linear
    >>> model = Linear(3, 2) @ nn.Tanh() @ (Linear(4, 3) + nn.Linear(4, 3))
    >>> [type(child).__name__ for child in model]
    ['Parallel', 'Tanh', 'Linear']
    """

    def __init__(self) -> None:
        # Not super(): a subclass may also inherit from a torch layer, whose
        # constructor takes arguments.
        nn.Module.__init__(self)
        self.declared_manifolds: dict[str, geoopt.Manifold] = {}
        self.metric_link = MetricLink()

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
        point = value.detach().as_subclass(Tensor).contiguous()
        setattr(self, attribute, geoopt.ManifoldParameter(point, manifold=view))
        remember(self, attribute, view.base)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # .to(), .float(), .to_empty() ... come through here; where they replace
        # parameters, these would be Euclidean without a word.
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        restore(self)
        return self

    def declared(self) -> Declared:
        """Return where its parameters live, nested as the modules are.

        The module's manifold is the product of what is named here; see
        :func:`riemannian_modules.nn.declared`.
        """
        return declared(self)

    # --- operators; the compositions are made of this class, so they come in late

    def __matmul__(self, other: Any) -> "RiemannianModule":
        from riemannian_modules.nn.sequential import chained

        return chained(other, self) if isinstance(other, nn.Module) else NotImplemented

    def __rmatmul__(self, other: Any) -> "RiemannianModule":
        from riemannian_modules.nn.sequential import chained

        return chained(self, other) if isinstance(other, nn.Module) else NotImplemented

    def __add__(self, other: Any) -> "RiemannianModule":
        from riemannian_modules.nn.parallel import added

        return added(self, other) if isinstance(other, nn.Module) else NotImplemented

    def __radd__(self, other: Any) -> "RiemannianModule":
        from riemannian_modules.nn.parallel import added

        return added(other, self) if isinstance(other, nn.Module) else NotImplemented
