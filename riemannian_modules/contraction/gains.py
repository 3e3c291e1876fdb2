"""How strongly a module reacts to its input: bounded, measured, or unknown."""

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from riemannian_modules.contraction.operator_norms import CONSTANTS
from riemannian_modules.contraction.result import Gain, Side, Verdict
from riemannian_modules.contraction.verified import (
    times_up,
    upper_eigenvalue,
)
from riemannian_modules.errors import ContractionError, ShapeError

__all__ = [
    "added",
    "chained",
    "growth",
    "is_linear",
    "is_plain",
    "known",
    "lipschitz",
    "measured_gain",
    "no_argument",
    "register_lipschitz",
    "unknown",
]

Rule = Callable[[Any, int], Gain]

_RULES: dict[type[nn.Module], tuple[Rule, tuple[str, ...]]] = {}


def register_lipschitz(
    kind: type[nn.Module], methods: Sequence[str] = ("forward",)
) -> Callable[[Rule], Rule]:
    """Return a decorator that teaches :func:`lipschitz` about a type of module.

    The rule gets the module and the number of an argument of its forward, and returns
    a certified upper bound on how far apart outputs are, in the Euclidean norm, for
    arguments at distance one; or :func:`unknown`.

    Args:
        kind: the type. Its subclasses are included as long as they leave ``methods``
            alone.
        methods: what the rule relies on.

    Returns:
        The decorator.

    >>> class Twice(nn.Module):
    ...     def forward(self, x):
    ...         return 2 * x
    >>> @register_lipschitz(Twice)
    ... def twice(module, argument):
    ...     return known(2.0, "twice the input")
    >>> lipschitz(Twice()).value
    2.0
    """

    def register(rule: Rule) -> Rule:
        _RULES[kind] = rule, tuple(methods)
        return rule

    return register


def known(value: float, source: str) -> Gain:
    """Return a certified upper bound that holds everywhere; unknown if infinite.

    Args:
        value: the bound, rounded up.
        source: what it is.

    Returns:
        The gain.
    """
    if not math.isfinite(value):
        return unknown(source)
    return Gain(value, source=source)


def unknown(reason: str) -> Gain:
    """Return an infinite gain that certifies nothing.

    Args:
        reason: why there is no bound.

    Returns:
        The gain.
    """
    verdict = Verdict.NOT_CERTIFIED
    return Gain(math.inf, verdict=verdict, source=f"no bound known: {reason}")


def lipschitz(module: nn.Module, argument: int = 0) -> Gain:
    """Return a Lipschitz constant of a module in the Euclidean norm of all entries.

    A product of operator norms: certified, often far from sharp. It speaks of the
    function that the module computes in exact arithmetic with the weights that it has
    now. What the library does not know is unknown, an infinite gain; so are modules
    with hooks and those whose forward was overridden.

    Args:
        module: a layer with a known constant, or a composition of them.
        argument: which argument of its forward varies; the others are held.

    Returns:
        The gain. Cost: a singular value decomposition of each weight.

    >>> net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
    >>> bound = lipschitz(net)
    >>> seen = measured_gain(net, torch.zeros(1, 3))
    >>> seen.value <= bound.value, str(bound.verdict), str(seen.verdict)
    (True, 'certified', 'evidence')
    >>> lipschitz(nn.GRUCell(3, 4)).value
    inf
    """
    name = type(module).__name__
    if _hooked(module):
        return unknown(f"{name} has forward hooks")
    for kind in type(module).__mro__:
        if kind in _RULES:
            rule, methods = _RULES[kind]
            if _untouched(module, kind, methods):
                return rule(module, argument)
            break
        if kind in CONSTANTS:
            if not _untouched(module, kind, ("forward",)):
                break
            if argument:
                return no_argument(module, argument)
            if _is_complex(module):
                return unknown(f"{name} has complex weights")
            return known(CONSTANTS[kind](module), f"operator norm of {name}")
    return unknown(f"no rule for {name}; register_lipschitz adds one")


def no_argument(module: nn.Module, argument: int) -> Gain:
    """Return the unknown gain of an argument that a module does not have.

    Args:
        module: the module.
        argument: the number.
    """
    return unknown(f"{type(module).__name__} has no argument {argument}")


def _is_complex(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.is_complex()


def _hooked(module: nn.Module) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks)


def _untouched(
    module: nn.Module, kind: type[nn.Module], methods: Sequence[str]
) -> bool:
    return not any(
        name in module.__dict__
        or getattr(type(module), name) is not getattr(kind, name)
        for name in methods
    )


def is_plain(
    module: nn.Module, kind: type[nn.Module], methods: Sequence[str] = ("forward",)
) -> bool:
    """Return whether a module computes what its type does, and nothing else.

    Args:
        module: the module.
        kind: the type, one that it has.
        methods: what the computation consists of.
    """
    return not _hooked(module) and _untouched(module, kind, methods)


def is_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Return whether a module computes what nn.Linear does, and nothing else."""
    return isinstance(module, nn.Linear) and is_plain(module, nn.Linear)


def chained(gains: Sequence[Gain], what: str) -> Gain:
    """Return the gain of modules one after the other, the product.

    Args:
        gains: of the modules; none: the identity.
        what: the composition, in words.

    Returns:
        The gain; unknown if one of them is.
    """
    return added(gains, times_up(*(gain.value for gain in gains)), what)


def added(gains: Sequence[Gain], value: float, what: str) -> Gain:
    """Return a gain made of others in another way.

    Args:
        gains: what it is made of.
        value: it.
        what: the composition, in words.

    Returns:
        The gain; unknown if one of them is.
    """
    for gain in gains:
        if gain.verdict is not Verdict.CERTIFIED:
            return Gain(math.inf, verdict=Verdict.NOT_CERTIFIED, source=gain.source)
    told = ", ".join(f"{gain.value:.4g}" for gain in gains)
    return known(value, f"{what} of {told}" if gains else what)


@register_lipschitz(nn.Sequential)
def _sequential(module: nn.Sequential, argument: int) -> Gain:
    children = list(module)
    if argument:
        return no_argument(module, argument)
    if not children:
        return known(1.0, "an empty chain")
    return chained(list(map(lipschitz, children)), "product of operator norms")


def growth(module: nn.Module) -> Gain | float:
    """Return an upper bound on the logarithmic norm of a map, for ``x' = module(x)``.

    Minus a rate of contraction in the Euclidean metric. For a square linear layer it is
    the largest eigenvalue of the symmetric part of its weight, which may be negative;
    for other modules the Lipschitz constant, which is not.

    Args:
        module: a map between states of one shape.

    Returns:
        A certified number, or an unknown gain.

    >>> decay = nn.Linear(2, 2)
    >>> _ = decay.requires_grad_(False).weight.copy_(-2 * torch.eye(2))
    >>> round(growth(decay), 9)
    -2.0
    """
    bound = lipschitz(module)
    if bound.verdict is not Verdict.CERTIFIED:
        return bound
    if not is_linear(module) or module.in_features != module.out_features:
        return bound.value
    if _is_complex(module):
        return bound.value
    weight = module.weight.detach().as_subclass(Tensor).double()
    # Halving is exact; the sum of two entries is rounded once.
    symmetric = (weight + weight.mT) / 2
    slip = float(symmetric.abs().sum(-1).max()) * 2.0**-52
    return math.nextafter(float(upper_eigenvalue(symmetric)) + slip, math.inf)


def measured_gain(
    module: Callable[..., Tensor], *inputs: Tensor, argument: int = 0
) -> Gain:
    """Return the largest norm of a module's Jacobian at some points, by autograd.

    A lower bound on its Lipschitz constant, and evidence only, however many the points.

    Args:
        module: a function that treats examples one by one.
        inputs: its arguments, ``(n, *shape)`` each.
        argument: by which of them to differentiate.

    Returns:
        The gain. Cost: a Jacobian for each example, and its singular values.

    Raises:
        ShapeError: the arguments have different numbers of examples, or none.

    >>> measured_gain(torch.sin, torch.tensor([[0.0], [1.0]])).value
    1.0
    """
    n = len(inputs[0])
    if not n or any(len(each) != n for each in inputs):
        raise ShapeError(
            f"arguments of shapes {[tuple(each.shape) for each in inputs]}: they need "
            "the same number of examples in dimension 0, at least one"
        )
    return measured_at(
        [
            example_jacobian(module, [each[i : i + 1] for each in inputs], argument)
            for i in range(n)
        ]
    )


def measured_at(jacobians: Sequence[Tensor]) -> Gain:
    """Return the largest norm among Jacobians ``(m, n)`` seen at points, as evidence.

    Raises:
        ContractionError: one of them is not finite.
    """
    if not all(bool(torch.isfinite(J).all()) for J in jacobians):
        raise ContractionError(
            "a Jacobian is not finite: look for NaN in the parameters and the inputs"
        )
    norms = [float(torch.linalg.matrix_norm(J.double(), 2)) for J in jacobians]
    return Gain(
        max(norms),
        where=f"seen at {len(norms)} points",
        side=Side.LOWER,
        verdict=Verdict.EVIDENCE,
        source="norms of Jacobians by autograd",
    )


def example_jacobian(
    module: Callable[..., Tensor], inputs: Sequence[Tensor], argument: int
) -> Tensor:
    """Return the Jacobian ``(m, n)`` of one example's output by one argument."""
    held = [each.detach() for each in inputs]

    def of(x: Tensor) -> Tensor:
        varied = [*held[:argument], x, *held[argument + 1 :]]
        return module(*varied)

    found: Tensor = torch.autograd.functional.jacobian(of, held[argument])
    return found.detach().reshape(-1, held[argument].numel())
