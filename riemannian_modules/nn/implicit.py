"""A fixed point as a differentiable function, by the implicit function theorem.

At ``z = f(x, z)`` the derivative is that of one evaluation of f times
``(I - df/dz)^-1``. So the solver runs without autograd, f is evaluated once with it,
and going backward a cotangent v at the outcome is replaced by the u that solves
``u = v + (df/dz)^T u`` before it enters that evaluation. What is inside f gets u, and
is recorded once, as any other layer is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge

from riemannian_modules.errors import LinearizationError, ShapeError
from riemannian_modules.leaves import leaves_of
from riemannian_modules.nn.adjoint import Adjoint, AdjointSolver, Direct, Krylov
from riemannian_modules.nn.solvers import OnFailure, Solver, gap, settle
from riemannian_modules.reverse import reverse_pass

__all__ = ["Method", "Report", "fixed_point"]

DIRECT_SIZE = 128


@dataclass(frozen=True)
class Method:
    """How a fixed point is found and differentiated.

    Attributes:
        solver: finds the fixed point.
        adjoint: solves the adjoint equation; None: directly for up to 128 numbers of
            state in each example, else by iteration.
        on_failure: what to do if either does not converge.
        label: whose fixed point it is, for errors.
    """

    solver: Solver
    adjoint: AdjointSolver | None
    on_failure: OnFailure
    label: str


@dataclass
class Report:
    """How well the last fixed point and its adjoint were solved.

    Attributes:
        residual: ``|f(x, z) - z| / |f(x, z)|`` of each example, ``(n,)``.
        iterations: evaluations of f by the solver.
        adjoint_residual: ``|u - (df/dz)^T u - v| / |v|`` of each example, ``(n,)``.
    """

    residual: Tensor | None = None
    iterations: int = 0
    adjoint_residual: Tensor | None = None


def fixed_point(
    step: Callable[[Tensor], Tensor], start: Tensor, method: Method
) -> tuple[Tensor, Report | None]:
    """Return the solution of ``z = step(z)``, differentiable in what step depends on.

    Under autograd its first derivatives are exact; asking for second ones is refused.
    Under the transforms of :mod:`torch.func` it is differentiated by two steps of
    Newton's method instead, exact up to third derivatives, with a dense ``I - df/dz``
    for every example.

    Args:
        step: the map, from and to ``(n, *state)``, one example at a time.
        start: the first iterate.
        method: how.

    Returns:
        ``(n, *state)``; and a report, which a backward pass will fill in further, or
        None under torch.func, where there are no values to report.

    Raises:
        NotConvergedError: the solver did not converge.
        ShapeError: the map changes the shape of the state.
        LinearizationError: forward-mode differentiation outside of torch.func.
    """
    checked = partial(_same_shape, step, method.label)
    with torch.no_grad():
        solved = method.solver(checked, start.detach())
        z = settle(
            solved.value,
            solved.converged,
            method.on_failure,
            f"{method.label}: not every example has converged after "
            f"{solved.iterations} iterations. The map may not contract (a smaller "
            "scale, or orthonormal weights, help), or the tolerance is too small; "
            "another solver, more iterations or on_failure='warn' are other ways out",
        ).detach()
    # Some versions of torch would use the weights that autocast has converted without
    # autograd, and lose their gradients.
    torch.clear_autocast_cache()
    if _transformed():
        return _newton(checked, _newton(checked, z)), None
    leaf = z.clone().requires_grad_()
    image = checked(leaf)
    report = Report(gap(image.detach(), z), solved.iterations)
    if forward_ad.unpack_dual(image).tangent is not None:
        raise LinearizationError(
            f"{method.label} has no forward-mode derivative under torch.autograd; use "
            "torch.func.jvp with torch.func.functional_call"
        )
    if not image.requires_grad:
        return image, report
    if all(variable is leaf for variable in leaves_of([image.grad_fn])):
        return image.detach(), report
    return _attach(image, _System(image, leaf, method, report)), report


def _same_shape(step: Callable[[Tensor], Tensor], label: str, state: Tensor) -> Tensor:
    image = step(state)
    if image.shape != state.shape:
        raise ShapeError(
            f"{label}: a state of shape {tuple(state.shape)} became "
            f"{tuple(image.shape)}; both must be the same. Say the size of the state, "
            "without the batch, when the module is built"
        )
    return image


def _transformed() -> bool:
    """Whether a transform of torch.func is under way, in which this is refused."""
    try:
        torch.empty(0).requires_grad_()
    except RuntimeError:
        return True
    return False


class _System:
    """The adjoint equation at one fixed point; prepared when it is first needed."""

    def __init__(
        self, image: Tensor, state: Tensor, method: Method, report: Report
    ) -> None:
        self.image, self._state = image, state
        self._method, self._report = method, report
        self._adjoint: Adjoint | None = None

    def apply(self, u: Tensor) -> Tensor:
        """Return ``u - (df/dz)^T u``."""
        (pulled,) = torch.autograd.grad(
            self.image,
            self._state,
            u,
            retain_graph=True,
            create_graph=torch.is_grad_enabled(),
            allow_unused=True,
            materialize_grads=True,
        )
        return u - pulled.to(u.dtype)

    def matrix(self) -> Tensor:
        """Return ``I - df/dz`` of each example, ``(n, d, d)``."""
        n, d = len(self._state), self._state[0].numel()
        eye = torch.eye(d, dtype=self.image.dtype, device=self.image.device)
        basis = eye.view(d, 1, *self.image.shape[1:]).expand(d, *self.image.shape)
        edge = get_gradient_edge(self._state)
        (rows,), _ = reverse_pass([self.image], [edge], [basis], batched=None)
        if rows is None:
            return eye.expand(n, d, d)
        return eye - rows.reshape(d, n, d).transpose(0, 1)

    def solve(self, v: Tensor) -> Tensor:
        """Return u with ``u = v + (df/dz)^T u``, also inside of vmap."""
        if self._adjoint is None:
            with torch.no_grad():
                self._adjoint = self._solver()(self)
            self._report.adjoint_residual = self._adjoint.residual
        u, converged = self._adjoint.solve(v)
        u = self._settle(u, converged)
        return u + _once(self.image) if torch.is_grad_enabled() else u

    def _solver(self) -> AdjointSolver:
        small = self._state[0].numel() <= DIRECT_SIZE
        return self._method.adjoint or (Direct() if small else Krylov())

    def _settle(self, u: Tensor, converged: Tensor) -> Tensor:
        return settle(
            u,
            converged,
            self._method.on_failure,
            f"{self._method.label}: the adjoint equation u = v + (df/dz)^T u is not "
            "solved. I - df/dz may be singular there, or the examples interact; "
            "adjoint=Direct() solves it without iteration for a small state, "
            "adjoint=Krylov(...) with more iterations for a large one",
        )


def _attach(image: Tensor, system: _System) -> Tensor:
    out: Tensor = _Attach.apply(image, system)  # type: ignore[no-untyped-call]
    return out


def _once(image: Tensor) -> Tensor:
    zero: Tensor = _Once.apply(image)  # type: ignore[no-untyped-call]
    return zero


class _Attach(torch.autograd.Function):
    """The identity, backward ``v -> u``."""

    @staticmethod
    def forward(ctx: Any, image: Tensor, system: _System) -> Tensor:
        ctx.system = system
        return image.clone()

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor, None]:
        return ctx.system.solve(v), None


class _Once(torch.autograd.Function):
    """Zero, with a derivative that is refused."""

    @staticmethod
    def forward(ctx: Any, image: Tensor) -> Tensor:
        return image.new_zeros(())

    @staticmethod
    def backward(ctx: Any, v: Tensor) -> Tensor:
        raise LinearizationError(
            "a fixed point was differentiated twice under torch.autograd, which is "
            "exact only once; use torch.func (hessian, jvp, vjp) with "
            "torch.func.functional_call, where second derivatives are exact"
        )


def _newton(step: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Return ``z + (I - df/dz)^-1 (f(z) - z)`` in operations of torch.func only.

    If z is right up to derivatives of order k, this is right up to order 2 k + 1.
    """
    image, pull, *_ = torch.func.vjp(step, z)
    n, d = len(z), z[0].numel()
    eye = torch.eye(d, dtype=z.dtype, device=z.device)
    basis = eye.view(d, 1, *z.shape[1:]).expand(d, *z.shape)
    (rows,) = torch.func.vmap(pull)(basis)
    matrix = eye - rows.reshape(d, n, d).transpose(0, 1)
    change = torch.linalg.solve(matrix, (image - z).reshape(n, d, 1))
    return z + change.view_as(z)
