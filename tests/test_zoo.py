"""Models of torch's own zoo equal the dense reference, whatever batch came before."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_models import (
    MASS,
    ZOO,
    Case,
    func_jacobian,
    grad_jacobian,
    trainable,
    truth,
    wrong_factors,
    wrong_gradients,
)

import riemannian_modules as rm

# (examples, positions) of one pass after the other. What the first pass of a metric
# sees decides how later ones are read: a single example, as many examples as
# positions, a single position, or neither.
SCHEDULES = {
    "neither first": [(2, 3), (5, 4), (3, 3), (1, 2)],
    "one of each first": [(1, 1), (2, 3), (1, 3), (3, 3)],
    "square first": [(3, 3), (4, 2), (2, 4)],
    "one position first": [(4, 1), (4, 2)],
}


def outputs_of(model: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    outputs = model(*args)
    return outputs if isinstance(outputs, tuple) else (outputs,)


def loss_of(heads: tuple[Tensor, ...]) -> Tensor:
    total = torch.zeros(())
    for z in heads:
        places = torch.arange(z[..., 0].numel(), device=z.device)
        target = places.view(z.shape[:-1]) % z.shape[-1]
        total = total + F.cross_entropy(z.movedim(-1, 1), target)
    return total


FOLDED = "of one position, folded, the first pass cannot tell which index is slow"


def schedules(case: Case) -> list[str]:
    """Return all of them, or only two for a model that has no positions."""
    shapes = [[x.shape for x in case.batch(2, t)] for t in (1, 2)]
    names = list(SCHEDULES)
    return names if shapes[0] != shapes[1] else names[:2]


RUNS = [
    pytest.param(name, schedule, id=f"{name}, {schedule}")
    for name, case in ZOO.items()
    for schedule in schedules(case)
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "schedule"), RUNS)
def test_the_zoo_equals_the_dense_reference(name: str, schedule: str) -> None:
    case = ZOO[name]
    model, twin = case.make(), case.make()
    twin.load_state_dict(model.state_dict())
    count = len(outputs_of(model, case.batch(2, 2)))
    outputs = [rm.output.Categorical() for _ in range(count)]
    metrics = {
        blocks: rm.LayerwiseMetric(
            model,
            output=outputs if count > 1 else outputs[0],
            mass=MASS,
            blocks=blocks,
        )
        for blocks in ("layer", "model")
    }
    for n, t in SCHEDULES[schedule]:
        args = case.batch(n, t)
        twin.load_state_dict(model.state_dict())
        heads = outputs_of(twin, args)
        jacobian = (
            func_jacobian(twin, args)
            if case.functional
            else grad_jacobian(heads, trainable(twin))
        )
        expected = truth(heads, outputs, loss_of(heads), trainable(twin), jacobian)
        for blocks, metric in metrics.items():
            with metric.record():
                heads = outputs_of(model, args)
            metric.backward(loss_of(heads), heads if count > 1 else heads[0])
            wrong = wrong_factors(metric, expected)
            wrong += wrong_gradients(metric, expected, blocks=blocks)
            assert not wrong, f"blocks={blocks!r}, n={n}, t={t}: {wrong}"
        move(model)


def move(model: nn.Module) -> None:
    """Take a small tangent step, so that nothing remembered stays right by chance."""
    with torch.no_grad():
        for p in model.parameters():
            step = 0.05 * torch.randn_like(p)
            manifold = getattr(p, "manifold", None)
            p.copy_(
                p + step
                if manifold is None
                else manifold.retr(p, manifold.proju(p, step))
            )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [n for n, case in ZOO.items() if case.functional][::5])
def test_both_references_agree(name: str) -> None:
    model, args = ZOO[name].make(), ZOO[name].batch(3, 2)
    one = func_jacobian(model, args)
    other = grad_jacobian(outputs_of(model, args), trainable(model))
    for parameter, jacobian in one.items():
        torch.testing.assert_close(jacobian, other[parameter], rtol=1e-10, atol=1e-12)


def test_the_zoo_is_large() -> None:
    kinds = {
        type(module).__name__
        for case in ZOO.values()
        for module in case.make().modules()
        if type(module).__module__.startswith("torch.nn.modules")
    }
    assert len(kinds) >= 30, sorted(kinds)
