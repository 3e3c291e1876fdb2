"""How the cost of a step grows with the parameters, with the batch, with the rank.

    python -m benchmarks.bench_scaling                       prints three tables
    python -m benchmarks.bench_scaling --vary batch rank     some of them

*width*: more parameters at a fixed rank, next to a dense solve that forms K and the
p x p matrix of every layer and factorises it. *batch*: more examples, so that the rank
of an exact step grows with them. *rank*: more random rows for the same examples. The
slope is that of a straight line through the logarithms.
"""

import argparse
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
    step_of,
    training_step,
)

FEATURES, CLASSES, EXAMPLES = 64, 10, 16
# Sizes of the network, examples, and random rows for each, of the other two tables.
FIXED = (FEATURES, 512, 512, CLASSES)
BATCHES = (16, 32, 64, 128, 256)
PROBES, PROBED = (1, 2, 4, 8, 16), 64
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


def growing_batch(rounds: int) -> dict[str, tuple[list[int], list[float]]]:
    """Return the examples and the seconds of a step of each method."""
    return {
        method: (
            list(BATCHES),
            list(
                interleaved(
                    {str(n): training_step(method, FIXED, n) for n in BATCHES}, rounds
                ).values()
            ),
        )
        for method in ("adam", "sampled", "exact model", "exact layer")
    }


def growing_rank(rounds: int) -> dict[str, tuple[list[int], list[float]]]:
    """Return the ranks and the seconds of a sampled step, for both kinds of blocks."""
    found = {}
    for blocks in ("model", "layer"):
        steps = {}
        for probes in PROBES:
            torch.manual_seed(0)
            x, y = batch(FIXED[:1], CLASSES, PROBED, "cpu")
            method = f"sampled {blocks}"
            steps[str(probes)] = step_of(method, mlp(FIXED), x, y, probes)
        ranks = [PROBED * probes for probes in PROBES]
        found[f"sampled, {blocks}"] = ranks, list(interleaved(steps, rounds).values())
    return found


def table(size: str, results: dict[str, tuple[list[int], list[float]]]) -> str:
    """Return sizes, milliseconds and slopes as a Markdown table."""
    lines = [f"| step | {size} | ms | slope |", "|---|---|---|---|"]
    for name, (sizes, seconds) in results.items():
        counts = ", ".join(f"{each:,}" for each in sizes)
        times = ", ".join(f"{1e3 * value:.1f}" for value in seconds)
        # The last two sizes: there the fixed costs of small problems are gone.
        tail = slope(sizes[-2:], seconds[-2:])
        lines.append(
            f"| {name} | {counts} | {times} | {slope(sizes, seconds):.2f} "
            f"(last doubling {tail:.2f}) |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    known = ("width", "batch", "rank")
    parser.add_argument("--vary", nargs="+", choices=known, default=known)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    torch.set_num_threads(THREADS)
    chain = "-".join(map(str, FIXED))
    if "width" in options.vary:
        rank = EXAMPLES * (CLASSES - 1)
        print(f"{FEATURES}-w-w-{CLASSES}, rank {rank}, {THREADS} threads\n")
        print(table("parameters", measured(options.rounds)))
    if "batch" in options.vary:
        print(f"\n{chain}, rank 9 for each example if exact, {THREADS} threads\n")
        print(table("examples", growing_batch(options.rounds)))
    if "rank" in options.vary:
        print(f"\n{chain}, {PROBED} examples, {THREADS} threads\n")
        print(table("rank", growing_rank(options.rounds)))


if __name__ == "__main__":
    main()
