"""Problems on manifolds: a matrix with orthonormal factors, a tree in a disk."""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import riemannian_modules as rm
from benchmarks.problem import (
    Batch,
    Blocks,
    Geometry,
    NetworkProblem,
    Problem,
    Target,
    example,
)


class Scale(nn.Module):
    """Multiplies every feature by a parameter."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.values = nn.Parameter(torch.ones(features, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.values


class Factorisation(NetworkProblem):
    """``U diag(s) V^T`` is fitted to a matrix of rank 6 with singular values to 1e-4.

    U (40 x 6) and V (30 x 6) have orthonormal columns. The examples are the rows. The
    error is that of the whole matrix relative to its norm, so below 1e-4 it needs the
    last of the singular values.
    """

    kind = "manifold"
    name = "factorisation"
    title = "Matrix 40 x 30 of rank 6 and condition 1e4, Stiefel factors, float64"
    measure = "error"
    seconds = 4.0
    masses = (1e-6, 1e-4, 1e-2)
    targets = (Target("error", 1e-2), Target("error", 1e-4), Target("error", 1e-8))
    height, outputs, rank = 40, 30, 6

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(7)

        def frame(size: int) -> Tensor:
            shape = (size, self.rank)
            noise = torch.randn(shape, generator=generator, dtype=torch.float64)
            return torch.linalg.qr(noise).Q

        s = torch.logspace(0.0, -4.0, self.rank, dtype=torch.float64)
        matrix = frame(self.height) * s @ frame(self.outputs).mT
        super().__init__(torch.eye(self.height, dtype=torch.float64), matrix, None)

    def model(self, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        stiefel, kind = rm.manifolds.Stiefel(), torch.float64
        return rm.nn.Sequential(
            rm.nn.Linear(self.height, self.rank, False, manifold=stiefel, dtype=kind),
            Scale(self.rank),
            rm.nn.Linear(self.rank, self.outputs, False, manifold=stiefel, dtype=kind),
        )

    def criterion(self, outputs: Tensor, y: Tensor) -> Tensor:
        return (outputs - y).square().sum(-1).mean()

    def output(self) -> rm.output.OutputMetric:
        return rm.output.Euclidean(2.0)

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        outputs = model(self.x)
        return {
            "loss": float(self.criterion(outputs, self.y)),
            "error": float((outputs - self.y).norm() / self.y.norm()),
        }


class Embedding(Problem):
    """Points of the Poincare disk for the synsets below WordNet's "mammal".

    Where WordNet is not installed, for a tree of 585 points instead, which the title
    says. In the first tenth of the time all methods take a tenth of their step length.
    """

    kind = "manifold"
    full_batch = False
    name = "poincare"
    measure = "map"
    seconds = 8.0
    targets = (Target("map", 0.6),)
    dense = 0
    growth = 1 / 4
    masses = (0.003, 0.01, 0.03)
    batch, negatives = 128, 50
    burn_in = 0.1

    def __init__(self, folder: Path | None = None) -> None:
        self.module, wordnet = example("wordnet_poincare"), example("wordnet")
        try:
            self.tree = wordnet.load(folder, "mammal")
            what = "WordNet's mammals"
        except wordnet.DataError:
            if folder is not None:
                raise
            self.tree = regular_tree(wordnet)
            what = "a tree with 8 branches and 3 levels"
        self.sampler = wordnet.Sampler
        self.reconstruction = wordnet.reconstruction
        self.title = f"Poincare embedding of {what}, dimension 2, batch {self.batch}"

    @property
    def rows(self) -> int:
        return self.batch * (self.negatives + 1)

    def model(self, seed: int) -> nn.Module:
        model: nn.Module = self.module.Embedding(len(self.tree.names), 2, seed)
        return model

    def batches(self, seed: int) -> Iterator[Batch]:
        sampler = self.sampler(self.tree, self.negatives, seed)
        while True:
            yield sampler.draw(self.batch)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        value: Tensor = self.module.cross_entropy(model(batch))
        return value

    def geometry(
        self,
        model: nn.Module,
        *,
        blocks: Blocks,
        mass: float,
        probes: int | None = None,
    ) -> Geometry:
        output: rm.output.OutputMetric = rm.output.Categorical()
        if probes is not None:
            output = rm.output.Sampled(output, probes=probes)
        metric = rm.LayerwiseMetric(
            model, output=output, mass=mass, blocks=blocks, static_graph=True
        )

        def backward(batch: Batch) -> Tensor:
            with metric.record():
                logits = model(batch)
            loss: Tensor = self.module.cross_entropy(logits)
            metric.backward(loss, logits)
            return loss

        return Geometry(metric, backward, lambda batch: self.loss(model, batch))

    def schedule(self, gone: float) -> float:
        return self.burn_in if gone < self.burn_in else 1.0

    @torch.no_grad()
    def look(self, model: nn.Module) -> dict[str, float]:
        points = model.get_parameter("points.weight").detach().as_subclass(Tensor)
        table = self.module.distance(points[:, None], points)
        rank, precision = self.reconstruction(table, self.tree.related)
        sampler = self.sampler(self.tree, self.negatives, 0)
        loss = F.cross_entropy(
            model(batch := sampler.draw(1024)),
            torch.zeros(len(batch), dtype=torch.long),
        )
        return {"loss": float(loss), "map": precision, "rank": rank}


def regular_tree(wordnet, branches: int = 8, levels: int = 3):
    """Return a tree in which every point above the last level has the same number."""
    parents, level, names = [-1], [0], ["0"]
    for _ in range(levels):
        below = []
        for parent in level:
            for _ in range(branches):
                below.append(len(parents))
                names.append(str(len(parents)))
                parents.append(parent)
        level = below
    related = torch.zeros(len(parents), len(parents), dtype=torch.bool)
    for point in range(1, len(parents)):
        up = parents[point]
        while up >= 0:
            related[point, up] = True
            up = parents[up]
    edges = torch.tensor([(i, parents[i]) for i in range(1, len(parents))])
    return wordnet.Tree(names, edges, related)
