"""Momentum along manifolds, as in Nesterov's method."""

from collections.abc import Mapping
from typing import Any

import geoopt
import torch
from torch import Tensor

from riemannian_modules.declared import Declared
from riemannian_modules.gradients import Gradients
from riemannian_modules.optim.plan import Plan, arrived, moves
from riemannian_modules.retractions import Retraction

__all__ = ["advance"]

Vectors = dict[str, Tensor]


def advance(
    moving: Mapping[str, Declared],
    vectors: Mapping[str, Tensor],
    last: Mapping[str, Tensor | None],
    group: Mapping[str, Any],
    retraction: Retraction,
    gradients: Gradients,
) -> tuple[Vectors, Tensor | None]:
    """Move parameters against tangent vectors, and along the step before.

    Args:
        moving: the parameters.
        vectors: tangent vectors, by name.
        last: what this returned in the step before.
        group: ``lr``, ``momentum`` and ``weight_decay``.
        retraction: how a tangent step becomes a point.
        gradients: what the last backward pass left.

    Returns:
        The momentum, tangent at the new points; and on other devices than the CPU
        whether the step was taken, a boolean scalar.

    Raises:
        NonFiniteError, NotOnManifoldError: a step leaves numbers, or its manifold, on
            the CPU; nothing was changed.
    """
    lr, momentum = group["lr"], group["momentum"]
    # Whether there is any must not be asked of a tensor.
    decay = lr * group["weight_decay"] if group["weight_decay"] else 0.0
    waits = all(d.tensor.device.type == "cpu" for d in moving.values())
    plain = waits and not group["weight_decay"] and not isinstance(lr, Tensor)
    flat = [n for n, d in moving.items() if plain and _is_flat(d)]
    plans = {
        n: Plan(d, gradients, 1.0, None, None, lr, decay, None, last[n])
        for n, d in moving.items()
        if n not in set(flat)
    }
    before = {n: last[n] for n in flat} | {n: p.before() for n, p in plans.items()}
    kept = _plus(vectors, before, momentum)
    # The gradient counts from where the momentum will have led.
    steps = _plus(vectors, kept, momentum)
    updates = {n: p.update(steps[n], -lr) for n, p in plans.items()}
    points = {n: p.retract(retraction, updates[n]) for n, p in plans.items()}
    totals = [x.sum() for x in steps.values()]
    healthy = None if waits else arrived(plans, points, totals)
    after = {n: p.after(kept[n], points[n], healthy) for n, p in plans.items()}
    rates = dict.fromkeys(plans, -lr)
    for n, step in moves(rates, steps, updates).items():
        plans[n].commit(points[n], step, healthy)
    if flat:
        tensors = [moving[n].tensor for n in flat]
        torch._foreach_add_(tensors, [steps[n] for n in flat], alpha=-lr)
    for n in flat:
        moving[n].verified = moving[n].tensor._version
    return {n: after.get(n, kept[n]) for n in moving}, healthy


def _is_flat(declared: Declared) -> bool:
    return isinstance(declared.manifold, geoopt.Euclidean)


def _plus(
    vectors: Mapping[str, Tensor], others: Mapping[str, Tensor | None], factor: float
) -> Vectors:
    """Return ``vectors + factor others``, of which some may be missing."""
    there = {
        n: other.to(vectors[n]) for n, other in others.items() if other is not None
    }
    found = dict(vectors)
    if there:
        some = [vectors[n] for n in there]
        sums = torch._foreach_add(some, list(there.values()), alpha=factor)
        found |= dict(zip(there, sums, strict=True))
    return found
