"""The networks and the training steps whose cost is compared."""

from collections.abc import Callable, Sequence
from itertools import pairwise
from statistics import median
from time import perf_counter

import torch
import torch.nn.functional as F
from torch import nn

import riemannian_modules as rm
from benchmarks.by_hand import sampled_step_by_hand

THREADS = 2
BATCH = 128
SIZES = {"small": (64, 256, 256, 10), "large": (784, 1024, 1024, 10)}
METHODS = (
    "adam",
    "sampled by hand",
    "sampled",
    "sampled, static graph",
    "sampled, static graph, no .grad",
    "sampled, gradient kept",
    "sampled, gradient kept, no .grad",
    "sampled, gradient alone",
    "sampled, gradient alone, no .grad",
    "sampled, captured",
    "sampled, captured, no .grad",
    "sampled, gradient kept, captured",
    "sampled, gradient alone, captured",
    "sampled, gradient alone, captured, no .grad",
    "exact model",
    "exact layer",
    "kfac, rows held",
    "kfac, rows renewed",
)

Step = Callable[[], None]


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in pairwise(sizes[:-1]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(*sizes[-2:]))


def batch(
    shape: Sequence[int], classes: int, examples: int, device: str
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(examples, *shape, generator=generator)
    y = torch.randint(classes, (examples,), generator=generator)
    return x.to(device), y.to(device)


class Convnet(nn.Sequential):
    """Two convolutions and two linear layers on 28 x 28 images."""

    def __init__(self) -> None:
        super().__init__(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(32 * 7 * 7, 64),
            nn.ReLU(),
            nn.Linear(64, 10),
        )


class Transformer(nn.Module):
    """One block on 32 tokens, a class for each sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.block = nn.TransformerEncoderLayer(
            64, 4, 256, dropout=0.0, batch_first=True
        )
        self.head = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores: torch.Tensor = self.head(self.block(x).mean(1))
        return scores


INPUTS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "convnet": (Convnet, (1, 28, 28)),
    "transformer": (Transformer, (32, 64)),
}


def network_step(method: str, network: str, device: str = "cpu") -> Step:
    """Return one step of a method on the convnet or the transformer block."""
    make, shape = INPUTS[network]
    torch.manual_seed(0)
    return step_of(method, make().to(device), *batch(shape, 10, BATCH, device))


def training_step(
    method: str, sizes: Sequence[int], examples: int = BATCH, device: str = "cpu"
) -> Step:
    """Return one step of a method on a chain of linear layers, float32."""
    torch.manual_seed(0)
    model = mlp(sizes).to(device)
    x, y = batch(sizes[:1], sizes[-1], examples, device)
    if method == "sampled by hand":
        return sampled_step_by_hand(sizes, x, y, mass=1e-2, lr=1e-6)
    return step_of(method, model, x, y)


def step_of(
    method: str, model: nn.Module, x: torch.Tensor, y: torch.Tensor, probes: int = 1
) -> Step:
    """Return one step of a method: forward, backward and update.

    A method is "adam", or "sampled" (``probes`` random rows and no other, unless the
    gradient is kept, as is the default of the library, or has the only row) or "exact"
    with the blocks behind it: "layer" if nothing is said, or "model"; "no .grad" leaves
    that empty. "kfac" has the gradient's row and one random row; most of its steps hold
    them, or all renew them. The step length is tiny, so that the thousandth step meets
    the same problem as the first.
    """
    if method == "adam":
        adam = torch.optim.Adam(model.parameters(), lr=1e-6)

        def plain() -> None:
            adam.zero_grad()
            F.cross_entropy(model(x), y).backward()
            adam.step()

        return plain

    output: rm.output.OutputMetric = rm.output.Categorical()
    averages = method.startswith("kfac")
    if averages or method.startswith("sampled"):
        if "gradient alone" in method:
            probes = 0
        kept = averages or "gradient" in method
        output = rm.output.Sampled(output, probes=probes, gradient_rows=kept)
    metric = rm.LayerwiseMetric(
        model,
        output=output,
        mass=1e-2,
        blocks="model" if method.startswith("exact model") else "layer",
        static_graph=averages or "static graph" in method or "captured" in method,
        fill_grad=not method.endswith("no .grad"),
        refresh=1000 if method.endswith("held") else 1,
    )
    optimizer: torch.optim.Optimizer = rm.optim.RiemannianSGD(metric, lr=1e-6)
    if averages:
        optimizer = rm.optim.KFAC(metric, lr=1e-6)

    def layered() -> None:
        with metric.record():
            logits = model(x)
        metric.backward(F.cross_entropy(logits, y), logits)
        optimizer.step()

    if averages:
        # At first rows are renewed often.
        for _ in range(8):
            layered()
    if "captured" not in method:
        return layered
    captured = rm.optim.CapturedStep(optimizer, layered)
    for _ in range(8):
        captured()
    return captured


def interleaved(
    steps: dict[str, Step], rounds: int, together: int = 1
) -> dict[str, float]:
    """Return the median seconds of every step, some of each a round.

    What else the machine does then hits all of them alike. A single step finds the
    processor's caches as the others have left them; of many together most find them as
    in a training loop, which small networks gain from.
    """
    for step in steps.values():
        step(), step(), finish()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            start = perf_counter()
            for _ in range(together):
                step()
            finish()
            seconds[name].append((perf_counter() - start) / together)
    return {name: median(values) for name, values in seconds.items()}


def finish() -> None:
    """Wait for the device, if there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def slope(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope of log(values) against log(sizes)."""
    x = torch.tensor(sizes, dtype=torch.float64).log()
    y = torch.tensor(values, dtype=torch.float64).log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())
