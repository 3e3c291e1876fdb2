"""Actions, passes and sweeps with one mistake each, by the law that it breaks."""

import math
from dataclasses import replace

import torch

from riemannian_modules import action as ac


def energy_left(path):
    """The energy form with one-sided gradients, sold as an action."""
    return ac.action(path, "left").energy


def without_loss(path):
    """Leaves out the drop of the loss."""
    found = ac.action(path, "discrete_gradient")
    return found.energy + path.local(0).loss - path.local(len(path.durations)).loss


def one_sided(path):
    """Calls the gradient at the start of a step a discrete gradient."""
    return ac.action(path, "left").energy


FORMS = (without_loss, one_sided)


def tube_of_one_rate(S, rate, t):
    """Lets the perturbation be forgotten twice as fast."""
    return math.sqrt(S * -math.expm1(-4.0 * rate * t) / (2.0 * rate))


def wrong_costate(found):
    """One entry of one costate is off by a part in a million."""
    costates = [c.clone() for c in found.costates]
    costates[1].view(-1)[0] += 1e-6 * costates[1].abs().max()
    return replace(found, costates=tuple(costates)), "adjoint"


def wrong_sign(found):
    """All costates have the other sign, as for a loss that is maximised."""
    return replace(found, costates=tuple(-c for c in found.costates)), "terminal"


def stale_state(found):
    """A state is that of other parameters."""
    states = [z.clone() for z in found.states]
    states[1] = states[1] + 1e-6
    return replace(found, states=tuple(states)), "forward"


def averaged_gradient(found):
    """Gradients are divided by the number of examples once more."""
    n = len(found.states[0])
    gradients = [{k: g / n for k, g in own.items()} for own in found.gradients]
    return replace(found, gradients=tuple(gradients)), "gradient"


PASSES = (wrong_costate, wrong_sign, stale_state, averaged_gradient)


def without_response(metric, inputs, costate):
    """Solves every layer as if no later one moved."""
    blocks = dict(metric.blocks)
    found = {}
    for block in blocks.values():
        own = {p.name: torch.zeros_like(p.space.point) for p in block.parts}
        for part in block.parts:
            own[part.name] = metric.parameters[part.name].tensor.grad
        found |= block.sharp(own)
    return found
