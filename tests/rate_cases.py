"""Models and dense references for rates: everything by finite differences of values.

Nothing here is shared with the library's derivatives: the metric is written out from
Jacobians, ``OutputMetric.factor`` and ``Manifold.inner``, and differentiated by central
differences of order 4.
"""

from collections.abc import Callable

import geoopt
import torch
from cases import OUTPUTS, chain, inputs
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.contraction.geometry import Geometry
from riemannian_modules.contraction.replica import Replica
from riemannian_modules.heads import pair
from riemannian_modules.testing.reference import dense_natural_gradient

Function = Callable[[Tensor], Tensor]


def problem(
    base: str, output: str, blocks: str, n: int = 4, mass: float = 0.3
) -> tuple[rm.LayerwiseMetric, Callable[[Tensor], Tensor], Tensor]:
    """Return the metric of a chain, a loss that suits its outputs, and inputs."""
    model = chain(base, output)
    x = inputs(model, n)
    with torch.no_grad():
        loss = OUTPUTS[output].loss_for(model(x))
    metric = rm.LayerwiseMetric(
        model, OUTPUTS[output].metric(), mass=mass, blocks=blocks
    )
    return metric, loss, x


def differences(function: Function, v: Tensor, step: float = 2e-4) -> Tensor:
    """Return the derivative at 0 along v by central differences, error O(step^4)."""
    near = function(step * v) - function(-step * v)
    far = function(2 * step * v) - function(-2 * step * v)
    return (8.0 * near - far) / (12.0 * step)


def written_metric(geometry: Geometry, replica: Replica) -> Function:
    """Return ``u -> G(u)``, a matrix, without any product of the library."""

    def base(u: Tensor) -> Tensor:
        blocks = []
        for name, at in geometry.chart.slices.items():
            space = geometry.chart.spaces[name]

            def move(w: Tensor, name: str = name) -> Tensor:
                return geometry.chart.move(name, w)

            point = move(u[at])
            frame = torch.func.jacrev(move)(u[at]).movedim(-1, 0)
            if isinstance(space.manifold, rm.manifolds.Grassmann):
                # Without what only changes the basis of the subspace.
                frame = torch.stack([space.manifold.proju(point, a) for a in frame])
            rows = [
                torch.stack(
                    [
                        space.manifold.inner(
                            point, space.mass.multiply(a), b, keepdim=True
                        ).sum()
                        for b in frame
                    ]
                )
                for a in frame
            ]
            blocks.append(torch.stack(rows))
        return torch.block_diag(*blocks)

    def metric(u: Tensor) -> Tensor:
        G = base(u)
        jacobians = torch.func.jacrev(geometry.outputs)(u)
        heads = pair(replica.metric.output, replica.returned)
        found = zip(geometry.outputs(u), jacobians, heads, strict=True)
        for z, J, (_, output) in found:
            if output is None:
                continue
            mean = replica.metric.reduction == "mean"
            weight = 1.0 / output.terms(z) if mean else 1.0
            L = output.factor(z).flatten(2)
            K = torch.einsum("nro,nop->nrp", L, J.reshape(len(z), -1, len(u)))
            for mask in geometry.masks.values():
                own = (K * mask).flatten(0, 1)
                G = G + weight * own.mT @ own
        return G

    return metric


def half_lie_derivative(
    geometry: Geometry, replica: Replica, vectors: Tensor
) -> tuple[Tensor, Tensor]:
    """Return ``1/2 L_X G`` between the rows of ``vectors``, by differences, and G."""
    metric = written_metric(geometry, replica)
    slope = torch.func.grad(geometry.loss)

    def velocity(u: Tensor) -> Tensor:
        return torch.linalg.solve(metric(u), slope(u))

    u = geometry.origin
    G, X = metric(u), velocity(u)
    along = differences(metric, X)
    turned = vectors @ G @ torch.stack([differences(velocity, v) for v in vectors], 1)
    return 0.5 * (vectors @ along @ vectors.mT + turned + turned.mT), G


class One(nn.Module):
    """One parameter on a manifold; smooth outputs that its points decide."""

    def __init__(self, manifold: geoopt.Manifold, point: Tensor) -> None:
        super().__init__()
        self.w = geoopt.ManifoldParameter(
            point.as_subclass(torch.Tensor).clone(), manifold=manifold
        )
        self.spanned = isinstance(manifold, rm.manifolds.Grassmann)
        generator = torch.Generator().manual_seed(2)
        size = self.seen().numel()
        self.register_buffer("mix", torch.randn(4, size, generator=generator))

    def seen(self) -> Tensor:
        if not self.spanned:
            return self.w
        # The span of the basis is the point.
        wide = self.w.shape[0] < self.w.shape[1]
        return self.w.mT @ self.w if wide else self.w @ self.w.mT

    def forward(self, x: Tensor) -> Tensor:
        z = torch.tanh(0.3 * self.mix @ self.seen().reshape(-1))
        return x * z.unsqueeze(0)


def flow(
    model: nn.Module,
    metric: rm.LayerwiseMetric,
    x: Tensor,
    loss: Function,
    start: dict[str, Tensor],
    time: float,
    steps: int,
) -> dict[str, Tensor]:
    """Follow ``w' = -X(w)`` by the Runge-Kutta method of order 4.

    X is the dense reference's, at the projection of the ambient point.
    """
    declared = {d.name: d for d in metric.parameters}
    masses = {name: d.mass for name, d in declared.items()}

    def projected(w: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: declared[name].manifold.projx(value) for name, value in w.items()}

    def field(w: dict[str, Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            for name, value in projected(w).items():
                declared[name].tensor.copy_(value)
        found = dense_natural_gradient(
            model,
            metric.output,
            x,
            loss,
            mass=masses,
            blocks=metric.grouping,
        )
        return {name: -value for name, value in found.items()}

    def ahead(w, k, h: float) -> dict[str, Tensor]:
        return {name: w[name] + h * k[name] for name in w}

    w, h = start, time / steps
    for _ in range(steps):
        a = field(w)
        b = field(ahead(w, a, h / 2))
        c = field(ahead(w, b, h / 2))
        d = field(ahead(w, c, h))
        w = {n: w[n] + h / 6 * (a[n] + 2 * b[n] + 2 * c[n] + d[n]) for n in w}
    return projected(w)
