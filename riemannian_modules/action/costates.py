"""Backpropagation as constrained optimisation: states, costates, optimality.

Training a chain minimises the loss of its last state subject to ``z_a = f_a(z_{a-1},
w_a)``. The multipliers of these constraints are the costates of backpropagation, and
the conditions of Karush, Kuhn and Tucker are the equations that it solves.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import jvp, vjp

from riemannian_modules.errors import LinearizationError, ShapeError
from riemannian_modules.functional.binding import Binding

__all__ = [
    "RecordedPass",
    "Residuals",
    "hamiltonians",
    "kkt_residuals",
    "pairings",
    "record_pass",
]

Gradients = dict[str, Tensor]


@dataclass(frozen=True)
class RecordedPass:
    """One forward and backward pass through a chain of modules.

    Attributes:
        modules: The chain.
        loss: The loss as a function of the last state.
        states: ``z_0, ..., z_L``.
        costates: ``lambda_0, ..., lambda_L``, of the states' shapes.
        gradients: For each module ``{parameter name in it: gradient}``.
    """

    modules: tuple[nn.Module, ...]
    loss: Callable[[Tensor], Tensor]
    states: tuple[Tensor, ...]
    costates: tuple[Tensor, ...]
    gradients: tuple[Gradients, ...]


@dataclass(frozen=True)
class Residuals:
    """How far a pass is from the conditions of optimality, relative to their terms.

    Attributes:
        forward: For each module ``z_a - f_a(z_{a-1}, w_a)``.
        terminal: ``lambda_L - d loss / d z_L``.
        adjoint: For each module ``lambda_{a-1} - A_a^T lambda_a``.
        gradient: For each module ``g_a - B_a^T lambda_a``; 0 without parameters.
    """

    forward: tuple[float, ...]
    terminal: float
    adjoint: tuple[float, ...]
    gradient: tuple[float, ...]

    @property
    def largest(self) -> float:
        """The largest of all."""
        return max(*self.forward, self.terminal, *self.adjoint, *self.gradient)

    def __str__(self) -> str:
        lines = [f"terminal condition: {self.terminal:.1e}"]
        rows = zip(self.forward, self.adjoint, self.gradient, strict=True)
        lines += [
            f"module {a}: state {z:.1e}, costate {costate:.1e}, gradient {g:.1e}"
            for a, (z, costate, g) in enumerate(rows)
        ]
        return "\n".join(lines)


def record_pass(
    chain: Iterable[nn.Module], inputs: Tensor, loss: Callable[[Tensor], Tensor]
) -> RecordedPass:
    """Run a chain forward and backward and keep every state and costate.

    Args:
        chain: The modules, for instance an ``nn.Sequential``. A parameter that two
            of them share has a gradient in each.
        inputs: The first state, of real numbers.
        loss: A scalar function of the last state.

    Returns:
        The pass, by one call of autograd. Nothing is written to ``.grad``.

    Raises:
        ShapeError: No modules, or inputs that are not floating point.

    Example:
        >>> chain = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        >>> found = record_pass(chain, torch.ones(4, 3), lambda z: z.square().mean())
        >>> [tuple(costate.shape) for costate in found.costates]
        [(4, 3), (4, 2), (4, 2)]
    """
    modules = tuple(chain)
    if not modules or not inputs.is_floating_point():
        raise ShapeError(
            "record_pass needs at least one module and inputs of real numbers"
        )
    leaves = [
        {name: p.requires_grad_() for name, p in _parameters(module).items()}
        for module in modules
    ]
    with torch.enable_grad():
        states = [inputs.detach().clone().requires_grad_()]
        for module, own in zip(modules, leaves, strict=True):
            # A copy, which the module may overwrite.
            states.append(Binding(module).call(own, states[-1].clone()))
        value = loss(states[-1])
    flat = [leaf for own in leaves for leaf in own.values()]
    found = torch.autograd.grad(
        value, [*states, *flat], allow_unused=True, materialize_grads=True
    )
    rest = iter(found[len(states) :])
    return RecordedPass(
        modules,
        loss,
        tuple(z.detach() for z in states),
        found[: len(states)],
        tuple({name: next(rest) for name in own} for own in leaves),
    )


def kkt_residuals(found: RecordedPass) -> Residuals:
    """Return how well a pass satisfies its conditions of optimality.

    Every module is evaluated and differentiated on its own, from the recorded states
    and costates, so a pass that was changed, recorded in another state of the model or
    differentiated wrongly shows at the module where it happened. Implements
    :eq:`kkt-conditions`.

    Args:
        found: The pass.

    Returns:
        The residuals, relative to the largest entry of what they should equal.

    Raises:
        LinearizationError: A gradient is recorded for a parameter that the module does
            not have, or one is missing; or a module gathers running statistics.

    Example:
        >>> chain = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        >>> found = record_pass(chain, torch.ones(4, 3), lambda z: z.square().mean())
        >>> kkt_residuals(found).largest < 1e-5
        True
        >>> found.costates[1][0, 0] += 1.0
        >>> kkt_residuals(found).largest > 0.1
        True
    """
    forward, adjoint, gradient = [], [], []
    for a, module in enumerate(found.modules):
        own = _parameters(module)
        if set(own) != set(found.gradients[a]):
            raise LinearizationError(
                f"module {a} has the parameters {sorted(own)}, the pass gradients of "
                f"{sorted(found.gradients[a])}"
            )
        z, pull = _vjp(_map(a, module), found.states[a], own)
        forward.append(_distance(found.states[a + 1], z))
        costate, slopes = pull(found.costates[a + 1])
        adjoint.append(_distance(found.costates[a], costate))
        misses = [_distance(found.gradients[a][n], g) for n, g in slopes.items()]
        gradient.append(max(misses, default=0.0))
    last = found.states[-1]
    _, pull = _vjp(found.loss, last)
    (terminal,) = pull(torch.ones((), dtype=last.dtype, device=last.device))
    return Residuals(
        tuple(forward),
        _distance(found.costates[-1], terminal),
        tuple(adjoint),
        tuple(gradient),
    )


def hamiltonians(found: RecordedPass) -> list[float]:
    """Return ``H_a = <lambda_a, f_a(z_{a-1}, w_a)>`` of every module.

    Its derivatives are the equations of the pass: by ``lambda_a`` the next state, by
    ``z_{a-1}`` the previous costate, by ``w_a`` the gradient. Implements
    :eq:`module-hamiltonian`.

    Args:
        found: The pass.

    Returns:
        One number for each module.

    Raises:
        LinearizationError: A module gathers running statistics.
    """
    values = []
    for a, module in enumerate(found.modules):
        z = _map(a, module)(found.states[a], _parameters(module))
        values.append(float((found.costates[a + 1] * z).sum()))
    return values


def pairings(found: RecordedPass, direction: Tensor) -> list[float]:
    """Return ``<lambda_a, dz_a>`` for a perturbation of the input, in every depth.

    States are pushed forward, costates pulled back, and their pairing is the change of
    the loss in every depth alike.

    Args:
        found: The pass.
        direction: Perturbation ``dz_0`` of the input.

    Returns:
        L + 1 numbers, equal up to rounding if the costates are right.

    Raises:
        LinearizationError: A module gathers running statistics.

    Example:
        >>> double = torch.nn.Linear(1, 1, bias=False)
        >>> _ = torch.nn.init.constant_(double.weight, 2.0)
        >>> found = record_pass([double, double], torch.ones(1, 1), lambda z: z.sum())
        >>> pairings(found, torch.ones(1, 1)), hamiltonians(found)
        ([4.0, 4.0, 4.0], [4.0, 4.0])
    """
    dz = direction
    values = [float((found.costates[0] * dz).sum())]
    for a, module in enumerate(found.modules):
        own, f = _parameters(module), _map(a, module)
        pushed = jvp(lambda z, f=f, own=own: f(z, own), (found.states[a],), (dz,))
        dz = pushed[1]
        values.append(float((found.costates[a + 1] * dz).sum()))
    return values


def _vjp(function: Callable[..., Tensor], *at: object) -> tuple[Tensor, Any]:
    found = vjp(function, *at)
    return found[0], found[1]


def _map(a: int, module: nn.Module) -> Callable[[Tensor, Gradients], Tensor]:
    """Return the module as a function of its input and parameters.

    Raises:
        LinearizationError: Every call changes its running statistics.
    """
    for path, norm in module.named_modules():
        counts = isinstance(norm, nn.modules.batchnorm._NormBase)
        if counts and norm.training and norm.track_running_stats:
            where = f"'{path}' in module {a}" if path else f"module {a}"
            raise LinearizationError(
                f"{where} ({type(norm).__name__}) counts every call into its running "
                "statistics in training mode, so it is not evaluated on its own; call "
                ".eval() on it and record the pass again"
            )
    binding = Binding(module)

    def f(z: Tensor, own: Gradients) -> Tensor:
        value: Tensor = binding.call(own, z.clone())
        return value

    return f


def _parameters(module: nn.Module) -> Gradients:
    return {
        name: p.detach().as_subclass(Tensor) for name, p in module.named_parameters()
    }


def _distance(given: Tensor, wanted: Tensor) -> float:
    size = float(wanted.abs().max())
    return float((given - wanted).abs().max()) / (size if size > 0 else 1.0)
