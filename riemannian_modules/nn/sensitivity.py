"""Lipschitz constants of the compositions, from those of their children."""

import math
from collections.abc import Sequence

from torch import nn

from riemannian_modules.contraction.gains import (
    added,
    chained,
    known,
    lipschitz,
    no_argument,
    register_lipschitz,
    unknown,
)
from riemannian_modules.contraction.inplace import writes_input
from riemannian_modules.contraction.result import Gain
from riemannian_modules.contraction.verified import hypot_up, plus_up, times_up
from riemannian_modules.nn.feedback import Feedback
from riemannian_modules.nn.fixed_point import FixedPoint
from riemannian_modules.nn.heads import Heads
from riemannian_modules.nn.parallel import Join, Parallel
from riemannian_modules.nn.residual import Residual
from riemannian_modules.nn.sequential import Sequential

__all__ = ["IN_PLACE", "beside"]

IN_PLACE = "a child works in place on what is read again after it"


def beside(short: Gain, branch: Gain, scale: float) -> float:
    """Return the gain of a shortcut beside a scaled branch, rounded up."""
    return plus_up(short.value, times_up(abs(scale), branch.value))


def _write(module: nn.Module) -> bool:
    children = [child for child in module._modules.values() if child is not None]
    return any(map(writes_input, children))


@register_lipschitz(Sequential)
def _sequential(module: Sequential, argument: int) -> Gain:
    children = list(module)
    if not children and argument:
        return no_argument(module, argument)
    if not children:
        return known(1.0, "an empty chain")
    first = lipschitz(children[0], argument)
    rest = [lipschitz(child) for child in children[1:]]
    return chained([first, *rest], "product of operator norms")


@register_lipschitz(Parallel)
def _parallel(module: Parallel, argument: int) -> Gain:
    if _write(module):
        return unknown(IN_PLACE)
    gains = [lipschitz(branch, argument) for branch in module.branches]
    values = [gain.value for gain in gains]
    if module.combine == "sum":
        return added(gains, plus_up(*values), "sum of the branches'")
    return added(gains, hypot_up(*values), "root of the sum of squares")


@register_lipschitz(Join)
def _join(module: Join, argument: int) -> Gain:
    branches = module.branches
    if argument >= len(branches):
        return no_argument(module, argument)
    if _write(module):
        return unknown(IN_PLACE)
    return lipschitz(branches[argument])


@register_lipschitz(Residual)
def _residual(module: Residual, argument: int) -> Gain:
    if argument:
        return no_argument(module, argument)
    if _write(module):
        return unknown(IN_PLACE)
    short = known(1.0, "the identity")
    if module.shortcut is not None:
        short = lipschitz(module.shortcut)
    total = beside(short, lipschitz(module.module), module.scale)
    return added([short, lipschitz(module.module)], total, "shortcut plus branch")


@register_lipschitz(Heads)
def _heads(module: Heads, argument: int) -> Gain:
    if any(map(writes_input, module.heads.values())):
        return unknown(IN_PLACE)
    trunk: list[nn.Module] = [] if module.trunk is None else [module.trunk]
    own = 0 if trunk else argument
    heads = [lipschitz(head, own) for head in module.heads.values()]
    values = hypot_up(*(head.value for head in heads))
    shared = [lipschitz(each, argument) for each in trunk]
    total = times_up(values, *(gain.value for gain in shared))
    return added([*shared, *heads], total, "trunk times root of the sum of squares")


@register_lipschitz(FixedPoint, ("forward", "step"))
def _fixed_point(module: FixedPoint, argument: int) -> Gain:
    if argument > 1:
        return no_argument(module, argument)
    if _write(module):
        return unknown(IN_PLACE)
    inner = lipschitz(module.module, 1)
    if argument == 1:
        return _start([inner], inner.value)
    return _implicit([lipschitz(module.module, 0), inner], inner.value)


@register_lipschitz(Feedback, ("forward", "step"))
def _feedback(module: Feedback, argument: int) -> Gain:
    if argument > 1:
        return no_argument(module, argument)
    if _write(module):
        return unknown(IN_PLACE)
    gains = [lipschitz(module.ahead), lipschitz(module.back)]
    loop = times_up(*(gain.value for gain in gains))
    return _start(gains, loop) if argument == 1 else _implicit(gains, loop)


def _start(gains: Sequence[Gain], loop: float) -> Gain:
    """Where the solver begins does not matter if there is one solution only."""
    if not loop < 1:
        return unknown(f"the loop gain {loop:.4g} is not below one")
    return added(gains, 0.0, "one solution, wherever the solver begins, by gains")


def _implicit(gains: Sequence[Gain], loop: float) -> Gain:
    if not loop < 1:
        return unknown(f"the loop gain {loop:.4g} is not below one")
    room = math.nextafter(1 - loop, 0.0)
    total = math.nextafter(gains[0].value / room, math.inf)
    return added(gains, total, "closed loop")
