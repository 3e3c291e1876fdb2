"""From plans to a step: solve, measure, combine. Nothing is changed here."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from riemannian_modules.contraction.replica import is_sampled
from riemannian_modules.errors import NonFiniteError
from riemannian_modules.finite import looks_finite
from riemannian_modules.metric import Solution
from riemannian_modules.model_metric import ModelMetric
from riemannian_modules.optim.motion import (
    FIRST,
    Motion,
    Rule,
    best_pair,
    corrected,
    credible_share,
    foreseen,
    renewed,
    within,
)
from riemannian_modules.optim.plan import Plan
from riemannian_modules.optim.quadratic import (
    Numbers,
    QuadraticModel,
    refuse_unmeasurable,
    spanned,
)

__all__ = ["propose"]

Plans = Mapping[str, Plan]
Solutions = dict[str, Solution]


def propose(
    metric: ModelMetric,
    plans: Plans,
    rule: Rule,
    trust: Tensor | None = None,
    lowest: Tensor | None = None,
) -> tuple[Solutions, Motion | None]:
    """Solve for the directions, and choose the step where ``lr`` does not say it all.

    Implements :eq:`function-momentum`.

    Args:
        metric: the metric after a backward pass.
        plans: what moves.
        rule: how long steps are.
        trust: what the last step left of itself, ``(7,)``, or None.
        lowest: the lowest loss so far, or None.

    Returns:
        The solutions by block, and the step before ``lr``; None: it is minus the
        solution.

    Raises:
        NonFiniteError: a step is not finite.
        NotPositiveDefiniteError: a block's small matrix could not be factorised.
    """
    if rule.plain or not plans:
        return _solve(metric, plans, None), None
    residual = spanned(metric)
    gradient = {} if residual is not None else {n: p.gradient for n, p in plans.items()}
    model = QuadraticModel(metric, gradient, residual)
    before = _before(plans) if rule.keeps else {}
    image = model.image(before) if before else None
    shift = rule.spring * image if rule.spring and image is not None else None
    solutions = _solve(metric, plans, shift)
    found = {n: x for s in solutions.values() for n, x in s.vectors.items()}
    # The candidate is minus this, which is not written out.
    down = {name: found[name] for name in plans}
    numbers = None
    if rule.measures:
        own = _velocity(solutions) if len(found) == len(plans) else None
        directions, images = (
            ([down, before], [own, image]) if before else ([down], [own])
        )
        numbers = model.numbers(directions, images).turned()
    some_rows = is_sampled(metric.output) or metric.fewer.rows is not None
    if trust is not None and image is not None and numbers is not None:
        slope = numbers.slopes[1]
        trust = renewed(trust.to(image), image.square().sum(), slope, some_rows)
    gap = None if metric.loss is None else rule.gap(metric.loss, lowest)
    motion = _combine(gap, rule, numbers, down, before, trust, some_rows)
    if rule.clip is not None:
        motion = _clipped(rule.clip, model, plans, motion)
    if not all(map(looks_finite, motion.vectors.values())):
        raise NonFiniteError(
            f"the step is not finite (coefficients {float(motion.along)} and "
            f"{float(motion.carried)}, share {float(motion.share)}); nothing was "
            "changed. Raise the mass"
        )
    return solutions, motion


def _before(plans: Plans) -> dict[str, Tensor]:
    carried = {name: plan.before() for name, plan in plans.items()}
    return {name: d for name, d in carried.items() if d is not None}


def _velocity(solutions: Solutions) -> Tensor | None:
    known = [s.velocity.double() for s in solutions.values() if len(s.velocity)]
    return torch.stack(known).sum(0) if known else None


def _combine(
    gap: Tensor | None,
    rule: Rule,
    numbers: Numbers | None,
    down: dict[str, Tensor],
    before: dict[str, Tensor],
    trust: Tensor | None,
    some_rows: bool,
) -> Motion:
    first = next(iter(down.values()))
    one = torch.ones((), dtype=torch.float64, device=first.device)
    pair = torch.stack([one, rule.spring * one])
    inflation, measured = one, numbers
    if rule.automatic and numbers is not None:
        if trust is not None and before:
            numbers, inflation = corrected(numbers, trust)
        pair = best_pair(numbers, rule.spring)
    share, length = one, None
    if numbers is not None:
        c = pair[: len(numbers.slopes)]
        # Of the metric as it is, whatever the curvature is taken to be.
        assert measured is not None
        length = (c @ measured.damped @ c).clamp_min(0.0).sqrt()
        if rule.automatic and gap is not None:
            slope, curvature = numbers.slopes @ c, c @ numbers.curvature @ c
            share = credible_share(slope, curvature, gap)
        if rule.automatic and trust is not None:
            share = trust[-1].to(share) * share
        elif rule.automatic and some_rows:
            share = FIRST * share
        if rule.normalize:
            share = torch.where(length > 0.0, 1.0 / length, 0.0)
        length = share * length
    carried = pair[1] if before else torch.zeros_like(one)
    along, kept = -share * pair[0], share * carried
    vectors = {name: along.to(x.dtype) * x for name, x in down.items()}
    for name, d in before.items():
        vectors[name].addcmul_(d, kept.to(d.dtype))
    motion = Motion(vectors, pair[0], carried, share, length, inflation)
    if not rule.automatic or measured is None:
        return motion
    return replace(
        motion, trust=foreseen(measured, share * pair[: len(measured.slopes)], trust)
    )


def _clipped(
    clip: float, model: QuadraticModel, plans: Plans, motion: Motion
) -> Motion:
    lr, *others = (plan.lr for plan in plans.values())
    if motion.length is not None and all(
        other is lr or other == lr for other in others
    ):
        length = (lr * motion.length).abs()
    else:
        step = {name: plans[name].lr * u for name, u in motion.vectors.items()}
        length = model.numbers([step]).damped[0, 0].clamp_min(0.0).sqrt()
    return motion.times(within(clip, length))


def _solve(metric: ModelMetric, plans: Plans, shift: Tensor | None) -> Solutions:
    scales = {plan.scale for plan in plans.values()}
    parts = [part for b in metric.blocks.values() for part in b.parts]
    # Parameters that are left out stand still: their gradient must not steer the
    # others, nor their share of the metric.
    only = None if all(part.name in plans for part in parts) else set(plans)
    if len(scales) == 1 and metric.gradients.untouched(only):
        extra = {n: p.extra for n, p in plans.items() if p.extra is not None}
        solutions = metric.solve(
            extra or None, gradient=scales.pop(), shift=shift, only=only
        )
    else:
        # Clipped gradients and mixed groups: a covector like any other.
        covector = {n: plan.direction() for n, plan in plans.items()}
        solutions = metric.solve(covector, gradient=0.0, shift=shift, only=only)
    for block, solution in solutions.items():
        if not solution.looks_finite():
            gradients = {n: plans[n].gradient for n in solution.vectors if n in plans}
            if not all(map(looks_finite, gradients.values())):
                refuse_unmeasurable(gradients)
            raise NonFiniteError(
                f"the step of block '{block}' is not finite; nothing was changed. "
                "Lower the learning rate or raise the mass"
            )
    return solutions
