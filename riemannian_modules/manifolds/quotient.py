"""Manifolds whose points are classes of tensors, such as the bases of one subspace."""

from typing import Protocol, runtime_checkable

from torch import Tensor

__all__ = ["Quotient"]


@runtime_checkable
class Quotient(Protocol):
    """A manifold on which several tensors stand for one point.

    Tangent vectors are *horizontal*: by ``inner`` at right angles to the directions
    that lead to other tensors of the same point (Absil, Mahony & Sepulchre, 2008,
    section 3.6.2). Give a quotient manifold of your own, of real tensors, this method,
    and ``riemannian_modules.testing`` compares its points and finds its horizontal
    vectors by it.

    >>> from riemannian_modules.manifolds import Grassmann, Stiefel
    >>> isinstance(Grassmann(), Quotient), isinstance(Stiefel(), Quotient)
    (True, False)
    """

    def invariant(self, x: Tensor) -> Tensor:
        """Return a smooth function of ``x`` that tells points apart, and only them.

        Args:
            x: representatives of points, ``(*batch, *shape)``.

        Returns:
            A tensor that is equal for two representatives of one point.
        """
