"""What rates add to a step, and what a rate costs, within one run.

python -m benchmarks.bench_rates             prints the table
python -m pytest benchmarks -o addopts=      checks the ratio against the bound
"""

import pytest
import torch
import torch.nn.functional as F

import riemannian_modules as rm
from benchmarks.models import BATCH, SIZES, THREADS, Step, batch, interleaved, mlp

# Of a step without rates, that the rates of all blocks may add while none is read.
BOUND = 1.03


def steps(network: str) -> dict[str, Step]:
    """Return one step without rates, with rates, and with rates that are read."""
    x, y = batch(SIZES[network][:1], SIZES[network][-1], BATCH, "cpu")
    made = {}
    for name in ("plain", "rates", "rates read"):
        torch.manual_seed(0)
        model = mlp(SIZES[network])
        metric = rm.LayerwiseMetric(model, output=rm.output.Categorical(), mass=1e-2)
        optimizer = rm.optim.RiemannianSGD(metric, lr=1e-6)
        made[name] = _step(name, metric, optimizer, x, y)
    return made


def _step(
    name: str,
    metric: rm.LayerwiseMetric,
    optimizer: rm.optim.RiemannianSGD,
    x: torch.Tensor,
    y: torch.Tensor,
) -> Step:
    read = name == "rates read"
    monitor = rm.contraction.Monitor(optimizer) if read else None

    def step() -> None:
        with metric.record():
            logits = metric.model(x)
        loss = F.cross_entropy(logits, y)
        metric.backward(loss, logits)
        optimizer.step()
        if name == "rates":
            optimizer.contraction_rates()
        if monitor is not None:
            monitor.record(loss)

    return step


def ratios(network: str, rounds: int) -> dict[str, float]:
    """Return the median seconds of each, as ratios to the step without rates."""
    seconds = interleaved(steps(network), rounds)
    return {name: value / seconds["plain"] for name, value in seconds.items()}


def rate_of_a_network(
    tolerance: float = 1e-2, products: int = 28
) -> rm.contraction.Rate:
    """Return the true rate of a network of 20,840 parameters in its joint metric."""
    torch.manual_seed(0)
    model = mlp((64, 128, 90, 10))
    metric = rm.LayerwiseMetric(
        model, output=rm.output.Categorical(), mass=0.1, blocks="model"
    )
    x, y = batch((64,), 10, 64, "cpu")
    return rm.contraction.rate(
        metric,
        lambda z: F.cross_entropy(z, y),
        x,
        tolerance=tolerance,
        products=products,
    )


@pytest.mark.parametrize("network", SIZES)
def test_rates_add_next_to_nothing(network: str, benchmark) -> None:
    found = ratios(network, 12 if network == "small" else 4)
    benchmark.extra_info.update(found)
    benchmark.pedantic(steps(network)["rates"], rounds=5, warmup_rounds=1)
    assert found["rates"] <= BOUND, found


def test_a_true_rate(benchmark) -> None:
    found = benchmark.pedantic(rate_of_a_network, rounds=2, warmup_rounds=1)
    exact = rate_of_a_network(tolerance=1e-5, products=150)
    benchmark.extra_info.update(found.cost)
    assert found.cost["gradients"] <= 100
    assert abs(found.value / exact.value - 1.0) <= 1e-2


def main() -> None:
    torch.set_num_threads(THREADS)
    print(f"batch {BATCH}, {THREADS} threads, ratios to a step without rates\n")
    for network in SIZES:
        found = ratios(network, 12 if network == "small" else 4)
        print(network, {name: round(value, 3) for name, value in found.items()})
    for products in (10, 20, 28, 150):
        found = rate_of_a_network(1e-5, products)
        print(f"rate {found.value:.5f} after {found.cost['gradients']} gradients")


if __name__ == "__main__":
    main()
