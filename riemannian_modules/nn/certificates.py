"""Which dynamical system a composition is, and what is certified of it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import singledispatch
from itertools import pairwise

import torch
from torch import Tensor, nn

from riemannian_modules.contraction import (
    Certificate,
    Gain,
    Rate,
    Verdict,
    product,
    shared_loss,
)
from riemannian_modules.contraction.exact import root_up
from riemannian_modules.contraction.gains import (
    added,
    growth,
    is_plain,
    known,
    lipschitz,
    unknown,
)
from riemannian_modules.contraction.inplace import writes_input
from riemannian_modules.contraction.premises import Gains, Rates
from riemannian_modules.contraction.result import Side, weakest
from riemannian_modules.contraction.verified import times_up
from riemannian_modules.errors import ContractionError
from riemannian_modules.nn.composition import Composition
from riemannian_modules.nn.feedback import Feedback
from riemannian_modules.nn.fixed_point import FixedPoint
from riemannian_modules.nn.gate import Gate
from riemannian_modules.nn.heads import Heads
from riemannian_modules.nn.parallel import Join, Parallel
from riemannian_modules.nn.question import Question
from riemannian_modules.nn.recurrent import Recurrent
from riemannian_modules.nn.residual import Residual
from riemannian_modules.nn.sensitivity import IN_PLACE, beside
from riemannian_modules.nn.sequential import Sequential

__all__ = ["certificate_of", "dynamics"]


def certificate_of(
    module: Composition,
    question: Question,
    couplings: Gains | None,
) -> Certificate:
    """Answer a question.

    Args:
        module: the composition.
        question: what is asked.
        couplings: of blocks of parameters, if it is about learning.

    Returns:
        The certificate.

    Raises:
        ContractionError: bounds and points do not fit, or the module computes something
            else than its type.
    """
    bounds = question.bounds
    if bounds not in ("operator_norm", "measured"):
        raise ContractionError(f"bounds={bounds!r}; 'operator_norm' or 'measured'")
    if couplings is not None:
        return _of_learning(module, question.rates, couplings)
    if (bounds == "measured") != bool(question.at):
        raise ContractionError(
            "bounds='measured' takes the inputs at which to measure, at=x; operator "
            "norms hold everywhere and take none. The two are never mixed"
        )
    _require_plain(module)
    return dynamics(module, question)


def _require_plain(module: nn.Module) -> None:
    kinds = [kind for kind in type(module).__mro__ if kind in dynamics.registry]
    methods = [name for name in ("forward", "step") if hasattr(kinds[0], name)]
    if not is_plain(module, kinds[0], methods):
        raise ContractionError(
            f"this {type(module).__name__} has forward hooks or overrides "
            f"{' or '.join(methods)}, so that it is another system than a "
            f"{kinds[0].__name__}; register a function for its type with "
            "riemannian_modules.nn.certificates.dynamics"
        )


def _of_learning(
    module: nn.Module, rates: Rates | None, couplings: Gains
) -> Certificate:
    names = {name for name, _ in module.named_modules()}
    if not isinstance(rates, Mapping) or not set(rates) <= names:
        raise ContractionError(
            "with couplings the rates are those of blocks of parameters, by the names "
            f"of the modules that hold them; got {rates}"
        )
    found = shared_loss(rates, couplings)
    return _about(
        found,
        "the flow of the parameters of these modules down one loss, each along its "
        "gradient in its own metric",
    )


def _about(found: Certificate, system: str) -> Certificate:
    assumptions = (f"the system is {system}", *found.assumptions)
    return replace(found, assumptions=assumptions)


@singledispatch
def dynamics(module: nn.Module, question: Question) -> Certificate:
    """Certify the dynamical system that a composition is.

    A new composition registers a function here: ``dynamics.register(MyComposition)``.

    Args:
        module: the composition.
        question: what was asked.

    Raises:
        ContractionError: nobody has said which system this type of module is.
    """
    raise ContractionError(
        f"{type(module).__name__} has no dynamics of its own: compose it, or register "
        "a function with riemannian_modules.nn.certificates.dynamics"
    )


DRIVEN = (
    "a state for each child i with x_i' = h_i(x_i) + f_i(inputs of child i), where "
    "f_i is the child's map and h_i contracts with the given rate (h(x) = -x: rate 1)"
)


def _driven(
    rates: Mapping[str, Rate | Certificate],
    gains: Mapping[tuple[str, str], Gain],
    question: Question,
) -> Certificate:
    return _about(question.network(rates, gains), DRIVEN)


@dynamics.register
def _sequential(module: Sequential, question: Question) -> Certificate:
    # named_children() leaves out a child that is there twice.
    children = {n: c for n, c in module._modules.items() if c is not None}
    rates = question.named_rates(list(children))
    values = list(question.at)
    gains = {}
    for (before, first), (after, then) in pairwise(children.items()):
        if values:
            with torch.no_grad():
                values = [first(*values)]
        gains[after, before] = question.gain(then, lambda: tuple(values))  # noqa: B023
    return _driven(rates, gains, question)


@dynamics.register(Parallel)
@dynamics.register(Join)
def _side_by_side(module: Parallel | Join, question: Question) -> Certificate:
    names = [name for name, child in module._modules.items() if child is not None]
    return _about(product(question.named_rates(names)), DRIVEN)


@dynamics.register
def _gate(module: Gate, question: Question) -> Certificate:
    return _about(product(question.named_rates(["gate", "value"])), DRIVEN)


@dynamics.register
def _heads(module: Heads, question: Question) -> Certificate:
    heads = dict(module.heads.items())
    if module.trunk is None:
        return _about(product(question.named_rates(list(heads))), DRIVEN)
    if "trunk" in heads:
        raise ContractionError("a head is called 'trunk', as the trunk is: rename it")
    trunk = module.trunk
    rates = question.named_rates(["trunk", *heads])
    gains = {
        (name, "trunk"): question.gain(head, lambda: (trunk(*question.at),))
        for name, head in heads.items()
    }
    return _driven(rates, gains, question)


def _repeated(
    question: Question,
    child: nn.Module,
    inputs: Callable[[], tuple[Tensor, ...]],
    argument: int = 0,
) -> Gain:
    """Return the gain of a child whose input is read again."""
    if writes_input(child):
        return unknown(IN_PLACE)
    return question.gain(child, inputs, argument)


@dynamics.register
def _residual(module: Residual, question: Question) -> Certificate:
    branch = _repeated(question, module.module, lambda: question.at)
    if module.shortcut is not None:
        question.no_rates("with a shortcut module only sizes count")
        short = _repeated(question, module.shortcut, lambda: question.at)
        total = beside(short, branch, module.scale)
        factor = _combined([short, branch], total, "shortcut plus scaled branch")
    elif question.bounds == "measured" and question.rates is None:
        factor = question.gain(module, lambda: question.at)
    else:
        factor = _relaxed(module, _flow(module, question), branch)
    return _about(
        question.maps({"x": factor}),
        "the iteration x <- shortcut(x) + scale * module(x), in the Euclidean metric",
    )


def _flow(module: Residual, question: Question) -> Rate:
    """Return the rate of ``x' = sign(scale) * module(x)``.

    Raises:
        ContractionError: the given one says nothing about it.
    """
    if question.rates is not None:
        rate = question.named_rates(["module"])["module"]
        found = rate.rate if isinstance(rate, Certificate) else rate
        if found.metric != "Euclidean":
            raise ContractionError(
                f"the rate of the branch is in the {found.metric} metric, its operator "
                "norm in the Euclidean one: they do not combine"
            )
        if module.scale < 0:
            raise ContractionError(
                f"scale is {module.scale:g}: a rate of x' = module(x) says nothing of "
                "its negative; put the sign into the module"
            )
        return found
    rises = growth(module.module) if module.scale > 0 else lipschitz(module.module)
    if isinstance(rises, Gain):
        rises = rises.value
    return Rate(-rises, source="largest eigenvalue of the symmetric part, or the norm")


def _relaxed(module: Residual, flow: Rate, branch: Gain) -> Gain:
    """Return the factor of ``x + s f(x)`` from a rate and a norm of f.

    Implements :eq:`residual-factor`.
    """
    s = abs(module.scale)
    safe = flow.side in {Side.EXACT, Side.LOWER} and branch.side in {
        Side.EXACT,
        Side.UPPER,
    }
    verdict = weakest([flow.verdict, branch.verdict])
    if not (math.isfinite(flow.value) and math.isfinite(branch.value)):
        return Gain(math.inf, verdict=Verdict.NOT_CERTIFIED, source=branch.source)
    step, norm = Fraction(s), Fraction(branch.value)
    squared = 1 - 2 * step * Fraction(flow.value) + step**2 * norm**2
    plain = (1 + step * norm) ** 2
    return Gain(
        root_up(max(min(squared, plain), Fraction(0))),
        where=" and ".join(dict.fromkeys([flow.where, branch.where])),
        side=Side.UPPER if safe else Side.ESTIMATE,
        verdict=verdict,
        source=f"q^2 = 1 - 2 s l + s^2 L^2 with s = {s:.4g}, l = {flow.value:.4g}, "
        f"L = {branch.value:.4g}",
    )


def _combined(gains: Sequence[Gain], value: float, what: str) -> Gain:
    if all(gain.verdict is not Verdict.EVIDENCE for gain in gains):
        return added(gains, value, what)
    return replace(gains[0], value=value, side=Side.ESTIMATE, source=what)


@dynamics.register
def _recurrent(module: Recurrent, question: Question) -> Certificate:
    question.no_rates("the cell is the whole dynamics, and a map")

    def points() -> tuple[Tensor, ...]:
        inputs = question.at[0].unbind(module.dim)
        states = [module._start(inputs[0])]
        for each in inputs[:-1]:
            states.append(module.cell(each, states[-1]))
        return torch.cat(inputs), torch.cat(states)

    factor = _repeated(question, module.cell, points, 1)
    return _about(
        question.maps({"state": factor}),
        "h <- cell(x_t, h), two states under the same inputs x_1, x_2, ..., in the "
        "Euclidean metric",
    )


@dynamics.register
def _fixed_point(module: FixedPoint, question: Question) -> Certificate:
    question.no_rates("the module is the whole dynamics, and a map")
    factor = _repeated(
        question,
        module.module,
        lambda: (question.at[0], module(question.at[0])),
        1,
    )
    return _about(
        question.maps({"state": factor}),
        "z <- module(x, z) for one input x, in the Euclidean metric; below one there "
        "is exactly one fixed point for each x",
    )


@dynamics.register
def _feedback(module: Feedback, question: Question) -> Certificate:
    question.no_rates("the loop is made of maps")

    def closed() -> tuple[Tensor, Tensor]:
        y = module(question.at[0])
        return y, question.at[0] + module.back(y)

    ahead = _repeated(question, module.ahead, lambda: (closed()[1],))
    back = _repeated(question, module.back, lambda: (closed()[0],))
    zero = known(0.0, "it has no state of its own")
    found = question.maps(
        {"ahead": zero, "back": zero},
        {("ahead", "back"): ahead, ("back", "ahead"): back},
    )
    loop = times_up(ahead.value, back.value)
    found = replace(found, limits={**found.limits, "loop gain": loop})
    return _about(
        found,
        "y <- ahead(x + b), b <- back(y) for one input x, both at once, in the "
        "Euclidean metric; with a loop gain below one there is exactly one output for "
        "each x, and y <- ahead(x + back(y)) contracts by the loop gain (Desoer and "
        "Vidyasagar 1975)",
    )
