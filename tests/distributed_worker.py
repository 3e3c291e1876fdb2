"""What a process of the tests of data parallelism does; torchrun starts several.

torchrun --nproc-per-node 2 distributed_worker.py all RESULTS
"""

import copy
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_cases import CASES, Case, entropy, features, mlp
from torch import Tensor, nn

import riemannian_modules as rm
from riemannian_modules.model_metric import ModelMetric

PARTS = {2: [5, 3], 4: [1, 4, 2, 2]}
STEPS = 3


def part_of(tensor: Tensor, *, even: bool = False) -> Tensor:
    """The examples of this process."""
    size = dist.get_world_size()
    parts = tensor.chunk(size) if even else tensor.split(PARTS[size])
    return parts[dist.get_rank()]


def bits_of(metric: ModelMetric) -> str:
    """Of the parameters, and of the rows of the metric."""
    digest = hashlib.sha256()
    for declared in metric.parameters:
        digest.update(declared.tensor.detach().numpy().tobytes())
    for block in metric.blocks.values():
        for part in block.parts:
            if part.factor is not None:
                digest.update(part.factor.to_dense().numpy().tobytes())
    return digest.hexdigest()


def difference(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    assert set(one) == set(other), (set(one), set(other))
    return max(
        (float((one[k] - other[k]).abs().max() / other[k].abs().max()) for k in one),
        default=0.0,
    )


def everywhere(value: Any) -> list[Any]:
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return found


def compare(case: Case) -> dict[str, Any]:
    """Take steps together and alone, from the same point on all examples."""
    torch.manual_seed(1)
    n = sum(PARTS[dist.get_world_size()])
    alone = case.model().to(case.dtype)
    batch, numbers = case.batch(n), case.numbers(n)
    batch = batch.to(case.dtype) if batch.is_floating_point() else batch
    # What the others start from must not matter.
    together = copy.deepcopy(alone)
    if dist.get_rank() > 0:
        for parameter in together.parameters():
            if not hasattr(parameter, "manifold"):
                parameter.data.add_(1.0)
    one, other = case.metric(alone), case.metric(together)
    rm.distributed.data_parallel(other)
    found: dict[str, Any] = {"steps": []}
    optimizers = case.steps(one), case.steps(other)
    # Nor must what they draw.
    torch.manual_seed(2 + dist.get_rank())
    for _ in range(STEPS):
        case.step(one, optimizers[0], batch, numbers)
        own = [part_of(each, even=case.even) for each in (batch, numbers)]
        case.step(other, optimizers[1], *own)
        grads = [
            {d.name: d.tensor.grad for d in m.parameters if d.tensor.grad is not None}
            for m in (other, one)
        ]
        points = [
            {d.name: d.tensor.detach() for d in m.parameters} for m in (other, one)
        ]
        assert one.loss is not None
        assert other.loss is not None
        images = [
            {k: s.velocity.norm() for k, s in m.solve().items() if m.blocks[k].rank}
            for m in (other, one)
        ]
        found["steps"].append(
            {
                "gradient": difference(*grads),
                "parameters": difference(*points),
                "velocity": difference(*images),
                "loss": abs(float(other.loss - one.loss)) / abs(float(one.loss)),
            }
        )
    found["equal bits"] = len(set(everywhere(bits_of(other)))) == 1
    found["worst"] = max(everywhere(max(max(s.values()) for s in found["steps"])))
    found["rank"] = [block.rank for block in other.blocks.values()]
    found["rank alone"] = [block.rank for block in one.blocks.values()]
    return found


def message(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def start(
    seed: int = 1, group: dist.ProcessGroup | None = None
) -> tuple[rm.LayerwiseMetric, rm.optim.RiemannianSGD]:
    torch.manual_seed(seed)
    metric = rm.LayerwiseMetric(mlp().double(), rm.output.Categorical(), mass=0.1)
    rm.distributed.data_parallel(metric, group)
    return metric, rm.optim.RiemannianSGD(metric, lr=0.3, momentum=0.5)


def advance(metric: rm.LayerwiseMetric, x: Tensor, n: Tensor) -> None:
    with metric.record():
        outputs = metric.model(x)
    metric.backward(entropy(outputs, n), outputs)


def refusals() -> dict[str, list[str]]:
    """What every process says when one of them does something wrong."""
    rank = dist.get_rank()
    x, numbers = features(4).double() + rank, torch.arange(4)
    found = {}

    metric, optimizer = start()
    before = bits_of(metric)
    bad = x.clone()
    bad[0] = float("nan") if rank == 1 else bad[0]
    found["not finite"] = message(lambda: advance(metric, bad, numbers))
    advance(metric, x, numbers)
    optimizer.step()
    found["goes on"] = str(before != bits_of(metric))

    with torch.no_grad():
        next(iter(metric.parameters)).tensor[0, 0] += 1e-14 * rank
    found["other values"] = message(lambda: advance(metric, x, numbers))
    metric.exchange.broadcast()  # type: ignore[union-attr]
    metric.set_mass(0.1 + rank)
    found["other masses"] = message(lambda: advance(metric, x, numbers))
    metric.set_mass(0.1)
    weight = metric.model.get_parameter("2.weight")
    weight.requires_grad_(rank == 0)
    found["frozen later"] = message(lambda: advance(metric, x, numbers))
    weight.requires_grad_(True)
    advance(metric, x, numbers)
    if rank == 0:
        found["other calls"] = message(optimizer.step)
    else:
        found["other calls"] = message(lambda: advance(metric, x, numbers))

    metric, optimizer = start()
    advance(metric, x, numbers)
    solve = type(metric.blocks["0"]).solve

    def failing(self: Any, **options: Any) -> Any:
        if rank == 1:
            raise rm.errors.NotPositiveDefiniteError("made up")
        return solve(self, **options)

    type(metric.blocks["0"]).solve = failing  # type: ignore[method-assign]
    before = bits_of(metric)
    found["no solution"] = message(optimizer.step)
    type(metric.blocks["0"]).solve = solve  # type: ignore[method-assign]
    found["unmoved"] = str(before == bits_of(metric))

    rows = rm.rows.Sketch(2, generator=torch.Generator().manual_seed(rank))
    uneven_dice = rm.LayerwiseMetric(mlp().double(), rm.output.Categorical(), rows=rows)
    rm.distributed.data_parallel(uneven_dice)
    found["other dice"] = message(lambda: advance(uneven_dice, x, numbers))
    settings = {"refresh": 1 + rank}
    plain = rm.LayerwiseMetric(mlp(), rm.output.Categorical(), **settings)  # type: ignore[arg-type]
    found["other rows"] = message(lambda: rm.distributed.data_parallel(plain))

    metric, _ = start()
    newton = rm.optim.GaussNewton(metric)
    advance(metric, x, numbers)

    def failing_outputs() -> Tensor:
        if rank == 1:
            raise ValueError("made up")
        outputs: Tensor = metric.model(x)
        return outputs

    found["no outputs"] = message(
        lambda: newton.step(failing_outputs, lambda z: entropy(z, numbers))
    )

    half = mlp()
    plain = rm.LayerwiseMetric(half, rm.output.Categorical())
    half.requires_grad_(rank == 0)
    found["frozen"] = message(lambda: rm.distributed.data_parallel(plain))
    width = 3 + rank
    plain = rm.LayerwiseMetric(nn.Linear(width, 2), rm.output.Categorical())
    found["other models"] = message(lambda: rm.distributed.data_parallel(plain))
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(3, 2))
    inside = rm.LayerwiseMetric(wrapped, rm.output.Categorical())
    found["wrapped"] = message(lambda: rm.distributed.data_parallel(inside))
    found["divided"] = message(divided)
    heads = rm.LayerwiseMetric(
        CASES["two outputs"].model().double(),
        [rm.output.Categorical(), rm.output.Categorical()],
    )
    rm.distributed.data_parallel(heads)

    def uneven() -> None:
        with heads.record():
            out = heads.model(x)
        pair = [out["one"], out["other"].unsqueeze(1).repeat(1, 1 + rank, 1)]
        heads.backward(entropy(pair[0], numbers) + pair[1].mean(), pair)

    found["uneven"] = message(uneven)
    found |= early()
    found |= closures()
    return {name: everywhere(what) for name, what in found.items()}


def early() -> dict[str, str]:
    """What is wrong on rank 1 before anything is differentiated."""
    wrong = dist.get_rank() == 1
    x, numbers = features(4).double(), torch.arange(4)
    metric, _ = start()

    def go(**given: Any) -> None:
        with metric.record():
            outputs = metric.model(x[: given.get("n", 4)])
        loss = entropy(outputs, numbers[: len(outputs)])
        metric.backward(
            given.get("loss", loss),
            given.get("outputs", lambda z: z)(outputs),
            weights=given.get("weights"),
        )

    cases: dict[str, dict[str, Any]] = {
        "no examples": {"n": 0},
        "negative weights": {"weights": -torch.ones(4)},
        "a tuple": {"outputs": lambda z: (z,)},
        "a number": {"loss": 1.0},
    }
    found = {
        name: message(lambda given=given: go(**(given if wrong else {})))  # type: ignore[misc]
        for name, given in cases.items()
    }
    case = CASES["sets of points"]
    functional = case.metric(case.model().double())
    rm.distributed.data_parallel(functional)
    z = features(4, 2).double()
    for name, bad in {
        "points that are not finite": z.masked_fill(z == z[0, 0], float("nan")),
        "no points": z[:0],
        "points of a wrong shape": z[0],
    }.items():
        own = bad if wrong else z
        found[name] = message(lambda own=own: case.differentiate(functional, own, z))  # type: ignore[misc]
    found["and then"] = message(lambda: case.differentiate(functional, z, z))
    go()
    return found


def closures() -> dict[str, str]:
    """What is wrong on rank 1 while a point is tried, and where parameters are then."""
    wrong = dist.get_rank() == 1
    optim = rm.optim
    kinds: dict[str, Callable[[ModelMetric], Any]] = {
        "LevenbergMarquardt": optim.LevenbergMarquardt,
        "TrustRegion": optim.TrustRegion,
        "LineSearch": lambda metric: optim.LineSearch(metric, optim.StrongWolfe()),
    }
    found = {}
    for case in (CASES["layer"], CASES["functional"]):
        for name, kind in kinds.items():
            torch.manual_seed(1)
            metric = case.metric(case.model().double())
            rm.distributed.data_parallel(metric)
            x, numbers = case.batch(4).double(), case.numbers(4)
            case.differentiate(metric, x, numbers)
            before = bits_of(metric)

            def loss(bad: bool, case: Case = case, metric: Any = metric) -> Tensor:
                call = metric if case.functional is not None else metric.model
                own = x[0, 0] if bad and case.functional is not None else x  # noqa: B023
                outputs = call(case.given(own))
                if bad:
                    raise ValueError("made up")
                return case.loss(outputs, numbers)  # type: ignore[no-any-return] # noqa: B023

            optimizer = kind(metric)
            what = f"{name}, {'layer' if case.functional is None else 'functional'}"
            found[what] = message(lambda o=optimizer, f=loss: o.step(lambda: f(wrong)))  # type: ignore[misc]
            found[f"{what}, unmoved"] = str(before == bits_of(metric))
            optimizer.step(lambda f=loss: f(False))  # type: ignore[misc]
            found[f"{what}, then"] = str(before != bits_of(metric))
    return found


def divided() -> None:
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(4, 2)
    fully_shard(model)
    rm.LayerwiseMetric(model, rm.output.Categorical())


def resumed(folder: Path) -> dict[str, Any]:
    """Four steps, and two steps, a checkpoint, and two steps of new processes."""
    x, numbers = part_of(features(sum(PARTS[2])).double()), part_of(torch.arange(8))
    metric, optimizer = start()

    def go() -> None:
        for _ in range(2):
            advance(metric, x, numbers)
            optimizer.step()

    go()
    path = folder / "checkpoint.pt"
    if dist.get_rank() == 0:
        parts = {"model": metric.model, "metric": metric, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)
    go()
    straight = bits_of(metric)
    metric, optimizer = start(seed=2)
    dist.barrier()
    state = torch.load(path)
    metric.model.load_state_dict(state["model"])
    metric.load_state_dict(state["metric"])
    optimizer.load_state_dict(state["optimizer"])
    go()
    return {"equal": everywhere(straight == bits_of(metric))}


def lonely(folder: Path) -> None:
    """Rank 1 is killed after some steps, rank 2 sleeps; rank 0 writes what it sees."""
    rank = dist.get_rank()
    # Who sleeps is noticed by a timeout; a broken connection is seen at once.
    late = {1: timedelta(minutes=3), 2: timedelta(seconds=10)}
    groups = {p: dist.new_group([0, p], timeout=t) for p, t in late.items()}
    dist.barrier()
    # The one with the timeout first, while nobody is behind yet.
    mine = {p: start(group=groups[p]) for p in (2, 1) if rank in (0, p)}
    if rank == 2:
        time.sleep(600)
    x, numbers = features(4).double() + rank, torch.arange(4)
    noticed = {}
    for partner, (metric, optimizer) in sorted(mine.items()):
        for step in range(4):
            if rank == 1 and step == 3:
                os.kill(os.getpid(), signal.SIGKILL)
            begin = time.monotonic()
            try:
                advance(metric, x, numbers)
                optimizer.step()
            except rm.errors.DistributedError as error:
                seconds = time.monotonic() - begin
                report = {"error": str(error), "step": step, "seconds": seconds}
                noticed[partner] = report
                break
    if rank == 0:
        (folder / "noticed.json").write_text(json.dumps(noticed), "utf-8")


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float64)
    if what == "lonely":
        # Without an agent that ends the others.
        dist.init_process_group(
            "gloo",
            init_method=f"file://{folder}/meeting",
            rank=int(sys.argv[3]),
            world_size=3,
        )
        lonely(folder)
        return
    dist.init_process_group("gloo", timeout=timedelta(seconds=30))
    names = list(CASES) if what == "all" else sys.argv[3:]
    found: dict[str, Any] = {name: compare(CASES[name]) for name in names}
    if what == "all":
        found["refusals"] = refusals()
        found["resumed"] = resumed(folder)
    if dist.get_rank() == 0:
        (folder / "results.json").write_text(json.dumps(found), "utf-8")
    dist.destroy_process_group()
    # torch's threads of gloo now and then abort a process that ends in the usual way.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
