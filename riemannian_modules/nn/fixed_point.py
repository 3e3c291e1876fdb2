"""Modules that are defined by an equation."""

from abc import abstractmethod
from functools import partial
from typing import Any

from torch import Tensor, nn

from riemannian_modules.nn.adjoint import AdjointSolver
from riemannian_modules.nn.composition import Composition, require_module
from riemannian_modules.nn.implicit import Method, Report, fixed_point
from riemannian_modules.nn.initial import Size, zero_state
from riemannian_modules.nn.solvers import Anderson, OnFailure, Solver

__all__ = ["FixedPoint", "ImplicitModule"]


class ImplicitModule(Composition):
    """A module whose output solves ``z = step(x, z)``; a subclass says which step.

    The solver's iterations are not differentiated; one evaluation of the step at the
    solution is, and a cotangent v at the output becomes the solution of the adjoint
    equation ``u = v + (d step/dz)^T u`` before it enters that evaluation.

    Args:
        solver: finds the solution; None: :class:`Anderson`.
        adjoint: solves the adjoint equation; None: :class:`Direct` for states of up
            to 128 numbers in each example, else :class:`Krylov`.
        on_failure: what to do if one of both does not converge: ``"raise"`` an
            error, ``"warn"`` or ``"ignore"`` it. Inside of vmap, and off the CPU where
            looking would wait for the device, an error becomes NaN.

    Raises:
        ValueError: an unknown ``on_failure``.
    """

    def __init__(
        self,
        *,
        solver: Solver | None = None,
        adjoint: AdjointSolver | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__()
        if on_failure not in ("raise", "warn", "ignore"):
            raise ValueError(
                f"on_failure={on_failure!r}; choose 'raise', 'warn' or 'ignore'"
            )
        label = type(self).__name__
        self.method = Method(solver or Anderson(), adjoint, on_failure, label)
        self._report = Report()

    @property
    def residual(self) -> Tensor | None:
        """``|step(x, z) - z| / |step(x, z)|`` of each example in the last forward.

        None before the first one; passes under torch.func are not reported.
        """
        return self._report.residual

    @property
    def adjoint_residual(self) -> Tensor | None:
        """Relative residual of the adjoint equation in the last backward pass.

        Measured for each example on a cotangent of the solver's own; None before the
        first one.
        """
        return self._report.adjoint_residual

    @property
    def iterations(self) -> int:
        """Evaluations of the step by the solver in the last forward pass."""
        return self._report.iterations

    @abstractmethod
    def step(self, x: Any, z: Tensor) -> Tensor:
        """Return the next state.

        Args:
            x: the module's input.
            z: a state, ``(n, *state)``.

        Returns:
            A state of the same shape; that of each example depends on this example
            only.
        """

    @abstractmethod
    def start(self, x: Any) -> Tensor:
        """Return the state that the solver begins with.

        Args:
            x: the module's input.

        Returns:
            ``(n, *state)``.
        """

    def forward(self, x: Any, start: Tensor | None = None) -> Tensor:
        """Return the solution.

        Args:
            x: input.
            start: where the solver begins, ``(n, *state)``; None: at :meth:`start`.

        Returns:
            ``(n, *state)``.
        """
        z = self.start(x) if start is None else start
        solution, report = fixed_point(partial(self.step, x), z, self.method)
        if report is not None:
            report.adjoint_residual = self._report.adjoint_residual
            self._report = report
        return solution

    def extra_repr(self) -> str:
        """Say how it is solved."""
        return f"solver={type(self.method.solver).__name__}"


class FixedPoint(ImplicitModule):
    """The state that a module maps to itself: the z with ``z = module(x, z)``.

    Recursion: with ``U = L_out (I - dz)^-1``, where dz is the derivative of the module
    by the state, ``L_in = U dx`` and ``K = U dw`` (Bai, Kolter & Koltun, 2019).

    Args:
        module: a module of two arguments, input and state, that returns a state, one
            example at a time; a contraction in the state, or at least one whose
            iteration converges. It has to be deterministic.
        size: shape of the state without the batch; None: the input's.
        solver: as in :class:`ImplicitModule`.
        adjoint: as there.
        on_failure: as there.

    Shapes: ``(n, *in)`` to ``(n, *size)``. Cost: as many evaluations of the module as
    the solver needs, and one that is remembered for the backward pass; see the adjoint
    solvers for theirs. Second derivatives need torch.func.

    >>> import torch
    >>> from riemannian_modules.nn import Join, Sequential
    >>> _ = torch.manual_seed(0)
    >>> inner = nn.Linear(2, 2)
    >>> with torch.no_grad():
    ...     _ = inner.weight.mul_(0.5)
    >>> layer = FixedPoint(Sequential(Join(nn.Linear(3, 2), inner), nn.Tanh()), 2)
    >>> x = torch.randn(4, 3)
    >>> z = layer(x)
    >>> torch.allclose(z, layer.module(x, z), atol=1e-5)
    True
    >>> bool((layer.residual < 1e-5).all())
    True
    """

    def __init__(
        self,
        module: nn.Module,
        size: Size | None = None,
        *,
        solver: Solver | None = None,
        adjoint: AdjointSolver | None = None,
        on_failure: OnFailure = "raise",
    ) -> None:
        super().__init__(solver=solver, adjoint=adjoint, on_failure=on_failure)
        self.module = require_module(module, "module")
        self.size = size

    def start(self, x: Any) -> Tensor:
        """Return zero."""
        size = tuple(x.shape[1:]) if self.size is None else self.size
        return zero_state(self, x, size)

    def step(self, x: Any, z: Tensor) -> Tensor:
        """Return ``module(x, z)``."""
        image: Tensor = self.module(x, z)
        return image
