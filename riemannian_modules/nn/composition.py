"""What all compositions share: children by role, one formula, a tree when printed."""

from collections.abc import Sequence

from torch import Tensor, nn

from riemannian_modules.contraction.certificate import Certificate
from riemannian_modules.contraction.premises import Gains, Rates
from riemannian_modules.errors import ShapeError
from riemannian_modules.nn.base import RiemannianModule
from riemannian_modules.nn.question import Bounds, Question
from riemannian_modules.nn.tree import tree

__all__ = ["Composition", "require_module", "require_same_shape"]


class Composition(RiemannianModule):
    """A module that is made of others and has no parameters of its own.

    A child is the attribute that its role is called (``gate.value``), a member of a
    list its number. Its manifold is the product of its children's
    (:meth:`RiemannianModule.declared`), nested as deep as the modules are. It needs no
    rule for its factors: the metric's recursion is reverse-mode differentiation, and
    finds every child by its own calls.
    """

    def __repr__(self) -> str:
        return tree(self)

    def certificate(
        self,
        rates: Rates | None = None,
        *,
        bounds: Bounds = "operator_norm",
        at: Tensor | Sequence[Tensor] | None = None,
        couplings: Gains | None = None,
        slack: float | None = None,
        epsilon: float | None = None,
        target: float | None = None,
    ) -> Certificate:
        """Certify that the dynamical system that this composition is contracts.

        Which system that is depends on the composition, and stands first among the
        certificate's assumptions (the page on certificates derives them):

        - :class:`FixedPoint`, :class:`Recurrent`, :class:`Feedback`, :class:`Residual`:
          the iteration of the map, in discrete time. For a Residual ``rates`` may give
          the rate of ``x' = module(x)``.
        - :class:`Sequential`, :class:`Parallel`, :class:`Heads`, :class:`Gate`,
          :class:`Join`: a state for every child that is driven by the child's map,
          ``x_i' = h_i(x_i) + f_i(x_(i-1))``, with the rates of the ``h_i``.
        - with ``couplings``: the flow of the parameters down one loss; rates of blocks
          and norms of the Hessian's blocks between them, as in
          :func:`~riemannian_modules.contraction.shared_loss`.

        Args:
            rates: rates by the names of the children, or in their order.
            bounds: ``"operator_norm"``: gains are products of operator norms,
                certified; ``"measured"``: norms of Jacobians, evidence only.
            at: with ``"measured"``, the inputs ``(n, *in)`` at which to measure.
            couplings: norms of the off-diagonal blocks of a Hessian.
            slack: as in :func:`~riemannian_modules.contraction.small_gain`.
            epsilon: as in :func:`~riemannian_modules.contraction.hierarchy`, for
                chains and trunks with heads.
            target: as there.

        Returns:
            The certificate; not certified where a gain is unknown.

        Raises:
            ContractionError: rates are missing or have no place; measured without
                inputs.

        >>> import torch
        >>> from riemannian_modules.nn import FixedPoint, Join, Sequential
        >>> inner = nn.Linear(2, 2)
        >>> _ = inner.requires_grad_(False).weight.copy_(0.5 * torch.eye(2))
        >>> layer = FixedPoint(Sequential(Join(nn.Linear(3, 2), inner), nn.Tanh()), 2)
        >>> found = layer.certificate()
        >>> round(found.value, 6), str(found.verdict)
        (0.5, 'certified')
        """
        # The systems are told by type of composition, so they come in late.
        from riemannian_modules.nn.certificates import certificate_of

        points = (at,) if isinstance(at, Tensor) else tuple(at or ())
        question = Question(rates, bounds, points, slack, epsilon, target)
        return certificate_of(self, question, couplings)


def require_module(child: object, role: str) -> nn.Module:
    """Return the child if it is a module.

    Args:
        child: what is to become a child.
        role: what it is for.

    Returns:
        The child.

    Raises:
        TypeError: it is something else.
    """
    if not isinstance(child, nn.Module):
        raise TypeError(
            f"{role} is a {type(child).__name__}; compositions are made of "
            "torch.nn.Module objects, so that their parameters are found: wrap a "
            "function in a module (torch.nn.Tanh() for torch.tanh)"
        )
    return child


def require_same_shape(one: Tensor, other: Tensor, what: str) -> None:
    """Refuse to add tensors of different shapes, which would broadcast.

    Args:
        one: a tensor.
        other: another one.
        what: both in words, and what to do.

    Raises:
        ShapeError: their shapes differ.
    """
    if one.shape != other.shape:
        raise ShapeError(f"shapes {tuple(one.shape)} and {tuple(other.shape)}: {what}")
