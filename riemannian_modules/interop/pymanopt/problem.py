"""A model as a problem for pymanopt's optimizers."""

import copy
import math
from collections.abc import Mapping
from typing import Any, Literal

import geoopt
import numpy as np
import pymanopt
import torch
from torch import Tensor

from riemannian_modules.errors import NonFiniteError, NotOnManifoldError, ProblemError
from riemannian_modules.interop.pymanopt.as_pymanopt import in_float64
from riemannian_modules.interop.pymanopt.cost import Loss, ModelCost
from riemannian_modules.interop.pymanopt.pulled import PulledMetric
from riemannian_modules.interop.pymanopt.view import Array, ManifoldView, _array
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.manifolds import Product
from riemannian_modules.manifolds.declaring import off_manifold
from riemannian_modules.manifolds.riesz import dimension, flat, riesz
from riemannian_modules.retractions import Default, Retraction

__all__ = ["ModelManifold", "ModelProblem", "problem"]

Geometry = Literal["layer", "base"]
_NAMES = ("layer", "base")


class ModelManifold(ManifoldView):
    """The product of all manifolds of a model, flat, in the layer or base metric.

    A point is one array with the values of all trainable parameters in their order;
    :meth:`unpack` returns them by name. The layer metric is pulled back anew at every
    point whose metric is asked for.

    Args:
        product: product of the base manifolds, with masses 1, in float64.
        pulled: the layer metric; None: the metric of the product.
        start: flat point, for the typical distance.
        retraction: how tangent vectors become points.
    """

    def __init__(
        self,
        product: Product,
        pulled: PulledMetric | None,
        start: Tensor,
        retraction: Retraction,
    ) -> None:
        self.product = product
        self._pulled = pulled
        self._start = start
        name = "Model with layer metric" if pulled is not None else "Model"
        dim = dimension(product, start)
        super().__init__(name, tuple(start.shape), dim, retraction, start.device)

    def _at(self, x: Tensor) -> geoopt.Manifold:
        return self.product if self._pulled is None else self._pulled.at(x).manifold

    def _base(self) -> geoopt.Manifold:
        return self.product

    def _typical_point(self) -> Tensor:
        return self._start

    def unpack(self, point: Array) -> dict[str, Array]:
        """Return a point or vector as ``{parameter name: array}``.

        Args:
            point: flat array.
        """
        parts = self.product.unpack(self._tensor(point))
        return {name: _array(value) for name, value in parts.items()}

    def pack(self, values: Mapping[str, Array]) -> Array:
        """Return ``{parameter name: array}`` as a point or vector.

        Args:
            values: one array for each parameter.
        """
        named = {name: torch.tensor(np.asarray(v)) for name, v in values.items()}
        return _array(self.product.pack(named))


class ModelProblem(pymanopt.Problem):  # type: ignore[misc]
    """A model, a loss and a metric for pymanopt; made by :func:`problem`.

    Attributes:
        manifold: the :class:`ModelManifold`.
        cost: from a point to a number.
        riemannian_gradient: from a point to a tangent vector.
        riemannian_hessian: from a point and a tangent vector to a tangent vector.
        preconditioner: from a point and a tangent vector to a tangent vector.
    """

    def __init__(
        self,
        metric: LayerwiseMetric,
        cost: ModelCost,
        manifold: ModelManifold,
        pulled: PulledMetric,
        preconditioner: Geometry | None,
    ) -> None:
        self._metric = metric
        self._pulled = pulled
        tensor = manifold._tensor

        def value(point: Array) -> float:
            return cost.value(tensor(point))

        def gradient(point: Array) -> Array:
            return _array(cost.gradient(tensor(point)))

        def hessian(point: Array, vector: Array) -> Array:
            return _array(cost.hessian(tensor(point), tensor(vector)))

        def preconditioned(point: Array, tangent_vector: Array) -> Array:
            x, u = tensor(point), tensor(tangent_vector)
            layer, base = pulled.at(x).manifold, manifold.product
            source, target = (layer, base) if in_layer else (base, layer)
            return _array(riesz(target, x, flat(source, x, u)))

        in_layer = manifold._pulled is not None
        geometry = "layer" if in_layer else "base"
        identity = preconditioner is None or preconditioner == geometry
        function = pymanopt.function.numpy(manifold)
        super().__init__(
            manifold,
            function(value),
            euclidean_gradient=function(gradient),
            euclidean_hessian=function(hessian),
            preconditioner=None if identity else preconditioned,
        )

    @property
    def riemannian_gradient(self) -> Any:
        """The gradient in the metric of the manifold.

        In the layer metric from the whitened residual, which loses no digits however
        small the mass.
        """
        if self.manifold._pulled is None:
            return super().riemannian_gradient

        def gradient(point: Array) -> Array:
            return _array(self._pulled.at(self.manifold._tensor(point)).gradient)

        return gradient

    @property
    def initial_point(self) -> Array:
        """The values of the model's parameters now, to start an optimizer from."""
        values = {
            declared.name: _array(declared.tensor)
            for declared in self._metric.parameters
        }
        return self.manifold.pack(values)

    def write_back(self, result: Any) -> None:
        """Write a result into the model's parameters.

        Nothing is written if an error is raised; no ``.grad`` changes.

        Args:
            result: what an optimizer returned, or a point.

        Raises:
            NonFiniteError: the point holds NaN or infinity.
            NotOnManifoldError: a part of it is off its manifold.
            LostManifoldError: a parameter of the model was replaced meanwhile.
        """
        self._metric.parameters.verify()
        point = self.manifold._tensor(getattr(result, "point", result))
        if not bool(torch.isfinite(point).all()):
            raise NonFiniteError("the point holds NaN or infinity; nothing was written")
        values = self.manifold.product.unpack(point)
        for declared in self._metric.parameters:
            value = values[declared.name].to(declared.tensor)
            reason = off_manifold(declared.manifold, value, value.dtype)
            if reason is not None:
                raise NotOnManifoldError(
                    f"the part of the point for '{declared.name}' is off "
                    f"{declared.manifold.name}: {reason}. Nothing was written; use a "
                    "retraction that stays on it, or smaller steps"
                )
        with torch.no_grad():
            for declared in self._metric.parameters:
                declared.tensor.copy_(values[declared.name])


def problem(
    metric: LayerwiseMetric,
    loss: Loss,
    *inputs: Any,
    geometry: Geometry = "layer",
    weight_decay: float = 0.0,
    preconditioner: Geometry | None = None,
    retraction: Retraction | None = None,
) -> ModelProblem:
    """Return the training of a model as a problem for pymanopt's optimizers.

    The cost is ``loss(model(*inputs)) + weight_decay / 2 * |parameters|^2``, full
    batch. It is evaluated on a copy of the model: parameters and ``.grad`` of the
    model stay as they are until :meth:`ModelProblem.write_back`.

    The Hessian is that of the connection of the base manifolds, represented in the
    metric of the problem: ``g(hess u, v) = Hess_0 f(u, v)``. It is the exact model of
    second order along the base manifolds' geodesics; where the gradient vanishes it
    agrees with the Hessian of every metric. The geodesics of a layer metric with a
    factor have no closed form, so NelderMead and ParticleSwarm need
    ``geometry="base"``.

    Args:
        metric: the model's geometry with the masses of this moment; its model is the
            one that is trained.
        loss: from the model's outputs to a scalar tensor; it holds the targets.
        *inputs: arguments of the model.
        geometry: ``"layer"``: the layer metric, pulled back at every iterate and held
            during line searches; ``"base"``: the manifolds' own metrics, with mass 1.
        weight_decay: factor of half the sum of squares of all parameters (a constant
            on spheres and Stiefel manifolds).
        preconditioner: turns gradients of the geometry into those of this metric, for
            TrustRegions and ConjugateGradient.
        retraction: how tangent vectors become points; Euclidean parameters add them.

    Returns:
        The problem; start an optimizer from its ``initial_point``.

    Raises:
        ProblemError: another kind of metric, an unknown geometry or preconditioner, a
            negative weight decay, or a cost that differs between two calls (dropout).
        NonFiniteError: the cost at the model's parameters is not finite.

    Cost: a forward pass for a cost, one ``metric.backward`` for an iterate, a double
    backward pass and a solve for a product with the Hessian.

    >>> import riemannian_modules as rm
    >>> from pymanopt.optimizers import TrustRegions
    >>> _ = torch.manual_seed(0)
    >>> sphere = rm.manifolds.Sphere()
    >>> model = rm.nn.Linear(3, 1, manifold=sphere, bias=False, dtype=torch.float64)
    >>> metric = rm.LayerwiseMetric(model, output=rm.output.Euclidean(), mass=0.1)
    >>> x = torch.diag(torch.tensor([1.0, 2.0, 3.0])).double()
    >>> task = problem(metric, lambda y: y.square().sum(), x)
    >>> optimizer = TrustRegions(verbosity=0)
    >>> result = optimizer.run(task, initial_point=task.initial_point)
    >>> task.write_back(result)
    >>> model(x).square().sum().round(decimals=6).item()
    1.0
    """
    _require(
        isinstance(metric, LayerwiseMetric),
        f"{type(metric).__name__} is not the metric of a model's forward pass; build a "
        "LayerwiseMetric",
    )
    _require(geometry in _NAMES, f"geometry={geometry!r}; choose 'layer' or 'base'")
    _require(
        preconditioner is None or preconditioner in _NAMES,
        f"preconditioner={preconditioner!r}; choose None, 'layer' or 'base'",
    )
    _require(
        math.isfinite(weight_decay) and weight_decay >= 0.0,
        f"weight_decay={weight_decay}; it must not be negative",
    )
    metric.parameters.verify()
    twin = copy.deepcopy(metric.model)
    twin.zero_grad(set_to_none=True)
    own = metric.of(twin)
    device = next(iter(own.parameters)).tensor.device
    product = Product(
        {
            declared.name: (
                in_float64(declared.manifold, device),
                declared.tensor.shape,
            )
            for declared in own.parameters
        }
    )
    start = product.pack(
        {d.name: d.tensor.detach().to(device, torch.float64) for d in own.parameters}
    )
    cost = ModelCost(twin, product, loss, inputs, weight_decay)
    _require_usable(cost, start)
    pulled = PulledMetric(own, product, cost, inputs, weight_decay)
    manifold = ModelManifold(
        product,
        pulled if geometry == "layer" else None,
        start,
        Default() if retraction is None else retraction,
    )
    return ModelProblem(metric, cost, manifold, pulled, preconditioner)


def _require(satisfied: bool, message: str) -> None:
    if not satisfied:
        raise ProblemError(message)


def _require_usable(cost: ModelCost, start: Tensor) -> None:
    first, second = cost.value(start), cost.value(start)
    if not math.isfinite(first):
        raise NonFiniteError(
            "the cost at the model's parameters is not finite; load or draw others"
        )
    _require(
        abs(first - second) <= 1e-6 * max(1.0, abs(first)),
        f"the cost differs between two calls at one point ({first:.8g} and "
        f"{second:.8g}), as with dropout; call model.eval() first, pymanopt's "
        "optimizers compare costs",
    )
