"""How the cost of a step grows with the number of parameters, at a fixed rank.

    python -m benchmarks.bench_scaling           prints the table

The dense solve forms K and the p x p matrix of every layer and factorises it.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from benchmarks.models import (
    THREADS,
    Step,
    batch,
    interleaved,
    mlp,
    slope,
    training_step,
)

FEATURES, CLASSES, EXAMPLES = 64, 10, 16
WIDTHS = (512, 1024, 2048, 4096)
DENSE_WIDTHS = (8, 16, 32, 64)
BOUND = 1.1


def sizes_of(width: int) -> tuple[int, ...]:
    return FEATURES, width, width, CLASSES


def parameters_of(width: int) -> int:
    return sum(p.numel() for p in mlp(sizes_of(width)).parameters())


def dense_step(sizes: Sequence[int], mass: float = 1e-2) -> Step:
    """Return a step that solves with ``mass + K^T K`` as a matrix, layer by layer."""
    torch.manual_seed(0)
    model, (x, y) = mlp(sizes), batch(sizes[:1], sizes[-1], EXAMPLES, "cpu")
    parameters = dict(model.named_parameters())

    def step() -> None:
        p = {name: value.detach() for name, value in parameters.items()}
        z, pull = torch.func.vjp(lambda w: torch.func.functional_call(model, w, x), p)
        share = z.softmax(-1)
        root = share.sqrt().diag_embed() - share.sqrt().unsqueeze(-1) * share.unsqueeze(
            1
        )
        basis = torch.zeros(*root.shape[:2], *z.shape)
        index = torch.arange(len(z))
        basis[index, :, index] = root
        (rows,) = torch.func.vmap(torch.func.vmap(pull))(basis)
        error = (share - F.one_hot(y, CLASSES)) / len(z)
        (gradient,) = pull(error)
        for layer in {name.rpartition(".")[0] for name in parameters}:
            names = [name for name in parameters if name.rpartition(".")[0] == layer]
            K = torch.cat([rows[n].flatten(0, 1).flatten(1) for n in names], 1)
            g = torch.cat([gradient[n].flatten() for n in names])
            G = (K.mT @ K / len(z)).double()
            G.diagonal().add_(mass)
            torch.cholesky_solve(g.double().unsqueeze(-1), torch.linalg.cholesky(G))

    return step


def measured(rounds: int) -> dict[str, tuple[list[int], list[float]]]:
    """Return the numbers of parameters and the seconds of the two steps."""
    own = {
        str(width): training_step("exact layer", sizes_of(width), EXAMPLES)
        for width in WIDTHS
    }
    dense = {str(width): dense_step(sizes_of(width)) for width in DENSE_WIDTHS}
    seconds = interleaved(own, rounds), interleaved(dense, max(3, rounds // 4))
    return {
        "this library": ([parameters_of(w) for w in WIDTHS], list(seconds[0].values())),
        "dense solve": (
            [parameters_of(w) for w in DENSE_WIDTHS],
            list(seconds[1].values()),
        ),
    }


def test_cost_grows_with_the_parameters(benchmark) -> None:
    results = measured(rounds=12)
    slopes = {name: slope(*values) for name, values in results.items()}
    benchmark.extra_info.update(slopes)
    step = training_step("exact layer", sizes_of(WIDTHS[0]), EXAMPLES)
    benchmark.pedantic(step, rounds=3, warmup_rounds=1)
    assert slopes["this library"] <= BOUND, slopes


def main() -> None:
    torch.set_num_threads(THREADS)
    rank = EXAMPLES * (CLASSES - 1)
    print(f"{FEATURES}-w-w-{CLASSES}, rank {rank}, {THREADS} threads\n")
    print("| step | parameters | ms | log-log slope |\n|---|---|---|---|")
    for name, (sizes, seconds) in measured(rounds=20).items():
        counts = ", ".join(f"{size:,}" for size in sizes)
        times = ", ".join(f"{1e3 * value:.1f}" for value in seconds)
        # The last two widths: there the fixed costs of small networks are gone.
        tail = slope(sizes[-2:], seconds[-2:])
        print(
            f"| {name} | {counts} | {times} | {slope(sizes, seconds):.2f} "
            f"(last doubling {tail:.2f}) |"
        )


if __name__ == "__main__":
    main()
