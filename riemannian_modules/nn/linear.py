"""A linear layer whose weight lives on a manifold."""

import math

import geoopt
import torch
from torch import Tensor, nn

from riemannian_modules.errors import ShapeError
from riemannian_modules.manifolds import Euclidean, MetricManifold
from riemannian_modules.manifolds.declaring import shape_problem
from riemannian_modules.manifolds.drawing import drawn
from riemannian_modules.manifolds.reshaped import innermost
from riemannian_modules.nn.base import RiemannianModule

__all__ = ["Linear"]


class Linear(RiemannianModule, nn.Linear):
    """``y = x W^T + b`` with the weight ``(out, in)`` on a manifold.

    The weight is a geoopt ManifoldParameter and starts at a random point of its
    manifold (on a Euclidean one, at torch's default). The bias is Euclidean.

    Args:
        in_features: size of the input.
        out_features: size of the output.
        bias: whether to add a bias.
        manifold: where the weight lives; None: Euclidean. ``Stiefel()`` means
            orthonormal rows if ``out <= in``, else orthonormal columns; ``Sphere()``
            unit rows; ``PoincareBall()`` rows in the ball; ``SPD()`` needs
            ``in == out``.
        device: device of the parameters.
        dtype: floating point type of the parameters.

    Raises:
        ShapeError: no point of the manifold has the shape ``(out, in)``.

    >>> from riemannian_modules import manifolds
    >>> layer = Linear(64, 32, manifold=manifolds.Stiefel())
    >>> torch.allclose(layer.weight @ layer.weight.T, torch.eye(32), atol=1e-5)
    True
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        manifold: geoopt.Manifold | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        RiemannianModule.__init__(self)
        self.in_features = in_features
        self.out_features = out_features
        view = MetricManifold(Euclidean() if manifold is None else manifold)
        base = view.base
        empty = torch.empty(out_features, in_features, device=device, dtype=dtype)
        problem = shape_problem(base, empty.shape)
        if problem is not None:
            raise ShapeError(
                f"no weight of shape {tuple(empty.shape)} lives on {base.name}: "
                f"{problem}"
            )
        self.declare("weight", _initial(base, empty), view)
        if bias:
            start = _uniform(empty.new_empty(out_features), in_features)
            self.declare("bias", start, Euclidean())
        else:
            self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        """Draw a new starting point on the manifold, and a new bias."""
        with torch.no_grad():
            weight = self.weight.detach().as_subclass(torch.Tensor)
            start = _initial(
                self.declared_manifolds["weight"], torch.empty_like(weight)
            )
            self.weight.copy_(start.as_subclass(torch.Tensor))
            if self.bias is not None:
                _uniform(self.bias, self.in_features)

    def extra_repr(self) -> str:
        """Say the sizes and where the weight lives."""
        base = self.declared_manifolds["weight"]
        return f"{nn.Linear.extra_repr(self)}, manifold={base.name}"


def _uniform(bias: Tensor, inputs: int) -> Tensor:
    bound = 1.0 / math.sqrt(inputs) if inputs else 0.0
    return bias.uniform_(-bound, bound)


def _initial(base: geoopt.Manifold, empty: Tensor) -> Tensor:
    if isinstance(base, geoopt.Euclidean):
        nn.init.kaiming_uniform_(empty, a=math.sqrt(5.0))
        return empty
    if isinstance(innermost(base), geoopt.Stereographic):
        # Near the origin, where the ball is flat: far out the conformal factor
        # makes every step tiny.
        return torch.as_tensor(base.projx(1e-2 * torch.randn_like(empty)))
    if isinstance(base, geoopt.SymmetricPositiveDefinite):
        noise = torch.randn_like(empty) / math.sqrt(max(1, empty.shape[-1]))
        return torch.linalg.matrix_exp(0.25 * (noise + noise.mT))
    if isinstance(base, geoopt.Sphere):
        return torch.as_tensor(base.projx(torch.randn_like(empty)))
    return drawn(base, "random", empty.shape, device=empty.device, dtype=empty.dtype)
