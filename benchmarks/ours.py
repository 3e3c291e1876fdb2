"""The methods of this library, for races."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import nn

import riemannian_modules as rm
from benchmarks.method import Method, Settings, Step, full_batch
from benchmarks.problem import Batch, Blocks, Geometry, NetworkProblem, Problem

Suits = Callable[[Problem, Blocks], str]
OPTIONAL_RATE = (
    inspect.signature(rm.optim.RiemannianSGD).parameters["lr"].default is None
)


# Rows and parameters above which a factorisation takes seconds.
LARGE = 4096


def rsgd(
    problem: Problem, model: nn.Module, settings: Settings, blocks: Blocks
) -> Step:
    """Return a step of RiemannianSGD; without "lr" in the settings it finds its own.

    Steps of sampled rows, and of functions, are captured: what is solved by conjugate
    gradients is not, since the number of products is another one in each step, nor are
    embeddings, since that of the tokens that occur is.
    """
    geometry = geometry_of(problem, model, settings, blocks)
    lr = torch.tensor(settings["lr"]) if "lr" in settings else None
    optimizer = rm.optim.RiemannianSGD(geometry.metric, lr=lr)

    def work(batch: Batch) -> None:
        geometry.backward(batch)
        optimizer.step()

    sampled = "probes" in settings and problem.name != "poincare"
    pays = sampled or problem.kind == "functions"
    captured = rm.optim.CapturedStep(optimizer, work) if pays else work

    def step(batch: Batch, gone: float) -> None:
        if lr is not None:
            lr.fill_(settings["lr"] * problem.schedule(gone))
        captured(batch)

    return step


def marquardt(
    problem: Problem, model: nn.Module, settings: Settings, blocks: Blocks
) -> Step:
    """Return a step of LevenbergMarquardt."""
    geometry = geometry_of(problem, model, settings, blocks)
    optimizer = rm.optim.LevenbergMarquardt(geometry.metric)

    def step(batch: Batch, _: float) -> None:
        geometry.backward(batch)
        optimizer.step(lambda: geometry.loss(batch))

    return step


def gauss_newton(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    """Return a step of GaussNewton, one random row in front."""
    assert isinstance(problem, NetworkProblem)
    metric = geometry_of(problem, model, settings, "layer").metric
    whole = settings.get("lr", 1.0)
    optimizer = rm.optim.GaussNewton(metric, lr=whole)

    def step(batch: Batch, gone: float) -> None:
        x, y = batch
        if "lr" in settings:
            optimizer.param_groups[0]["lr"] = whole * problem.schedule(gone)
        with metric.record():
            outputs = model(x)
        metric.pull_back(outputs)
        optimizer.step(lambda: model(x), lambda z: problem.criterion(z, y))

    return step


def kfac(problem: Problem, model: nn.Module, settings: Settings) -> Step:
    """Return a step of KFAC, whose rows are renewed in every tenth pass."""
    assert isinstance(problem, NetworkProblem)
    mass, probes = settings["mass"], int(settings["probes"])
    geometry = problem.geometry(
        model, blocks="layer", mass=mass, probes=probes, refresh=10
    )
    optimizer = rm.optim.KFAC(geometry.metric, lr=settings["lr"])

    def step(batch: Batch, gone: float) -> None:
        optimizer.param_groups[0]["lr"] = settings["lr"] * problem.schedule(gone)
        geometry.backward(batch)
        optimizer.step()

    return step


def geometry_of(
    problem: Problem, model: nn.Module, settings: Settings, blocks: Blocks
) -> Geometry:
    mass, probes = settings["mass"], settings.get("probes")
    count = None if probes is None else int(probes)
    return problem.geometry(model, blocks=blocks, mass=mass, probes=count)


# --- grids


def exact_grid(problem: Problem) -> Sequence[Settings]:
    """Return two step lengths for each of three masses.

    On the embeddings a point is in few rows of a batch only, so the step is mostly the
    gradient divided by the mass; the step length is then chosen along with it.
    """
    if problem.name == "poincare":
        return [{"lr": r * m, "mass": m} for r in (30.0, 100.0) for m in problem.masses]
    return [{"lr": lr, "mass": m} for lr in (0.1, 0.3) for m in problem.masses]


def sampled_grid(problem: Problem) -> Sequence[Settings]:
    """Return those of all rows, for one random row of each example and the gradient."""
    return [{**each, "probes": 1} for each in exact_grid(problem)]


def mass_grid(problem: Problem) -> Sequence[Settings]:
    """Return the masses alone."""
    return [{"mass": mass} for mass in problem.masses]


def gauss_newton_grid(problem: Problem) -> Sequence[Settings]:
    """Return the masses; on minibatches with two parts of a step at first."""
    masses = [{"mass": mass, "probes": 1} for mass in problem.masses]
    if problem.full_batch:
        return masses
    return [{"lr": lr, **each} for lr in (0.5, 1.0) for each in masses]


def kfac_grid(problem: Problem) -> Sequence[Settings]:
    """Return two step lengths for each of three masses, one random row."""
    rates, masses = (0.3, 1.0), problem.masses
    return [{"lr": lr, "mass": mass, "probes": 1} for lr in rates for mass in masses]


def sampled_mass_grid(problem: Problem) -> Sequence[Settings]:
    """Return the masses with one random row for each example, and with four."""
    masses = problem.masses
    return [{"mass": mass, "probes": k} for k in (1, 4) for mass in masses]


# --- where they suit


def exact(problem: Problem, blocks: Blocks) -> str:
    parameters = sum(p.numel() for p in problem.model(0).parameters())
    if min(problem.rows, parameters) > LARGE:
        return f"{problem.rows:,} rows and {parameters:,} parameters: too dear a step"
    if problem.name == "poincare" and blocks == "model":
        return "the model has one parameter, so this is the layer's block"
    if problem.kind == "functions" and blocks == "layer":
        return "its layers are coupled; the joint block is what to use"
    return ""


def sampled(problem: Problem, blocks: Blocks) -> str:
    if problem.kind == "functions":
        return "the residuals have one row each, so there is nothing to sample"
    if problem.name == "factorisation":
        return "it has so few parameters that all rows cost no more"
    if problem.name == "poincare" and blocks == "model":
        return "the model has one parameter, so this is the layer's block"
    return ""


def without_rate(problem: Problem, blocks: Blocks, rows: Suits) -> str:
    if not OPTIONAL_RATE:
        return "this version of RiemannianSGD needs a learning rate"
    return rows(problem, blocks)


def with_losses(problem: Problem, blocks: Blocks, rows: Suits) -> str:
    return full_batch(problem) or rows(problem, blocks)


def many_outputs(problem: Problem) -> str:
    if not isinstance(problem, NetworkProblem):
        return "its rows are few enough to factorise"
    return ""


# --- the list


def entries() -> Iterator[Method]:
    """Yield exact and sampled methods for the two kinds of blocks."""
    each_layer: tuple[Blocks, str] = ("layer", "a block for each layer")
    for blocks, said in (each_layer, ("model", "one block")):
        for kind, rows, suits, grid, bare in (
            ("exact", "all rows", exact, exact_grid, mass_grid),
            ("sampled", "random rows", sampled, sampled_grid, sampled_mass_grid),
        ):
            about = f"{rows}, {said}"
            yield Method(
                f"{kind}-{blocks}",
                "ours",
                f"RiemannianSGD, {about}",
                grid,
                partial(rsgd, blocks=blocks),
                partial(suits, blocks=blocks),
            )
            yield Method(
                f"auto-{kind}-{blocks}",
                "ours",
                f"RiemannianSGD without a learning rate, {about}",
                bare,
                partial(rsgd, blocks=blocks),
                partial(without_rate, blocks=blocks, rows=suits),
            )
            yield Method(
                f"marquardt-{kind}-{blocks}",
                "ours",
                f"LevenbergMarquardt, {about}",
                bare,
                partial(marquardt, blocks=blocks),
                partial(with_losses, blocks=blocks, rows=suits),
            )

    yield Method(
        "gauss-newton",
        "ours",
        "GaussNewton, all rows by conjugate gradients, one random row in front",
        gauss_newton_grid,
        gauss_newton,
        many_outputs,
    )
    yield Method(
        "kfac",
        "ours",
        "KFAC: averaged Kronecker products of random rows, renewed every 10 steps",
        kfac_grid,
        kfac,
        many_outputs,
    )


OURS = list(entries())
