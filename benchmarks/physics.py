"""Physics-informed networks: the heat equation and Poisson's."""

import math
from abc import abstractmethod
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

import riemannian_modules as rm
from benchmarks.problem import (
    Batch,
    Blocks,
    Geometry,
    Problem,
    Target,
    default_type,
    example,
)
from riemannian_modules.functional import DifferentialOperator, Jet


class PhysicsInformed(Problem):
    """A mean square of residuals of an equation and of what is known on an edge.

    A tanh network 2-32-32-1 in float64; the operators are functions of one point.
    """

    kind = "functions"
    full_batch = True
    measure = "error"
    masses = (1e-6, 1e-4, 1e-2)
    dense = 16
    growth = 1 / 12
    operators: Mapping[str, DifferentialOperator]
    points: Mapping[str, tuple[Tensor, ...]]
    test: Tensor

    @abstractmethod
    def truth(self, z: Tensor) -> Tensor:
        """Return the solution at points ``(n, 2)``."""

    @property
    def count(self) -> int:
        return sum(len(tensors[0]) for tensors in self.points.values())

    @property
    def rows(self) -> int:
        return self.count

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        with default_type(torch.float64):
            return nn.Sequential(
                nn.Linear(2, 32),
                nn.Tanh(),
                nn.Linear(32, 32),
                nn.Tanh(),
                nn.Linear(32, 1),
            )

    def batches(self, seed: int) -> Iterator[Batch]:
        while True:
            yield self.points

    @property
    def weights(self) -> Mapping[str, float]:
        """The weight of the mean square on each set of points; here: of one mean."""
        return {name: len(t[0]) / self.count for name, t in self.points.items()}

    def mean_square(self, values: Mapping[str, Tensor]) -> Tensor:
        weights = self.weights
        means = [weights[name] * each.square().mean() for name, each in values.items()]
        return torch.stack(means).sum()

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return self.mean_square(
            {
                name: operator.residuals(model, *batch[name])
                for name, operator in self.operators.items()
            }
        )

    def geometry(
        self,
        model: nn.Module,
        *,
        blocks: Blocks,
        mass: float,
        probes: int | None = None,
    ) -> Geometry:
        # The Hessian of the weighted means of the squares.
        outputs: dict[str, rm.output.OutputMetric] = {
            name: rm.output.Euclidean(2.0 * weight)
            for name, weight in self.weights.items()
        }
        if probes is not None:
            outputs = {k: rm.output.Sampled(v, probes) for k, v in outputs.items()}
        metric = rm.functional.FunctionalMetric(
            model, dict(self.operators), outputs, mass=mass, blocks=blocks
        )

        def backward(batch: Batch) -> Tensor:
            values = metric(batch)
            loss = self.mean_square(values)
            metric.backward(loss, values)
            return loss

        return Geometry(metric, backward, lambda batch: self.mean_square(metric(batch)))

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        u = self.truth(self.test)
        loss = self.loss(model, self.points)
        error = (model(self.test)[:, 0] - u).norm() / u.norm()
        return {"loss": float(loss), "error": float(error)}


class Heat(PhysicsInformed):
    """The heat equation of examples/heat_equation.py."""

    name = "heat"
    title = "Heat equation, physics-informed network 2-32-32-1, float64"
    seconds = 8.0
    targets = (Target("error", 1e-2), Target("error", 5e-5))

    def __init__(self) -> None:
        self.module = example("heat_equation")
        with default_type(torch.float64):
            own = self.module.Problem()
        self.operators, self.points = own.operators, own.points
        self.test = own.test

    def truth(self, z: Tensor) -> Tensor:
        solution: Tensor = self.module.exact(z)
        return solution


class Poisson(PhysicsInformed):
    """``-u_xx - u_yy = 2 pi^2 u`` with ``u = sin(pi x) sin(pi y)``, zero on the edge.

    900 points inside, midpoints of a 30 x 30 grid of cells, and 30 on each edge, whose
    mean square counts a hundred times, as in examples/poisson.py.
    """

    name = "poisson"
    title = "Poisson equation, physics-informed network 2-32-32-1, float64"
    seconds = 10.0
    targets = (Target("error", 1e-3), Target("error", 1e-6))

    @property
    def weights(self) -> Mapping[str, float]:
        return {"equation": 1.0, "boundary": 100.0}

    def __init__(self) -> None:
        side = (torch.arange(30, dtype=torch.float64) + 0.5) / 30.0
        zero = torch.zeros_like(side)
        pairs = [(side, zero), (side, zero + 1.0), (zero, side), (zero + 1.0, side)]
        edge = torch.cat([torch.stack(pair, 1) for pair in pairs])
        inside = torch.cartesian_prod(side, side)
        self.operators = {
            "equation": DifferentialOperator(laplace),
            "boundary": DifferentialOperator(known),
        }
        self.points = {
            "equation": (inside, 2.0 * math.pi**2 * self.truth(inside)[:, None]),
            "boundary": (edge, torch.zeros(len(edge), 1, dtype=torch.float64)),
        }
        line = torch.linspace(0.0, 1.0, 61, dtype=torch.float64)
        self.test = torch.cartesian_prod(line, line)

    def truth(self, z: Tensor) -> Tensor:
        return (math.pi * z).sin().prod(1)


def laplace(u: Jet, z: Tensor, source: Tensor) -> Tensor:
    """Return the residual of Poisson's equation at one point."""
    return u.laplacian() + source


def known(u: Jet, z: Tensor, value: Tensor) -> Tensor:
    """Return what the network misses of a known value."""
    return u.value - value
