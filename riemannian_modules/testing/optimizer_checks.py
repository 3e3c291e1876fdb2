"""The laws of an optimizer: steps, state, groups, closures, bad input."""

import math
from collections.abc import Iterator
from contextlib import suppress

import geoopt
import torch

from riemannian_modules.manifolds import Stiefel
from riemannian_modules.testing.optimizer_probe import (
    Factory,
    Problem,
    Run,
    convex,
    curved,
)
from riemannian_modules.testing.probe import gap
from riemannian_modules.testing.result import CheckResult, measured

__all__ = ["check_optimizer"]


class _Case:
    def __init__(
        self,
        factory: Factory,
        manifold: geoopt.Manifold,
        steps: int,
        reduction: float,
        closures: bool,
        generator: torch.Generator,
    ) -> None:
        self.factory, self.steps, self.reduction = factory, steps, reduction
        self.closures = closures
        self.convex, self.curved = convex(generator), curved(generator, manifold)
        self.both = (self.convex, self.curved)

    def run(self, problem: Problem, groups: list[list[str]] | None = None) -> Run:
        return Run(self.factory, problem, self.closures, groups)

    # --- where it goes

    def descent(self) -> float:
        run, least = self.run(self.convex), self.convex.optimum or 0.0
        before = run.value() - least
        return (run.steps(self.steps).value() - least) / before

    def off_manifold(self) -> float:
        run = self.run(self.curved).steps(self.steps)
        weight = run.model.get_parameter("0.weight")
        base = weight.manifold.base  # type: ignore[attr-defined]
        value = weight.detach().as_subclass(torch.Tensor)
        return gap(base.projx(value.clone()), value)

    def moved(self) -> float:
        run = self.run(self.curved)
        before = run.parameters()
        after = run.steps(3).parameters()
        return min(gap(after[name], value) for name, value in before.items())

    def deterministic(self) -> bool:
        runs = [self.run(self.curved).steps(4) for _ in range(2)]
        return runs[0].same(runs[1])

    # --- state

    def round_trip(self) -> bool:
        for problem in self.both:
            run = self.run(problem).steps(3)
            twin = self.run(problem).load(run.state())
            wanted, found = run.steps(3).parameters(), twin.steps(3).parameters()
            if not all(torch.equal(found[name], each) for name, each in wanted.items()):
                return False
        return True

    def other_state(self) -> bool:
        run = self.run(self.curved).steps(2)
        before, state = run.state(), run.state()["optimizer"]
        group = {**state["param_groups"][0], "params": [1000]}
        state["param_groups"] = [*state["param_groups"], group]
        try:
            run.optimizer.load_state_dict(state)
        except ValueError:
            return run.same(before)
        return False

    # --- groups, closures, gradients

    def still_group(self) -> float:
        still, free = ["0.weight"], ["0.bias", "2.weight", "2.bias"]
        run = self.run(self.curved, [still, free])
        run.optimizer.param_groups[0]["lr"] = 0.0
        before = run.parameters()
        after = run.steps(3).parameters()
        if min(gap(after[name], before[name]) for name in free) < 1e-6:
            return math.inf
        return max(gap(after[name], before[name]) for name in still)

    def schedule(self) -> bool:
        slow, fast = self.run(self.curved), self.run(self.curved)
        for group in slow.optimizer.param_groups:
            group["lr"] = 0.25 * group["lr"]
        start = slow.parameters()
        lengths = [
            sum(gap(each, start[name], 1.0) for name, each in run.parameters().items())
            for run in (slow.steps(1), fast.steps(1))
        ]
        return 0.0 < lengths[0] < lengths[1]

    def closure_agrees(self) -> bool:
        run, twin = self.run(self.curved), self.run(self.curved)
        for _ in range(3):
            value = twin.value()
            run.step()
            given = twin.optimizer.step(lambda: float(twin.evaluate()))
            if given is None or (not self.closures and abs(given - value) > 1e-12):
                return False
        return run.same(twin)

    def closure_with_gradients(self) -> bool:
        run, seen = self.run(self.curved), []

        def closure() -> float:
            seen.append(torch.is_grad_enabled())
            with torch.enable_grad():
                return float(run.evaluate())

        with torch.no_grad():
            run.optimizer.step(closure)
        return bool(seen) and all(seen)

    def gradients_kept(self) -> bool:
        run = self.run(self.curved)
        run.evaluate()
        tensors = list(run.model.parameters())
        before = [p.grad.clone() for p in tensors if p.grad is not None]
        run.optimizer.step()
        after = [p.grad for p in tensors if p.grad is not None]
        return len(before) == len(after) and all(map(torch.equal, before, after))

    def without_gradient(self) -> bool:
        run = self.run(self.curved)
        run.evaluate()
        tensor = run.model.get_parameter("2.weight")
        before, tensor.grad = tensor.detach().clone(), None
        run.optimizer.step()
        kept = torch.equal(tensor.detach(), before)
        return kept and not run.optimizer.state.get(tensor)

    def bad_data(self) -> bool:
        for problem in self.both:
            run = self.run(problem).steps(2)
            before = run.state()
            x = problem.x.clone()
            x[0, 0] = math.nan
            with suppress(Exception):  # which error is the optimizer's own affair
                run.step(x)
            if not run.same(before):
                return False
            run.step()
            if not math.isfinite(run.value()):
                return False
        return True


def _laws(case: _Case) -> Iterator[CheckResult]:
    steps = case.steps
    yield measured(
        "descends",
        case.descent,
        case.reduction,
        f"{steps} steps leave this part of a convex loss above its minimum",
    )
    yield measured(
        "on_manifold",
        case.off_manifold,
        1e-12 * steps,
        f"a weight is on its manifold after {steps} steps",
    )
    yield measured("moves", case.moved, 1e-9, "every parameter moves", at_least=True)
    yield measured(
        "deterministic", case.deterministic, 0.0, "the same steps give the same bits"
    )
    yield measured(
        "state_round_trip",
        case.round_trip,
        0.0,
        "saved, loaded into a new optimizer and continued: the same bits",
    )
    yield measured(
        "state_of_another",
        case.other_state,
        0.0,
        "a state with other groups raises ValueError and changes nothing",
    )
    yield measured(
        "group_rates",
        case.still_group,
        1e-12,
        "a group with the rate 0 stays, and the others move",
    )
    yield measured(
        "schedule", case.schedule, 0.0, "a smaller rate in the group is a smaller step"
    )
    yield measured(
        "closure",
        case.closure_agrees,
        0.0,
        "step(closure) returns the loss and is the step without",
    )
    yield measured(
        "closure_enables_grad",
        case.closure_with_gradients,
        0.0,
        "step calls a closure with gradients enabled, as torch.optim does",
    )
    if not case.closures:
        yield measured(
            "gradient_kept", case.gradients_kept, 0.0, "step leaves .grad as it is"
        )
        yield measured(
            "no_gradient",
            case.without_gradient,
            0.0,
            "a parameter without a gradient stays and has no state",
        )
    yield measured(
        "bad_data",
        case.bad_data,
        0.0,
        "NaN in the data changes nothing, and the next step goes on",
    )


def check_optimizer(
    factory: Factory,
    *,
    manifold: geoopt.Manifold | None = None,
    steps: int = 30,
    reduction: float = 0.5,
    closures: bool = False,
    generator: torch.Generator | None = None,
) -> list[CheckResult]:
    """Measure whether an optimizer keeps the promises of ``torch.optim``, on manifolds.

    It runs on two problems made here, in float64: linear regression, and a network of
    two layers with the first weight on a manifold. The findings are named
    ``descends``, ``on_manifold``, ``moves``, ``deterministic``; ``state_round_trip``,
    ``state_of_another``; ``group_rates``, ``schedule``; ``closure``,
    ``closure_enables_grad``, ``gradient_kept``, ``no_gradient``; ``bad_data``.

    Args:
        factory: takes a model and parameter groups (``[{"params": [...]}, ...]``, names
            and numbers of groups vary) and returns the optimizer, one with a
            ``metric`` (:class:`riemannian_modules.optim.RiemannianSGD`), or a pair of
            any optimizer and the :class:`riemannian_modules.LayerwiseMetric` that
            renews the manifolds it steps on. Its rate is ``lr`` in the groups.
        manifold: where the weight of shape (3, 4) lives; None: a Stiefel manifold.
        steps: how many steps ``descends`` and ``on_manifold`` take.
        reduction: how much of the convex loss above its minimum they may leave.
        closures: the optimizer steps with closures only, which return floats.
        generator: source of the problems; None: a fixed seed.

    Returns:
        The findings. Where an optimizer raises, its law fails with the error.

    >>> def factory(model, groups):
    ...     return torch.optim.Adam(groups, lr=0.1)
    >>> findings = check_optimizer(factory, manifold=geoopt.Euclidean())
    >>> [finding.name for finding in findings if not finding.passed]
    ['bad_data']
    """
    if generator is None:
        generator = torch.Generator().manual_seed(0)
    base = Stiefel() if manifold is None else manifold
    case = _Case(factory, base, steps, reduction, closures, generator)
    return list(_laws(case))
