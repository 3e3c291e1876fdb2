"""Direct solves against conjugate gradients: iterations, error, processor time.

    python -m benchmarks.bench_solvers            prints the table

One thread and its own time, so that other processes do not count; the digits that come
with scikit-learn, MLP 64-256-256-10, batch 128, nine rows for each example.
"""

import copy
from collections.abc import Mapping
from statistics import median
from time import process_time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import riemannian_modules as rm
from benchmarks.models import BATCH, SIZES, mlp

MASSES = (1.0, 1e-1, 1e-2, 1e-3, 1e-4)
ROUNDS = 5


def digits() -> tuple[torch.Tensor, torch.Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    data = datasets.load_digits()
    return torch.tensor(data.data / 16.0, dtype=torch.float32), torch.tensor(
        data.target
    )


def trained(steps: int) -> nn.Module:
    torch.manual_seed(0)
    model, (x, y) = mlp(SIZES["small"]), digits()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(steps):
        chosen = torch.randint(1437, (BATCH,))
        optimizer.zero_grad()
        F.cross_entropy(model(x[chosen]), y[chosen]).backward()
        optimizer.step()
    return model


def pulled_back(
    model: nn.Module, dtype: torch.dtype, mass: float, blocks: str, solver: str
) -> rm.LayerwiseMetric:
    x, y = digits()
    metric = rm.LayerwiseMetric(
        copy.deepcopy(model).to(dtype),
        output=rm.output.Categorical(),
        mass=mass,
        blocks=blocks,
        solver=solver,
    )
    with metric.record():
        logits = metric.model(x[:BATCH].to(dtype))
    metric.backward(F.cross_entropy(logits, y[:BATCH]), logits)
    return metric


def norm(metric: rm.LayerwiseMetric, u: Mapping[str, torch.Tensor]) -> float:
    squares = [
        block.norm({part.name: u[part.name] for part in block.parts}).square()
        for block in metric.blocks.values()
    ]
    return float(sum(squares)) ** 0.5


def measured(
    model: nn.Module, mass: float, blocks: str, solver: str
) -> tuple[str, float, float]:
    """Return which ways ran, the error in the metric, and milliseconds."""
    wide = pulled_back(model, torch.float64, mass, blocks, "cholesky")
    exact = wide.natural_gradient()
    milliseconds = []
    for _ in range(ROUNDS):
        metric = pulled_back(model, torch.float32, mass, blocks, solver)
        start = process_time()
        solutions = metric.solve()
        milliseconds.append(1e3 * (process_time() - start))
    found = {n: x.double() for s in solutions.values() for n, x in s.vectors.items()}
    error = norm(wide, {n: found[n] - exact[n] for n in exact}) / norm(wide, exact)
    ran = [
        f"{s.branch} {s.iterations}" if s.iterations else s.branch
        for s in solutions.values()
    ]
    return ", ".join(ran), error, median(milliseconds)


@pytest.mark.parametrize("blocks", ["model", "layer"])
def test_the_chosen_solver_is_not_much_dearer(blocks: str) -> None:
    torch.set_num_threads(1)
    model = trained(20)
    for mass in (1e-2, 1e-4):
        _, error, chosen = measured(model, mass, blocks, "auto")
        direct = measured(model, mass, blocks, "cholesky")[2]
        assert error < 2e-5
        assert chosen < 2.0 * direct


def main() -> None:
    torch.set_num_threads(1)
    print("| steps of Adam | blocks | mass | `cholesky` ms | error ", end="")
    print("| `cg` ms | iterations | error | `auto` ms | ran |")
    print("|---" * 10 + "|")
    for steps in (0, 60):
        model = trained(steps)
        for blocks in ("model", "layer"):
            for mass in MASSES:
                cells = [str(steps), blocks, f"{mass:g}"]
                _, error, milliseconds = measured(model, mass, blocks, "cholesky")
                cells += [f"{milliseconds:.0f}", f"{error:.0e}"]
                ran, error, milliseconds = measured(model, mass, blocks, "cg")
                cells += [f"{milliseconds:.0f}", ran.replace("cg ", "")]
                cells += [f"{error:.0e}"]
                ran, _, milliseconds = measured(model, mass, blocks, "auto")
                cells += [f"{milliseconds:.0f}", ran]
                print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
