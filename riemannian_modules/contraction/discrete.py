r"""The contraction factor of an optimizer's step, instead of the rate of a flow.

    Phi(w) = R_w(-eta X(w)),   q(w) = sigma_max(DPhi(w))

The norms are those of the metric at the two points; nothing has to be transported.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from riemannian_modules.contraction import eigen
from riemannian_modules.contraction.agreement import (
    require_agreement,
    require_scalar,
)
from riemannian_modules.contraction.autodiff import exact_derivatives, jvp, vjp
from riemannian_modules.contraction.derivatives import curvature
from riemannian_modules.contraction.geometry import Geometry, Loss
from riemannian_modules.contraction.hessian import lower, raise_
from riemannian_modules.contraction.rates import DENSE_LIMIT
from riemannian_modules.contraction.replica import Replica
from riemannian_modules.contraction.result import Gain, Side, Verdict
from riemannian_modules.errors import ContractionError
from riemannian_modules.layerwise import LayerwiseMetric
from riemannian_modules.retractions import Default, Retraction

__all__ = ["discrete_factor"]


@exact_derivatives
def discrete_factor(
    metric: LayerwiseMetric,
    loss: Loss,
    *inputs: Any,
    lr: float,
    retraction: Retraction | None = None,
    method: Literal["dense", "lanczos"] | None = None,
    dense_limit: int = DENSE_LIMIT,
    products: int = 30,
    seed: int = 0,
) -> Gain:
    """Return the factor by which one step stretches small distances, at most.

    The step is that of :class:`riemannian_modules.optim.RiemannianSGD` without
    momentum and weight decay. Implements :eq:`discrete-factor`.

    Args:
        metric: the model's metric; it is left alone.
        loss: function of what the model returns, a scalar.
        *inputs: what the model is called with.
        lr: step length.
        retraction: how a tangent step becomes a point; None: as the optimizer's.
        method: ``"dense"`` (all singular values, exact) or ``"lanczos"`` (a Ritz
            value, which is a lower bound of the factor); None: dense up to
            ``dense_limit`` dimensions.
        dense_limit: largest number of dimensions for dense matrices.
        products: how many products with the step and its transpose are allowed.
        seed: of its first vector.

    Returns:
        The factor at this point. Below one the step brings nearby points together, in
        the metrics at the two points; "certified" if it is exact, "refuted" if it is
        above one, "evidence" for a lower bound below one.

    Raises:
        ContractionError: a step length that is negative or not finite, an unknown
            method, or a loss that is no scalar.

    Cost: a product with the step's derivative takes a Hessian-vector product and a
    derivative of the metric; as many as dimensions, or one with its transpose for
    each product of Lanczos' method.

    >>> import riemannian_modules as rm
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> metric = rm.LayerwiseMetric(model, output=None, mass=1.0)
    >>> def square(z):
    ...     return z.square().sum() / 2
    >>> round(discrete_factor(metric, square, torch.ones(1, 1), lr=0.4).value, 6)
    0.6
    """
    if not 0.0 <= lr < float("inf"):
        raise ContractionError(f"lr={lr} must be finite and not negative")
    if method not in (None, "dense", "lanczos"):
        raise ContractionError(f"method={method!r}; choose 'dense', 'lanczos' or None")
    replica = Replica(metric, loss, inputs)
    small = replica.dim <= dense_limit
    dense = method == "dense" or (method is None and small)
    step = _Step(
        replica,
        metric,
        lr,
        Default() if retraction is None else retraction,
        dense,
    )
    where = f"at this point, {replica.examples} examples, lr={lr:g}"
    if dense:
        value, noise = step.dense()
        return Gain(
            value + noise,
            where=where,
            side=Side.EXACT,
            verdict=Verdict.REFUTED if value > 1.0 + noise else Verdict.CERTIFIED,
            source=f"all singular values of the step, rounding within {noise:.1e}",
        )
    value = step.ritz(products, seed)
    return Gain(
        value,
        where=where,
        side=Side.LOWER,
        verdict=Verdict.REFUTED if value > 1.0 + 1e-9 else Verdict.EVIDENCE,
        source="Ritz value of the step's derivative",
    )


class _Step:
    """The derivative of a step between the coordinates at its two ends."""

    def __init__(
        self,
        replica: Replica,
        metric: LayerwiseMetric,
        lr: float,
        retraction: Retraction,
        basis: bool,
    ) -> None:
        self.lr, self.retraction = lr, retraction
        self.here = replica
        self.geometry = replica.geometry(basis=basis)
        require_scalar(self.geometry.loss(self.geometry.origin))
        require_agreement(self.geometry, replica, "true")
        u = self.geometry.origin
        slope = torch.func.grad(self.geometry.loss)(u)
        self.X = self._raise(slope)
        landed = self._land(u, self.X)
        self.there = Replica(metric, replica.loss, replica.inputs, landed)
        self.target = self.there.geometry(basis=basis)

    def _raise(self, c: Tensor) -> Tensor:
        return raise_(self.geometry, self.here.blocks, c)

    def _land(self, u: Tensor, x: Tensor) -> dict[str, Tensor]:
        """Return where the step from ``u`` with the gradient ``x`` ends."""
        chart, found = self.geometry.chart, {}
        for name, at in chart.slices.items():
            manifold = chart.spaces[name].manifold
            if chart.is_flat(name):
                found[name] = chart.move(name, u[at] - self.lr * x[at])
                continue

            def move(w: Tensor, name: str = name) -> Tensor:
                return chart.move(name, w)

            point, velocity = jvp(move, u[at], x[at])
            found[name] = self.retraction(manifold, point, -self.lr * velocity)
        return found

    def _land_pair(self, pair: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
        return self._land(*pair)

    def turn(self, v: Tensor) -> Tensor:
        """Return ``D(df - G X) v`` with X held, what the solve for X sees."""
        u, X = self.geometry.origin, self.X
        bent = jvp(lambda w: self.geometry.product(w, X), u, v)[1]
        return curvature(self.geometry, v) - bent

    def turn_adjoint(self, c: Tensor) -> Tensor:
        """Return the transpose of :meth:`turn` applied to a tangent vector."""
        u, X = self.geometry.origin, self.X

        def paired(w: Tensor) -> Tensor:
            return _form(self.geometry, w, c, X)

        return curvature(self.geometry, c) - torch.func.grad(paired)(u)

    def product(self, v: Tensor) -> Tensor:
        """Return ``DPhi v`` in the coordinates at the end of the step."""
        u, dx = self.geometry.origin, self._raise(self.turn(v))
        moved = jvp(self._land_pair, (u, self.X), (v, dx))[1]
        return self.target.chart.coordinates(moved)

    def adjoint(self, c: Tensor) -> Tensor:
        """Return the transpose of :meth:`product` applied to a covector."""
        u = self.geometry.origin
        covectors = self.target.chart.covectors(c)
        direct, by_gradient = vjp(self._land_pair, (u, self.X))[1](covectors)
        return direct + self.turn_adjoint(self._raise(by_gradient))

    def dense(self) -> tuple[float, float]:
        """Return the largest singular value and a bound on rounding."""
        eye = torch.eye(len(self.X), dtype=self.X.dtype, device=self.X.device)
        end = torch.eye(self.target.chart.size, dtype=eye.dtype, device=eye.device)
        D = torch.stack([self.product(e) for e in eye]).mT
        G = torch.stack([lower(self.geometry, self.here.blocks, e) for e in eye])
        G1 = torch.stack([lower(self.target, self.there.blocks, e) for e in end])
        G, G1 = 0.5 * (G + G.mT), 0.5 * (G1 + G1.mT)
        stretched = D.mT @ G1 @ D
        # The largest eigenvalue is the smallest one of the negative matrix.
        found = eigen.dense(-0.5 * (stretched + stretched.mT), G)
        square = max(-found.value, 0.0)
        value = square**0.5
        noise = (square + found.noise) ** 0.5 - value
        return value, noise

    def ritz(self, products: int, seed: int) -> float:
        """Return a lower bound of the largest singular value by Lanczos' method."""
        chart = self.geometry.chart
        generator = torch.Generator().manual_seed(seed)
        v = torch.randn(chart.size, generator=generator, dtype=torch.float64)
        v = chart.coordinates(chart.embed(v.to(self.X)))

        def stretched(v: Tensor) -> Tensor:
            pressed = lower(self.target, self.there.blocks, self.product(v))
            return -self.adjoint(pressed)

        found = eigen.lanczos(
            stretched,
            lambda v: lower(self.geometry, self.here.blocks, v),
            self._raise,
            v / v.norm(),
            tolerance=1e-4,
            products=products,
            project=lambda v: chart.coordinates(chart.embed(v)),
        )
        return max(-found.value - found.noise, 0.0) ** 0.5


def _form(geometry: Geometry, u: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return geometry.base_form(u, a, b) + geometry.pullback_form(u, a, b)
